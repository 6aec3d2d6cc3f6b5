"""Guards of a batch's pictures: a folder for every pair, and the page, in a real Chromium where
there is one.
"""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_many import Sent, write_batch
from test_registration import QUICK

from loftr_curriculum.geometry import Affine, centre, similarity, warp_image
from loftr_curriculum.io.files import FileError
from loftr_curriculum.io.images import read_image, write_image
from loftr_curriculum.model.config import Matches
from loftr_curriculum.registration import RegistrationConfig, register, register_many
from loftr_curriculum.registration.frames import View, make_frame, unusable
from loftr_curriculum.registration.journal import FIELDS, PICTURES, read_results
from loftr_curriculum.registration.many import Shard, merge_shards
from loftr_curriculum.registration.pair import other_eye
from loftr_curriculum.registration.passes import PassRequest, finish_pass
from loftr_curriculum.registration.registrar import MIRRORED
from loftr_curriculum.registration.verdict import CLOSES, CRITERIA
from loftr_curriculum.report.batch import BatchPictures, as_text, write_report
from loftr_curriculum.report.page import REASON_MEANINGS
from loftr_curriculum.retina.config import EyeConfig, seeds_of
from loftr_curriculum.retina.world import make_world

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "nbs" / "images" / "batch_page.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run_batch(folder, save=(), **more):
    out = folder / "out"
    return register_many(
        folder / "pairs.csv",
        out,
        matcher=Sent(),
        config=QUICK,
        progress=False,
        pictures=BatchPictures(out, save),
        **more,
    )


def test_every_pair_gets_a_folder_with_what_was_asked_for(tmp_path):
    write_batch(tmp_path, 1)
    write_image(tmp_path / "img" / "black.png", np.zeros((99, 99), np.uint8))
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("a/b:c,img/f.png,img/m.png\nblack,img/f.png,img/black.png\nlost,img/f.png,img/none.png\n")
    count = run_batch(tmp_path, ("warped", "overlay", "matches"), workers=2)
    assert count == dict(ok=2, doubtful=0, failed=1, unreadable=1)
    rows = read_results(tmp_path / "out" / "results.csv")
    files = {
        id: sorted(p.name for p in (tmp_path / "out" / row["pictures"]).iterdir()) if row["pictures"] else []
        for id, row in rows.items()
    }
    assert files["p0"] == files["a/b:c"] == ["matches.png", "overlay.png", "warped.png"]
    assert files["black"] == ["matches.png"] and files["lost"] == []
    assert re.fullmatch(r"pairs/a_b_c-\w{6}", rows["a/b:c"]["pictures"])
    alone = register(tmp_path / "img/f.png", tmp_path / "img/m.png", matcher=Sent(), config=QUICK)
    np.testing.assert_array_equal(read_image(tmp_path / "out/pairs/p0/warped.png"), alone.warped)


def test_an_input_among_the_pictures_stays_as_it_is(tmp_path):
    write_batch(tmp_path, 1)
    own = tmp_path / "out" / "pairs" / "p0" / "warped.png"
    own.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "img" / "m.png", own)
    (tmp_path / "pairs.csv").write_text("id,fixed,moving\np0,img/f.png,out/pairs/p0/warped.png\n")
    before = own.read_bytes()
    assert run_batch(tmp_path, ("warped",))["unreadable"] == 1
    assert own.read_bytes() == before
    error = read_results(tmp_path / "out" / "results.csv")["p0"]["error"]
    assert "would be overwritten" in error


def test_a_table_among_the_results_stays_as_it_is(tmp_path):
    write_batch(tmp_path, 1)
    run_batch(tmp_path)
    with pytest.raises(FileError, match="would be overwritten"):
        register_many(tmp_path / "out" / "results.csv", tmp_path / "out", matcher=Sent(), progress=False)


def test_a_page_of_somebody_else_stays_as_it_is(tmp_path):
    write_batch(tmp_path, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("<title>mine</title>")
    with pytest.raises(FileError, match="report.html: is no report of a batch"):
        run_batch(tmp_path)
    assert (tmp_path / "out" / "report.html").read_text() == "<title>mine</title>"
    (tmp_path / "out" / "report.html").unlink()
    run_batch(tmp_path)
    assert run_batch(tmp_path)["ok"] == 1, "our own page is written again"


def page_data(page, id):
    text = re.search(rf'<script type="application/json" id="{id}">(.*?)</script>', page).group(1)
    return json.loads(text)


def test_the_page_holds_all_pairs_and_asks_nobody(tmp_path):
    write_batch(tmp_path, 2)
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("<b>&</script>,img/f.png,img/none.png\n")
    run_batch(tmp_path)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    rows = page_data(page, "rows")
    assert [row["id"] for row in rows] == ["<b>&</script>", "p0", "p1"]
    assert page_data(page, "p1")["aligned"] and page.count("<script") == page.count("</script>") == 4
    assert not re.search(r"https?:|src=|<b>", page) and "default-src 'none'" in page


def reasons_of_a_pass():
    "What a pass says that finds no map, and one that finds a mirrored one."
    points = np.random.default_rng(0).uniform(0, 255, (200, 2))
    plane = np.zeros((256, 256), np.float32)
    view = View(plane, plane >= 0, None, Affine(np.eye(3)))
    request = PassRequest(view, view, 5.0)
    mirrored = Matches(points, points * (-1, 1) + (255, 0), np.ones(200))
    passes = [finish_pass(request, m, plane >= 0, RegistrationConfig()) for m in (mirrored[:0], mirrored)]
    return [reason for found in passes for reason in found.reasons]


def test_every_reason_is_explained_on_the_page():
    config, sides = RegistrationConfig(), {"fixed": {"laterality": "L"}, "moving": {"laterality": "R"}}
    flat = [np.full(size, grey, np.uint8) for size, grey in (((20, 40), 90), ((99, 99), 0), ((99, 99), 90))]
    reasons = [unusable(make_frame(image, None, 512), "fixed", config)[0] for image in flat]
    reasons += [*reasons_of_a_pass(), MIRRORED, other_eye(sides)]
    reasons += [s for c in (*CRITERIA, CLOSES) for s in (c.sentence, c.infinite, c.missing) if s]
    explained = {reason: [words for words, _ in REASON_MEANINGS if words in reason] for reason in reasons}
    assert [reason for reason, words in explained.items() if not words] == []
    assert {words for found in explained.values() for words in found} == {
        words for words, _ in REASON_MEANINGS
    }


def test_the_page_of_shards_leads_to_the_pairs_folders(tmp_path):
    write_batch(tmp_path, 2)
    out = tmp_path / "out"
    for number in (1, 2):
        run_batch(tmp_path, ("overlay",), shard=Shard(number, 2))
    part = (out / "shards" / "1-of-2" / "report.html").read_text(encoding="utf-8")
    (row,) = page_data(part, "rows")
    assert (out / "shards" / "1-of-2" / row["folder"] / "overlay.png").is_file()
    merge_shards(tmp_path / "pairs.csv", out, BatchPictures(out))
    page = (out / "report.html").read_text(encoding="utf-8")
    rows = page_data(page, "rows")
    assert [(out / row["folder"] / "overlay.png").is_file() for row in rows] == [True, True]
    assert page_data(page, "p1")["id"] == rows[1]["id"]


def test_the_page_is_there_while_the_batch_runs(tmp_path):
    write_batch(tmp_path, 3)
    seen = []

    class Looking(Sent):
        def match(self, *images, **rest):
            page = tmp_path / "out" / "report.html"
            seen.append(len(page_data(page.read_text(), "rows")) if page.exists() else 0)
            return super().match(*images, **rest)

    out = tmp_path / "out"
    register_many(
        tmp_path / "pairs.csv",
        out,
        matcher=Looking(),
        config=QUICK,
        progress=False,
        save_every=0,
        pictures=BatchPictures(out),
    )
    assert seen[0] == 0 and max(seen) >= 1


@pytest.fixture(scope="module")
def chromium():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install -e '.[browser]'")
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


def many_rows(folder, n):
    "A page of n pairs: every third is doubtful, and all look like one that was registered."
    write_batch(folder, 1)
    run_batch(folder)
    (row,) = read_results(folder / "out" / "results.csv").values()
    smooth = as_text(np.add.outer(np.arange(192), np.arange(256)).astype(np.uint8))
    picture = {"aligned": True, "fixed": smooth, "other": smooth}
    rows = []
    with open(folder / "out" / PICTURES, "w") as file:
        for k in range(n):
            verdict = "doubtful" if k % 3 == 0 else "ok"
            rows.append(row | {"id": f"P{k:05d}", "verdict": verdict, "probability": f"{k / n:.5f}"})
            file.write(json.dumps(picture | {"id": f"P{k:05d}"}) + "\n")
    assert set(rows[0]) == set(FIELDS)
    return write_report(folder / "out", rows)


@pytest.mark.slow
def test_ten_thousand_pairs_are_filtered_sorted_and_looked_at(chromium, tmp_path):
    page = chromium.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.goto(many_rows(tmp_path, 10_000).as_uri())
    first = page.locator("#body tr").first
    assert first.locator("td").nth(1).text_content() == "P00000"
    assert page.locator("#body tr").count() == 50
    page.uncheck("#kind-doubtful")
    assert page.text_content("#place").startswith("6666 of 10000 pairs, page 1 of 134")
    page.fill("#low", "0.5")
    assert first.locator("td").nth(1).text_content() == "P05000"
    page.click("th button[data-by=probability]")
    page.click("th button[data-by=probability]")
    assert first.locator("td").nth(1).text_content() == "P09998"
    page.click("#after")
    assert "page 2 of" in page.text_content("#place")
    first.locator("button.look").click()
    name = page.text_content("#name")
    page.check("input[value=swipe]")
    page.locator("#border").fill("25")
    assert "25%" in page.locator("#stage img").nth(1).get_attribute("style")
    page.check("input[value=blink]")
    page.locator("#stage img").nth(1).wait_for(state="hidden")
    page.locator("#stage img").nth(1).wait_for(state="visible")
    page.click("#next")
    assert page.text_content("#name") != name
    page.click("#close")
    page.fill("#text", "P07000")
    assert page.locator("#body tr").count() == 1
    assert page.evaluate("document.querySelector('#body img').naturalWidth") > 100
    assert faults == []
    page.close()


def write_eyes(folder, n):
    "Generated eyes: a photograph, an angiogram that is turned and shifted; one pair is of two eyes."
    lines = ["id,fixed,moving"]
    for k in range(n):
        eye = make_world(seeds_of("report", n)[k], EyeConfig(), ("cf", "fa"))
        size = eye.images["cf"].shape[:2]
        turn = similarity(7 * k - 10, 0.95, (20 - 9 * k, 12), center=centre(size))
        write_image(folder / f"{k}_cf.png", eye.images["cf"])
        write_image(folder / f"{k}_fa.png", warp_image(eye.images["fa"], turn, size))
        lines.append(f"eye {k},{k}_cf.png,{k}_fa.png")
    lines.append("two eyes,0_cf.png,1_fa.png")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_the_page_looks_as_in_the_documentation(chromium, tmp_path):
    "With SCREENSHOT set the picture of the documentation is taken anew."
    write_eyes(tmp_path, 3)
    out = tmp_path / "out"
    count = register_many(tmp_path / "pairs.csv", out, progress=False, pictures=BatchPictures(out))
    assert count["failed"] == 1 and count["ok"] + count["doubtful"] == 3
    page = chromium.new_page(viewport={"width": 1000, "height": 560})
    page.goto((out / "report.html").as_uri())
    assert page.locator("#body img").count() == 8
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 1000, "the page is wider than its window"
    if os.environ.get("SCREENSHOT"):
        page.screenshot(path=PICTURE)
    page.close()
