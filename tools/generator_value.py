"""What a better generator is worth: the same small matcher, trained on the eyes of two versions, scored on real pairs.

The old version is the package of a git revision, the new one that of this tree (or of `--new REVISION`). Each is copied
when the command starts, so that nothing changes while it runs. Both train with the same settings (`--config`), steps and
seeds, in turns; the new version registers the real pairs with the weights of both. Interrupt it at any time: the same
command goes on where it stopped. `--work` keeps the finished runs, and a run whose code or settings changed is made anew.

    python tools/generator_value.py --old REVISION --only retina --set ../shared/real_pairs --out nbs/experiments/generator_value.json
"""

import argparse
import ast
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from loftr_curriculum.io.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "loftr_curriculum"
LEARNING = (
    "geometry",
    "io",
    "retina",
    "data",
    "model",
    "training",
)  # the code that a training run goes through
PROGRAM = (  # of a version: started in its folder, and sure of it
    "import os, sys; from pathlib import Path; import loftr_curriculum as p\n"
    "if Path(p.__file__).resolve().parents[1] != Path(os.environ['PYTHONPATH']).resolve(): sys.exit('another version was imported: ' + p.__file__)\n"
    "from loftr_curriculum.cli import main; sys.exit(main())"
)
REGISTRATION = (
    "--long_side",
    "256",
    "--second_long_sides",
    "[256, 256]",
)  # the model learns from views of 128 px; the rest are defaults
FIGURES = (
    "landmark_SR@10",
    "landmark_AUC@10",
    "landmark_AUC@20",
    "corner_AUC@10",
    "no_answer",
)  # of all that `evaluate` says
OWN = ("out", "seed", "data.seed", "data.cache")  # settings that are different in every run


# ---- the two versions


def git(*words: str) -> bytes:
    """What git says; its complaint ends the program."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    if done.returncode:
        sys.exit(f"git {words[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def take(revision: str | None, folder: Path) -> str:
    """Copy the package of a revision, or of this tree (None), into a new folder; what to call it in the record."""
    if revision is None:
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        changed = git("status", "--porcelain", "--", PACKAGE).strip()
        return git("rev-parse", "HEAD").decode().strip() + (" with uncommitted changes" if changed else "")
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", revision + "^{commit}"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        sys.exit(f"generator_value: {revision!r} is no git revision of {ROOT.name}/")
    commit = found.stdout.strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, PACKAGE))) as archive:
        archive.extractall(folder, filter="data")
    return commit


def graft(old: Path, new: Path, room: str) -> None:
    """Leave nothing of the new package but one of its rooms, in the place of the old one."""
    kept = new / room
    if not (new / PACKAGE / room).is_dir():
        sys.exit(f"generator_value: --only {room}: the new version has no such room")
    shutil.move(new / PACKAGE / room, kept)
    shutil.rmtree(new / PACKAGE)
    shutil.copytree(old / PACKAGE, new / PACKAGE)
    shutil.rmtree(new / PACKAGE / room, ignore_errors=True)
    shutil.move(kept, new / PACKAGE / room)


def sources(package: Path, rooms=LEARNING) -> dict[str, str]:
    """Module -> digest of what it says, comments and layout aside."""
    paths = [
        p for p in sorted(package.rglob("*.py")) if p.relative_to(package).with_suffix("").parts[0] in rooms
    ]
    meaning = {
        p.relative_to(package).as_posix(): ast.dump(ast.parse(p.read_text(encoding="utf-8"))) for p in paths
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in meaning.items()}


def key_of(*things) -> str:
    """A short name of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()[:10]


def call(root: Path, *words, capture: bool = False) -> str:
    """Run `loftr-curriculum words` of the package under root; a failure ends this program with its exit code."""
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode:
        print(
            f"generator_value: {words[0]} of the package in {root.name}/ failed, see above", file=sys.stderr
        )
        sys.exit(done.returncode if done.returncode > 0 else 1)
    return done.stdout or ""


# ---- one run


def epochs_of(steps: int, most: int = 8) -> int:
    """Epochs of a run: the largest number up to `most` that divides the steps, so that every epoch is equally long."""
    return max(n for n in range(1, most + 1) if steps % n == 0)


def training_words(config: Path, steps: int, batch: int, seed: int, out: Path, cache: Path) -> list[str]:
    """The words of `loftr-curriculum train` for one run."""
    epochs = epochs_of(steps)
    own = {
        "out": out,
        "seed": seed,
        "data.seed": seed,
        "data.cache": cache,
        "data.batch_size": batch,
        "epochs": epochs,
        "data.pairs_per_epoch": steps // epochs * batch,
    }
    return ["train", "--config", str(config), *(f"--{name}={value}" for name, value in own.items())]


def run_one(root: Path, judge: Path, judged_by: str, words: list[str], out: Path, real: Path) -> dict:
    """Train where that is still to be done, register the real pairs, and keep the score in `out`; the score."""
    done = out / "score.json"
    if done.is_file() and (kept := read_json(done))["judged_by"] == judged_by:
        return kept
    weights = out / "weights.safetensors"
    if not weights.is_file():
        call(root, *words)
    figures = json.loads(
        call(judge, "evaluate", "--set", real, "--weights", weights, *REGISTRATION, capture=True)
    )
    facts = json.loads(call(root, "weights", weights, capture=True))["facts"]
    told = {
        name: facts.get(name) for name in ("steps", "kept_epoch", "seconds", "hardware", "torch", "precision")
    }
    write_json(done, {"judged_by": judged_by, "figures": figures, **told})
    return read_json(done)


# ---- the record


def flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings as dotted names."""
    pairs = [
        flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in settings.items()
    ]
    return {name: value for part in pairs for name, value in part.items()}


def differing(old: dict, new: dict) -> dict:
    """Settings that the versions do not share: name -> [old, new], null where a version does not know the name."""
    old, new = flat(old), flat(new)
    return {
        name: [old.get(name), new.get(name)]
        for name in sorted({*old, *new} - set(OWN))
        if old.get(name) != new.get(name)
    }


def summarise(runs: list[dict]) -> dict:
    """Version -> figure -> mean, least and greatest over the seeds; a figure that the set does not give is left out."""
    summary = {}
    for version in dict.fromkeys(run["version"] for run in runs):
        mine = [run["figures"] for run in runs if run["version"] == version]
        values = {
            name: [f[name] for f in mine] for name in FIGURES if all(f.get(name) is not None for f in mine)
        }
        summary[version] = {
            name: {"mean": round(sum(v) / len(v), 4), "min": min(v), "max": max(v)}
            for name, v in values.items()
        }
    return summary


def read_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--old", required=True, help="git revision of the version to compare with")
    parser.add_argument("--new", help="git revision of the new version; without it, this tree as it is now")
    parser.add_argument(
        "--only",
        metavar="ROOM",
        help="take nothing but this room (such as retina) from the new version, the rest from the old one",
    )
    parser.add_argument(
        "--set",
        type=Path,
        required=True,
        help="folder of real pairs with landmarks, as for `loftr-curriculum evaluate`; nothing trains on it",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write when all runs are done")
    parser.add_argument(
        "--steps", type=int, default=400, help="training steps of every run (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds, 0, 1, ... (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step (default: %(default)s)")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs/generator_value.yaml",
        help="settings of training, known to both versions",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs/generator_value",
        help="folder of the runs and the rendered eyes (default: runs/generator_value)",
    )
    args = parser.parse_args(argv)
    if min(args.steps, args.seeds, args.batch) < 1:
        parser.error("--steps, --seeds and --batch must be at least 1")
    if not (args.set / "images").is_dir() or not (args.set / "landmarks").is_dir():
        parser.error(
            f"--set {args.set}: expected a folder of real pairs with the sub-folders images and landmarks"
        )
    if not args.config.is_file():
        parser.error(f"--config {args.config}: no such file")
    return args


def compare(args: argparse.Namespace, versions: dict[str, Path]) -> dict:
    """All runs in turns; version -> folder that holds its package. What they found, without the names of the versions."""
    config, real, work = args.config.resolve(), args.set.resolve(), args.work.resolve()
    code = {name: sources(root / PACKAGE) for name, root in versions.items()}
    judged_by = key_of(
        sources(versions["new"] / PACKAGE, ("geometry", "io", "data", "model", "registration", "evaluation")),
        REGISTRATION,
    )
    folder = {
        name: work
        / f"{name}-{key_of(code[name], config.read_text(encoding='utf-8'), args.steps, args.batch)}"
        for name in versions
    }
    runs = []
    for seed in range(args.seeds):
        for name, root in versions.items():
            out = folder[name] / f"seed_{seed}"
            print(f"{name} version, seed {seed}: {out}", flush=True)
            words = training_words(config, args.steps, args.batch, seed, out, folder[name] / "worlds")
            runs.append(
                {"version": name, "seed": seed, **run_one(root, versions["new"], judged_by, words, out, real)}
            )
            print(
                "  " + ", ".join(f"{figure} {runs[-1]['figures'].get(figure)}" for figure in FIGURES),
                flush=True,
            )
    settings = {name: read_json(folder[name] / "seed_0" / "config.json") for name in versions}
    old, new = code["old"], code["new"]
    return {
        "settings_that_differ": differing(settings["old"], settings["new"]),
        "modules_that_differ": sorted(name for name in {*old, *new} if old.get(name) != new.get(name)),
        "hardware": sorted({run["hardware"] for run in runs}),
        "summary": summarise(runs),
        "runs": [{k: v for k, v in run.items() if k not in ("judged_by", "hardware")} for run in runs],
    }


def main(argv=None) -> int:
    args = read_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="generator_value_") as folder:
        versions = {name: Path(folder) / name for name in ("old", "new")}
        revisions = {
            name: take(revision, versions[name])
            for (name, revision) in (("old", args.old), ("new", args.new))
        }
        if args.only:
            graft(versions["old"], versions["new"], args.only)
        try:
            found = compare(args, versions)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
            return 130
    settings = {
        "config": args.config.name,
        "text": args.config.read_text(encoding="utf-8"),
        "registration": shlex.join(REGISTRATION),
    }
    write_json(
        args.out,
        {
            "made_by": "tools/generator_value.py",
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "revisions": revisions,
            "only": args.only,
            "set": args.set.resolve().name,
            "steps": args.steps,
            "batch": args.batch,
            "seeds": list(range(args.seeds)),
            "settings": settings,
            **found,
        },
    )
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
