"""Guards of the attention maps.

They are what the layers computed, of the right image, token and head; lambda acts as the formula says.
"""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loftr_curriculum.model.attention_maps import TOKEN, attention_maps, evenness, share_on
from loftr_curriculum.model.config import REFERENCE, Guidance, MatcherConfig
from loftr_curriculum.model.guidance import mask_to_grid
from loftr_curriculum.model.matcher import Matcher

GUIDED = Guidance(vessel_soft_lambda=2.0)
HEADS = 2


def tiny(kind="softmax"):
    "A small matcher of which no two norms are alike."
    torch.manual_seed(0)
    matcher = Matcher(MatcherConfig(dims=(8, 16, 32), layers=2, heads=HEADS, attention=kind)).eval()
    with torch.no_grad():
        for p in matcher.parameters():
            p += 0.1 * torch.randn_like(p)
    return matcher


def a_pair(sizes=((64, 96), (80, 56))):
    "Images of two sizes with vessels; left tokens of image 0 and lower ones of image 1 are out of the field."
    g = torch.Generator().manual_seed(0)
    image0, image1 = (torch.rand(1, 1, *s, generator=g) * 2 - 1 for s in sizes)
    mask0, mask1 = ((torch.rand(1, *s, generator=g) > 0.8).float() for s in sizes)
    mask0[:, :, 48:64], mask1[:, :16] = 1, 0
    fov0, fov1 = (torch.ones(1, *s, dtype=torch.bool) for s in sizes)
    fov0[:, :, :TOKEN], fov1[:, 64:] = False, False
    return dict(image0=image0, image1=image1, fov0=fov0, fov1=fov1, mask0=mask0, mask1=mask1)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.parametrize("image", [0, 1])
def test_weights_reproduce_every_message(kind, image):
    matcher, pair = tiny(kind), a_pair()
    maps = [attention_maps(matcher, **pair, image=image, head=k, guidance=GUIDED) for k in range(HEADS)]
    layers = [*matcher.transformer.self_layers, *matcher.transformer.cross_layers]
    asked, sent = {}, {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args: asked.setdefault(m, []).append(args[1]))
        layer.out.register_forward_pre_hook(lambda m, args: sent.setdefault(m, []).append(args[0]))
    with torch.no_grad():
        matcher(**pair, guidance=GUIDED)
        for side, group in (("own", layers[:2]), ("other", layers[2:])):
            for n, layer in enumerate(group):
                source = asked[layer][image]
                values = layer.kv(layer.norm_k(source)).chunk(2, -1)[1].unflatten(-1, (HEADS, -1))[0]
                built = torch.cat(
                    [
                        torch.from_numpy(getattr(m, side)[n]).flatten(1) @ values[:, k]
                        for k, m in enumerate(maps)
                    ],
                    -1,
                )
                assert built.shape == sent[layer.out][image][0].shape
                assert (built - sent[layer.out][image][0]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_maps_sum_to_one_and_leave_out_what_is_not_seen(kind):
    m = attention_maps(tiny(kind), **a_pair(), guidance=GUIDED)
    assert m.own.shape == (2, 24, 4, 6) and m.other.shape == (2, 24, 5, 4)
    assert (
        not m.seen_own[:, 0].any()
        and m.seen_own[:, 1:].all()
        and not m.seen_other[4].any()
        and m.seen_other[:4].all()
    )
    for maps, seen in ((m.own, m.seen_own), (m.other, m.seen_other)):
        assert (
            np.allclose(maps.sum((2, 3)), 1, atol=1e-5)
            and (maps[..., ~seen] == 0).all()
            and (maps[..., seen] > 0).all()
        )


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.parametrize("head", [0, 1])
def test_lambda_multiplies_the_ratio_of_any_two_cells_and_lifts_the_share(kind, head):
    matcher, pair = tiny(kind), a_pair()
    cells = mask_to_grid(pair["mask0"], TOKEN)[0].numpy()
    by = {
        lam: attention_maps(matcher, **pair, head=head, guidance=Guidance(vessel_soft_lambda=lam))
        for lam in (0.0, 1.0, 2.0)
    }
    seen = by[0.0].seen_own
    assert np.ptp(cells[seen]) > 0.2
    first = {lam: m.own[0][:, seen].astype(float) for lam, m in by.items()}
    for lam in (1.0, 2.0):
        tilt = first[lam] / first[0.0] * np.exp(-lam * cells[seen])
        assert np.ptp(np.log(tilt), axis=1).max() < 1e-3
    shares = [share_on(by[lam].own[0], cells) for lam in (0.0, 1.0, 2.0)]
    assert (shares[0] < shares[1]).all() and (shares[1] < shares[2]).all()


def test_points_choose_tokens_and_heads_average():
    matcher, pair = tiny(), a_pair()
    every = attention_maps(matcher, **pair)
    some = attention_maps(matcher, **pair, points=[[95.4, 63], [-0.5, 16]])
    for side in ("own", "other"):
        maps, chosen = getattr(every, side), getattr(some, side)
        assert np.allclose(chosen, maps[:, [23, 6]], atol=1e-6) and not np.allclose(
            chosen, maps[:, [22, 7]], atol=1e-4
        )
    heads = [attention_maps(matcher, **pair, head=k).other for k in range(HEADS)]
    assert np.allclose(np.mean(heads, 0), every.other, atol=1e-6) and not np.allclose(*heads, atol=1e-4)


@pytest.mark.parametrize("sizes", [((64, 96), (80, 56)), ((64, 64), (64, 64))])
def test_the_images_change_places(sizes):
    matcher, pair = tiny(), a_pair(sizes)
    swapped = {k[:-1] + "10"[int(k[-1])]: v for k, v in pair.items()}
    a, b = (
        attention_maps(matcher, **pair, image=1, guidance=GUIDED),
        attention_maps(matcher, **swapped, image=0, guidance=GUIDED),
    )
    assert np.allclose(a.own, b.own, atol=1e-5) and np.allclose(a.other, b.other, atol=1e-5)
    assert np.array_equal(a.seen_own, b.seen_own) and np.array_equal(a.seen_other, b.seen_other)


def test_looking_leaves_no_trace():
    matcher, pair = tiny(), a_pair()
    with torch.no_grad():
        before = matcher(**pair).sim
        attention_maps(matcher, **pair, guidance=GUIDED)
        with pytest.raises(ValueError):
            attention_maps(matcher, **{**pair, "mask0": None}, guidance=GUIDED)
        assert torch.equal(matcher(**pair).sim, before)
    assert not any(m._forward_pre_hooks for m in matcher.modules())


def test_errors_say_what_was_expected():
    matcher, pair = tiny(), a_pair()
    with pytest.raises(ValueError, match="inside an image of 96 x 64"):
        attention_maps(matcher, **pair, points=[[96, 10]])
    with pytest.raises(ValueError, match="image 0 or 1"):
        attention_maps(matcher, **pair, image=2)
    with pytest.raises(ValueError, match="variant fast"):
        attention_maps(SimpleNamespace(config=REFERENCE), **pair)


def test_evenness_of_even_attention_is_one_whatever_the_field():
    for n in (3, 7, 20):
        seen = np.arange(20).reshape(4, 5) < n
        assert np.isclose(evenness(seen / n, seen), 1)
    assert evenness(np.eye(1, 20).reshape(4, 5), np.ones((4, 5), bool)) == 0


def test_drawing_needs_no_torch():
    code = "import sys, loftr_curriculum.report.attention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
