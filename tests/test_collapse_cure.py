"""Guards of the cure: a tiny plan in pieces, guided passes where masks act, other settings refused, and a
start that all arms share trained once.
"""

import shutil
from dataclasses import asdict, replace

import pytest

from loftr_curriculum.io.files import FileError, write_json
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.studies import collapse_cure
from loftr_curriculum.studies.collapse_cure import ARMS, BIASED, in_words, run_cure
from loftr_curriculum.studies.collapse_factors import GAPS, Settings, told_of

NET = MatcherConfig(dims=(8, 16, 32), layers=1)
TINY = Settings(epochs=4, steps=1, batch=2, size=64, eye=256, probes=1, matcher=NET)


@pytest.fixture
def go(tmp_path, monkeypatch):
    "The study with few arms and one seed, in the settings of a record of the factors without any run."
    monkeypatch.setattr(collapse_cure, "ARMS", ("v2.1", "v2.2", "loss-only"))

    def run(most=None, conditions=("ill, start pretrained",), settings=TINY):
        factors = tmp_path / "factors.json"
        write_json(factors, told_of(settings) | {"planned": 52, "runs": []})
        files = str(tmp_path / "cure.json"), str(factors), str(tmp_path / "cache")
        return run_cure(*files, conditions=list(conditions), most=most, workers=1, seeds=(300,))

    return run


def test_the_study_runs_in_pieces_and_keeps_what_masks_do(go, tmp_path):
    assert go(0)["runs"] == []
    assert [run["arm"] for run in go(1)["runs"]] == ["v2.1"]
    result = go()
    assert go() == result and result["planned"] == 3
    plain, both, loss = result["runs"]
    assert asdict(TINY)["epochs"] == plain["epochs"] == len(both["lam"])
    assert both["lam"] == [2.0, 2.0, 0.0, 0.0]
    assert loss["lam"] == [0.0] * 4 and loss["scaler"][0] == 10
    for gap in GAPS:
        assert both["taught"][gap]["guided"] is not None
        assert loss["taught"][gap]["guided"] is plain["taught"][gap]["guided"] is None
    folders = [path.name for path in (tmp_path / "cache").glob("cure-*/*") if path.is_dir()]
    assert sum(name.startswith("before-") for name in folders) == 1 and len(folders) == 4
    assert "3 of 3 planned runs are done" in in_words(result)
    assert "Named by hand" in in_words(result)
    shutil.rmtree(tmp_path / "cache")
    assert go() == result  # from the record alone
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileError, match="other settings"):
        go(settings=replace(TINY, steps=2))


def test_without_a_patient_a_sentence_says_what_to_do(go):
    with pytest.raises(ValueError, match="names no patient so far .0 of 52 runs are done"):
        go(conditions=())


def test_only_arms_with_a_bias_are_guided():
    assert set(ARMS) - set(BIASED) == {"v2.1", "loss-only"}
