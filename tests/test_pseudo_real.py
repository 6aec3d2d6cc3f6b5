"""Guards of the pseudo-real list and of the SIFT baseline.

Frozen pairs, exact truth, folders, scores, dotted names.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from loftr_curriculum.baselines import sift
from loftr_curriculum.data.landmarks import read_landmark_set
from loftr_curriculum.data.pseudo_real import (
    LEAST_CONTRAST,
    LISTS,
    SIFT_AT_MOST,
    SPECIFICATION,
    WIDE_SPECIFICATION,
    contrast_of,
    list_settings,
    pseudo_real_pair,
    pseudo_real_pairs,
    read_raw_pair,
    shared_grid,
)
from loftr_curriculum.evaluation.metrics import corner_error, landmark_error
from loftr_curriculum.evaluation.pseudo_real import (
    evaluate_pseudo_real,
    matrix_of,
)
from loftr_curriculum.geometry import centre, invert, similarity, translation, warp_image
from loftr_curriculum.retina.config import GENERATOR_VERSION, MODES, SEEDS, EyeConfig
from loftr_curriculum.retina.world import make_world
from loftr_curriculum.studies.pseudo_real import score_system, system_named

QUICK = replace(SPECIFICATION, size=(160, 160), eye=replace(SPECIFICATION.eye, size=320))


def test_the_list_has_a_hundred_pairs_a_mode_on_seeds_of_its_own():
    assert SPECIFICATION.modes == MODES and SPECIFICATION.per_mode == 100 and SPECIFICATION.size == (512, 512)
    assert len(SEEDS["pseudo-real"]) >= 400
    assert not any(set(SEEDS["pseudo-real"]) & set(s) for name, s in SEEDS.items() if name != "pseudo-real")


def test_the_list_is_frozen():
    """A pair's transform: what was drawn, and which of the draws was taken."""
    assert GENERATOR_VERSION == 2
    pair = pseudo_real_pair("cf-octa", 3)
    words = np.round(np.r_[pair.fixed_to_moving.ravel(), pair.moving_points[:4].ravel()], 3) + 0.0
    assert hashlib.sha1(repr(words.tolist()).encode()).hexdigest()[:12] == FROZEN, (
        "another list: raise PSEUDO_REAL_VERSION"
    )


FROZEN = "4ddf9494912e"


WIDE_QUICK = replace(
    WIDE_SPECIFICATION, size=(160, 160), eye=replace(WIDE_SPECIFICATION.eye, size=320), gaze_deg=20
)


def test_the_second_list_has_other_eyes_and_more_modes():
    assert set(LISTS) == {2, 3} and LISTS[3] is WIDE_SPECIFICATION
    wide = WIDE_SPECIFICATION
    assert set(MODES) < set(wide.modes) and len(wide.modes) * wide.per_mode == 400
    assert wide.first >= len(MODES) * SPECIFICATION.per_mode
    assert wide.first + 400 <= len(SEEDS["pseudo-real"])
    assert wide.motion.uniform_rotation == 1 and wide.eye.fields == (20, 200)


def test_the_second_list_is_frozen():
    """A pair's transform: what was drawn, and which of the draws was taken."""
    pair = pseudo_real_pair("ir-fa", 3, WIDE_SPECIFICATION)
    words = np.round(np.r_[pair.fixed_to_moving.ravel(), pair.moving_points[:4].ravel()], 3) + 0.0
    assert hashlib.sha1(repr(words.tolist()).encode()).hexdigest()[:12] == WIDE_FROZEN, (
        "another list: raise WIDE_VERSION"
    )


WIDE_FROZEN = "b82f9c31cc01"


@pytest.mark.slow
def test_sift_solves_less_than_a_tenth_of_the_second_list():
    """The first twenty pairs of each mode; 5 of these 160 were solved when the list was made."""
    wide = WIDE_SPECIFICATION
    found = evaluate_pseudo_real(sift.register, wide.modes, 20, progress=False, spec=wide)
    assert found["all"]["SR@10"] < SIFT_AT_MOST


def test_folders_of_the_first_list_are_still_read():
    """What is written into a folder has no word that a folder of before lacks."""
    known = {
        "version",
        "generator",
        "modes",
        "per_mode",
        "size",
        "eye",
        "strength",
        "field",
        "motion",
        "split",
    }
    assert set(list_settings(SPECIFICATION)) == known
    assert "fields" not in list_settings(SPECIFICATION)["eye"]


@pytest.mark.parametrize("mode", ("cf-fa", "fa-late", "cf-icga"))
def test_points_of_a_turned_eye_lie_in_both_pictures(mode):
    pair = pseudo_real_pair(mode, 2, WIDE_QUICK)
    assert pair.fixed_points.shape == pair.moving_points.shape and len(pair.fixed_points) >= 5
    assert (pair.moving_points > -1).all() and (pair.moving_points < 160).all()
    straight = landmark_error(invert(pair.fixed_to_moving), pair.fixed_points, pair.moving_points)
    assert 1e-6 < straight < 25, "a turn bends the map a little, whatever the affine says"


@pytest.mark.parametrize("mode", MODES)
def test_truth_is_exact_and_vessels_are_shown(mode):
    pair = pseudo_real_pair(mode, 1, QUICK)
    assert landmark_error(invert(pair.fixed_to_moving), pair.fixed_points, pair.moving_points) < 1e-9
    assert pair.fixed.dtype == pair.moving.dtype == np.uint8 and (pair.fixed.ndim == 3) == mode.startswith(
        "cf"
    )
    for points, _image in ((pair.fixed_points, pair.fixed), (pair.moving_points, pair.moving)):
        assert (points >= -0.5).all() and (points <= 159.5).all() and len(points) >= 10
    other = pseudo_real_pair(mode, 2, QUICK)
    assert np.abs(other.fixed_to_moving - pair.fixed_to_moving).max() > 1e-3


def test_points_lie_where_both_see():
    fov0, fov1 = np.zeros((2, 80, 100), bool)
    fov0[:, :60], fov1[:, 30:] = True, True
    p, q = shared_grid(translation((10, 0)), fov0, fov1)
    np.testing.assert_array_equal(q - p, np.tile([10.0, 0], (len(p), 1)))
    assert p[:, 0].max() < 60 and q[:, 0].min() >= 29.5 and 60 < len(p) < 256 * 0.4 + 16


def test_contrast_tells_a_shown_vessel_from_a_hidden_one():
    rng = np.random.default_rng(0)
    mask = np.zeros((200, 200), np.uint8)
    for y in range(30, 200, 40):
        cv2.line(mask, (10, y), (190, y), 255, 5)
    everywhere = np.ones(mask.shape, bool)
    noise = rng.normal(120, 12, mask.shape)
    shown, hidden = (np.uint8(np.clip(noise - depth * (mask > 0), 0, 255)) for depth in (40, 2))
    assert contrast_of(shown, mask, everywhere, everywhere) > 2 * LEAST_CONTRAST
    assert contrast_of(hidden, mask, everywhere, everywhere) < 0.5 * LEAST_CONTRAST
    assert contrast_of(shown, np.zeros_like(mask), everywhere, everywhere) == 0


def test_a_folder_resumes_and_refuses_another_list(tmp_path):
    folder = tmp_path / "list"
    first = list(pseudo_real_pairs(("cf-fa",), 1, folder, 1, False, QUICK))
    stamp = (folder / "images" / "cf-fa_000_fixed.png").stat().st_mtime_ns
    both = list(pseudo_real_pairs(("cf-fa", "oct-fa"), 1, folder, 1, False, QUICK))
    assert (folder / "images" / "cf-fa_000_fixed.png").stat().st_mtime_ns == stamp
    assert [p.id for p in both] == ["cf-fa_000", "oct-fa_000"] and both[1].mode == "oct-fa"
    np.testing.assert_array_equal(both[0].moving, first[0].moving)
    (pair, _) = read_landmark_set(folder)
    back = read_raw_pair(folder, "cf-fa_000")
    np.testing.assert_array_equal(pair.fixed_points, back.fixed_points)
    np.testing.assert_allclose(pair.moving_to_fixed, invert(back.fixed_to_moving), atol=1e-12)
    with pytest.raises(ValueError, match="other settings.*strength is 0.7 there and 2"):
        list(pseudo_real_pairs(("cf-fa",), 1, folder, 1, False, replace(QUICK, strength=2)))
    with pytest.raises(ValueError, match="unknown mode 'cf-mri'"):
        list(pseudo_real_pairs(("cf-mri",)))
    with pytest.raises(ValueError, match=r"0\.\.99"):
        pseudo_real_pair("cf-fa", -1, QUICK)


def test_scores_count_silence_and_nonsense_as_failures(tmp_path):
    answers = iter([None, np.full((3, 3), np.nan), np.eye(3), object()])
    args = dict(
        modes=("cf-fa",),
        limit=4,
        folder=tmp_path / "list",
        workers=1,
        progress=False,
        per_pair=True,
        spec=QUICK,
    )
    out = evaluate_pseudo_real(lambda fixed, moving: next(answers), **args)
    assert out["cf-fa"] == out["all"] and out["all"]["pairs"] == 4 and out["all"]["no_answer"] == 3
    assert list(out["errors"]) == [f"cf-fa_{i:03d}" for i in range(4)]

    class Answer:
        moving_to_fixed = np.eye(3)

    assert matrix_of(Answer()) is Answer.moving_to_fixed and matrix_of(None) is None


def test_what_scored_a_system_is_still_found_where_it_was():
    from loftr_curriculum.evaluation import pseudo_real

    with pytest.warns(DeprecationWarning, match="studies.pseudo_real"):
        assert pseudo_real.score_system is score_system


def test_systems_are_named_by_where_they_are_imported_from():
    assert system_named("loftr_curriculum.baselines.sift.register") is sift.register
    for wrong in (
        "register",
        "loftr_curriculum.baselines.nothing.register",
        "loftr_curriculum.baselines.sift.nothing",
        "",
    ):
        with pytest.raises(ValueError, match="expected the dotted name"):
            score_system(wrong, progress=False)


@pytest.mark.parametrize(("angle", "scale"), [(0, 1), (160, 0.7)])
def test_sift_solves_what_is_of_one_modality(angle, scale):
    fixed = make_world(5, EyeConfig(size=384, disease=0), ("cf",)).images["cf"]
    T = similarity(angle, scale, (12, -9), centre((384, 384)))
    answer = sift.register(fixed, warp_image(fixed, T, (300, 384)))
    assert corner_error(answer, invert(T), (300, 384)) < 2


def test_sift_has_no_answer_for_emptiness_and_noise():
    noise = np.random.default_rng(0).integers(0, 256, (2, 200, 200), dtype=np.uint8)
    blank = np.zeros((200, 200), np.uint8)
    assert sift.register(blank, blank) is None and sift.register(noise[0], blank) is None
    assert sift.register(noise[0], noise[1]) is None


def test_no_notebook_keeps_real_pixels():
    """Cells that read the real pairs may print figures, but no picture of theirs is stored."""
    seen = 0
    for path in (Path(__file__).parents[1] / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and "real_pairs" in "".join(cell["source"]):
                seen += path.stem == "generator_playground"
                kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
                assert not [k for k in kinds if k.startswith(("image/", "text/html", "application/"))], (
                    f"{path.name}: clear the output of {cell['id']}"
                )
    assert seen == 1
