"""Guards of DICOM: colours, depths, frames, compressions, and files that are broken on purpose."""

import importlib.util
import io
import time
import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from loftr_curriculum.io.files import read_json  # noqa: E402
from loftr_curriculum.io.images import ImageError, image_size, read_image, read_picture  # noqa: E402
from loftr_curriculum.registration.pair import register  # noqa: E402
from loftr_curriculum.report.registration import write_registration  # noqa: E402

EN_FACE, PHOTOGRAPH = "1.2.840.10008.5.1.4.1.1.77.1.5.7", "1.2.840.10008.5.1.4.1.1.77.1.5.1"


def grey(dtype=np.uint8, top=None, shape=(24, 37), seed=0):
    top = np.iinfo(dtype).max if top is None else top
    return np.random.default_rng(seed).integers(0, top, shape, dtype=dtype, endpoint=True)


def smooth(seed=0):
    return cv2.resize(grey(shape=(4, 5, 3), seed=seed), (48, 32), interpolation=cv2.INTER_CUBIC)


def dataset(values, colours, syntax=ExplicitVRLittleEndian, **more):
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = syntax
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = more.pop("SOPClassUID", PHOTOGRAPH)
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = "1.2.3.4"
    d.PatientName, d.Modality = "Doe^Jane", "OP"
    d.Rows, d.Columns = values.shape[:2]
    d.SamplesPerPixel = 3 if values.ndim == 3 else 1
    d.PhotometricInterpretation, d.PixelRepresentation = colours, 0
    d.BitsAllocated = d.BitsStored = 8 * values.dtype.itemsize
    if values.ndim == 3:
        d.PlanarConfiguration = 0
    big = syntax == ExplicitVRBigEndian
    d.PixelData = values.astype(values.dtype.newbyteorder(">" if big else "<")).tobytes()
    for name, value in more.items():
        setattr(d, name, value)
    d.HighBit = d.BitsStored - 1
    if len(d.PixelData) % 2:
        d.PixelData += b"\0"
    d["PixelData"].VR = "OB" if d.BitsAllocated == 8 or syntax.is_compressed else "OW"
    return d


def saved(path, *words, **more):
    dataset(*words, **more).save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_of_every_byte_order(tmp_path, syntax, dtype):
    path = saved(tmp_path / "a", grey(dtype), "MONOCHROME2", syntax, SOPClassUID=EN_FACE)
    assert np.array_equal(read_image(path), grey(dtype)) and read_image(path).dtype == dtype
    assert image_size(path) == (24, 37)


@pytest.mark.parametrize("stored", [8, 10, 12, 16])
def test_monochrome1_is_inverted_within_its_bits(tmp_path, stored):
    values = grey(np.uint16, 2**stored - 1)
    path = saved(tmp_path / "a", values, "MONOCHROME1", BitsStored=stored)
    assert np.array_equal(read_image(path), 2**stored - 1 - values)


def test_signed_values_start_at_their_lowest(tmp_path):
    values = grey(np.uint16, 4095).astype(np.int16) - 2048
    path = saved(tmp_path / "a", values, "MONOCHROME2", BitsStored=12, PixelRepresentation=1)
    assert np.array_equal(read_image(path), (values + 2048).astype(np.uint16))


@pytest.mark.parametrize("planar", [0, 1])
def test_colour(tmp_path, planar):
    image = grey(shape=(24, 37, 3))
    stored = image if planar == 0 else np.ascontiguousarray(image.transpose(2, 0, 1))
    path = saved(tmp_path / "a", image, "RGB", PlanarConfiguration=planar, PixelData=stored.tobytes())
    assert np.array_equal(read_image(path), image)


@pytest.mark.parametrize("colours", ["YBR_FULL", "YBR_FULL_422"])
def test_luminance_and_chrominance_become_rgb(tmp_path, colours):
    image = smooth()
    y, cr, cb = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
    values = np.dstack([y, cb, cr])
    data = values.tobytes()
    if colours == "YBR_FULL_422":  # two pixels share their chrominance
        data = np.stack([y[:, ::2], y[:, 1::2], cb[:, ::2], cr[:, ::2]], -1).tobytes()
    path = saved(tmp_path / "a", values, colours, PixelData=data)
    assert np.abs(read_image(path).astype(int) - image).mean() < 4


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_looked_up(tmp_path, bits):
    indices = grey(top=15)
    table = np.random.default_rng(1).integers(0, 2**bits, (16, 3), dtype=np.uint16)
    d = dataset(indices, "PALETTE COLOR")
    for name, column in zip(("Red", "Green", "Blue"), table.T):
        setattr(d, f"{name}PaletteColorLookupTableDescriptor", [16, 0, bits])
        entries = column.astype(np.uint8 if bits == 8 else "<u2").tobytes()
        setattr(d, f"{name}PaletteColorLookupTableData", entries)
    d.save_as(tmp_path / "a", enforce_file_format=True)
    assert np.array_equal(read_image(tmp_path / "a"), table[indices])


def jpeg(image):
    return cv2.imencode(".jpg", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def jpeg2000(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG2000", no_jp2=True)
    return file.getvalue()


@pytest.mark.parametrize("form", ["jpeg", "jpeg grey", "jpeg 2000", "rle"])
def test_compressed_frames(tmp_path, form):
    image = smooth() if form != "jpeg grey" else smooth()[..., 1]
    colours = {"jpeg": "YBR_FULL_422", "jpeg grey": "MONOCHROME2"}.get(form, "RGB")
    if form == "rle":
        d = dataset(image, colours)
        d.compress(RLELossless)
    else:
        syntax = JPEG2000Lossless if form == "jpeg 2000" else JPEGBaseline8Bit
        coded = jpeg2000(image) if form == "jpeg 2000" else jpeg(image)
        d = dataset(image, colours, syntax, PixelData=encapsulate([coded]))
    d.save_as(tmp_path / "a", enforce_file_format=True)
    off = np.abs(read_image(tmp_path / "a").astype(int) - image).mean()
    assert off < (6 if form.startswith("jpeg") and form != "jpeg 2000" else 1e-9)


@pytest.mark.parametrize("form", ["plain", "rle", "jpeg"])
def test_one_frame_of_many_is_chosen(tmp_path, form):
    frames = np.stack([smooth(seed)[..., 1] for seed in range(3)])
    d = dataset(frames[0], "MONOCHROME2", NumberOfFrames=3, PixelData=frames.tobytes())
    if form == "rle":
        d.compress(RLELossless)
    if form == "jpeg":
        coded = encapsulate([jpeg(frame) for frame in frames])
        d = dataset(frames[0], "MONOCHROME2", JPEGBaseline8Bit, NumberOfFrames=3, PixelData=coded)
    d.save_as(tmp_path / "scan.dcm", enforce_file_format=True)
    for number, frame in enumerate(frames):
        chosen = read_picture(f"{tmp_path / 'scan.dcm'}[{number}]")
        assert np.abs(chosen.pixels.astype(int) - frame).mean() < (6 if form == "jpeg" else 1e-9)
        assert chosen.facts["frame"] == number
    with pytest.raises(ImageError, match=r"3 frames; write .*scan.dcm\[0\] for the first to .*scan.dcm\[2\]"):
        read_image(tmp_path / "scan.dcm")
    with pytest.raises(ImageError, match="has no frame 3, its frames are 0 to 2"):
        image_size(f"{tmp_path / 'scan.dcm'}[3]")


def test_spacing_and_laterality_travel_into_the_answer_and_names_do_not(tmp_path):
    black = np.zeros((40, 60), np.uint8)
    fixed = saved(tmp_path / "f.dcm", black, "MONOCHROME2", PixelSpacing=[0.01, 0.02], ImageLaterality="L")
    measures, anatomy, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, anatomy.FrameLaterality = [0.005, 0.005], "R"
    shared.PixelMeasuresSequence, shared.FrameAnatomySequence = [measures], [anatomy]
    moving = saved(tmp_path / "m.dcm", black, "MONOCHROME2", SharedFunctionalGroupsSequence=[shared])
    answer = register(fixed, moving)
    write_registration(answer, fixed, moving, tmp_path / "out")
    said = read_json(tmp_path / "out" / "transform.json")["images"]
    assert said["fixed"]["spacing_mm"] == [0.01, 0.02] and said["fixed"]["laterality"] == "L"
    assert said["moving"]["spacing_mm"] == [0.005, 0.005] and said["moving"]["laterality"] == "R"
    assert answer.reasons[-1].endswith("shows a left eye and the moving image a right eye")
    assert "Jane" not in (tmp_path / "out" / "transform.json").read_text()


def test_without_pydicom_one_line_names_the_extra(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.dcm", grey(), "MONOCHROME2")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydicom" else find(name))
    with pytest.raises(ImageError, match=r"a.dcm: .*pip install '\.\[dicom\]' in the folder") as error:
        read_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more, expected", [
    ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels, at most"),
    ({"Rows": 7000, "Columns": 7000}, "the file is shorter"),
    ({"Rows": 0}, "expected Rows and Columns"),
    ({"NumberOfFrames": 2_000_000_000}, "expected 1 to 100000 frames"),
    ({"NumberOfFrames": -1}, "expected 1 to 100000 frames"),
    ({"NumberOfFrames": 1000}, "1000 frames; write"),
    ({"BitsAllocated": 32, "BitsStored": 32}, "expected 8 to 16 bits a value, found 32"),
    ({"BitsStored": 12}, "expected 8 to 16 bits a value"),
    ({"PhotometricInterpretation": "HSV"}, "expected one of MONOCHROME1"),
    ({"PhotometricInterpretation": "RGB"}, "1 values a pixel do not go with RGB"),
    ({"PhotometricInterpretation": "PALETTE COLOR"}, "expected a whole DICOM image"),
    ({"PixelData": b"\0" * 4}, "the file is shorter"),
])  # fmt: skip
def test_headers_that_lie(tmp_path, more, expected):
    path = saved(tmp_path / "lie.dcm", grey(), "MONOCHROME2", **more)
    tracemalloc.start()
    with pytest.raises(ImageError, match="lie.dcm: .*" + expected):
        read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("coded", [jpeg, jpeg2000])
def test_a_frame_larger_than_its_header_is_not_decoded(tmp_path, coded):
    syntax = JPEGBaseline8Bit if coded is jpeg else JPEG2000Lossless
    pixels = encapsulate([coded(np.zeros((3000, 4000), np.uint8))])
    path = saved(tmp_path / "lie.dcm", grey(), "MONOCHROME2", syntax, PixelData=pixels)
    with pytest.raises(ImageError, match="the frame states 4000 x 3000, the header 37 x 24"):
        read_image(path)


def test_what_is_not_decoded_says_what_is_missing(tmp_path):
    pixels = encapsulate([jpeg(smooth()[..., 1])])
    path = saved(tmp_path / "a", smooth()[..., 1], "MONOCHROME2", JPEGLosslessSV1, PixelData=pixels)
    if not pydicom.pixels.get_decoder(JPEGLosslessSV1).is_available:
        with pytest.raises(ImageError, match="compressed as JPEG Lossless.*needs one of these packages"):
            read_image(path)
    path = saved(tmp_path / "b", grey(), "MONOCHROME2", DeflatedExplicitVRLittleEndian)
    with pytest.raises(ImageError, match="its header is compressed"):
        read_image(path)


def test_a_header_without_end_does_not_keep_us_busy(tmp_path):
    path = saved(tmp_path / "a.dcm", grey(), "MONOCHROME2")
    data = path.read_bytes()
    at = data.index(b"\xe0\x7f\x10\x00")
    element = b"\x09\x00\x10\x10UN\0\0\0\0\0\0"
    path.write_bytes(data[:at] + element * 2_000_000 + data[at:])
    start = time.perf_counter()
    with pytest.raises(ImageError, match="a.dcm"):
        read_image(path)
    assert time.perf_counter() - start < 15


def test_nested_sequences_are_an_error_of_one_line(tmp_path):
    path = saved(tmp_path / "a.dcm", grey(), "MONOCHROME2")
    data = path.read_bytes()
    at = data.index(b"\xe0\x7f\x10\x00")
    nest = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    path.write_bytes(data[:at] + nest * 20_000 + data[at:])
    with pytest.raises(ImageError, match="a.dcm: expected a whole DICOM image") as error:
        read_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["plain", "jpeg", "rle"])
def test_damaged_files_are_an_image_or_an_error_that_names_them(tmp_path, form):
    image = smooth()
    d = dataset(image, "RGB")
    if form == "rle":
        d.compress(RLELossless)
    if form == "jpeg":
        d = dataset(image, "YBR_FULL_422", JPEGBaseline8Bit, PixelData=encapsulate([jpeg(image)]))
    whole = io.BytesIO()
    d.save_as(whole, enforce_file_format=True)
    whole, rng = whole.getvalue(), np.random.default_rng(0)
    path = tmp_path / "damaged.dcm"
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: rng.integers(132, len(data))]
        else:
            for at in rng.integers(132, min(len(data), 900), rng.integers(1, 8)):
                data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert read_image(path).size
        except ImageError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_damage_in_what_the_answer_keeps_is_one_line_and_no_remark(tmp_path, capfd):
    measures, laterality = Dataset(), Dataset()
    measures.PixelSpacing, laterality.FrameLaterality = [0.01, 0.01], "R"
    group = Dataset()
    group.PixelMeasuresSequence, group.FrameAnatomySequence = [measures], [laterality]
    more = {"SharedFunctionalGroupsSequence": [group], "PerFrameFunctionalGroupsSequence": [group]}
    path = saved(tmp_path / "a.dcm", grey(), "MONOCHROME2", **more)
    assert read_picture(path).facts["spacing_mm"] == [0.01, 0.01]
    data = path.read_bytes()
    spacing, laterality = b"\x28\x00\x30\x00", b"\x20\x00\x72\x90"
    for tag, kind, wrong in ((spacing, b"DS", b"DW"), (laterality, b"CS", b"LS")):
        assert tag + kind in data
        path.write_bytes(data.replace(tag + kind, tag + wrong))
        with pytest.raises(ImageError, match="a.dcm: expected a whole DICOM image") as error:
            read_picture(path)
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
