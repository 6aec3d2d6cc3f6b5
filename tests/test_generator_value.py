"""Guards of the study of the generator's worth: turns, resume, what counts as another run, which
package is asked, and refusals.
"""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from loftr_curriculum.cli import main, read_settings
from loftr_curriculum.io.files import FileError
from loftr_curriculum.studies import generator_value as study
from loftr_curriculum.studies.study import run_study
from loftr_curriculum.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def git(folder, *words):
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A small repository with a package and settings, which is the current folder."""
    root = tmp_path / "clone"
    (root / "loftr_curriculum").mkdir(parents=True)
    (root / "loftr_curriculum/__init__.py").touch()
    (root / "configs").mkdir()
    (root / "configs/generator_value.yaml").write_text("lr: 1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "first")
    for part in ("images", "landmarks"):
        (tmp_path / "set" / part).mkdir(parents=True)
    monkeypatch.chdir(root)
    return root


class Versions:
    """Two made-up packages whose commands are written down instead of run."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "value.json"
        self.asked = []  # (version, command)
        self.code = {"old": "x = 1", "new": "x = 2"}
        self.broken = set()  # (version, name of the run's folder)

    def copy(self, root, *place):
        folder = place[-1]
        (folder / "loftr_curriculum/retina").mkdir(parents=True)
        (folder / "loftr_curriculum/retina/world.py").write_text(self.code[folder.name])

    def call(self, root, *words, capture=False):
        words = [str(word) for word in words]
        self.asked.append((root.name, words[0]))
        if words[0] == "train":
            return self.train(root.name, words)
        assert words[0] == "evaluate"
        return self.evaluate(Path(words[words.index("--weights") + 1]))

    def load(self, weights):
        return SimpleNamespace(facts={"steps": 4, "seconds": 1, "kept_epoch": 0, "hardware": "none"})

    def train(self, version, words):
        out = Path(next(word for word in words if word.startswith("--out=")).removeprefix("--out="))
        if (version, out.name) in self.broken:
            raise KeyboardInterrupt
        out.mkdir(parents=True)
        (out / "weights.safetensors").write_text(version)
        data = {"cache": "x", "gap": {"old": 3, "new": 9}[version]}
        (out / "config.json").write_text(json.dumps({"lr": 1, "out": str(out), "data": data}))

    def evaluate(self, weights):
        score = {"old": 0.2, "new": 0.5}[weights.read_text()]
        seed = int(weights.parent.name.removeprefix("seed_"))
        figures = {"pairs": 23, "no_answer": 1, "landmark_AUC@20": round(score + 0.01 * seed, 3)}
        return json.dumps(figures)

    def run(self, **changes):
        options = {
            "old": "HEAD",
            "set": self.folder / "set",
            "out": self.out,
            "work": self.folder / "work",
            "seeds": 2,
            "steps": 4,
        }
        words = [f"--{name}={value}" for name, value in (options | changes).items()]
        return run_study("generator-value", words)

    def trained(self):
        return [name for name, word in self.asked if word == "train"]


@pytest.fixture
def versions(clone, tmp_path, monkeypatch):
    made_up = Versions(tmp_path)
    monkeypatch.setattr(study, "copy_commit", made_up.copy)
    monkeypatch.setattr(study, "copy_as_it_is", made_up.copy)
    monkeypatch.setattr(study, "call", made_up.call)
    monkeypatch.setattr(study, "load_matcher", made_up.load)
    return made_up


def test_versions_take_turns_and_the_new_one_judges_both(versions, clone, capsys):
    record = versions.run()
    assert versions.trained() == ["old", "new", "old", "new"]
    assert {name for name, word in versions.asked if word == "evaluate"} == {"new"}
    assert json.loads(versions.out.read_text()) == record
    order = [(run["version"], run["seed"]) for run in record["runs"]]
    assert order == [("old", 0), ("new", 0), ("old", 1), ("new", 1)]
    assert record["summary"]["old"]["landmark_AUC@20"] == {"mean": 0.205, "min": 0.2, "max": 0.21}
    assert "corner_AUC@10" not in record["summary"]["new"]
    assert record["settings_that_differ"] == {"data.gap": [3, 9]}
    assert record["modules_that_differ"] == ["retina/world.py"]
    assert record["steps"] == record["runs"][0]["steps"] == 4
    assert record["seeds"] == [0, 1]
    assert record["revisions"]["old"] == record["revisions"]["new"] == study.commit_of(clone, "HEAD")
    assert "landmark_AUC@20    0.205   (0.200 to 0.210)" in capsys.readouterr().out
    assert not (versions.folder / "work/versions").exists()


def test_it_goes_on_where_it_was_interrupted(versions):
    versions.broken.add(("old", "seed_1"))
    with pytest.raises(KeyboardInterrupt):
        versions.run()
    assert not versions.out.exists()
    versions.broken.clear()
    versions.asked.clear()
    versions.run()
    assert versions.trained() == ["old", "new"]
    versions.asked.clear()
    versions.run()
    assert versions.asked == []


def test_only_what_changed_is_made_anew(versions):
    versions.run()
    versions.asked.clear()
    versions.code["new"] = "x = 2  # said otherwise"
    versions.run()
    assert versions.asked == []
    versions.code["new"] = "x = 3"
    versions.run()
    assert versions.trained() == ["new", "new"]
    versions.asked.clear()
    versions.run(steps=8)
    assert versions.trained() == ["old", "new"] * 2


def test_a_score_belongs_to_the_pairs_that_it_was_measured_on(versions, tmp_path):
    def points(name, text):
        folder = tmp_path / name
        for part in ("images", "landmarks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "landmarks/1.csv").write_text(text)
        return folder

    def asked(real):
        versions.asked.clear()
        versions.run(set=real, seeds=1)
        return [word for _, word in versions.asked]

    assert asked(points("one", "1")) == ["train", "evaluate"] * 2
    assert asked(points("other", "2")) == ["evaluate"] * 2
    # the same pairs in another folder, and the first ones again
    assert asked(points("moved", "1")) == []
    # other pairs in the same folder
    assert asked(points("one", "3")) == ["evaluate"] * 2


@pytest.mark.parametrize("steps, epochs", [(400, 8), (4, 4), (13, 1), (12, 6), (1, 1)])
def test_steps_are_exactly_those_asked_for(steps, epochs):
    plan = study.Plan(Path("c.yaml"), Path("set"), steps, 1, 8)
    words = study.training_words(plan, 1, Path("out"), Path("cache"))
    given = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    assert int(given["epochs"]) == epochs
    assert int(given["data.batch_size"]) == 8
    assert int(given["data.pairs_per_epoch"]) * epochs == steps * 8


def test_the_settings_are_known_to_this_version():
    config = read_settings(TrainConfig, ["--config", str(ROOT / "configs/generator_value.yaml")])
    assert config.data.triplets is None
    assert config.data.pairs is None
    assert config.val_real is None
    assert config.matcher.layers == 3


def test_the_package_that_is_asked_is_the_one_in_the_folder(tmp_path):
    package = tmp_path / "loftr_curriculum"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text("import sys\ndef main():\n    print('it is me', *sys.argv[1:])\n")
    assert study.call(tmp_path, "train", "--seed=3", capture=True) == "it is me train --seed=3\n"
    (package / "cli.py").write_text("def main(): return 2\n")
    with pytest.raises(ChildProcessError, match="train of the .* version failed with exit status 2"):
        study.call(tmp_path, "train")


def test_a_version_is_the_package_as_committed_or_as_it_is(clone, tmp_path):
    (clone / "loftr_curriculum/__init__.py").write_text("changed = True\n")
    head = study.commit_of(clone, "HEAD")
    assert study.name_as_it_is(clone) == f"{head} with uncommitted changes"
    with study.two_versions(clone, tmp_path / "work", {"old": head, "new": None}) as folders:
        texts = {name: (f / "loftr_curriculum/__init__.py").read_text() for name, f in folders.items()}
    assert texts == {"old": "", "new": "changed = True\n"}
    assert not folders["old"].exists()


@pytest.mark.parametrize("words, says", [
    ("--set {tmp}/none", "none: expected a folder of real pairs"),
    ("--old no-such-revision", "'no-such-revision' is no git revision of clone/"),
    ("--old=--all", "'--all' is no git revision of clone/"),
    ("--steps 0", "must be at least 1"),
    ("--config {tmp}/none.yaml", "none.yaml: no such file"),
    ("--out {tmp}/set", "expected the name of a JSON file, not a folder"),
])  # fmt: skip
def test_bad_words_are_refused_before_any_work(clone, tmp_path, capsys, words, says):
    given = "study generator-value --old HEAD --set {tmp}/set --out {tmp}/x.json --work {tmp}/work"
    assert main(f"{given} {words}".format(tmp=tmp_path).split()) == 2
    assert says in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clone", "set"]


def test_it_is_started_inside_a_clone(clone, tmp_path, monkeypatch):
    (clone / "configs").joinpath("deeper").mkdir()
    monkeypatch.chdir(clone / "configs/deeper")
    assert study.repository_root() == clone.resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(FileError, match="expected a folder inside a clone of loftr_curriculum"):
        study.repository_root()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileError, match="git was not found"):
        study.repository_root()


def test_one_room_of_the_new_version_takes_the_place_of_the_old_one(tmp_path):
    for version in ("old", "new"):
        for room in ("retina", "model"):
            folder = tmp_path / version / study.PACKAGE / room
            folder.mkdir(parents=True)
            (folder / f"{version}.py").touch()
    study.keep_one_room(tmp_path / "old", tmp_path / "new", "retina")
    package = tmp_path / "new" / study.PACKAGE
    left = sorted(p.relative_to(package).as_posix() for p in package.rglob("*.py"))
    assert left == ["model/old.py", "retina/new.py"]
    with pytest.raises(ValueError, match="no such room"):
        study.keep_one_room(tmp_path / "old", tmp_path / "new", "kitchen")
