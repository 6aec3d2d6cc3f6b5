"""Guards of the speed room: what is charged to the data, and that the committed figures meet what is
promised.
"""

import json
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from loftr_curriculum.studies.training_speed import StepClock, measure_speed, speed_table, waiting_share

COMMITTED = Path(__file__).parents[1] / "nbs" / "11_studies" / "training_speed.json"


class Slow(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, k):
        time.sleep(0.03)
        return torch.ones(1)


class Quick(pl.LightningModule):
    "A step of 10 ms."

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_slow_data_is_charged_to_the_data():
    clock = StepClock()
    pl.Trainer(
        max_epochs=1,
        callbacks=[clock],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Quick(), DataLoader(Slow()))
    assert len(clock.inside) == 5 and len(clock.between) == 4
    assert min(clock.between) > 0.03 and min(clock.inside) > 0.01
    assert (
        waiting_share(
            {"step_seconds": [np.median(clock.inside)], "between_seconds": [np.median(clock.between)]}
        )
        > 0.5
    )


def test_the_command_writes_every_figure(tmp_path, monkeypatch):
    "With the slow parts replaced: each row of the table comes from the function that measures it."
    from loftr_curriculum.studies import training_speed as speed

    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(speed, "worlds_per_minute", lambda data: seen.append(data) or 61.0)
    monkeypatch.setattr(speed, "draws_per_second", lambda data, processes, blocks, count: [200.0] * blocks)
    monkeypatch.setattr(speed, "loaded_per_second", lambda data, blocks, batches: [180.0, 190.0, 170.0])
    monkeypatch.setattr(
        speed,
        "watch_training",
        lambda config, steps: {
            "step_seconds": [2.0] * steps,
            "between_seconds": [0.1 if config.data.workers == 0 else 0.02] * steps,
        },
    )
    measure_speed(str(tmp_path / "s.json"), worlds=3, blocks=5, steps=4)
    result = json.loads((tmp_path / "s.json").read_text())
    assert (
        result["appetite_per_second"] == 4.0
        and result["config"]["data"]["cache"] is None
        and result["machine"]["cores"] >= 1
    )
    assert seen[0].worlds == 3 and not Path(seen[0].cache).exists()
    table = speed_table(result)
    for figure in ("61.0", "200.0", "180.0", "4.0", "0.99%", "4.76%"):
        assert figure in table, figure


def test_the_committed_figures_keep_the_promise():
    if not COMMITTED.is_file():
        pytest.skip("not measured yet")
    result = json.loads(COMMITTED.read_text())
    assert result["config"]["data"]["size"] == 256 and result["processes"] == 2
    assert result["worlds_per_minute"] >= 60 and np.median(result["loaded_per_second"]) >= 150
    assert waiting_share(result["training_with_2_workers"]) < 0.05
