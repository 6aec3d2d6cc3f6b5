"""Guards of the io room: odd files, half-written files, and files of other programs."""

import os
import stat
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import save_file

from loftr_curriculum.io.files import FileError, atomic_path, read_json, write_json
from loftr_curriculum.io.images import ImageError, image_size, read_image, read_picture, write_image
from loftr_curriculum.io.transforms import (
    TransformRecord,
    load_matches,
    load_transform,
    save_matches,
    save_transform,
)


def picture(shape=(24, 37, 3), dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(24, 37), (24, 37, 3), (1, 5), (7, 1, 3)])
def test_lossless_round_trip(tmp_path, suffix, dtype, shape):
    image = picture(shape, dtype)
    write_image(tmp_path / f"a{suffix}", image[::-1, ::-1])  # not contiguous
    back = read_image(tmp_path / f"a{suffix}")
    assert back.dtype == dtype and np.array_equal(back, image[::-1, ::-1])
    assert image_size(tmp_path / f"a{suffix}") == shape[:2]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_order_of_channels_is_that_of_another_library(tmp_path, suffix):
    image = cv2.resize(picture((4, 5, 3)), (50, 40), interpolation=cv2.INTER_CUBIC)
    write_image(tmp_path / f"a{suffix}", image)
    other = np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB")).astype(int)
    assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - other).max() <= 2
    assert np.abs(other - image).mean() < 4


def test_alpha_is_dropped_and_palettes_are_resolved(tmp_path):
    image, path = picture(), tmp_path / "a.png"
    Image.fromarray(np.dstack([image, image[..., 0]]), "RGBA").save(path)
    assert np.array_equal(read_image(path), image)
    Image.fromarray(image[..., :2].copy(), "LA").save(path)
    assert np.array_equal(read_image(path), np.repeat(image[..., :1], 3, axis=2))
    Image.fromarray(image).quantize(8).save(path)
    assert np.array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))
    Image.fromarray(image[..., 0] > 128).save(path)
    assert np.array_equal(read_image(path), (image[..., 0] > 128) * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("gray", [False, True])
def test_orientation_tags_are_applied(tmp_path, orientation, form, gray):
    image = np.zeros((20, 30, 3), np.uint8)
    image[:5, :10] = 255
    image = image[..., 0] if gray and form != "WEBP" else image
    tag = Image.Exif()
    tag[274] = orientation
    Image.fromarray(image).save(
        tmp_path / "a", form, **({"tiffinfo": {274: orientation}} if form == "TIFF" else {"exif": tag})
    )
    Image.fromarray(image).save(tmp_path / "b", "PNG", exif=tag)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "b"))) > 128
    assert np.array_equal(read_image(tmp_path / "a") > 128, upright)
    assert image_size(tmp_path / "a") == upright.shape[:2]
    assert read_picture(tmp_path / "a").facts["orientation"] == orientation


def test_orientation_of_a_big_endian_16_bit_tiff_is_applied(tmp_path):
    image = np.zeros((4, 6), np.uint16)
    image[0, 0] = 40000
    tags = [
        (256, 4, 6),
        (257, 4, 4),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (274, 3, 3),
        (277, 3, 1),
        (278, 4, 4),
        (279, 4, 48),
    ]

    def entry(t, k, v):
        return struct.pack(">HHI", t, k, 1) + (struct.pack(">HH", v, 0) if k == 3 else struct.pack(">I", v))

    head = struct.pack(">2sHI", b"MM", 42, 8 + 48)
    directory = struct.pack(">H", len(tags)) + b"".join(entry(*t) for t in tags) + struct.pack(">I", 0)
    (tmp_path / "a.tif").write_bytes(head + image.astype(">u2").tobytes() + directory)
    assert np.array_equal(read_image(tmp_path / "a.tif"), image[::-1, ::-1])  # 3: half a turn


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.95])
def test_half_a_file_is_an_error_that_names_it(tmp_path, suffix, keep):
    path = tmp_path / f"half{suffix}"
    write_image(path, picture((200, 300, 3)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ImageError, match=f"half{suffix}"):
        read_image(path)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    for name, expected in {
        "empty.png": "empty",
        "text.jpg": "cannot be decoded",
        "folder.png": "cannot be read",
        "none.png": "no such file",
    }.items():
        for read in (read_image, image_size):
            with pytest.raises(ImageError, match=expected) as e:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(e.value) and isinstance(e.value, ValueError)


def test_kinds_of_pixels_that_are_not_supported(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((5, 6), np.float32)).save(path)
    with pytest.raises(ImageError, match="8 or 16 bits a channel, found float32"):
        read_image(path)
    pages = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match="found a TIFF with 3 pages"):
        read_image(path)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"dpi": (300, 300)}])
def test_size_of_jpeg_variants(tmp_path, options):
    Image.fromarray(picture()).save(tmp_path / "a.jpg", **options)
    assert image_size(tmp_path / "a.jpg") == (24, 37)


def test_names_with_umlauts_and_blanks(tmp_path):
    path = tmp_path / "Fälle 1" / "süß.png"
    write_image(path, picture())
    assert np.array_equal(read_image(path), picture())


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8), np.zeros((4, 4)), np.zeros(4, np.uint8)],
)
def test_arrays_that_cannot_be_written_leave_nothing_behind(tmp_path, image):
    with pytest.raises(ImageError, match="a.png"):
        write_image(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("{")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are those of POSIX")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_ordinary_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.bin") as temporary:
            save_file({"x": np.zeros(3, np.float32)}, temporary)  # through a private file of its own
        with atomic_path(tmp_path / "b.txt") as temporary:
            temporary.write_text("b")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in sorted(tmp_path.iterdir())] == [mode, mode]


def test_a_write_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_json_holds_no_infinity(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), np.array([np.inf, 1])], "v": (True, None)})
    assert "Inf" not in (tmp_path / "a.json").read_text()
    assert read_json(tmp_path / "a.json") == {"x": [None, [None, 1.0]], "v": [True, None]}


@pytest.mark.parametrize("content, expected", [
    ('{"moving_to_fixed": [[1, 0, 0], [0, 1, 0], [0, 0, "x"]]}', "3 rows of 3"),
    ('{"moving_to_fixed": [[1, 0, 0], [0, 1, 0], [0, 0, NaN]]}', "3 rows of 3"),
    ('{"moving_to_fixed": [[1, 0, 0], [2, 0, 0], [0, 0, 1]]}', "cannot be inverted"),
    ('{"moving_to_fixed": [[0, 0, 0], [0, 0, 0], [0, 0, 0]]}', "cannot be inverted"),
    ('{"moving_to_fixed": null}', "verdict is not failed"),
    ('{"moving_to_fixed": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "direction": "fixed_to_moving"}', "direction"),
    ('{"moving_to_fixed": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "fixed_size": [0, 5]}', "fixed_size"),
    ('{"matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}', "moving_to_fixed"),
    ("[[1, 0, 0], [0, 1, 0], [0, 0, 1]]", "moving_to_fixed"),
    ("not json", "expected JSON"),
])  # fmt: skip
def test_transform_files_that_would_have_to_be_guessed(tmp_path, content, expected):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(FileError, match=expected) as e:
        load_transform(tmp_path / "t.json")
    assert "t.json" in str(e.value)


def test_a_transform_with_a_strong_shift_is_kept(tmp_path):
    M = np.array([[1e-3, 0, 1e5], [0, 1e-3, -1e5], [0, 0, 1]])
    save_transform(tmp_path / "t.json", TransformRecord(M, fixed_size=(5, 6), versions={"a": "1"}))
    back = load_transform(tmp_path / "t.json")
    assert np.array_equal(back.matrix, M) and back.fixed_size == (5, 6) and back.versions == {"a": "1"}


def test_matches_without_any_match(tmp_path):
    save_matches(tmp_path / "m.npz", np.empty((0, 2)), np.empty((0, 2)), np.empty(0))
    back = load_matches(tmp_path / "m.npz")
    assert back["points0"].shape == (0, 2) and back["inliers"] is None
    with pytest.raises(FileError, match="none.npz"):
        load_matches(tmp_path / "none.npz")


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(PermissionError) as refused, atomic_path(tmp_path / "m.png"):
        pass
    assert refused.value.filename == str(tmp_path / "m.png")
    assert not list(tmp_path.iterdir())
