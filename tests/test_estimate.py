"Guards of what a run tells before it begins, and of runs that are made longer."

from dataclasses import replace

import pytest
import torch

from loftr_curriculum.data.config import DataConfig
from loftr_curriculum.io.files import read_json
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.weights import load_matcher
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.training.config import TrainConfig
from loftr_curriculum.training.estimate import Announce, measure
from loftr_curriculum.training.run import read_epochs, train


@pytest.fixture
def config(tmp_path):
    data = DataConfig(
        worlds=1,
        val_worlds=1,
        modes=("cf-fa",),
        eye=EyeConfig(size=128),
        cache=None,
        render_workers=0,
        workers=0,
        size=64,
        pairs_per_epoch=4,
        val_pairs=2,
        batch_size=2,
    )
    return TrainConfig(
        out=str(tmp_path / "run"),
        epochs=4,
        data=data,
        matcher=MatcherConfig(dims=(8, 16, 32), layers=1),
        precision="32",
        record_every=0,
    )


def tensors(run):
    return load_matcher(run.weights).state_dict()


def test_a_run_that_was_announced_is_the_run_that_it_would_have_been(config, tmp_path, capsys):
    config = replace(config, epochs=1, keep="last")
    plain = train(config, progress=False)
    assert "expected on this machine" not in capsys.readouterr().out
    told = replace(config, out=str(tmp_path / "told"))
    announced = train(told, progress=False, callbacks=[Announce(told)])
    said = capsys.readouterr().out
    assert said.index("expected on this machine: about") < said.index("0 of 1 epochs done")
    assert "for 1 epochs (2 steps of " in said and " MB " in said
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(announced).values()))
    again = train(told, progress=False, callbacks=[Announce(told)])  # nothing is left, nothing is announced
    assert announced.trained and not again.trained and again.val["val/auc"] == announced.val["val/auc"]
    assert "expected on this machine" not in capsys.readouterr().out


def test_more_pixels_cost_more(config):
    larger = replace(config, data=replace(config.data, size=192))
    assert measure(larger).step_s > measure(config).step_s


def test_a_run_is_made_longer_and_no_guidance_comes_back(config):
    config = replace(config, curriculum="v2.2", keep="last")
    train(config, progress=False)
    before = read_epochs(config.out)
    assert [row["sched/lambda"] for row in before] == [2.0, 2.0, 0.0, 0.0]
    longer = train(replace(config, epochs=10), progress=False)
    after = read_epochs(config.out)
    assert [row["epoch"] for row in after] == list(range(10))
    assert after[:4] == before
    assert [row["sched/lambda"] for row in after[4:]] == [0.0] * 6
    facts = load_matcher(longer.weights).facts
    assert (facts["epochs"], facts["planned_epochs"], facts["config"]["epochs"]) == (10, 4, 10)
    assert read_json(longer.out / "config.json")["planned_epochs"] == 4
    train(replace(config, epochs=11), progress=False)  # once more, by the first plan still
    assert read_json(longer.out / "config.json")["planned_epochs"] == 4
    assert len(read_epochs(config.out)) == 11


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epochs": 3}, "a run of 4 epochs already; --epochs can only grow"),
        ({"epochs": 8, "seed": 1}, "epochs was 4 and is 8; seed was 0 and is 1"),
        ({"epochs": 8, "resume": False}, ""),
    ],
)
def test_a_run_is_not_made_shorter_nor_another_one(config, change, says):
    train(config, progress=False)
    with pytest.raises(ValueError, match="another configuration|resume is off|only grow") as told:
        train(replace(config, **change), progress=False)
    assert says in str(told.value)
