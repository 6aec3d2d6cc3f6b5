"""Guards of triplets: three answers on the command line, and what a contradiction does to them."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from test_many import Sent
from test_many_commands import QUICK
from test_registration import a_pair

from loftr_curriculum.cli import main
from loftr_curriculum.geometry import Affine, corners, translation
from loftr_curriculum.io.files import read_json
from loftr_curriculum.io.images import write_image
from loftr_curriculum.registration import RegistrationConfig, register_triplet
from loftr_curriculum.registration.triplet import PAIRS, judge_triplet

CONFIG = RegistrationConfig(long_side=256, second_long_sides=(256,), retry_long_sides=())


@pytest.fixture(scope="module")
def images():
    fixed, moving, _ = a_pair(7)
    _, other, _ = a_pair(7)
    return {"cf": fixed, "oct": moving, "fa": np.ascontiguousarray(other[4:, 6:])}


@pytest.fixture(scope="module")
def triplet(images):
    return register_triplet(*images.values(), matcher=Sent(), config=CONFIG)


def test_the_round_closes_and_joint_maps_agree(triplet, images):
    assert triplet.cycle_px < 3 and triplet.verdict == "ok"
    points = corners(images["fa"].shape[:2])
    around = triplet.joint["fa_to_oct"].then(triplet.joint["oct_to_cf"])(points)
    assert np.abs(around - triplet.joint["fa_to_cf"](points)).max() < 1e-6
    for name in PAIRS:
        own = triplet.answers[name].point_map(points)
        assert np.abs(triplet.joint[name](points) - own).max() < 6


def test_a_round_that_does_not_close_takes_ok_from_all(triplet):
    shifted = triplet.oct_to_cf.point_map.then(Affine(translation((60, 0))))
    told = judge_triplet(triplet.answers | {"oct_to_cf": replace(triplet.oct_to_cf, point_map=shifted)})
    assert told.verdict == "doubtful" and told.joint == dict.fromkeys(PAIRS)
    for answer in told.answers.values():
        assert answer.verdict == "doubtful" and "going round the three images leads" in answer.reasons[-1]
        assert answer.evidence.cycle_px == told.cycle_px > CONFIG.ok_starts_px


def test_the_cycle_error_is_evidence_held_against_the_setting(triplet):
    assert {answer.evidence.cycle_px for answer in triplet.answers.values()} == {triplet.cycle_px}
    strict = judge_triplet(triplet.answers, replace(CONFIG, ok_starts_px=triplet.cycle_px / 2))
    assert {answer.verdict for answer in strict.answers.values()} == {"doubtful"}


def test_the_photograph_is_shown_to_the_backbone_once_a_size(images, monkeypatch):
    from test_many import Counted

    from loftr_curriculum.model.weights import PACKAGED, load_matcher

    if not PACKAGED.is_file():
        pytest.skip("no packaged weights in this checkout")
    matcher = load_matcher()
    counted = Counted(matcher, monkeypatch)
    register_triplet(*images.values(), matcher=matcher, config=CONFIG)
    assert counted.images == len(counted.views) + len(set(counted.views)) < 2 * len(counted.views)


def test_fresh_starts_are_announced_for_each_pair_at_a_terminal_alone(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loftr_curriculum.model.weights.load_matcher", lambda path, device: Sent())
    files = [str(tmp_path / f"{name}.png") for name in images]
    for path, image in zip(files, images.values()):
        write_image(path, image)
    retrying = (*QUICK[:-1], "[256]", "--ok-inliers", "100000")
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=terminal: shown)
        assert main(["register-triplet", *files, "--out", str(tmp_path / "out"), *retrying]) == 3
        said = capsys.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in said] == (list(PAIRS) if terminal else [])
        assert all("trying fresh starts" in line for line in said)


def test_the_command_writes_three_answers_and_says_whether_they_agree(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loftr_curriculum.model.weights.load_matcher", lambda path, device: Sent())
    files = []
    for name, image in images.items():
        write_image(tmp_path / f"{name}.png", image)
        files.append(str(tmp_path / f"{name}.png"))
    out = tmp_path / "out"
    assert main(["register-triplet", *files, "--out", str(out), *QUICK]) == 0
    assert "going round leads" in capsys.readouterr().out
    said = read_json(out / "triplet.json")
    assert said["verdict"] == "ok" and said["cycle_px_at_512"] < 3 and set(said["joint"]) == set(PAIRS)
    names = {path.name for path in out.iterdir()}
    assert names == {"triplet.json", "oct_in_cf.png", "fa_in_cf.png", "oct-to-cf", "fa-to-cf", "fa-to-oct"}
    assert (out / "fa-to-oct" / "transform.json").is_file()

    assert (
        main(["register-triplet", *files[:2], str(tmp_path / "none.png"), "--out", str(tmp_path / "no")]) == 2
    )
    assert "none.png: no such file" in capsys.readouterr().err and not (tmp_path / "no").exists()
