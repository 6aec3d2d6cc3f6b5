"""Guards of training on several devices: two processes of this machine's processor, joined by gloo (slow)."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import sys\nfrom loftr_curriculum.cli import main\nsys.exit(main())\n"
TWO = ("--devices", "2", "--strategy", "ddp")
WAIT = 900  # seconds for whatever a loaded machine is slow at
TINY = """
epochs: 4
seed: {seed}
data:
  worlds: 2
  val_worlds: 2
  modes: [cf-fa]
  eye: {{size: 128}}
  cache: {cache}
  render_workers: 0
  workers: 0
  size: 64
  start_size: 64
  pairs_per_epoch: 16
  val_pairs: 4
  batch_size: {batch}
matcher: {{dims: [8, 16, 32], layers: 1}}
precision: "32"
record_every: 0
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def start_training(folder, name, *words, seed=0, batch=2):
    "A training run in its own session of processes."
    (folder / "main.py").write_text(COMMAND)  # Lightning starts the file again for every device
    config = folder / f"{name}.yaml"
    config.write_text(TINY.format(cache=folder / "eyes", seed=seed, batch=batch))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, folder / "main.py", "train", "--config", config, "--out", folder / name, *words],
        env={**os.environ, **quiet},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_training(folder, name, *words, **more):
    "The same to its end; its folder."
    process = start_training(folder, name, *words, **more)
    said, complained = process.communicate(timeout=WAIT)
    assert process.returncode == 0, complained[-2000:]
    assert said.count("weights: ") == 1, "one process speaks for all"
    return folder / name


def losses(run):
    "The training losses of a run, in the order of its epochs and sessions."
    found = []
    for table in sorted(run.glob("logs/*/metrics.csv")):
        with open(table, newline="") as file:
            found += [
                float(row["train/loss_epoch"]) for row in csv.DictReader(file) if row.get("train/loss_epoch")
            ]
    return found


def test_two_processes_train_as_one(tmp_path):
    "Half of the batch each: the figures are those of one process, as far as seeds let one tell."
    spread = [losses(run_training(tmp_path, f"seed{seed}", seed=seed, batch=4))[-1] for seed in (0, 1, 2)]
    run = run_training(tmp_path, "two", *TWO)
    figures = losses(run)
    apart = max(spread) - min(spread)
    assert len(figures) == 4 and (run / "weights.safetensors").is_file()
    assert min(spread) - apart <= figures[-1] <= max(spread) + apart


def test_a_killed_run_of_two_processes_goes_on(tmp_path):
    whole = losses(run_training(tmp_path, "whole", *TWO))
    process = start_training(tmp_path, "killed", *TWO)
    end = time.monotonic() + WAIT
    while not (tmp_path / "killed" / "last.ckpt").is_file():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert losses(run_training(tmp_path, "killed", *TWO))[-1] == pytest.approx(whole[-1], rel=1e-4)
