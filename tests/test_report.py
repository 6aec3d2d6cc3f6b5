"""Guards of the report room: what is drawn is where it should be, files are whole, pyplot stays untouched."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from loftr_curriculum.geometry import (
    Bent,
    affine_of,
    apply_transform,
    invert,
    similarity,
    translation,
    warp_image,
)
from loftr_curriculum.io.files import FileError
from loftr_curriculum.io.images import read_image, write_image
from loftr_curriculum.io.transforms import load_transform
from loftr_curriculum.registration.config import Verdict
from loftr_curriculum.registration.pair import JudgedMatches, Registration
from loftr_curriculum.registration.verdict import Evidence
from loftr_curriculum.report.plots import (
    add_matches,
    checkerboard,
    figure_pixels,
    for_display,
    new_figure,
    phase_of,
    plot_curriculum,
    plot_pair,
    save_figure,
    side_by_side,
)
from loftr_curriculum.report.registration import write_registration


def scene(size, dtype=np.uint8, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(20, 230, (*size, channels)).astype(dtype) * (1 if dtype == np.uint8 else 200)
    return image if channels == 3 else image[..., 0]


def a_result(moving, T=None, n=40, verdict=Verdict.OK, fixed_size=(90, 120)):
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 80, (n, 2))
    q = apply_transform(invert(np.eye(3) if T is None else T), p)
    return Registration(
        T,
        verdict,
        () if verdict == Verdict.OK else ("because",),
        JudgedMatches(p, q, np.ones(n), rng.random(n) < (T is not None)),
        fixed_size,
        moving.shape[:2],
        Evidence(),
        moving,
    )


def test_an_interrupted_answer_leaves_the_earlier_one(tmp_path, monkeypatch):
    from loftr_curriculum.report import registration

    def interrupted(*_):
        raise KeyboardInterrupt

    fixed, moving = scene((90, 120)), scene((70, 100))
    write_registration(a_result(moving, np.eye(3)), fixed, moving, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(registration, "save_transform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_registration(a_result(moving, None, verdict=Verdict.FAILED), fixed, moving, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_very_dark_pair_is_drawn_so_that_one_can_judge_it(tmp_path):
    fixed, moving = scene((90, 120)) // 16, scene((90, 120)) // 16
    write_registration(a_result(moving, np.eye(3)), fixed, moving, tmp_path)
    board = read_image(tmp_path / "checkerboard.png")
    assert np.median(fixed) < 20 < 50 < np.median(board)
    assert np.array_equal(read_image(tmp_path / "warped.png"), moving)


@pytest.mark.parametrize("dtype, channels", [(np.uint8, 3), (np.uint8, 1), (np.uint16, 1)])
def test_writes_all_files(dtype, channels, tmp_path):
    fixed, moving = scene((90, 120)), scene((70, 100), dtype, channels)
    T = similarity(10, 1.1, (5, 3))
    r = a_result(moving, T)
    names = [p.name for p in write_registration(r, fixed, moving, tmp_path / "new" / "folder")]
    assert names[:4] == ["transform.json", "transform.tfm", "warped.png", "checkerboard.png"]
    assert names[4:] == ["inverse.tfm", "landmarks.csv", "matches.csv", "matches.png"]
    out = tmp_path / "new" / "folder"
    record = load_transform(out / "transform.json")
    assert (
        np.allclose(record.matrix, T)
        and record.verdict == "ok"
        and record.fixed_size == (90, 120)
        and record.moving_size == (70, 100)
    )
    warped = read_image(out / "warped.png")
    assert warped.dtype == dtype and np.array_equal(warped, warp_image(moving, T, (90, 120)))
    assert read_image(out / "checkerboard.png").shape == (90, 120, 3)
    assert sorted(p.name for p in out.iterdir()) == sorted(names)  # nothing temporary is left


def test_a_failure_removes_the_success_of_last_week(tmp_path):
    fixed, moving = scene((90, 120)), scene((70, 100))
    write_registration(a_result(moving, np.eye(3)), fixed, moving, tmp_path)
    write_registration(a_result(moving, None, verdict=Verdict.FAILED), fixed, moving, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["matches.png", "transform.json"]
    said = json.loads((tmp_path / "transform.json").read_text())
    assert said["moving_to_fixed"] is None and said["verdict"] == "failed" and said["reasons"] == ["because"]


def test_files_of_a_bend_go_with_the_answer_that_bends(tmp_path):
    fixed, moving = scene((90, 120)), scene((70, 100))
    support = np.array([[0, 0], [99, 0], [99, 69], [0, 69]], float)
    bend = np.array([[0, 0], [0, 0], [0, 0], [2, 1], [0, 1], [1, -1]], float)
    curved = Bent(np.eye(3), np.array([50.0, 35]), 50.0, bend, np.empty((0, 2)), support, 30.0).inverse()
    bent = replace(a_result(moving, affine_of(curved)), point_map=curved)
    names = {path.name for path in write_registration(bent, fixed, moving, tmp_path)}
    assert {"transform_bent.tfm", "inverse_bent.tfm"} < names == {path.name for path in tmp_path.iterdir()}
    write_registration(a_result(moving, np.eye(3)), fixed, moving, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*bent*")) == []


def test_without_any_match_there_is_still_a_picture(tmp_path):
    fixed, moving = scene((90, 120)), scene((500, 40), channels=1)
    write_image(tmp_path / "f.png", fixed)
    write_registration(
        a_result(moving, None, 0, Verdict.FAILED), tmp_path / "f.png", moving, tmp_path / "out"
    )
    assert read_image(tmp_path / "out" / "matches.png").shape[2] == 3


def test_big_images_make_small_drawings(tmp_path):
    fixed, moving = scene((1500, 2000)), scene((1200, 1600), np.uint16, 1)
    written = write_registration(
        a_result(moving, translation((30, 20)), fixed_size=(1500, 2000)), fixed, moving, tmp_path
    )
    size = {p.name: read_image(p).shape[:2] for p in written if p.suffix == ".png"}
    assert (
        size["warped.png"] == (1500, 2000)
        and max(size["checkerboard.png"]) == 1024
        and max(size["matches.png"]) < 1300
    )


def test_lines_end_where_the_points_are():
    "One match, drawn thick on black images, colours exactly the pixels of its two ends."
    figure = new_figure(408, 100)
    axes = figure.add_axes([0, 0, 1, 1])
    canvas = plot_pair(axes, np.zeros((50, 100), np.uint8), np.zeros((200, 400), np.uint8), height=100, gap=8)
    add_matches(canvas, [[20, 30]], [[300, 40]], [True], width=3)
    drawn = figure_pixels(figure)
    green = (drawn[..., 1] > 120) & (drawn[..., 0] < 120)
    ys, xs = np.nonzero(green)
    assert abs(xs.min() - 40.5) < 3 and abs(xs.max() - 357.6) < 3  # 2 x + 0.5; 208 + x / 2 - 0.25
    assert abs(ys[xs.argmin()] - 60.5) < 3 and abs(ys[xs.argmax()] - 19.6) < 3


def test_inliers_lie_on_top():
    figure = new_figure(208, 100)
    canvas = plot_pair(
        figure.add_axes([0, 0, 1, 1]),
        np.zeros((100, 100), np.uint8),
        np.zeros((100, 100), np.uint8),
        height=100,
    )
    add_matches(canvas, [[50, 50]] * 20, [[50, 50]] * 20, [True] + [False] * 19, width=4)
    middle = figure_pixels(figure)[50, 104]
    assert middle[1] > middle[0]


def test_many_lines_are_thinned_and_few_are_not():
    canvas = plot_pair(
        new_figure(208, 100).add_axes([0, 0, 1, 1]),
        np.zeros((100, 100), np.uint8),
        np.zeros((100, 100), np.uint8),
    )
    p = np.random.default_rng(0).uniform(0, 99, (5000, 2))
    add_matches(canvas, p, p, np.arange(5000) < 7, most=600)
    assert [len(c.get_segments()) for c in canvas.axes.collections if hasattr(c, "get_segments")] == [600, 7]


def test_checkerboard_shows_the_fixed_image_where_nothing_was_seen():
    a, b = np.full((80, 160), 90, np.uint8), np.full((80, 160, 3), 200, np.uint8)
    seen = np.zeros((80, 160), bool)
    assert (checkerboard(a, b, seen=seen) == 90).all()
    seen[:, :80] = True
    board = checkerboard(a, b, tiles=8, seen=seen)
    assert (board[:, 80:] == 90).all() and (board[:, :80] == 200).mean() == 0.5


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9), np.uint16), np.full((9, 9), np.nan), np.ones((9, 9), bool), np.full((9, 9), 3.0)],
)
def test_flat_images_can_be_shown(image):
    assert for_display(image).dtype == np.uint8


def test_side_by_side_is_one_row():
    row = side_by_side(
        [scene((50, 100)), scene((80, 40), np.uint16, 1), scene((20, 20), channels=1)], height=60, gap=5
    )
    assert row.shape == (60, 120 + 30 + 60 + 10, 3)


@pytest.mark.parametrize("n", [1, 2, 60])
def test_curriculum_of_any_length(n, tmp_path):
    epochs = np.arange(n)
    share = np.clip((50 - epochs) / 25, 0, 1)
    figure = new_figure(400, 240)
    plot_curriculum(figure.subplots(), epochs, 2 * share, 1 + 9 * share)
    save_figure(tmp_path / "c.png", figure)
    assert read_image(tmp_path / "c.png").shape == (240, 400, 3)


def test_phases_follow_the_values_and_not_the_calendar():
    "Weaning that stops halfway and goes on later is weaning all the time; one engine alone is enough for it."
    lam, scaler = [2, 2, 1.5, 1.5, 1.5, 0, 0, 0], [5, 5, 5, 3, 3, 3, 1, 1]
    assert phase_of(lam, scaler).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_the_library_never_imports_pyplot():
    code = (
        "import sys, loftr_curriculum.report.registration as r; "
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("earlier", [False, True])
def test_a_file_of_somebody_else_refuses_the_folder(earlier, tmp_path):
    fixed, moving = scene((90, 120)), scene((70, 100))
    if earlier:  # an answer that wrote no warped.png
        write_registration(a_result(moving, None, verdict=Verdict.FAILED), fixed, moving, tmp_path)
    (tmp_path / "warped.png").write_bytes(b"of another program")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileError, match="warped.png: exists, and no transform.json says"):
        write_registration(a_result(moving, np.eye(3)), fixed, moving, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_answer_whose_writing_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    from loftr_curriculum.report import registration

    def interrupted(*_):
        raise KeyboardInterrupt

    fixed, moving = scene((90, 120)), scene((70, 100))
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(registration, "draw_checkerboard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_registration(a_result(moving, np.eye(3)), fixed, moving, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    write_registration(a_result(moving, np.eye(3)), fixed, moving, tmp_path)
