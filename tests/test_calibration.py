"""Guards of the calibration of `ok`.

Which thresholds are chosen, what missing evidence means, and that the defaults are the calibrated ones.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from loftr_curriculum.registration.config import FALSE_ACCEPT, RegistrationConfig
from loftr_curriculum.registration.verdict import Evidence
from loftr_curriculum.registration.verifier import CURVE
from loftr_curriculum.studies import calibration
from loftr_curriculum.studies.calibration import (
    EVIDENCE,
    GRID,
    Thresholds,
    choose_thresholds,
    promises_kept,
    table_of,
)

ROOT = Path(__file__).parents[1]


def rows_of(evidence, errors):
    return [
        {"id": str(k), "mode": "cf-fa", "error": None if not np.isfinite(e) else e}
        | dict(zip(EVIDENCE, map(float, v)))
        for k, (v, e) in enumerate(zip(evidence, errors))
    ]


def made_up(seed, n=300):
    "Evidence that tells right from false by two of its four numbers, with some overlap in each alone."
    rng = np.random.default_rng(seed)
    right = rng.random(n) < 0.6
    evidence = np.c_[
        np.where(right, rng.uniform(25, 120, n), rng.uniform(5, 60, n)),
        np.where(right, rng.uniform(0.2, 0.9, n), rng.uniform(0.0, 0.3, n)),
        rng.uniform(0.5, 1.0, n),
        np.where(right, rng.uniform(0.2, 3.0, n), rng.uniform(1.0, 30.0, n)),
    ]
    return evidence, np.where(right, rng.uniform(0.5, 9.0, n), rng.uniform(11, 200, n))


def test_no_false_answer_is_ok_where_they_were_found_and_few_elsewhere():
    found = choose_thresholds(*made_up(0))
    assert promises_kept(rows_of(*made_up(0)), found)["false_ok"] == 0
    elsewhere = promises_kept(rows_of(*made_up(1)), found)
    assert elsewhere["false_ok"] <= 3 and elsewhere["ok_of_right"] > 0.5


def test_a_twentieth_of_the_promises_is_given_up_for_strictness():
    evidence = np.array(
        [[70, 0.55, 0.65, 1.2]] * 38 + [[22, 0.55, 0.65, 1.2]] * 2
    )  # two answers with few inliers
    assert choose_thresholds(evidence, np.full(40, 2.0)).ok_inliers == 60
    assert choose_thresholds(evidence, np.full(40, 2.0), margin=0.0).ok_inliers == 20
    assert choose_thresholds(evidence[:-1], np.full(39, 2.0), margin=0.02).ok_inliers == 20


def test_of_equally_good_thresholds_the_strictest_is_taken():
    found = choose_thresholds(np.full((5, 4), [70, 0.55, 0.65, 1.2]), np.full(5, 2.0))
    assert found == Thresholds(60, 0.5, 0.6, 1.5)


@pytest.mark.parametrize("column", range(4))
def test_missing_evidence_is_never_ok(column):
    evidence = np.array([[200.0, 0.9, 0.9, 0.1]])
    loosest = Thresholds(*(v[0] for v in GRID[:3]), GRID[3][-1])
    assert loosest.says_ok(evidence).all()
    evidence[0, column] = np.nan
    assert not loosest.says_ok(evidence).any()


def test_no_answer_is_neither_ok_nor_right():
    rows = rows_of(np.full((2, 4), [70, 0.55, 0.65, 1.2]), [np.inf, 3.0])
    assert promises_kept(rows, Thresholds(15, 0.1, 0.2, 8.0)) == {
        "pairs": 2,
        "answers": 1,
        "right": 1,
        "ok": 1,
        "ok_of_right": 1.0,
        "false_ok": 0,
    }
    assert np.isinf(table_of(rows)[1][0])


def test_the_defaults_are_the_calibrated_ones():
    found = json.loads((ROOT / "nbs/11_studies/verifier.json").read_text())
    config = RegistrationConfig()
    assert {name: getattr(config, name) for name in found["thresholds"]} == found["thresholds"]
    assert [list(row) for row in FALSE_ACCEPT] == found["false_accept"]
    assert json.loads(json.dumps(asdict(CURVE))) == found["curve"]


def test_the_first_start_that_is_ok_answers_and_else_the_one_with_most_inliers():
    good, poor, none = [70, 0.55, 0.65, 1.2], [30, 0.55, 0.65, 1.2], [np.nan] * 4
    t = Thresholds(60, 0.5, 0.6, 1.5)

    def told(*starts):
        return promises_kept(
            [
                {"id": "a", "error": e} | {k: None if np.isnan(x) else x for k, x in zip(EVIDENCE, v)}
                for v, e in starts
            ],
            t,
        )

    assert told((good, 50.0), (good, 2.0)) == {
        "pairs": 1,
        "answers": 1,
        "right": 0,
        "ok": 1,
        "ok_of_right": None,
        "false_ok": 1,
    }
    assert told((poor, 50.0), (good, 2.0)) == {
        "pairs": 1,
        "answers": 1,
        "right": 1,
        "ok": 1,
        "ok_of_right": 1.0,
        "false_ok": 0,
    }
    assert told((none, None), (poor, 2.0))["right"] == 1 and told((poor, 2.0), (none, None))["right"] == 1


def test_every_start_of_a_pair_is_an_answer_and_a_pair_stays_in_one_half(monkeypatch, tmp_path):
    from types import SimpleNamespace

    sides = []
    pairs = [
        SimpleNamespace(
            id=str(k),
            mode="cf-fa",
            fixed=np.zeros((512, 512), np.uint8),
            moving=None,
            fixed_points=np.zeros((1, 2)),
            moving_points=np.zeros((1, 2)),
        )
        for k in range(4)
    ]

    def answers(fixed, moving, matcher, config):
        assert config.retry_long_sides == ()
        sides.append(config.first_long_side)
        return SimpleNamespace(
            moving_to_fixed=np.eye(3), evidence=Evidence(**dict(zip(EVIDENCE, (90, 0.9, 0.9, 0.5))))
        )

    monkeypatch.setattr(calibration, "register", answers)
    monkeypatch.setattr(calibration, "pseudo_real_pairs", lambda *a, **k: iter(pairs))
    result = calibration.calibrate(str(tmp_path / "c.json"), per_mode=1)
    config = RegistrationConfig()
    assert sides == [config.first_long_side, *config.retry_long_sides] * 4
    assert (
        len(result["rows"]) == 4 * (1 + len(config.retry_long_sides))
        and result["found_on"]["pairs"] == result["checked_on"]["pairs"] == 2
    )
