"""The house itself: do the files at the top agree, do the rooms keep their order, are the pages as
they should be?
"""

import ast
import configparser
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import loftr_curriculum

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "loftr_curriculum"
ROOMS = (
    "geometry",
    "io",
    "retina",
    "data",
    "model",
    "registration",
    "evaluation",
    "report",
    "training",
    "baselines",
    "studies",
    "cli",
)
DEVELOPMENT_ONLY = ("fastcore", "nbdev", "execnb", "pytest", "playwright", "jupyterlab")
EXTRAS = ("dev", "browser", "dicom", "cluster", "parquet", "review", "baselines", "onnx", "docs")
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = sorted(PACKAGE.rglob("*.py"))


def relative(path):
    return path.relative_to(ROOT).as_posix()


# ---- settings.ini, setup.py, pyproject.toml, constraints.txt and the package agree


def read_settings():
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def requirements(key):
    return [line.strip() for line in read_settings()[key].splitlines() if line.strip()]


def all_requirements():
    return [
        line
        for key in ("requirements", *(f"{extra}_requirements" for extra in EXTRAS))
        for line in requirements(key)
    ]


@pytest.fixture(scope="module")
def handed_over():
    """What setup.py hands to setuptools."""
    received = {}
    fake = types.ModuleType("setuptools")
    fake.setup = received.update
    fake.find_namespace_packages = lambda **options: options["include"]
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    patch.undo()
    return received


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_version_everywhere(handed_over):
    version = loftr_curriculum.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert read_settings()["version"] == version
    assert handed_over["version"] == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_setup_py_hands_over_settings_ini(handed_over):
    settings = read_settings()
    assert handed_over["name"] == settings["lib_name"]
    assert handed_over["description"] == settings["description"]
    assert handed_over["author"] == settings["author"]
    assert handed_over["install_requires"] == requirements("requirements")
    assert handed_over["extras_require"] == {extra: requirements(f"{extra}_requirements") for extra in EXTRAS}
    assert handed_over["entry_points"]["console_scripts"] == [settings["console_scripts"]]
    assert handed_over["python_requires"] == ">=" + settings["min_python"]


def test_setup_py_gives_every_dynamic_field(handed_over, pyproject):
    given_by = {
        "readme": "long_description",
        "authors": "author",
        "dependencies": "install_requires",
        "optional-dependencies": "extras_require",
        "scripts": "entry_points",
        "entry-points": "entry_points",
    }
    missing = [
        field for field in pyproject["project"]["dynamic"] if not handed_over.get(given_by.get(field, field))
    ]
    assert not missing


def test_pyproject_states_what_settings_ini_states(pyproject):
    settings = read_settings()
    assert pyproject["project"]["name"] == settings["lib_name"]
    assert pyproject["project"]["requires-python"] == ">=" + settings["min_python"]
    assert pyproject["tool"]["nbdev"]["lib_path"] == settings["lib_name"] == PACKAGE.name


def test_what_is_installed_is_this_package():
    installed = metadata.metadata("loftr_curriculum")
    assert installed["Version"] == loftr_curriculum.__version__
    declared = {str(Requirement(line)) for line in requirements("requirements")}
    assert {
        str(Requirement(line)) for line in metadata.requires("loftr_curriculum") if "extra ==" not in line
    } == declared


def test_constraints_pin_what_settings_ini_asks_for():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in (line for line in lines if line and not line.startswith("#")):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), (
            f"constraints.txt: not a plain pin: {line}"
        )
        name, version = line.split("==")
        pins[name.lower().replace("_", "-")] = version
    for line in all_requirements():
        wanted = Requirement(line)
        assert wanted.name in pins, f"constraints.txt: {wanted.name} is not pinned"
        assert wanted.specifier, f"settings.ini: {line} has no lower bound"
        assert pins[wanted.name] in wanted.specifier, (
            f"constraints.txt: {wanted.name}=={pins[wanted.name]} is not {line}"
        )


def test_every_dependency_has_its_reason():
    lines = (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines()
    declared = all_requirements()
    for before, line in zip(lines, lines[1:]):
        if line.strip() in declared:
            assert before.strip().startswith("# "), (
                f"settings.ini: say above {line.strip()} what it is needed for"
            )


# ---- imports: the order of the rooms, nothing of the tools, no stars


def imported_names(path, package_parts):
    """(line, dotted name) of every import in a module, inside functions and by import_module too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package_parts[: len(package_parts) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def order_violations(package):
    """One line for every import of a room from a room below it, and for every module outside the rooms."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        where = f"{package.name}/{path.relative_to(package).as_posix()}"
        if parts in (("__init__",), ("_modidx",)):
            room, allowed = "the package itself", ()
        elif parts[0] in ROOMS:
            room, allowed = parts[0], ROOMS[: ROOMS.index(parts[0]) + 1]
        else:
            found.append(f"{where}:1: {parts[0]} is not a room")
            continue
        for line, name in imported_names(path, (package.name, *parts[:-1])):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == package.name and target in ROOMS and target not in allowed:
                found.append(f"{where}:{line}: {room} imports {target}, which is below it")
    return found


def test_rooms_import_only_from_above():
    assert not order_violations(PACKAGE), "\n".join(order_violations(PACKAGE))


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("geometry.py", "import numpy\nfrom .model.matcher import Matcher\n", 2),
        ("io/images.py", "from ..retina import world\n", 1),
        ("data/pairs.py", "def late():\n    from loftr_curriculum.training import losses\n", 2),
        ("model/matcher.py", "import loftr_curriculum.registration.register\n", 1),
        (
            "registration/__init__.py",
            "from importlib import import_module\nimport_module('loftr_curriculum.cli')\n",
            2,
        ),
        ("retina/world.py", "from .. import training\n", 1),
        ("__init__.py", "from .geometry import compose\n", 1),
        ("attic/old.py", "import numpy\n", 1),
    ],
)
def test_the_checker_sees_a_violation(tmp_path, module, source, line):
    path = tmp_path / "loftr_curriculum" / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    (message,) = order_violations(tmp_path / "loftr_curriculum")
    assert message.startswith(f"loftr_curriculum/{module}:{line}: ")


def test_the_checker_lets_the_order_pass(tmp_path):
    path = tmp_path / "loftr_curriculum" / "registration" / "register.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch\n"
        "from .estimate import x\n"
        "from ..geometry import y\n"
        "from ..model.weights import load_matcher\n"
        "from .. import __version__\n"
        "from loftr_curriculum.data import preprocess\n"
    )
    assert order_violations(tmp_path / "loftr_curriculum") == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_imports_no_development_tool_and_no_star(path):
    for line, name in imported_names(path, (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])):
        where = f"{relative(path)}:{line}"
        assert name.partition(".")[0] not in DEVELOPMENT_ONLY, f"{where}: {name} is a development tool"
        assert not name.endswith(".*"), f"{where}: star import"


# ---- the map of the house is true


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\d+\. (.+)", ARCHITECTURE, re.MULTILINE)
WISHES = re.findall(r"^\| ([a-z].+?) \| (.+) \|$", ARCHITECTURE.partition("touch |")[2], re.MULTILINE)


def notebooks_of(row):
    "Notebooks that a row names; a name without a room belongs to the room named before it."
    found, room = [], None
    for name in re.findall(r"`((?:nbs/\d\d_\w+/)?\d\d[a-z]?_\w+)`", row):
        room = name.rpartition("/")[0] or room
        found.append(ROOT / room / f"{name.rpartition('/')[2]}.ipynb")
    return found


def test_the_map_shows_the_rooms_in_their_order():
    assert tuple(re.findall(r"^([a-z]+)  +\w", ARCHITECTURE, re.MULTILINE)) == ROOMS


@pytest.mark.parametrize("step", STEPS)
def test_the_map_names_files_that_exist_and_what_is_in_them(step):
    for file in re.findall(r"`([\w/]+\.py)`", step):
        assert (PACKAGE / file).is_file(), f"no such file: {file}"
    named = re.match(r"`([\w/]+\.py)`:.*?`(\w+)`", step)
    if named:
        source = (PACKAGE / named[1]).read_text(encoding="utf-8")
        assert re.search(rf"\b{named[2]}\b", source), f"{named[1]} has no {named[2]}"


@pytest.mark.parametrize(("wish", "row"), WISHES)
def test_what_one_wants_to_add_touches_at_most_four_files(wish, row):
    notebooks = notebooks_of(row)
    for path in notebooks:
        assert path.is_file(), f"no such notebook: {relative(path)}"
    others = re.findall(r"\ba (?:notebook|JSON file|test)\b", row)
    assert 1 <= len(notebooks) + len(others) <= 4, f"{wish}: {len(notebooks) + len(others)} files"


# ---- what must answer at once does not import torch


def must_be_light(name):
    parts = name.split(".")[1:]
    return bool(parts) and (
        parts[0] in ("geometry", "io", "retina", "cli") or parts[-1] == "config" or parts == ["registration"]
    )


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_light_modules_do_not_import_torch():
    light = [name for name in map(module_name, MODULES) if must_be_light(name)]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'lightning', 'kornia'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{name} imports {sorted(heavy)} when it is imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *light], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- pages


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


def exports(path):
    return any(re.search(r"^#\| *(export|default_exp)", text(cell), re.MULTILINE) for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebook_opens_as_agreed(path):
    page = cells(path)
    if exports(path):
        assert re.match(r"#\| *default_exp \S+", text(page[0])), (
            f"{relative(path)}: the first cell is not #| default_exp"
        )
        page = page[1:]
    assert page[0]["cell_type"] == "markdown", f"{relative(path)}: no cell with a title"
    assert re.match(r"# \S.*\n+> \S", text(page[0])), (
        f"{relative(path)}: expected '# Title' and then '> subtitle'"
    )


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if exports(path)], ids=relative)
def test_notebook_stands_in_the_folder_of_its_room(path):
    module = re.match(r"#\| *default_exp (\S+)", text(cells(path)[0])).group(1)
    room = module.partition(".")[0]
    folder = path.relative_to(ROOT / "nbs").parts[0]
    assert folder == f"{ROOMS.index(room) + 1:02d}_{room}"
    assert (PACKAGE / (module.replace(".", "/") + ".py")).is_file(), f"{relative(path)}: run `make prepare`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebook_is_fit_to_read(path):
    for number, cell in enumerate(cells(path)):
        where = f"{relative(path)}, cell {number}"
        assert not re.search(r"^\s*from \S+ import \*", text(cell), re.MULTILINE), f"{where}: star import"
        kinds = [output["output_type"] for output in cell.get("outputs", [])]
        assert "error" not in kinds, f"{where}: an error among the outputs"
    assert path.stat().st_size < 400_000, f"{relative(path)}: keep only small outputs"


def tracked_text_files():
    """Every text file that is committed or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield name, data.decode("utf-8")


EXTRA_LINE = re.compile(r"pip install [^\n]*?([\w.-]+)\[([\w,]+)\]")  # what is installed, and which extras


def test_extras_are_installed_from_the_folder():
    """The package is on no registry, so a line that names it finds nothing."""
    named, wrong = set(), []
    for name, content in tracked_text_files():
        for place, extras in EXTRA_LINE.findall(content):
            named |= set(extras.split(","))
            if place != "." or not set(extras.split(",")) <= set(EXTRAS):
                wrong.append(f"{name}: {place}[{extras}]")
    assert not wrong, "\n".join(wrong[:20])
    assert {"dev", "review", "cluster"} <= named


MACHINE_PATH = re.compile(
    r"(?<![\w.~$}/-])/(?:work|root|home|Users|opt|tmp|mnt|workspace)/[\w.]|\b[A-Z]:\\\\?Users"
)
PLACEHOLDER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def test_committed_text_names_no_machine_and_no_placeholder():
    found = []
    for name, content in tracked_text_files():
        for number, line in enumerate(content.splitlines(), 1):
            hit = MACHINE_PATH.search(line) or PLACEHOLDER.search(line)
            if hit:
                found.append(f"{name}:{number}: {hit.group()}")
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("see " + "/ho" + "me/someone/data.png", True),
        ('"' + "/wo" + 'rk/main/x"', True),
        ("#!/usr/bin/env bash", False),
        ("../shared/real_pairs", False),
        ("nbs/data/x and model/data/pairs", False),
        ("`/dev/null`", False),
    ],
)
def test_machine_paths_are_recognised(line, bad):
    assert bool(MACHINE_PATH.search(line)) == bad


def readme_commands():
    """(subcommand, flags) of every `loftr-curriculum ...` line in the README's code blocks."""
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("loftr-curriculum "):
                words = line.split()
                yield words[1], tuple(word for word in words if word.startswith("--"))


@pytest.mark.parametrize(("command", "flags"), sorted(set(readme_commands())))
def test_readme_shows_commands_that_exist(command, flags):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from loftr_curriculum.cli import main; sys.exit(main())",
            command,
            "--help",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    missing = [flag for flag in flags if flag not in done.stdout]
    assert not missing, f"README.md: {command} has no {missing}"


def test_readme_shows_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named and named <= targets


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("target", "installs_tools"), [("demo", False), ("setup", True), ("pytest", True)])
def test_a_demonstration_installs_the_package_and_tests_install_their_tools(target, installs_tools, tmp_path):
    "What make would do in a folder without an environment."
    planned = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True
    )
    assert planned.returncode == 0, planned.stderr
    assert re.findall(r"-e '(.*?)'", planned.stdout) == [".[dev]" if installs_tools else "."]
