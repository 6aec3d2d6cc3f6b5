"""Does this tree answer as a revision of before does?

The package of the revision and that of this tree each run the same program in processes of their own:
`register` on pseudo-real pairs and on a folder of real pairs, `synth`, and 20 steps of training with
both variants. Then the answers are compared: matrices within 1e-6, verdicts equal, pixels and losses bit
for bit. Times are taken in turns, A B A B. What came later (maps that bend, the look at the vessels) is
switched off.

    python tools/held_fixed.py --before REVISION [--real ../shared/real_pairs] [--rounds 5]
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "loftr_curriculum"
TOLERANCE = 1e-6  # of an entry of a matrix
PSEUDO_REAL = 40  # pairs
CASES = 20  # of synth
STEPS = 20  # of training
VARIANTS = ("fast", "reference")


# ---- what each tree runs, in a process of its own


def answer(result) -> dict:
    """What is compared of a registration."""
    matrix = result.moving_to_fixed
    return {
        "verdict": str(result.verdict),
        "reasons": list(result.reasons),
        "matrix": None if matrix is None else matrix.tolist(),
    }


def settings_of_before():
    """The settings of `register` that were the defaults before maps could bend and vessels were compared."""
    from loftr_curriculum.registration import RegistrationConfig

    before = {
        "transform": "affine", "verify": False, "check_mirrored": False, "ok_starts_px": 1000.0,
        "ok_inliers": 80, "ok_spread": 0.5, "ok_agreement_px": 5.0,
    }  # fmt: skip
    known = RegistrationConfig.__dataclass_fields__
    return RegistrationConfig(**{name: value for name, value in before.items() if name in known})


def registrations(real: Path | None, cache: Path) -> dict:
    """Answers by the name of the pair."""
    from loftr_curriculum.data.pseudo_real import pseudo_real_pairs
    from loftr_curriculum.registration import register

    config = settings_of_before()

    a_mode = PSEUDO_REAL // 4
    pairs = {
        f"pseudo-real {pair.id}": (pair.fixed, pair.moving)
        for pair in pseudo_real_pairs(limit=a_mode, folder=cache, progress=False)
    }
    for fixed in sorted((real / "images").glob("*_fixed.*")) if real else ():
        moving = next(fixed.parent.glob(fixed.name.replace("_fixed", "_moving")))
        pairs[f"real {fixed.stem.removesuffix('_fixed')}"] = (fixed, moving)
    return {name: answer(register(*pair, config=config)) for name, pair in pairs.items()}


def times(cache: Path) -> float:
    """Seconds for the registrations alone, after one that warms up."""
    from loftr_curriculum.data.pseudo_real import pseudo_real_pairs
    from loftr_curriculum.registration import register

    pairs = [
        (pair.fixed, pair.moving)
        for pair in pseudo_real_pairs(limit=PSEUDO_REAL // 4, folder=cache, progress=False)
    ]
    config = settings_of_before()
    register(*pairs[0], config=config)
    start = time.perf_counter()
    for pair in pairs:
        register(*pair, config=config)
    return time.perf_counter() - start


def pixels(folder: Path) -> dict:
    """SHA-256 of every file that `synth` writes but the images' own file format, by name."""
    from loftr_curriculum.cli import main
    from loftr_curriculum.io.images import read_image

    main(["synth", str(folder), "--cases", str(CASES), "--size", "256", "--workers", "2"])
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(read_image(path).tobytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def losses(variant: str, folder: Path) -> list[str]:
    """The loss of every step as a hexadecimal float, so that equal means equal to the last bit."""
    import lightning.pytorch as pl
    import torch

    from loftr_curriculum.data.config import DataConfig
    from loftr_curriculum.data.module import PairDataModule
    from loftr_curriculum.model.config import MatcherConfig
    from loftr_curriculum.retina.config import EyeConfig
    from loftr_curriculum.training.config import TrainConfig
    from loftr_curriculum.training.curriculum import CurriculumScheduler
    from loftr_curriculum.training.module import PL_LoFTR

    found = []

    class Listener(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            found.append(float(outputs["loss"].detach()).hex())

    torch.set_num_threads(1)
    data = DataConfig(
        worlds=3, val_worlds=1, eye=EyeConfig(size=512), cache=str(folder / "eyes"), size=128, start_size=64,
        grow_epochs=2, near_share=0.25, deform=3.0, pairs_per_epoch=10, val_pairs=2, batch_size=2, workers=0,
        modes=("cf-fa", "cf-oct", "oct-fa", "cf-octa"),
    )  # fmt: skip
    config = TrainConfig(
        out=str(folder / "run"), data=data, matcher=MatcherConfig(variant), epochs=STEPS // 5, seed=1
    )
    pl.seed_everything(config.seed)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=config.epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[CurriculumScheduler(config.phases, 1), Listener()],
    )  # fmt: skip
    trainer.fit(PL_LoFTR(config), PairDataModule(data))
    return found


def run_part(part: str, real: Path | None, out: Path) -> None:
    """One part of the program; what it found goes to a JSON file."""
    cache = out.parent / "pseudo_real"
    if part == "register":
        found = registrations(real, cache)
    elif part == "times":
        found = times(cache)
    elif part == "synth":
        found = pixels(out.parent / "synth")
    else:
        found = losses(part, out.parent / f"train-{part}")
    out.write_text(json.dumps(found))


# ---- the two trees


def take(revision: str, folder: Path) -> Path:
    """The package of a revision, copied into a folder."""
    command = ["git", "-C", str(ROOT), "archive", revision, PACKAGE]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        sys.exit(f"held_fixed: {revision!r}: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def child(tree: Path, part: str, args: argparse.Namespace, work: Path):
    """What one part finds with the package of a tree."""
    work.mkdir(parents=True, exist_ok=True)
    out = work / f"{part}.json"
    words = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--part",
        part,
        "--out",
        str(out),
        "--cache",
        str(args.cache),
    ]
    if args.real:
        words += ["--real", str(args.real)]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(tree)}, cwd=work, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"held_fixed: {part} of {tree}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(out.read_text())


# ---- the comparison


def matrix_gap(before, after) -> float:
    """Largest difference of an entry; infinite where only one of them is an answer."""
    if before is None or after is None:
        return 0.0 if before is after else float("inf")
    flat = zip(sum(before, []), sum(after, []), strict=True)
    return max(abs(a - b) for a, b in flat)


def compare_answers(before: dict, after: dict) -> list[str]:
    """Every difference between registrations, in words."""
    faults = [f"only in one of the trees: {name}" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        gap = matrix_gap(old["matrix"], new["matrix"])
        if gap > TOLERANCE:
            faults.append(f"{name}: matrices differ by {gap:.3g}")
        if old["verdict"] != new["verdict"]:
            faults.append(f"{name}: {old['verdict']} before, {new['verdict']} now")
        if len(old["reasons"]) != len(new["reasons"]):
            faults.append(f"{name}: reasons {old['reasons']} before, {new['reasons']} now")
    return faults


def compare_exactly(part: str, before, after) -> list[str]:
    """Every difference where none is allowed."""
    if before == after:
        return []
    if isinstance(before, dict):
        other = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
        return [f"{part}: {len(other)} of {len(before)} differ: {', '.join(other[:5])}"]
    first = next((k for k, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), None)
    return [f"{part}: {len(before)} steps before, {len(after)} now, the first difference at step {first}"]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def read_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", help="git revision to compare with")
    parser.add_argument(
        "--real", type=Path, help="folder of real pairs, images/<id>_fixed.* and <id>_moving.*"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="times that registrations are timed; 0: not at all"
    )
    parser.add_argument("--skip", nargs="*", default=[], help="parts to leave out")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "runs/held_fixed", help="folder of the pseudo-real pairs"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.part and not args.before:
        parser.error("--before is required")
    args.real = args.real and args.real.resolve()
    return args


def main(argv=None) -> int:
    args = read_arguments(argv)
    if args.part:
        run_part(args.part, args.real, args.out)
        return 0
    faults = []
    with tempfile.TemporaryDirectory(prefix="held-fixed-") as folder:
        work = Path(folder)
        trees = {"before": take(args.before, work / "package"), "now": ROOT}
        for part in ("register", "synth", *VARIANTS):
            if part in args.skip:
                continue
            found = [child(tree, part, args, work / name) for name, tree in trees.items()]
            new = compare_answers(*found) if part == "register" else compare_exactly(part, *found)
            print(f"{part}: {len(found[0])} compared, {len(new)} differences", flush=True)
            faults += new
        taken = {name: [] for name in trees}
        for _ in range(args.rounds):
            for name, tree in trees.items():
                taken[name].append(child(tree, "times", args, work / name))
        if args.rounds:
            ratios = [now / before for before, now in zip(*taken.values())]
            share = f"{median(ratios):.3f} of before (median of {args.rounds} pairs)"
            print(f"time of {PSEUDO_REAL} registrations: {share}")
    print(*faults, sep="\n")
    print("held fixed" if not faults else f"{len(faults)} differences")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
