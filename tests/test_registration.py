"""Guards of the registration room: poses, sizes, hard input, liars."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from loftr_curriculum.geometry import (
    Limits,
    apply_transform,
    centre,
    compose,
    corners,
    invert,
    similarity,
    translation,
    warp_image,
)
from loftr_curriculum.io.images import ImageError, write_image
from loftr_curriculum.model.config import Guidance, Matches
from loftr_curriculum.registration import RegistrationConfig, Verdict, register, warp_to_fixed
from loftr_curriculum.registration.binning import best_per_cell, bin_matches
from loftr_curriculum.registration.estimate import estimate_transform
from loftr_curriculum.registration.registrar import nudge


class UprightSift:
    "A matcher that sees: SIFT without its sense of rotation, as a network that was trained on upright eyes."

    def __init__(self):
        self.sift, self.calls = cv2.SIFT_create(700), 0

    def features(self, image, fov):
        u = np.uint8(127 * image[0, 0].numpy() + 128)
        keys = self.sift.detect(u, None if fov is None else 255 * fov[0].numpy().astype(np.uint8))
        for k in keys:
            k.angle = 0
        keys, words = self.sift.compute(u, keys)
        return np.array([k.pt for k in keys]).reshape(-1, 2), words

    def match(self, image0, image1, fov0=None, fov1=None, mask0=None, mask1=None, guidance=None):
        self.calls += 1
        (p, d0), (q, d1) = self.features(image0, fov0), self.features(image1, fov1)
        if d0 is None or d1 is None or len(d1) < 2:
            return [Matches(np.empty((0, 2)), np.empty((0, 2)), np.empty(0))]
        m = [a for a, b in cv2.BFMatcher().knnMatch(d0, d1, k=2) if a.distance < 0.9 * b.distance]
        return [
            Matches(
                p[[x.queryIdx for x in m]],
                q[[x.trainIdx for x in m]],
                np.array([1 / (1 + x.distance / 300) for x in m]),
            )
        ]


class Scripted:
    "A liar: returns what a function of the two views' sizes says."

    def __init__(self, tell):
        self.tell = tell

    def match(self, image0, image1, **ignored):
        p, q = self.tell(image0.shape[2:], image1.shape[2:])
        return [
            Matches(
                np.asarray(p, float).reshape(-1, 2),
                np.asarray(q, float).reshape(-1, 2),
                np.linspace(1, 0.1, len(p)),
            )
        ]


def eye(size=640, seed=0):
    "Something with branches and texture, RGB."
    rng = np.random.default_rng(seed)
    image = cv2.GaussianBlur(rng.normal(0, 1, (size, size)), (0, 0), 2.5)
    image = 110 + 25 * image / image.std()
    for _ in range(25):
        line = np.cumsum(rng.normal(0, 14, (40, 2)), axis=0) + rng.uniform(0, size, 2)
        cv2.polylines(
            image,
            [line.astype(np.int32)],
            False,
            float(rng.uniform(20, 60)),
            int(rng.integers(1, 6)),
            cv2.LINE_AA,
        )
    gray = np.clip(image, 1, 255).astype(np.uint8)
    return np.dstack([np.clip(1.3 * gray, 0, 255).astype(np.uint8), gray, gray // 2])


EYE = eye()
QUICK = RegistrationConfig(long_side=256, second_long_sides=(256, 256), retry_long_sides=())


def shoot(A, size, scene=EYE):
    "A view of the scene through A (scene -> view)."
    return warp_image(scene, A, size, fill=0)


def a_pair(angle=0.0, scale=1.0, shift=(0, 0), size0=(420, 480), size1=(440, 400)):
    "Fixed and moving views of one scene, and the true moving -> fixed."
    A0 = translation((-80, -110))
    A1 = compose(
        A0, similarity(angle, scale, shift, center=centre(size0)), translation(centre(size1) - centre(size0))
    )
    return shoot(A0, size0), shoot(A1, size1), compose(invert(A1), A0)


def error(result, truth):
    box = corners(result.moving_size)
    return np.linalg.norm(
        apply_transform(result.moving_to_fixed, box) - apply_transform(truth, box), axis=1
    ).mean()


@pytest.mark.parametrize(
    "angle, scale, shift, turned",
    [
        (0, 1, (30, -40), 0),
        (12, 0.8, (0, 20), 0),
        (90, 1, (20, 0), 90),
        (178, 0.9, (0, 0), 180),
        (-95, 1.1, (0, 10), 270),
    ],
)
def test_finds_the_pose_and_says_so(angle, scale, shift, turned):
    fixed, moving, truth = a_pair(angle, scale, shift)
    r = register(fixed, moving, matcher=UprightSift())
    assert (r.verdict, r.reasons, r.evidence.turned_deg) == (Verdict.OK, (), turned)
    assert error(r, truth) < 1.0
    assert r.moving_to_fixed.dtype == np.float64 and r.moving_to_fixed.shape == (3, 3)


@pytest.mark.parametrize(
    "size0, size1", [((420, 480), (1300, 1500)), ((1200, 1000), (300, 420)), ((300, 500), (500, 300))]
)
def test_any_two_sizes_and_coordinates_of_the_originals(size0, size1):
    "Images of one scene, resized: the answer is the ratio of sizes, the half pixel included."
    scene = eye(512, 3)
    A0, A1 = (np.diag([s[1] / 512, s[0] / 512, 1]) @ np.eye(3) for s in (size0, size1))
    for A, s in ((A0, size0), (A1, size1)):
        A[:2, 2] = (s[1] / 512 - 1) / 2, (s[0] / 512 - 1) / 2
    fixed, moving = (
        cv2.resize(scene, s[::-1], interpolation=cv2.INTER_AREA if max(s) < 512 else cv2.INTER_LINEAR)
        for s in (size0, size1)
    )
    r = register(fixed, moving, matcher=UprightSift(), config=replace(QUICK, limits=Limits(stretch=4)))
    assert r.verdict == Verdict.OK and error(r, compose(invert(A1), A0)) < 0.004 * max(size0)
    assert r.warped.shape == (*size0, 3)
    if size0 == (
        300,
        500,
    ):  # one axis is stretched 2.8 times: between two pictures of one eye that is not plausible
        assert register(fixed, moving, matcher=UprightSift(), config=QUICK).verdict == Verdict.FAILED


def test_matches_are_in_original_pixels_and_flagged():
    fixed, moving, truth = a_pair(8, 0.9, (10, 5), size1=(800, 700))
    r = register(fixed, moving, matcher=UprightSift())
    m = r.matches
    off = np.linalg.norm(apply_transform(truth, m.points1) - m.points0, axis=1)
    assert m.inliers.sum() > 50 and off[m.inliers].max() < 7 and off[~m.inliers].min() > 3
    assert m[m.inliers].inliers.all() and len(m[m.inliers]) == m.inliers.sum()


@pytest.mark.parametrize("dtype, channels", [(np.uint8, 1), (np.uint8, 3), (np.uint16, 1), (np.uint16, 3)])
def test_warped_keeps_dtype_and_channels_and_fits(dtype, channels):
    fixed, moving, truth = a_pair(5, 0.95, (8, 3))

    def cast(a):
        return (a if channels == 3 else a[..., 1]).astype(dtype) * (1 if dtype == np.uint8 else 16)

    r = register(cast(fixed), cast(moving), matcher=UprightSift(), config=QUICK)
    assert r.warped.dtype == dtype and r.warped.shape == cast(fixed).shape
    inside = (slice(120, 300), slice(150, 320))
    assert np.corrcoef(r.warped[inside].ravel(), cast(fixed)[inside].ravel())[0, 1] > 0.95
    assert r.warped is r.warped  # made once


def test_files_and_arrays_give_the_same_and_twice_the_same(tmp_path):
    fixed, moving, _ = a_pair(10)
    write_image(tmp_path / "f.png", fixed), write_image(tmp_path / "m.tif", moving)
    a, b = (
        register(fixed, moving, matcher=UprightSift(), config=QUICK),
        register(str(tmp_path / "f.png"), tmp_path / "m.tif", matcher=UprightSift(), config=QUICK),
    )
    assert np.array_equal(a.moving_to_fixed, b.moving_to_fixed) and a.evidence == b.evidence
    assert np.array_equal(a.warped, b.warped)


@pytest.mark.parametrize("kind", ["similarity", "homography"])
def test_other_models(kind):
    fixed, moving, truth = a_pair(10, 0.9, (10, 0))
    r = register(
        fixed, moving, matcher=UprightSift(), config=RegistrationConfig(transform=kind, first_long_side=256)
    )
    assert r.verdict == Verdict.OK and error(r, truth) < 1.5
    M = r.moving_to_fixed
    assert M[0, 0] == pytest.approx(M[1, 1]) if kind == "similarity" else abs(M[2, :2]).max() > 0


NOISE = np.random.default_rng(0).integers(0, 255, (300, 350, 3), np.uint8)
HARD = {
    "black": np.zeros((300, 300), np.uint8),
    "white": np.full((300, 300, 3), 255, np.uint8),
    "noise": NOISE,
    "16-bit noise": np.random.default_rng(1).integers(0, 65535, (200, 260)).astype(np.uint16),
    "one pixel": np.full((1, 1), 7, np.uint8),
    "thread": np.full((3, 900), 90, np.uint8),
    "another eye": eye(500, 99),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("swap", [False, True])
def test_hard_pairs_fail_with_reasons_and_without_an_identity(name, swap):
    fixed = a_pair()[0]
    r = register(*((HARD[name], fixed) if swap else (fixed, HARD[name])), matcher=UprightSift(), config=QUICK)
    assert (r.verdict, r.moving_to_fixed, r.warped) == (Verdict.FAILED, None, None)
    assert r.reasons and all(isinstance(s, str) and s for s in r.reasons)
    assert not r.matches.inliers.any()


def grid(size):
    return np.stack(np.meshgrid(np.arange(4, size[1], 12.0), np.arange(4, size[0], 12.0)), -1).reshape(-1, 2)


def same_grid(s0, s1):
    return grid(np.minimum(s0, s1))


LIARS = {
    "identity": lambda s0, s1: (same_grid(s0, s1),) * 2,
    "always the same turn": lambda s0, s1: (
        grid(s0),
        apply_transform(similarity(9, 1.1, (20, 5), center=centre(s0)), grid(s0)),
    ),
    "one point": lambda s0, s1: (grid(s0), np.full_like(grid(s0), 99.0)),
    "one bundle": lambda s0, s1: (grid(s0), [100, 40] + 0.05 * grid(s0)),
    "random": lambda s0, s1: (
        grid(s0),
        np.random.default_rng(len(grid(s0))).uniform(0, s1[::-1], grid(s0).shape),
    ),
    "mirror": lambda s0, s1: (grid(s0), [s0[1] - 1, 0] + grid(s0) * [-1, 1]),
    "nothing": lambda s0, s1: ([], []),
    "three": lambda s0, s1: (grid(s0)[:3], grid(s0)[:3]),
    "not finite": lambda s0, s1: (grid(s0), np.full_like(grid(s0), np.nan)),
    "a line": lambda s0, s1: ([[x, 50] for x in range(200)], [[x, 60] for x in range(200)]),
    "a corner": lambda s0, s1: (
        (grid(s0)[:0].tolist() + [[x, y] for x in range(10, 60, 5) for y in range(10, 60, 5)],) * 2
    ),
}


@pytest.mark.parametrize("name", LIARS)
@pytest.mark.parametrize("kind", ["affine", "similarity", "homography"])
def test_no_liar_is_believed(name, kind):
    fixed, moving, _ = a_pair(40, 1.2)
    r = register(fixed, moving, matcher=Scripted(LIARS[name]), config=replace(QUICK, transform=kind))
    assert r.verdict != Verdict.OK and r.reasons
    if name in ("identity", "one point", "one bundle", "random", "nothing", "three", "not finite") or (
        name,
        kind,
    ) == ("mirror", "affine"):
        assert (r.verdict, r.moving_to_fixed) == (Verdict.FAILED, None)


def test_a_network_that_has_learned_nothing_finds_nothing_between_strangers():
    "Its padding tells it where the border is, and a dozen border matches agree on the identity to the pixel."
    import torch

    from loftr_curriculum.model.config import MatcherConfig
    from loftr_curriculum.model.matcher import Matcher

    torch.manual_seed(0)
    matcher = Matcher(MatcherConfig(threshold=1e-9)).eval()
    for fixed, moving in (
        (a_pair()[0], HARD["another eye"]),
        (NOISE, np.random.default_rng(5).integers(0, 255, (300, 350, 3), np.uint8)),
    ):
        r = register(fixed, moving, matcher=matcher, config=QUICK)
        assert len(r.matches) > 0 and (r.verdict, r.moving_to_fixed) == (Verdict.FAILED, None)


def test_without_a_second_look_nothing_is_ok():
    fixed, moving, truth = a_pair(5)
    r = register(fixed, moving, matcher=UprightSift(), config=replace(QUICK, second_long_sides=()))
    assert r.verdict == Verdict.DOUBTFUL and error(r, truth) < 1.5


def test_turned_looks_only_where_unsure():
    sure, unsure, off = UprightSift(), UprightSift(), UprightSift()
    register(*a_pair(0)[:2], matcher=sure, config=QUICK)
    register(*a_pair(90)[:2], matcher=unsure, config=QUICK)
    r = register(*a_pair(90)[:2], matcher=off, config=replace(QUICK, turn_when_unsure=False))
    assert (sure.calls, unsure.calls) == (3, 6) and off.calls <= 3 and r.verdict != Verdict.OK


def test_a_fresh_start_with_a_larger_first_look_saves_what_the_small_one_missed():
    class FarSighted(UprightSift):
        def match(self, image0, image1, **rest):
            m, sees = super().match(image0, image1, **rest)[0], max(image0.shape[-2:]) > 256
            return [m if sees else m[:0]]

    fixed, moving, truth = a_pair(5)
    config = RegistrationConfig(long_side=384, retry_long_sides=(), retry_turns_deg=(0,))
    lost = register(fixed, moving, matcher=FarSighted(), config=config)
    assert lost.verdict == Verdict.FAILED and lost.evidence.first_long_side == 256
    found = register(fixed, moving, matcher=FarSighted(), config=replace(config, retry_long_sides=(384,)))
    assert found.verdict == Verdict.OK and found.evidence.first_long_side == 384 and error(found, truth) < 2
    sure = UprightSift()
    register(fixed, moving, matcher=sure, config=replace(config, retry_long_sides=(384,)))
    assert sure.calls == 2  # an ok answer is not tried again


def test_a_fresh_start_looks_between_the_quarter_turns():
    fixed, moving, truth = a_pair(45)
    without = register(fixed, moving, matcher=UprightSift(), config=QUICK)
    assert without.verdict == Verdict.FAILED
    found = register(
        fixed,
        moving,
        matcher=UprightSift(),
        config=replace(QUICK, retry_long_sides=(256,), retry_turns_deg=(45,)),
    )
    assert found.verdict == Verdict.OK and found.evidence.turned_deg % 90 == 45 and error(found, truth) < 2


def test_second_looks_improve_a_coarse_first_look():
    class Coarse(UprightSift):
        def match(self, image0, image1, **rest):
            m = super().match(image0, image1, **rest)[0]
            return (
                [Matches(m.points0, 12 * np.round(m.points1 / 12), m.confidence)] if self.calls == 1 else [m]
            )

    fixed, moving, truth = a_pair(6, 0.9, (10, 5))
    once = register(fixed, moving, matcher=Coarse(), config=replace(QUICK, second_long_sides=()))
    assert error(register(fixed, moving, matcher=Coarse(), config=QUICK), truth) < 0.3 * error(once, truth)


def test_a_worse_second_look_changes_nothing():
    class Blinded(UprightSift):
        def match(self, image0, image1, **rest):
            m = super().match(image0, image1, **rest)[0]
            return [m if self.calls == 1 else m[np.arange(len(m)) < 25]]

    fixed, moving, truth = a_pair(4)
    once = register(fixed, moving, matcher=Blinded(), config=replace(QUICK, second_long_sides=()))
    assert np.array_equal(
        register(fixed, moving, matcher=Blinded(), config=QUICK).moving_to_fixed, once.moving_to_fixed
    )


@pytest.mark.parametrize(
    "bad, says",
    [
        (np.full((40, 40), 200.0), r"floats in \[0, 1\], got values from 200"),
        (np.zeros((40, 40), np.int16), "got int16"),
        (np.zeros((40, 40, 2), np.uint8), r"got \(40, 40, 2\)"),
        (np.zeros((40, 40, 5), np.uint8), r"got \(40, 40, 5\)"),
        (np.zeros((0, 40), np.uint8), r"got \(0, 40\)"),
        (np.zeros(40, np.uint8), r"got \(40,\)"),
        ([[1, 2], [3, 4]], "got list"),
        (None, "got NoneType"),
        ("no/such/file.png", "no/such/file.png"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_expected(bad, says):
    good = a_pair()[0]
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ImageError, match=says):
            register(*pair, matcher=UprightSift())


class Recorder(UprightSift):
    def match(self, image0, image1, **rest):
        self.__dict__.setdefault("seen", []).append(
            {k: v if v is None or isinstance(v, Guidance) else tuple(v.shape) for k, v in rest.items()}
            | dict(image0=tuple(image0.shape), image1=tuple(image1.shape))
        )
        self.__dict__.setdefault("masks", []).append((rest["mask0"], rest["mask1"]))
        return super().match(image0, image1, **rest)


def test_masks_reach_the_matcher_in_every_view():
    fixed, moving, _ = a_pair(90)

    def dark(image):
        return image[..., 1] < 60

    matcher = Recorder()
    r = register(
        fixed,
        moving,
        matcher=matcher,
        fixed_mask=dark(fixed),
        moving_mask=dark(moving),
        guidance=Guidance(2.0),
        config=QUICK,
    )
    assert r.verdict == Verdict.OK and len(matcher.seen) == 6
    for seen in matcher.seen:
        assert seen["guidance"].vessel_soft_lambda == 2.0
        for side in "01":
            assert (
                seen["mask" + side]
                == seen["fov" + side]
                == seen["image" + side][:1] + seen["image" + side][2:]
            )
    last0, last1 = (m[0].numpy() > 0.5 for m in matcher.masks[-1])
    back = warp_image(
        last1, invert(nudge(1, last0.shape, QUICK.nudge).matrix), last0.shape
    )  # the last view differs from the fixed frame by its nudge
    assert (last0 & back)[40:-40, 40:-40].sum() > 0.7 * back[40:-40, 40:-40].sum() > 0
    unguided = Recorder()
    register(fixed, moving, matcher=unguided, config=QUICK)
    assert all(s["mask0"] is None and s["mask1"] is None for s in unguided.seen)


def test_masks_and_guidance_go_together():
    fixed, moving, _ = a_pair()
    mask0, mask1 = np.zeros(fixed.shape[:2], bool), np.zeros(moving.shape[:2], bool)
    for wrong in (
        dict(fixed_mask=mask0, moving_mask=mask1),
        dict(guidance=Guidance(2.0)),
        dict(fixed_mask=mask0, guidance=Guidance(2.0)),
    ):
        with pytest.raises(ValueError, match="go together"):
            register(fixed, moving, matcher=UprightSift(), **wrong)
    with pytest.raises(ImageError, match="moving mask.*expected the size"):
        register(
            fixed, moving, matcher=UprightSift(), fixed_mask=mask0, moving_mask=mask0, guidance=Guidance(2.0)
        )


def test_a_matcher_in_training_mode_is_refused():
    import torch

    class Net(torch.nn.Module):
        match = UprightSift().match

    fixed, moving, _ = a_pair()
    with pytest.raises(ValueError, match="training mode"):
        register(fixed, moving, matcher=Net())
    assert register(fixed, moving, matcher=Net().eval(), config=QUICK).verdict == Verdict.OK


def test_warp_to_fixed_moves_a_label_image_without_new_labels():
    labels = np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16, np.ones((50, 50), np.uint8))
    out = warp_to_fixed(labels, similarity(20, 0.4, (3, 4)), (120, 130), "nearest")
    assert set(np.unique(out)) <= set(np.unique(labels)) and out.shape == (120, 130)


def test_binning_never_keeps_more_than_it_may_and_keeps_the_best():
    rng = np.random.default_rng(0)
    cell, confidence = rng.integers(0, 64, 3000), rng.random(3000)
    kept = best_per_cell(cell, confidence, 5)
    for c in range(64):
        mine = np.flatnonzero(cell == c)
        assert set(kept[cell[kept] == c]) == set(mine[np.argsort(-confidence[mine])[:5]])
    assert len(bin_matches(rng.uniform(-50, 400, (3000, 2)), confidence, np.zeros((300, 300), bool))) <= 320


@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.12])
@pytest.mark.parametrize("kind", ["affine", "similarity", "homography"])
def test_estimates_survive_outliers(ratio, kind):
    T = similarity(-130, 0.7, (20, 9), center=(255, 255))
    errors = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        p = rng.uniform(0, 511, (300, 2))
        q = apply_transform(T, p) + rng.normal(0, 0.7, p.shape)
        wrong = rng.random(300) >= ratio
        q[wrong] = rng.uniform(0, 511, (wrong.sum(), 2))
        e = estimate_transform(p, q, kind)
        errors.append(
            np.linalg.norm(
                e.fixed_to_moving(corners((512, 512))) - apply_transform(T, corners((512, 512))),
                axis=1,
            ).mean()
        )
    assert np.median(errors) < {"affine": 2.5, "similarity": 2.0, "homography": 5.0}[kind]
