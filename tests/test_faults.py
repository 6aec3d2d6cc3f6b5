"""Guards against what goes wrong outside: signals, two runs in one folder, full disks, broken and
hostile files.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loftr_curriculum.cli import main
from loftr_curriculum.io.files import FileError, read_bytes
from loftr_curriculum.io.images import MOST_PIXELS, read_image
from loftr_curriculum.io.lock import LOCK, only_run
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.model.weights import load_matcher, save_matcher
from loftr_curriculum.registration.many import register_many
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.retina.synth import synthesise

ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from loftr_curriculum.cli import main; sys.exit(main())"
unix = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signals of Unix")

TINY = """
epochs: 60
data:
  worlds: 1
  val_worlds: 1
  modes: [cf-fa]
  eye: {size: 128}
  cache: CACHE
  render_workers: 0
  workers: 2
  size: 96
  start_size: 64
  grow_epochs: 2.0
  widen_epochs: 3.0
  pairs_per_epoch: 40
  val_pairs: 2
  batch_size: 2
matcher: {dims: [8, 16, 32], layers: 1}
precision: "32"
record_every: 0
"""


def environment() -> dict:
    "Of a child process that finds this package."
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def heed_every_signal() -> None:
    "A test that was started by `nohup` would hand its deafness to SIGHUP on."
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(*words, code=COMMAND) -> subprocess.Popen:
    "The command line in a session of its own."
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(),
        preexec_fn=heed_every_signal if hasattr(signal, "SIGHUP") else None,
    )


def wait_for(path, process, seconds=60):
    "Until the file is there."
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.02)


def children_of(process) -> list:
    "Process ids of a process's children."
    pids = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    return pids


def end_with(process, seconds=30):
    "The exit status; the test fails where the process does not end."
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the process did not end")
    return process.returncode, said


@pytest.fixture
def tiny(tmp_path):
    "A configuration file of a training that takes a minute."
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("CACHE", str(tmp_path / "eyes")))
    return path


def to_parent(process, number):
    os.kill(process.pid, number)


def to_group(process, number):
    os.killpg(process.pid, number)


def as_timeout_does(process, number):
    os.kill(process.pid, number)
    os.killpg(process.pid, number)


def twice(process, number):
    os.kill(process.pid, number)
    time.sleep(0.02)
    os.kill(process.pid, number)


def to_a_loader(process, number):
    os.kill(children_of(process)[0], number)


SIGNALS = [
    pytest.param(as_timeout_does, "SIGTERM", {143}, id="timeout"),
    pytest.param(to_group, "SIGHUP", {129}, id="hang-up", marks=pytest.mark.slow),
    pytest.param(to_parent, "SIGTERM", {143}, id="parent", marks=pytest.mark.slow),
    pytest.param(to_a_loader, "SIGTERM", {2}, id="child", marks=pytest.mark.slow),
    pytest.param(to_parent, "SIGHUP", {129}, id="hang-up-parent", marks=pytest.mark.slow),
    pytest.param(twice, "SIGINT", {130, -2}, id="ctrl-c-twice", marks=pytest.mark.slow),
]


@unix
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the children from /proc")
@pytest.mark.parametrize("send, name, statuses", SIGNALS)
def test_a_signal_ends_a_training_with_loaders_and_the_checkpoint_is_whole(
    tiny, tmp_path, send, name, statuses
):
    out = tmp_path / "run"
    process = start("train", "--config", tiny, "--out", out)
    wait_for(out / "last.ckpt", process)
    children = children_of(process)
    assert children
    send(process, getattr(signal, name))
    status, said = end_with(process)
    assert status in statuses, said
    assert "Traceback" not in said
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] >= 20
    assert not (out / LOCK).exists()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()], "a loader was left behind"


STARVED = """
import sys, time
from loftr_curriculum.cli import main
from loftr_curriculum.data.module import TrainPairs

draw = TrainPairs.__getitem__


def slow(self, number):
    if number >= 44:
        time.sleep(300)
    return draw(self, number)


TrainPairs.__getitem__ = slow
sys.exit(main())
"""


@unix
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the children from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("send", [to_parent, as_timeout_does])
def test_a_training_that_waits_for_slow_loaders_ends_too_and_keeps_every_step(tiny, tmp_path, send):
    out = tmp_path / "run"
    process = start("train", "--config", tiny, "--out", out, code=STARVED)
    wait_for(out / "last.ckpt", process)
    time.sleep(2)
    children = children_of(process)
    send(process, signal.SIGTERM)
    status, said = end_with(process, 15)
    assert status == 143, said
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 22
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()], "a loader was left behind"


BATCH = """
import sys, time
import numpy as np
from loftr_curriculum.model.config import Matches
from loftr_curriculum.registration.many import register_many
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.retina.synth import synthesise


class Slow:
    def match(self, image0, image1, **ignored):
        time.sleep(0.05)
        return [Matches(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))]


register_many(sys.argv[1], sys.argv[2], matcher=Slow(), progress=False)
"""


@pytest.fixture
def table(tmp_path):
    "A table of a hundred pairs of two small images."
    scene = np.random.default_rng(0).integers(0, 255, (160, 160), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), cv2.GaussianBlur(scene, (0, 0), 3))
    rows = "".join(f"{k},a.png,a.png\n" for k in range(100))
    (tmp_path / "pairs.csv").write_text("id,fixed,moving\n" + rows)
    return tmp_path / "pairs.csv"


@unix
@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_batch_that_is_told_to_end_leaves_its_transforms(table, tmp_path, name, status):
    out = tmp_path / "out"
    process = start(table, out, code=BATCH)
    wait_for(out / "maps.jsonl", process)
    time.sleep(0.5)
    assert not (out / "transforms.json").exists()
    process.send_signal(getattr(signal, name))
    assert end_with(process)[0] == status
    assert "99" in json.loads((out / "transforms.json").read_text())
    assert not (out / LOCK).exists()


@unix
def test_a_second_batch_and_a_second_training_in_one_folder_are_turned_away(
    complaint, table, tiny, matcher, tmp_path
):
    out = tmp_path / "out"
    process = start(table, out, code=BATCH)
    wait_for(out / "maps.jsonl", process)
    with pytest.raises(FileError, match=rf"another run works on this folder \(process {process.pid} "):
        register_many(table, out, matcher=matcher, progress=False)
    said = complaint("train", "--config", tiny, "--out", out)
    assert said.startswith(f"loftr-curriculum train: error: {out}: another run works on this folder")
    process.kill()
    process.wait()
    assert (out / LOCK).exists(), "a killed process was meant to leave its file"
    with only_run(out):
        pass


@unix
def test_a_forked_process_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path):
    code = """
import os, sys, time
from loftr_curriculum.io.lock import only_run
with only_run(sys.argv[1]):
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(os.getpid(), 9)
"""
    process = start(tmp_path, code=code)
    process.wait(30)
    try:
        with only_run(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(FileError, match="file/run: expected a folder that can be written"),
        only_run(tmp_path / "file/run"),
    ):
        pass


@pytest.fixture(scope="module")
def matcher():
    torch.manual_seed(0)
    return Matcher(MatcherConfig(dims=(8, 16, 32), layers=1)).eval()


@pytest.fixture(scope="module")
def checkpoint(matcher):
    "What a training keeps of its matcher."
    state = {f"matcher.{name}": tensor for name, tensor in matcher.state_dict().items()}
    settings = {"matcher": dict(dims=[8, 16, 32], layers=1)}
    return {"state_dict": state, "hyper_parameters": settings, "epoch": 0, "global_step": 1}


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_weights_with_flipped_bytes_are_never_loaded_silently(tmp_path, matcher, checkpoint, name):
    path = tmp_path / name
    if name.endswith("ckpt"):
        torch.save(checkpoint, path)
    else:
        save_matcher(path, matcher)
    whole = path.read_bytes()
    want = matcher.state_dict()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, len(data), 20)
        data[places] ^= rng.integers(1, 256, 20, np.uint8)
        path.write_bytes(data.tobytes())
        try:
            got = load_matcher(path).state_dict()
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        assert all(torch.equal(got[k], v.half().float() if "s" in name[-1] else v) for k, v in want.items())
    assert refused >= 38


def test_weights_without_a_checksum_are_read_and_endless_ones_are_not(tmp_path, matcher):
    path = tmp_path / "a.safetensors"
    save_matcher(path, matcher, {"steps": 3})
    with safe_open(str(path), framework="pt") as file:
        text = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(text.pop("sha256")) == 64
    save_file(state, str(path), metadata=text)
    assert load_matcher(path).facts == {"steps": 3}
    first = next(iter(state))
    state[first].view(-1)[0] = float("nan")
    save_file(state, str(path), metadata=text)
    with pytest.raises(ValueError, match=f"a.safetensors: expected finite weights, {first}"):
        load_matcher(path)


HOSTILE = {
    "no dictionary": dict(config="[1, 2]"),
    "no text": dict(config=None),
    "nested": dict(config="[" * 200_000),
    "facts that are a list": dict(facts="[]"),
    "an unknown key": dict(config='{"dims": [8, 16, 32], "wings": 2}'),
    "words for numbers": dict(config='{"dims": ["a", "b", "c"]}'),
    "no list": dict(config='{"dims": 7}'),
    "too few": dict(config='{"dims": [8, 16]}'),
    "no heads": dict(config='{"dims": [8, 16, 32], "heads": 0}'),
    "absurd": dict(config='{"dims": [8, 16, 1000000000]}'),
    "large": dict(config='{"dims": [60000, 60000, 60000], "layers": 1}'),
    "many layers": dict(config='{"dims": [8, 16, 32], "layers": 60000}'),
    "another size": dict(config='{"dims": [16, 16, 32], "layers": 1}'),
    "another attention": dict(config='{"dims": [8, 16, 32], "attention": ["softmax"]}'),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_weights_say_of_themselves_is_not_believed(tmp_path, matcher, change):
    path = tmp_path / "a.safetensors"
    text = dict(format="loftr_curriculum.matcher.3", config='{"dims": [8, 16, 32], "layers": 1}', facts="{}")
    text = {name: value for name, value in (text | change).items() if value is not None}
    save_file(matcher.half().state_dict(), str(path), metadata=text)
    matcher.float()
    with pytest.raises(ValueError) as caught:
        load_matcher(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < 400


class Payload:
    "Runs a command where it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def broken_checkpoint(path, how, checkpoint):
    "Writes one; what it would run makes the file `run` beside it."
    whole = path.with_name("whole")
    torch.save(checkpoint, whole)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(whole.read_bytes()[:3000])
    elif how == "malicious":
        torch.save(checkpoint | {"callbacks": Payload(path.with_name("run"))}, path)
    elif how == "text":
        path.write_text("not weights")
    elif how == "a list":
        torch.save([1, 2], path)
    elif how == "of other things":
        torch.save({"state_dict": {"a": 1}}, path)


BROKEN = ["empty", "cut off", "malicious", "text", "a list", "of other things"]


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_named_and_no_code_of_it_is_run(tmp_path, checkpoint, how):
    path = tmp_path / "last.ckpt"
    broken_checkpoint(path, how, checkpoint)
    with pytest.raises(ValueError) as caught:
        load_matcher(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: expected a ") and "\n" not in said
    assert "weights_only" not in said and not (tmp_path / "run").exists()


@pytest.fixture
def complaint(capsys):
    "Runs the command line; the one line that it complains in, after exit status 2."

    def ask(*words):
        assert main([str(word) for word in words]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"loftr-curriculum {words[0]}: error: ")
        return lines[0]

    return ask


@pytest.fixture
def picture(tmp_path):
    scene = np.random.default_rng(0).integers(0, 255, (160, 160), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), cv2.GaussianBlur(scene, (0, 0), 3))
    return tmp_path / "a.png"


STRAIGHT = {"moving_to_fixed": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "fixed_size": [10, 10]}
TRANSFORMS = {
    "nested": "[" * 200_000,
    "huge": json.dumps(STRAIGHT | {"fixed_size": [1_000_000, 1_000_000]}),
    "reasons": json.dumps(STRAIGHT | {"reasons": 5}),
    "versions": json.dumps(STRAIGHT | {"versions": [1]}),
    "map": json.dumps(STRAIGHT | {"map": [1]}),
}


@pytest.mark.parametrize("text", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_file_of_another_kind_is_named(complaint, picture, tmp_path, text):
    path = tmp_path / "transform.json"
    path.write_text(text)
    assert f"error: {path}: " in complaint("warp", picture, path, "--out", tmp_path / "warped.png")
    assert not (tmp_path / "warped.png").exists()


@pytest.mark.parametrize(
    "flag, value",
    [
        ("cells", 100_000_000),
        ("min_overlap", -5),
        ("ok_spread", 7),
        ("nudge", 1e9),
        ("sure_inliers", -3),
        ("limits.scale", 0),
        ("device", "cuda:77"),
        ("device", "meta"),
        ("device", "nowhere"),
    ],
)
def test_a_setting_that_cannot_work_is_named_before_any_work(complaint, picture, tmp_path, flag, value):
    said = complaint("register", picture, picture, "--out", tmp_path / "out", f"--{flag}", value)
    assert flag.partition(".")[0] in said and str(value).rstrip("0") in said
    assert not (tmp_path / "out").exists()


def test_a_path_with_a_nul_is_named(complaint, picture, tmp_path):
    for words in (("register", "a\0b", picture), ("register", picture, picture, "--weights", "a\0b")):
        assert "'a\\x00b'" in complaint(*words, "--out", tmp_path / "out")
    with pytest.raises(FileError, match="a.x00b': no file has such a name"):
        read_bytes("a\0b")
    with pytest.raises(FileError, match="a.x00b': expected a folder without a NUL"), only_run("a\0b"):
        pass


def test_a_field_of_a_table_that_is_too_long_is_named(complaint, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("id,fixed,moving\n" + "x" * 200_000 + ",a.png,a.png\n")
    assert f"{path}: line 2" in complaint("register-many", path, "--out", tmp_path / "out")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:100])


def emptied(path):
    path.write_bytes(b"")


def incomplete(path):
    np.savez(path, look=1)


def another_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize("spoil", [cut_off, emptied, incomplete, another_array])
@pytest.mark.parametrize("name", ["probes.npz", "epoch_0000.npz"])
def test_a_spoilt_recording_is_named(complaint, tmp_path, name, spoil):
    folder = tmp_path / "recording"
    folder.mkdir()
    planes = {f"{n}_0": np.zeros((4, 4)) for n in ("image0", "image1", "fov0", "fov1", "mask0", "mask1")}
    np.savez(folder / "probes.npz", names=["a"], kinds=["b"], fixed_to_moving=np.eye(3)[None], **planes)
    np.savez(folder / "epoch_0000.npz", look=1)
    spoil(folder / name)
    assert f"error: {folder / name}: " in complaint("diagnose", tmp_path)


FACTS = {
    "configuration": {"config": 3},
    "data": {"config": {"data": 3}},
    "steps": {"steps": "many"},
    "before": {"before": [1]},
    "twice before": {"before": {"before": "x"}},
}


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_strange_facts_of_weights_are_named(complaint, tmp_path, matcher, facts):
    path = tmp_path / "a.safetensors"
    save_matcher(path, matcher, facts)
    assert f"error: {path}: expected numbers and objects among the facts" in complaint("weights", path)


@pytest.mark.parametrize("more", [{}, {"train": {"data": 3}}], ids=["no training", "a strange one"])
def test_weights_without_training_facts_have_a_card(tmp_path, capsys, checkpoint, more):
    settings = checkpoint["hyper_parameters"] | more
    torch.save(checkpoint | {"hyper_parameters": settings}, tmp_path / "a.ckpt")
    assert main(["weights", str(tmp_path / "a.ckpt")]) == 0
    assert "not told by the file" in capsys.readouterr().out


CONFIGS = {
    "list": "[1]",
    "number": "3",
    "data": '{"data": 3}',
    "files": '{"init": 3}',
    "nested": "[" * 100_000,
    "empty": "",
    "cut off": "{",
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_of_another_kind_in_the_folder_of_a_run_is_named(complaint, tiny, tmp_path, text):
    out = tmp_path / "run"
    out.mkdir()
    (out / "last.ckpt").write_bytes(b"x")
    (out / "config.json").write_text(text)
    assert f"error: {out / 'config.json'}: " in complaint("train", "--config", tiny, "--out", out)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "The folder of a run of one short epoch, and the words that go on with it."
    folder = tmp_path_factory.mktemp("begun")
    (folder / "tiny.yaml").write_text(TINY.replace("CACHE", str(folder / "eyes")))
    words = ["--data.workers", "0", "--data.pairs_per_epoch", "4", "--epochs", "1"]
    words = ["train", "--config", str(folder / "tiny.yaml"), "--out", str(folder / "run"), *words]
    assert main(words) == 0
    return folder / "run", words


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_names_a_broken_last_checkpoint_and_runs_nothing_of_it(complaint, begun, checkpoint, how):
    out, words = begun
    broken_checkpoint(out / "last.ckpt", how, checkpoint)
    said = complaint(*words)
    assert f"error: {out / 'last.ckpt'}: expected a" in said
    assert "weights_only" not in said and "torch.load" not in said
    assert not (out / "run").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit that is set from outside")
def test_a_full_disk_ends_a_training_with_a_whole_checkpoint(tiny, tmp_path):
    import resource

    out = tmp_path / "run"
    process = start("train", "--config", tiny, "--out", out, "--data.workers", "0")
    wait_for(out / "last.ckpt", process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    status, said = end_with(process)
    assert status == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"loftr-curriculum train: error: {out}: cannot be written"), said
    assert "last.ckpt is whole" in last and "Traceback" not in said
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] >= 20
    assert not list(out.glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    "Mounts a file system of a size at a folder, where the rights allow."
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a file system cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.mark.parametrize("options, why", [("size=64k", "No space left"), ("ro", "Read-only file system")])
def test_a_training_on_a_full_or_read_only_disk_says_so(complaint, begun, small_disk, options, why):
    folder = small_disk(options)
    words = [str(folder) if word == str(begun[0]) else word for word in begun[1]]
    said = complaint(*words, "--record_every", "1")
    assert f"error: {folder}: " in said and why in said


def campaign(tmp_path, **sizes) -> dict:
    "What the fault campaign finds; each part is left out where no size is given."
    record = tmp_path / "found.json"
    words = [f"--{name}={sizes.get(name, 0)}" for name in ("images", "batches", "trainings", "eyes")]
    tool = ROOT / "tools/fault_campaign.py"
    process = subprocess.run([sys.executable, tool, record, *words], env=environment(), capture_output=True)
    found = json.loads(record.read_text())
    assert process.returncode == 0, found
    return found


needs_fork = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="forks, and reads /proc")


@needs_fork
def test_mutated_images_are_read_or_refused_by_name(tmp_path):
    found = campaign(tmp_path, images=900)["images"]
    assert sum(found["outcomes"].values()) == 900 and found["outcomes"]["read"] > 50
    assert found["largest_mb"] < 1500 and found["slowest_s"] < 10


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize(
    "part, name", [("batches", "register-many"), ("trainings", "train"), ("eyes", "synth")]
)
def test_killed_runs_end_as_undisturbed_ones(tmp_path, part, name):
    found = campaign(tmp_path, **{part: 4})[name]
    assert found["kills"] >= 4 and found["failures"] == []


def png_with_a_giant_chunk() -> bytes:
    data = bytearray(cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes())
    data[33:37] = (1_500_000_000).to_bytes(4, "big")  # the length of the pixels
    return bytes(data)


SPOILT = {
    "giant.png": png_with_a_giant_chunk(),
    "short.tif": b"II*\0\xd2O",
    "far.tif": b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(100),
}


@pytest.mark.parametrize("name", SPOILT)
def test_headers_that_lie_are_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(SPOILT[name])
    start = time.monotonic()
    with pytest.raises(FileError, match=name):
        read_image(path)
    assert time.monotonic() - start < 2, "it took the memory that the header asked for"


def test_the_security_page_states_the_limit_that_holds_and_names_what_there_is():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    if not os.environ.get("LOFTR_CURRICULUM_MOST_PIXELS"):
        assert f"{MOST_PIXELS // 10**6} million pixels" in page
    assert "LOFTR_CURRICULUM_MOST_PIXELS" in page
    for name in ("tests/test_faults.py", "tests/test_properties.py", "tools/fault_campaign.py"):
        assert name in page and (ROOT / name).is_file()


def test_what_killed_processes_left_unfinished_stops_nobody_and_does_not_stay(tmp_path):
    out = tmp_path / "eyes"
    out.mkdir()
    (out / ".synth.0123abcd.json").write_bytes(b"half")
    synthesise(out, cases=1, size=64, eye=EyeConfig(size=128), workers=1, progress=False)
    assert not [path.name for path in out.rglob(".*")]
    with only_run(out), pytest.raises(FileError, match="another run works on this folder"):
        synthesise(out, cases=1, size=64, eye=EyeConfig(size=128), workers=1, progress=False)
