"Guards of the exports: other programs read them and resample as this package does."

import numpy as np
import pytest

from loftr_curriculum.geometry import Affine, Bent, Homography, affine, affine_of, apply_transform
from loftr_curriculum.io.exports import (
    landmarks_of,
    save_itk,
    save_itk_files,
    save_itk_inverse,
    save_landmarks,
)

SIZE = (240, 320)
T = affine(12, 1.1, (8, -5), center=(160, 120), aspect=1.02, shear=0.02)


def a_bend(seed=0, strength=4.0):
    rng = np.random.default_rng(seed)
    coefficients = np.zeros((6, 2))
    coefficients[3:] = strength * rng.uniform(-1, 1, (3, 2))
    support = np.array([[20, 20], [300, 20], [300, 220], [20, 220]], float)
    return Bent(T, np.array([160.0, 120]), 160.0, coefficients, np.empty((0, 2)), support, 50.0)


def a_homography():
    matrix = T.copy()
    matrix[2, :2] = 2e-4, -1e-4
    return Homography(matrix)


@pytest.mark.parametrize(
    "fixed_to_moving", [Affine(T), a_homography(), a_bend()], ids=["affine", "plane", "bent"]
)
def test_itk_maps_points_and_resamples_as_we_do(fixed_to_moving, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    moving_to_fixed = fixed_to_moving.inverse()
    save_itk(tmp_path / "t.tfm", moving_to_fixed, SIZE)
    transform = sitk.ReadTransform(str(tmp_path / "t.tfm"))
    points = np.random.default_rng(0).uniform(0, 1, (200, 2)) * (SIZE[1] - 1, SIZE[0] - 1)
    theirs = np.array([transform.TransformPoint(point.tolist()) for point in points])
    assert np.abs(theirs - fixed_to_moving(points)).max() < 0.05

    y, x = np.mgrid[:260, :300]
    moving = (100 + 50 * np.sin(x / 11) + 50 * np.cos(y / 13)).astype(np.float32)
    fixed = sitk.GetImageFromArray(np.zeros(SIZE, np.float32))
    resampled = sitk.GetArrayFromImage(
        sitk.Resample(sitk.GetImageFromArray(moving), fixed, transform, sitk.sitkLinear)
    )
    ours = moving_to_fixed.warp(moving, SIZE)
    inside = moving_to_fixed.warp(np.ones(moving.shape, bool), SIZE, "nearest")
    inside[:3], inside[-3:], inside[:, :3], inside[:, -3:] = False, False, False, False
    both = inside & (resampled > 0) & (ours > 0)
    assert both.mean() > 0.4
    assert (
        np.quantile(np.abs(resampled - ours)[both], 0.99) < 0.5
    )  # grey values; they change by up to 5 a pixel


def test_a_bent_answer_leaves_its_affine_and_the_whole_map(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    plain, bent = tmp_path / "transform.tfm", tmp_path / "transform_bent.tfm"
    moving_to_fixed = a_bend().inverse()
    written = save_itk_files(plain, bent, tmp_path / "mm.tfm", moving_to_fixed, SIZE, {})
    assert written == [plain, bent]
    points = np.random.default_rng(0).uniform(0, 1, (200, 2)) * (SIZE[1] - 1, SIZE[0] - 1)

    def theirs(path):
        transform = sitk.ReadTransform(str(path))
        return np.array([transform.TransformPoint(point.tolist()) for point in points])

    affine_only = apply_transform(np.linalg.inv(affine_of(moving_to_fixed)), points)
    assert np.abs(theirs(plain) - affine_only).max() < 1e-6
    assert np.abs(theirs(bent) - a_bend()(points)).max() < 0.05
    assert np.abs(theirs(plain) - theirs(bent)).max() > 1
    assert "transform_bent.tfm" in plain.read_text().splitlines()[1]


def test_an_answer_that_does_not_bend_leaves_one_file(tmp_path):
    paths = [tmp_path / name for name in ("transform.tfm", "transform_bent.tfm", "transform_mm.tfm")]
    assert save_itk_files(*paths, Affine(T), SIZE, {"fixed": {"spacing_mm": [1, 1]}}) == paths[:1]
    assert [p.name for p in tmp_path.iterdir()] == ["transform.tfm"]


@pytest.mark.parametrize("fixed_to_moving", [Affine(T), a_bend()], ids=["affine", "bent"])
def test_with_spacings_the_map_is_in_millimetres(fixed_to_moving, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    paths = [tmp_path / name for name in ("transform.tfm", "transform_bent.tfm", "transform_mm.tfm")]
    facts = {"fixed": {"spacing_mm": [0.01, 0.02]}, "moving": {"spacing_mm": [0.006, 0.005]}}
    assert paths[2] in save_itk_files(*paths, fixed_to_moving.inverse(), SIZE, facts)
    transform = sitk.ReadTransform(str(paths[2]))
    points = np.random.default_rng(0).uniform(0, 1, (200, 2)) * (SIZE[1] - 1, SIZE[0] - 1)
    theirs = np.array([transform.TransformPoint(point.tolist()) for point in points * (0.02, 0.01)])
    assert np.abs(theirs / (0.005, 0.006) - fixed_to_moving(points)).max() < 0.05  # px


@pytest.mark.parametrize(
    "fixed_to_moving", [Affine(T), a_homography(), a_bend()], ids=["affine", "plane", "bent"]
)
def test_each_inverse_after_its_transform_leads_back(fixed_to_moving, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    moving_to_fixed = fixed_to_moving.inverse()
    forward = [tmp_path / name for name in ("transform.tfm", "transform_bent.tfm")]
    backward = [tmp_path / name for name in ("inverse.tfm", "inverse_bent.tfm")]
    written = save_itk_files(*forward, tmp_path / "mm.tfm", moving_to_fixed, SIZE, {})
    inverses = save_itk_inverse(*backward, moving_to_fixed, (300, 340))
    couples = 2 if isinstance(fixed_to_moving, Bent) else 1
    assert (written, inverses) == (forward[:couples], backward[:couples])
    points = np.random.default_rng(0).uniform(0.2, 0.8, (200, 2)) * (SIZE[1], SIZE[0])
    for couple in zip(written, inverses):
        there, back = (sitk.ReadTransform(str(path)) for path in couple)
        again = [back.TransformPoint(there.TransformPoint(point.tolist())) for point in points]
        assert np.abs(np.array(again) - points).max() < 0.05


def test_the_inverse_of_an_affine_is_that_of_the_matrix_and_names_the_whole_one(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    moving_to_fixed = a_bend().inverse()
    plain, bent = save_itk_inverse(tmp_path / "i.tfm", tmp_path / "b.tfm", moving_to_fixed, (300, 340))
    points = np.random.default_rng(0).uniform(0.2, 0.8, (200, 2)) * (SIZE[1], SIZE[0])
    transform = sitk.ReadTransform(str(plain))
    theirs = np.array([transform.TransformPoint(point.tolist()) for point in points])
    assert np.abs(theirs - apply_transform(affine_of(moving_to_fixed), points)).max() < 1e-6
    assert "b.tfm" in plain.read_text().splitlines()[1]
    transform = sitk.ReadTransform(str(bent))
    theirs = np.array([transform.TransformPoint(point.tolist()) for point in points])
    assert np.abs(theirs - moving_to_fixed(points)).max() < 0.05


def test_bigwarp_finds_name_flag_moving_and_target(tmp_path):
    fixed, moving = landmarks_of(Affine(T).inverse(), SIZE, (300, 340))
    assert len(fixed) > 30
    save_landmarks(tmp_path / "landmarks.csv", fixed, moving)
    lines = (tmp_path / "landmarks.csv").read_text().splitlines()
    cells = [[cell.strip('"') for cell in line.split(",")] for line in lines]
    assert [row[:2] for row in cells] == [[f"Pt-{k}", "true"] for k in range(len(fixed))]
    numbers = np.array([row[2:] for row in cells], float)
    assert np.abs(numbers[:, :2] - apply_transform(T, numbers[:, 2:])).max() < 1e-3
    assert (numbers[:, :2] >= 0).all() and (numbers[:, :2] <= (339, 299)).all()


def test_warp_names_the_file_that_it_wants_instead_of_one_for_itk(tmp_path, capsys):
    from loftr_curriculum.cli import main

    save_itk(tmp_path / "transform.tfm", Affine(np.eye(3)), (40, 60))
    words = ["warp", str(tmp_path / "mask.png"), str(tmp_path / "transform.tfm"), "--out"]
    assert main([*words, str(tmp_path / "w.png")]) == 2
    said = capsys.readouterr().err
    assert "transform.tfm: is a transform for ITK" in said and "expected the transform.json" in said
    assert "JSON," not in said and not (tmp_path / "w.png").exists()
