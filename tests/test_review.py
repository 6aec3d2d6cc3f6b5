"""Guards of reviews: decisions survive everything, and the page does in a real Chromium what it says."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest

from loftr_curriculum.cli import main
from loftr_curriculum.geometry import Affine, affine, centre, warp_image
from loftr_curriculum.io.files import FileError, read_json
from loftr_curriculum.io.images import read_image, write_image
from loftr_curriculum.registration.journal import RESULTS, error_row, write_results
from loftr_curriculum.registration.review import ACCEPTED, Decision, Review, read_review
from loftr_curriculum.registration.table import Pair

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT = 180  # seconds for whatever a loaded machine is slow at
TURN = affine(10, 1.1, (12, -8), center=(199.5, 149.5))  # fixed to moving
PLACES = np.array([[80.0, 60], [330, 80], [180, 250]])  # in the fixed image


@pytest.fixture
def batch(tmp_path):
    "Three pairs of one scene: two doubtful ones with a wrong map, and a failed one."
    noise = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 255, (300, 400)), (0, 0), 4)
    scene = np.uint8(cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX))
    write_image(tmp_path / "f.png", scene)
    write_image(tmp_path / "m.png", warp_image(scene, TURN, scene.shape))
    verdicts = {"first": "doubtful", "second": "doubtful", "third": "failed", "fine": "ok"}
    sizes = {"fixed_height": 300, "fixed_width": 400, "moving_height": 300, "moving_width": 400}
    pairs = [Pair(id, "f.png", "m.png", tmp_path) for id in verdicts]
    rows = [error_row(pair, "") | {"verdict": verdicts[pair.id]} | sizes for pair in pairs]
    out = tmp_path / "out"
    write_results(out / RESULTS, rows)
    wrong = {"model": "affine", "matrix": np.eye(3).tolist()}
    about = {"fixed_size": [300, 400], "moving_size": [300, 400]}
    lines = [about | {"id": pair.id, "map": None if pair.id == "third" else wrong} for pair in pairs]
    (out / "maps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "settings.json").write_text(json.dumps({"images": str(tmp_path)}))
    return out


def test_two_reviewers_lose_nothing_of_each_other(batch):
    one, other = Review(batch), Review(batch)
    one.decide(Decision("first", ACCEPTED))
    other.decide(Decision("second", ACCEPTED))
    assert set(read_review(batch)) == {"first", "second"}


def test_a_spoiled_review_is_named(batch):
    (batch / "review.csv").write_text("id,decision\nfirst,maybe\n")
    with pytest.raises(FileError, match=r"review.csv: the row of first is no decision \(expected one of"):
        Review(batch)


def test_a_batch_of_before_needs_to_be_told_where_its_images_are(batch, capsys):
    (batch / "settings.json").write_text("{}")
    assert main(["review", str(batch)]) == 2
    assert "--images" in capsys.readouterr().err
    assert Review(batch, images=batch.parent).files("first")[0] == batch.parent / "f.png"


def test_a_folder_without_a_batch_is_refused(tmp_path, capsys):
    assert main(["review", str(tmp_path)]) == 2
    assert "results.csv: no such file" in capsys.readouterr().err


def test_warp_takes_what_was_decided(batch, tmp_path, capsys):
    from loftr_curriculum.registration.review import CORRECTED, REJECTED

    matrix = np.linalg.inv(TURN)
    review = Review(batch)
    review.decide(Decision("first", CORRECTED, PLACES, Affine(TURN)(PLACES), matrix))
    review.decide(Decision("second", REJECTED))
    words = ["warp", str(tmp_path / "m.png"), str(batch), "--out"]
    assert main([*words, str(tmp_path / "w.png"), "--id", "first"]) == 0
    inside = slice(60, 240), slice(80, 320)
    off = read_image(tmp_path / "w.png").astype(int) - read_image(tmp_path / "f.png")
    assert np.abs(off[inside]).mean() < 4
    capsys.readouterr()
    assert main([*words, str(tmp_path / "v.png"), "--id", "second"]) == 2
    assert "was rejected" in capsys.readouterr().err


# ---- the page


@pytest.mark.slow
def test_the_kernel_of_the_page_is_this_python_and_keeps_quiet(tmp_path, monkeypatch, capfd):
    import nbformat
    from nbclient import NotebookClient

    from loftr_curriculum.report.server import write_kernel, write_notebook

    monkeypatch.setenv("JUPYTER_PATH", "")
    write_kernel(tmp_path)
    notebook = nbformat.read(write_notebook(tmp_path), as_version=4)
    assert notebook.metadata.kernelspec.name == "review"
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
    NotebookClient(notebook, timeout=600).execute(cwd=str(tmp_path))
    board, python = (cell.outputs for cell in notebook.cells)
    assert "HTML" in board[0]["data"]["text/plain"]
    assert python[0]["text"].strip() == sys.executable
    assert "WARNING" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def chromium():
    for name in ("voila", "ipyevents", "playwright"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[browser,review]'")
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(BROWSERS)} on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def address(batch, tmp_path):
    "The page of a review, served by the command."
    own = {
        name: str(tmp_path / "home") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = "import sys; from loftr_curriculum.cli import main; sys.exit(main())"
    log = tmp_path / "log"
    with open(log, "w") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", command, "review", str(batch)],
            env={**os.environ, **own, "PYTHONPATH": path},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + WAIT
        while "review on" not in log.read_text():
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield re.search(r"http://127\.0\.0\.1:\d+/\?token=\w+", log.read_text())[0]
    finally:
        server.terminate()
        server.wait(30)


def click_at(page, side, point):
    "A click on a place of an image, px of the image."
    image = page.locator(f"img.clicked-{side}")
    box = image.bounding_box()
    x, y = ((value + 0.5) * box["width"] / 400 for value in point)
    image.click(position={"x": x, "y": y})


def decided(batch, n):
    "The decisions, once there are n."
    end = time.monotonic() + WAIT
    while len(read_review(batch)) < n:
        assert time.monotonic() < end
        time.sleep(0.1)
    return read_review(batch)


@pytest.mark.slow
def test_pairs_are_rejected_corrected_and_accepted_in_a_browser(batch, address, chromium):
    with urllib.request.urlopen(address.partition("?")[0], timeout=60) as strangers:
        assert "/login" in strangers.url, "without the token there is nothing to see"
    page = chromium.new_page(viewport={"width": 1200, "height": 1100})
    page.set_default_timeout(1000 * WAIT)
    page.goto(address)
    page.get_by_text("0 of 3 pairs decided").wait_for()
    page.get_by_role("button", name="reject", exact=True).click()
    page.get_by_text("1 of 3 pairs decided").wait_for()
    assert decided(batch, 1)["first"].decision == "rejected"

    before = page.locator('img[alt="warped"]').get_attribute("src")
    for number, place in enumerate(PLACES, 1):
        click_at(page, "fixed", place)
        page.get_by_text(f"{number} and {number - 1} of 3 points").wait_for()
        click_at(page, "moving", Affine(TURN)(place[None])[0])
        said = "corrected; keep it" if number == 3 else f"{number} and {number} of 3 points"
        page.get_by_text(said).wait_for()
    page.wait_for_function("before => document.querySelector('img[alt=warped]').src !== before", arg=before)
    page.get_by_role("button", name="swipe", exact=True).click()
    page.locator('img[alt="warped"][style*="inset"]').wait_for()
    if os.environ.get("SCREENSHOT"):
        page.screenshot(path=os.environ["SCREENSHOT"])
    page.get_by_role("button", name="keep correction").click()
    corrected = decided(batch, 2)["second"]
    off = Affine(corrected.matrix)(Affine(TURN)(PLACES)) - PLACES
    assert corrected.decision == "corrected" and np.abs(off).max() < 2

    page.get_by_text("third").first.wait_for()
    page.get_by_text("there is no map: click three places").wait_for()
    page.close()
    again = chromium.new_page()
    again.set_default_timeout(1000 * WAIT)
    again.goto(address)  # what was decided is there, and the next pair is the third
    again.get_by_text("2 of 3 pairs decided").wait_for()
    again.get_by_role("button", name="accept", exact=True).click()
    assert decided(batch, 3)["third"].decision == "accepted"
    again.close()
    with open(batch / "review.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["first", "second", "third"]
    assert read_json(batch / "settings.json")["images"]
    assert centre((300, 400)).tolist() == [199.5, 149.5]
