"Guards of stopping and going on: at any step, by any cause, in another folder, with the same weights."

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch

from loftr_curriculum.data.config import DataConfig
from loftr_curriculum.data.module import TrainPairs
from loftr_curriculum.io.files import read_json, write_json
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.weights import load_matcher
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.training.config import TrainConfig
from loftr_curriculum.training.run import claim_folder, read_epochs, train

STEPS, EPOCHS = (
    3,
    5,
)  # in an epoch, in the run; epochs 0 and 1 teach, epoch 2 weans, the others are independent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    "Views grow and motion widens over the run."
    data = DataConfig(
        worlds=1,
        val_worlds=1,
        modes=("cf-fa",),
        eye=EyeConfig(size=128),
        cache=str(tmp_path_factory.mktemp("eyes")),
        render_workers=0,
        workers=0,
        size=96,
        start_size=64,
        grow_epochs=2.0,
        widen_epochs=3.0,
        pairs_per_epoch=2 * STEPS,
        val_pairs=4,
        batch_size=2,
    )
    return TrainConfig(
        epochs=EPOCHS,
        data=data,
        matcher=MatcherConfig(dims=(8, 16, 32), layers=1),
        precision="32",
        record_every=0,
        patience=9,
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody stops."
    notes = Notes()
    run = train(
        replace(config, out=str(tmp_path_factory.mktemp("whole") / "run")), progress=False, callbacks=[notes]
    )
    return run, notes


class Notes(pl.Callback):
    "What every step sees, and a signal to the own process at one of them, as a person would send it."

    def __init__(self, step=None, validation=None, number=signal.SIGINT, kill=None):
        self.seen, self.validated, self.step, self.validation, self.number, self.kill = (
            [],
            [],
            step,
            validation,
            number,
            kill,
        )

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        g = module.guidance
        self.seen.append(
            (
                trainer.global_step,
                tuple(batch.image0.shape),
                float(batch.image0.sum()),
                g.vessel_soft_lambda,
                g.vessel_loss_weight_scaler,
            )
        )
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.kill:
            raise MemoryError

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.validated.append((trainer.current_epoch, batch_idx))
        if (trainer.current_epoch, batch_idx) == self.validation:
            os.kill(os.getpid(), self.number)


def stopped(config, **how):
    notes = Notes(**how)
    with pytest.raises((KeyboardInterrupt, SystemExit, MemoryError)) as caught:
        train(config, progress=False, callbacks=[notes])
    return notes, caught


def same(a, b):
    a, b = a.module.state_dict(), b.module.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stopped_four_times_and_moved_it_is_the_run_that_nobody_stopped(config, whole, tmp_path, capsys):
    c, (want, seen) = replace(config, out=str(tmp_path / "run0")), whole
    all_seen = []
    stops = (
        (dict(step=1), KeyboardInterrupt),  # in the teaching phase, while views are small
        (dict(step=7, number=signal.SIGTERM), SystemExit),  # while guidance weans
        (dict(validation=(3, 0)), KeyboardInterrupt),
        (dict(step=13), KeyboardInterrupt),
    )
    for k, (how, error) in enumerate(stops):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        notes, caught = stopped(c, **how)
        assert caught.type is error and (error is not SystemExit or caught.value.code == 143)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        all_seen += notes.seen
        shutil.move(c.out, tmp_path / f"run{k + 1}")
        c = replace(c, out=str(tmp_path / f"run{k + 1}"))
    last = Notes()
    got = train(c, progress=False, callbacks=[last])
    assert all_seen + last.seen == seen.seen, "a step was lost, repeated or different"
    assert [len({s[i] for s in seen.seen}) for i in (1, 3)] == [2, 3], (
        "the run was meant to grow its views and to wean"
    )
    assert same(want, got)
    assert torch.load(c.out + "/last.ckpt", weights_only=True)["global_step"] == STEPS * EPOCHS
    for a, b in zip(read_epochs(want.out), read_epochs(got.out), strict=True):
        assert a == pytest.approx(b, nan_ok=True, rel=1e-6), (
            "the figures of an epoch are those of all its steps"
        )
    a, b = (load_matcher(r.out / "best.ckpt") for r in (want, got))
    assert a.facts["epoch"] == b.facts["epoch"] and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values())
    )
    said = capsys.readouterr().out
    for line in (
        "0 of 5 epochs done, step 0 of 15",
        "stopped at step 2, kept in",
        "0 of 5 epochs done, step 2 of 15",
        "2 of 5 epochs done, step 8 of 15",
        "4 of 5 epochs done, step 14 of 15",
    ):
        assert line in said, said


def test_workers_change_nothing_and_take_part_in_stopping(config, whole, tmp_path):
    c = replace(config, out=str(tmp_path), data=replace(config.data, workers=2))
    notes, _ = stopped(c, step=3)
    last = Notes()
    got = train(c, progress=False, callbacks=[last])
    assert notes.seen + last.seen == whole[1].seen and same(whole[0], got)


def test_a_run_that_dies_between_steps_keeps_the_last_one_and_in_a_step_the_last_checkpoint(
    config, whole, tmp_path, monkeypatch
):
    def gone(self, g):
        if g >= 2 * 5:
            raise OSError("the disk is gone")
        return draw(self, g)

    c, draw = replace(config, out=str(tmp_path)), TrainPairs.__getitem__
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is gone"):
        patch.setattr(TrainPairs, "__getitem__", gone)
        train(c, progress=False)
    seen = stopped(c, kill=7)[0].seen
    assert seen[0] == whole[1].seen[5]
    last = Notes()
    got = train(c, progress=False, callbacks=[last])
    assert last.seen == whole[1].seen[6:] and same(whole[0], got)


def train_until_killed(config):
    "In a process of its own, killed outright while it writes the checkpoint of step 5."
    write = torch.save

    def half(value, path):
        write(value, path)
        if value["global_step"] == 5:
            with open(path, "r+b") as f:
                f.truncate(1000)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    train(config, progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")
def test_a_run_that_is_killed_while_it_writes_has_the_checkpoint_before(config, whole, tmp_path):
    c = replace(config, out=str(tmp_path / "run"))
    process = multiprocessing.get_context("fork").Process(
        target=train_until_killed, args=(replace(c, checkpoint_minutes=0.0),)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob("run/.*.ckpt")), "half a file was meant to lie beside it"
    last = Notes()
    got = train(c, progress=False, callbacks=[last])
    assert last.seen == whole[1].seen[4:] and same(whole[0], got)
    assert not list(tmp_path.glob("run/.*"))


def test_a_folder_of_an_older_run_and_of_another_machine_goes_on(config, tmp_path):
    out = tmp_path / "run"
    c = replace(
        config, out=str(out), data=replace(config.data, triplets="/here/eyes"), init="/here/a.safetensors"
    )
    claim_folder(c)
    (out / "last.ckpt").touch()
    older = read_json(out / "config.json")
    del older["checkpoint_minutes"]
    write_json(out / "config.json", older)
    claim_folder(
        replace(
            c,
            checkpoint_minutes=1.0,
            init="/there/a.safetensors",
            data=replace(c.data, triplets="/there/eyes", cache=None, workers=3),
        )
    )
    with pytest.raises(ValueError, match="another configuration .data.triplets."):
        claim_folder(replace(c, data=replace(c.data, triplets="/there/other_eyes")))
