"""Guards of the benchmark of systems and of what goes out to other programs: a folder with other pairs is
refused, no half-made record, systems without an answer, exports that name what is wrong.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loftr_curriculum.baselines import classical, intensity, refinement
from loftr_curriculum.baselines.budget import Budget, train_baseline
from loftr_curriculum.baselines.fourier import fractional_fourier
from loftr_curriculum.baselines.protocol import Answer
from loftr_curriculum.baselines.retinal import Foreign
from loftr_curriculum.baselines.systems import SYSTEMS, check_system, make_system
from loftr_curriculum.cli import main
from loftr_curriculum.data.pseudo_real import SPECIFICATION, pseudo_real_pair
from loftr_curriculum.geometry import NEAR, Affine, Similarity, centre, similarity, translation, warp_image
from loftr_curriculum.io.files import FileError
from loftr_curriculum.registration.pair import NO_MATCHES, Evidence, Registration
from loftr_curriculum.registration.verdict import Verdict
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.retina.world import make_world
from loftr_curriculum.studies import benchmark
from loftr_curriculum.studies import refinement as refinement_study
from loftr_curriculum.studies.benchmark import Case, figures, keep_case, prediction, run_benchmark

COMMITTED = Path(__file__).parents[1] / "nbs" / "11_studies"


@pytest.mark.parametrize("n", (2, 7, 16, 45))
@pytest.mark.parametrize("orders", ((0.5, 0.5), (0.3, 1.7), (1.0, -1.0), (2.5, 1.25)))
def test_orders_of_the_fractional_transform_add(n, orders):
    x = torch.randn(n, n + 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    first, second = orders
    twice = fractional_fourier(fractional_fourier(x, first), second)
    assert (twice - fractional_fourier(x, first + second)).abs().max() < 1e-5


@pytest.mark.parametrize("n", (6, 9, 32))
def test_order_one_is_the_centred_transform_and_two_the_flip(n):
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    centred = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x), norm="ortho"))
    assert (fractional_fourier(x, 1.0) - centred).abs().max() < 1e-5
    index = (2 * (n // 2) - torch.arange(n)) % n
    assert (fractional_fourier(x, 2.0) - x[index][:, index]).abs().max() < 1e-5
    single = fractional_fourier(x.float(), 1.0)
    assert (single - centred).abs().max() < 1e-5


def case_of(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64), np.uint8)
    points = np.array([[10.0, 10], [40, 30]])
    return Case("generated", "0000", "eye", pixels, pixels, points, points, {})


def test_a_folder_with_another_pair_is_refused(tmp_path):
    keep_case(tmp_path, case_of(0))
    keep_case(tmp_path, case_of(0))
    with pytest.raises(FileError, match="holds predictions for another pair"):
        keep_case(tmp_path, case_of(1))


def test_a_map_that_leads_nowhere_is_an_error_and_not_a_crash():
    far = Foreign(lambda points: points * np.inf, lambda points: points * np.nan)
    kept = prediction(lambda fixed, moving: Answer(far, support=3), case_of(0))
    assert np.isfinite(kept["points"]).all() and kept["answered"]
    json.dumps(kept, allow_nan=False)


def test_no_answer_counts_as_infinite():
    row = {"eye": "a", "error": None, "seconds": 1.0, "memory_mb": 1.0}
    found = figures([row, row], 20)
    assert found["median"] is None and found["no_answer"] == 2 and found["AUC@20"] == 0


@pytest.mark.parametrize(
    "estimate",
    (
        classical.estimate_sift,
        classical.estimate_vessel_sift,
        classical.estimate_phase,
        intensity.estimate_mutual_information,
        intensity.estimate_spline,
    ),
)
@pytest.mark.parametrize("shape", ((64, 64), (48, 90, 3)))
def test_flat_images_are_answered_with_a_reason(estimate, shape):
    if estimate.__module__.endswith("intensity"):
        pytest.importorskip("SimpleITK")
    answer = estimate(np.full(shape, 90, np.uint8), np.full(shape, 90, np.uint8))
    assert answer.point_map is None and answer.reason


def test_what_is_wrong_with_a_benchmark_is_said_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "predict", lambda *a: pytest.fail("asked"))
    paths = {"out": str(tmp_path / "b.json"), "folder": str(tmp_path / "kept")}
    with pytest.raises(ValueError, match="expected one of ours"):
        run_benchmark(("sift", "elastix"), **paths)
    with pytest.raises(ValueError, match="nowhere"):
        run_benchmark(("sift",), (str(tmp_path / "nowhere"),), **paths)
    with pytest.raises(ValueError, match="at least 1 pair"):
        run_benchmark(("sift",), n=0, **paths)
    assert not list(tmp_path.iterdir())


def test_a_network_of_another_kind_is_refused(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"nothing")
    for name in ("fractmorph", "regression", "ours-budget"):
        with pytest.raises(FileError, match="weights.pt: expected a file of train-baseline"):
            make_system(f"{name}:{tmp_path / 'weights.pt'}")


def test_every_system_says_what_it_is_and_refuses_in_one_line():
    for name, system in SYSTEMS.items():
        assert system.tells and "\n" not in system.tells
        if system.takes and not system.optional:
            with pytest.raises(ValueError, match=name):
                check_system(name)


def test_a_training_that_was_interrupted_goes_on(tmp_path):
    out = str(tmp_path / "r.pt")
    short = Budget(minutes=1 / 120, size=64, batch=1, worlds=1, eye=128)
    first = train_baseline("regression", out, short, progress=False)
    assert train_baseline("regression", out, short, progress=False) == first
    with pytest.raises(FileError, match="another budget"):
        train_baseline("regression", out, Budget(minutes=1, size=64), progress=False)


def test_an_export_needs_a_name_that_ends_in_onnx(tmp_path, capsys):
    assert main(["export", "--onnx", str(tmp_path / "m.pt")]) != 0
    assert "expected a name that ends in .onnx" in capsys.readouterr().err


class Corrects(torch.nn.Module):
    "Says everywhere that the moving image lies three pixels of 512 too far right."

    def forward(self, fixed, moving):
        flow = torch.zeros(1, 2, *fixed.shape[2:])
        flow[:, 0] = 3 * fixed.shape[3] / 512
        return flow


@pytest.mark.parametrize("shift", (0.0, 3.0))
def test_a_refined_answer_is_kept_only_where_vessels_agree_better(shift, monkeypatch):
    eye = make_world(3, EyeConfig(size=512), ("cf", "fa")).images
    affine = Affine(translation((shift, 0)))
    answer = Registration(affine.matrix, Verdict.OK, (), NO_MATCHES, (512, 512), (512, 512), Evidence())
    asked = []

    def answered(fixed, moving, config):
        asked.append(config.transform)
        return replace(answer, point_map=affine)

    monkeypatch.setattr(refinement, "load_network", lambda path, name: (Corrects(), 128))
    monkeypatch.setattr(refinement, "register", answered)
    found = refinement.register_refined("weights.pt", eye["cf"], eye["fa"])
    assert asked == ["affine"] and found.verdict == Verdict.OK
    points = np.array([[100.0, 200], [300, 50]])
    assert np.abs(found.point_map(points) - points).max() < 0.01


def test_refinement_names_a_wrong_file_or_folder_before_any_pair(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(b"nothing")
    with pytest.raises(FileError, match="weights.pt: expected a file of train-baseline"):
        refinement.register_refined(str(tmp_path / "weights.pt"), "fixed.png", "moving.png")
    monkeypatch.setattr(refinement_study, "summary", lambda path: {})
    monkeypatch.setattr(refinement_study, "pair_errors", lambda *a: pytest.fail("asked"))
    with pytest.raises(FileError, match="nowhere"):
        refinement_study.measure_refinement("weights.pt", folders=(str(tmp_path / "nowhere"),))


def test_near_pairs_differ_as_after_a_first_registration(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "EYES", 1)
    for case in benchmark.cases_of("near", 2, tmp_path):
        assert case.set == "near"
        assert case.facts["rotation"] <= NEAR.rotation_deg and case.facts["scale"] <= NEAR.scale + 0.05


def test_bins_of_motion_hold_intervals_over_eyes():
    rows = [{"eye": str(k), "error": error, "facts": {"rotation": 5}} for k, error in enumerate((1, 2, None))]
    found = benchmark.by_motion(rows)["rotation"]
    assert len(found) == 1 and found[0]["pairs"] == 3
    low, high = found[0]["right interval"]
    assert low < found[0]["right"] == 0.667 < high == 1
    assert found[0]["median"] == 2 and found[0]["median interval"] == [1, None]
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_the_exported_pass_equals_that_of_torch(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from loftr_curriculum.studies.onnx import measure_onnx

    assert measure_onnx(str(tmp_path / "o.json"), 2, 1)["largest_difference"] < 1e-3


@pytest.mark.parametrize("name", ("onnx.json", "benchmark.json"))
def test_records_hold_what_the_notebooks_say(name):
    found = json.loads((COMMITTED / name).read_text())
    if name == "onnx.json":
        assert found["pairs"] >= 10 and found["largest_difference"] < 1e-3
    else:
        assert {"ours", "sift"} <= set(found["scores"]["generated"])
        assert str(Path.home()) not in json.dumps(found)


def test_errors_of_a_system_cross_its_process_and_memory_is_that_of_the_process():
    with benchmark.in_own_process("nobody") as asked, pytest.raises(ValueError, match="nobody"):
        asked(case_of(0))
    with benchmark.in_own_process("sift") as asked:
        found = asked(case_of(0))
    assert found["memory_mb"] > 50  # an interpreter with OpenCV takes more


def test_ants_finds_a_small_motion():
    pytest.importorskip("ants", reason="antspyx is not installed")
    spec = replace(SPECIFICATION, size=(256, 256), per_mode=1, split="validation")
    fixed = pseudo_real_pair("cf-octa", 0, spec).fixed
    motion = Similarity(similarity(3, 1.03, (4, -3), centre((256, 256))))
    answer = intensity.estimate_ants(fixed, warp_image(fixed, motion.matrix, (256, 256)))
    points = np.array([[60.0, 60], [128, 128], [180, 90], [100, 190]])
    off = np.linalg.norm(answer.point_map(motion(points)) - points, axis=1)
    assert off.max() < 1
