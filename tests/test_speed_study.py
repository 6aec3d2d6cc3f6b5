"""Guards of the study of speed: systems are asked in turn, the warm-up does not count, a dead process is
named, shares follow from the figures.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from loftr_curriculum.io.files import read_json, write_json
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.weights import make_matcher, save_matcher
from loftr_curriculum.studies import speed
from loftr_curriculum.studies.speed import (
    Process,
    Settings,
    ask_kornia,
    ask_ours,
    ask_training,
    draw_pairs,
    draw_sides,
    in_turn,
    run_speed,
    shares,
    speed_table,
)
from loftr_curriculum.studies.study import run_study

COMMITTED = Path(__file__).parents[1] / "nbs" / "11_studies" / "speed.json"
TINY = Settings(size=64, train_size=64, batch=2, repeats=1, sides=(64,), product=64, threads=1, eye=256)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.pt"
    draw_pairs(TINY, path)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_matcher(path, make_matcher(MatcherConfig(dims=(8, 16, 32), layers=1)))
    return str(path)


class Recorder:
    "Stands in for a process; notes who was asked when."

    asked = []

    def __init__(self, name, folder, threads):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, k, what):
        self.asked.append((self.name, k, what))
        if what == "operations":
            return {"operations": 10**9}
        seconds = 100.0 if k == 0 else 1.0 if self.name in ("ours", "ours:64", "training:fast") else 4.0
        return {"seconds": seconds, "memory_mb": 10.0, "operations": 10**9, "passes": 3, "verdict": "ok"}


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(speed, "Process", Recorder)
    monkeypatch.setattr(Recorder, "asked", [])
    return Recorder


def test_systems_are_asked_in_turn_and_the_warm_up_does_not_count(recorder):
    told = in_turn(("a", "b"), None, Settings(repeats=2), ("x",))
    assert [q[:2] for q in recorder.asked if q[2] == "x"] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("b", 2),
    ]
    assert [a["seconds"] for a in told["a", "x"]] == [4.0, 4.0]


def test_the_file_holds_ratios_of_medians_and_keeps_parts_measured_before(recorder, tmp_path):
    out = tmp_path / "b.json"
    assert "work" not in run_speed(out, TINY, ("registration", "training"))
    result = run_speed(out, TINY, ("product", "sides", "cuda"))
    assert all(result["registration"][motion]["times_faster"] == 4 for motion in ("mild", "full")) and result[
        "training"
    ]["times_faster"] == {"32": 4, "bf16": 4}
    assert result["work"]["fast, training step, 32"] == {
        "gflop": 1.0,
        "gflop_per_s": 1.0,
        "share": 4.0,
    }  # the stand-in's product takes 4 s
    assert result == read_json(out) and shares(result) == result["work"]
    table = speed_table(result)
    assert "4.0 times faster" in table and "report, 2 eyes" in table
    assert len(draw_sides(result).axes) == 2
    with pytest.raises(ValueError, match="other settings"):  # they are not mixed, and nothing is lost
        run_speed(out, replace(TINY, size=96), ("product",))
    assert result == read_json(out)


def test_every_system_answers(given, weights):
    ours = ask_ours(given, replace(TINY, weights=weights), 64)
    answer = ours(1)
    assert (
        answer["seconds"] > 0 and answer["passes"] >= 1 and answer["verdict"] in ("ok", "doubtful", "failed")
    )
    assert ours(1, "pass")["seconds"] > 0
    kornia = ask_kornia(given, TINY)(1, "operations")["operations"]
    assert kornia > 10 * ours(1, "operations")["operations"] > 0
    step = ask_training(given, TINY, "fast")
    assert step(1, "bf16")["seconds"] > 0 and step(1, "operations")["operations"] > 0


def test_one_real_process_answers_and_a_dead_one_is_named(given, tmp_path, capfd):
    write_json(tmp_path / "settings.json", asdict(TINY))
    torch.save(given, tmp_path / "pairs.pt")
    with Process("product", tmp_path, 1) as process:
        answer = process.ask(k=0, what="32")
        assert answer["operations"] == 2 * 64**3 and answer["memory_mb"] > 0
        with pytest.raises(ValueError, match="process of product ended"):
            process.ask(k=0, nonsense=1)
    assert "nonsense" in capfd.readouterr().err


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="64 pixels"):
        Settings(size=32)
    with pytest.raises(ValueError, match="expected some of"):
        run_study("speed", ["--parts", json.dumps(["speed"])])


def test_the_committed_figures_keep_the_promise():
    if not COMMITTED.is_file():
        pytest.skip("not measured yet")
    result = read_json(COMMITTED)
    assert (
        result["settings"]["size"] == 512
        and result["settings"]["threads"] == 2
        and result["settings"]["repeats"] >= 5
    )
    assert (
        result["registration"]["mild"]["times_faster"] >= 15
        and result["registration"]["memory_share"] <= 0.25
    )
    assert result["training"]["times_faster"]["32"] >= 15
