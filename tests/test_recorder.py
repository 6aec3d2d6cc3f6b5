"Guards of the recorder: what a run leaves, what a resumed run keeps, the alarm, watching changes nothing."

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import Spy, config

from loftr_curriculum.evaluation.collapse import THRESHOLD
from loftr_curriculum.evaluation.recording import Recording, summary
from loftr_curriculum.io.images import write_image
from loftr_curriculum.model.config import MatcherConfig, Matches
from loftr_curriculum.training import recorder as room
from loftr_curriculum.training.recorder import CollapseWarning
from loftr_curriculum.training.run import read_epochs, train


def quick(out, **kw):
    return config(
        out,
        **{**dict(probes=2, probe_pseudo_real=0, matcher=MatcherConfig(dims=(16, 32, 64), layers=1)), **kw},
    )


def real_pairs(folder):
    image = np.random.default_rng(0).integers(0, 255, (96, 128), dtype=np.uint8)
    for name in ("a", "b"):
        write_image(folder / f"{name}.png", image)
    table = folder / "pairs.csv"
    table.write_text("id,fixed,moving\n1,a.png,b.png\n")
    return table


def test_a_run_leaves_a_recording_of_all_kinds_of_probes(tmp_path):
    train(
        quick(
            tmp_path / "run",
            epochs=4,
            record_every=2,
            probe_pseudo_real=1,
            probe_real=str(real_pairs(tmp_path)),
        ),
        progress=False,
    )
    r = Recording(tmp_path / "run")
    assert r.epochs == [0, 2, 3], "every second epoch, and the last"
    assert [p.kind for p in r.probes] == ["generated"] * 2 + ["pseudo-real"] * 4 + ["real"]
    assert [bool(e.guided.any()) for e in r.records] == [e.lam > 0 for e in r.records] == [True, False, False]
    assert all(0 <= e.share < 1 and e.seconds > 0 for e in r.records)
    rows = {row["epoch"]: row for row in read_epochs(tmp_path / "run")}
    for s in summary(r):
        assert rows[s["epoch"]]["probe/collapse_index"] == pytest.approx(s["collapse_index"], abs=1e-5)
    assert {
        "probe_generated/collapse_index",
        "probe_pseudo-real/error_px",
        "probe_real/coverage1",
        "probe_guided/collapse_index",
    } <= set(rows[0])
    assert "probe/collapse_index" not in rows[1] and not any("share_of_time" in k for k in rows[0])


def test_watching_a_healthy_run_changes_nothing_and_raises_no_alarm(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        a, b = (
            train(
                quick(tmp_path / str(every), epochs=2, record_every=every, collapse_patience=1),
                progress=False,
            ).module
            for every in (0, 1)
        )
    assert not [w for w in caught if w.category is CollapseWarning]
    assert not (tmp_path / "0" / "recording").exists()

    def flat(module):
        return torch.cat([v.flatten() for v in module.state_dict().values()])

    assert (flat(a) - flat(b)).abs().mean() < 1e-5, (
        "another order of random numbers would move weights by the learning rate, 1e-3"
    )


def test_a_resumed_run_keeps_what_is_recorded_and_a_fresh_one_clears_it(tmp_path):
    c = quick(tmp_path, epochs=3)
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording" / "epoch_0017.npz").write_bytes(b"left by a run that never reached a checkpoint")
    with pytest.raises(RuntimeError, match="power cut"):
        train(c, progress=False, callbacks=[Spy(stop_at=1)])
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "recording").glob("*.npz")}
    assert {p.name for p in files} == {"probes.npz", "epoch_0000.npz"}
    train(
        replace(c, probes=1), progress=False
    )  # what only watches may differ, and the probes stay those of the recording
    assert Recording(tmp_path).epochs == [0, 1, 2] and len(Recording(tmp_path).probes) == 2
    assert all(p.stat().st_mtime_ns == was for p, was in files.items())


def test_the_alarm_is_raised_and_stops_the_run_if_asked(tmp_path, monkeypatch):
    def collapsed(matcher, probes, guidance):
        rng = np.random.default_rng(0)
        return [
            Matches(rng.uniform(0, 63, (150, 2)), rng.normal((30, 8), 2, (150, 2)), np.full(150, 0.4))
            for _ in probes
        ]

    monkeypatch.setattr(room, "match_probes", collapsed)
    with pytest.warns(CollapseWarning, match=r"epoch 1: .* in the last 2 recordings.*diagnose"):
        train(quick(tmp_path / "a", epochs=4, collapse_patience=2, collapse_stop=True), progress=False)
    r = Recording(tmp_path / "a")
    assert r.epochs == [0, 1] and min(s["collapse_index"] for s in summary(r)) > THRESHOLD


def test_a_missing_real_pair_is_named_before_any_work(tmp_path):
    table = real_pairs(tmp_path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="b.png"):
        train(quick(tmp_path / "run", probe_real=str(table)), progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="collapse_patience"):
        quick(tmp_path, collapse_patience=0)
