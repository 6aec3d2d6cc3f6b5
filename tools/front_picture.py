"""The picture at the top of both READMEs: two generated pairs, registered with the weights that ship.

Usage (from the repository root): python tools/front_picture.py
Writes nbs/images/registered.jpg. The eyes are practice pairs, which no training and no figure uses.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from loftr_curriculum.data.practice import practice_pair, practice_spec
from loftr_curriculum.io.files import atomic_path
from loftr_curriculum.registration import register
from loftr_curriculum.report.answer import draw_answer
from loftr_curriculum.report.plots import figure_pixels
from loftr_curriculum.retina.config import EyeConfig

OUT = Path("nbs/images/registered.jpg")
# an angiogram and an OCT en-face image: (number of the pair, mode)
SHOWN = ((5, "cf-fa"), (3, "cf-oct"))


def row(number: int, mode: str, height: int = 250) -> np.ndarray:
    """One pair and its answer, as pixels."""
    pair = practice_pair(number, mode, practice_spec(512, EyeConfig(disease=0.3, gap=0.6)))
    return figure_pixels(draw_answer(register(pair.fixed, pair.moving), pair.fixed, pair.moving, height))


def main() -> None:
    rows = [row(number, mode) for number, mode in SHOWN]
    width = max(each.shape[1] for each in rows)
    padded = [np.pad(r, ((0, 6), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    with atomic_path(OUT) as temporary:
        Image.fromarray(np.concatenate(padded)).save(temporary, format="JPEG", quality=82, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
