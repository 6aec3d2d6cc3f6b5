"""Train the matcher on generated eyes with the dual-engine curriculum, plan v2.2.

python examples/train_multimodal_onGen_v2_2.py                  generated eyes, no files needed
python examples/train_multimodal_onGen_v2_2.py TRIPLETS         your folder, <case>/<case>_<modality>.png
python examples/train_multimodal_onGen_v2_2.py --data.size 320  any flag of `loftr-curriculum train`
"""

import sys

from loftr_curriculum.cli import read_settings
from loftr_curriculum.data.config import DataConfig
from loftr_curriculum.training.config import TrainConfig
from loftr_curriculum.training.run import train

PLAN = TrainConfig(
    out="runs/onGen_v2_2",
    # CurriculumScheduler: lambda 2 -> 0 and loss weight 10 -> 1, taught until 25, weaned until 50
    curriculum="v2.2",
    fractions=False,  # these are epochs, not shares of the run
    epochs=100,
    data=DataConfig(modes=("cf-fa", "cf-oct")),
)

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--data.triplets", *words]
    # PL_LoFTR on a PairDataModule; goes on where it stopped
    run = train(read_settings(TrainConfig, words, default=PLAN))
    print(f"weights: {run.weights}, match lines of every epoch: {run.out / 'recording'}")
