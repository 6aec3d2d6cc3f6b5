"""Guards of the evaluation room: equality with the independent scorer, faults, missing answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loftr_curriculum.evaluation.collapse import collapse_figures, many_to_one, overlap_fields, thirds_excess
from loftr_curriculum.evaluation.metrics import auc, corner_error, landmark_error, success_rate, summarise
from loftr_curriculum.evaluation.sets import evaluate_set, read_predictions
from loftr_curriculum.geometry import apply_transform, compose, invert, similarity, translation
from loftr_curriculum.io.files import FileError, write_json
from loftr_curriculum.io.images import write_image

SHARED = Path(__file__).resolve().parents[2] / "shared"
SCORER, REAL = SHARED / "bench" / "pairs.py", SHARED / "real_pairs"
needs_scorer = pytest.mark.skipif(
    not SCORER.is_file(), reason="the independent scorer ../shared/bench/pairs.py is not here"
)
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real pairs ../shared/real_pairs are not here")


def make_set(folder, n=5, seed=0):
    "A set with homographies as references and noisy landmarks; {id: reference}."
    rng, references = np.random.default_rng(seed), {}
    for i in (2, 10, 33, 4, 101)[:n]:
        h0, w0, h1, w1 = rng.integers(60, 160, 4)
        M = compose(
            similarity(rng.normal(0, 5), rng.uniform(0.8, 1.2), rng.normal(0, 8, 2)),
            np.array([[1, 0, 0], [0, 1, 0], [2e-4, -1e-4, 1]]),
        )
        q = rng.uniform(0, [w1 - 1, h1 - 1], (20, 2))
        p = apply_transform(M, q) + rng.normal(0, 2, (20, 2))
        write_image(folder / f"images/{i}_fixed.png", rng.integers(0, 255, (h0, w0), np.uint8))
        write_image(folder / f"images/{i}_moving.png", rng.integers(0, 255, (h1, w1, 3), np.uint8))
        (folder / "landmarks").mkdir(exist_ok=True)
        np.savetxt(
            folder / f"landmarks/{i}.csv",
            np.c_[p, q],
            "%.3f",
            ",",
            header="fixed_x,fixed_y,moving_x,moving_y",
            comments="",
        )
        write_json(folder / f"landmarks/{i}.json", {"moving_to_fixed": M})
        references[str(i)] = M
    return references


def predictions(references, seed=1):
    "Answers of every kind: exact, off, far off, broken, silent, missing."
    rng = np.random.default_rng(seed)

    def off(M, sigma):
        return compose(M, translation(rng.normal(0, sigma, 2)), similarity(rng.normal(0, sigma / 10)))

    return {
        "identity": {i: np.eye(3) for i in references},
        "reference": references,
        "noisy": {i: off(M, 5) for i, M in references.items()},
        "null": {i: None for i in references},
        "mixed": {
            i: [M, off(M, 12), None, np.zeros((3, 3)), np.full((3, 3), np.inf), np.eye(2)][k % 6]
            for k, (i, M) in enumerate(references.items())
            if k != 1
        },
    }


def both_scores(root, answers, tmp_path):
    plain = {
        i: None if M is None else np.where(np.isfinite(M), M, 1e400).tolist() for i, M in answers.items()
    }
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(plain))
    theirs = subprocess.run(
        [sys.executable, str(SCORER), "score", str(file), "--set", str(root), "--per-pair"],
        capture_output=True,
        text=True,
        check=True,
    )
    return evaluate_set(root, read_predictions(file), per_pair=True), json.loads(theirs.stdout), theirs.stdout


@needs_scorer
@pytest.mark.parametrize("kind", ["identity", "reference", "noisy", "null", "mixed"])
def test_prints_what_the_scorer_prints_on_a_made_set(kind, tmp_path):
    references = make_set(tmp_path / "set")
    ours, theirs, printed = both_scores(tmp_path / "set", predictions(references)[kind], tmp_path)
    assert ours == theirs
    assert json.dumps(ours, indent=1) == printed.rstrip("\n")


@needs_scorer
@needs_real
@pytest.mark.parametrize("kind", ["identity", "reference", "mixed"])
def test_prints_what_the_scorer_prints_on_the_real_pairs(kind, tmp_path):
    references = {
        p.stem: np.array(json.loads(p.read_text())["moving_to_fixed"])
        for p in (REAL / "landmarks").glob("*.json")
    }
    ours, theirs, _ = both_scores(REAL, predictions(references)[kind], tmp_path)
    assert ours == theirs


def test_known_figures_of_a_made_set(tmp_path):
    references = make_set(tmp_path)
    s = evaluate_set(tmp_path, references)
    assert s["corner_AUC@3"] == 1 and s["no_answer"] == 0 and 1.5 < s["landmark_median"] < 3.5
    s = evaluate_set(tmp_path, {i: None for i in references})
    assert (
        s["no_answer"] == 5
        and s["landmark_SR@20"] == s["corner_AUC@20"] == 0
        and s["landmark_median"] is None
    )


def test_auc_equals_a_fine_numerical_integral():
    errors = np.r_[np.random.default_rng(0).exponential(6, 40), np.inf, np.inf]
    knots = np.r_[0, np.sort(errors[np.isfinite(errors)])]
    share = np.r_[0, np.arange(1, 41) / 42]
    e = np.linspace(0, 10, 200_001)
    inside = knots <= 10
    F = np.interp(e, knots[inside], share[inside])
    assert auc(errors, 10) == pytest.approx(F.mean(), abs=1e-4)


@pytest.mark.parametrize("errors", [[], [np.inf], [np.nan, 3.0]])
def test_odd_sets_of_errors(errors):
    s = summarise(errors)
    assert s["pairs"] == len(errors) and s["no_answer"] == int(np.sum(~np.isfinite(errors)))
    assert np.isnan(success_rate([], 5)) and np.isnan(auc([], 5))


def test_points_at_infinity_are_an_infinite_error():
    M = np.array([[1, 0, 0], [0, 1, 0], [-0.01, 0, 1]])  # the horizon runs through x = 100
    q = np.array([[100.0, 5.0], [3.0, 4.0]])
    assert landmark_error(M, q, q) == np.inf
    assert corner_error(M, np.eye(3), (50, 101)) == np.inf


def test_faulty_predictions_are_refused_or_named(tmp_path):
    references = make_set(tmp_path / "set", n=2)
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(FileError, match="list.json.*JSON object"):
        evaluate_set(tmp_path / "set", tmp_path / "list.json")
    with pytest.raises(ValueError, match="either predictions or a matcher"):
        evaluate_set(tmp_path / "set")
    known = next(iter(references))
    with pytest.warns(UserWarning, match="not in the set: 0101"):
        assert evaluate_set(tmp_path / "set", {"0101": np.eye(3), known: None})["no_answer"] == 2
    with pytest.raises(FileError, match="none of the predictions belongs to the set: 0101"):
        evaluate_set(tmp_path / "set", {"0101": np.eye(3)})
    with pytest.raises(FileError, match="landmarks"):
        evaluate_set(tmp_path / "nothing", references)


def test_a_matcher_is_judged_with_its_verdicts(tmp_path):
    "Noise against noise: every answer fails, none is believed."
    from loftr_curriculum.model.config import Matches

    class Random:
        def match(self, image0, image1, **ignored):
            rng = np.random.default_rng(0)
            return [Matches(rng.uniform(0, 255, (100, 2)), rng.uniform(0, 255, (100, 2)), np.ones(100))]

    make_set(tmp_path, n=2)
    s = evaluate_set(tmp_path, matcher=Random(), progress=False)
    assert (s["no_answer"], s["wrong_ok"], s["good_ok"]) == (2, 0, None)


def test_collapse_figures_do_not_move_with_the_pose_of_a_right_matcher():
    rng, fov = np.random.default_rng(0), np.ones((400, 400), bool)
    start = rng.uniform(0, 399, (8000, 2))
    for angle in (0, 90, 135, 180):
        for scale in (0.5, 1.0, 2.0):
            T = similarity(angle, scale, (20, 10), center=(199.5, 199.5))
            end = apply_transform(T, start)
            seen = ((end >= 0) & (end <= 399)).all(1)
            f = collapse_figures(start[seen], end[seen], fov, fov, T)
            assert (
                min(f.coverage0, f.coverage1, f.entropy) > 0.9
                and f.many_to_one < 0.01
                and f.thirds_excess < 0.06
            ), (angle, scale, f)


def test_collapse_figures_of_few_and_of_no_matches():
    fov = np.ones((300, 300), bool)
    nothing = collapse_figures(np.empty((0, 2)), np.empty((0, 2)), fov, fov)
    assert (
        nothing.matches,
        nothing.coverage0,
        nothing.entropy,
        nothing.many_to_one,
        nothing.thirds_excess,
    ) == (0, 0, 0, 0, 1)
    few = np.random.default_rng(0).uniform(0, 299, (12, 2))
    f = collapse_figures(few, few, fov, fov, np.eye(3))
    assert f.coverage1 > 0.8 and f.entropy > 0.8 and f.many_to_one == 0
    blind = collapse_figures(few, few, ~fov, fov)
    assert blind.coverage0 == 0 and np.isfinite([blind.coverage1, blind.entropy, blind.thirds_excess]).all()


def test_overlap_fields_agree_with_each_other():
    T = similarity(30, 1.5, (60, -20), center=(150, 150))
    f = overlap_fields(np.ones((300, 320), bool), np.ones((280, 300), bool), T)
    assert f.end.sum() / f.start.sum() == pytest.approx(1.5**2, rel=0.02) and f.scale == pytest.approx(1.5)
    back = overlap_fields(np.ones((280, 300), bool), np.ones((300, 320), bool), invert(T))
    assert (back.start ^ f.end).mean() < 0.01


def test_a_collapsed_scale_does_not_excuse_many_to_one():
    start = np.random.default_rng(0).uniform(0, 500, (500, 2))
    assert many_to_one(start, 0.01 * start, scale=0.01) > 0.9


def test_thirds_excess_against_a_lower_overlap():
    fov = np.ones((300, 300), bool)
    lower = fov & (np.arange(300) >= 200)[:, None]
    points = np.random.default_rng(0).uniform((0, 200), (299, 299), (500, 2))
    assert thirds_excess(points, lower, fov) < 0.02 and thirds_excess(points, fov, fov) == pytest.approx(
        2 / 3, abs=0.02
    )


def test_the_committed_precision_is_that_of_the_packaged_weights_and_keeps_the_promise():
    from loftr_curriculum.model.weights import PACKAGED, load_matcher
    from loftr_curriculum.registration.many import fingerprint

    file = Path(__file__).parents[1] / "nbs" / "11_studies" / "precision.json"
    if not (file.is_file() and PACKAGED.is_file()):
        pytest.skip("not measured yet")
    result = json.loads(file.read_text())
    level = result["bins"]["level"]["flow, full"]
    assert result["matcher"] == fingerprint(load_matcher()) and result["settings"]["size"] == 512
    assert level["precision@3"] >= 0.9 and level["median_px"] <= 0.8
