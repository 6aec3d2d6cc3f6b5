"""Guards of maps that bend and of the look at the vessels: extremes, mirrors, strangers, no bend that
runs away.
"""

import pickle
from dataclasses import replace

import cv2
import numpy as np
import pytest

from loftr_curriculum.geometry import (
    Affine,
    Bent,
    affine,
    apply_transform,
    folds,
    invert,
    map_from_dict,
    translation,
    warp_image,
)
from loftr_curriculum.registration import RegistrationConfig, Verdict, register
from loftr_curriculum.registration.bend import (
    MODELS,
    Samples,
    coordinates_of,
    map_of_fit,
    refine_by_patches,
)
from loftr_curriculum.registration.frames import make_frame
from loftr_curriculum.registration.pair import register_batch
from loftr_curriculum.registration.verifier import probability, vessel_agreement
from loftr_curriculum.retina.config import EyeConfig, seeds_of
from loftr_curriculum.retina.world import make_world

SIZE = (480, 480)
CONFIG = RegistrationConfig()


@pytest.fixture(scope="module")
def eyes():
    "Two eyes of the report seeds: photograph and angiogram of each in one frame."
    view = affine(0, 0.75, (-130, -150))
    worlds = [make_world(seed, EyeConfig(), ("cf", "fa")) for seed in seeds_of("report", 2, start=40)]
    return [{name: warp_image(world.images[name], view, SIZE) for name in ("cf", "fa")} for world in worlds]


def bent_map(strength):
    "Fixed to moving: a turn and a quadratic bend of so many px in the corners."
    matrix = affine(15, 1.05, (10, -6), center=(240, 240))
    coefficients = np.zeros((6, 2))
    coefficients[3:] = strength * np.array([[1.0, -0.4], [0.3, 0.5], [-0.6, 0.8]])
    support = np.array([[0, 0], [479, 0], [479, 479], [0, 479]], float)
    return Bent(matrix, np.array([239.5, 239.5]), 240.0, coefficients, np.empty((0, 2)), support, 60.0)


def median_error(result, truth):
    y, x = np.mgrid[80:400:20, 80:400:20]
    fixed = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    return float(np.median(np.linalg.norm(result.to_fixed(truth(fixed)) - fixed, axis=1)))


def test_a_bent_pair_is_bent_back(eyes):
    truth = bent_map(9.0)
    moving = truth.warp(eyes[0]["fa"], SIZE)
    bent, straight = (
        register(eyes[0]["cf"], moving),
        register(eyes[0]["cf"], moving, config=RegistrationConfig(transform="affine")),
    )
    assert bent.verdict == Verdict.OK and bent.evidence.model in ("quadratic", "flow")
    assert median_error(bent, truth) < 0.4 * median_error(straight, truth)
    again = pickle.loads(pickle.dumps(bent))
    np.testing.assert_array_equal(again.warped, bent.warped)
    points = np.random.default_rng(0).uniform(100, 380, (50, 2))
    np.testing.assert_allclose(bent.to_moving(bent.to_fixed(points)), points, atol=1e-3)


def test_a_straight_pair_stays_straight(eyes):
    truth = Affine(affine(15, 1.05, (10, -6), center=(240, 240)))
    result = register(eyes[0]["cf"], truth.warp(eyes[0]["fa"], SIZE))
    straight = register(
        eyes[0]["cf"], truth.warp(eyes[0]["fa"], SIZE), config=RegistrationConfig(transform="affine")
    )
    assert result.verdict == Verdict.OK
    assert median_error(result, truth) < median_error(straight, truth) + 0.05


def test_another_eye_fails_and_has_no_matrix(eyes):
    assert register(eyes[0]["cf"], eyes[1]["fa"]).verdict != Verdict.OK
    result = register(eyes[1]["cf"], eyes[0]["fa"])
    assert (result.verdict, result.moving_to_fixed, result.warped) == (Verdict.FAILED, None, None)
    with pytest.raises(ValueError, match="could not be registered"):
        result.to_fixed(np.zeros((1, 2)))


def test_a_mirrored_image_is_named_and_answered_only_where_that_is_allowed(eyes):
    mirrored = np.ascontiguousarray(eyes[0]["fa"][:, ::-1])
    result = register(eyes[0]["cf"], mirrored)
    assert result.verdict == Verdict.FAILED and "mirrored" in result.reasons[0]
    allowed = register(eyes[0]["cf"], mirrored, config=RegistrationConfig(allow_mirrored=True))
    assert allowed.verdict == Verdict.OK and np.linalg.det(allowed.moving_to_fixed[:2, :2]) < 0
    points = np.random.default_rng(0).uniform(100, 380, (50, 2))
    flipped = points * (-1, 1) + (SIZE[1] - 1, 0)
    assert np.median(np.linalg.norm(allowed.to_fixed(flipped) - points, axis=1)) < 2
    similar = RegistrationConfig(allow_mirrored=True, transform="similarity")
    turned = register(eyes[0]["cf"], mirrored, config=similar)
    assert np.linalg.det(turned.moving_to_fixed[:2, :2]) < 0
    assert np.median(np.linalg.norm(turned.to_fixed(flipped) - points, axis=1)) < 3
    unseen = register(eyes[0]["cf"], mirrored, config=RegistrationConfig(check_mirrored=False))
    assert not any("mirrored" in reason for reason in unseen.reasons)


def test_a_batch_answers_as_one_by_one(eyes):
    pairs = [(eyes[0]["cf"], eyes[0]["fa"]), (eyes[1]["cf"], eyes[1]["fa"]), (eyes[0]["cf"], eyes[1]["fa"])]
    together = register_batch(pairs, batch_size=4)
    corners = np.array([[0, 0], [479, 0], [479, 479], [0, 479]], float)
    for pair, many in zip(pairs, together, strict=True):
        one = register(*pair)
        assert (one.verdict, len(one.reasons)) == (many.verdict, len(many.reasons))
        if one.point_map is not None:
            np.testing.assert_allclose(many.to_fixed(corners), one.to_fixed(corners), atol=1e-4)


@pytest.mark.parametrize(
    "shift, image",
    [
        ((5000, 0), None),
        ((477, 0), None),
        ((0, 0), np.zeros(SIZE, np.uint8)),
        ((0, 0), np.full(SIZE, 90, np.uint8)),
    ],
    ids=["no overlap", "three pixels", "black", "flat"],
)
def test_nothing_to_compare_is_a_number_and_no_exception(eyes, shift, image):
    fixed = make_frame(eyes[0]["cf"], None, 512)
    moving = make_frame(eyes[0]["fa"] if image is None else image, None, 512)
    found = vessel_agreement(refine_by_patches(fixed, moving, Affine(translation(shift)), CONFIG))
    assert 0 <= probability(found) < CONFIG.failed_probability


def a_fit(seed, share):
    "A map fitted to noisy samples of a random bend over part of the fixed image."
    rng = np.random.default_rng(seed)
    side = 512 * np.sqrt(share)
    points = rng.uniform(0, side, (120, 2)) + rng.uniform(0, 512 - side, 2)
    matrix = affine(
        rng.uniform(-180, 180), np.exp(rng.uniform(-0.6, 0.6)), rng.uniform(-50, 50, 2), (256, 256)
    )
    q = (points - 255.5) / 256
    bend = np.stack([q[:, 0] ** 2, q[:, 0] * q[:, 1], q[:, 1] ** 2], 1) @ rng.normal(0, 6, (3, 2))
    targets = apply_transform(matrix, points) + bend + rng.normal(0, 0.7, points.shape)
    samples = Samples(points, targets, np.ones(120), 2.0)
    model = MODELS[1 + seed % 3]
    return map_of_fit(samples, coordinates_of(samples, (512, 512)), model, (512, 512), margin=18.0), matrix


@pytest.mark.parametrize("seed", range(30))
def test_no_map_runs_away_outside_a_fifth_of_the_image(seed):
    bent, _ = a_fit(seed, 0.2)
    assert map_from_dict(bent.to_dict()) == bent
    everywhere = np.stack(np.meshgrid(np.arange(0, 512, 8.0), np.arange(0, 512, 8.0)), -1)
    straight = apply_transform(bent.affine, everywhere.reshape(-1, 2)).reshape(everywhere.shape)
    scale = np.sqrt(abs(np.linalg.det(bent.affine[:2, :2])))
    assert np.linalg.norm(bent(everywhere) - straight, axis=-1).max() / scale <= 0.05 * 512
    assert not folds(bent, (512, 512))


def test_a_map_that_folds_is_refused():
    wild = bent_map(400.0)
    assert folds(wild, SIZE) and not folds(bent_map(9.0), SIZE)


def test_the_false_accept_rate_can_be_set():
    strict, loose = RegistrationConfig(max_false_accept=0.0005), RegistrationConfig(max_false_accept=0.05)
    assert strict.sure_probability > RegistrationConfig(max_false_accept=0.005).sure_probability
    assert strict.sure_probability > loose.sure_probability
    assert replace(strict, max_false_accept=None).sure_probability == strict.ok_probability
    assert RegistrationConfig(max_false_accept=1e-9).sure_probability == 1.0


def test_invert_is_the_inverse_of_an_affine_map():
    matrix = affine(33, 0.8, (4, 5))
    np.testing.assert_allclose(Affine(matrix).inverse().matrix, invert(matrix))


BORDERS = (200, 90, 150, 240)  # px above, below, left, right


@pytest.mark.parametrize("which", ["fixed", "moving", "both", "mirrored"])
def test_black_borders_change_nothing(eyes, which):
    "A bordered pair gets the answer of the plain one, in its own pixels."
    fixed, moving = eyes[0]["cf"], eyes[0]["fa"]
    config = RegistrationConfig(allow_mirrored=which == "mirrored")
    if which == "mirrored":
        moving = np.ascontiguousarray(moving[:, ::-1])
    plain = register(fixed, moving, config=config)
    shift0, shift1 = np.zeros(2), np.zeros(2)
    if which in ("fixed", "both"):
        fixed, shift0 = cv2.copyMakeBorder(fixed, *BORDERS, cv2.BORDER_CONSTANT), np.array((150, 200))
    if which != "fixed":
        moving, shift1 = cv2.copyMakeBorder(moving, *BORDERS, cv2.BORDER_CONSTANT), np.array((150, 200))
    bordered = register(fixed, moving, config=config)
    assert bordered.verdict == plain.verdict == Verdict.OK
    points = plain.matches.points1[plain.matches.inliers]
    off = bordered.to_fixed(points + shift1) - shift0 - plain.to_fixed(points)
    assert np.median(np.linalg.norm(off, axis=1)) < 0.7
    found = bordered.matches[bordered.matches.inliers]
    assert np.median(np.linalg.norm(bordered.to_fixed(found.points1) - found.points0, axis=1)) < 3
    assert bordered.fixed_size == fixed.shape[:2] and bordered.warped.shape[:2] == fixed.shape[:2]
