"The demonstration: its plumbing on tiny settings, and the whole of it as a user runs it (slow)."

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from loftr_curriculum.evaluation.recording import Recording
from loftr_curriculum.io.files import read_json
from loftr_curriculum.io.transforms import load_transform
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.weights import PACKAGED
from loftr_curriculum.report.registration import FILES
from loftr_curriculum.training import demo as room

LEFT = (
    "curriculum.png",
    "fixed.png",
    "matches_over_epochs.png",
    "metrics.json",
    "moving.png",
    "registered.png",
    "run",
    "shipped",
    "shipped_and_trained.png",
    "trained",
)

pytestmark = pytest.mark.skipif(not PACKAGED.is_file(), reason="no packaged weights in this checkout")


def test_it_walks_to_the_end_on_tiny_settings(tmp_path, monkeypatch, capsys):
    full = room.demo_config

    def tiny(out, epochs, seed):
        c = full(out, epochs, seed)
        return replace(
            c,
            matcher=MatcherConfig(dims=(8, 16, 32), layers=1),
            data=replace(
                c.data, worlds=2, val_worlds=1, size=64, pairs_per_epoch=8, val_pairs=2, render_workers=1
            ),
        )

    monkeypatch.setattr(room, "demo_config", tiny)
    out = room.demo(tmp_path / "demo", epochs=4)
    report, said = read_json(out / "metrics.json"), capsys.readouterr().out
    assert len(report["epochs"]) == 4 and {"sched/lambda", "sched/loss_w", "val/auc", "val/coverage1"} <= set(
        report["epochs"][0]
    )
    assert {p.name for p in out.iterdir()} == set(LEFT)
    assert Recording(out / "run").epochs == [0, 1, 2, 3]
    # what ships answers before anything is trained; what has seen 32 pairs answers otherwise, and both say
    # what their files say
    assert said.index("shipped weights:") < said.index("Now the training, about")
    assert said.index("Now the training, about") < said.index("freshly trained weights:")
    assert f"loftr-curriculum demo --out {out} --epochs 16" in said
    assert report["shipped"]["verdict"] == "ok" and report["shipped"]["corner_error_px_at_512"] < 5
    assert report["trained"] != report["shipped"]
    for name in ("shipped", "trained"):
        record = load_transform(out / name / "transform.json")
        assert str(record.verdict) == report[name]["verdict"] and str(out / name) in said
        assert {p.name for p in (out / name).iterdir()} >= (
            set(FILES) if record.matrix is not None else {"transform.json", "matches.png"}
        )


def test_quick_registers_and_shows_it_and_trains_nothing(tmp_path, capsys):
    room.demo(tmp_path, quick=True, command=".venv/bin/loftr-curriculum")
    said = capsys.readouterr().out
    trained = {"run", "trained", "curriculum.png", "matches_over_epochs.png", "shipped_and_trained.png"}
    assert {p.name for p in tmp_path.iterdir()} == set(LEFT) - trained
    assert "First answer after" in said and "training" not in said
    assert ".venv/bin/loftr-curriculum register FIXED MOVING --out registered/" in said
    # the counts of the verdict, as every other answer says them
    evidence = read_json(tmp_path / "shipped/transform.json")["evidence"]
    assert evidence["matches"] > evidence["binned"]
    assert "shipped weights: ok, {inliers} of {binned} binned matches agree".format(**evidence) in said
    kept = read_json(tmp_path / "metrics.json")["shipped"]
    assert {name: kept[name] for name in room.COUNTS} == {name: evidence[name] for name in room.COUNTS}


@pytest.mark.slow
def test_it_ends_in_time_whatever_the_machine(tmp_path, record_property):
    start = time.monotonic()
    code = (
        f"from loftr_curriculum.cli import main; raise SystemExit(main(['demo', '--out', {str(tmp_path)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds, report = time.monotonic() - start, read_json(tmp_path / "metrics.json")
    record_property("seconds of the demonstration", round(seconds))
    for name in ("shipped", "trained"):
        record_property(
            f"corner error in px at 512, {name} weights",
            round(report[name]["corner_error_px_at_512"] or -1, 2),
        )
    record_property("val/auc of the last epoch", round(report["epochs"][-1]["val/auc"], 3))
    for name in ("shipped", "trained"):
        # after minutes of training the first of two looks may be far off the second: right, and doubted
        # and on a machine that is slow or busy it has seen too little to answer at all
        few = name == "trained" and len(report["epochs"]) < room.MOST
        told = ("ok",) if name == "shipped" else ("ok", "doubtful", *(["failed"] if few else []))
        assert report[name]["verdict"] in told
        assert few or report[name]["corner_error_px_at_512"] < 5
    record_property("epochs that fitted into the time", len(report["epochs"]))
    assert {p.name for p in tmp_path.iterdir()} == set(LEFT)
    assert seconds < 330
