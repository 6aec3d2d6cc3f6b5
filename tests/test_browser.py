"""The slider notebook as its reader has it: in JupyterLab in a real Chromium, clicked and typed at (slow).

Needs `pip install -e '.[browser]'` and a Chromium: Debian's package `chromium`, or
`playwright install chromium`.
With SCREENSHOT set (`make test-full SCREENSHOT=1`), the picture of the documentation is taken anew.
"""

import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "experiments" / "match_distribution.ipynb"
PICTURE = ROOT / "nbs" / "images" / "match_distribution.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT = 180  # seconds for whatever a loaded machine is slow at


@pytest.fixture(scope="module")
def chromium():
    for name in ("jupyterlab", "playwright"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[browser]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, (*BROWSERS, own))), None)
        if path is None:
            pytest.skip(
                f"no Chromium: none of {', '.join(BROWSERS)} on the PATH, "
                "and Playwright has not installed its own"
            )
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """A JupyterLab of our own, deaf to the settings of whoever runs the test.

    Gives its folder and the address of a file in it.
    """
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    (home / "labconfig").mkdir()
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "labconfig" / "page_config.json").write_text(json.dumps(quiet))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), home / "log"
    own = {
        name: str(home)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
    ]
    with open(log, "w") as out:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **own}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
        while True:
            try:
                urllib.request.urlopen(f"{base}/api?token={token}", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
        yield folder, lambda name: f"{base}/lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


class Notebook:
    """The board in a notebook that has been opened and run."""

    def __init__(self, lab, browser, run=None):
        folder, address = lab
        text, name = NOTEBOOK.read_text(encoding="utf-8"), f"match_distribution_{secrets.token_hex(3)}.ipynb"
        if run is not None:
            text, count = re.subn(r'"RUN = None', lambda _: json.dumps(f"RUN = {str(run)!r}")[:-1], text)
            assert count == 1, "the notebook has a line RUN = None"
        (folder / name).write_text(text, encoding="utf-8")
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.set_default_timeout(1000 * WAIT)
        self.page.goto(address(name))
        self.page.get_by_text(
            "Python 3 (ipykernel) | Idle"
        ).wait_for()  # "Run All" before this makes JupyterLab ask for a kernel
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.board = self.page.locator(".jp-OutputArea-output .widget-vbox")
        self.picture = self.board.locator("img")
        self.handle = self.board.locator(".noUi-handle")
        self.board.wait_for(state="attached")

    def finish(self):
        """Until every cell has run; fails with the traceback of a cell that raised."""
        self.page.wait_for_function(
            r"""() => {
                const all = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
                return all.length > 5 && all.every(p => /\d/.test(p.textContent));
            }"""
        )
        raised = self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
        assert raised.count() == 0, raised.first.inner_text()
        self.board.scroll_into_view_if_needed()

    def look(self):
        """What is to be seen: hash of the picture's bytes, its name, the slider's reading."""
        data = self.picture.evaluate(
            "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
        )
        return (
            hashlib.sha256(bytes(data)).hexdigest(),
            self.picture.get_attribute("alt"),
            self.board.locator(".widget-readout").first.inner_text(),
        )

    def after(self, act, title):
        """Act, and wait until the picture's name matches; the new look, whose picture must be another one."""
        before = self.look()[0]
        act()
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            seen = self.look()
            if re.match(title, seen[1] or "") and seen[0] != before:
                return seen
            time.sleep(0.1)
        picture, name, _ = self.look()
        which = "the same" if picture == before else "another"
        pytest.fail(f"no other picture named {title}: {name}, {which} picture")

    def press(self, *keys):
        self.handle.focus()
        for key in keys:
            self.page.keyboard.press(key)

    def said(self):
        return self.board.locator(".widget-html-content").last.inner_text()

    def screenshot(self, path):
        """The cell of the board, as a PNG of few colours."""
        from io import BytesIO

        from PIL import Image

        from loftr_curriculum.io.files import atomic_path

        self.page.mouse.move(0, 0)
        self.page.evaluate("document.activeElement.blur()")
        cell = self.page.locator(".jp-CodeCell", has=self.board)
        image = (
            Image.open(BytesIO(cell.screenshot()))
            .convert("RGB")
            .quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        )
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            image.save(temporary, format="PNG", optimize=True)


@pytest.mark.slow
def test_the_controls_change_the_picture(lab, chromium, record_property):
    from PIL import Image

    start = time.monotonic()
    n = Notebook(lab, chromium)
    n.finish()
    record_property("seconds until the board is there", round(time.monotonic() - start))
    first = n.look()
    assert first[1].startswith("epoch 0, unguided: index ") and first[2] == "0"
    start = time.monotonic()
    n.after(lambda: n.press("ArrowRight"), "epoch 3, unguided")
    record_property("seconds from key to picture", round(time.monotonic() - start, 1))
    assert n.look()[2] == "3"
    n.after(lambda: n.press("End"), "epoch 59, unguided")
    n.after(lambda: n.press("Home"), "epoch 0, unguided")
    assert n.look()[0] == first[0], "back at the first epoch, the first picture"

    other = n.after(lambda: n.board.locator("select").select_option(index=1), "epoch 0, unguided")
    n.after(lambda: n.board.get_by_text("guided", exact=True).click(), "epoch 0, guided")
    n.after(lambda: n.board.get_by_text("guided", exact=True).click(), "epoch 0, unguided")
    assert n.look()[0] == other[0]

    play, stop = n.board.locator(".widget-play button").nth(0), n.board.locator(".widget-play button").nth(1)
    n.after(play.click, "epoch (6|9|12), unguided")
    play.click()
    n.after(stop.click, "epoch 0, unguided")
    assert n.look()[0] == other[0] and n.look()[2] == "0", "played, paused, and back to the beginning"

    if os.environ.get("SCREENSHOT"):
        n.after(lambda: n.board.locator("select").select_option(index=0), "epoch 0, unguided")
        n.after(lambda: n.press("Home", *["ArrowRight"] * 10), "epoch 25, unguided")
        n.screenshot(PICTURE)
        record_property("screenshot in KB", PICTURE.stat().st_size // 1024)

    n.board.get_by_role("button", name="export").click()
    n.board.get_by_text("written: ").wait_for()
    strip, film = map(Path, re.search(r"written: (\S+\.png) and (\S+\.gif)", n.said()).groups())
    recorded = len(list(film.parent.glob("epoch_*.npz")))
    with Image.open(film) as frames, Image.open(strip) as columns:
        record_property("frames of the film", frames.n_frames)
        assert frames.n_frames == recorded > 20
        assert columns.width / columns.height > 7, "epochs 0, 5, 25, 40 and the last in one row"
    n.page.close()


@pytest.mark.slow
def test_it_follows_a_run_that_is_still_training(lab, chromium, tmp_path):
    from lightning.pytorch.callbacks import Callback
    from test_recorder import quick

    from loftr_curriculum.training.run import train

    reached, go_on = threading.Event(), threading.Event()

    class Pause(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                reached.set()
                go_on.wait(5 * WAIT)

    training = threading.Thread(
        target=train, args=(quick(tmp_path, epochs=4),), kwargs=dict(progress=False, callbacks=[Pause()])
    )
    training.start()
    try:
        assert reached.wait(WAIT)
        n = Notebook(lab, chromium, tmp_path)
        n.finish()
        n.after(lambda: n.press("End"), "epoch 1, unguided")
        assert training.is_alive()
        go_on.set()
        training.join(WAIT)
        n.after(lambda: n.board.get_by_role("button", name="refresh").click(), "epoch 3, unguided")
        assert n.look()[2] == "3" and "4 epochs recorded, the last is 3." in n.said()
        n.page.close()
    finally:
        go_on.set()
        training.join(WAIT)


def test_the_picture_of_the_documentation_is_small():
    """Taken with SCREENSHOT set; shown at the top of the notebook."""
    assert 20 < PICTURE.stat().st_size / 1024 <= 150
    assert "../images/match_distribution.png" in NOTEBOOK.read_text(encoding="utf-8")
