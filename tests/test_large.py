"""Guards of large images: shrunk before they are looked at, answered in their own pixels."""

import cv2
import numpy as np
import pytest

from loftr_curriculum.geometry import affine, centre, corners, warp_image
from loftr_curriculum.registration import register
from loftr_curriculum.registration.frames import LARGEST
from loftr_curriculum.retina.config import EyeConfig, seeds_of
from loftr_curriculum.retina.world import make_world

SIDE = LARGEST + 1000


@pytest.fixture(scope="module")
def eye():
    (seed,) = seeds_of("report", 1, 0)
    return make_world(seed, EyeConfig(), ("cf", "fa")).images


def test_a_large_pair_is_answered_in_its_own_pixels(eye):
    size = (SIDE, SIDE)
    fixed = cv2.resize(eye["cf"], size)
    turn = affine(8, 1.05, (90, -50), center=centre(size))
    moving = warp_image(cv2.resize(eye["fa"], size), turn, size)
    result = register(fixed, moving)
    off = result.to_moving(corners(size)) - (corners(size) @ turn[:2, :2].T + turn[:2, 2])
    assert result.verdict == "ok"
    assert np.linalg.norm(off, axis=1).mean() < 3 * SIDE / 512
    good = result.matches[result.matches.inliers]
    apart = np.linalg.norm(result.to_fixed(good.points1) - good.points0, axis=1)
    assert np.median(apart) < 3 * SIDE / 512 and good.points0.max() > LARGEST
    assert result.fixed_size == size and result.warped.shape[:2] == size
