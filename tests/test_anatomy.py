"""Guards of measuring the eye: rulers against drawings of known size, faults, one whole eye, the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loftr_curriculum.retina.config import EyeConfig, seeds_of
from loftr_curriculum.retina.world import make_world
from loftr_curriculum.studies.anatomy import (
    PUBLISHED,
    Disc,
    Fovea,
    branching_exponent,
    crossings,
    find_disc,
    find_fovea,
    junctions,
    loops,
    mass_dimension,
    measure_eye,
    measure_eyes,
    tortuosity,
    trace,
    trunk_calibre,
    turns,
)

NOWHERE = Disc(np.array([0.0, 256.0]), 20.0)


def drawing(lines, size=512):
    """Lines (x0, y0, x1, y1, width) with soft edges, from their distance to every pixel.

    OpenCV's thick lines are wider than asked for.
    """
    y, x = np.mgrid[:size, :size].astype(float)
    out = np.zeros((size, size))
    for x0, y0, x1, y1, width in lines:
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        out = np.maximum(out, np.clip(width / 2 + 0.5 - np.hypot(x - x0 - t * dx, y - y0 - t * dy), 0, 1))
    return np.uint8(np.round(255 * out))


@pytest.mark.parametrize("width", [3, 4.5, 8, 13])
@pytest.mark.parametrize("angle", [0, 27, 45, 80])
def test_calibre_is_measured_at_any_angle(width, angle):
    a = np.deg2rad(angle)
    tip = 180 * np.array([np.cos(a), np.sin(a)])
    (segment,), _, _ = trace(drawing([(*(256 - tip), *(256 + tip), width)]))
    assert segment.calibre(slice(20, -20)) == pytest.approx(width, rel=0.06)
    assert tortuosity([segment], 100)[
        "tortuosity_wide" if width * 10 >= 60 else "tortuosity_thin"
    ] == pytest.approx(1, abs=0.01)


def test_a_thin_side_branch_does_not_become_the_parent():
    main = [(40, 256, 256, 256, 9), (256, 256, 470, 256, 9.3), (256, 256, 256, 450, 4)]
    segments, nodes, _ = trace(drawing(main))
    (row,) = junctions(segments, nodes, Disc(np.array([40.0, 256.0]), 20.0), 100)
    assert (
        row[0] == pytest.approx(90, abs=4)
        and row[1] == pytest.approx(93, abs=4)
        and row[2] == pytest.approx(40, abs=4)
    )
    assert row[3] == pytest.approx(90, abs=5)
    assert len(junctions(segments, nodes, Disc(np.array([400.0, 60.0]), 5.0), 100)) == 0, (
        "no way to the disc, no parent"
    )


def test_crossings_loops_and_runs_side_by_side():
    one, other = drawing([(20, 256, 490, 256, 6)]), drawing([(256, 20, 256, 490, 6)])
    beside = drawing([(20, 258, 490, 258, 6)])
    everywhere = np.ones(one.shape, bool)
    bones = [trace(m)[2] for m in (one, other, beside)]
    assert crossings(bones[0], bones[1], everywhere) == 1
    assert crossings(bones[0], bones[2], everywhere) == 0
    assert crossings(bones[0], bones[1], ~everywhere) == 0
    square = drawing(
        [(100, 100, 400, 100, 6), (400, 100, 400, 400, 6), (400, 400, 100, 400, 6), (100, 400, 100, 97, 6)]
    )
    assert loops(square, NOWHERE, 25) == 1 and loops(one, NOWHERE, 25) == 0
    assert loops(square, NOWHERE, 100_000) == 0


def test_turns_know_order_from_disorder():
    def spokes(angles):
        ends = [256 + 200 * np.array([np.cos(a), np.sin(a)]) for a in np.deg2rad(angles)]
        return drawing([(256, 256, *e, 5) for e in ends])

    middle = np.array([256.0, 256.0])
    assert turns(np.stack([spokes([0, 90, 180, 270]), spokes([45, 135, 225, 315])]), middle, 120) == 1
    assert turns(np.stack([spokes([0, 20, 40, 60]), spokes([120, 140, 160, 180])]), middle, 120) == 0.25
    assert np.isnan(turns(np.zeros((2, 512, 512), np.uint8), middle, 120))


def test_trunks_are_measured_where_they_should_be():
    segments, _, _ = trace(
        drawing([(256, 256, 330, 30, 12), (256, 256, 330, 480, 8), (256, 256, 30, 256, 20)])
    )
    disc, fovea = Disc(np.array([256.0, 256.0]), 30.0), Fovea(np.array([480.0, 256.0]), 10.0)
    assert trunk_calibre(segments, disc, fovea, 100, 0.8) == pytest.approx(100, rel=0.06), (
        "the nasal trunk does not count"
    )
    assert np.isnan(trunk_calibre([], disc, fovea, 100, 0.8))


def test_exponent_needs_junctions_of_the_right_size():
    d = np.random.default_rng(0).uniform(30, 55, (40, 2))
    table = np.c_[(d**1.95).sum(1) ** (1 / 1.95), d]
    table = table[table[:, 0] < 100]
    assert branching_exponent(table) == pytest.approx(1.95, abs=0.01)
    assert np.isnan(branching_exponent(table * 10)) and np.isnan(branching_exponent(np.zeros((0, 4))))


def test_landmarks_are_found_whatever_the_eye():
    config = EyeConfig(size=512, disease=0, gap=0)
    for seed in seeds_of("calibration", 4):
        world = make_world(seed, config, ("cf",))
        disc = find_disc(world.images["cf"], world.facts["px_per_mm"])
        assert np.hypot(*(disc.centre - world.facts["disc"])) < 0.25 * world.facts["px_per_mm"]
        assert disc.radius == pytest.approx(np.sqrt(np.prod(world.facts["disc_axes"])), rel=0.25)


def test_one_eye_gives_every_published_figure():
    figures, tables = measure_eye(seeds_of("calibration", 1)[0])
    assert set(PUBLISHED) <= set(figures)
    assert 3.7 < figures["disc_fovea_mm"] < 5.9 and 0.1 < figures["faz_radius_mm"] < 0.6
    assert 0.03 < figures["vessel_area"] < 0.25 and 1 < figures["fractal_dimension"] < 2
    assert all(len(t) > 5 and np.isfinite(t).all() for t in tables.values())
    again, _ = measure_eye(seeds_of("calibration", 1)[0])
    np.testing.assert_equal(figures, again)


def test_the_command_writes_what_it_returns(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from loftr_curriculum.cli import main; sys.exit(main())",
            "study",
            "anatomy",
            "--eyes",
            "2",
            "--size",
            "512",
            "--out",
            "a.json",
            "--workers",
            "1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["eyes"] == 2 and result["config"]["size"] == 512 and "disc_fovea_mm" in done.stdout
    row = result["figures"]["disc_fovea_mm"]
    assert sum(row["counts"]) == 2 and row["source"] == "PMC4577126"
    with pytest.raises(ValueError, match="too many"):
        measure_eyes(10_000_000, str(tmp_path / "b.json"), progress=False)


def test_the_committed_figures_are_those_of_this_generator():
    from loftr_curriculum.retina.config import GENERATOR_VERSION

    committed = json.loads((Path(__file__).parents[1] / "nbs" / "11_studies" / "anatomy.json").read_text())
    assert committed["generator"] == GENERATOR_VERSION, (
        "draw the eyes again: loftr-curriculum study anatomy --out nbs/11_studies/anatomy.json"
    )


def test_mass_dimension_needs_vessels_away_from_the_border():
    bones = np.zeros((300, 300), bool)
    bones[5] = True
    assert np.isnan(mass_dimension(bones, 20))
    bones[150] = True
    assert mass_dimension(bones, 20) == pytest.approx(1, abs=0.1)


def test_where_there_is_no_avascular_zone_none_is_found():
    flat = np.random.default_rng(0).integers(90, 110, (512, 512), dtype=np.uint8)
    y, x = np.mgrid[:512, :512]
    spot = np.exp(-((x - 350) ** 2 + (y - 256) ** 2) / 800)
    fovea = find_fovea(
        np.uint8(flat - 85 * spot), np.uint8(flat + 40 * spot), Disc(np.array([200.0, 256.0]), 30.0), 30.0
    )
    assert np.hypot(*(fovea.centre - [350, 256])) < 15 and np.isnan(fovea.radius), (
        "dark in the angiogram, but full of capillaries"
    )
    assert junctions(*trace(drawing([(40, 256, 470, 256, 6)]))[:2], NOWHERE, 100).shape == (0, 4), (
        "a vessel without branches"
    )
