"""Guards of tools/generator_value.py: turns, resume, what counts as another run, which package is
asked, and refusals.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tool():
    return runpy.run_path(str(ROOT / "tools/generator_value.py"))


@pytest.fixture
def command(tool, tmp_path, monkeypatch):
    """Runs the command with two made-up packages whose command line is written down instead of run; returns (asked, run)."""
    asked, scores = [], {"old": 0.2, "new": 0.5}

    def take(revision, folder):
        (folder / "loftr_curriculum/retina").mkdir(parents=True)
        (folder / "loftr_curriculum/retina/world.py").write_text(code[folder.name])
        return f"revision {revision}"

    def call(root, *words, capture=False):
        words = [str(word) for word in words]
        asked.append((root.name, words[0]))
        if words[0] == "train":
            out = Path(next(word for word in words if word.startswith("--out=")).removeprefix("--out="))
            if (root.name, out.name) in broken:
                raise KeyboardInterrupt
            out.mkdir(parents=True)
            (out / "weights.safetensors").write_text(root.name)
            (out / "config.json").write_text(
                json.dumps(
                    {
                        "lr": 1,
                        "out": str(out),
                        "data": {"cache": "x", "gap": len(root.name) if root.name == "old" else 9},
                    }
                )
            )
        if words[0] == "evaluate":
            trained_by = Path(words[words.index("--weights") + 1]).read_text()
            return json.dumps(
                {
                    "pairs": 23,
                    "no_answer": 1,
                    "landmark_AUC@20": round(
                        scores[trained_by]
                        + 0.01 * int(words[words.index("--weights") + 1].split("seed_")[1][0]),
                        3,
                    ),
                }
            )
        return json.dumps({"facts": {"steps": 4, "seconds": 1, "kept_epoch": 0, "hardware": "none"}})

    code, broken = {"old": "x = 1", "new": "x = 2"}, set()
    names = tool["main"].__globals__
    monkeypatch.setitem(names, "take", take)
    monkeypatch.setitem(names, "call", call)
    for part in ("images", "landmarks"):
        (tmp_path / "set" / part).mkdir(parents=True)

    def run(**changes):
        options = {
            "old": "abc",
            "set": tmp_path / "set",
            "out": tmp_path / "value.json",
            "work": tmp_path / "work",
            "seeds": 2,
            "steps": 4,
        } | changes
        return tool["main"]([f"--{name}={value}" for name, value in options.items()])

    run.code, run.broken, run.out = code, broken, tmp_path / "value.json"
    return asked, run


def trained(asked):
    return [name for name, word in asked if word == "train"]


def test_versions_take_turns_and_the_new_one_judges_both(command):
    asked, run = command
    assert run() == 0
    assert trained(asked) == ["old", "new", "old", "new"]
    assert {name for name, word in asked if word == "evaluate"} == {"new"}
    record = json.loads(run.out.read_text())
    assert [(r["version"], r["seed"]) for r in record["runs"]] == [
        ("old", 0),
        ("new", 0),
        ("old", 1),
        ("new", 1),
    ]
    assert record["summary"]["old"]["landmark_AUC@20"] == {"mean": 0.205, "min": 0.2, "max": 0.21}
    assert "corner_AUC@10" not in record["summary"]["new"]
    assert record["settings_that_differ"] == {"data.gap": [3, 9]} and record["modules_that_differ"] == [
        "retina/world.py"
    ]
    assert record["steps"] == 4 and record["seeds"] == [0, 1] and record["revisions"]["old"] == "revision abc"


def test_it_goes_on_where_it_was_interrupted(command, capsys):
    asked, run = command
    run.broken.add(("old", "seed_1"))
    assert run() == 130
    assert "the same command goes on" in capsys.readouterr().err and not run.out.exists()
    run.broken.clear()
    asked.clear()
    assert run() == 0
    assert trained(asked) == ["old", "new"]
    asked.clear()
    assert run() == 0 and asked == []


def test_only_what_changed_is_made_anew(command):
    asked, run = command
    run()
    asked.clear()
    run.code["new"] = "x = 2  # said otherwise"
    assert run() == 0 and asked == []
    run.code["new"] = "x = 3"
    assert run() == 0 and trained(asked) == ["new", "new"]
    asked.clear()
    assert run(steps=8) == 0 and trained(asked) == ["old", "new"] * 2


@pytest.mark.parametrize("steps, epochs", [(400, 8), (4, 4), (13, 1), (12, 6), (1, 1)])
def test_steps_are_exactly_those_asked_for(tool, steps, epochs):
    words = tool["training_words"](Path("c.yaml"), steps, 8, 1, Path("out"), Path("cache"))
    given = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    assert int(given["epochs"]) == epochs and int(
        given["data.pairs_per_epoch"]
    ) * epochs == steps * 8 == steps * int(given["data.batch_size"])


def test_the_settings_are_known_to_this_version():
    from loftr_curriculum.cli import read_settings
    from loftr_curriculum.training.config import TrainConfig

    config = read_settings(TrainConfig, ["--config", str(ROOT / "configs/generator_value.yaml")])
    assert (
        config.data.triplets is None
        and config.data.pairs is None
        and config.val_real is None
        and config.matcher.layers == 3
    )


def test_the_package_that_is_asked_is_the_one_in_the_folder(tool, tmp_path):
    (tmp_path / "loftr_curriculum").mkdir()
    (tmp_path / "loftr_curriculum/__init__.py").write_text("")
    (tmp_path / "loftr_curriculum/cli.py").write_text(
        "import sys\ndef main():\n    print('it is me', *sys.argv[1:])\n"
    )
    assert tool["call"](tmp_path, "train", "--seed=3", capture=True) == "it is me train --seed=3\n"
    (tmp_path / "loftr_curriculum/cli.py").write_text("def main(): return 2\n")
    with pytest.raises(SystemExit, match="2"):
        tool["call"](tmp_path, "train")


@pytest.mark.parametrize("words, says", [
    ("--old HEAD --set {tmp}/none --out {tmp}/x.json", "none: expected a folder of real pairs"),
    ("--old no-such-revision --set {tmp}/set --out {tmp}/x.json", "'no-such-revision' is no git revision"),
    ("--old HEAD --set {tmp}/set --out {tmp}/x.json --steps 0", "must be at least 1"),
    ("--old HEAD --set {tmp}/set --out {tmp}/x.json --config {tmp}/none.yaml", "none.yaml: no such file"),
])  # fmt: skip
def test_bad_words_are_refused_before_any_work(tmp_path, words, says):
    for part in ("images", "landmarks"):
        (tmp_path / "set" / part).mkdir(parents=True)
    command = [
        sys.executable,
        str(ROOT / "tools/generator_value.py"),
        *words.format(tmp=tmp_path).split(),
        "--work",
        str(tmp_path / "work"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_one_room_of_the_new_version_takes_the_place_of_the_old_one(tool, tmp_path):
    for version in ("old", "new"):
        for room in ("retina", "model"):
            (tmp_path / version / tool["PACKAGE"] / room).mkdir(parents=True)
            (tmp_path / version / tool["PACKAGE"] / room / f"{version}.py").write_text("")
    tool["graft"](tmp_path / "old", tmp_path / "new", "retina")
    left = sorted(p.relative_to(tmp_path / "new").as_posix() for p in (tmp_path / "new").rglob("*.py"))
    assert left == [f"{tool['PACKAGE']}/model/old.py", f"{tool['PACKAGE']}/retina/new.py"]
    with pytest.raises(SystemExit, match="no such room"):
        tool["graft"](tmp_path / "old", tmp_path / "new", "kitchen")
