"""Damage image files and kill runs, many times, and record whether anything was lost, hung or crashed.

Four parts, each of a size that can be set, 0 leaves it out:

- images: mutated files of every format are read in a child process with limits of time and memory. Every one
  is read, or refused by an error that names it.
- batches, trainings, eyes: `register_many`, `train` and `synthesise` are killed (SIGKILL) at random moments,
  started again, and at the end hold what an undisturbed run holds, bit for bit.

Usage (`make test-full`): python tools/fault_campaign.py tests/last_fault_campaign.json [--images 10000] ...
The exit status is 1 where anything went wrong; the JSON file says what, and which number of which part.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from loftr_curriculum.io.files import FileError
from loftr_curriculum.io.images import image_size, read_image

SECONDS = 10.0  # that reading a file may take
MEMORY = 1500  # MB that reading a file may take
FORK = multiprocessing.get_context("fork")


# --- images: whole files ---------------------------------------------------------------------------------


def picture(side: int = 96) -> np.ndarray:
    "Something to look at, (side, side, 3) uint8."
    noise = np.random.default_rng(0).normal(size=(side, side, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    return np.uint8(cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX))


def encoded(suffix: str, image: np.ndarray) -> bytes:
    "The image as a file of a format that OpenCV writes."
    return cv2.imencode(suffix, image)[1].tobytes()


def big_tiff(gray: np.ndarray) -> bytes:
    "An uncompressed grey image as BigTIFF, with 8-byte offsets."
    height, width = gray.shape
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),  # bits
        (259, 3, 1),  # not compressed
        (262, 3, 1),  # black is 0
        (273, 16, 0),  # where the strip begins, filled in below
        (277, 3, 1),  # samples
        (278, 4, height),
        (279, 16, gray.nbytes),
    ]
    begin = 16 + 8 + 20 * len(entries) + 8
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(entries))
    for tag, kind, value in entries:
        head += struct.pack("<HHQQ", tag, kind, 1, begin if tag == 273 else value)
    return head + bytes(8) + gray.tobytes()


def dicom(gray: np.ndarray) -> bytes | None:
    "The image as a DICOM file; None where pydicom is not installed."
    try:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    except ImportError:
        return None
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.5.1"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["campaign"])
    data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    data.Rows, data.Columns = gray.shape
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    data.PixelRepresentation = 0
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.Modality = "OP"
    data.PixelData = gray.tobytes()
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def whole_files() -> list[tuple[str, bytes]]:
    "A name and the content of a small file of every format."
    image = picture()
    gray = np.ascontiguousarray(image[:, :, 0])
    files = [
        ("colour.png", encoded(".png", image)),
        ("deep.png", encoded(".png", gray.astype(np.uint16) * 256)),
        ("colour.jpg", encoded(".jpg", image)),
        ("colour.tif", encoded(".tif", image)),
        ("deep.tiff", encoded(".tiff", gray.astype(np.uint16) * 256)),
        ("big.tif", big_tiff(gray)),
        ("colour.bmp", encoded(".bmp", image)),
        ("colour.webp", encoded(".webp", image)),
        ("gray.dcm", dicom(gray)),
    ]
    return [(name, data) for name, data in files if data is not None]


# --- images: damage --------------------------------------------------------------------------------------


def cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_anywhere(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 10, 50))):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed)


def flip_in_header(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(200, len(data)))] = rng.randrange(256)
    return bytes(changed)


def lie_in_header(data: bytes, rng: random.Random) -> bytes:
    "A number of the header becomes a very large, a very small or a negative one."
    changed = bytearray(data)
    size = rng.choice((2, 4, 8))
    place = rng.randrange(min(200, len(data) - size))
    number = rng.choice(
        (bytes(size), b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), b"\xff" * (size - 1) + b"\x7f")
    )
    changed[place : place + size] = number
    return bytes(changed)


def repeat_a_part(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    part = data[begin : begin + rng.randint(1, 400)]
    place = rng.randrange(len(data))
    return data[:place] + part * rng.randint(1, 20) + data[place:]


def lose_a_part(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    return data[:begin] + data[begin + rng.randint(1, 400) :]


DAMAGE = (cut_off, flip_anywhere, flip_in_header, lie_in_header, repeat_a_part, lose_a_part)


def mutated(number: int, seed: int, files: list) -> tuple[str, bytes]:
    "The name and content of a file, a function of its number and the seed alone."
    rng = random.Random(f"{seed} {number}")
    name, data = files[number % len(files)]
    for _ in range(rng.choice((1, 1, 2))):
        data = rng.choice(DAMAGE)(data, rng) or b"\0"
        if len(data) < 16:
            break
    return f"{number:06d}_{name}", data


# --- images: reading under limits ------------------------------------------------------------------------


def memory_of_process(name: str) -> int:
    "VmHWM, the peak of resident memory, or VmSize; MB."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) // 1024
    return 0


def forget_peak() -> None:
    "The peak of memory begins anew."
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def outcome_of(path: Path) -> str:
    "What reading a file comes to: `read`, `refused`, or what is wrong."
    try:
        image_size(path)
        read_image(path)
    except FileError as error:
        return "refused" if str(path) in str(error) else f"an error that does not name the file: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def read_files(pipe, numbers: range, seed: int, folder: Path) -> None:
    "In a child process: mutates and reads, and says before and after each file where it is."
    import resource

    cv2.setNumThreads(1)
    most = (memory_of_process("VmSize") + MEMORY) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)  # of the libraries
    files = whole_files()
    for number in numbers:
        name, data = mutated(number, seed, files)
        path = folder / name
        path.write_bytes(data)
        forget_peak()
        pipe.send(number)
        start = time.monotonic()
        outcome = outcome_of(path)
        pipe.send((outcome, time.monotonic() - start, memory_of_process("VmHWM")))
        path.unlink()
    pipe.send(None)


def images_campaign(count: int, seed: int) -> dict:
    "Counts of outcomes, the slowest and the largest reading, and the failures."
    found = {"files": count, "outcomes": Counter(), "slowest_s": 0.0, "largest_mb": 0, "failures": []}
    begin = 0
    while begin < count:
        begin = read_until_trouble(range(begin, count), seed, found)
    return found | {"slowest_s": round(found["slowest_s"], 2), "outcomes": dict(found["outcomes"])}


def read_until_trouble(numbers: range, seed: int, found: dict) -> int:
    "Reads in one child until all is done, or until the child dies or hangs; the number to go on with."
    ours, theirs = FORK.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = FORK.Process(target=read_files, args=(theirs, numbers, seed, Path(folder)))
        child.start()
        theirs.close()
        number = numbers.start
        try:
            while (number := expect(ours, 60.0)) is not None:
                note(found, number, *expect(ours, SECONDS))
            return numbers.stop
        except (EOFError, TimeoutError) as error:
            what = "hung" if isinstance(error, TimeoutError) else "the process died"
            found["failures"].append({"file": number, "what": what})
            return (numbers.start if number is None else number) + 1
        finally:
            child.kill()
            child.join()


def expect(pipe, seconds: float):
    "The next word of the child; TimeoutError where none comes, EOFError where the child is dead."
    if not pipe.poll(seconds):
        raise TimeoutError
    return pipe.recv()


def note(found: dict, number: int, outcome: str, seconds: float, memory: int) -> None:
    "Put down what a file came to."
    found["slowest_s"] = max(found["slowest_s"], seconds)
    found["largest_mb"] = max(found["largest_mb"], memory)
    good = outcome in ("read", "refused")
    found["outcomes"][outcome if good else "wrong"] += 1
    if memory > MEMORY:
        good, outcome = False, f"took {memory} MB"
    if not good:
        found["failures"].append({"file": number, "what": outcome[:300]})


# --- kills -----------------------------------------------------------------------------------------------


class Batch:
    "Three pairs, registered with matches that SIFT finds."

    def __init__(self, folder: Path):
        import loftr_curriculum.registration.many  # noqa: F401, once for all child processes

        self.table = folder / "pairs.csv"
        scene = picture(260)
        cv2.imwrite(str(folder / "a.png"), scene)
        cv2.imwrite(str(folder / "b.png"), np.ascontiguousarray(np.rot90(scene)))
        cv2.imwrite(str(folder / "black.png"), np.zeros_like(scene))
        rows = ("1,a.png,b.png", "2,a.png,black.png", "3,b.png,a.png", "4,a.png,lost.png")
        self.table.write_text("\n".join(("id,fixed,moving", *rows)) + "\n")

    def run(self, out: Path) -> None:
        from loftr_curriculum.registration.config import RegistrationConfig
        from loftr_curriculum.registration.many import register_many

        config = RegistrationConfig(transform="affine", verify=False, check_mirrored=False)
        register_many(self.table, out, matcher=Corners(), config=config, progress=False, save_every=0.0)

    def result(self, out: Path):
        rows = list(csv.DictReader((out / "results.csv").open(encoding="utf-8")))
        measured = ("seconds", "memory_mb")
        maps = [json.loads(line) for line in (out / "maps.jsonl").read_text().splitlines()]
        return (
            [{name: value for name, value in row.items() if name not in measured} for row in rows],
            {entry["id"]: entry for entry in maps},
            json.loads((out / "transforms.json").read_text()),
        )


class Corners:
    "SIFT in the place of a trained matcher."

    def match(self, image0, image1, **ignored):
        from loftr_curriculum.model.config import Matches

        sift = cv2.SIFT_create(300)
        seen = [sift.detectAndCompute(np.uint8(127 * i[0, 0].numpy() + 128), None) for i in (image0, image1)]
        (points0, words0), (points1, words1) = seen
        pairs = []
        if words0 is not None and words1 is not None:
            pairs = cv2.BFMatcher(crossCheck=True).match(words0, words1)
        start = np.array([points0[pair.queryIdx].pt for pair in pairs]).reshape(-1, 2)
        end = np.array([points1[pair.trainIdx].pt for pair in pairs]).reshape(-1, 2)
        return [Matches(start, end, np.array([1 / (1 + pair.distance) for pair in pairs]))]


class Training:
    "Three epochs of two steps, with a checkpoint after every step."

    def __init__(self, folder: Path):
        from loftr_curriculum.data.config import DataConfig
        from loftr_curriculum.model.config import MatcherConfig
        from loftr_curriculum.retina.config import EyeConfig
        from loftr_curriculum.training.config import TrainConfig
        from loftr_curriculum.training.run import train  # noqa: F401, once for all child processes

        data = DataConfig(
            worlds=1,
            val_worlds=1,
            modes=("cf-fa",),
            eye=EyeConfig(size=128),
            cache=str(folder / "eyes"),
            render_workers=0,
            workers=0,
            size=64,
            pairs_per_epoch=4,
            val_pairs=2,
            batch_size=2,
        )
        matcher = MatcherConfig(dims=(8, 16, 32), layers=1)
        self.config = TrainConfig(
            epochs=3, data=data, matcher=matcher, precision="32", record_every=0, checkpoint_minutes=0.0
        )

    def run(self, out: Path) -> None:
        from dataclasses import replace

        from loftr_curriculum.training.run import train

        train(replace(self.config, out=str(out)), progress=False)

    def result(self, out: Path):
        from safetensors.numpy import load_file

        weights = load_file(out / "weights.safetensors")
        return {name: array.tobytes() for name, array in weights.items()}


class Eyes:
    "Two small cases of generated eyes."

    def __init__(self, folder: Path):
        import loftr_curriculum.retina.synth  # noqa: F401, once for all child processes

    def run(self, out: Path) -> None:
        from loftr_curriculum.retina.config import EyeConfig
        from loftr_curriculum.retina.synth import synthesise

        synthesise(out, cases=2, size=64, eye=EyeConfig(size=128), workers=1, progress=False)

    def result(self, out: Path):
        return {
            path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
        }


def in_silence(work, out: Path) -> None:
    "In a child process: one thread, nothing said."
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    work.run(out)


def run_in_child(work, out: Path, seconds: float | None = None) -> int:
    "Exit status of a run; it is killed after so many seconds, or after ten minutes."
    child = FORK.Process(target=in_silence, args=(work, out))
    child.start()
    child.join(600 if seconds is None else seconds)
    child.kill()
    child.join()
    return child.exitcode


def kills_campaign(make, kills: int, seed: int) -> dict:
    "Kills runs at random moments until there were so many kills; every run is finished and looked at."
    rng = random.Random(seed)
    found = {"kills": 0, "runs": 0, "finished_before_the_kill": 0, "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        work = make(folder)
        run_in_child(work, folder / "warm")
        start = time.monotonic()
        run_in_child(work, folder / "whole")  # the first one has filled what is kept
        took = time.monotonic() - start
        whole = work.result(folder / "whole")
        while found["kills"] < kills:
            out = folder / f"run{found['runs']}"
            moments = [round(rng.uniform(0, took), 3) for _ in range(rng.randint(1, 3))]
            trouble = killed_and_finished(work, out, moments, whole, found)
            found["runs"] += 1
            if trouble:
                found["failures"].append(
                    {"run": found["runs"] - 1, "killed_after_s": moments, "what": trouble}
                )
            shutil.rmtree(out, ignore_errors=True)
    return found | {"seconds_of_a_run": round(took, 2)}


def killed_and_finished(work, out: Path, moments: list, whole, found: dict) -> str:
    "What is wrong with a run that was killed at these moments and then finished; empty where nothing is."
    for moment in moments:
        status = run_in_child(work, out, moment)
        found["kills" if status == -signal.SIGKILL else "finished_before_the_kill"] += 1
        if status not in (0, -signal.SIGKILL):
            return f"started again it ended with status {status}"
    status = run_in_child(work, out)
    if status:
        return f"the last start ended with status {status}"
    try:
        return "" if work.result(out) == whole else "the results differ from those of the undisturbed run"
    except (OSError, ValueError, KeyError) as error:
        return f"the results cannot be read: {error}"


# --- the whole -------------------------------------------------------------------------------------------


def read_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("record", type=Path, help="JSON file for what was found")
    parser.add_argument("--images", type=int, default=10_000, help="mutated files")
    parser.add_argument("--batches", type=int, default=200, help="kills of register_many")
    parser.add_argument("--trainings", type=int, default=200, help="kills of a tiny training")
    parser.add_argument("--eyes", type=int, default=50, help="kills of synthesise")
    parser.add_argument("--seed", type=int, default=0, help="of damage and moments")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    told = read_arguments(argv)
    parts = {
        "images": (told.images, lambda: images_campaign(told.images, told.seed)),
        "register-many": (told.batches, lambda: kills_campaign(Batch, told.batches, told.seed)),
        "train": (told.trainings, lambda: kills_campaign(Training, told.trainings, told.seed)),
        "synth": (told.eyes, lambda: kills_campaign(Eyes, told.eyes, told.seed)),
    }
    found = {}
    for name, (size, campaign) in parts.items():
        if not size:
            continue
        start = time.monotonic()
        found[name] = campaign() | {"seconds": round(time.monotonic() - start)}
        print(name, json.dumps(found[name]), flush=True)
        told.record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(part["failures"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
