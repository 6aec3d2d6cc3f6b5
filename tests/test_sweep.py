"""Guards of the sweep over rotation, scale and shift.

True pairs, honest curves, a sweep that goes on where it stopped, the command.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from loftr_curriculum.cli import main
from loftr_curriculum.geometry import apply_transform, compose, decompose, invert, similarity
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.studies import sweep as module
from loftr_curriculum.studies.sweep import VARIANTS, SweepConfig, sweep, sweep_pair

TINY = SweepConfig(
    rotations=(0, 120),
    scales=(2.0,),
    shifts=(0.5,),
    modes=("cf-fa", "cf-oct"),
    pairs=1,
    side=96,
    eye=EyeConfig(size=256, gap=0.5, disease=0.0),
)


class Nothing:
    "A matcher that is never asked."


@pytest.fixture
def oracle(monkeypatch):
    "`register` knows the truth up to 5 px and remembers what it was asked; it may be told to fail."
    state = SimpleNamespace(T=None, asked=[], stop_after=None, lost=False)
    real = module.sweep_pair

    def pair(*what):
        p = real(*what)
        state.T = p.fixed_to_moving
        return p

    def register(fixed, moving, matcher, config):
        state.asked.append((fixed.tobytes(), moving.tobytes(), config))
        if state.stop_after is not None and len(state.asked) > state.stop_after:
            raise KeyboardInterrupt
        return SimpleNamespace(
            moving_to_fixed=None
            if state.lost
            else compose(invert(state.T), similarity(shift=(5 * fixed.shape[1] / 512, 0)))
        )

    monkeypatch.setattr(module, "sweep_pair", pair)
    monkeypatch.setattr(module, "register", register)
    return state


def test_pairs_show_what_their_transform_says():
    for axis, value in (("rotation", 120), ("scale", 2.0), ("scale", 0.5), ("shift", 0.5)):
        p, again = (sweep_pair(axis, value, "cf-fa", 0, TINY) for _ in range(2))
        assert np.array_equal(p.fixed, again.fixed) and np.array_equal(p.moving, again.moving)
        d = decompose(p.fixed_to_moving, p.fixed.shape[:2])
        assert {"rotation": abs(d["angle_deg"]), "scale": d["scale"], "shift": np.hypot(*d["shift"]) / 96}[
            axis
        ] == pytest.approx(value)
        assert abs(d["angle_deg"]) < 5.001 or axis == "rotation"
        assert len(p.fixed_points) > 20
        assert np.abs(apply_transform(p.fixed_to_moving, p.fixed_points) - p.moving_points).max() < 1e-9


def test_a_right_answer_succeeds_everywhere_and_none_nowhere(oracle):
    made = sweep(Nothing(), TINY, progress=False)
    assert list(made["curves"]) == ["rotation", "scale", "shift"]
    for c in made["curves"].values():
        for v in VARIANTS:
            assert c[v]["SR@10"] == [1.0] * len(c["values"]) and c[v]["median"] == pytest.approx(
                [5.0] * len(c["values"])
            )
    asked = {(c.turn_when_unsure, bool(c.second_long_sides)) for *_, c in oracle.asked}
    assert asked == {(turn, look) for turn in (False, True) for look in (False, True)}
    assert len({i for i, *_ in oracle.asked}) == 8  # four values, two modes
    oracle.lost = True
    lost = sweep(Nothing(), TINY, progress=False)
    assert all(s == 0 for c in lost["curves"].values() for v in VARIANTS for s in c[v]["SR@10"])


def test_a_stopped_sweep_goes_on_and_ends_like_an_uninterrupted_one(oracle, tmp_path):
    out = tmp_path / "sweep.json"
    oracle.stop_after = 3 * len(VARIANTS) + 3  # a warm-up, three pairs, and in the midst of the fourth
    with pytest.raises(KeyboardInterrupt):
        sweep(Nothing(), TINY, out, progress=False)
    kept = json.loads(out.read_text())
    assert (
        sum(len(pairs) for values in kept["tried"].values() for pairs in values.values()) == 3
        and "curves" not in kept
    )
    oracle.stop_after, before = None, len(oracle.asked)
    sweep(Nothing(), TINY, out, progress=False)
    assert len(oracle.asked) - before == 5 * len(VARIANTS) + 1  # five pairs were left; one warm-up
    whole = sweep(Nothing(), TINY, tmp_path / "whole.json", progress=False)
    read = json.loads(out.read_text())
    for axis, c in whole["curves"].items():
        assert all(
            read["curves"][axis][v]["SR@10"] == c[v]["SR@10"]
            and read["curves"][axis][v]["median"] == c[v]["median"]
            for v in VARIANTS
        )
    count = len(oracle.asked)
    sweep(Nothing(), TINY, out, progress=False)
    assert len(oracle.asked) == count
    with pytest.raises(ValueError, match="sweep.json.*other settings"):
        sweep(Nothing(), SweepConfig(), out, progress=False)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_command(tmp_path, capsys):
    out = tmp_path / "s.json"
    words = (
        "study sweep --progress false --settings.rotations [60] --settings.scales [] --settings.shifts []"
        " --settings.pairs 1 --settings.side 96 --settings.eye.size 256"
    )
    assert main([*words.split(), "--settings.modes", "[cf-fa]", "--out", str(out)]) == 0
    curve = json.loads(out.read_text())["curves"]["rotation"]
    assert curve["values"] == [60] and len(curve["full"]["seconds"]) == 1
    assert "60" in capsys.readouterr().out
    missing = str(tmp_path / "none.safetensors")
    assert main(["study", "sweep", "--weights", missing, "--out", str(out)]) == 2
    assert "none.safetensors" in capsys.readouterr().err
