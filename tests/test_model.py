"Guards of the model room: sizes, batching, gradients, guidance for both kinds of attention, weights files."

import json
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loftr_curriculum.data.pairs import GeneratedSource
from loftr_curriculum.geometry import NEAR, Grid, apply_transform, resize_matrix
from loftr_curriculum.model.coarse import dual_softmax, mutual_maxima
from loftr_curriculum.model.config import VARIANTS, Guidance, MatcherConfig
from loftr_curriculum.model.fine import AGREE, FlowHead, affine_from_flow, predict_flow
from loftr_curriculum.model.guidance import mask_to_grid
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.model.stages import matched_cells, shrink_pair
from loftr_curriculum.model.weights import PACKAGED, load_matcher, make_matcher, save_matcher
from loftr_curriculum.retina.config import EyeConfig, seeds_of
from loftr_curriculum.retina.world import WorldBank
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

        def sim(**kw):
            return net(**{**p, **kw}).sim

        plain = net(p["image0"], p["image1"]).sim
        assert (sim(guidance=Guidance(2.0, in_similarity=False)) - plain).abs().max() > 1e-3
        m0, m1 = (mask_to_grid(p[k], 8).flatten(1) for k in ("mask0", "mask1"))
        assert torch.allclose(
            sim(guidance=Guidance(2.0, in_attention=False)) - plain,
            2 * m0[:, :, None] * m1[:, None],
            atol=1e-4,
        )  # as in the reference
        none, empty = dict(guidance=Guidance(0.0)), {k: p[k] * 0 for k in ("mask0", "mask1")}
        assert torch.equal(sim(**none), plain)
        assert torch.equal(sim(guidance=Guidance(2.0), **empty), plain)
        full = net(
            **{**p, "mask0": p["mask0"] * 0 + 1, "mask1": p["mask1"] * 0 + 1}, guidance=Guidance(2.0)
        ).log_conf
        assert torch.allclose(full, net(p["image0"], p["image1"]).log_conf, atol=1e-5 * 20)


def test_linear_attention_with_a_bias_is_explicit_kernelised_attention():
    from loftr_curriculum.model.attention import attend_linear

    q, k, v = torch.randn(3, 2, 4, 70, 16, generator=torch.Generator().manual_seed(3)).unbind(0)
    b = 3 * torch.rand(2, 70)

    def phi(x):
        return torch.nn.functional.elu(x) + 1

    w = torch.einsum("bhnd,bhmd->bhnm", phi(q), phi(k)) * b.exp()[:, None, None]
    out = attend_linear(q, k, v, b, torch.ones(2, 70, dtype=torch.bool))
    assert (out - w / w.sum(-1, keepdim=True) @ v).abs().max() < 1e-5


SIZES = [
    ((64, 64), (64, 64)),
    ((65, 130), (97, 64)),
    ((16, 200), (48, 48)),
    ((128, 100), (128, 100)),
    ((64, 2048), (333, 77)),
    ((100, 173), (700, 64)),
]


@pytest.mark.parametrize("size0, size1", SIZES)
def test_any_two_sizes_give_matches_inside_the_images(size0, size1):
    net = tiny(threshold=0.0, coarse_side=256)
    fov = [torch.ones(1, *s, dtype=torch.bool) for s in (size0, size1)]
    fov[0][..., : size0[1] // 4] = False
    masks = [(torch.rand(1, *s) > 0.8).float() for s in (size0, size1)]
    m = net.match(torch.randn(1, 1, *size0), torch.randn(1, 1, *size1), *fov, *masks, guidance=Guidance(2.0))[
        0
    ]
    assert m.points0[:, 0].min() > size0[1] // 4 - 5 * max(1, max(size0) / 256)
    assert len(m) and (m.points0 >= -0.5).all() and (m.points0 <= np.array(size0[::-1]) - 0.5).all()
    margin = 2 * AGREE * max(1, max(size1) / 256)  # the flow may lead a little beyond the border
    assert (m.points1 >= -margin).all() and (m.points1 <= np.array(size1[::-1]) + margin).all()
    assert m.points0.dtype == np.float64 and (m.confidence > 0).all() and (m.confidence <= 1).all()


@pytest.mark.parametrize("size, cap", [((64, 80), 512), ((100, 173), 512), ((100, 173), 96)])
def test_a_pair_gives_alone_what_it_gives_in_a_batch(size, cap):
    net, p = tiny(threshold=0.0, coarse_side=cap), pair(size, batch=3)
    torch.nn.init.normal_(net.flow_head.out.weight, std=0.1)  # it begins at zero, and would say nothing
    p["image0"], p["image1"] = (torch.cat([smooth(size, seed) for seed in range(3)]) for _ in range(2))
    fov = torch.ones(3, *size, dtype=torch.bool)
    fov[1, :, : size[1] // 3] = False
    with torch.no_grad():
        together = net(p["image0"], p["image1"], fov).log_conf
        matches = net.match(p["image0"], p["image1"], fov)
        for k in range(3):
            one = p["image0"][k : k + 1], p["image1"][k : k + 1], fov[k : k + 1]
            alone = net(*one).log_conf
            seen = alone[0] > -1e30
            assert (
                torch.equal(seen, together[k] > -1e30) and (alone[0] - together[k])[seen].abs().max() < 1e-4
            )
            m = net.match(*one)[0]
            assert (
                cap < max(size) or ((m.points1 - 3.5) % 8 != 0).any(1).mean() > 0.3
            )  # the flow has moved them
            assert np.array_equal(m.points0, matches[k].points0)
            assert (
                np.abs(m.points1 - matches[k].points1).max() < 1e-3
                and np.abs(m.confidence - matches[k].confidence).max() < 1e-4
            )


@cache
def eye(size):
    source = GeneratedSource(WorldBank(seeds_of("report", 1), EyeConfig(size=512), workers=0, progress=False))
    return torch.from_numpy(source.draw(0, np.random.default_rng(0), size, NEAR).image0)[None, None]


@pytest.mark.parametrize(
    "whole, size0, size1",
    [
        ((206, 219), (187, 201), (187, 201)),
        ((206, 219), (187, 201), (206, 219)),
        ((420, 430), (333, 350), (360, 401)),
    ],
)  # padded, of two sizes, and shrunk
def test_padding_and_shrinking_do_not_shift_coordinates(whole, size0, size1):
    if not PACKAGED.is_file():
        pytest.skip("no packaged weights in this checkout")
    image, (x, y) = eye(whole), (13, 6)
    m = load_matcher().match(
        image[..., y : y + size0[0], x : x + size0[1]], image[..., : size1[0], : size1[1]]
    )[0]
    off = m.points1 - m.points0 - (x, y)
    assert len(m) > 50 and np.abs(np.median(off, 0)).max() < 0.3 and (np.abs(off).max(1) < 1.5).mean() > 0.9


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("spread", [3, 60])  # within and beyond what exp holds in float32
def test_bands_of_rows_find_what_the_whole_matrix_holds(blocked, spread):
    sim = spread * torch.randn(2, 50, 33, generator=torch.Generator().manual_seed(2))
    seen0, seen1 = torch.ones(2, 50, dtype=torch.bool), torch.ones(2, 33, dtype=torch.bool)
    if blocked:
        seen0[0, :40], seen1[1] = False, False
        sim = sim.masked_fill(~(seen0[:, :, None] & seen1[:, None]), torch.finfo(sim.dtype).min)
    conf = dual_softmax(sim).exp()
    both = (conf == conf.amax(2, keepdim=True)) & (conf == conf.amax(1, keepdim=True)) & (conf > 1e-3)
    for band in (1, 77, 2**18):
        b, i, j, c = mutual_maxima(sim, seen0, seen1, 1e-3, band)
        assert torch.equal(torch.stack([b, i, j]), torch.stack(both.nonzero(as_tuple=True))) and len(b)
        assert torch.allclose(c, conf[b, i, j], rtol=1e-4)


def smooth(size, seed=0):
    coarse = torch.randn(1, 1, size[0] // 6, size[1] // 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False)


def test_an_enlarged_image_gives_the_matches_of_the_small_one_scaled():
    small, net = smooth((96, 120)), tiny(threshold=0.0, coarse_side=120)
    large = F.interpolate(small, (480, 600), mode="bilinear", align_corners=False)
    plain = net.match(small, small)[0]  # an untrained flow head leaves every match on the consensus
    T = resize_matrix((96, 120), (480, 600))
    for image0, image1, T0, T1 in (
        (large, large, T, T),
        (large, small, T, np.eye(3)),
        (small, large, np.eye(3), T),
    ):
        m = net.match(image0, image1)[0]
        want0, want1 = apply_transform(T0, plain.points0), apply_transform(T1, plain.points1)
        d0 = np.abs(want0[:, None] - m.points0).max(2)
        i, j = np.nonzero(d0 < 1e-3)
        assert len(i) > 0.7 * len(plain) and (d0.min(0) < 1e-3).mean() > 0.7
        assert np.median(np.abs(m.points1[j] - want1[i]).max(1)) < 0.05 * T1[0, 0]


def test_full_resolution_features_without_shrinking_are_the_ordinary_ones():
    net, image = tiny(), smooth((100, 173))
    with torch.no_grad():
        r = net(image, image)
        whole = net.whole_features((image, image), (r.tokens0, r.tokens1), [(100, 173)] * 2)
        for full, fine in zip(whole, (r.fine0, r.fine1)):
            assert (full - fine).abs().max() < 1e-4


def test_tokens_of_the_shrunk_image_stand_at_the_same_places_of_the_large_one():
    net, taken, size, small = tiny(), [], (150, 333), (58, 128)
    net.merge8.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    ramp = Grid(4, 8, 16).centres().T.reshape(1, 2, 4, 8)
    with torch.no_grad():
        net.whole_features([smooth(size)] * 2, [F.pad(ramp, (0, 0, 0, 0, 0, 30))] * 2, [small] * 2)
    want = apply_transform(resize_matrix(size, small), Grid(10, 21, 16).centres().double().numpy()).T.reshape(
        2, 10, 21
    )
    inside = (want >= 7.5).all(0) & (want[0] <= 119.5) & (want[1] <= 55.5)
    assert inside.sum() > 50 and np.abs(taken[0][0, :2].numpy() - want)[:, inside].max() < 1e-3


def known_flow(shift):
    "A head that reads a code of the position off the warped features: what is left of `shift`."

    class Known(FlowHead):
        def forward(self, f0, warped, seen):
            own = (f0 - warped)[:, :2, ::2, ::2] * seen[:, 1:]
            return own, own[:, 0] * 0

    return Known()


def test_full_resolution_refines_what_the_shrunk_images_left_open(monkeypatch):
    net, shift = tiny(threshold=0.0, coarse_side=128), torch.tensor([3.0, -2.0])
    image, c = smooth((512, 512)), Grid(128, 128, 4).centres().T.reshape(1, 2, 128, 128)
    maps = [c, c - shift.view(1, 2, 1, 1)]  # what image 1 shows at x stands at x - shift in image 0
    monkeypatch.setattr(net, "whole_features", lambda *_: maps)
    net.flow_head = known_flow(shift)
    m = net.match(image, image)[0]
    inner = ((m.points0 > 40) & (m.points0 < 470)).all(1)
    off = np.abs(m.points1 - m.points0 - shift.numpy()).max(1)
    assert (inner & (off < 8)).sum() > 50 and off[inner & (off < 8)].max() < 0.2


MEMORY = """
import torch
from loftr_curriculum.model.matcher import Matcher
torch.set_num_threads(1)
torch.manual_seed(0)
def status(what):
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return int(line.split()[1]) / 1024
net, image, full = Matcher().eval(), torch.randn(1, 1, {side} // 8, {side} // 8), []
image = torch.nn.functional.interpolate(image, ({side}, {side}), mode="bicubic")
own, net.whole_features = net.whole_features, lambda *a: full.append(1) or own(*a)
before = status("VmRSS")
net.match(image, image, threshold=0.0)
print(len(full), status("VmHWM") - before)
"""


def peak_mb(side):
    out = subprocess.run(
        [sys.executable, "-c", MEMORY.format(side=side)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(out[0]) == 1  # the whole images were looked at, which takes most of it
    return float(out[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_is_bounded_at_2048_pixels(record_property):
    used = peak_mb(2048)
    record_property("peak_mb", round(used))
    assert used < 2500


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pair_of_512_pixels_takes_little_memory():
    assert peak_mb(512) < 260


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_flow_is_in_pixels_of_the_fixed_image(scale):
    right = torch.tensor([[scale, 0, 5.0], [0, scale, -3.0], [0, 0, 1]])
    wrong = right @ torch.tensor([[1.0, 0, 4.0], [0, 1, 2.0], [0, 0, 1]])
    c0, c1 = (Grid(side, side, 4).centres() for side in (32, 80))
    fine0 = c0.T.reshape(1, 2, 32, 32)
    fine1 = apply_transform(torch.linalg.inv(right), c1).T.reshape(1, 2, 80, 80)  # where in image 0 it is
    seen0, seen1 = torch.ones(1, 1, 16, 16), torch.ones(1, 1, 40, 40)
    flow, log_sigma = predict_flow(known_flow(None), fine0, fine1, seen0, seen1, wrong[None])
    inner = flow[0, :, 4:12, 4:12]
    assert torch.allclose(inner, torch.tensor([-4.0, -2.0])[:, None, None].expand_as(inner), atol=1e-3)
    middle = torch.zeros(1, 1, 16, 16)
    middle[..., 4:12, 4:12] = 1
    assert torch.allclose(affine_from_flow(wrong[None], flow, log_sigma, middle)[0], right, atol=1e-2)


@pytest.mark.parametrize(
    "side, times", [(128, 2 + 2), (256, 2 * 2 + 2)]
)  # two rounds of the shrunk images, in their pixels, and two of the full ones
def test_the_flow_moves_what_agrees_and_leaves_the_rest_on_its_cells(side, times):
    net = tiny(threshold=0.0, coarse_side=128)
    k, image = side // 128, smooth((side, side))
    other = torch.cat(
        [image[:, :, : 80 * k], image[:, :, 80 * k :].roll(64 * k, 3)], 2
    )  # the lower part lies elsewhere
    with torch.no_grad():
        net.flow_head.out.bias[:2] = torch.tensor([0.25, -0.5])  # one and minus two pixels a round
        _, *cells, _ = matched_cells(net(*shrink_pair(128, (image, other))[1]), 0.0)
    cells0, cells1 = (
        apply_transform(resize_matrix((128, 128), (side, side)), c.double().numpy()) for c in cells
    )
    m = net.match(image, other)[0]
    off = np.linalg.norm(cells1 - cells0, axis=1)
    agree, far = off < 4 * k, off > 32 * k
    assert agree.sum() > 50 and np.allclose(
        (m.points1 - m.points0)[agree], times * np.array([1.0, -2.0]), atol=0.6 * k
    )
    assert far.sum() > 10 and np.allclose(m.points1[far], cells1[far])


def test_every_parameter_learns():
    net, p = tiny().train(), pair((64, 64))
    torch.nn.init.normal_(
        net.flow_head.out.weight, std=0.1
    )  # it begins at zero, and shields what lies before it
    r = net(p["image0"], p["image1"])
    t = supervise(torch.eye(3).repeat(2, 1, 1), r.grid0, r.grid1, r.seen0, r.seen1)
    draw = torch.Generator().manual_seed(0)
    matching_loss(net, r, t, p["mask0"], p["mask1"], draw).total.backward()
    assert [n for n, q in net.named_parameters() if q.grad is None or not q.grad.abs().sum() > 0] == []


def test_weights_survive_the_file_and_bad_files_are_named(tmp_path):
    net, path = tiny(), tmp_path / "w.safetensors"
    save_matcher(path, net, {"steps": 3})
    again = load_matcher(path)
    assert again.config == net.config and again.facts == {"steps": 3}
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-3), name
    for name, write in (
        ("cut.safetensors", lambda f: f.write_bytes(path.read_bytes()[:100])),
        ("other.ckpt", lambda f: torch.save({"state_dict": {}}, f)),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_matcher(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_matcher(tmp_path / "nothing.safetensors")


def test_configurations_that_cannot_work_say_so():
    for bad in (dict(attention="flash"), dict(heads=3), dict(threshold=1.0), dict(coarse_side=32)):
        with pytest.raises(ValueError, match="expected"):
            MatcherConfig(**bad)
    assert json.loads(json.dumps(asdict(MatcherConfig())))["layers"] == 4


def test_a_matcher_goes_to_a_folder_and_back(tmp_path):
    net = Matcher(MatcherConfig(**TINY)).eval()
    net.save_pretrained(tmp_path / "mine")
    back = Matcher.from_pretrained(tmp_path / "mine")
    x = torch.rand(1, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(back(x, x).sim, net(x, x).sim, atol=0.05)  # stored in half precision
    card = json.loads((tmp_path / "mine/config.json").read_text())
    assert card["library_name"] == "loftr_curriculum" and tuple(card["matcher"]["dims"]) == net.config.dims


def test_a_source_that_is_not_there_is_named(tmp_path):
    for source in (tmp_path, tmp_path / "none", "nobody"):
        with pytest.raises(FileNotFoundError, match=source.name if source != "nobody" else "nobody"):
            Matcher.from_pretrained(source)


def test_the_other_variant_is_refused(tmp_path):
    from loftr_curriculum.model.reference import ReferenceMatcher

    Matcher(MatcherConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a ReferenceMatcher"):
        ReferenceMatcher.from_pretrained(tmp_path)


def test_weights_are_read_without_importing_a_network():
    code = """
import sys
import loftr_curriculum.model.weights
sys.exit(any(f'loftr_curriculum.model.{name}' in sys.modules for name in ('matcher', 'reference')))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_result_holds_tensors_and_no_network(variant):
    net = make_matcher(MatcherConfig(variant)).eval()
    with torch.no_grad():
        result = net(smooth((64, 64)), smooth((64, 64), 1))
    assert {type(value) for value in vars(result).values()} == {torch.Tensor, Grid, int}
    assert all(isinstance(layer, torch.nn.Module) for layer in net.fine_stage.layers)


@pytest.mark.parametrize(
    "module, old, new",
    [
        ("model.fine", "bring_home", "warp_features"),
        ("model.fine", "settle", "affine_from_flow"),
        ("model.matcher", "FlowResult", "CoarseResult"),
        ("model.matcher", "shrink_pair", "shrink_pair"),
        ("model.reference", "ReferenceResult", "CoarseResult"),
        ("training.losses", "nearby", "perturb"),
        ("training.curriculum", "heed_index", "end_teaching_when_calm"),
        ("registration.workers", "Crew", "WorkerPool"),
        ("registration.workers", "make_crew", "make_pool"),
        ("registration.workers", "born_deaf", "signals_blocked"),
        ("registration.workers", "hear", "unblock_signals"),
        ("registration.many", "Seldom", "Throttle"),
        ("registration.pair", "heed_laterality", "judge_laterality"),
    ],
)
def test_names_of_before_answer_and_say_so(module, old, new):
    room = import_module(f"loftr_curriculum.{module}")
    with pytest.warns(DeprecationWarning, match=f"{old} is now"):
        assert getattr(room, old).__name__ == new


def test_loading_weights_does_not_load_the_compiler():
    "It takes a second and 70 MB; an operation on a tensor without memory is enough to load it."
    code = (
        "import sys; from loftr_curriculum.model.weights import load_matcher; load_matcher(); "
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
