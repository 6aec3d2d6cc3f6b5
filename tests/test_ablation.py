"""Guards of the ablation: adaptive weaning inside a run, masks of the controls, runs that are not
repeated, and what is paired with what.
"""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from loftr_curriculum.data.module import PairDataModule
from loftr_curriculum.data.pseudo_real import PseudoReal, pseudo_real_pair
from loftr_curriculum.evaluation.recording import Recording
from loftr_curriculum.geometry import apply_transform, invert
from loftr_curriculum.io.files import read_json, write_json
from loftr_curriculum.io.images import write_image
from loftr_curriculum.model.config import Guidance, MatcherConfig
from loftr_curriculum.studies import ablation
from loftr_curriculum.studies.ablation import Settings, choose, config_of, differences, run_ablation
from loftr_curriculum.training.config import CURRICULA
from loftr_curriculum.training.module import PL_LoFTR
from loftr_curriculum.training.run import train

NET = MatcherConfig(dims=(8, 16, 32), layers=1, heads=1)
TINY = Settings(
    arms=("v2.1", "v2.2-adaptive"),
    seeds=(0,),
    strengths=(0.5, 1.0),
    epochs=2,
    steps=1,
    batch=2,
    size=64,
    worlds=2,
    eye=256,
    probes=1,
    pseudo_real=1,
    matcher=NET,
)


def landmark_set(folder):
    "One generated pair as a real one: images and landmarks."
    pair, wide = (
        pseudo_real_pair("cf-fa", 0, replace(PseudoReal(), size=(256, 256))),
        np.mgrid[60:200:3j, 60:200:3j].reshape(2, -1).T,
    )
    points = apply_transform(pair.fixed_to_moving, wide)
    for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
        write_image(folder / f"images/1_{side}.png", image)
    (folder / "landmarks").mkdir()
    np.savetxt(
        folder / "landmarks/1.csv",
        np.c_[wide, points],
        "%.3f",
        ",",
        header="fixed_x,fixed_y,moving_x,moving_y",
        comments="",
    )
    write_json(folder / "landmarks/1.json", {"moving_to_fixed": invert(pair.fixed_to_moving)})
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    return folder, run_ablation(str(folder / "a.json"), str(folder / "cache"), None, 1, TINY)


def test_every_arm_is_run_at_the_strength_that_was_chosen(ran):
    _, result = ran
    assert result["choice"]["strength"] == choose(result["choice"]["runs"])["strength"]
    assert {(r["arm"], r["seed"], r["strength"]) for r in result["runs"]} == {
        (arm, 0, result["choice"]["strength"]) for arm in TINY.arms
    }
    assert {r["seed"] for r in result["choice"]["runs"]} == {TINY.choice_seed}
    for run in result["runs"]:
        assert "real" not in run and run["landmarks"] is None and len(run["epochs"]) == TINY.epochs
        assert all(
            len(values) == TINY.epochs
            for kind in ("generated", "pseudo-real")
            for values in run[kind].values()
        )


def test_finished_runs_are_kept_and_others_are_made(ran, monkeypatch):
    folder, result = ran
    made = []
    monkeypatch.setattr(ablation, "train", lambda config, **_: made.append(config.curriculum) or 1 / 0)
    assert run_ablation(str(folder / "b.json"), str(folder / "cache"), None, 1, TINY) == result
    with pytest.raises(ZeroDivisionError):
        run_ablation(str(folder / "b.json"), str(folder / "cache"), None, 1, replace(TINY, seeds=(0, 1)))
    assert made == ["v2.1"]
    kept = read_json(folder / "b.json")
    assert kept["choice"] == result["choice"] and kept["runs"] == result["runs"]


def test_the_choice_is_on_disk_before_the_arms_are_run(ran, tmp_path, monkeypatch):
    def fake(job):
        if not job.choosing:
            assert read_json(tmp_path / "a.json")["choice"]["strength"] == 0.5
            raise KeyboardInterrupt
        figures = {"AUC@20": [0.5], "collapse_index": [1 - job.strength]}
        return dict(
            arm=job.arm,
            seed=job.seed,
            strength=job.strength,
            epochs=[0],
            seconds=0,
            **{"generated": figures, "pseudo-real": figures},
        )

    monkeypatch.setattr(ablation, "one_run", fake)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(str(tmp_path / "a.json"), str(ran[0] / "cache"), None, 1, TINY)


def test_differences_are_paired_by_seed():
    def run(arm, seed, index):
        return {
            "arm": arm,
            "seed": seed,
            "epochs": [0],
            "generated": {"collapse_index": [index]},
        }

    result = {
        "runs": [
            run("v2.1", 0, 0.5),
            run("v2.1", 1, 0.7),
            run("v2.1", 2, 0.1),
            run("v2.2", 1, 0.2),
            run("v2.2", 0, 0.3),
        ]
    }
    assert sorted(differences(result, "v2.2", "v2.1", "index, generated")) == pytest.approx([-0.5, -0.2])
    assert len(differences(result, "v2.2", "v2.1", "index, real")) == 0


def test_real_pairs_are_watched_every_epoch_and_decide_nothing(ran, tmp_path):
    real = landmark_set(tmp_path / "real")
    once = replace(TINY, strengths=(ran[1]["choice"]["strength"],))
    result = run_ablation(str(tmp_path / "a.json"), str(tmp_path / "cache"), str(real), 1, once)
    for run, blind in zip(result["runs"], ran[1]["runs"]):
        assert all(len(values) == TINY.epochs for values in run["real"].values())
        assert 0 <= run["landmarks"]["landmark_AUC@20"] <= 1

        def same(r):
            return {k: v for k, v in r.items() if k not in ("real", "landmarks", "seconds")}

        assert same(run) == same(blind)
    assert all("real" not in run for run in result["choice"]["runs"])
    assert [f.get_title() for f in ablation.draw_arms(result, ("v2.1",)).axes][-3:] == [
        "collapse index, real",
        "coverage, real",
        "AUC@20, real",
    ]


class Stops(pl.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.at:
            raise RuntimeError("power cut")


def test_adaptive_weaning_survives_a_power_cut(tmp_path):
    def config(name):
        c = config_of(replace(TINY, epochs=8), "v2.2-adaptive", 0, 1.0, tmp_path / name, tmp_path / "worlds")
        return replace(c, record_every=1, probes=1, probe_pseudo_real=0)

    train(config("whole"), progress=False)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config("cut"), progress=False, callbacks=[Stops(2)])
    run = train(config("cut"), progress=False)
    for name in ("whole", "cut"):
        records = Recording(tmp_path / name).records
        assert (
            max(r.figures["collapse_index"][0] for r in records[:3]) <= ablation.THRESHOLD
        )  # an untrained matcher scatters
        assert [r.lam for r in records] == [
            2,
            2,
            2,
            2,
            1,
            0,
            0,
            0,
        ]  # by the calendar: 2 in epoch 4, 1 in epoch 5
    assert run.module.guidance == Guidance()


def test_controls_train_with_the_masks_that_they_name(tmp_path):
    c = config_of(replace(TINY, batch=3), "v2.2", 0, 1.0, tmp_path, tmp_path / "worlds")
    data = PairDataModule(replace(c.data, pairs_per_epoch=3, cache=None))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    loss, seen = {}, {}

    def keep_masks(arm, matcher, args):
        seen[arm] = args[4:6]

    for arm in ("v2.1", "v2.2", "control-other-eye", "control-uniform"):
        torch.manual_seed(0)
        module = PL_LoFTR(replace(c, curriculum=arm, precision="32"))
        module.log = Mock()
        module.guidance = Guidance(2.0, 10.0) if arm != "v2.1" else Guidance()
        module.matcher.register_forward_pre_hook(partial(keep_masks, arm))
        loss[arm] = module.training_step(batch, 0).item()
    for k, mask in enumerate((batch.mask0, batch.mask1)):
        assert torch.equal(seen["v2.2"][k], mask)
        assert torch.equal(seen["control-other-eye"][k][0], mask[1])
        uniform = seen["control-uniform"][k]
        assert torch.allclose(uniform.mean((1, 2)), mask.mean((1, 2)))
        assert float(uniform.std((1, 2)).max()) == 0
    assert len({round(v, 5) for v in loss.values()}) == 4
    assert CURRICULA["control-other-eye"] == replace(CURRICULA["v2.2"], mask="other")


def test_one_number_of_the_settings_is_another_cache(tmp_path):
    def folder(**change):
        return ablation.cache_of(replace(TINY, **change), tmp_path)

    assert folder(seeds=(3, 4), arms=("v2.1",), strengths=(0.1,)) == folder()
    assert folder(steps=2) != folder() != folder(matcher=replace(NET, layers=2))
    assert np.isclose(
        ablation.config_of(TINY, "v2.1", 0, 0.25, "x", "y").data.strength,
        0.75 * ablation.SPECIFICATION.strength,
    )
