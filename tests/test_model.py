"Guards of the model room: sizes, batching, gradients, guidance for both kinds of attention, weights files."
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from loftr_curriculum.geometry import similarity
from loftr_curriculum.model.config import UNGUIDED, Guidance, MatcherConfig
from loftr_curriculum.model.fine import refine
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.model.weights import load_matcher, save_matcher
from loftr_curriculum.training.losses import matching_loss
from loftr_curriculum.training.supervision import supervise

TINY = dict(dims=(8, 16, 32), layers=2)


def tiny(attention="softmax", **kw):
    torch.manual_seed(0)
    return Matcher(MatcherConfig(**TINY, attention=attention, **kw)).eval()


def pair(size=(64, 80), batch=2):
    g = torch.Generator().manual_seed(1)
    image0, image1 = torch.randn(2, batch, 1, *size, generator=g).unbind(0)
    mask0, mask1 = (torch.rand(2, batch, *size, generator=g) > 0.9).float().unbind(0)
    return dict(image0=image0, image1=image1, mask0=mask0, mask1=mask1)


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_guidance_acts_at_both_sites_and_at_none_when_off(attention):
    net, p = tiny(attention), pair()
    with torch.no_grad():
        sim = lambda **kw: net(**{**p, **kw}).sim
        plain = net(p["image0"], p["image1"]).sim
        for site in ("in_attention", "in_similarity"):
            assert (sim(guidance=Guidance(2.0, **{site: False})) - plain).abs().max() > 1e-3
        none, empty = dict(guidance=Guidance(0.0)), {k: p[k] * 0 for k in ("mask0", "mask1")}
        assert torch.equal(sim(**none), plain)
        assert torch.equal(sim(guidance=Guidance(2.0), **empty), plain)
        full = net(**{**p, "mask0": p["mask0"] * 0 + 1, "mask1": p["mask1"] * 0 + 1}, guidance=Guidance(2.0)).log_conf
        assert torch.allclose(full, net(p["image0"], p["image1"]).log_conf, atol=1e-5 * 20)


def test_linear_attention_with_a_bias_is_explicit_kernelised_attention():
    from loftr_curriculum.model.attention import attend_linear

    q, k, v = torch.randn(3, 2, 4, 70, 16, generator=torch.Generator().manual_seed(3)).unbind(0)
    b = 3 * torch.rand(2, 70)
    phi = lambda x: torch.nn.functional.elu(x) + 1
    w = torch.einsum("bhnd,bhmd->bhnm", phi(q), phi(k)) * b.exp()[:, None, None]
    out = attend_linear(q, k, v, b, torch.ones(2, 70, dtype=torch.bool))
    assert (out - w / w.sum(-1, keepdim=True) @ v).abs().max() < 1e-5


@pytest.mark.parametrize("size0, size1", [((64, 64), (64, 64)), ((65, 130), (97, 64)), ((16, 200), (48, 48)), ((128, 100), (128, 100))])
def test_any_two_sizes_give_matches_inside_the_images(size0, size1):
    net = tiny(threshold=0.0)
    m = net.match(torch.randn(1, 1, *size0), torch.randn(1, 1, *size1))[0]
    assert len(m) and (m.points0 >= -0.5).all() and (m.points0 <= np.array(size0[::-1]) - 0.5).all()
    assert m.points0.dtype == np.float64 and (m.confidence > 0).all() and (m.confidence <= 1).all()


def test_a_pair_gives_alone_what_it_gives_in_a_batch():
    net, p = tiny(), pair(batch=3)
    with torch.no_grad():
        together = net(p["image0"], p["image1"]).log_conf
        for k in range(3):
            alone = net(p["image0"][k : k + 1], p["image1"][k : k + 1]).log_conf
            assert torch.allclose(alone[0], together[k], atol=1e-4)


def test_padding_to_a_multiple_of_16_does_not_shift_coordinates():
    net = tiny(threshold=0.0)
    image = torch.randn(1, 1, 64, 64)
    m = net.match(image, image)[0]
    assert ((m.points0 - 3.5) % 8 == 0).all()
    odd = net.match(image[..., :59, :61], image[..., :59, :61])[0]
    assert ((odd.points0 - 3.5) % 8 == 0).all() and odd.points0.max() <= 61


def test_the_fine_window_is_in_pixels_of_the_moving_image():
    _, sigma = refine(torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32), torch.tensor([0]), torch.tensor([[30.0, 30.0]]), torch.tensor([[30.0, 30.0]]), 3)
    assert sigma.item() == pytest.approx((2 * 4 * 4.0) ** 0.5, rel=1e-4)  # uniform over 7 x 7 samples, 2 px apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_losses_and_gradients_stay_finite(dtype, attention):
    net = tiny(attention).train()
    optimizer, T = torch.optim.AdamW(net.parameters(), 1e-3), torch.tensor(similarity(12, 1.1, (3, 4), (32, 32)), dtype=torch.float32)[None].repeat(2, 1, 1)
    for step in range(12):
        p = pair((64, 64))
        fov = torch.ones(2, 64, 64, dtype=torch.bool)
        if step == 5:
            fov[0] = False
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            r = net(**p, fov0=fov, guidance=Guidance(2.0, 10.0))
        t = supervise(T, r.grid0, r.grid1, r.seen0, r.seen1)
        loss = matching_loss(r, t, p["mask0"], p["mask1"], torch.Generator().manual_seed(step), Guidance(2.0, 10.0)).total
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(q.grad.isfinite().all() for q in net.parameters() if q.grad is not None), step
        optimizer.step()


def test_every_parameter_learns():
    net, p = tiny().train(), pair((64, 64))
    r = net(p["image0"], p["image1"])
    t = supervise(torch.eye(3).repeat(2, 1, 1), r.grid0, r.grid1, r.seen0, r.seen1)
    matching_loss(r, t, p["mask0"], p["mask1"], torch.Generator().manual_seed(0), UNGUIDED).total.backward()
    assert [n for n, q in net.named_parameters() if q.grad is None or not q.grad.abs().sum() > 0] == []


def test_weights_survive_the_file_and_bad_files_are_named(tmp_path):
    net, path = tiny(), tmp_path / "w.safetensors"
    save_matcher(path, net, {"steps": 3})
    again = load_matcher(path)
    assert again.config == net.config and again.facts == {"steps": 3}
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-3), name
    for name, write in (("cut.safetensors", lambda f: f.write_bytes(path.read_bytes()[:100])), ("other.ckpt", lambda f: torch.save({"state_dict": {}}, f))):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_matcher(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_matcher(tmp_path / "nothing.safetensors")


def test_configurations_that_cannot_work_say_so():
    for bad in (dict(attention="flash"), dict(heads=3), dict(threshold=1.0)):
        with pytest.raises(ValueError, match="expected"):
            MatcherConfig(**bad)
    assert json.loads(json.dumps(asdict(MatcherConfig())))["layers"] == 4
