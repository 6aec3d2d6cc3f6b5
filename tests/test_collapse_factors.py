"""Guards of the study of collapse: one factor at a time, gaps that are where they should be, pieces that
add up, words that follow the numbers, and choices of the matcher that reach the network.
"""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from loftr_curriculum.io.files import FileError
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.model.weights import load_matcher, save_matcher
from loftr_curriculum.studies import collapse_factors
from loftr_curriculum.studies.collapse_factors import (
    GAPS,
    HEALTHY,
    ILL,
    LEVELS,
    Settings,
    all_conditions,
    figures_of_gap,
    gap_probes,
    run_factors,
)
from loftr_curriculum.studies.key_norms import GAPS as SCENES
from loftr_curriculum.studies.key_norms import contrast_of, learn, look

NET = dict(dims=(8, 16, 32), layers=1)
TINY = Settings(
    seeds=(200, 201), epochs=1, steps=1, batch=2, size=64, eye=256, probes=1, matcher=MatcherConfig(**NET)
)


def test_every_level_of_every_factor_is_tried_around_both_centres():
    conditions = all_conditions().values()
    for centre in (ILL, HEALTHY):
        for factor, levels in LEVELS.items():
            for level in levels:
                assert replace(centre, **{factor: level}) in conditions


@pytest.mark.parametrize("choice", [{"positions": "added"}, {"similarity": "product"}, {"norm": "batch"}])
def test_a_choice_reaches_the_network_and_the_file(choice, tmp_path):
    image0, image1 = torch.randn(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    sims = []
    for config in (MatcherConfig(**NET), MatcherConfig(**NET, **choice)):
        torch.manual_seed(0)
        net = Matcher(config).eval()
        with torch.no_grad():
            sims.append(net(image0, image1).sim)
    assert (sims[0] - sims[1]).abs().max() > 1e-3
    save_matcher(tmp_path / "it.safetensors", net)
    again = load_matcher(tmp_path / "it.safetensors").eval()
    assert again.config == config
    with torch.no_grad():
        assert torch.allclose(again(image0, image1).sim, sims[1], atol=0.05)
    kinds = {type(m) for m in net.modules()} & {nn.BatchNorm2d, nn.GroupNorm}
    assert kinds == {nn.BatchNorm2d if "norm" in choice else nn.GroupNorm}


def test_the_gap_is_in_the_lower_half_and_at_the_top_of_the_moving_image_alone():
    plain, faded, spot, both, prepared = (p.image1.astype(float) for p in gap_probes(TINY))
    low, high = np.s_[40:], np.s_[:24]
    assert faded[low].std() < 0.6 * plain[low].std() and faded[high].std() > 0.9 * plain[high].std()
    assert prepared[low].std() < 0.8 * both[low].std() < 0.5 * plain[low].std()
    assert prepared[low].std() < 0.15 * plain[low].std()
    changed = np.abs(spot - plain)
    assert changed[4:22, 22:42].mean() > 3 * changed[48:].mean()


def test_the_study_runs_in_pieces_and_goes_on(tmp_path):
    def go(most, settings=TINY):
        return run_factors(str(tmp_path / "a.json"), str(tmp_path / "cache"), ["ill"], most, 1, settings)

    assert [run["seed"] for run in go(0)["runs"]] == []
    assert [run["seed"] for run in go(1)["runs"]] == [200]
    both = go(None)
    assert [run["seed"] for run in both["runs"]] == [200, 201] and both["planned"] == 2 * len(
        all_conditions()
    )
    assert go(None) == both
    run = both["runs"][0]
    assert run["condition"] == asdict(ILL) and list(run["gaps"]) == list(GAPS) and run["steps"] == 1
    with pytest.raises(FileError, match="other settings"):
        go(None, replace(TINY, steps=2))


def test_a_run_that_runs_out_of_time_ends_and_says_so(tmp_path):
    short = replace(TINY, seeds=(200,), epochs=50, minutes=1e-6)
    result = run_factors(str(tmp_path / "a.json"), str(tmp_path / "cache"), ["ill"], None, 1, short)
    assert result["runs"][0]["epochs"] == 1
    assert "1 of them were cut off" in collapse_factors.how_much_is_done(result)


def test_ends_are_counted_where_they_are():
    class Pass:
        figures = {name: np.array([0.5]) for name in (*collapse_factors.PARTS, "error_px")}

        def find(self, probe):
            return 0

        def lines(self, number):
            points = np.array([[50.0, 20.0], [50.0, 21.0], [10.0, 90.0], [10.0, 30.0]])
            return collapse_factors_matches(points), None

    def collapse_factors_matches(points):
        from loftr_curriculum.model.config import Matches

        return Matches(points, points, np.ones(len(points)))

    probe = replace(gap_probes(TINY)[0], image1=np.zeros((100, 100), np.int8), kind="none")
    recording = type("Told", (), {"probes": [probe], "records": [Pass()] * 4})()
    found = figures_of_gap(recording, "none")
    assert (found["spot_share"], found["faded_share"]) == (0.5, 0.25)
    assert found["curve"] == [0.5] * 4 and found["by_eye"] == [0.5]


@pytest.mark.parametrize("seed", [3, 4])
def test_length_without_agreement_bundles_and_the_cosine_does_not(seed):
    both = contrast_of(*SCENES["both"])
    product, cosine = (look(learn(kind, seed=seed), both, 3.0) for kind in ("product", "cosine"))
    assert product["collapse index"] > 0.39 > 2 * cosine["collapse index"]
