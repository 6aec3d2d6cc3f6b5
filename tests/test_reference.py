"""Guards of the reference variant.

kornia's answer with kornia's weights, guidance at both sites, training, published format, no silent download.
"""

import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from kornia.feature import LoFTR
from kornia.feature.loftr.loftr import default_cfg
from safetensors.torch import save_file

from loftr_curriculum.cli import read_settings
from loftr_curriculum.data.batch import PairBatch
from loftr_curriculum.geometry import Grid, similarity
from loftr_curriculum.model.config import PUBLISHED, REFERENCE, Guidance, MatcherConfig
from loftr_curriculum.model.reference import ReferenceMatcher, vessel_weight
from loftr_curriculum.model.stages import off_border
from loftr_curriculum.model.weights import (
    find_published,
    load_matcher,
    load_reference,
    make_matcher,
    save_matcher,
)
from loftr_curriculum.training.config import TrainConfig
from loftr_curriculum.training.module import PL_LoFTR


@pytest.fixture(scope="module")
def both():
    "kornia's LoFTR and ours with the same random weights, statistics of the norms included."
    torch.manual_seed(0)
    config = copy.deepcopy(default_cfg)
    config["match_coarse"]["thr"] = 0.0
    theirs, ours = LoFTR(None, config=config).eval(), ReferenceMatcher().eval()
    for m in theirs.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.8, 1.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def images(size0, size1=None, batch=1, seed=0):
    "Two images in [0, 1] of the same noise, one moved by whole cells, so that random weights find matches."
    size1 = size1 or size0
    big = torch.rand(
        batch,
        1,
        max(size0[0], size1[0]) + 16,
        max(size0[1], size1[1]) + 16,
        generator=torch.Generator().manual_seed(seed),
    )
    return big[..., : size0[0], : size0[1]], big[..., 8 : 8 + size1[0], 16 : 16 + size1[1]]


def kornia_says(net, given):
    conf = []
    hook = net.coarse_matching.register_forward_hook(
        lambda module, args, out: conf.append(args[2]["conf_matrix"])
    )
    with torch.no_grad():
        said = net(given)
    hook.remove()
    return conf[0], said


def prepared(image):
    return 2 * image - 1


@pytest.mark.parametrize(
    "size0, size1", [((96, 96), None), ((72, 120), None), ((64, 112), (104, 80)), ((101, 75), (90, 84))]
)
def test_confidence_and_matches_are_kornias(both, size0, size1):
    theirs, ours = both
    im0, im1 = images(size0, size1)
    conf, said = kornia_says(theirs, {"image0": im0, "image1": im1})
    with torch.no_grad():
        result = ours(prepared(im0), prepared(im1))
    (found,) = ours.match(prepared(im0), prepared(im1), threshold=0.0)
    assert (result.conf_matrix - conf).abs().max() < 1e-4 * conf.max()
    assert len(found) == len(said["keypoints0"]) > 3
    assert np.abs(found.points0 + 0.5 - said["keypoints0"].numpy()).max() < 1e-3
    assert np.abs(found.points1 + 0.5 - said["keypoints1"].numpy()).max() < 1e-2
    assert np.abs(found.confidence - said["confidence"].numpy()).max() < 1e-5


def test_a_pair_gives_alone_what_it_gives_in_a_batch(both):
    _, ours = both
    im0, im1 = (prepared(x) for x in images((72, 96), batch=3))
    fov = torch.ones(3, 72, 96, dtype=torch.bool)
    fov[1, :, 64:] = False
    together = ours.match(im0, im1, fov, threshold=0.0)
    for k, batched in enumerate(together):
        (alone,) = ours.match(im0[k : k + 1], im1[k : k + 1], fov[k : k + 1], threshold=0.0)
        assert len(alone) > 3 and np.array_equal(alone.points0, batched.points0)
        assert (
            np.abs(alone.points1 - batched.points1).max() < 1e-3
            and np.abs(alone.confidence - batched.confidence).max() < 1e-4
        )


def test_padding_as_a_field_of_view_is_kornias_mask(both):
    theirs, ours = both
    im0, im1 = images((96, 112), batch=2)
    fov0, fov1 = torch.ones(2, 2, 96, 112, dtype=torch.bool).unbind(0)
    fov0[0, 80:], fov0[1, :, 88:], fov1[0, :, 96:], fov1[1, 64:] = False, False, False, False
    conf, said = kornia_says(
        theirs, {"image0": im0, "image1": im1, "mask0": fov0.float(), "mask1": fov1.float()}
    )
    with torch.no_grad():
        result = ours(prepared(im0), prepared(im1), fov0, fov1)
    found = ours.match(prepared(im0), prepared(im1), fov0, fov1, threshold=0.0)
    assert (result.conf_matrix - conf).abs().max() < 1e-4 * conf.max()
    p0, p1 = (np.concatenate([getattr(m, name) for m in found]) + 0.5 for name in ("points0", "points1"))
    assert len(p0) == len(said["keypoints0"]) > 3
    assert (
        np.abs(p0 - said["keypoints0"].numpy()).max() < 1e-3
        and np.abs(p1 - said["keypoints1"].numpy()).max() < 1e-2
    )


def test_a_long_image_is_shrunk_and_its_points_come_home(both):
    _, ours = both
    im0, im1 = (
        torch.nn.functional.interpolate(im, scale_factor=2, mode="nearest") for im in images((64, 96))
    )
    small = ReferenceMatcher(replace(REFERENCE, coarse_side=96)).eval()
    small.load_state_dict(ours.state_dict())
    (found,) = small.match(prepared(im0), prepared(im1), threshold=0.0)
    cells = (
        found.points0 - (-1 + 0.5)
    ) / 16  # at half the size a cell stands for pixel 8 c - 0.5, and so for 16 c - 0.5
    assert len(found) > 3 and np.allclose(cells, cells.round(), atol=1e-4)
    (same,) = small.match(prepared(im0), prepared(im0), threshold=0.0)
    assert (
        len(same) > 3 and (np.abs(same.points1 - same.points0).max(1) <= 8).mean() > 0.9
    )  # two fine samples of the shrunk image: the window of the same cell


def test_guidance_acts_at_each_site_as_a_bias_on_logits(both):
    _, ours = both
    im0, im1 = (prepared(x) for x in images((64, 80)))
    mask0, mask1 = (
        (torch.rand(2, 1, 64, 80, generator=torch.Generator().manual_seed(2)) > 0.9).float().unbind(0)
    )
    with torch.no_grad():
        plain = ours(im0, im1).sim
        similarity_only = ours(
            im0, im1, mask0=mask0, mask1=mask1, guidance=Guidance(2.0, in_attention=False)
        ).sim
        attention_only = ours(
            im0, im1, mask0=mask0, mask1=mask1, guidance=Guidance(2.0, in_similarity=False)
        ).sim
        full = ours(
            im0, im1, mask0=mask0 * 0 + 1, mask1=mask1 * 0 + 1, guidance=Guidance(2.0, in_similarity=False)
        ).sim
    w0, w1 = (vessel_weight(m, Grid(8, 10, 8, offset=0)).flatten(1) for m in (mask0, mask1))
    assert torch.allclose(similarity_only - plain, 2 * w0[:, :, None] * w1[:, None, :], atol=1e-4)
    assert (attention_only - plain).abs().max() > 1e-3
    assert torch.allclose(full, plain, atol=1e-3)  # a constant bias cancels


def test_a_black_image_gives_no_match_and_no_nan(both):
    _, ours = both
    im0, im1 = (prepared(x) for x in images((64, 64)))
    dark = torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        assert not ours(im0 * 0, im1, dark).log_conf.isnan().any()
    assert len(ours.match(im0 * 0, im1, dark, threshold=0.0)[0]) == 0
    assert not off_border(Grid(3, 20, 8), 2).any()


def a_step(precision, guidance=Guidance(2.0, 10.0)):
    torch.manual_seed(0)
    module = PL_LoFTR(TrainConfig(matcher=MatcherConfig("reference")))
    module.log, module.guidance = lambda *a, **k: None, guidance
    g = torch.Generator().manual_seed(1)
    image0, image1 = torch.rand(2, 2, 1, 64, 64, generator=g).mul(2).sub(1).unbind(0)
    mask = (torch.rand(2, 64, 64, generator=g) > 0.8).float()
    T = torch.from_numpy(np.stack([similarity(a, 1.1, (3, -2), (31.5, 31.5)) for a in (0, 10)])).float()
    batch = PairBatch(
        image0=image0,
        image1=image1,
        mask0=mask,
        mask1=mask,
        fov0=mask >= 0,
        fov1=mask >= 0,
        fixed_to_moving=T,
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = module.training_step(batch, 0)
    loss.backward()
    return module, loss


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_guided_step_trains_every_weight(precision):
    module, loss = a_step(precision)
    assert loss.isfinite()
    for name, p in module.matcher.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert [n for n, p in module.matcher.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_the_published_format_opens_by_file_and_what_was_made_of_it_too(both, tmp_path):
    theirs, _ = both
    state = theirs.state_dict()
    torch.save({"state_dict": state}, tmp_path / "kornia.ckpt")
    torch.save(
        {"state_dict": {f"matcher.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "minima.ckpt"
    )
    save_file({k: v.contiguous() for k, v in state.items()}, str(tmp_path / "own.safetensors"))
    for name in ("kornia.ckpt", "minima.ckpt", "own.safetensors"):
        m = load_matcher(tmp_path / name)
        assert m.config == REFERENCE and not m.training and m.facts == {"source": name}
        assert all(torch.equal(a, state[k]) for k, a in m.state_dict().items())
    m = load_reference(tmp_path / "kornia.ckpt", temp_bug_fix=True)
    assert m.config.temp_bug_fix and not torch.equal(m.pos_encoding.pe, theirs.pos_encoding.pe)
    save_matcher(tmp_path / "tuned.safetensors", m, {"steps": 1})
    again = load_matcher(tmp_path / "tuned.safetensors")
    assert again.config == m.config and torch.equal(again.pos_encoding.pe, m.pos_encoding.pe)
    assert all(torch.equal(a, state[k]) for k, a in again.state_dict().items())


def test_files_that_are_not_what_they_should_be_are_named(both, tmp_path):
    state = both[0].state_dict()
    torch.save({"state_dict": {k: v for k, v in state.items() if "layer3" not in k}}, tmp_path / "part.ckpt")
    torch.save({"state_dict": state, "config": object()}, tmp_path / "code.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "alien.ckpt")
    for name in ("part.ckpt", "code.ckpt", "alien.ckpt"):
        with pytest.raises(ValueError, match=name):
            load_matcher(tmp_path / name)


def test_nothing_is_downloaded_unless_it_is_asked_for(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "kornia.core.download.download_file_from_url",
        lambda url: fetched.append(url) or str(tmp_path / "fetched.ckpt"),
    )
    for name in PUBLISHED:
        for load in (load_reference, load_matcher):
            with pytest.raises(FileNotFoundError, match="download=True"):
                load(name)
    make_matcher(REFERENCE)
    assert not fetched
    assert find_published("outdoor", download=True) == tmp_path / "fetched.ckpt" and len(fetched) == 1


def test_a_name_finds_torchs_cache_and_its_own_positions(both, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(
        {"state_dict": both[0].state_dict()}, tmp_path / "hub" / "checkpoints" / "loftr_indoor_ds_new.ckpt"
    )
    assert load_reference("indoor_new").config.temp_bug_fix and load_matcher("indoor_new").config.temp_bug_fix


def test_the_command_line_chooses_the_variant_and_fine_tunes_a_published_file(both, tmp_path):
    torch.save({"state_dict": both[0].state_dict()}, tmp_path / "theirs.ckpt")
    init = ["--init", str(tmp_path / "theirs.ckpt")]
    module = PL_LoFTR(read_settings(TrainConfig, ["--matcher.variant", "reference", *init]))
    assert module.matcher.training and torch.equal(
        module.matcher.backbone.conv1.weight, both[0].backbone.conv1.weight
    )
    assert module.hparams["matcher"]["variant"] == "reference"
    with pytest.raises(ValueError, match="--matcher.variant reference"):
        PL_LoFTR(read_settings(TrainConfig, init))
    with pytest.raises(SystemExit):
        read_settings(TrainConfig, ["--matcher.variant", "reference", "--matcher.layers", "2"])


def test_fast_matching_does_not_import_kornia():
    code = """
import sys
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.weights import make_matcher
make_matcher(MatcherConfig())
sys.exit('kornia' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
