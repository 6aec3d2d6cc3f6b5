"""Guards of the generated eye and of pairs cut from it: anatomy, determinism, caches, vessels, geometry."""

import importlib
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from loftr_curriculum.data.pairs import AlignedPlanes, GeneratedSource, cut_views, make_planes
from loftr_curriculum.geometry import Motion, apply_transform, decompose, overlap
from loftr_curriculum.retina.config import MODES, EyeConfig, eye_settings, seeds_of, split_mode
from loftr_curriculum.retina.cover import draw_cover, paint_cover
from loftr_curriculum.retina.jobs import run_jobs
from loftr_curriculum.retina.modality import (
    ANATOMY_STREAM,
    FIELD_STREAM,
    LESION_STREAM,
    MODALITIES,
    PLANES,
    USUAL,
    VIEW_STREAM,
    WIDE_STREAM,
    check_table,
    modality,
    plane_index,
    planes_for,
)
from loftr_curriculum.retina.randomise import randomise
from loftr_curriculum.retina.synth import synthesise, world_for
from loftr_curriculum.retina.tree import add_tortuosity, draw_anatomy, grow_vessels
from loftr_curriculum.retina.world import WorldBank, half_of, make_world, planes_of

LITTLE = EyeConfig(size=256)


@pytest.fixture(scope="module")
def bank():
    return WorldBank(seeds_of("validation", 3), EyeConfig(size=512), workers=1, progress=False)


def test_landmarks_follow_the_published_distances():
    eyes = [draw_anatomy(np.random.default_rng(i), EyeConfig()) for i in range(400)]
    reach = np.array([e.reach / e.px_per_mm for e in eyes])
    assert abs(reach.mean() - 4.76) < 0.06 and abs(reach.std() - 0.34) < 0.06
    along = np.array([e.fovea - e.disc for e in eyes])
    below = np.rad2deg(np.arctan2(along[:, 1], np.abs(along[:, 0])))
    assert abs(below.mean() - 5.6) < 0.7
    diameters = reach / (2 * np.array([e.disc_axes[1] / e.px_per_mm for e in eyes]))
    assert abs(diameters.mean() - 2.65) < 0.1
    assert 0.4 < np.mean([e.eye == "left" for e in eyes]) < 0.6
    inside = [(p > 0).all() and (p < 1024).all() for e in eyes for p in (e.disc, e.fovea)]
    assert np.mean(inside) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_tree_is_sound_and_arches_around_the_fovea(seed):
    anatomy, v = grow_vessels(np.random.default_rng(seed))
    child = np.flatnonzero(v.parent >= 0)
    assert (v.parent[child] < child).all() and np.isfinite(v.points).all() and len(np.unique(v.artery)) == 2
    assert (v.artery[child] == v.artery[v.parent[child]]).all()
    step = np.hypot(*(v.points[child] - v.points[v.parent[child]]).T)
    assert step.max() < 16, "a segment jumps"
    large = v.points[v.radius > 0.6 * v.radius.max()]
    assert np.hypot(*(large - anatomy.fovea).T).min() > 0.25 * anatomy.reach, (
        "a large vessel runs through the macula"
    )
    side = (anatomy.fovea - anatomy.disc) * anatomy.temporal
    above = (large - anatomy.disc) @ np.array([side[1], -side[0]]) > 0
    assert 0.2 < above.mean() < 0.8, "one arcade is missing"


def test_world_scales_with_its_size():
    small, large = (make_world(3, EyeConfig(size=s), ()) for s in (512, 1024))
    assert small.facts["eye"] == large.facts["eye"]
    assert abs(small.vessels.mean() - large.vessels.mean()) < 0.25 * large.vessels.mean()
    assert small.images == {}


def test_bank_does_not_depend_on_processes_or_place(tmp_path):
    one = WorldBank([5, 6], LITTLE, workers=1, progress=False)
    two = WorldBank([5, 6], LITTLE, tmp_path / "bank", workers=2, progress=False)
    for i in range(2):
        for a, b in zip(one[i], two[i]):
            np.testing.assert_array_equal(a, b)
    assert len(pickle.dumps(two)) < 10_000, "memory-mapped worlds must not travel with the bank"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(two))[1][0], one[1][0])
    np.testing.assert_array_equal(half_of(one[0][0]), one[0][1])


def test_bank_refuses_other_settings_and_foreign_folders(tmp_path):
    WorldBank([1], LITTLE, tmp_path / "bank", workers=1, progress=False)
    with pytest.raises(ValueError, match="density is 1.0 there and 0.5 here"):
        WorldBank([1], EyeConfig(size=256, density=0.5), tmp_path / "bank", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ValueError, match="holds other files"):
        WorldBank([1], LITTLE, tmp_path / "mine", progress=False)


def test_vessel_share_of_the_tokens():
    """After mask_to_grid, 15 to 45 % of tokens in the field stand at 0.5 or more, at 8 and 16 px cells."""
    torch = pytest.importorskip("torch")
    from loftr_curriculum.model.guidance import fov_to_grid, mask_to_grid

    share = {8: [], 16: []}
    for seed in range(6):
        mask = make_world(seed, modalities=()).vessels
        half = half_of(mask[None])[0]
        frame = AlignedPlanes(mask, mask, mask, (half, half, half))
        for k in range(12):
            p = cut_views(frame, np.random.default_rng((seed, k)), (256, 256), strength=0)
            for m, f in ((p.mask0, p.fov0), (p.mask1, p.fov1)):
                for cell in share:
                    grid = mask_to_grid(torch.from_numpy(m)[None], cell)[0]
                    inside = fov_to_grid(torch.from_numpy(f)[None], cell)[0]
                    share[cell].append(float((grid[inside] >= 0.5).float().mean()))
    for cell, values in share.items():
        values = np.array(values)
        assert 0.18 < values.mean() < 0.40, (cell, values.mean())
        assert np.mean((values >= 0.15) & (values <= 0.45)) > 0.8, (
            cell,
            np.percentile(values, [0, 5, 50, 95, 100]),
        )


def test_pairs_stay_within_the_range_of_motion(bank):
    source, motion = GeneratedSource(bank, MODES), Motion()
    for i in range(60):
        p = source.draw(i, np.random.default_rng(i), (128, 128), motion)
        d = decompose(p.fixed_to_moving, (128, 128))
        assert 0.49 < d["scale"] < 2.05 and np.hypot(*d["shift"]) <= 0.71 * 128
        assert overlap(p.fixed_to_moving, (128, 128), (128, 128), p.fov0, p.fov1) > 0.15
        assert p.mode in MODES
        for image, mask, fov in ((p.image0, p.mask0, p.fov0), (p.image1, p.mask1, p.fov1)):
            assert image.dtype == mask.dtype == np.float32 and fov.dtype == bool
            assert np.abs(image).max() <= 1 and mask.min() >= 0 and mask.max() <= 1
            assert not image[~fov].any() and not mask[~fov].any()


def test_the_true_transform_is_exact():
    """Spots are found in both views where fixed_to_moving says, to a tenth of a pixel, from either level."""
    y, x = np.mgrid[:600, :600]
    errors = []
    for i in range(40):
        rng = np.random.default_rng(i)
        at = rng.uniform(250, 350, 2)
        plane = np.uint8(np.round(250 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * 9.0**2))))
        p = cut_views(make_planes(plane, plane, plane), rng, (192, 256), strength=0, optics=False)
        found = []
        for m in (p.mask0, p.mask1):
            m = np.where(m > 0.02, m, 0)
            rim = np.r_[m[0], m[-1], m[:, 0], m[:, -1]].max()
            if rim > 0 or m.sum() < 1:
                break
            found.append(
                [(m.sum(0) * np.arange(256)).sum() / m.sum(), (m.sum(1) * np.arange(192)).sum() / m.sum()]
            )
        if len(found) == 2:
            errors.append(np.hypot(*(apply_transform(p.fixed_to_moving, np.array(found[:1]))[0] - found[1])))
    assert len(errors) > 10 and max(errors) < 0.1, errors


def test_a_draw_depends_on_index_and_generator_alone(bank):
    a, b = GeneratedSource(bank, MODES), GeneratedSource(pickle.loads(pickle.dumps(bank)), MODES)
    b.draw(0, np.random.default_rng(9), (64, 64))
    for i in (0, 4):
        p, q = (s.draw(i, np.random.default_rng(i), (96, 96)) for s in (a, b))
        np.testing.assert_array_equal(p.image0, q.image0)
        np.testing.assert_array_equal(p.image1, q.image1)
        np.testing.assert_array_equal(p.fixed_to_moving, q.fixed_to_moving)
        assert (p.mode, p.id) == (q.mode, q.id)
    with pytest.raises(ValueError, match="unknown mode"):
        GeneratedSource(bank, ("cf-mri",))


def test_modes_show_the_planes_that_they_name(bank):
    still = Motion(rotation_deg=0, scale=1, same_scale=1, shift=0, shear=0)
    full, half = bank[0]
    i, j = (plane_index(name) for name in split_mode("oct-fa"))
    vessels = plane_index("vessels")

    def pair_of(fixed, moving):
        planes = [fixed, moving, vessels]
        frame = AlignedPlanes(*full[planes], tuple(half[planes]))
        rng = np.random.default_rng(0)
        return cut_views(frame, rng, (256, 256), still, 0, mode="oct-fa", optics=False)

    p, q = pair_of(i, j), pair_of(i, i)
    np.testing.assert_array_equal(p.image0, q.image0)
    assert np.abs(p.image1 - q.image1).mean() > 0.02


def change_by_randomise(gray, strength, draws=30) -> float:
    """1 - |correlation| of a view with itself after it was randomised, on average."""
    fov = np.ones(gray.shape, bool)
    changes = []
    for seed in range(draws):
        out = randomise(gray, fov, np.random.default_rng(seed), strength)
        changes.append(1 - abs(np.corrcoef(gray.ravel(), out.ravel())[0, 1]))
    return np.mean(changes)


def test_randomise_is_gentle_at_low_strength_and_survives_odd_input():
    gray = cv2.GaussianBlur(np.random.default_rng(0).random((120, 90), dtype=np.float32), (0, 0), 4)
    gray = (gray - gray.min()) / np.ptp(gray)
    assert change_by_randomise(gray, 0.2) < 0.5 * change_by_randomise(gray, 1.0)
    for odd in (np.zeros((40, 64), np.float32), np.ones((40, 64), np.float32)):
        for i in range(20):
            out = randomise(odd, np.ones(odd.shape, bool), np.random.default_rng(i), 2.0)
            assert np.isfinite(out).all() and out.shape == odd.shape


def test_synth_resumes_and_writes_the_same_bytes_with_two_processes(tmp_path):
    one = synthesise(tmp_path / "a", 2, seed=3, size=96, workers=1, progress=False)
    synthesise(tmp_path / "b", 1, seed=3, size=96, workers=1, progress=False)
    two = synthesise(tmp_path / "b", 2, seed=3, size=96, workers=2, progress=False)
    assert one == two
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*") if f.is_file())
    assert len(files) == 1 + 2 * 6
    for f in files:
        assert (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes(), f
    facts = json.loads((tmp_path / "a" / one[0] / f"{one[0]}.json").read_text())
    assert facts["seed"] == 3 and facts["px_per_mm"] > 0
    with pytest.raises(ValueError, match="seed is 3 there and 4 here"):
        synthesise(tmp_path / "a", 2, seed=4, size=96, progress=False)
    for wrong, says in (
        ({"modalities": ("mri",)}, "unknown modalities mri"),
        ({"cases": 0}, "at least 1 case"),
        ({"cases": 2, "seed": -3}, "a seed of at least 0"),
    ):
        with pytest.raises(ValueError, match=says):
            synthesise(tmp_path / "c", **{"cases": 1} | wrong)
    assert not (tmp_path / "c").exists()


def test_large_pictures_come_from_larger_worlds():
    assert world_for(512).size == 1024
    assert world_for(1024).size * 40 / 70 >= 1024


def test_a_fault_in_a_worker_process_comes_back(tmp_path):
    """Also after OpenCV has started its threads in this process: a forked child would hang there."""
    cv2.GaussianBlur(np.zeros((2000, 2000), np.float32), (0, 0), 5)
    assert list(run_jobs(math.sqrt, [4.0, 9.0, 16.0], 2, "")) == [2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="math domain error"):
        list(run_jobs(math.sqrt, [4.0, -1.0], 2, ""))
    with pytest.raises(RuntimeError, match="exit code"):
        list(run_jobs(os._exit, [3, 3], 2, ""))


def a_fifth_modality() -> dict:
    """The table with one entry more, put in front so that every place behind it moves."""

    def render_negative(*eye):
        image, facts = modality("oct").renderer(*eye)
        return 255 - image, facts

    negative = replace(modality("oct"), name="negative", stream=10, renderer=render_negative)
    return {"negative": negative, **MODALITIES}


@pytest.mark.parametrize("seed", (7, 11, 12))
def test_a_fifth_modality_changes_nothing_of_the_others(seed):
    config = EyeConfig(size=256, disease=1)
    table = a_fifth_modality()
    check_table(table)
    four = make_world(seed, config)
    five = make_world(seed, config, ("negative", *USUAL), table=table)
    assert list(five.images) == ["negative", *USUAL]
    for name in USUAL:
        np.testing.assert_array_equal(five.images[name], four.images[name])
        assert five.facts[name] == four.facts[name]
    np.testing.assert_array_equal(five.vessels, four.vessels)
    assert any(four.facts[name]["lesions"] for name in USUAL), "no lesion that could have changed"


def test_planes_are_found_by_name_wherever_they_stand():
    table = a_fifth_modality()
    names = ("vessels", *table)
    world = make_world(7, LITTLE, tuple(table), table=table)
    planes = planes_of(world, names)
    for name in table:
        image = world.images[name]
        grey = image[..., 1] if image.ndim == 3 else image
        np.testing.assert_array_equal(planes[plane_index(name, names)], grey)
    np.testing.assert_array_equal(planes[plane_index("vessels", names)], world.vessels)
    np.testing.assert_array_equal(planes_of(world)[plane_index("vessels")], world.vessels)
    with pytest.raises(ValueError, match="unknown plane 'icg'"):
        plane_index("icg")


def test_streams_of_chance_are_fixed_for_ever():
    """A change of one of these numbers changes every eye that was ever generated."""
    streams = {name: entry.stream for name, entry in MODALITIES.items()}
    assert streams == {"cf": 1, "fa": 2, "oct": 3, "octa": 4, "late": 6, "ir": 7, "faf": 8, "icga": 9}
    assert (ANATOMY_STREAM, LESION_STREAM, VIEW_STREAM) == (0, 5, 100)
    assert (FIELD_STREAM, WIDE_STREAM) == (102, 103)
    check_table(MODALITIES)
    with pytest.raises(ValueError, match="stream 5 belongs to the eye itself"):
        check_table({"icg": replace(modality("fa"), stream=LESION_STREAM)})


def test_names_are_read_without_the_renderers():
    """`retina.config` is read for a line of help, so it must not load what draws."""
    program = (
        "import sys; from loftr_curriculum.retina.config import MODALITIES; "
        "print(*MODALITIES, *[m for m in ('cv2', 'torch', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split()) == USUAL


@pytest.mark.parametrize(
    ("module", "old", "new"),
    (
        ("randomise", "Look", "randomise.Photometry"),
        ("randomise", "draw_look", "randomise.draw_photometry"),
        ("randomise", "apply_look", "randomise.apply_photometry"),
        ("randomise", "draw_scan", "scanner.draw_scan"),
        ("render", "scan_lines", "scanner.scan_lines"),
        ("render", "vessel_mask", "drawing.vessel_mask"),
        ("render", "common_lesions", "lesions.common_lesions"),
        ("world", "keep_memory", "jobs.keep_memory"),
        ("world", "part_of", "world.one_system"),
        ("tree", "sow", "tree.draw_attractors"),
    ),
)
def test_names_of_before_still_answer(module, old, new):
    place, _, name = new.partition(".")
    wanted = getattr(importlib.import_module(f"loftr_curriculum.retina.{place}"), name)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now .*{new}"):
        assert getattr(importlib.import_module(f"loftr_curriculum.retina.{module}"), old) is wanted


WIDE = EyeConfig(size=256, fields=(20, 200))


def test_every_eye_has_a_field_of_its_own():
    fields = [WIDE.of_eye(seed).degrees for seed in range(300)]
    assert min(fields) >= 20 and max(fields) <= 200 and len(set(fields)) == 300
    below = np.mean(np.array(fields) < np.sqrt(20 * 200))
    assert 0.4 < below < 0.6, "each doubling of the field is as likely as another"
    for wrong in ((10, 200), (50, 20), (20, 220)):
        with pytest.raises(ValueError, match="20..200"):
            EyeConfig(fields=wrong)


@pytest.mark.parametrize("field", (20, 60, 120, 200))
def test_a_wide_eye_is_drawn_by_every_renderer(field):
    world = make_world(5, EyeConfig(size=256, fields=(field, field)), tuple(MODALITIES))
    assert list(world.images) == list(MODALITIES)
    for name, image in world.images.items():
        assert image.shape[:2] == (256, 256) and image.dtype == np.uint8
        assert image.std() > 3, f"{name} shows nothing"
    assert world.facts["degrees"] == pytest.approx(field, rel=1e-3)
    again = make_world(5, EyeConfig(size=256, fields=(field, field)), ("ir",))
    np.testing.assert_array_equal(again.images["ir"], world.images["ir"])


def test_the_field_changes_the_scale_as_the_projection_says():
    """Disc and fovea lie 4.76 mm apart at any field, measured along the retina."""
    for field in (60, 120, 200):
        eyes = [draw_anatomy(np.random.default_rng(k), EyeConfig(fields=(field, field))) for k in range(200)]
        apart = [np.hypot(*(e.flat(e.fovea) - e.flat(e.disc))) / e.px_per_mm for e in eyes]
        assert np.mean(apart) == pytest.approx(4.76, abs=0.1)


def test_the_periphery_is_thin_and_straight():
    anatomy, v = grow_vessels(np.random.default_rng(2), EyeConfig(fields=(190, 190)))
    angle = anatomy.sphere.angle(v.points)
    calibre = v.radius / anatomy.stretch(v.points)
    assert calibre[angle > 70].mean() < 0.6 * calibre[angle < 20].mean()
    ring = np.deg2rad(np.linspace(0, 360, 60, endpoint=False))
    around = np.stack([np.cos(ring), np.sin(ring)], 1)
    rings = [511.5 + radius * around for radius in (60, 460)]
    moved = [add_tortuosity(points, anatomy, np.random.default_rng(1)) - points for points in rings]
    near, far = (np.hypot(*(m - m.mean(0)).T).mean() for m in moved)
    assert far < 0.8 * near


def test_a_bank_holds_the_planes_of_its_modes(tmp_path):
    planes = planes_for(("ir-fa", "cf-icga"))
    assert planes == ("cf", "fa", "ir", "icga", "vessels") and planes_for(MODES) == PLANES
    bank = WorldBank([3], WIDE, folder=tmp_path / "w", workers=1, progress=False, planes=planes)
    full, half = bank[0]
    assert full.shape == (5, 256, 256) and half.shape == (5, 128, 128)
    pair = GeneratedSource(bank, ("cf-icga",)).draw(0, np.random.default_rng(0), (64, 64))
    assert pair.mode == "cf-icga" and np.isfinite(pair.image1).all()
    with pytest.raises(ValueError, match="planes"):
        WorldBank([3], WIDE, folder=tmp_path / "w", workers=1, progress=False)


def test_folders_of_flat_eyes_stay_as_they_were():
    """A folder that was made before wide eyes came must be read as before."""
    assert "fields" not in eye_settings(EyeConfig()) and eye_settings(WIDE)["fields"] == (20, 200)


def test_covers_hide_and_say_where():
    covers = [draw_cover(np.random.default_rng(k), "cf", (96, 96)) for k in range(60)]
    grey = np.full((96, 96), 128, np.uint8)
    for cover in filter(None, covers):
        painted = paint_cover(grey, cover).astype(int)
        untouched = (cover.keep == 255) & (cover.ink == 0)
        assert (painted[untouched] == 128).all() and painted.min() >= 0
    assert 0.4 < np.mean([c is not None for c in covers]) < 1


def test_wide_cases_are_written(tmp_path):
    eye = EyeConfig(fields=(120, 200))
    synthesise(tmp_path / "s", 2, size=128, modalities=("cf", "late"), eye=eye, workers=1, progress=False)
    facts = json.loads((tmp_path / "s" / "000000_G" / "000000_G.json").read_text())
    assert 60 < facts["field_deg"] < 200 and facts["degrees"] >= 120
    assert (tmp_path / "s" / "000001_G" / "000001_G_late.png").exists()
