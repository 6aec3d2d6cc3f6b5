"""Guards of views made in batches.

The geometry, the look and the law are those of NumPy, and a pair is the same in every batch.
"""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from loftr_curriculum.data.config import DataConfig
from loftr_curriculum.data.device import (
    DeviceViews,
    apply_photometry_batch,
    collate_recipes,
    draw_grain,
    pack_photometry,
    smoothers,
)
from loftr_curriculum.data.module import PairDataModule
from loftr_curriculum.data.pairs import GeneratedSource
from loftr_curriculum.data.recipe import ViewSettings
from loftr_curriculum.geometry import Motion
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.weights import load_matcher
from loftr_curriculum.retina.config import MODES, EyeConfig, seeds_of
from loftr_curriculum.retina.modality import planes_for
from loftr_curriculum.retina.randomise import draw_photometry, randomise
from loftr_curriculum.retina.world import WorldBank
from loftr_curriculum.training.config import TrainConfig
from loftr_curriculum.training.run import train

SIZE = 96
TINY = DataConfig(
    worlds=2,
    val_worlds=1,
    size=64,
    pairs_per_epoch=6,
    val_pairs=2,
    batch_size=3,
    workers=0,
    render_workers=1,
    cache=None,
    eye=EyeConfig(size=256),
)


@pytest.fixture(scope="module")
def bank():
    return WorldBank(seeds_of("report", 2), EyeConfig(size=512), workers=1, progress=False)


def stream(g):
    return np.random.default_rng((3, g))


def recipe_of(source, g):
    return source.recipe(g, stream(g), (SIZE, SIZE), Motion(), grain=False)


def both(source, indices, device="cpu"):
    "Pairs drawn by NumPy, and the batch of the same seeds."
    recipes = collate_recipes([recipe_of(source, g) for g in indices]).to(device)
    pairs = [source.draw(g, stream(g), (SIZE, SIZE)) for g in indices]
    return pairs, DeviceViews(source, device)(recipes)


@pytest.mark.parametrize("deform", [0.0, 5.0])
def test_strength_0_is_cut_and_normalised_and_nothing_else(bank, deform):
    pairs, batch = both(GeneratedSource(bank, MODES, strength=0.0, deform=deform), range(12))
    for g, pair in enumerate(pairs):
        assert batch.mode[g] == pair.mode and batch.id[g] == pair.id
        np.testing.assert_allclose(batch.fixed_to_moving[g], pair.fixed_to_moving, rtol=1e-5, atol=1e-4)
        for k in ("0", "1"):
            assert np.array_equal(getattr(batch, "fov" + k)[g], getattr(pair, "fov" + k))
            assert np.abs(getattr(batch, "mask" + k)[g].numpy() - getattr(pair, "mask" + k)).mean() < 0.004
            assert (
                np.abs(getattr(batch, "image" + k)[g, 0].numpy() - getattr(pair, "image" + k)).mean() < 0.02
            )
        if deform:
            np.testing.assert_allclose(batch.map_0to1[g], pair.map_0to1, atol=1e-3)
            np.testing.assert_allclose(batch.map_1to0[g], pair.map_1to0, atol=1e-3)


def test_a_shifted_view_would_be_noticed(bank):
    pairs, batch = both(GeneratedSource(bank, MODES, strength=0.0), range(12))
    off = [
        np.abs(np.roll(batch.image0[g, 0].numpy(), 1, 1) - pair.image0).mean() for g, pair in enumerate(pairs)
    ]
    assert np.median(off) > 0.04


def test_time_stamps_are_those_of_numpy(bank):
    source = GeneratedSource(bank, MODES, strength=1.0)
    recipes = [recipe_of(source, g) for g in range(120)]
    stamped = [g for g in range(120) if any(view.stamp for view in recipes[g].views)]
    assert 1 <= len(stamped) <= 20
    recipe = collate_recipes([recipes[stamped[0]], recipes[stamped[0] + 1]])
    without = replace(recipe, ink=recipe.ink[:0], inked=recipe.inked[:0])
    views = DeviceViews(source, "cpu")
    a, b = (torch.stack([out.image0, out.image1]) for out in (views(recipe), views(without)))
    changed = (a != b).flatten(3).any(-1)[..., 0]
    assert changed[:, 0].any() and (changed.sum() == len(recipe.inked))


def test_the_law_of_200_views_is_that_of_numpy():
    gray = (
        0.5
        + 0.15
        * cv2.GaussianBlur(np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32), (0, 0), 2)
        * 5
    )
    gray, fov, n = np.clip(gray, 0, 1), np.ones((64, 64), bool), 200
    theirs = np.stack([randomise(gray, fov, np.random.default_rng(k)) for k in range(n)])
    drawn = [draw_photometry(np.random.default_rng((9, k)), (64, 64), grain=False) for k in range(n)]
    grain = torch.randn(n, 64, 64, generator=torch.Generator().manual_seed(0))
    grays, fovs = (torch.from_numpy(plane).expand(n, -1, -1) for plane in (gray, fov))
    mine = apply_photometry_batch(grays, fovs, pack_photometry(drawn), grain, smoothers(64)).numpy()

    def flipped(views):
        return np.mean([np.corrcoef(v.ravel(), gray.ravel())[0, 1] < 0 for v in views])

    def rough(views):
        return np.mean([np.abs(v[1:] - v[:-1]).mean() for v in views])

    assert mine.mean() == pytest.approx(theirs.mean(), abs=0.04)
    assert mine.std((1, 2)).mean() == pytest.approx(theirs.std((1, 2)).mean(), rel=0.12)
    assert rough(mine) == pytest.approx(rough(theirs), rel=0.12)
    assert flipped(mine) == pytest.approx(flipped(theirs), abs=0.08) and flipped(mine) > 0.05


def test_a_pair_is_the_same_again_and_in_other_company(bank):
    source = GeneratedSource(bank, MODES)
    batch, again, other = (both(source, indices)[1] for indices in (range(4), range(4), (7, 2)))
    assert torch.equal(batch.image0, again.image0)
    torch.testing.assert_close(batch.image1[2], other.image1[1], atol=2e-3, rtol=0)
    assert (batch.image0[0] - batch.image0[1]).abs().mean() > 0.05


def test_the_noise_of_the_two_views_and_of_two_pairs_differs():
    grain = draw_grain([1, 2, 1], SIZE, torch.device("cpu"))
    assert torch.equal(grain[:2], grain[4:])
    assert (
        max(abs(np.corrcoef(grain[i].ravel(), grain[j].ravel())[0, 1]) for i, j in ((0, 1), (0, 2), (1, 3)))
        < 0.05
    )


@pytest.mark.parametrize("deform", [0.0, 2.0])
def test_batches_have_the_keys_shapes_and_kinds_of_numpy_batches(deform):
    plain = PairDataModule(replace(TINY, deform=deform))
    plain.setup()
    device = PairDataModule(replace(TINY, deform=deform, on_device=True))
    device.train_pairs = type(plain.train_pairs)([(plain.train_pairs.sources[0], 1.0)], device.config)
    a, b = next(iter(plain.train_dataloader())), next(iter(device.train_dataloader()))
    b = device.on_after_batch_transfer(b, 0)

    def kind(batch):
        return {name: (tensor.shape, tensor.dtype) for name, tensor in batch.tensors().items()}

    assert kind(a) == kind(b)
    assert device.on_after_batch_transfer(a, 0) is a


def test_recipes_are_the_same_from_any_number_of_workers():
    alone = PairDataModule(replace(TINY, on_device=True, deform=2.0))
    alone.setup()
    spread = PairDataModule(replace(alone.config, workers=2))
    spread.train_pairs = alone.train_pairs
    for a, b in zip(alone.train_dataloader(), spread.train_dataloader(), strict=True):
        assert (a.world, a.seed, a.mode, a.id) == (b.world, b.seed, b.mode, b.id)
        for one, other in ((a, b), (a.photometry, b.photometry)):
            assert one.tensors().keys() == other.tensors().keys()
            assert all(torch.equal(one.tensors()[name], other.tensors()[name]) for name in one.tensors())


def test_files_cannot_be_mixed_in():
    with pytest.raises(ValueError, match="on_device"):
        replace(TINY, on_device=True, triplets="somewhere", share_generated=1.0)


def test_one_epoch_of_training_twice(tmp_path):
    data, net = replace(TINY, on_device=True), MatcherConfig(dims=(8, 16, 32), layers=1)
    runs = [
        train(
            TrainConfig(out=str(tmp_path / name), epochs=1, data=data, matcher=net, precision="32"),
            progress=False,
        )
        for name in "ab"
    ]
    assert np.isfinite(runs[0].metrics["train/loss_epoch"])
    a, b = (load_matcher(run.weights).state_dict() for run in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_pictures_of_the_cpu(bank):
    source = GeneratedSource(bank, MODES, strength=0.0)
    cpu, gpu = (both(source, range(6), device)[1] for device in ("cpu", "cuda"))
    assert gpu.image0.is_cuda
    for k in ("image0", "image1", "mask0", "mask1"):
        assert (getattr(gpu, k).cpu() - getattr(cpu, k)).abs().mean() < 2e-3
    loud = both(GeneratedSource(bank, MODES), range(6), "cuda")[1]
    assert torch.isfinite(loud.image0).all() and loud.image0.abs().max() <= 1


def test_lids_turns_and_new_modalities_are_those_of_numpy():
    modes = ("ir-fa", "cf-icga")
    eyes = EyeConfig(size=512, fields=(150, 200))
    bank = WorldBank(seeds_of("report", 2), eyes, workers=1, progress=False, planes=planes_for(modes))
    source = GeneratedSource(bank, modes, settings=ViewSettings(strength=0.0, gaze_deg=20))
    pairs, batch = both(source, range(10))
    recipes = [recipe_of(source, g) for g in range(10)]
    assert any(view.cover is not None for recipe in recipes for view in recipe.views)
    for g, pair in enumerate(pairs):
        assert np.abs(batch.image0[g, 0].numpy() - pair.image0).mean() < 0.03
        assert np.abs(batch.image1[g, 0].numpy() - pair.image1).mean() < 0.03
        assert np.array_equal(batch.fov1[g], pair.fov1)
        np.testing.assert_allclose(batch.map_0to1[g], pair.map_0to1, atol=1e-3)
