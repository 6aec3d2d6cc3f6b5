"Guards of the training room: resuming, scheduling inside a run, checkpoints, overfitting one pair."

from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from loftr_curriculum.data.config import DataConfig
from loftr_curriculum.data.module import PairDataModule
from loftr_curriculum.data.pairs import cut_views, make_planes
from loftr_curriculum.data.recipe import STRIDE, map_grid
from loftr_curriculum.geometry import Grid, Motion
from loftr_curriculum.io.images import write_image
from loftr_curriculum.model.coarse import COARSE
from loftr_curriculum.model.config import Guidance, MatcherConfig
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.model.weights import load_matcher
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.retina.world import make_world
from loftr_curriculum.training.config import CURRICULA, TrainConfig
from loftr_curriculum.training.curriculum import CurriculumScheduler, schedule
from loftr_curriculum.training.losses import matching_loss
from loftr_curriculum.training.module import PL_LoFTR, quick_error
from loftr_curriculum.training.run import callbacks_of, read_epochs, train
from loftr_curriculum.training.supervision import supervise

DATA = DataConfig(
    worlds=2,
    val_worlds=1,
    size=64,
    pairs_per_epoch=8,
    val_pairs=2,
    batch_size=4,
    workers=0,
    render_workers=1,
    cache=None,
    eye=EyeConfig(size=256),
)
NET = MatcherConfig(dims=(8, 16, 32), layers=1)


def config(out, **kw):
    return TrainConfig(**{**dict(out=str(out), epochs=4, data=DATA, matcher=NET, precision="32"), **kw})


class Spy(pl.Callback):
    "Notes the guidance that the matcher really receives in training, and what is logged."

    def __init__(self, stop_at=None):
        self.used, self.stop_at = {}, stop_at

    def on_fit_start(self, trainer, module):
        def note(matcher, args, kw):
            if matcher.training:
                self.used.setdefault(trainer.current_epoch, set()).add(kw["guidance"])

        module.matcher.register_forward_pre_hook(note, with_kwargs=True)

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.stop_at:
            raise RuntimeError("power cut")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = train(config(tmp_path / "a"), progress=False)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config(tmp_path / "b"), progress=False, callbacks=[Spy(stop_at=2)])
    spy = Spy()
    resumed = train(config(tmp_path / "b"), progress=False, callbacks=[spy])
    assert sorted(spy.used) == [2, 3]
    for (name, a), b in zip(whole.module.state_dict().items(), resumed.module.state_dict().values()):
        assert torch.equal(a, b), name
    a, b = read_epochs(tmp_path / "a"), read_epochs(tmp_path / "b")
    assert len(a) == 4
    for x, y in zip(a, b):
        assert x == pytest.approx(y, nan_ok=True)
    facts = load_matcher(tmp_path / "b" / "weights.safetensors").facts
    assert facts["steps"] == 8 and facts["config"]["curriculum"] == "v2.2"


def test_the_value_used_in_a_step_is_the_value_logged(tmp_path):
    spy, c = Spy(), config(tmp_path, epochs=6)
    train(c, progress=False, callbacks=[spy])
    rows = read_epochs(tmp_path)
    assert {r["sched/lambda"] for r in rows} >= {2.0, 0.0} and len({r["sched/lambda"] for r in rows}) >= 3
    for e, row in enumerate(rows):
        assert spy.used[e] == {schedule(c.phases, e, 6)}
        (g,) = spy.used[e]
        assert (row["sched/lambda"], row["sched/loss_w"]) == pytest.approx(
            (g.vessel_soft_lambda, g.vessel_loss_weight_scaler)
        )


def test_resuming_at_epoch_30_gives_the_guidance_of_epoch_30(tmp_path):
    c = config(tmp_path, epochs=100, fractions=False, data=replace(DATA, pairs_per_epoch=4, val_pairs=1))
    module, data = PL_LoFTR(c), PairDataModule(c.data)

    def make(*more):
        return pl.Trainer(
            max_epochs=100,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            callbacks=[CurriculumScheduler(c.phases), *more],
        )

    with pytest.raises(RuntimeError):
        trainer = make(Spy(stop_at=1))
        trainer.fit(module, data)
    trainer.fit_loop.epoch_progress.current.completed = trainer.fit_loop.epoch_progress.current.processed = (
        trainer.fit_loop.epoch_progress.current.ready
    ) = 30
    trainer.save_checkpoint(tmp_path / "at30.ckpt")
    spy, again = Spy(stop_at=31), PL_LoFTR(c)
    with pytest.raises(RuntimeError):
        make(spy).fit(again, data, ckpt_path=tmp_path / "at30.ckpt", weights_only=True)
    assert spy.used == {30: {Guidance(1.6, 8.2)}}


def test_best_comes_from_the_independence_phase_and_stopping_waits(tmp_path):
    run = train(config(tmp_path, epochs=6, patience=1, stop_from=4), progress=False)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert best["epoch"] >= 3 and run.weights.is_file()
    assert len(read_epochs(tmp_path)) >= 5


def test_another_configuration_is_refused_before_any_work(tmp_path):
    train(config(tmp_path, epochs=1), progress=False)
    with pytest.raises(ValueError, match="another configuration .lr."):
        train(config(tmp_path, epochs=1, lr=0.5), progress=False)


def test_real_pairs_are_logged_and_never_monitored(tmp_path):
    root = tmp_path / "set"
    image = np.random.default_rng(0).integers(0, 255, (96, 128), dtype=np.uint8)
    for sub in ("images", "landmarks"):
        (root / sub).mkdir(parents=True)
    write_image(root / "images" / "1_fixed.png", image)
    write_image(root / "images" / "1_moving.png", image)
    (root / "landmarks" / "1.csv").write_text(
        "fixed_x,fixed_y,moving_x,moving_y\n" + "10,10,10,10\n50,20,50,20\n30,80,30,80\n90,60,90,60\n"
    )
    (root / "landmarks" / "1.json").write_text('{"moving_to_fixed": [[1,0,0],[0,1,0],[0,0,1]]}')
    c = config(tmp_path / "run", epochs=1, val_real=str(root))
    train(c, progress=False)
    row = read_epochs(tmp_path / "run")[0]
    assert "val_real/mace" in row and row["val_real/no_answer"] in (0.0, 1.0)
    assert {getattr(cb, "monitor", None) for cb in callbacks_of(replace(c, patience=3), tmp_path)} == {
        None,
        "val/auc",
    }
    (root / "images" / "1_moving.png").unlink()
    with pytest.raises(ValueError, match="1_moving.png"):
        train(replace(c, out=str(tmp_path / "other")), progress=False)
    assert not (tmp_path / "other").exists()


def test_maps_of_the_data_are_those_of_the_coarse_grid():
    assert STRIDE == COARSE and map_grid((64, 96)) == Grid(8, 12, COARSE)
    seen = torch.ones(1, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match="true map"):
        supervise(
            torch.eye(3)[None], Grid(8, 8, 8), Grid(8, 8, 8), seen, seen, map_0to1=torch.zeros(1, 4, 4, 2)
        )


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_step_on_bent_pairs_learns_from_the_true_map():
    c = config("unused", data=replace(DATA, deform=6.0))
    data = PairDataModule(c.data)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    module = PL_LoFTR(c).train()

    def step(batch):
        module.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    bent, gradient = step(batch)
    assert np.isfinite(bent) and torch.isfinite(gradient).all() and gradient.norm() > 0
    assert step(batch)[0] == bent
    straight, other = step(replace(batch, map_0to1=None, map_1to0=None))
    assert straight != bent and not torch.allclose(gradient, other)
    errors = module.eval().validation_step(next(iter(data.val_dataloader())), 0)
    assert errors is None and module.val_errors.update_count == 1


def test_presets_are_the_plan():
    values = {
        n: (c.vessel_soft_lambda, c.vessel_loss_weight_scaler, c.teach_until, c.wean_until)
        for n, c in CURRICULA.items()
    }
    plan = {
        "v2.2": (2, 10, 25, 50),
        "v2.2-sketch": (2, 5, 30, 80),
        "v2.1": (0, 1, 25, 50),
        "bias-only": (2, 1, 25, 50),
        "loss-only": (0, 10, 25, 50),
    }
    assert {n: v for n, v in values.items() if n in plan} == plan


def test_overfitting_one_pair_registers_it():
    size = 96
    world = make_world(7, EyeConfig(size=512), ("cf", "fa"))
    frame = make_planes(world.images["cf"][..., 1], world.images["fa"], world.vessels)
    s = cut_views(
        frame,
        np.random.default_rng(2),
        (size, size),
        Motion(rotation_deg=20, scale=1.2, shift=0.1),
        0.0,
        optics=False,
    )

    def put(a, *one):
        return torch.from_numpy(np.ascontiguousarray(a, np.float32 if a.dtype != bool else bool)).reshape(
            *one, *a.shape
        )

    given = dict(
        image0=put(s.image0, 1, 1),
        image1=put(s.image1, 1, 1),
        mask0=put(s.mask0, 1),
        mask1=put(s.mask1, 1),
        fov0=put(s.fov0, 1),
        fov1=put(s.fov1, 1),
    )
    torch.manual_seed(0)
    net = Matcher(MatcherConfig(dims=(16, 32, 64), layers=2))
    optimizer, T = (
        torch.optim.AdamW(net.parameters(), 2e-3),
        torch.from_numpy(s.fixed_to_moving).float()[None],
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 240)
    for step in range(240):
        net.train()
        r = net(**given)
        t = supervise(T, r.grid0, r.grid1, r.seen0, r.seen1)
        loss = matching_loss(
            net, r, t, given["mask0"], given["mask1"], torch.Generator().manual_seed(step)
        ).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    found = net.eval().match(given["image0"], given["image1"], given["fov0"], given["fov1"])[0]
    assert quick_error(found, s.fov0, s.fixed_to_moving, (size, size)) * size / 512 < 2
