"Guards of the geometry room: dtypes, faults, agreement of the families of transforms."

import numpy as np
import pytest

from loftr_curriculum import geometry as G


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, bool])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_warping_and_resizing_keep_dtype_and_channels(dtype, channels):
    image = (np.random.default_rng(0).uniform(0, 2, (20, 30, *channels)) > 1).astype(dtype)
    assert G.warp_image(image, G.similarity(10, 1.2), (40, 25)).shape == (40, 25, *channels)
    assert G.warp_image(image, np.eye(3), (20, 30)).dtype == dtype
    np.testing.assert_array_equal(G.warp_image(image, np.eye(3), (20, 30)), image)
    small = G.resize_image(image, (10, 15))
    assert small.dtype == dtype and small.shape == (10, 15, *channels)


def test_nearest_makes_no_new_labels():
    labels = np.random.default_rng(0).integers(0, 5, (40, 40)).astype(np.uint8) * 50
    assert set(
        np.unique(G.warp_image(labels, G.similarity(33, 1.3, center=(20, 20)), (40, 40), "nearest"))
    ) <= set(np.unique(labels))


def test_an_affine_and_a_homography_with_the_same_matrix_warp_alike():
    image = np.random.default_rng(0).uniform(0, 1, (50, 60)).astype(np.float32)
    T = G.affine(20, 1.1, (3, 2), (30, 25), 1.05, 0.04)
    H = T.copy()
    H[2, 0] = 1e-12
    np.testing.assert_allclose(G.warp_image(image, T, (50, 60)), G.warp_image(image, H, (50, 60)), atol=2e-3)


def test_unknown_mode_names_the_choices():
    with pytest.raises(ValueError, match="linear, nearest or cubic"):
        G.warp_image(np.zeros((4, 4), np.uint8), np.eye(3), (4, 4), "lanczos")


@pytest.mark.parametrize("fit, least", [(G.fit_similarity, 2), (G.fit_affine, 3), (G.fit_homography, 4)])
def test_fits_recover_a_similarity_and_refuse_too_few_points(fit, least):
    p = np.random.default_rng(1).uniform(0, 500, (30, 2))
    T = G.similarity(160, 1.7, (40, -9), (250, 250))
    np.testing.assert_allclose(
        G.apply_transform(fit(p, G.apply_transform(T, p)), p), G.apply_transform(T, p), atol=1e-6
    )
    with pytest.raises(ValueError, match=f"N >= {least}"):
        fit(p[: least - 1], p[: least - 1])


def test_random_transforms_depend_on_the_seed_alone_and_stay_in_range():
    def draw(seed):
        return [
            G.random_transform(np.random.default_rng((seed, k)), (200, 300), (150, 150)) for k in range(100)
        ]

    np.testing.assert_array_equal(draw(3), draw(3))
    for T in draw(4):
        assert (
            0.5 <= 2 * G.decompose(T, (200, 300))["scale"] <= 2
            and G.overlap(T, (200, 300), (150, 150)) >= 0.2
        )


def test_decompose_reads_a_homography_at_the_centre():
    H = G.similarity(30, 1.5, center=(50, 50))
    H[2, :2] = 5e-4, -3e-4
    c = G.centre((101, 101))
    e = 1e-5
    d = np.array([[e, 0], [0, e]])
    J = ((G.apply_transform(H, c + d) - G.apply_transform(H, c - d)) / (2 * e)).T
    np.testing.assert_allclose(G.jacobian(H, c), J, atol=1e-6)
    assert G.decompose(H, (101, 101))["det"] == pytest.approx(np.linalg.det(J), rel=1e-5)


def test_points_on_the_horizon_do_not_warn():
    H = np.eye(3)
    H[2] = 1, 0, 0
    with np.errstate(all="raise"):
        assert not np.isfinite(G.apply_transform(H, np.array([[0.0, 1.0]]))).all()
