"""Losses and gradients stay finite, from scratch and in every precision.

The inputs are those that break matchers of this family (zju3dv/LoFTR issues 188, 189 and 285: NaN at
16 bits, fills beyond the range of float16).
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from loftr_curriculum.geometry import Grid, similarity
from loftr_curriculum.model.attention import ATTEND
from loftr_curriculum.model.coarse import coarse_similarity, dual_softmax, mutual_maxima
from loftr_curriculum.model.config import UNGUIDED, Guidance, MatcherConfig
from loftr_curriculum.model.fine import (
    FlowHead,
    affine_from_flow,
    consensus,
    perturb,
    predict_flow,
    warp_features,
)
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.training.losses import coarse_loss, matching_loss
from loftr_curriculum.training.supervision import Targets, supervise

SIDE = 64
NEAR = similarity(12, 1.1, (3, 4), (32, 32))  # half-way overlap
AWAY = similarity(0, 1.0, (900, 900))  # nothing is seen by both: no positive exists
NET = MatcherConfig(dims=(8, 16, 16), heads=2, layers=1)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch(seed, device="cpu", pairs=2):
    g = torch.Generator().manual_seed(seed)
    image0, image1 = torch.rand(2, pairs, 1, SIDE, SIDE, generator=g).mul(2).sub(1).unbind(0)
    mask0, mask1 = (torch.rand(2, pairs, SIDE, SIDE, generator=g) > 0.85).float().unbind(0)
    fov0, fov1 = torch.ones(2, pairs, SIDE, SIDE, dtype=torch.bool).unbind(0)
    given = dict(image0=image0, image1=image1, mask0=mask0, mask1=mask1, fov0=fov0.clone(), fov1=fov1.clone())
    return {k: v.to(device) for k, v in given.items()}


def blind(b):
    b["fov0"][0] = False
    b["image0"][0] = 0


def blind_everywhere(b):
    b["fov0"][:], b["fov1"][:], b["image0"][:], b["image1"][:] = False, False, 0, 0


def one_colour(b):
    b["image0"][:], b["image1"][1:] = 0.5, -1


def all_vessel(b):
    b["mask0"][:], b["mask1"][:] = 1, 1


def no_vessel(b):
    b["mask0"][:], b["mask1"][:] = 0, 0


def half_vessel(b):
    b["mask0"][..., : SIDE // 2], b["mask1"][..., SIDE // 2 :] = 1, 1


TAUGHT = Guidance(2.0, 10.0)
CASES = {  # what is done to the batch, the true map, the guidance
    "plain": (None, NEAR, UNGUIDED),
    "taught": (None, NEAR, TAUGHT),
    "one image fully masked": (blind, NEAR, TAUGHT),
    "both images fully masked": (blind_everywhere, NEAR, TAUGHT),
    "images of one colour": (one_colour, NEAR, TAUGHT),
    "no positive": (None, AWAY, TAUGHT),
    "all vessel": (all_vessel, NEAR, TAUGHT),
    "no vessel": (no_vessel, NEAR, TAUGHT),
    "lambda 20": (half_vessel, NEAR, Guidance(20.0, 10.0)),
}


def loss_of(net, case, seed, cast=None, device="cpu"):
    change, T, guidance = CASES[case]
    b = batch(seed, device)
    if change:
        change(b)
    with nullcontext() if cast is None else torch.autocast(device, cast):
        r = net(**b, guidance=guidance)
    T = torch.tensor(T, dtype=torch.float32, device=device)[None].repeat(2, 1, 1)
    targets = supervise(T, r.grid0, r.grid1, r.seen0, r.seen1)
    draw = torch.Generator().manual_seed(seed)
    return matching_loss(net, r, targets, b["mask0"], b["mask1"], draw, guidance=guidance)


def walk(net, steps, cast=None, device="cpu", scaler=None):
    "Train on the cases in turn; the numbers of the steps whose loss or gradients were not finite."
    optimizer, bad = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0), []
    for step in range(steps):
        case = list(CASES)[step % len(CASES)]
        loss = loss_of(net, case, step, cast, device).total
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if not (loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())):
            bad.append((step, case))
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
    return bad


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention, steps", [("softmax", 100), ("linear", 18)])
def test_training_from_scratch_stays_finite(attention, steps, cast):
    torch.manual_seed(0)
    net = Matcher(replace(NET, attention=attention))
    start = [p.detach().clone() for p in net.parameters()]
    bad = walk(net, steps, cast)
    assert bad == []
    assert all(not torch.equal(a, b) for a, b in zip(start, net.parameters()))


@CUDA
@pytest.mark.parametrize("attention", ["softmax", "linear"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_thousand_steps_on_a_gpu_stay_finite(attention, cast):
    torch.manual_seed(0)
    scaler = (
        torch.amp.GradScaler("cuda", init_scale=128.0, growth_interval=10**6)
        if cast == torch.float16
        else None
    )
    bad = walk(Matcher(replace(NET, attention=attention)).cuda(), 1000, cast, "cuda", scaler)
    assert bad == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_each_hard_case_by_itself(case, cast):
    torch.manual_seed(0)
    net = Matcher(NET)
    loss = loss_of(net, case, 0, cast)
    loss.total.backward()
    assert all(getattr(loss, k).isfinite() for k in ("total", "positive", "negative", "fine"))
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    if case == "no positive":
        assert loss.positive == 0 and loss.fine == 0 and loss.negative > 0
    if case == "both images fully masked":
        assert loss.total == 0
    change, _, guidance = CASES[case]
    b = batch(0)
    if change:
        change(b)
    with nullcontext() if cast is None else torch.autocast("cpu", cast):
        for k, m in enumerate(net.eval().match(**b, guidance=guidance, threshold=0.0)):
            assert all(torch.from_numpy(a).isfinite().all() for a in (m.points0, m.points1, m.confidence))
            assert (len(m) == 0) == (not (b["fov0"][k].any() and b["fov1"][k].any()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_attention_under_a_full_mask_and_large_logits(attention, dtype):
    "The lowest half number plus a negative logit must not become -inf in a whole row: softmax would be nan."
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 12, 8, generator=g).mul(12).to(dtype).requires_grad_().unbind(0)
    seen = torch.ones(2, 12, dtype=torch.bool)
    seen[0] = False
    out = ATTEND[attention](q, k, v, torch.full((2, 12), 20.0), seen)
    assert out.dtype == dtype and out.isfinite().all()
    low = torch.full((1, 2, 12, 8), -12.0, dtype=dtype)
    assert (
        ATTEND[attention](low, -low, v[:1], torch.zeros(1, 12), seen[:1]).isfinite().all()
    )  # all logits -400
    seen[1, 5:] = False
    some = ATTEND[attention](q, k, v, torch.zeros(2, 12), seen)
    hidden = torch.where(seen[:, None, :, None], v, -v)
    assert torch.equal(
        some[1], ATTEND[attention](q, k, hidden, torch.zeros(2, 12), seen)[1]
    )  # what is not seen is not read


def test_what_is_not_seen_has_no_confidence_and_no_match():
    f = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = torch.arange(20)[None] < 12
    sim = coarse_similarity(f, f, torch.tensor(10.0), seen, seen)
    assert sim.dtype == torch.float32 and sim.isfinite().all()
    conf = dual_softmax(sim).exp()
    assert conf.isfinite().all() and (conf[0, 12:] == 0).all() and (conf[0, :, 12:] == 0).all()
    none = torch.zeros(1, 20, dtype=torch.bool)
    blind = coarse_similarity(f, f, torch.tensor(10.0), none, none)
    assert not dual_softmax(blind).isnan().any() and len(mutual_maxima(blind, none, none, 0.0)[0]) == 0


def links(forward, backward, n):
    positive = torch.zeros(1, n, n, dtype=torch.bool)
    for i, j in enumerate(forward):
        if j >= 0:
            positive[0, i, j] = True
    points = torch.zeros(1, n, 2)
    return Targets(
        torch.tensor([forward]),
        torch.tensor([backward]),
        torch.eye(3)[None],
        points,
        points,
        positive,
        ~positive,
    )


@pytest.mark.parametrize("right", [True, False])
def test_confidence_of_exactly_zero_and_one_has_a_finite_loss(right):
    "Logits 400 apart: the confidence is 1 or 0 in float32, its logarithm must come from the logits."
    n = 6
    sim = (400 * torch.eye(n) * (1 if right else -1))[None].requires_grad_()
    conf = dual_softmax(sim).exp()[0].diagonal()
    assert (conf == (1 if right else 0)).all()
    diagonal = list(range(n))
    positive, negative = coarse_loss(
        sim, links(diagonal, diagonal, n), torch.zeros(1, n), torch.zeros(1, n), 10.0
    )
    (positive + negative).backward()
    assert sim.grad.isfinite().all() and negative.isfinite()
    assert positive.item() == pytest.approx(
        0 if right else 400 + torch.tensor(n - 1.0).log().item(), abs=1e-3
    )
    wrong = links([-1] * n, [-1] * n, n)
    _, certain = coarse_loss(
        sim,
        replace(wrong, negative=torch.ones(1, n, n, dtype=torch.bool)),
        torch.zeros(1, n),
        torch.zeros(1, n),
        1.0,
    )
    assert certain.isfinite() and (certain > 0.5) == right


@pytest.mark.parametrize("sharpness", [0.0, 1e2, 1e4])
def test_flow_of_features_without_bounds_is_finite(sharpness):
    "Nothing to compare, far too much, a first answer that leaves the image: all that comes out stays finite."
    torch.manual_seed(0)
    head = FlowHead(8)
    torch.nn.init.normal_(head.out.weight)
    fine0, fine1 = (sharpness * torch.randn(2, 2, 4, 16, 16)).requires_grad_()
    seen = torch.ones(2, 1, 8, 8)
    T = torch.eye(3).repeat(2, 1, 1)
    T[1, 0, 2] = 1e4
    flow, log_sigma = predict_flow(head, fine0, fine1, seen, seen, T)
    (flow.norm(dim=1) * (-log_sigma).exp() + log_sigma).mean().backward()
    assert flow.isfinite().all() and log_sigma.abs().max() <= 4
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert affine_from_flow(T, flow, log_sigma, seen).isfinite().all()
    assert affine_from_flow(T, flow, log_sigma, seen * 0).isfinite().all()


def test_no_consensus_is_no_error():
    p = torch.rand(20, 2) * 100
    for q in (p * 0, p.flip(0) * 0 + 5, torch.full_like(p, float("nan")), p * torch.tensor([1.0, 0.0])):
        assert consensus(p, q) is None
    assert consensus(p[:3], p[:3]) is None and consensus(p[:0], p[:0]) is None


def test_guidance_of_lambda_20_is_finite_and_favours_vessels():
    torch.manual_seed(0)
    net, b = Matcher(NET).eval(), batch(0)
    no_vessel(b)
    half_vessel(b)
    with torch.no_grad():
        r = net(**b, guidance=Guidance(20.0))
        vessel0, vessel1 = torch.arange(64) % 8 < 4, torch.arange(64) % 8 >= 4  # the halves that are vessels

        def to_vessel(sim):
            return vessel1[sim[:, vessel0].argmax(2)]

        plain = net(b["image0"], b["image1"]).sim
    assert r.sim.isfinite().all() and r.conf_matrix.isfinite().all()
    assert to_vessel(r.sim).all() and not to_vessel(plain).all()


def test_the_truth_is_not_rounded_by_autocast():
    "bfloat16 has 8 bits: a point at 200 px would be known to a pixel."
    T = torch.tensor([[[0.9, -0.31, 40.3], [0.28, 1.1, -7.7], [0, 0, 1]]])
    seen = torch.ones(1, 1024, dtype=torch.bool)
    exact = supervise(T, Grid(32, 32, 8), Grid(32, 32, 8), seen, seen)
    near = perturb(T, (256, 256), torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = supervise(T, Grid(32, 32, 8), Grid(32, 32, 8), seen, seen)
        assert torch.equal(perturb(T, (256, 256), torch.Generator().manual_seed(0)), near)
    assert torch.equal(rounded.points1, exact.points1) and torch.equal(rounded.points0, exact.points0)
    x = torch.arange(64.0).expand(1, 1, 64, 64) * 4 + 1.5
    with torch.autocast("cpu", torch.bfloat16):
        warped = warp_features(x, T, (64, 64))
    assert torch.equal(warped, warp_features(x, T, (64, 64)))
