"""Guards of the runs that are looked at in another look: the probes, a tiny plan in pieces, the cure of its
patient under its gaps, and the sick run that is packed.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from loftr_curriculum.evaluation.recording import Recording
from loftr_curriculum.io.files import FileError, read_json, write_json
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.studies import collapse_cure
from loftr_curriculum.studies.collapse_cure import run_cure
from loftr_curriculum.studies.collapse_factors import (
    LOOK_CENTRE,
    OTHER_LOOK,
    Settings,
    gap_probes,
    look_conditions,
    pack_sick_run,
    patients,
)
from loftr_curriculum.studies.collapse_look import JUDGED, LOOKED_AT, in_words, run_look, table_of

NET = MatcherConfig(dims=(8, 16, 32), layers=1)
TINY = Settings(seeds=(202,), epochs=2, steps=1, batch=2, size=64, eye=256, probes=1, matcher=NET)


@pytest.fixture
def go(tmp_path):
    def run(most=None, settings=TINY):
        files = str(tmp_path / "look.json"), str(tmp_path / "cache")
        return run_look(*files, [LOOK_CENTRE], most, 1, settings)

    return run


@pytest.fixture
def patient(go, tmp_path):
    "A record whose one run is as if it had learned and then collapsed."
    result = go()
    for gap, found in result["runs"][0]["gaps"].items():
        found |= {"collapse_index": 0.7 if gap in JUDGED else 0.1, "inlier_ratio": 0.9}
    write_json(tmp_path / "look.json", result)
    return result


def test_another_look_changes_both_images_and_keeps_motion_and_gap():
    plain, other, both = gap_probes(TINY, ("none", "other look", "other look, both"))
    for k in (0, 1):
        assert np.abs(getattr(plain, f"image{k}").astype(float) - getattr(other, f"image{k}")).mean() > 5
    assert (other.image0 == both.image0).all() and (other.image1 != both.image1).any()
    assert np.allclose(plain.fixed_to_moving, other.fixed_to_moving)
    for name in ("mask0", "mask1", "fov0", "fov1"):  # the same eyes
        assert (getattr(plain, name) == getattr(other, name)).all()
    assert [probe.kind for probe in gap_probes(TINY, LOOKED_AT)] == list(LOOKED_AT)


def test_the_study_runs_in_pieces_goes_on_and_drops_nothing(go, tmp_path):
    assert go(0)["runs"] == []
    result = go()
    assert go() == result and result["planned"] == len(look_conditions())
    assert list(result["runs"][0]["gaps"]) == list(LOOKED_AT) and {*OTHER_LOOK} < {*LOOKED_AT}
    assert "Gap other look, both" in in_words(result) or "No run has learned" in in_words(result)
    assert table_of(result).count("\n") == 2
    with pytest.raises(FileError, match="other settings"):
        go(settings=replace(TINY, steps=2))
    result["runs"][0]["name"] = "a condition of before"
    write_json(tmp_path / "look.json", result)
    with pytest.raises(FileError, match="not in the plan: a condition of before"):
        go()
    assert read_json(tmp_path / "look.json")["runs"] == result["runs"]


def test_its_patient_is_cured_under_its_own_gaps(patient, tmp_path, monkeypatch):
    monkeypatch.setattr(collapse_cure, "ARMS", ("v2.1", "v2.2"))
    assert patients(patient) == [LOOK_CENTRE]
    files = str(tmp_path / "cure.json"), str(tmp_path / "look.json"), str(tmp_path / "cache")
    cure = run_cure(*files, workers=1, seeds=(300,))
    assert cure["conditions"] == [LOOK_CENTRE] and cure["judged"] == list(JUDGED)
    assert [list(run["gaps"]) for run in cure["runs"]] == [list(LOOKED_AT)] * 2
    assert collapse_cure.places(cure) == [(LOOK_CENTRE, gap) for gap in JUDGED]
    assert f"{LOOK_CENTRE}, gap {JUDGED[0]}" in collapse_cure.in_words(cure)


def test_its_sick_run_is_packed(patient, tmp_path):
    about = pack_sick_run(tmp_path / "look.json", tmp_path / "cache", tmp_path / "sick")
    assert about["condition"] == LOOK_CENTRE and about["gap"] in JUDGED
    assert [probe.kind for probe in Recording(tmp_path / "sick").probes] == [
        about["gap"],
        "other look",
        "none",
    ]
    assert read_json(tmp_path / "sick" / "about.json") == json.loads(json.dumps(about))
