"""Guards of the formats: pages, orientation, fields of view, and headers that lie."""

import io
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from loftr_curriculum.cli import main
from loftr_curriculum.data.preprocess import to_gray
from loftr_curriculum.io import images
from loftr_curriculum.io.files import FileError, read_json, refuse_to_overwrite
from loftr_curriculum.io.images import ImageError, image_size, limit_from, read_image, read_picture
from loftr_curriculum.io.inputs import as_picture
from loftr_curriculum.io.transforms import load_transform
from loftr_curriculum.registration.config import RegistrationConfig, Verdict
from loftr_curriculum.registration.journal import read_results
from loftr_curriculum.registration.many import register_many
from loftr_curriculum.registration.pair import NO_MATCHES, Registration, open_pair, register
from loftr_curriculum.registration.verdict import Evidence
from loftr_curriculum.report.registration import write_registration


def picture(shape=(24, 37), seed=0):
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def tiff_of(pages, big=False, order="<", orientation=1, purposes=()):
    "A grey, uncompressed TIFF or BigTIFF of these pages; strips first, the directory after each."
    wide, head = ("Q", 8) if big else ("I", 4)
    mark = b"II" if order == "<" else b"MM"
    start = (
        struct.pack(order + "2sHHHQ", mark, 43, 8, 0, 0) if big else struct.pack(order + "2sHI", mark, 42, 0)
    )
    data, link = bytearray(start), 8 if big else 4
    for number, page in enumerate(pages):
        strip = len(data)
        data += page.tobytes()
        tags = ((254, purposes[number]),) if purposes else ()
        tags += ((256, page.shape[1]), (257, page.shape[0]), (258, 8), (259, 1), (262, 1), (273, strip))
        tags += ((274, orientation), (277, 1), (278, page.shape[0]), (279, page.nbytes))
        struct.pack_into(order + wide, data, link, len(data))
        data += struct.pack(order + ("Q" if big else "H"), len(tags))
        for tag, value in tags:
            kind = 4 if tag in (254, 256, 257, 273, 278, 279) else 3
            stored = struct.pack(order + ("I" if kind == 4 else "H"), value)
            data += struct.pack(order + "HH" + wide, tag, kind, 1) + stored.ljust(head, b"\0")
        link = len(data)
        data += bytes(head)
    return bytes(data)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_page_of_a_tiff_is_chosen(tmp_path, big, order):
    pages = [picture(seed=seed) for seed in range(3)]
    path = tmp_path / "scan.tif"
    path.write_bytes(tiff_of(pages, big, order))
    for number, page in enumerate(pages):
        chosen = read_picture(f"{path}[{number}]")
        assert np.array_equal(chosen.pixels, page) and chosen.facts["page"] == number
    assert image_size(f"{path}[2]") == (24, 37)
    with pytest.raises(ImageError, match=r"3 pages; write .*scan.tif\[0\] for the first to .*scan.tif\[2\]"):
        read_image(path)
    with pytest.raises(ImageError, match="has no page 3, its pages are 0 to 2"):
        read_image(f"{path}[3]")
    with pytest.raises(ImageError, match="none.tif: no such file"):
        read_image(tmp_path / "none.tif[1]")


def test_a_file_really_called_so_wins(tmp_path):
    Image.fromarray(picture(seed=1)).save(tmp_path / "a.tif[1]", "PNG")
    (tmp_path / "a.tif").write_bytes(tiff_of([picture(), picture()]))
    assert np.array_equal(read_image(tmp_path / "a.tif[1]"), picture(seed=1))


def test_pages_that_are_alike_are_one_image(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff_of([picture()] * 3))
    assert np.array_equal(read_image(tmp_path / "a.tif"), picture())


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_of_tiff_and_bigtiff(tmp_path, big, order):
    (tmp_path / "a.tif").write_bytes(tiff_of([picture()], big, order, orientation=6))
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.rot90(picture(), -1))
    assert image_size(tmp_path / "a.tif") == (37, 24)


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_cut_behind_its_first_page_is_refused(tmp_path, big):
    whole = tiff_of([picture(seed=seed) for seed in range(3)], big)
    for keep in (0.4, 0.6, 0.99):
        (tmp_path / "cut.tif").write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(ImageError, match="cut.tif: expected a whole TIFF"):
            read_image(tmp_path / "cut.tif[0]")


def test_a_thumbnail_is_no_page(tmp_path):
    small, full = picture((6, 9)), picture(seed=1)
    (tmp_path / "a.tif").write_bytes(tiff_of([small, full], purposes=(1, 0)))
    assert np.array_equal(read_image(tmp_path / "a.tif"), full)
    assert image_size(tmp_path / "a.tif[0]") == (24, 37)


@pytest.mark.parametrize("big", [False, True])
def test_overlapping_directories_do_not_keep_us_busy(tmp_path, big):
    "Each directory starts a few bytes behind the one before and claims thousands of tags."
    size, count = 800_000, 4000
    data = bytearray(size)
    data[:8] = struct.pack("<2sHI", b"II", 42, 8) if not big else struct.pack("<2sHHH", b"II", 43, 8, 0)
    width, wide = (20, "Q") if big else (12, "I")
    if big:
        struct.pack_into("<Q", data, 8, 16)
    at = 16 if big else 8
    while at + count * width + 32 < size:
        struct.pack_into("<Q" if big else "<H", data, at, count)
        link = at + (8 if big else 2) + count * width
        struct.pack_into("<" + wide, data, link, at + 40)
        at += 40
    (tmp_path / "knot.tif").write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(ImageError, match="knot.tif"):
        read_image(tmp_path / "knot.tif")
    assert time.perf_counter() - start < 5


def test_directories_in_a_circle_are_refused(tmp_path):
    data = bytearray(tiff_of([picture(seed=seed) for seed in range(2)]))
    first = struct.unpack_from("<I", data, 4)[0]
    struct.pack_into("<I", data, len(data) - 4, first)
    (tmp_path / "circle.tif").write_bytes(data)
    with pytest.raises(ImageError, match="circle.tif: .*have no end"):
        read_image(tmp_path / "circle.tif[0]")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("form", ["png", "tif", "webp"])
def test_alpha_becomes_the_field_of_view(tmp_path, dtype, form):
    if form == "webp" and dtype == np.uint16:
        pytest.skip("WebP has 8 bits")
    white = np.iinfo(dtype).max
    image = np.full((20, 30, 4), white, dtype)
    image[:, :12, 3] = 0
    data = cv2.imencode(f".{form}", image, [cv2.IMWRITE_WEBP_QUALITY, 101] if form == "webp" else [])[1]
    (tmp_path / "a").write_bytes(data.tobytes())
    seen = read_picture(tmp_path / "a").seen
    assert not seen[:, :12].any() and seen[:, 12:].all()
    image[..., 3] = 0  # an alpha channel that nobody filled in
    (tmp_path / "a").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    assert read_picture(tmp_path / "a").seen is None


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def a_header_of(form, height, width):
    "A small file whose header asks for many pixels."
    file = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(picture((8, 9, 3))).save(file, form.replace("GIFF", "GIF"), **options)
    data = bytearray(file.getvalue())
    if form == "PNG":
        data[8:33] = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    elif form == "JPEG":
        at = data.index(b"\xff\xc0")
        struct.pack_into(">HH", data, at + 5, height, width)
    elif form == "TIFF":
        for tag, value in ((256, width), (257, height)):
            at = data.index(struct.pack("<HHI", tag, 4, 1))
            struct.pack_into("<I", data, at + 8, value)
    elif form == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    elif form == "GIF":
        struct.pack_into("<HH", data, 6, width, height)
    elif form == "WEBP":
        bits = struct.unpack_from("<I", data, 21)[0] & 0xF0000000
        struct.pack_into("<I", data, 21, bits | (width - 1) | (height - 1) << 14)
    elif form == "JPEG2000":
        at = data.index(b"\xff\x4f\xff\x51")
        struct.pack_into(">II", data, at + 8, width, height)
    elif form == "PPM":
        data[:] = data.replace(b"9 8", b"%d %d" % (width, height), 1)
    return bytes(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM"])
def test_a_header_that_asks_for_too_much_is_refused_before_decoding(tmp_path, form, monkeypatch):
    path = tmp_path / "bomb"
    path.write_bytes(a_header_of(form, 12000, 13000))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"bomb: 13000 x 12000 pixels, at most 64,000,000 are read"):
        read_image(path)
    with pytest.raises(ImageError, match="bomb"):
        image_size(path)


def test_the_limit_can_be_set(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    with pytest.raises(ImageError, match="37 x 24 pixels, at most 100 are read"):
        read_image(tmp_path / "a.png")
    assert limit_from({"LOFTR_CURRICULUM_MOST_PIXELS": "5000"}, 7) == 5000
    for text in ("", "0", "-3", "many"):
        assert limit_from({"LOFTR_CURRICULUM_MOST_PIXELS": text}, 7) == 7


def test_a_file_of_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 1000)
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(64_100_000)
    with pytest.raises(ImageError, match="huge.png: 64,100,000 bytes, at most 64,008,000 are read"):
        read_image(tmp_path / "huge.png")


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(tmp_path, form):
    frames = [Image.fromarray(picture((24, 37, 3), seed)) for seed in range(2)]
    frames[0].save(tmp_path / "a", form, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="expected one image, found an animation"):
        read_image(tmp_path / "a")


@pytest.mark.parametrize("form", ["BMP", "WEBP", "GIF", "JPEG2000", "PPM"])
def test_half_a_file_of_the_rarer_formats_is_an_error_or_an_image(tmp_path, form):
    Image.fromarray(picture((200, 300, 3))).save(tmp_path / "a", form)
    data = (tmp_path / "a").read_bytes()
    for keep in (0.01, 0.1, 0.5, 0.9):
        (tmp_path / "half").write_bytes(data[: int(len(data) * keep)])
        try:
            assert read_image(tmp_path / "half").shape[:2] == (200, 300)
        except ImageError as error:
            assert str(error).startswith(str(tmp_path / "half"))


def test_files_of_other_formats_are_not_given_to_any_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    (tmp_path / "a.hdr").write_bytes(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 60000 +X 60000\n" + bytes(99))
    with pytest.raises(ImageError, match="a.hdr: cannot be decoded, expected a whole image: PNG, JPEG, TIFF"):
        read_image(tmp_path / "a.hdr")


def test_names_that_no_file_can_have():
    with pytest.raises(FileError, match="no file has such a name"):
        read_image("a\0b.png")


def test_an_input_chosen_by_page_is_still_an_input(tmp_path):
    (tmp_path / "warped.tif").write_bytes(tiff_of([picture(), picture()]))
    with pytest.raises(FileError, match="is an input and would be overwritten"):
        refuse_to_overwrite([tmp_path / "warped.tif"], [f"{tmp_path / 'warped.tif'}[1]"])


def rgb(seed=0):
    return np.random.default_rng(seed).integers(30, 255, (90, 120, 3), dtype=np.uint8)


def with_alpha():
    alpha = np.full((90, 120), 255, np.uint8)
    alpha[:, :20] = 0
    return np.dstack([rgb(), alpha])


@pytest.mark.parametrize("form", ["float32", "float64", "pil", "chw", "chw float", "bfloat16"])
def test_an_image_in_another_form_is_seen_the_same(form):
    tensor = torch.from_numpy(rgb()).permute(2, 0, 1)
    other = {
        "float32": rgb().astype(np.float32) / 255,
        "float64": rgb() / 255,
        "pil": Image.fromarray(rgb()),
        "chw": tensor,
        "chw float": (tensor.float() / 255).requires_grad_(),
        "bfloat16": (tensor / 255).bfloat16(),
    }[form]
    config = RegistrationConfig(long_side=128, first_long_side=128)
    plain, changed = open_pair(rgb(), rgb(), config), open_pair(rgb(), other, config)
    assert np.abs(changed.moving.gray - plain.moving.gray).max() < 3e-3
    assert np.array_equal(changed.moving.fov, plain.moving.fov)
    assert changed.moving_size == (90, 120)


@pytest.mark.parametrize("form", ["array", "floats", "pil", "tensor", "file"])
def test_alpha_bounds_the_field_of_view_in_every_form(tmp_path, form):
    image = with_alpha()
    Image.fromarray(image).save(tmp_path / "a.png")
    given = {
        "array": image,
        "floats": image / 255,
        "pil": Image.fromarray(image),
        "tensor": torch.from_numpy(image).permute(2, 0, 1),
        "file": tmp_path / "a.png",
    }[form]
    pair = open_pair(rgb(), given, RegistrationConfig(long_side=120, first_long_side=120))
    assert not pair.moving.fov[:, :19].any() and pair.moving.fov[:, 22:].mean() > 0.95
    assert not pair.moving.gray[:, :20].any() and pair.moving_image.shape == (90, 120, 3)


@pytest.mark.parametrize("image, expected", [
    (rgb().astype(np.float32), r"expected floats in \[0, 1\], got values from 30"),
    (rgb() / 127.5 - 1, r"expected floats in \[0, 1\], got values from -0.7"),
    (np.full((9, 9), np.nan), r"expected floats in \[0, 1\], got values from nan"),
    (rgb().astype(np.int64), "expected uint8, uint16 or floats"),
    (rgb() > 3, "expected uint8, uint16 or floats"),
    (rgb()[None], r"expected shape .* got \(1, 90, 120, 3\)"),
    (rgb().transpose(2, 0, 1), "channels come last"),
    (np.zeros((0, 5), np.uint8), "expected shape"),
    (torch.zeros(2, 3, 8, 8), r"expected a tensor of shape \(C, H, W\)"),
    (torch.zeros(8, 8, dtype=torch.int64), "expected uint8, uint16 or floats"),
    (Image.fromarray(np.full((5, 5), 70000, np.int32)), "expected at most 16 bits"),
    ([[1, 2]], "expected a file path, a NumPy array, a PIL image or a torch tensor, got list"),
    (None, "got NoneType"),
])  # fmt: skip
def test_what_is_no_image_is_an_error_that_names_its_side(image, expected):
    with pytest.raises(ImageError, match="moving image: .*" + expected):
        register(rgb(), image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_modes_of_pil(mode):
    if mode in ("I;16", "F"):
        plain = Image.fromarray(
            rgb()[..., 1].astype(np.uint16) * 257 if mode == "I;16" else np.float32(rgb()[..., 1] / 255)
        )
        expected = rgb()[..., 1] / 255
    else:
        plain = Image.fromarray(rgb()).convert(mode)
        expected = np.asarray(plain.convert("L" if mode in ("1", "L") else "RGB")) / 255
    seen = to_gray(as_picture(plain, "fixed").pixels)
    assert np.abs(seen - to_gray(expected)).max() < 1e-2


def test_the_answer_says_in_which_frame_its_pixels_are(tmp_path):
    tag = Image.Exif()
    tag[274] = 6
    Image.new("L", (60, 40)).save(tmp_path / "black.jpg", exif=tag)
    (tmp_path / "scan.tif").write_bytes(tiff_of([rgb(0)[..., 0], rgb(1)[..., 0]]))
    chosen = f"{tmp_path / 'scan.tif'}[1]"
    answer = register(tmp_path / "black.jpg", chosen)
    assert answer.fixed_size == (60, 40) and answer.moving_size == (90, 120)
    write_registration(answer, tmp_path / "black.jpg", chosen, tmp_path / "out")
    said = read_json(tmp_path / "out" / "transform.json")
    assert "orientation tags" in said["pixel_frame"]
    assert said["images"]["fixed"] == {"format": "JPEG", "orientation": 6}
    assert said["images"]["moving"] == {"format": "TIFF", "orientation": 1, "page": 1}
    assert load_transform(tmp_path / "out" / "transform.json").facts == said["images"]


def test_an_answer_for_floats_is_drawn_and_stored(tmp_path):
    shift = np.array([[1, 0, 4], [0, 1, 2], [0, 0, 1.0]])
    sizes, floats = ((90, 120), (90, 120)), np.float32(rgb() / 255)
    answer = Registration(shift, Verdict.OK, (), NO_MATCHES, *sizes, Evidence(), floats)
    assert answer.warped.dtype == np.float32 and "<img" in answer._repr_html_()
    write_registration(answer, floats, floats, tmp_path)
    stored = read_image(tmp_path / "warped.png")
    assert stored.dtype == np.uint16 and np.abs(stored / 65535 - answer.warped).max() < 1e-4


def test_the_command_line_chooses_a_frame(tmp_path, capsys):
    black = np.zeros((40, 60), np.uint8)
    Image.fromarray(black).save(tmp_path / "f.png")
    (tmp_path / "m.tif").write_bytes(tiff_of([black, rgb()[..., 0]]))
    words = ["register", str(tmp_path / "f.png"), str(tmp_path / "m.tif"), "--out", str(tmp_path / "out")]
    assert main(words) == 2 and "2 pages; write" in capsys.readouterr().err
    assert main([*words, "--frame", "1"]) == 4  # one image is black
    said = read_json(tmp_path / "out" / "transform.json")
    assert said["images"]["moving"]["page"] == 1 and said["moving_size"] == [90, 120]
    assert main([*words, "--frame", "2"]) == 2 and "has no page 2" in capsys.readouterr().err
    assert main([*words, "--frame", "-1"]) == 2 and "counted from 0" in capsys.readouterr().err
    words[2] = words[1]
    assert main([*words, "--frame", "1"]) == 2 and "hold no frames" in capsys.readouterr().err


@pytest.mark.parametrize("at", [2**63 - 1, 2**64 - 1])
def test_an_offset_beyond_all_memory_is_refused(tmp_path, at):
    data = bytearray(tiff_of([picture(), picture(seed=1)], big=True))
    struct.pack_into("<Q", data, len(data) - 8, at)
    (tmp_path / "far.tif").write_bytes(data)
    with pytest.raises(ImageError, match="far.tif: expected a whole TIFF, it is damaged or cut short"):
        read_image(tmp_path / "far.tif[0]")


def test_a_jpeg_of_thousands_of_scans_is_not_decoded(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(picture((64, 64))).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    (tmp_path / "a.jpg").write_bytes(data[:-2] + 1000 * scan + data[-2:])
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"a.jpg: a JPEG of 10\d\d scans, at most 64 are decoded"):
        read_image(tmp_path / "a.jpg")


def test_a_table_names_pages(tmp_path):
    black = np.zeros((40, 60), np.uint8)
    (tmp_path / "scan.tif").write_bytes(tiff_of([rgb()[..., 0], black]))
    rows = "a,scan.tif[0],scan.tif[1]\nb,scan.tif[0],scan.tif\n"
    (tmp_path / "pairs.csv").write_text("id,fixed,moving\n" + rows)
    register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=object(), progress=False)
    answers = read_results(tmp_path / "out" / "results.csv")
    assert "black" in answers["a"]["reasons"] and not answers["a"]["error"]
    assert "2 pages; write" in answers["b"]["error"]
