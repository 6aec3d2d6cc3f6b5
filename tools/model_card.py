"""The model card of the Hugging Face Hub: docs/model_card.md, or a folder that can be uploaded as it is.

Usage (from the repository root):
  python tools/model_card.py                       writes docs/model_card.md
  python tools/model_card.py FOLDER [--weights FILE] [--card FILE]
                                                   writes weights, config.json and README.md into a folder
"""

import argparse
import textwrap
from pathlib import Path

import yaml

from loftr_curriculum.io.files import atomic_path
from loftr_curriculum.model.weights import load_matcher
from loftr_curriculum.studies.card import card_of, card_text

PAGE = Path("docs/model_card.md")
ABOUT = """\
Registers retinal images of one eye across modalities: a colour fundus photograph with a fluorescein
angiogram, an OCT or an OCTA en-face image. It finds correspondences; the package `loftr_curriculum` fits a
map to them and says how far to believe it.

```python
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.registration import register

matcher = Matcher.from_pretrained("FOLDER or OWNER/NAME")
r = register("fixed_cf.png", "moving_fa.png", matcher=matcher)
r.verdict, r.reasons, r.moving_to_fixed
```
"""


def result_of(name: str, scores: dict, dataset: str) -> dict:
    """One entry of the model index: success rate and median error on a set of pairs."""
    return {
        "task": {"type": "image-matching", "name": "registration of retinal images"},
        "dataset": {"type": dataset, "name": f"{name} ({scores['pairs']} pairs)"},
        "metrics": [
            {"type": "success_rate", "name": "share below 10 px at 512 px", "value": scores["SR@10"][0]},
            {"type": "median_error", "name": "median error, px at 512 px", "value": scores["median_px"][0]},
        ],
    }


def header(found: dict | None) -> dict:
    """What the Hub reads."""
    told = {
        "license": "apache-2.0",
        "library_name": "loftr_curriculum",
        "pipeline_tag": "keypoint-detection",
        "tags": ["image-matching", "image-registration", "retina", "fundus", "angiography", "oct", "loftr"],
    }
    if found is None:
        return told
    results = [result_of("hard generated pairs", found["scores"]["all"], "generated")]
    if "real" in found:
        results.append(result_of("real pairs, CF and FA, a development set", found["real"], "real"))
    return told | {"model-index": [{"name": "loftr_curriculum fast", "results": results}]}


def card(weights: str | None = None, scores: str | None = None) -> str:
    """The whole card."""
    found, _ = card_of(weights, scores)
    front = yaml.safe_dump(header(found), sort_keys=False, allow_unicode=True, width=100)
    body = textwrap.dedent(card_text(weights, scores))
    title = "# loftr_curriculum: the model card"
    return f"---\n{front}---\n\n{title}\n\n{ABOUT}\n```text\n{body}\n```\n"


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="folder to write; none: docs/model_card.md")
    parser.add_argument("--weights", help="weights file; none: those of the package")
    parser.add_argument("--card", help="its card.json, from `loftr-curriculum study card`")
    told = parser.parse_args()
    text = card(told.weights, told.card)
    if told.folder is None:
        write(PAGE, text)
        return
    told.folder.mkdir(parents=True, exist_ok=True)
    load_matcher(told.weights).save_pretrained(told.folder)
    write(told.folder / "README.md", text)


if __name__ == "__main__":
    main()
