"Guards of the front door: both READMEs, the guides and their links and commands, the model card."

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from loftr_curriculum.model.weights import PACKAGED
from loftr_curriculum.studies.card import sha256_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
READMES = ("README.md", "README.zh-CN.md")
PAGES = [ROOT / name for name in (*READMES, "CONTRIBUTING.md", "SECURITY.md")] + sorted(
    path for path in (ROOT / "docs").rglob("*.md")
)
PROGRAM = re.compile(r"^loftr-curriculum ([a-z-]+)(.*?)(?:\s#.*)?$", re.MULTILINE)


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def paragraphs(text):
    "Paragraphs of prose: no code, tables, lists, headings, comments."
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [part for part in text.split("\n\n") if not re.match(r"\s*([|#>!<-]|\d\.)", part)]


@pytest.mark.parametrize(("name", "most"), [("README.md", 600), ("README.zh-CN.md", 260)])
def test_no_paragraph_is_longer_than_six_lines(name, most):
    "At a hundred letters a line; Chinese ones take twice the width."
    long = [part for part in paragraphs((ROOT / name).read_text(encoding="utf-8")) if len(part) > most]
    assert long == []


def test_who_only_registers_reads_nothing_of_training():
    before = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Train your own")[0]
    assert "## Register a pair" in before
    assert re.findall(r"\b[Tt]rain\w*", before) == []
    before = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8").partition("\n## 用自己的数据训练")[0]
    assert "## 配准一对图像" in before and "训练" not in before


def test_both_languages_say_the_same_and_a_difference_is_named():
    from readme import differences

    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    assert differences(english, chinese) == []
    for old, new, what in (
        ("docs/guides/train.md", "docs/guides/drain.md", "links"),
        ("--cases 200", "--cases 20", "blocks of code"),
        ("## ", "### ", "headings"),
        ("registered.jpg", "other.jpg", "pictures"),
    ):
        assert any(found.startswith(what) for found in differences(english.replace(old, new), chinese)), what


def test_the_table_comes_from_the_records(in_root, monkeypatch, tmp_path):
    import front_table

    assert front_table.table("en") in (ROOT / "README.md").read_text(encoding="utf-8")
    card = json.loads(front_table.CARD.read_text())
    card["scores"]["all"]["SR@10"] = [0.111, 0.1, 0.12]
    (tmp_path / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr(front_table, "CARD", tmp_path / "card.json")
    assert "11 % [10, 12]" in front_table.table("en") and "11 % [10, 12]" in front_table.table("zh")


def test_other_systems_are_shown_as_soon_as_they_were_measured(in_root, monkeypatch, tmp_path):
    import front_table

    one = {
        "pairs": 60,
        "right": 0.5,
        "right interval": [0.4, 0.6],
        "median": None,
        "no_answer": 9,
        "seconds": 2,
    }
    found = {"scores": {"pseudo-real": {"sift": one, "ours": one | {"right": 0.9, "median": 1.23}}}}
    (tmp_path / "benchmark.json").write_text(json.dumps(found))
    monkeypatch.setattr(front_table, "PEERS", tmp_path / "benchmark.json")
    lines = front_table.table("en").splitlines()
    assert "| `ours` | 90 % [40, 60] | 1.2 px | 9 | 2.0 |" in lines
    assert lines.index("| `sift` | 50 % [40, 60] | - | 9 | 2.0 |") > lines.index(
        "| `ours` | 90 % [40, 60] | 1.2 px | 9 | 2.0 |"
    )
    assert front_table.WORDS["en"]["stale peers"] in front_table.table("en"), "it names no weights"
    if PACKAGED.is_file():
        found["weights"] = sha256_of(PACKAGED)
        (tmp_path / "benchmark.json").write_text(json.dumps(found))
        assert front_table.WORDS["en"]["stale peers"] not in front_table.table("en")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_link_of_a_page_leads_somewhere_on_the_site(in_root, tmp_path):
    "As `make docs` lays the pages out, without the theme and the reference."
    import docs

    docs.copy_pages(tmp_path)
    docs.write_gallery(tmp_path)
    lost, found = [], 0
    for page in sorted(tmp_path.rglob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
        found += len(links)
        lost += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
    assert lost == [] and found > 40


@pytest.mark.parametrize("page", [*READMES, "docs/guides/register.md"])
def test_every_file_of_an_answer_is_named(page):
    from loftr_curriculum.report.registration import outputs_of

    text = (ROOT / page).read_text(encoding="utf-8")
    assert [path.name for path in outputs_of("registered") if f"`{path.name}`" not in text] == []


def test_help_names_every_file_of_an_answer():
    from loftr_curriculum.cli import make_parser
    from loftr_curriculum.report.registration import outputs_of

    (out,) = (action.help for action in make_parser("register")._actions if action.dest == "out")
    assert [path.name for path in outputs_of("registered") if path.name not in out] == []


def first_cells(page):
    "What stands between backticks in the first column of the tables of a guide."
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8")
    return re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE)))


def test_every_column_of_the_tables_is_explained():
    from loftr_curriculum.io.exports import MATCH_COLUMNS
    from loftr_curriculum.registration.journal import FIELDS, MATRIX

    assert set(FIELDS) - set(MATRIX) <= set(first_cells("archive.md"))
    assert {MATRIX[0], MATRIX[-1]} <= set(first_cells("archive.md"))
    assert set(MATCH_COLUMNS) <= set(first_cells("register.md"))


def test_every_column_of_a_run_is_explained():
    "Those of the two tables, and those that `diagnose` adds: before them, one a kind of probe, and `guided`."
    from loftr_curriculum.evaluation.recording import TABLE, Recording, table
    from loftr_curriculum.training.callbacks import COLUMNS

    known = set(first_cells("train.md"))
    assert {name for name, _, _ in (*COLUMNS, *TABLE)} <= known
    recording = Recording(ROOT / "nbs/experiments/sick_run")  # its kinds have names of their own
    head = table(recording).splitlines()[0]
    for kind in sorted(recording.kinds, key=len, reverse=True):  # a name may hold another, and spaces
        head = head.replace(kind, "")
    assert set(head.split()) <= known
    assert {"generated", "held-out", "pseudo-real", "real"} <= known


def test_every_preset_of_the_curriculum_is_explained():
    from loftr_curriculum.training.config import CURRICULA

    assert set(CURRICULA) <= set(first_cells("train.md"))


def test_every_reason_of_a_verdict_is_explained():
    from loftr_curriculum.registration.registrar import MIRRORED
    from loftr_curriculum.registration.verdict import CLOSES, CRITERIA

    page = (ROOT / "docs" / "guides" / "verdict.md").read_text(encoding="utf-8")
    said = [MIRRORED.partition(";")[0]]
    for criterion in (*CRITERIA, CLOSES):
        said += [criterion.sentence, criterion.infinite, criterion.missing]
    parts = {part.strip(" %,") for sentence in said for part in re.split(r"\{.*?\}", sentence)}
    assert sorted(part for part in parts if part not in page) == []


def commands_in_guides():
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for command, rest in PROGRAM.findall(block):
                yield command, tuple(re.findall(r"--[\w.-]+", rest))


def test_guides_show_commands_that_exist():
    from loftr_curriculum.cli import COMMANDS, make_parser

    found = sorted(set(commands_in_guides()))
    assert len(found) > 15
    for command, flags in found:
        assert command in COMMANDS, command
        if COMMANDS[command].own_words:
            continue
        known = {flag for action in make_parser(command)._actions for flag in action.option_strings}
        wrong = [flag for flag in flags if f"--{flag[2:].replace('-', '_')}" not in known]
        assert not wrong, f"{command} has no {wrong}"


def test_the_model_card_is_that_of_the_packaged_weights(in_root):
    import model_card

    if not model_card.load_matcher.__globals__["PACKAGED"].is_file():
        pytest.skip("no packaged weights in this checkout")
    text = model_card.PAGE.read_text(encoding="utf-8")
    assert text == model_card.card(), "make readme writes it anew"
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "loftr_curriculum"
    if not model_card.card_of()[0]:
        pytest.skip("the scores were measured with other weights or settings, so the card shows none")
    metrics = front["model-index"][0]["results"][0]["metrics"]
    card = json.loads((ROOT / "loftr_curriculum/weights/card.json").read_text())
    assert metrics[0]["value"] == card["scores"]["all"]["SR@10"][0]


def test_a_folder_to_upload_is_loaded_as_it_is(in_root, monkeypatch, tmp_path):
    import model_card
    import torch

    from loftr_curriculum.model.matcher import Matcher

    if not model_card.load_matcher.__globals__["PACKAGED"].is_file():
        pytest.skip("no packaged weights in this checkout")
    monkeypatch.setattr(sys, "argv", ["model_card.py", str(tmp_path / "upload")])
    model_card.main()
    assert sorted(path.name for path in (tmp_path / "upload").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded, packaged = Matcher.from_pretrained(tmp_path / "upload"), model_card.load_matcher()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), packaged.state_dict().values())
    )
    assert (tmp_path / "upload/README.md").read_text().startswith("---\nlicense: apache-2.0\n")
