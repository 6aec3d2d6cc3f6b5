"The notebooks that a person opens: each says what it shows and how long it takes, and runs in a kernel."

import json
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "nbs" / "experiments"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_every_notebook_keeps_to_the_format():
    import nbformat

    for path in sorted(FOLDER.parent.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            nbformat.validate(json.loads(path.read_text(encoding="utf-8")))  # its error names the cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_top_says_what_it_shows_and_how_long_it_takes(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown" and text.startswith("# ")
    assert "It shows " in text and " takes less than a minute" in text


def test_the_board_is_seen_without_a_kernel():
    cells = json.loads((FOLDER / "match_distribution.ipynb").read_text(encoding="utf-8"))["cells"]
    board = next(k for k, cell in enumerate(cells) if "".join(cell["source"]).endswith("board.all"))
    before = [output for cell in cells[:board] for output in cell.get("outputs", [])]
    assert any("image/jpeg" in output.get("data", {}) for output in before)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom_in_a_kernel(path, record_property, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    client = NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=str(path.parent))
    record_property("seconds", round(time.monotonic() - start))
    assert [cell for cell in notebook.cells if cell.cell_type == "code" and not cell.execution_count] == []
