"""Guards of the data: fields of view, faults in folders and tables, masks that follow the map, resume."""

import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import cv2
import lightning as L
import numpy as np
import pytest
import torch

from loftr_curriculum.data import pairs, recipe
from loftr_curriculum.data.config import DataConfig, patient_of
from loftr_curriculum.data.landmarks import LANDMARK_COLUMNS, PairTableSource, read_landmark_set, read_pairs
from loftr_curriculum.data.masks import vesselness
from loftr_curriculum.data.module import EpochSampler, PairDataModule, split_sources
from loftr_curriculum.data.pairs import GeneratedSource, cut, cut_views, half_size, make_planes
from loftr_curriculum.data.preprocess import estimate_fov, normalise, prepare, to_gray
from loftr_curriculum.data.recipe import (
    STEEPEST,
    ViewSettings,
    draw_pair,
    draw_residual,
    map_grid,
    to_fixed,
    to_moving,
    true_maps,
)
from loftr_curriculum.data.triplets import TripletSource, choose, find_items, parse_name
from loftr_curriculum.geometry import (
    Motion,
    apply_transform,
    centre,
    fit_affine,
    invert,
    resize_image,
    similarity,
    warp_image,
)
from loftr_curriculum.io.files import FileError, write_json
from loftr_curriculum.io.images import write_image
from loftr_curriculum.retina.config import Amounts, EyeConfig
from loftr_curriculum.retina.sphere import Sphere
from loftr_curriculum.retina.world import WorldBank, make_world

SIZE = (128, 128)


@pytest.fixture(scope="module")
def world():
    return make_world(3, EyeConfig(size=512))


@pytest.fixture
def cases(tmp_path, world):
    "Two patients, three cases; 700_L has no mask."
    for case in ("600_N", "600_A", "700_L"):
        for kind in ("cf", "fa", "oct"):
            write_image(tmp_path / case / f"{case}_{kind}.png", world.images[kind])
        if case != "700_L":
            write_image(tmp_path / case / f"{case}_seg.png", world.vessels)
    return tmp_path


@pytest.fixture
def table(tmp_path, world):
    "A table with one pair, its geometry as a matrix."
    T = similarity(25, 0.8, (-20, 10), centre((512, 512)))
    write_image(tmp_path / "cf.png", world.images["cf"])
    write_image(tmp_path / "fa.png", warp_image(world.images["fa"], T, (460, 480)))
    write_image(tmp_path / "seg.png", world.vessels)
    write_json(tmp_path / "m.json", {"moving_to_fixed": invert(T)})
    (tmp_path / "pairs.csv").write_text(
        "id,fixed,moving,matrix,fixed_mask,mode\n1,cf.png,fa.png,m.json,seg.png,cf-fa\n"
    )
    return tmp_path / "pairs.csv"


# ---- preparation


def eye(size=(300, 400), radius=150, level=0.4, border=0.0, seed=0):
    "A textured disc in a dark frame, and where it is."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] - (np.array(size)[:, None, None] - 1) / 2
    r = np.hypot(x, y)
    texture = cv2.GaussianBlur(rng.standard_normal(size, dtype=np.float32), (0, 0), 3)
    gray = np.where(
        r < radius, level * (1.1 - 0.4 * (r / radius) ** 2 + texture), border
    ) + 0.004 * rng.standard_normal(size)
    return np.clip(gray, 0, 1).astype(np.float32), r < radius


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"radius": 190},
        {"radius": 80},
        {"level": 0.08, "border": 0.01},
        {"level": 0.5, "border": 0.08},
        {"size": (1000, 1400), "radius": 600},
        {"size": (120, 100), "radius": 45},
    ],
)
def test_field_of_view_of_discs(options):
    gray, true = eye(**options)
    assert iou(estimate_fov(gray), true) > 0.94


def test_time_stamps_in_the_corner_are_no_field():
    gray, true = eye(level=0.15)
    image = (255 * gray).astype(np.uint8)
    for at in ((2, 16), (330, 16), (2, 295)):
        cv2.putText(image, "00:31.4", at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 255, 2)
    assert iou(estimate_fov(to_gray(image)), true) > 0.94


def test_an_angiogram_with_one_glaring_spot_keeps_its_dim_field():
    gray, true = eye(level=0.07)
    cv2.circle(gray, (200, 100), 25, 1.0, -1)
    assert iou(estimate_fov(gray), true) > 0.94


def test_depth_does_not_change_the_preparation():
    gray, _ = eye()
    reference = prepare((gray * 255).round().astype(np.uint8), 200)
    for white, dtype in ((4095, np.uint16), (65535, np.uint16)):
        other = prepare((gray * white).round().astype(dtype), 200)
        assert iou(other.fov, reference.fov) > 0.99
        both = other.fov & reference.fov
        assert np.abs(other.image - reference.image)[both].mean() < 0.02


def test_full_frames_have_a_full_field(world):
    for kind in ("cf", "fa", "oct", "octa"):
        assert estimate_fov(to_gray(world.images[kind])).mean() > 0.95, (
            kind
        )  # flow is lost in one corner of this eye's octa


def test_a_turned_square_is_its_own_field():
    gray = np.clip(0.4 + 0.15 * np.random.default_rng(0).standard_normal((200, 200)), 0.05, 1).astype(
        np.float32
    )
    T = similarity(30, 0.7, (0, 0), centre((200, 200)))
    true = warp_image(np.ones((200, 200), bool), T, (200, 200), mode="nearest")
    assert iou(estimate_fov(warp_image(gray, T, (200, 200))), true) > 0.94


def test_preparing_a_smaller_copy_gives_the_same():
    gray, _ = eye(size=(600, 800), radius=290)
    image = (gray * 255).astype(np.uint8)
    a, b = prepare(image, 200), prepare(resize_image(image, (300, 400)), 200)
    assert np.abs(a.image - b.image).mean() < 0.02 and iou(a.fov, b.fov) > 0.98


def test_normalise_is_finite_and_bounded_everywhere():
    rng = np.random.default_rng(0)
    for gray in (
        np.zeros((40, 50)),
        np.full((40, 50), 0.7),
        rng.random((40, 50)),
        np.eye(40, 50),
        1e-4 * rng.random((40, 50)),
    ):
        for fov in (None, np.zeros((40, 50), bool), rng.random((40, 50)) < 0.02, np.ones((40, 50), bool)):
            out = normalise(gray.astype(np.float32), fov)
            assert out.dtype == np.float32 and np.isfinite(out).all() and np.abs(out).max() <= 1
            assert fov is None or not out[~fov].any()


def test_vesselness_stays_in_the_field_and_finds_vessels(world):
    gray = to_gray(world.images["cf"])
    y, x = np.mgrid[:512, :512] - 255.5
    fov = np.hypot(x, y) < 240
    mask = vesselness(gray * fov, fov)
    assert not mask[~fov].any() and mask.min() >= 0 and mask.max() <= 1
    assert mask[fov & (world.vessels > 200)].mean() > 4 * mask[fov & (world.vessels < 50)].mean()


# ---- folders of triplets


@pytest.mark.parametrize("case", ["600_N", "7", "a_cf", "fa_fa_1"])
def test_names_with_underscores_and_modalities_in_the_case(case):
    for kind, note in (("cf", "512"), ("octa", ""), ("oct", "x_y"), ("seg", "clip"), ("vessel_mask", "")):
        found = parse_name(f"{case}_{kind}{'_' * bool(note)}{note}.png", case)
        assert (found.kind, found.note) == (kind, note)
    assert parse_name(f"{case}_octave.png", case) is None and parse_name(f"{case}.png", case) is None


@pytest.mark.parametrize(
    "names, chosen",
    [
        (("cf", "cf_512"), "cf_512"),
        (("cf", "cf_64", "cf_512"), "cf_512"),
        (("cf", "cf_b", "cf_a"), "cf_a"),
        (("cf_clip", "cf"), "cf"),
        (("cf",), "cf"),
    ],
)
def test_precedence(names, chosen):
    for order in (names, names[::-1]):
        files = [parse_name(f"1_N_{n}.png", "1_N") for n in (*order, "fa")]
        assert choose(files, "cf-fa")["fixed"].path.stem == f"1_N_{chosen}"


def test_a_clipped_image_never_pairs_with_an_unclipped_one():
    files = [parse_name(f"1_{n}.png", "1") for n in ("cf_clip", "fa", "oct", "octa", "seg")]
    assert choose(files, "cf-fa")["fixed"] is None and choose(files, "cf-oct")["fixed"] is None
    clipped = choose(files, "cf-octa")
    assert (
        clipped["fixed"].path.stem == "1_cf_clip" and clipped["mask"] is None
    )  # `seg` is of the other geometry


def test_missing_masks_are_counted(cases, caplog):
    with caplog.at_level(logging.WARNING):
        source = TripletSource(cases)
    assert "1 of 3 cases have no vessel mask" in caplog.text and source.estimated == 1
    caplog.clear()
    source.subset({"600_N"})
    assert not caplog.text
    assert source.frames[len(source) - 1].mask.any()


def test_only_files_of_chosen_modes_are_needed(cases):
    (cases / "600_N" / "600_N_oct.png").unlink()
    (cases / "600_A" / "600_A_oct.png").write_text("broken")
    assert len(TripletSource(cases, ("cf-fa",))) == 3
    with pytest.raises(FileError) as e:
        TripletSource(cases, ("cf-oct",))
    assert "2 faults" in str(e.value) and "600_N_oct.png" in str(e.value) and "600_A_oct.png" in str(e.value)


def test_one_error_lists_every_offender(cases, world):
    (cases / "600_N" / "600_N_cf.png").unlink()
    (cases / "600_A" / "600_A_fa.png").write_bytes((cases / "600_A" / "600_A_fa.png").read_bytes()[:5000])
    write_image(cases / "700_L" / "700_L_oct.png", world.images["oct"][:400])
    write_image(cases / "700_L" / "700_L_seg.png", world.vessels[:, :500])
    (cases / "empty").mkdir()
    with pytest.raises(FileError) as e:
        TripletSource(cases)
    for name in ("600_N_cf.png", "600_A_fa.png", "700_L_oct.png", "700_L_seg.png", "empty_cf.png"):
        assert name in str(e.value)
    assert "600_A_cf" not in str(e.value)
    assert str(e.value).splitlines()[-1].endswith("; no case is fine")
    for case in ("600_N", "empty"):
        shutil.rmtree(cases / case)
    (cases / "700_L" / "700_L_oct.png").unlink()
    with pytest.raises(FileError) as e:
        TripletSource(cases, ("cf-oct",))
    last = str(e.value).splitlines()[-1]
    assert "move its folder away, or leave out the modes" in last and last.endswith("1 other case is fine")


def test_folders_that_are_none(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileError, match="sub-folder per case"):
            TripletSource(folder)


def test_sizes_may_differ_where_the_shape_agrees(cases, world):
    write_image(cases / "600_N" / "600_N_fa.png", resize_image(world.images["fa"], (255, 256)))
    write_image(cases / "600_N" / "600_N_seg.png", resize_image(world.vessels, (300, 300)))
    write_image(
        cases / "600_N" / "600_N_cf.png",
        resize_image(world.images["cf"], (1400, 1400)).astype(np.uint16) * 16,
    )
    frame = TripletSource(cases, ("cf-fa",)).subset({"600_N"}).frames[0]
    assert frame.plane0.shape == frame.plane1.shape == frame.mask.shape == (1024, 1024)
    true = resize_image(world.vessels, (1024, 1024)) > 128
    assert frame.plane0[true].mean() < frame.plane0[~true].mean() - 5 and iou(frame.mask > 128, true) > 0.5
    thick = (
        cv2.erode(true.astype(np.uint8), np.ones((3, 3))) > 0
    )  # twigs are thinner than a pixel of the smaller mask
    assert thick.sum() > 5000 and (frame.mask > 128)[thick].mean() > 0.95


# ---- tables of pairs


def test_a_table_maps_in_the_direction_that_it_names(table):
    forward = read_pairs(table)[0].moving_to_fixed
    numbers = " ".join(map(str, invert(forward).ravel()))
    table.with_name("other.csv").write_text(f"moving,fixed,fixed_to_moving\nfa.png,cf.png,{numbers}\n")
    assert np.allclose(read_pairs(table.with_name("other.csv"))[0].moving_to_fixed, forward)


def test_the_moving_image_of_a_table_lies_on_the_fixed_one(table, world):
    frame = PairTableSource(table).frames[0]
    seen = cv2.erode(frame.fov1, np.ones((9, 9), np.uint8)) > 0
    assert 0.5 < seen.mean() < 1
    assert np.corrcoef(frame.plane1[seen], world.images["fa"][seen])[0, 1] > 0.9


def test_two_lines_with_the_same_images_keep_their_own_geometry(table):
    lines = table.read_text().splitlines()
    other = " ".join(map(str, similarity(0, 1.25, (0, 0)).ravel()))
    table.write_text("\n".join([*lines, f"1,cf.png,fa.png,{other},,"]))
    source = PairTableSource(table)
    assert not np.array_equal(source.frames[0].plane1, source.frames[1].plane1)


def test_a_table_lists_every_fault(table):
    (table.parent / "points.csv").write_text(",".join(LANDMARK_COLUMNS) + "\n1,2,3,4\n5,6,7,8\n")
    (table.parent / "swapped.csv").write_text(
        ",".join(LANDMARK_COLUMNS) + "\n0,0,0,0\n100,0,100,0\n0,100,0,100\n100,100,50,50\n"
    )
    (table.parent / "words.csv").write_text(",".join(LANDMARK_COLUMNS) + "\n1,2,3,four\n")
    (table.parent / "bad.png").write_text("bad")
    far = " ".join(map(str, similarity(0, 1, (5000, 0)).ravel()))
    mirror = "-1 0 511 0 1 0 0 0 1"
    lines = [
        "fixed,moving,matrix,landmarks",
        "cf.png,absent.png,m.json,",
        "bad.png,fa.png,m.json,",
        "cf.png,fa.png,,points.csv",
        "cf.png,fa.png,,swapped.csv",
        "cf.png,fa.png,,words.csv",
        f"cf.png,fa.png,{far},",
        f"cf.png,fa.png,{mirror},",
        "cf.png,fa.png,m.json,points.csv",
        "cf.png,,m.json,",
        "cf.png,fa.png,nothing.json,",
    ]
    table.write_text("\n".join(lines))
    with pytest.raises(FileError) as e:
        PairTableSource(table)
    text = str(e.value)
    assert "10 faults" in text
    parts = [
        "absent.png: no such file",
        "bad.png: cannot be decoded",
        "three points",
        "no affine fits",
        "words.csv, line 2",
        "covers 0%",
        "mirrors",
        "exactly one of",
        "line 10: expected a fixed and a moving",
        "nothing.json",
    ]
    for part in parts:
        assert part in text, part


def test_tables_without_the_columns(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileError, match="fixed, moving missing"):
        read_pairs(tmp_path / "t.csv")
    with pytest.raises(FileError, match="no such file"):
        read_pairs(tmp_path / "none.csv")


def test_a_landmark_set_lists_every_fault(tmp_path):
    with pytest.raises(FileError, match="no landmarks"):
        read_landmark_set(tmp_path)
    (tmp_path / "landmarks").mkdir()
    (tmp_path / "landmarks" / "1.csv").write_text("x,y\n1,2\n")
    write_image(tmp_path / "images" / "1_fixed.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(FileError) as e:
        read_landmark_set(tmp_path)
    assert "1_moving.png: no such file" in str(e.value) and "1.csv: expected the columns" in str(e.value)


# ---- masks follow the transform


def overlap_of_masks(sample):
    "Soft overlap (Dice) of mask 0, warped by `fixed_to_moving`, with mask 1, where both images see."
    warped = warp_image(sample.mask0, sample.fixed_to_moving, sample.mask1.shape)
    seen = warp_image(sample.fov0, sample.fixed_to_moving, sample.fov1.shape, mode="nearest") & sample.fov1
    a, b = warped[seen], sample.mask1[seen]
    return 2 * np.minimum(a, b).sum() / max(a.sum() + b.sum(), 1), b.sum()


@pytest.mark.parametrize("kind", ["generated", "triplets", "pairs"])
def test_mask0_warped_by_T_overlaps_mask1(kind, request):
    if kind == "generated":
        source = GeneratedSource(WorldBank([3], EyeConfig(size=512), progress=False))
    else:
        source = (
            TripletSource(request.getfixturevalue("cases"))
            if kind == "triplets"
            else PairTableSource(request.getfixturevalue("table"))
        )
    found = [
        overlap_of_masks(source.draw(k % len(source), np.random.default_rng(k), SIZE, Motion()))
        for k in range(24)
    ]
    scores = np.array([score for score, vessel in found if vessel > 50])
    assert len(scores) >= 16 and np.median(scores) > 0.8 and scores.min() > 0.5
    identity = [
        overlap_of_masks(
            replace(
                source.draw(k % len(source), np.random.default_rng(k), SIZE, Motion()),
                fixed_to_moving=np.eye(3),
            )
        )[0]
        for k in range(24)
    ]
    assert np.median(identity) < 0.4  # the measure would notice


def test_images_follow_the_transform_too(cases):
    "Vessels are dark in the colour image and bright in the angiogram at the points that T links."
    source = TripletSource(cases, ("cf-fa",), strength=0)
    values = []
    for k in range(8):
        s = source.draw(0, np.random.default_rng(k), SIZE, Motion(rotation_deg=90))
        ys, xs = np.nonzero(s.mask0 > 0.8)
        q = np.rint(apply_transform(s.fixed_to_moving, np.c_[xs, ys])).astype(int)
        inside = ((q >= 0) & (q < 128)).all(1)
        values.append((s.image0[ys, xs].mean(), s.image1[q[inside, 1], q[inside, 0]].mean()))
    cf, fa = np.nanmean(values, axis=0)
    assert cf < -0.1 and fa > 0.1


# ---- a smooth residual


def overlap_by_map(sample):
    "`overlap_of_masks` by the true map, between the outermost cell centres."
    inside = np.s_[4:-4, 4:-4]
    at = resize_image(sample.map_1to0, sample.mask1.shape)
    warped, seen = (
        cv2.remap(np.float32(a), at, None, cv2.INTER_LINEAR)[inside] for a in (sample.mask0, sample.fov0)
    )
    seen = (seen > 0.99) & sample.fov1[inside]
    a, b = warped[seen], sample.mask1[inside][seen]
    return 2 * np.minimum(a, b).sum() / max(a.sum() + b.sum(), 1), b.sum()


@pytest.mark.parametrize("kind", ["generated", "triplets"])
def test_vessels_follow_the_true_map_and_not_its_affine_part(kind, request):
    if kind == "generated":
        source = GeneratedSource(WorldBank([3], EyeConfig(size=512), progress=False), deform=6.0)
    else:
        source = TripletSource(request.getfixturevalue("cases"), deform=6.0).subset({"600_N", "600_A"})
    pairs = [source.draw(k % len(source), np.random.default_rng(k), (256, 256), Motion()) for k in range(20)]
    found = np.array(
        [(overlap_by_map(p)[0], overlap_of_masks(p)[0]) for p in pairs if overlap_by_map(p)[1] > 50]
    )
    assert len(found) >= 12 and np.median(found[:, 0]) > 0.8 and found[:, 0].min() > 0.5
    assert np.median(found[:, 1]) < np.median(found[:, 0]) - 0.15


@pytest.mark.parametrize("size", [(64, 64), (256, 320)])
def test_maps_do_not_fold_and_lead_there_and_back(size):
    for seed in range(30):
        u = draw_residual(np.random.default_rng(seed), size, 6.0)
        p = np.random.default_rng(seed).uniform(-200, 500, (2, 300, 2))
        difference = np.linalg.norm(u.at(p[0]) - u.at(p[1]), axis=1) / np.linalg.norm(p[0] - p[1], axis=1)
        assert difference.max() <= u.slope() <= STEEPEST + 1e-9
        T = similarity(10 * seed, 0.5 + 0.05 * seed, (20, -10), centre(size))
        assert np.abs(to_fixed(T, u, to_moving(T, u, p)) - p).max() < 0.05
        c = map_grid(size).points().reshape(-1, 2)
        assert np.allclose(fit_affine(c, to_fixed(T, u, c)), invert(T), atol=1e-6)


def test_the_largest_residual_is_nearly_always_reached():
    c = map_grid((512, 512)).points()
    rms = [
        np.sqrt((draw_residual(np.random.default_rng(s), (512, 512), 5.0).at(c) ** 2).sum(-1).mean())
        for s in range(400)
    ]
    assert np.allclose(np.quantile(rms, [0.25, 0.5, 0.75]), [1.25, 2.5, 3.75], atol=0.4) and max(rms) <= 5


@pytest.mark.parametrize("own", [False, True])
def test_a_bent_view_shows_nothing_from_beyond_the_frame_or_its_field(world, own):
    fov = np.pad(np.ones((460, 400), bool), ((26, 26), (56, 56))) if own else None
    plane = np.full((512, 512), 255, np.uint8)
    if own:
        plane *= cv2.dilate(
            fov.astype(np.uint8), np.ones((5, 5))
        )  # a warp blends the outermost pixels with the black beyond
    frame = make_planes(plane, plane, world.vessels, fov, fov)
    for k in range(12):
        s = cut_views(
            frame, np.random.default_rng(k), SIZE, Motion(), 0, optics=False, deform=6.0, field=(0.9, 1.0)
        )
        assert np.isfinite(s.map_0to1).all() and s.map_1to0.shape == (16, 16, 2)
        assert (
            not s.fov1.all() and s.image1[s.fov1].min() == s.image1[s.fov1].max()
        )  # no black in what counts as seen


def test_a_residual_changes_the_moving_view_alone(world):
    frame = make_planes(to_gray(world.images["cf"]), to_gray(world.images["fa"]), world.vessels)
    motion = Motion(shift=0.1, rotation_deg=20)
    for k in range(6):
        rngs = [np.random.default_rng(k) for _ in range(3)]
        default, flat, bent = (
            cut_views(frame, rng, SIZE, motion, **options)
            for rng, options in zip(rngs, ({}, {"deform": 0.0}, {"deform": 4.0}))
        )
        for name in ("image0", "image1", "mask0", "mask1", "fov0", "fov1", "fixed_to_moving"):
            assert np.array_equal(getattr(default, name), getattr(flat, name))
        for name in ("image0", "mask0", "fov0", "fixed_to_moving"):
            assert np.array_equal(getattr(bent, name), getattr(flat, name))
        assert flat.map_0to1 is None and not np.array_equal(bent.mask1, flat.mask1)
        assert (
            rngs[0].random() == rngs[1].random() == rngs[2].random()
        )  # the residual takes no numbers from the pair's own generator


# ---- batches

TINY = DataConfig(
    size=64,
    worlds=2,
    val_worlds=2,
    pairs_per_epoch=5,
    val_pairs=4,
    batch_size=2,
    cache=None,
    workers=0,
    render_workers=1,
    eye=EyeConfig(size=192),
)


class Recorder(L.LightningModule):
    "Learns nothing; remembers what it was shown."

    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.val = torch.nn.Parameter(torch.zeros(1)), [], []

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, batch.image0.double().sum().item()))
        return self.weight.sum()

    def validation_step(self, batch, _):
        self.val.append(batch.fixed_to_moving.double().sum().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, data, epochs, checkpoint=None):
    model = Recorder()
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(default_root_dir=folder, max_epochs=epochs, **options)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    whole = fit(tmp_path, PairDataModule(TINY), 4)
    fit(tmp_path, PairDataModule(TINY), 2)
    rest = fit(tmp_path, PairDataModule(TINY), 4, tmp_path / "2.ckpt")
    assert len(whole.seen) == 12 and rest.seen == whole.seen[6:]
    assert len(set(whole.seen)) == 12  # no batch twice
    assert whole.val[:2] == whole.val[2:4] == rest.val[:2]


def test_the_constructor_does_nothing(tmp_path):
    data = PairDataModule(replace(TINY, triplets=str(tmp_path / "absent")))
    with pytest.raises(FileError, match="absent"):
        data.setup()


def test_true_maps_reach_every_batch_of_mixed_sources(cases, table):
    config = replace(
        TINY,
        triplets=str(cases),
        pairs=str(table),
        share_generated=1.0,
        deform=4.0,
        batch_size=6,
        pairs_per_epoch=24,
        worlds=1,
        val_worlds=1,
        val_share=0.5,
    )
    data, spread = PairDataModule(config), PairDataModule(replace(config, workers=2))
    data.setup()
    spread.train_pairs = data.train_pairs
    batches = list(data.train_dataloader())
    for a, b in zip(batches, spread.train_dataloader()):
        assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("image1", "map_0to1", "map_1to0"))
    maps, T, modes = (
        sum((list(getattr(b, k)) for b in batches), []) for k in ("map_0to1", "fixed_to_moving", "id")
    )
    centres = map_grid((64, 64)).centres()
    off = np.array(
        [(m.reshape(-1, 2) - apply_transform(t, centres)).norm(dim=-1).max().item() for m, t in zip(maps, T)]
    )
    table_pairs = np.array([m == "1" for m in modes])
    assert table_pairs.any() and off[table_pairs].max() < 1e-3 and 0.05 < np.median(off[~table_pairs]) < 4
    assert {"map_0to1", "map_1to0"} <= data.val_pairs[0].keys()
    data.train_pairs.config = replace(config, deform=0.0)
    assert not {"map_0to1", "map_1to0"} & data.train_pairs[int(np.argmax(table_pairs))].keys()


def test_validation_pairs_do_not_depend_on_the_seed():
    a, b = (PairDataModule(replace(TINY, seed=s)) for s in (0, 1))
    for data in (a, b):
        data.setup()
    assert all(torch.equal(a.val_pairs[k]["image0"], b.val_pairs[k]["image0"]) for k in range(4))
    assert not torch.equal(a.train_pairs[0]["image0"], b.train_pairs[0]["image0"])


def test_no_patient_is_on_both_sides(cases):
    train, val = split_sources(replace(TINY, triplets=str(cases), val_share=0.5))
    sides = [{patient_of(c) for source, _ in side for c in source.cases} for side in (train, val)]
    assert sides[0] | sides[1] == {"600", "700"} and not sides[0] & sides[1]


def test_nothing_held_out_means_generated_validation(cases):
    train, val = split_sources(replace(TINY, triplets=str(cases), val_share=0.0))
    assert len(train) == 1 and len(train[0][0]) == 6
    assert isinstance(val[0][0], GeneratedSource) and val[0][0].bank.seeds[0] >= 1_000_000


@pytest.mark.parametrize(
    "generated, triplets, pairs",
    [(0.5, 1.0, 0.0), (1.0, 1.0, 1.0), (0.1, 0.3, 0.6), (3.0, 1.0, 0.0), (None, 1.0, 0.0), (2.0, 0.0, 0.0)],
)
def test_sources_are_mixed_in_the_proportion_asked_for(cases, table, monkeypatch, generated, triplets, pairs):
    (cases / "triplets").mkdir()
    for case in ("600_N", "600_A", "700_L"):
        (cases / case).rename(cases / "triplets" / case)
    for kind in (TripletSource, PairTableSource, GeneratedSource):
        monkeypatch.setattr(kind, "draw", lambda self, *a, **k: type(self))
    config = replace(
        TINY,
        triplets=str(cases / "triplets"),
        pairs=str(table),
        share_generated=generated,
        share_triplets=triplets,
        share_pairs=pairs,
    )
    data = PairDataModule(config)
    data.setup()
    n = 4000
    drawn = [data.train_pairs.sample(g) for g in range(n)]
    wanted = np.array([generated or 0, triplets, pairs]) / ((generated or 0) + triplets + pairs)
    for kind, share in zip((GeneratedSource, TripletSource, PairTableSource), wanted):
        assert abs(drawn.count(kind) - share * n) <= 4 * np.sqrt(n * share * (1 - share)), (
            kind
        )  # four standard deviations


def test_processes_share_an_epoch_without_overlap():
    for n in (8, 9):
        shares = [EpochSampler(n, rank, 3) for rank in range(3)]
        for s in shares:
            s.set_epoch(2)
        drawn = [g for s in shares for g in s]
        assert (
            len(drawn) == len(set(drawn)) == n // 3 * 3 == 3 * len(shares[0])
            and min(drawn) >= 2 * n
            and max(drawn) < 3 * n
        )


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"size": 100}, "multiple of 32"),
        ({"modes": ()}, "modes"),
        ({"modes": ("fa-cf",)}, "cf-fa"),
        ({"val_share": 1.0}, "val_share"),
        ({"share_generated": 0.0}, "no source"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"triplets": "x", "share_triplets": 0.0}, "no source"),
        ({"patient_pattern": "["}, "regular expression"),
        ({"deform": -1.0}, "deform"),
        ({"deform": 7.0}, "fold"),
        ({"padding": 1.5}, "padding"),
        ({"gaze_deg": 40.0}, "gaze_deg"),
    ],
)
def test_wrong_settings_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        DataConfig(**wrong)


def test_configuration_and_files_do_not_import_torch():
    rooms = ("data.config", "data.landmarks", "io.transforms")
    imports = ", ".join(f"loftr_curriculum.{room}" for room in rooms)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("old", "new"), [("draw_views", "draw_views"), ("Residual", "Residual"), ("CELL", "STRIDE")]
)
def test_names_of_before_say_where_they_are_now(old, new):
    with pytest.warns(DeprecationWarning, match=f"recipe.{new}"):
        assert getattr(pairs, old) is getattr(recipe, new)


@pytest.mark.parametrize(("old", "new"), [("Frame", "AlignedPlanes"), ("make_frame", "make_planes")])
def test_a_frame_of_the_data_is_now_aligned_planes(old, new):
    with pytest.warns(DeprecationWarning, match=f"pairs.{old} is now .*pairs.{new}"):
        assert getattr(pairs, old) is getattr(pairs, new)


def test_cell_points_of_before_are_those_of_the_grid():
    with pytest.warns(DeprecationWarning, match="Grid.points"):
        points = pairs.cell_points((64, 96))
    assert points.shape == (8, 12, 2) and points[2, 3].tolist() == [27.5, 19.5]


WIDE = EyeConfig(size=512, fields=(150, 200))


def test_a_turned_eye_shows_its_points_where_the_maps_say():
    """One plane as both modalities: the grey value at a point is that at its partner."""
    rng = np.random.default_rng(0)
    plane = cv2.GaussianBlur(rng.standard_normal((512, 512)).astype(np.float32), (0, 0), 6)
    plane = np.uint8(np.clip(128 + 60 * plane / plane.std(), 0, 255))
    half, sphere = half_size(plane), Sphere.of(WIDE.of_eye(3))
    settings = ViewSettings(0.0, optics=False, gaze_deg=25, sphere=sphere)
    motion = Motion(scale=1.3, shift=0.1, min_overlap=0.5)
    worst = []
    for seed in range(6):
        recipe = draw_pair(
            np.random.default_rng(seed), (512, 512), (192, 192), motion, "cf-fa", settings=settings
        )
        fixed, moving = (
            cut(plane, half, view.frame_to_view, view.size, view.unbent).astype(np.float32)
            for view in recipe.views
        )
        forth, back = true_maps(recipe)
        points = map_grid((192, 192)).points()
        for first, second, partners in ((fixed, moving, forth), (moving, fixed, back)):
            inside = (partners > 8).all(-1) & (partners < 183).all(-1)
            here = cv2.remap(first, points[inside].astype(np.float32)[:, None], None, cv2.INTER_LINEAR)
            there = cv2.remap(second, partners[inside][:, None], None, cv2.INTER_LINEAR)
            assert inside.sum() > 50
            seen = (here > 0) & (there > 0)
            worst.append(np.percentile(np.abs(here - there)[seen], 90))
        assert np.abs(forth - apply_transform(recipe.fixed_to_moving, points)).max() > 0.5, "nothing turned"
    assert max(worst) < 12, worst


def test_borders_exposures_and_turns_reach_the_batches():
    config = DataConfig(
        modes=("fa-late", "ir-fa"), worlds=2, val_worlds=1, eye=replace(WIDE, size=256), cache=None, size=64,
        workers=0, render_workers=1, batch_size=4, pairs_per_epoch=8, val_pairs=2, gaze_deg=10, padding=0.8,
        photometry=Amounts(gamma=(-1.2, 1.1)),
    )  # fmt: skip
    module = PairDataModule(config)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch.map_0to1.shape == (4, 8, 8, 2) and set(batch.mode) <= {"fa-late", "ir-fa"}
    recipes = [module.train_pairs.sources[0].recipe(k, np.random.default_rng(k), (64, 64)) for k in range(60)]
    gammas = [view.photometry.gamma for recipe in recipes for view in recipe.views if view.photometry.gamma]
    assert min(gammas) < 0.5 and max(gammas) > 2 and min(gammas) > 0.29 and max(gammas) < 3.1
    assert np.mean([recipe.fixed.fov.mean() < 0.7 for recipe in recipes]) > 0.3
    assert any(view.cover is not None for recipe in recipes for view in recipe.views)


def test_files_of_new_modalities_are_read(tmp_path):
    for name in ("cf", "faf"):
        write_image(tmp_path / "7_a" / f"7_a_{name}.png", np.full((64, 64), 90, np.uint8))
    (item,) = find_items(tmp_path, ("cf-faf",))
    assert item.moving.name == "7_a_faf.png"
