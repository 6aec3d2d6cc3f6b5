"""Pairs a minute and memory of a batch with one process, with two, and with a Dask cluster on this machine.

    python tools/batch_speed.py TABLE [--pairs N] [--dask]      TABLE: id, fixed, moving

Each way registers the same N pairs with the packaged weights into a temporary folder. Prints one line a way:
pairs a minute, how many times the rate of one process, seconds of processor a pair (the figure that a busy
machine changes least; not known of a cluster's workers), and the largest memory of a process. The start of
the processes, a few seconds, is included: measure a hundred pairs or more. With --bookkeeping N it times what
surrounds N registrations that cost nothing: the first start, and the start of a finished batch.

    python tools/batch_speed.py --memory PX [--save warped,overlay]
    python tools/batch_speed.py --shared PX

--memory registers generated eyes of PX x PX pixels in a worker, with the pictures of the report and of
--save, and says how much memory the worker took. --shared registers twelve of them onto one fixed image,
and onto twelve copies of it, and says how much processor time the one saves.
"""

import argparse
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loftr_curriculum.registration import register_many
from loftr_curriculum.registration.journal import read_results
from loftr_curriculum.registration.table import name_folders, read_batch


def enough_pairs(table, n):
    """The first n pairs of a table, repeated under other ids where it has fewer."""
    pairs = read_batch(table)
    return name_folders([replace(pairs[k % len(pairs)], id=f"{k}") for k in range(n)])


def processor_seconds():
    """Of this process and of those that it has seen end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(pairs, folder, **how):
    """Seconds, seconds of processor, and the largest memory of a process, MB."""
    start, before = time.perf_counter(), processor_seconds()
    register_many(pairs, folder, progress=False, **how)
    seconds, processor = time.perf_counter() - start, processor_seconds() - before
    rows = read_results(folder / "results.csv").values()
    memory = max(int(row["memory_mb"] or 0) for row in rows)
    return seconds, None if "scheduler" in how else processor, memory


@contextmanager
def dask_cluster(workers, folder):
    """The address of a scheduler with workers of one thread each, on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    scheduler = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    worker = ["distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
    worker += ["--host", "127.0.0.1", "--local-directory", str(folder)]
    started = [
        subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.DEVNULL, env=one_thread_each())
        for words in (scheduler, *[worker] * workers)
    ]
    try:
        yield address
    finally:
        for process in reversed(started):
            end(process)


def end(process, patience=20):
    """Ask a process to end, and end it where it does not within so many seconds."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def one_thread_each():
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def say(name, pairs, seconds, processor, memory, base):
    rate = 60 * len(pairs) / seconds
    said = [f"{name}: {rate:.1f} pairs a minute"]
    if base is not None:
        said.append(f"{rate / base:.2f} times one process")
    if processor is not None:
        said.append(f"{processor / len(pairs):.2f} s of processor a pair")
    print(", ".join([*said, f"largest process {memory} MB"]), flush=True)
    return rate


KEPT = ("results.csv", "maps.jsonl", "transforms.json")


class Nothing:
    """A matcher that finds nothing, at once."""

    def match(self, image0, image1, **rest):
        import numpy as np

        from loftr_curriculum.model.config import Matches

        return [Matches(np.empty((0, 2)), np.empty((0, 2)), np.empty(0))]


def bookkeeping(n):
    """Start of a batch of n pairs whose files are missing, and of one that is finished."""
    import numpy as np

    import loftr_curriculum.registration.workers as workers
    from loftr_curriculum.registration.config import RegistrationConfig
    from loftr_curriculum.registration.pair import Registration, Side

    folder = Path(tempfile.mkdtemp())
    rows = "".join(f"{k},f{k}.png,m{k}.png\n" for k in range(n))
    (folder / "pairs.csv").write_text("id,fixed,moving\n" + rows)
    answer = Registration.failed(("nothing was tried",), (100, 100), (100, 100))
    workers.register = lambda *images, **how: answer
    workers.open_side = lambda image, name, config: Side(None, (100, 100), np.zeros((100, 100), np.uint8), {})
    workers.stamp_of = lambda path: None
    for name in ("first run", "finished batch"):
        start = time.perf_counter()
        register_many(
            folder / "pairs.csv",
            folder / "out",
            matcher=Nothing(),
            config=RegistrationConfig(),
            progress=False,
        )
        print(f"{n} pairs, {name}: {time.perf_counter() - start:.1f} s", flush=True)
    tracemalloc.start()
    rows = read_results(folder / "out" / "results.csv")
    each = tracemalloc.get_traced_memory()[0] / len(rows) / 1000
    sizes = {name: (folder / "out" / name).stat().st_size / n / 1000 for name in KEPT}
    said = ", ".join(f"{name} {size:.2f} kB" for name, size in sizes.items())
    print(f"a pair takes {each:.1f} kB of memory in the first process; {said}")


def large_pair(folder, side):
    """A table of one pair: a photograph and an angiogram of a generated eye, enlarged, as JPEG."""
    import cv2

    from loftr_curriculum.geometry import affine, warp_image
    from loftr_curriculum.retina.config import EyeConfig, seeds_of
    from loftr_curriculum.retina.world import make_world

    (seed,) = seeds_of("report", 1, 0)
    eye = make_world(seed, EyeConfig(), ("cf", "fa"))
    middle = [(side - 1) / 2] * 2
    turn = affine(12, 1.1, (side / 40, -side / 60), center=middle)
    for name in ("cf", "fa"):
        image = cv2.resize(eye.images[name], (side, side), interpolation=cv2.INTER_CUBIC)
        if name == "fa":
            image = warp_image(image, turn, (side, side))
        cv2.imwrite(str(folder / f"{name}.jpg"), image if image.ndim == 2 else image[..., ::-1])
    (folder / "pairs.csv").write_text("id,fixed,moving\ne,cf.jpg,fa.jpg\n")
    return folder / "pairs.csv"


def memory(side, save):
    """The memory of the worker that registers six pairs of one size."""
    from loftr_curriculum.report.batch import BatchPictures

    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        pairs = enough_pairs(large_pair(folder, side), 6)
        how = {"workers": 2, "pictures": BatchPictures(folder / "out", save)}
        seconds, processor, largest = measure(pairs, folder / "out", **how)
        verdicts = {row["verdict"] for row in read_results(folder / "out" / "results.csv").values()}
    said = f"{side} x {side} px, {len(pairs)} pairs ({', '.join(verdicts)})"
    print(f"{said}: largest worker {largest} MB, {processor / len(pairs):.2f} s of processor a pair")


def shared(side, n=12):
    """Processor time of n pairs with one fixed image, and with n copies of it."""
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        one = enough_pairs(large_pair(folder, side), n)
        copies = []
        for pair in one:
            name = f"copy{pair.id}.jpg"
            shutil.copy(folder / "cf.jpg", folder / name)
            copies.append(replace(pair, fixed=name))
        measure(one[:1], folder / "warm")
        times = {name: measure(pairs, folder / name)[1] for name, pairs in (("one", one), ("copies", copies))}
    each = {name: seconds / n for name, seconds in times.items()}
    said = f"one fixed image {each['one']:.2f} s of processor a pair, copies of it {each['copies']:.2f} s"
    print(f"{side} x {side} px, {n} pairs: {said}, ratio {each['one'] / each['copies']:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", nargs="?")
    parser.add_argument("--pairs", type=int, default=100, help="pairs that each way registers")
    parser.add_argument("--dask", action="store_true", help="also on a Dask cluster with two workers")
    parser.add_argument("--bookkeeping", type=int, help="time the start of so many pairs instead")
    parser.add_argument("--memory", type=int, help="measure the memory that pairs of so many px a side take")
    parser.add_argument("--save", default="", help="with --memory: pictures that are written for every pair")
    parser.add_argument(
        "--shared", type=int, help="measure what one fixed image for many pairs saves, px a side"
    )
    a = parser.parse_args()
    if a.shared:
        shared(a.shared)
        return
    if a.memory:
        memory(a.memory, tuple(filter(None, a.save.split(","))))
        return
    if a.bookkeeping:
        bookkeeping(a.bookkeeping)
        return
    if a.table is None:
        parser.error("expected a table of pairs, or --bookkeeping")
    pairs = enough_pairs(a.table, a.pairs)
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        one = say("1 process", pairs, *measure(pairs, folder / "1"), None)
        say("2 processes", pairs, *measure(pairs, folder / "2", workers=2), one)
        if a.dask:
            with dask_cluster(2, folder) as address:
                say("2 Dask workers", pairs, *measure(pairs, folder / "d", scheduler=address), one)


if __name__ == "__main__":
    main()
