"""Guards of batches: tables, interruptions, several processes, a cluster, shards, files of before."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_registration import QUICK, UprightSift, a_pair

from loftr_curriculum.geometry import affine_of
from loftr_curriculum.io.files import FileError
from loftr_curriculum.io.images import read_image, write_image
from loftr_curriculum.registration import RegistrationConfig, register, register_many
from loftr_curriculum.registration.journal import (
    FIELDS,
    MATRIX,
    load_batch_transform,
    read_maps,
    read_results,
    row_matrix,
)
from loftr_curriculum.registration.many import Shard, changed_files, merge_shards
from loftr_curriculum.registration.table import Pair, find_pairs, read_batch

ROOT = Path(__file__).resolve().parents[1]


class Sent(UprightSift):
    "A matcher that can be sent to other processes."

    def __reduce__(self):
        return type(self), ()


class Slow(Sent):
    "Half a second a pair, at least."

    def match(self, *images, **rest):
        time.sleep(0.2)
        return super().match(*images, **rest)


class Deadly(Sent):
    "Takes its process down when it sees an image of the size of wide.png."

    def match(self, image0, image1, **rest):
        if image1.shape[2] < 150:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().match(image0, image1, **rest)


def answers(out):
    "The rows of a batch without what differs from run to run."
    rows = read_results(out / "results.csv").values()
    return [{name: row[name] for name in FIELDS if name not in ("seconds", "memory_mb")} for row in rows]


def write_batch(folder, n=4):
    fixed, moving, truth = a_pair(7)
    write_image(folder / "img" / "f.png", fixed), write_image(folder / "img" / "m.png", moving)
    lines = ["id,fixed,moving"] + [f"p{k},img/f.png,img/m.png" for k in range(n)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return truth


class Interrupted(UprightSift):
    def match(self, *args, **rest):
        if self.calls == 7:
            raise KeyboardInterrupt
        return super().match(*args, **rest)


def test_an_interrupted_batch_goes_on_where_it_stopped(tmp_path):
    truth = write_batch(tmp_path)
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        register_many(table, out, matcher=Interrupted(), config=QUICK, progress=False)
    so_far = json.loads((out / "transforms.json").read_text())
    assert [so_far[f"p{k}"] is not None for k in range(4)] == [True, True, False, False]
    with open(out / "results.csv", "a") as f:
        f.write("p2,img/f.png,im")  # the power failed in the middle of a line

    class Same(UprightSift):
        pass

    Same.__name__ = "Interrupted"  # the same matcher as far as the batch can know
    rest = Same()
    assert register_many(table, out, matcher=rest, config=QUICK, progress=False) == dict(
        ok=4, doubtful=0, failed=0, unreadable=0
    )
    assert rest.calls == 6
    with open(out / "results.csv") as table_of_results:
        rows = list(csv.DictReader(table_of_results))
    assert [r["id"] for r in rows] == ["p0", "p1", "p2", "p3"] and tuple(rows[0]) == FIELDS
    final = json.loads((out / "transforms.json").read_text())
    assert len({json.dumps(final[f"p{k}"]) for k in range(4)}) == 1 and np.allclose(
        np.array(final["p3"])[:2, :2], truth[:2, :2], atol=0.01
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "maps.jsonl",
        "results.csv",
        "settings.json",
        "transforms.json",
    ]


def test_one_bad_pair_never_stops_a_batch(tmp_path):
    write_batch(tmp_path, 1)
    (tmp_path / "img" / "torn.png").write_bytes((tmp_path / "img" / "f.png").read_bytes()[:300])
    write_image(tmp_path / "img" / "black.png", np.zeros((99, 99), np.uint8))

    class Moody(UprightSift):
        def match(self, image0, image1, **rest):
            if image1.shape[2] < 150:
                raise RuntimeError("out of\nmemory")
            return super().match(image0, image1, **rest)

    write_image(tmp_path / "img" / "wide.png", a_pair()[0][:200])
    (tmp_path / "pairs.csv").write_text(
        '\ufeffid,fixed,moving,note\ntorn,img/torn.png,img/m.png,\nlost,img/f.png,"img/lo,st.png",x\nblack,img/f.png,img/black.png,\nmoody,img/f.png,img/wide.png,\nfine,img/f.png,img/m.png,\n',
        encoding="utf-8",
    )
    count = register_many(
        tmp_path / "pairs.csv", tmp_path / "out", matcher=Moody(), config=QUICK, progress=False
    )
    assert count == dict(ok=1, doubtful=0, failed=1, unreadable=3)
    rows = read_results(tmp_path / "out" / "results.csv")
    assert (
        "torn.png" in rows["torn"]["error"]
        and "lo,st.png" in rows["lost"]["error"]
        and rows["moody"]["error"] == "RuntimeError: out of memory"
    )
    assert (
        rows["black"]["error"] == ""
        and rows["black"]["reasons"] == "the moving image img/black.png is black"
        and rows["fine"]["verdict"] == "ok"
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("id,fixed\na,b\n", "moving missing"),
        ("", "empty"),
        ("id,fixed,moving\n", "no pairs"),
        (
            "id,fixed,moving\na,f.png,m.png\na,f.png,m.png\n,f.png,m.png\n",
            "line 3: id a was used in line 2; line 4: id is empty",
        ),
    ],
)
def test_a_faulty_table_is_refused_before_any_work(text, says, tmp_path):
    (tmp_path / "pairs.csv").write_text(text)
    matcher = UprightSift()
    with pytest.raises(ValueError, match=says):
        register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=matcher, progress=False)
    assert matcher.calls == 0 and not (tmp_path / "out").exists()


def test_a_folder_with_other_results_is_refused(tmp_path):
    write_batch(tmp_path, 1)
    matcher = UprightSift()
    register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=matcher, progress=False)
    before = (tmp_path / "out" / "results.csv").read_bytes()
    with pytest.raises(ValueError, match='other settings .transform was "auto" and is "similarity".; choose'):
        register_many(
            tmp_path / "pairs.csv",
            tmp_path / "out",
            matcher=matcher,
            config=RegistrationConfig(transform="similarity"),
            progress=False,
        )
    with pytest.raises(ValueError, match="other settings .the weights are others.; choose"):
        register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=Sent(), progress=False)
    (tmp_path / "pairs.csv").write_text("id,fixed,moving\np0,img/f.png,img/f.png\n")
    with pytest.raises(
        ValueError, match="p0 was registered with img/m.png, the table now names img/f.png; .*--redo p0"
    ):
        register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=matcher, progress=False)
    assert (tmp_path / "out" / "results.csv").read_bytes() == before
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="results.csv without settings.json"):
        register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=matcher, progress=False)
    assert (tmp_path / "out" / "results.csv").read_bytes() == before


def test_a_pair_that_could_not_be_read_may_name_another_file(tmp_path):
    write_batch(tmp_path, 1)
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    plain = dict(matcher=UprightSift(), config=QUICK, progress=False)
    table.write_text("id,fixed,moving\np0,img/f.png,img/mm.png\n")
    assert register_many(table, out, **plain)["unreadable"] == 1
    table.write_text("id,fixed,moving\np0,img/f.png,img/m.png\n")
    assert register_many(table, out, **plain)["ok"] == 1
    assert read_results(out / "results.csv")["p0"]["moving"] == "img/m.png"


def test_a_pair_is_registered_anew_and_keeps_its_answer_until_then(tmp_path):
    write_batch(tmp_path, 2)
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    plain = dict(config=QUICK, progress=False)
    register_many(table, out, matcher=UprightSift(), **plain)
    before, files = read_results(out / "results.csv"), (out / "results.csv", out / "transforms.json")
    kept = [path.read_bytes() for path in files]

    class Ended(UprightSift):
        def match(self, *args, **rest):
            raise KeyboardInterrupt

    Ended.__name__ = "UprightSift"
    with pytest.raises(KeyboardInterrupt):
        register_many(table, out, matcher=Ended(), redo=["p1"], **plain)
    assert [path.read_bytes() for path in files] == kept
    image = (tmp_path / "img" / "m.png").read_bytes()
    (tmp_path / "img" / "m.png").write_bytes(image[:300])
    with pytest.raises(FileError, match="could not be registered anew and keep their answers .p1: .*m.png"):
        register_many(table, out, matcher=UprightSift(), redo=["p1"], **plain)
    assert [path.read_bytes() for path in files] == kept
    write_image(tmp_path / "img" / "m.png", read_image(tmp_path / "img" / "f.png"))
    assert set(changed_files(before, read_batch(table))) == {"p0", "p1"}
    matcher = UprightSift()
    assert register_many(table, out, matcher=matcher, redo=["p1"], **plain)["ok"] == 2
    assert matcher.calls == 3
    after = read_results(out / "results.csv")
    assert list(after) == ["p0", "p1"] and after["p0"] == before["p0"]
    assert abs(float(after["p1"]["m01"])) < 0.01 < abs(float(before["p1"]["m01"]))
    maps = read_maps(out / "maps.jsonl")
    np.testing.assert_allclose(affine_of(maps["p1"]), row_matrix(after["p1"]), atol=1e-6)
    with pytest.raises(ValueError, match="redo nobody: no pair of the table"):
        register_many(table, out, matcher=matcher, redo=["nobody"], **plain)


def test_a_large_table_costs_little_beside_the_registrations(tmp_path, monkeypatch):
    "Two thousand pairs whose registration is free: the bookkeeping is far under a millisecond a pair."
    import loftr_curriculum.registration.workers as workers

    pair = a_pair()[:2]
    result, side = register(*pair, matcher=UprightSift()), workers.open_side(pair[0], "fixed", QUICK)
    monkeypatch.setattr(workers, "register", lambda *a, **k: result)
    monkeypatch.setattr(workers, "open_side", lambda *a: side)
    (tmp_path / "pairs.csv").write_text(
        "id,fixed,moving\n" + "".join(f"{k},f{k}.png,m{k}.png\n" for k in range(2000))
    )
    start = time.perf_counter()
    assert (
        register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=UprightSift(), progress=False)["ok"]
        == 2000
    )
    assert time.perf_counter() - start < 4
    again = json.loads((tmp_path / "out" / "transforms.json").read_text())
    assert np.array_equal(np.array(again["1999"]), result.moving_to_fixed)  # not a digit is lost


# ---- tables


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_any_spreadsheet_are_read(encoding, delimiter, tmp_path):
    header = delimiter.join((" Moving ", "ID", "FIXED", "Größe"))
    rows = delimiter.join(("sub\\m ä.png", "ä 1", '"f.png"', "3"))
    (tmp_path / "pairs.csv").write_bytes(f"{header}\r\n{rows}\r\n".encode(encoding))
    (pair,) = read_batch(tmp_path / "pairs.csv")
    assert (pair.id, pair.fixed) == ("ä 1", "f.png")
    assert pair.files == (tmp_path / "f.png", tmp_path / "sub" / "m ä.png")


def test_an_error_quotes_the_header(tmp_path):
    (tmp_path / "pairs.csv").write_text("Patient;Fixed;Bild\n1;a;b\n")
    with pytest.raises(FileError, match="pairs.csv: .*id, moving missing; found 'Patient;Fixed;Bild'"):
        read_batch(tmp_path / "pairs.csv")


def test_no_two_ids_share_a_folder(tmp_path):
    ids = ("A", "a", "a/b", "a:b", "a_b", "con", "CON", "x.", "x")
    lines = "".join(f"{id},f.png,m.png\n" for id in ids)
    (tmp_path / "pairs.csv").write_text(f"id,fixed,moving\n{lines}")
    names = [pair.name for pair in read_batch(tmp_path / "pairs.csv")]
    assert len({name.casefold() for name in names}) == len(ids)
    assert names[0] == "A" and names[4] == "a_b"


def test_a_part_and_more_of_a_table_go_on_in_one_folder(tmp_path):
    write_batch(tmp_path, 3)
    lines = (tmp_path / "pairs.csv").read_text().splitlines(True)
    table, out = tmp_path / "some.csv", tmp_path / "out"
    for some, calls in ((lines[:3], 6), ([lines[0], lines[2]], 0), ([lines[0], lines[3], lines[1]], 3)):
        table.write_text("".join(some))
        matcher = UprightSift()
        count = register_many(table, out, matcher=matcher, config=QUICK, progress=False)
        assert count["ok"] == sum(count.values()) == len(some) - 1
        assert matcher.calls == calls
    assert list(read_results(out / "results.csv")) == ["p2", "p0", "p1"]
    assert set(json.loads((out / "transforms.json").read_text())["verdicts"]) == {"p0", "p1", "p2"}


def test_pairs_of_two_folders_are_registered(tmp_path, monkeypatch):
    fixed, moving, _ = a_pair(7)
    write_image(tmp_path / "cf" / "7_cf.png", fixed)
    write_image(tmp_path / "fa" / "7_fa.png", moving)
    write_image(tmp_path / "fa" / "8_fa.png", moving)
    monkeypatch.chdir(tmp_path)
    found = find_pairs("cf/*.png", "fa/*.png", r"(\d+)_")
    assert [path for path, _ in found.alone] == ["fa/8_fa.png"]
    assert register_many(found.pairs, "out", matcher=UprightSift(), config=QUICK, progress=False)["ok"] == 1


# ---- what the files say


def test_files_say_how_far_to_believe_a_map(tmp_path):
    write_batch(tmp_path, 1)
    out = tmp_path / "out"
    register_many(tmp_path / "pairs.csv", out, matcher=UprightSift(), config=QUICK, progress=False)
    said = json.loads((out / "transforms.json").read_text())["verdicts"]["p0"]
    line = json.loads((out / "maps.jsonl").read_text())
    assert said["verdict"] == line["verdict"] == "ok"
    assert said["probability"] == pytest.approx(line["probability"], rel=1e-3) and said["probability"] > 0.5
    assert said["fixed_size"] == line["fixed_size"] == [420, 480]
    record = load_batch_transform(out, "p0")
    assert record.moving_size == (440, 400) and record.point_map == read_maps(out / "maps.jsonl")["p0"]


def test_a_folder_of_before_goes_on(tmp_path):
    "Fewer columns, maps without verdicts, a plain transforms.json."
    write_batch(tmp_path, 2)
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    register_many(table, out, matcher=UprightSift(), config=QUICK, progress=False)
    rows = read_results(out / "results.csv")
    old = [name for name in FIELDS if not name.endswith(("height", "width")) and name != "pictures"]
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, old, extrasaction="ignore")
        writer.writeheader()
        writer.writerow(rows["p0"])
    first = json.loads((out / "maps.jsonl").read_text().splitlines()[0])
    (out / "maps.jsonl").write_text(json.dumps({"id": "p0", "map": first["map"]}) + "\n")
    matcher = UprightSift()
    assert register_many(table, out, matcher=matcher, config=QUICK, progress=False)["ok"] == 2
    assert matcher.calls == 3
    again = read_results(out / "results.csv")
    assert [again[id][name] for id in again for name in MATRIX] == [
        rows[id][name] for id in rows for name in MATRIX
    ]
    assert again["p1"]["fixed_width"] == "480" and set(read_maps(out / "maps.jsonl")) == {"p0", "p1"}


# ---- several processes


def test_two_processes_answer_as_one(tmp_path):
    write_batch(tmp_path, 3)
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("lost,img/f.png,img/none.png\n")
    write_image(tmp_path / "img" / "black.png", np.zeros((99, 99), np.uint8))
    counts = [
        register_many(
            tmp_path / "pairs.csv",
            tmp_path / f"out{workers}",
            matcher=Sent(),
            config=QUICK,
            progress=False,
            workers=workers,
        )
        for workers in (1, 2)
    ]
    assert counts == [dict(ok=3, doubtful=0, failed=0, unreadable=1)] * 2
    assert answers(tmp_path / "out1") == answers(tmp_path / "out2")
    transforms = [(tmp_path / f"out{k}" / "transforms.json").read_bytes() for k in (1, 2)]
    assert transforms[0] == transforms[1]


def test_a_pair_that_kills_its_process_is_the_only_one_lost(tmp_path):
    write_batch(tmp_path, 3)
    write_image(tmp_path / "img" / "wide.png", a_pair()[0][:200])
    text = (tmp_path / "pairs.csv").read_text()
    (tmp_path / "pairs.csv").write_text(text.replace("p1,img/f.png,img/m.png", "p1,img/f.png,img/wide.png"))
    count = register_many(
        tmp_path / "pairs.csv",
        tmp_path / "out",
        matcher=Deadly(),
        config=QUICK,
        progress=False,
        workers=2,
    )
    assert count == dict(ok=2, doubtful=0, failed=0, unreadable=1)
    assert "died" in read_results(tmp_path / "out" / "results.csv")["p1"]["error"]


def test_a_matcher_that_cannot_be_sent_is_refused(tmp_path):
    write_batch(tmp_path, 2)
    matcher = UprightSift()
    with pytest.raises(ValueError, match="workers=1"):
        register_many(tmp_path / "pairs.csv", tmp_path / "out", matcher=matcher, progress=False, workers=2)
    assert matcher.calls == 0


BATCH = """
import sys
from pathlib import Path
from test_many import QUICK, Slow
from loftr_curriculum.registration import register_many
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    register_many(folder / "pairs.csv", folder / "out", matcher=Slow(), config=QUICK, workers=2)
"""


def start_batch(folder):
    "A batch in another process, once its first row is there."
    (folder / "batch.py").write_text(BATCH)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    batch = subprocess.Popen(
        [sys.executable, folder / "batch.py", folder],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    journal = folder / "out" / "results.csv"
    end = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert batch.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return batch


def processes_of(session):
    "The living processes of a session."
    done = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if " Z" not in line]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_batch_goes_on_and_leaves_no_process(how, tmp_path):
    write_batch(tmp_path, 8)
    batch = start_batch(tmp_path)
    assert len(processes_of(batch.pid)) > 2
    if how == signal.SIGINT:
        os.killpg(batch.pid, how)  # as a terminal does
    else:
        batch.kill()
    assert batch.wait(30) != 0
    end = time.monotonic() + 30
    while processes_of(batch.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_of(batch.pid) == []
    done = read_results(tmp_path / "out" / "results.csv")
    rest = Sent()
    Sent.__name__ = "Slow"  # the same matcher as far as the batch can know
    try:
        count = register_many(
            tmp_path / "pairs.csv", tmp_path / "out", matcher=rest, config=QUICK, progress=False
        )
    finally:
        Sent.__name__ = "Sent"
    assert count["ok"] == 8 and 1 <= len(done) < 8
    assert rest.calls == 3 * (8 - len(done))  # not one finished pair is done again


# ---- shards


def test_shards_make_the_batch_of_one_run(tmp_path):
    write_batch(tmp_path, 5)
    table = tmp_path / "pairs.csv"
    plain = dict(config=QUICK, progress=False)
    register_many(table, tmp_path / "whole", matcher=UprightSift(), **plain)
    for number in (3, 1, 2):
        register_many(table, tmp_path / "parts", matcher=UprightSift(), shard=Shard(number, 3), **plain)
        count = merge_shards(table, tmp_path / "parts")
    assert count == dict(ok=5, doubtful=0, failed=0, unreadable=0)
    assert answers(tmp_path / "parts") == answers(tmp_path / "whole")
    for name in ("transforms.json", "settings.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(read_maps(tmp_path / "parts" / "maps.jsonl")) == 5


def test_shards_of_other_settings_are_not_merged(tmp_path):
    write_batch(tmp_path, 2)
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    for number, config in ((1, QUICK), (2, RegistrationConfig(long_side=300))):
        register_many(
            table, out, matcher=UprightSift(), config=config, shard=Shard(number, 2), progress=False
        )
    with pytest.raises(FileError, match="2-of-2.*other settings"):
        merge_shards(table, out)
    with pytest.raises(FileError, match="results of shards"):
        merge_shards(table, tmp_path / "nothing")


# ---- pairs that a program makes


def test_pairs_of_a_program_are_checked_and_named(tmp_path):
    write_batch(tmp_path, 1)
    pairs = [Pair(id, "img/f.png", "img/m.png", tmp_path) for id in ("a/1", "a:1")]
    more = dict(matcher=UprightSift(), config=QUICK, progress=False)
    assert register_many(pairs, tmp_path / "out", **more)["ok"] == 2
    for wrong, says in ((pairs[:1] * 2, "pair 2: id a/1 was used in pair 1"), ([], "no pairs")):
        with pytest.raises(FileError, match=says):
            register_many(wrong, tmp_path / "wrong", **more)
    with pytest.raises(FileError, match="id verdicts is kept for transforms.json"):
        register_many([Pair("verdicts", "f.png", "m.png", tmp_path)], tmp_path / "wrong", **more)


def test_a_script_without_a_guard_is_told_so(tmp_path):
    write_batch(tmp_path, 2)
    (tmp_path / "batch.py").write_text(BATCH.replace('if __name__ == "__main__":', "if True:"))
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, tmp_path / "batch.py", tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode and "a script needs if __name__ == '__main__'" in done.stderr


def test_pairs_side_by_side_are_answered_as_alone(tmp_path):
    write_batch(tmp_path, 3)
    write_image(tmp_path / "img" / "wide.png", a_pair()[0][:300])
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("wide,img/f.png,img/wide.png\nlost,img/f.png,img/none.png\n")
    alone, lots = tmp_path / "alone", tmp_path / "lots"
    for out, batch in ((alone, 1), (lots, 3)):
        register_many(
            tmp_path / "pairs.csv",
            out,
            matcher=UprightSift(),
            config=QUICK,
            progress=False,
            batch=batch,
        )
    one, other = (read_results(out / "results.csv") for out in (alone, lots))
    assert [row["verdict"] for row in one.values()] == [row["verdict"] for row in other.values()]
    assert other["lost"]["error"] == one["lost"]["error"] != ""
    for id in ("p0", "p2", "wide"):
        maps = [read_maps(out / "maps.jsonl")[id] for out in (alone, lots)]
        points = np.array([[0.0, 0.0], [400.0, 0.0], [0.0, 300.0]])
        assert np.abs(maps[0](points) - maps[1](points)).max() < 1e-4
    with pytest.raises(ValueError, match="batch 0: expected at least 1"):
        register_many(tmp_path / "pairs.csv", lots, matcher=UprightSift(), batch=0)


def test_one_fixed_image_is_opened_once(tmp_path, monkeypatch):
    import loftr_curriculum.registration.workers as workers

    write_batch(tmp_path, 3)
    opened, really = [], workers.open_side
    monkeypatch.setattr(workers, "open_side", lambda path, *rest: opened.append(path) or really(path, *rest))
    out = tmp_path / "out"
    register_many(tmp_path / "pairs.csv", out, matcher=UprightSift(), config=QUICK, progress=False)
    assert opened == [tmp_path / "img" / "f.png"]
    plain = register(tmp_path / "img/f.png", tmp_path / "img/m.png", matcher=UprightSift(), config=QUICK)
    assert np.array_equal(load_batch_transform(out, "p2").matrix, plain.moving_to_fixed)


class Counted:
    "Counts the images that a backbone sees, and notes the fixed views that a matcher is shown."

    def __init__(self, matcher, monkeypatch):
        self.images, self.views, really = 0, [], matcher.match
        matcher.backbone.register_forward_hook(lambda _, given, __: self.count(len(given[0])))
        monkeypatch.setattr(
            matcher, "match", lambda fixed, *rest, **how: self.see(really, fixed, *rest, **how)
        )

    def count(self, images):
        self.images += images

    def see(self, really, fixed, *rest, **how):
        self.views.append(fixed.numpy().tobytes())
        return really(fixed, *rest, **how)


def test_the_backbone_sees_every_view_of_a_fixed_image_once(tmp_path, monkeypatch):
    from loftr_curriculum.model.weights import PACKAGED, load_matcher

    if not PACKAGED.is_file():
        pytest.skip("no packaged weights in this checkout")
    write_batch(tmp_path, 3)
    out, matcher = tmp_path / "out", load_matcher()
    counted = Counted(matcher, monkeypatch)
    register_many(tmp_path / "pairs.csv", out, matcher=matcher, config=QUICK, progress=False)
    assert counted.images == len(counted.views) + len(set(counted.views)) < 2 * len(counted.views)
    assert matcher.kept_maps is None, "weights may change again"
    plain = register(tmp_path / "img/f.png", tmp_path / "img/m.png", matcher=load_matcher(), config=QUICK)
    row = read_results(out / "results.csv")["p2"]
    assert row["verdict"] == plain.verdict
    if plain.moving_to_fixed is not None:
        assert np.abs(load_batch_transform(out, "p2").matrix - plain.moving_to_fixed).max() < 1e-4


def test_the_memory_of_a_fixed_image_ends_with_it(tmp_path):
    import torch

    from loftr_curriculum.model.matcher import MOST_VIEWS
    from loftr_curriculum.registration.workers import LastFixed

    fixed, moving, _ = a_pair(7)
    path, last = tmp_path / "f.png", LastFixed()
    write_image(path, fixed)
    last.open(path, QUICK)
    for k in range(MOST_VIEWS + 3):
        last.maps.of(torch.full((1, 1, 16, 16), float(k)), lambda image: image)
    assert len(last.maps.views) == MOST_VIEWS
    last.open(path, QUICK)
    assert len(last.maps.views) == MOST_VIEWS
    write_image(path, moving)
    last.open(path, QUICK)
    assert len(last.maps.views) == 0


def test_a_fixed_image_that_changed_is_opened_again(tmp_path):
    from loftr_curriculum.registration.workers import LastFixed

    fixed, moving, _ = a_pair(7)
    path, last = tmp_path / "f.png", LastFixed()
    write_image(path, fixed)
    first = last.open(path, QUICK)
    assert last.open(path, QUICK) is first
    write_image(path, moving)
    assert last.open(path, QUICK).size == moving.shape[:2]


def test_ended_alone_the_first_process_leaves_no_traceback(tmp_path):
    "SIGTERM to the parent, at the moments in which its workers start."
    write_batch(tmp_path, 8)
    (tmp_path / "batch.py").write_text(BATCH)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    batch = subprocess.Popen(
        [sys.executable, tmp_path / "batch.py", tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while len(processes_of(batch.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.005)
    batch.terminate()
    said = batch.communicate(timeout=120)[1]
    assert "Traceback" not in said and "pickle" not in said
    end = time.monotonic() + 10  # a worker notices that its parent is gone, which takes a moment
    while processes_of(batch.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_of(batch.pid) == []


# ---- what is written


def test_an_id_is_no_formula_in_a_spreadsheet(tmp_path):
    write_batch(tmp_path, 1)
    ids = ("=1+1", "+7", "-x", "@a", "'=b")
    lines = "".join(f"{id},img/f.png,img/none.png\n" for id in ids)
    (tmp_path / "pairs.csv").write_text("id,fixed,moving\n" + lines)
    out = tmp_path / "out"
    for _ in range(2):  # the second time the folder goes on
        register_many(tmp_path / "pairs.csv", out, matcher=UprightSift(), progress=False)
        with open(out / "results.csv", newline="") as file:
            assert [row["id"] for row in csv.DictReader(file)] == [f"'{id}" for id in ids]
        assert tuple(read_results(out / "results.csv")) == ids
    assert tuple(read_maps(out / "maps.jsonl")) == ids


PLAIN = dict(config=QUICK, progress=False)


def write_table(folder, header, *lines):
    write_batch(folder, 1)
    (folder / "pairs.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return folder / "pairs.csv"


def cells_of(path):
    """(header, rows) of a results.csv as any other program reads it, from the end of our own columns on."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header[: len(FIELDS)]) == FIELDS and {len(row) for row in rows} <= {len(header)}
    return header[len(FIELDS) :], [row[len(FIELDS) :] for row in rows]


def test_other_columns_of_the_table_stand_at_the_end_of_the_row(tmp_path):
    table = write_table(
        tmp_path,
        "Patient ID,fixed,visit,id,moving,=x,,dioptres",
        '0042,img/f.png,"1st, left",p0,img/m.png,=1+1,unnamed,-2.25',
        '"a\u2028b\nc",img/none.png, @b ,lost,img/m.png,\'-5,,-1+2',
    )
    out = tmp_path / "out"
    for _ in range(2):  # the second time the folder goes on
        assert register_many(table, out, matcher=UprightSift(), **PLAIN)["unreadable"] == 1
        assert cells_of(out / "results.csv") == (
            ["Patient ID", "visit", "'=x", "dioptres"],
            [["0042", "1st, left", "'=1+1", "-2.25"], ["a b c", "'@b", "''-5", "'-1+2"]],
        )
        rows = read_results(out / "results.csv")
        assert list(rows["p0"])[len(FIELDS) :] == ["Patient ID", "visit", "=x", "dioptres"]
        assert [rows["lost"][name] for name in ("visit", "=x", "dioptres")] == ["@b", "'-5", "-1+2"]
        assert rows["p0"]["m00"] and not rows["lost"]["m00"]


def test_a_column_of_a_name_of_ours_is_told_apart(tmp_path):
    table = write_table(
        tmp_path,
        "id,fixed,moving,Verdict,table_verdict,m00,patient,Patient",
        "p0,img/f.png,img/m.png,good,kept,7,x,y",
    )
    register_many(table, tmp_path / "out", matcher=UprightSift(), **PLAIN)
    (row,) = read_results(tmp_path / "out" / "results.csv").values()
    assert row["verdict"] == "ok" and float(row["m00"]) != 7
    further = {name: row[name] for name in list(row)[len(FIELDS) :]}
    assert further == {
        "table_table_Verdict": "good",
        "table_verdict": "kept",
        "table_m00": "7",
        "patient": "x",
        "table_Patient": "y",
    }


def test_the_results_of_a_batch_are_a_table_and_its_own_columns_are_not_carried(tmp_path):
    table = write_table(
        tmp_path, "id,fixed,moving,patient", f"p0,{tmp_path}/img/f.png,{tmp_path}/img/m.png,x"
    )
    register_many(table, tmp_path / "out", matcher=UprightSift(), **PLAIN)
    register_many(tmp_path / "out" / "results.csv", tmp_path / "again", matcher=UprightSift(), **PLAIN)
    assert cells_of(tmp_path / "again" / "results.csv") == (["patient"], [["x"]])


def test_a_batch_that_goes_on_has_the_columns_of_the_table_as_it_is_now(tmp_path):
    files = "img/f.png,img/m.png"
    out, matcher = tmp_path / "out", UprightSift()

    def go_on(header, *lines):
        table = write_table(tmp_path, header, *lines)
        register_many(table, out, matcher=matcher, **PLAIN)
        return cells_of(out / "results.csv")

    # a folder of before, without any
    assert go_on("id,fixed,moving", f"p0,{files}") == ([], [[]])
    calls = matcher.calls
    one = ("id,fixed,moving,patient,note", f"p0,{files},x,old")
    assert go_on(*one) == (["patient", "note"], [["x", "old"]])
    # mended, and another order; the rows that were answered are not registered again
    assert go_on("id,fixed,moving,visit,patient", f"p0,{files},2,y") == (["visit", "patient"], [["2", "y"]])
    assert matcher.calls == calls
    # a row that the table does not name keeps what it had
    assert go_on("id,fixed,moving,eye", f"p1,{files},L") == (
        ["eye", "visit", "patient"],
        [["L", "", ""], ["", "2", "y"]],
    )
    assert matcher.calls == 2 * calls


def test_an_interrupted_batch_keeps_the_columns(tmp_path):
    lines = [f"p{k},img/f.png,img/m.png,patient {k}" for k in range(4)]
    table, out = write_table(tmp_path, "id,fixed,moving,patient", *lines), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        register_many(table, out, matcher=Interrupted(), **PLAIN)
    assert cells_of(out / "results.csv") == (["patient"], [["patient 0"], ["patient 1"]])
    with open(out / "results.csv", "a") as file:
        file.write("p2,img/f.png,img/m.png")  # the power failed in the middle of a line
    rest = type("Interrupted", (UprightSift,), {})()  # the same matcher as far as the batch can know
    register_many(table, out, matcher=rest, **PLAIN)
    assert rest.calls == 6
    assert cells_of(out / "results.csv") == (["patient"], [[f"patient {k}"] for k in range(4)])


def test_shards_and_other_processes_carry_the_columns(tmp_path):
    lines = [f"p{k},img/f.png,img/m.png,patient {k}" for k in range(3)]
    table = write_table(tmp_path, "id,fixed,moving,patient", *lines, "lost,img/none.png,img/m.png,=4")
    out, expected = tmp_path / "out", [["patient 0"], ["patient 1"], ["patient 2"], ["'=4"]]
    register_many(table, out, matcher=Sent(), workers=2, **PLAIN)
    assert cells_of(out / "results.csv") == (["patient"], expected)
    for number in (1, 2):
        register_many(table, tmp_path / "parts", matcher=Sent(), shard=Shard(number, 2), **PLAIN)
    assert cells_of(tmp_path / "parts/shards/2-of-2/results.csv") == (["patient"], expected[1::2])
    merge_shards(table, tmp_path / "parts")
    assert cells_of(tmp_path / "parts" / "results.csv") == (["patient"], expected)
    # the table was mended between the shards and now
    table.write_text(table.read_text().replace("patient 1", "patient 9"))
    merge_shards(table, tmp_path / "parts")
    assert cells_of(tmp_path / "parts" / "results.csv")[1][1] == ["patient 9"]


def test_pairs_of_a_program_carry_columns_each_its_own(tmp_path):
    write_batch(tmp_path, 1)
    pairs = [
        Pair("a", "img/f.png", "img/none.png", tmp_path, extra=(("patient", "1"),)),
        Pair("b", "img/f.png", "img/none.png", tmp_path, extra=(("eye", "L"), ("patient", "2"))),
        Pair("c", "img/f.png", "img/none.png", tmp_path),
    ]
    register_many(pairs, tmp_path / "out", matcher=UprightSift(), **PLAIN)
    assert cells_of(tmp_path / "out" / "results.csv") == (
        ["patient", "eye"],
        [["1", ""], ["2", "L"], ["", ""]],
    )


def test_parquet_holds_the_other_columns_as_they_are(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = write_table(tmp_path, "id,fixed,moving,patient", "p0,img/f.png,img/none.png,0042", "p1,x,y,=1+1")
    register_many(table, tmp_path / "out", matcher=UprightSift(), parquet=True, **PLAIN)
    columns = parquet.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    assert tuple(columns) == (*FIELDS, "patient") and columns["patient"] == ["0042", "=1+1"]


def test_results_as_columns(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_batch(tmp_path, 2)
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("lost,img/f.png,img/none.png\n")
    plain = dict(matcher=UprightSift(), config=QUICK, progress=False)
    register_many(tmp_path / "pairs.csv", tmp_path / "out", parquet=True, **plain)
    columns = parquet.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    rows = read_results(tmp_path / "out" / "results.csv")
    assert tuple(columns) == FIELDS and columns["id"] == ["p0", "p1", "lost"]
    assert columns["m00"] == [float(rows["p0"]["m00"]), float(rows["p1"]["m00"]), None]
    assert "none.png" in columns["error"][2]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install '\.\[parquet\]'"):
        register_many(tmp_path / "pairs.csv", tmp_path / "other", parquet=True, **plain)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["transforms.json", "maps.jsonl", "results.parquet", "results.csv"])
def test_files_of_something_else_stay_as_they_are(name, tmp_path):
    write_batch(tmp_path, 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("not yours\n")
    with pytest.raises(FileError, match=name.split(".")[0]):
        register_many(tmp_path / "pairs.csv", out, matcher=UprightSift(), progress=False)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "not yours\n"


@pytest.mark.parametrize("text", ["", "patient,score\n1,2", "id,fixed,moving\na,f.png,m.png"])
def test_results_of_another_program_are_told_and_not_touched(text, tmp_path):
    write_batch(tmp_path, 1)
    out = tmp_path / "out"
    register_many(tmp_path / "pairs.csv", out, matcher=UprightSift(), progress=False)
    (out / "results.csv").write_text(text)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    with pytest.raises(FileError, match="results.csv: was not written by this program and stays as it is"):
        register_many(tmp_path / "pairs.csv", out, matcher=UprightSift(), progress=False)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before


def test_a_folder_in_which_nobody_may_write_is_noticed_before_the_work(tmp_path):
    write_batch(tmp_path, 1)
    (tmp_path / "file").write_text("")
    matcher = UprightSift()
    with pytest.raises(FileError, match="expected a folder that can be written"):
        register_many(tmp_path / "pairs.csv", tmp_path / "file" / "out", matcher=matcher, progress=False)
    assert matcher.calls == 0


@pytest.mark.slow
def test_killed_again_and_again_with_workers_it_ends_as_undisturbed(tmp_path):
    "SIGKILL to the first process, a worker, or all, at random moments."
    write_batch(tmp_path, 12)
    register_many(tmp_path / "pairs.csv", tmp_path / "calm", matcher=Slow(), config=QUICK, progress=False)
    rng = np.random.default_rng(0)
    for trial in range(6):
        batch = start_batch(tmp_path)
        time.sleep(rng.uniform(0, 1))
        everybody = [int(line.split()[0]) for line in processes_of(batch.pid)]
        for pid in (everybody, [batch.pid], everybody[-1:])[trial % 3]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        batch.wait(120)
        end = time.monotonic() + 60
        while processes_of(batch.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert processes_of(batch.pid) == []
    count = register_many(
        tmp_path / "pairs.csv", tmp_path / "out", matcher=Slow(), config=QUICK, progress=False, workers=2
    )
    assert count["ok"] == 12
    died = [row["id"] for row in read_results(tmp_path / "out" / "results.csv").values() if row["error"]]
    assert died == [] and answers(tmp_path / "out") == answers(tmp_path / "calm")
    assert len(read_maps(tmp_path / "out" / "maps.jsonl")) == 12
