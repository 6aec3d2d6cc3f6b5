"""The site: guides, reference from docstrings, gallery of notebooks, model card. A bad link stops it.

Usage (from the repository root, `make docs`): python tools/docs.py [FOLDER]     default: _docs
Lays pages and notebooks out in FOLDER/source, where they are to each other as in the repository, and
writes the site to FOLDER/html. Nothing is run: notebooks are shown with the outputs that they keep.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path("loftr_curriculum")
PAGES = ("*.md", "docs/**/*.md", "tests/last_full_run.md")
ROOMS = {
    "01_geometry": "Geometry: pixels, points, maps, grids",
    "02_io": "Files in and out",
    "03_retina": "The generated eye",
    "04_data": "Triplets, pairs, batches",
    "05_model": "The matcher",
    "06_registration": "Registration and its verdict",
    "07_evaluation": "Figures",
    "08_report": "Pictures and pages",
    "09_training": "Training and the curriculum",
    "10_baselines": "Systems to compare with",
    "11_studies": "Studies: every figure, measured again",
    "12_cli": "The command line",
}
GUIDES = ("register", "archive", "verdict", "train", "models", "modality", "cluster")
OTHER = ("batches", "architecture", "publishing", "support", "model_card")
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
HIDDEN = re.compile(r"^#\| *(hide|default_exp)\b", re.MULTILINE)
# links to files that are no pages: they stay words
CODE = re.compile(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\.(?:py|ini|txt|json|cff|yaml|csv)\)")


def for_readers(notebook: dict) -> dict:
    """The notebook without hidden cells and without lines that are meant for nbdev."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and HIDDEN.search(source):
            continue
        text = DIRECTIVE.sub("", source) if cell["cell_type"] == "code" else CODE.sub(r"\1", source)
        cells.append({**cell, "source": text.strip("\n")})
    return {**notebook, "cells": cells}


def copy_pages(source: Path) -> None:
    """Markdown pages, notebooks and the pictures beside them."""
    for pattern in PAGES:
        for page in sorted(Path().glob(pattern)):
            target = source / page
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(CODE.sub(r"\1", page.read_text(encoding="utf-8")), encoding="utf-8")
    for path in sorted(Path("nbs").rglob("*.ipynb")):
        if path.name.startswith(("index", ".")) or ".ipynb_checkpoints" in path.parts:
            continue
        target = source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        notebook = for_readers(json.loads(path.read_text(encoding="utf-8")))
        target.write_text(json.dumps(notebook), encoding="utf-8")
    shutil.copytree("nbs/images", source / "nbs/images", dirs_exist_ok=True)
    shutil.copy("docs/conf.py", source)


def tree(title: str, entries: list[str], depth: int = 1) -> str:
    """A table of contents."""
    return "\n".join(["```{toctree}", f":caption: {title}", f":maxdepth: {depth}", "", *entries, "```", ""])


def modules() -> list[str]:
    """Dotted names of the modules, rooms first."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.stem.startswith("_")]
    return [".".join(path.with_suffix("").parts) for path in paths]


def write_reference(source: Path) -> list[str]:
    """A page for every room with its modules; the names of the pages."""
    pages = {}
    for name in modules():
        room = name.split(".")[1]
        pages.setdefault(room, []).append(name)
    for room, names in pages.items():
        parts = [f"# `loftr_curriculum.{room}`\n"]
        for name in names:
            parts += [f"## `{name}`\n", "```{eval-rst}", f".. automodule:: {name}", "```\n"]
        page = source / "docs/reference" / f"{room}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("\n".join(parts), encoding="utf-8")
    return sorted(pages)


def write_gallery(source: Path) -> None:
    """The notebooks by room, those that one plays with first."""
    parts = [
        "# Gallery of notebooks\n",
        "The source of everything; every module is exported from one of them.\n",
    ]
    folders = {"experiments": "To play and measure with"} | ROOMS
    for folder, title in folders.items():
        books = sorted((source / "nbs" / folder).glob("*.ipynb"))
        entries = [f"../nbs/{folder}/{book.stem}" for book in books]
        parts += [f"## {title}\n", tree("", entries).replace(":caption: \n", "")]
    (source / "docs/gallery.md").write_text("\n".join(parts), encoding="utf-8")


def add_contents(source: Path, rooms: list[str]) -> None:
    """The tables of contents, which the pages in the repository do without."""
    index = source / "docs/index.md"
    whole = index.read_text(encoding="utf-8") + "\n"
    whole += tree("Guides", [f"guides/{name}" for name in GUIDES])
    whole += tree("More", [*OTHER, "gallery", "../CHANGELOG", "../CONTRIBUTING", "../SECURITY"])
    whole += tree("Reference", [f"reference/{room}" for room in rooms])
    whole += tree("Elsewhere", ["../README", "../README.zh-CN", "../tests/last_full_run"])
    index.write_text(whole.replace("```{toctree}", "```{toctree}\n:hidden:"), encoding="utf-8")


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs")
    source, html = folder / "source", folder / "html"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(html, ignore_errors=True)
    copy_pages(source)
    write_gallery(source)
    add_contents(source, write_reference(source))
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", source, html]
    status = subprocess.run(command).returncode
    if status == 0:
        (html / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')
        print(f"look at {html / 'docs/index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
