"The demonstration: its plumbing on tiny settings, and the whole of it as a user runs it (slow)."
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from loftr_curriculum.evaluation.recording import Recording
from loftr_curriculum.io.files import read_json
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.training import demo as room

LEFT = ("checkerboard.png", "curriculum.png", "fixed.png", "matches.png", "matches_over_epochs.png", "metrics.json", "moving.png", "transform.json", "warped.png")


def test_it_walks_to_the_end_on_tiny_settings(tmp_path, monkeypatch, capsys):
    full = room.demo_config

    def tiny(out, epochs, seed):
        c = full(out, epochs, seed)
        return replace(c, matcher=MatcherConfig(dims=(8, 16, 32), layers=1), data=replace(c.data, worlds=2, val_worlds=1, size=64, pairs_per_epoch=8, val_pairs=2, render_workers=1))

    monkeypatch.setattr(room, "demo_config", tiny)
    out = room.demo(tmp_path / "demo", epochs=4)
    report, said = read_json(out / "metrics.json"), capsys.readouterr().out
    assert len(report["epochs"]) == 4 and {"sched/lambda", "sched/loss_w", "val/auc", "val/coverage1"} <= set(report["epochs"][0])
    assert report["verdict"] in ("ok", "doubtful", "failed") and str(out / "matches.png") in said
    assert {"curriculum.png", "matches.png", "matches_over_epochs.png", "transform.json"} <= {p.name for p in out.iterdir()}
    assert Recording(out / "run").epochs == [0, 1, 2, 3]


@pytest.mark.slow
def test_it_registers_an_unseen_eye_within_eight_minutes(tmp_path, record_property):
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", f"from loftr_curriculum.cli import main; raise SystemExit(main(['demo', '--out', {str(tmp_path)!r}]))"], check=True)
    seconds, report = time.monotonic() - start, read_json(tmp_path / "metrics.json")
    record_property("seconds of the demonstration", round(seconds))
    record_property("corner error in px at 512", round(report["corner_error_px_at_512"] or -1, 2))
    record_property("val/auc of the last epoch", round(report["epochs"][-1]["val/auc"], 3))
    assert report["verdict"] == "ok" and report["corner_error_px_at_512"] < 5
    assert set(LEFT) <= {p.name for p in tmp_path.iterdir()}
    assert seconds < 480
