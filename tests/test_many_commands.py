"""Guards of `register-many` and `warp --id` on the command line."""

import re

import numpy as np
import pytest
from test_cli import complains, run  # noqa: F401
from test_many import Sent, write_batch

from loftr_curriculum.io.files import read_json
from loftr_curriculum.io.images import read_image, write_image
from loftr_curriculum.registration.journal import read_results
from loftr_curriculum.registration.review import Decision, write_review

QUICK = ("--long-side", "256", "--second-long-sides", "[256,256]", "--retry-long-sides", "[]")


@pytest.fixture(autouse=True)
def small_matcher(monkeypatch):
    monkeypatch.setattr("loftr_curriculum.model.weights.load_matcher", lambda path, device: Sent())


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "cf/7_cf.png with fa/7_fa.png, and two images alone."
    write_batch(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    fixed, moving = read_image("img/f.png"), read_image("img/m.png")
    for name, image in (("cf/7_cf", fixed), ("cf/8_cf", fixed), ("fa/7_fa", moving), ("fa/9_fa", moving)):
        write_image(f"{name}.png", image)
    return ("--fixed", "cf/*.png", "--moving", "fa/*.png", "--match", r"(\w+)_")


def test_two_folders_are_tried_dry_then_registered_then_warped(folders, capsys):
    assert run("register-many", *folders, "--out", "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "7: cf/7_cf.png <- fa/7_fa.png\n" in said and "1 pairs, 2 images alone" in said
    assert "alone: cf/8_cf.png: no moving image for 8" in said
    assert run("register-many", *folders, "--out", "out", "--save", "warped", *QUICK) == 0
    assert "alone: fa/9_fa.png: no fixed image for 9" in capsys.readouterr().err
    for transform in ("out", "out/transforms.json", "out/maps.jsonl"):
        assert run("warp", "fa/7_fa.png", transform, "--id", "7", "--out", "warped.png", "--overwrite") == 0
        np.testing.assert_array_equal(read_image("warped.png"), read_image("out/pairs/7/warped.png"))


def test_warp_names_the_pair_without_an_answer_and_why(tmp_path, capsys):
    write_batch(tmp_path, 1)
    write_image(tmp_path / "img" / "black.png", np.zeros((99, 99), np.uint8))
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("black,img/f.png,img/black.png\nlost,img/f.png,img/none.png\n")
    out = tmp_path / "out"
    assert run("register-many", tmp_path / "pairs.csv", "--out", out, *QUICK) == 4
    image = tmp_path / "img" / "m.png"
    for id, why in (("black", "the moving image img/black.png is black"), ("lost", "none.png: no such file")):
        capsys.readouterr()
        assert run("warp", image, out, "--id", id, "--out", tmp_path / "w.png") == 2
        said = capsys.readouterr().err
        assert f"{out}: {id}: holds no transform, the registration failed: " in said and why in said
    assert (
        run(
            *("register-many", tmp_path / "pairs.csv", "--out", tmp_path / "d"),
            *QUICK,
            "--ok-inliers",
            "5000",
        )
        == 4
    )
    capsys.readouterr()
    assert run("warp", image, tmp_path / "d", "--id", "p0", "--out", tmp_path / "w.png") == 0
    assert re.search(r"the map is doubtful: \d+ binned matches agree", capsys.readouterr().err)


def test_a_corrected_file_is_told_and_its_pair_registered_anew(tmp_path, capsys):
    write_batch(tmp_path, 2)
    table, out, image = tmp_path / "pairs.csv", tmp_path / "out", tmp_path / "img" / "m.png"
    table.write_text(table.read_text().replace("p1,img/f.png,img/m.png", "007,img/f.png,img/x.png"))
    write_image(tmp_path / "img" / "x.png", read_image(image))
    words = ("register-many", table, "--out", out, *QUICK)
    assert run(*words) == 0
    write_image(tmp_path / "img" / "x.png", np.zeros((99, 99), np.uint8))
    capsys.readouterr()
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "changed since it was registered: img/x.png of 007; the answers of before stay" in said
    assert "to register anew add --redo 007\n" in said
    assert run(*words, "--redo", "007") == 4
    said = capsys.readouterr().out
    assert "1 ok, 0 doubtful, 1 failed" in said and "changed" not in said and "already" not in said
    assert run(*words) == 4
    assert "changed" not in capsys.readouterr().out
    table.write_text(table.read_text().replace("img/x.png", "img/m.png"))
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.out == "" and "007 was registered with img/x.png, the table now names img/m.png" in said.err
    assert run(*words, "--transform", "similarity") == 2
    said = capsys.readouterr()
    assert said.out == "" and 'other settings (transform was "auto" and is "similarity"); choose' in said.err
    assert run(*words, "--redo", "007, p0") == 0
    assert "2 ok, 0 doubtful" in capsys.readouterr().out


def test_a_new_answer_gets_no_old_pictures_and_no_old_decision(tmp_path, complains, capsys):  # noqa: F811
    write_batch(tmp_path, 2)
    out = tmp_path / "out"
    words = ("register-many", tmp_path / "pairs.csv", "--out", out, *QUICK)
    assert run(*words, "--save", "overlay") == 0
    capsys.readouterr()
    assert "the old answer has pictures; add --save overlay" in complains(*words, "--redo", "p0")
    write_review(out, [Decision("p1", "accepted")])
    again = (*words, "--save", "overlay", "--redo")
    assert "review.csv has a decision on the old answer" in complains(*again, "p1")
    assert "redo p7: no pair of the table has this id" in complains(*again, "p0,p7")
    assert "--merge registers nothing" in complains(*words, "--merge", "--redo", "p0")
    assert run(*again, "p0") == 0
    assert [path.name for path in (out / "pairs" / "p0").iterdir()] == ["overlay.png"]


def test_answered_pairs_that_get_no_pictures_are_counted(tmp_path, capsys):
    write_batch(tmp_path, 2)
    write_image(tmp_path / "img" / "black.png", np.zeros((99, 99), np.uint8))
    lines = (tmp_path / "pairs.csv").read_text().splitlines() + ["black,img/f.png,img/black.png"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines[:2]) + "\n")
    words = ("register-many", tmp_path / "pairs.csv", "--out", tmp_path / "out", *QUICK)
    assert run(*words) == 0
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    told = "1 pairs that have an answer already get no pictures"
    assert run(*words, "--save", "overlay") == 4
    assert told in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out" / "pairs").iterdir()] == ["p1"]
    assert run(*words, "--save", "overlay") == 4  # the failed pair has none to draw
    assert told in capsys.readouterr().out
    assert run(*words) == 4
    assert "no pictures" not in capsys.readouterr().out


def test_a_dry_run_writes_nothing(folders, tmp_path):
    assert run("register-many", "pairs.csv", "--out", "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()


def test_the_status_is_0_only_where_every_pair_was_answered(tmp_path):
    write_batch(tmp_path, 1)
    words = ("register-many", tmp_path / "pairs.csv", "--out", tmp_path / "out", *QUICK)
    assert run(*words) == 0
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("lost,img/f.png,img/none.png\n")
    assert run(*words) == 4
    write_image(tmp_path / "img" / "none.png", read_image(tmp_path / "img" / "m.png"))
    assert run(*words) == 0
    assert run(*words[:-6], "--ok-inliers", "5000", "--out", tmp_path / "doubt", *QUICK) == 3


def numbers_of(line):
    "`1 ok, 0 failed` as a dict."
    return {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", line)}


def test_the_screen_the_table_and_the_report_count_alike(tmp_path, capsys):
    write_batch(tmp_path, 2)
    whole = tmp_path / "pairs.csv"
    short = tmp_path / "short.csv"
    short.write_text("\n".join(whole.read_text().splitlines()[:2]) + "\n")
    with open(whole, "a") as table:
        table.write("lost,img/f.png,img/none.png\n")
    out = tmp_path / "out"
    assert run("register-many", whole, "--out", out, *QUICK) == 4
    said = capsys.readouterr().out.splitlines()
    screen = numbers_of(said[0])
    rows = read_results(out / "results.csv").values()
    table = {verdict: 0 for verdict in ("ok", "doubtful", "failed")} | {"unreadable": 0}
    for row in rows:
        table["unreadable" if row["error"] else row["verdict"]] += 1
    page = (out / "report.html").read_text(encoding="utf-8")
    report = {kind: int(n) for kind, n in re.findall(r"checked> (\w+) \((\d+)\)", page)}
    assert screen == table == report and screen["unreadable"] == 1 and sum(screen.values()) == len(rows)
    assert not any("more, which this table does not name" in line for line in said)
    assert run("register-many", short, "--out", out, *QUICK) == 0
    said = capsys.readouterr().out
    assert "1 ok, 0 doubtful" in said
    assert "the files of the folder hold 2 more, which this table does not name" in said


def test_shards_are_registered_and_merged(tmp_path, capsys):
    write_batch(tmp_path, 2)
    words = ("register-many", tmp_path / "pairs.csv", "--out", tmp_path / "out", *QUICK)
    assert run(*words, "--shard", "2/2") == 0
    assert "2-of-2: report.html" in capsys.readouterr().out
    assert run(*words, "--merge") == 4
    assert capsys.readouterr().out.startswith("1 ok, 0 doubtful, 0 failed, 0 unreadable, 1 missing")
    assert run(*words) == 0
    assert list(read_results(tmp_path / "out" / "results.csv")) == ["p0", "p1"]
    assert list(read_json(tmp_path / "out" / "transforms.json")) == ["p0", "p1", "verdicts"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("register-many --out out", "expected a table of pairs, or all of --fixed"),
        ("register-many pairs.csv --match x --out out", "exclude each other"),
        ("register-many pairs.csv --out out --save wraped", "expected some of warped"),
        ("register-many pairs.csv --out out --shard 3", "such as 3/8"),
        ("register-many pairs.csv --out out --shard 0/8", "expected 1/8 to 8/8"),
        ("register-many pairs.csv --out out --workers -1", "workers -1: expected at least 1"),
        ("register-many pairs.csv --out out --merge", "expected the results of shards"),
        ("register-many --fixed cf/* --moving none/* --match x --out out", "none/*: no files"),
        ("register-many --fixed cf/* --moving fa/* --match x --out out", "no image has a partner"),
        ("register-many wrong.csv --out out", "moving missing; found 'Id;Fixed'"),
        ("register-many cf --out out", "cf: expected a table of pairs; images without a table"),
        ("register-many cf/*.png --out out", "cf/*.png: expected a table of pairs"),
        (
            "register-many cf/7_cf.png cf/8_cf.png --out out",
            "unexpected: cf/8_cf.png; put a pattern in quotes",
        ),
        (
            "register-many a b c d e --out out",
            "unexpected: b c d and 1 more; usage: loftr-curriculum register-many",
        ),
        ("warp fa/7_fa.png cf --id 7 --out x.png", "no such file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(words, says, folders, tmp_path, complains):  # noqa: F811
    (tmp_path / "wrong.csv").write_text("Id;Fixed\n1;a\n")
    assert says in complains(*words.split())
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_dry_run_names_files_that_are_missing(tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("id,fixed,moving\na,nope.png,gone.png\n")
    assert run("register-many", tmp_path / "pairs.csv", "--out", tmp_path / "o", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "missing: " in said and "1 pairs, 0 images alone, 2 files missing" in said


def test_a_folder_in_place_of_its_files_is_told_what_to_write(tmp_path, capsys):
    given = ("--fixed", tmp_path, "--moving", tmp_path, "--match", r"(\w+)_", "--out", "o")
    assert run("register-many", *given) == 2
    assert "a folder; name its files, as in" in capsys.readouterr().err
