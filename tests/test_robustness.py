"""A small run of the robustness study: on generated pairs, resumed, refused after another question."""

import json
from dataclasses import replace

import pytest

from loftr_curriculum.data.pseudo_real import SPECIFICATION, pseudo_real_pair, write_raw_pair
from loftr_curriculum.io.files import FileError
from loftr_curriculum.studies.robustness import measure_robustness, table_of

SMALL = replace(SPECIFICATION, size=(256, 256), per_mode=1, split="validation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_raw_pair(folder, pseudo_real_pair("cf-octa", 0, SMALL))
    return folder


def test_a_run_goes_on_and_refuses_other_questions(folder, tmp_path):
    out = tmp_path / "robustness.json"
    found = measure_robustness(str(out), str(folder), conditions="scales")
    (rows,) = found["pairs"].values()
    assert set(rows) == {"turned by 137 x 0.6", "turned by 137 x 1.6"}
    assert all(row["verdict"] in ("ok", "doubtful", "failed") for row in rows.values())
    assert "| turned by 137 x 1.6 |" in table_of(found)

    found["pairs"] = {name: dict.fromkeys(rows, {"kept": True}) for name in found["pairs"]}
    out.write_text(json.dumps(found))
    assert measure_robustness(str(out), str(folder), conditions="scales") == found
    with pytest.raises(FileError, match="other settings"):
        measure_robustness(str(out), str(folder), conditions="angles")


def test_an_unknown_group_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of angles, scales, spoiled, all"):
        measure_robustness(str(tmp_path / "x.json"), conditions="colours")
