"Whatever stands in a table, a transform or a configuration is read, or refused by an error that names it."

import csv
import io
import json
from dataclasses import asdict, fields

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from loftr_curriculum import cli
from loftr_curriculum.io.files import FileError
from loftr_curriculum.io.tables import read_table
from loftr_curriculum.io.transforms import TransformRecord, load_transform, save_transform
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.weights import config_from
from loftr_curriculum.registration.config import RegistrationConfig
from loftr_curriculum.registration.table import read_batch

# each example writes its file anew into the one folder of the test
quick = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
PLAIN = st.one_of(st.none(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def refused_by_name(read, path):
    "What `read` makes of the file; None where it refuses it in one line that begins with its name."
    try:
        return read(path)
    except FileError as error:
        said = str(error)
        assert str(path) in said and "\n" not in said, said
        return None


# --- tables ----------------------------------------------------------------------------------------------

CELLS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@quick
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6, unique_by=lambda row: row[0]),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_table_is_read_as_it_was_written(tmp_path, rows, delimiter, end, encoding):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "fixed", "moving"), *rows])
    path = tmp_path / "pairs.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    read = [tuple(row.values()) for _, row in read_table(path, ("id", "fixed", "moving"))]
    assert read == rows


@quick
@given(data=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")))
@example(data=b"id,fixed,moving\n")
@example(data=b"id,fixed,moving\n" + b'"')
@example(data=b"id,fixed,moving\n1," + b"x" * 200_000)
def test_any_bytes_are_a_table_or_are_refused_by_name(tmp_path, data):
    path = tmp_path / "pairs.csv"
    for head in (b"", b"id,fixed,moving\n"):
        path.write_bytes(head + data)
        refused_by_name(read_batch, path)


# --- transforms ------------------------------------------------------------------------------------------

SIZES = st.none() | st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@quick
@given(
    turn=st.floats(-3.2, 3.2),
    scale=st.floats(0.1, 10),
    shift=st.tuples(st.floats(-5000, 5000), st.floats(-5000, 5000)),
    fixed_size=SIZES,
    moving_size=SIZES,
    reasons=st.lists(st.text(max_size=20), max_size=3),
)
def test_a_transform_comes_back_to_the_last_bit(
    tmp_path, turn, scale, shift, fixed_size, moving_size, reasons
):
    c, s = scale * np.cos(turn), scale * np.sin(turn)
    matrix = np.array([[c, -s, shift[0]], [s, c, shift[1]], [0, 0, 1]])
    path = tmp_path / "transform.json"
    record = TransformRecord(
        matrix, fixed_size=fixed_size, moving_size=moving_size, verdict="ok", reasons=tuple(reasons)
    )
    save_transform(path, record)
    found = load_transform(path)
    assert np.array_equal(found.matrix, matrix)
    assert (found.fixed_size, found.moving_size) == (fixed_size, moving_size)
    assert (found.verdict, found.reasons) == ("ok", tuple(reasons))


def chain(depth: int) -> dict:
    "A map in a map in a map."
    inner = {"model": "affine", "matrix": np.eye(3).tolist()}
    for _ in range(depth):
        inner = {"model": "chain", "parts": [inner]}
    return inner


STRAIGHT = {"moving_to_fixed": np.eye(3).tolist(), "verdict": "ok"}
FIELDS = [
    "moving_to_fixed",
    "direction",
    "fixed_size",
    "moving_size",
    "verdict",
    "reasons",
    "map",
    "evidence",
]
FIELDS += ["files", "versions", "images", "inputs"]


@quick
@given(name=st.sampled_from(FIELDS), value=VALUES)
@example(name="map", value={"model": ["affine"]})
@example(name="map", value={"model": "affine", "matrix": "x"})
@example(name="map", value={"model": "flow"})
@example(name="map", value={"model": "chain", "parts": 3})
@example(name="direction", value=["moving_to_fixed"])
def test_any_value_in_a_transform_file_is_read_or_refused_by_name(tmp_path, name, value):
    path = tmp_path / "transform.json"
    path.write_text(json.dumps(STRAIGHT | {name: value}))
    found = refused_by_name(load_transform, path)
    assert found is None or isinstance(found, TransformRecord)


def test_a_map_that_is_nested_too_deeply_is_refused_by_name(tmp_path):
    path = tmp_path / "transform.json"
    for depth in (100, 300):
        path.write_text(json.dumps(STRAIGHT | {"map": chain(depth)}))
        assert refused_by_name(load_transform, path) is None


@quick
@given(value=VALUES)
def test_any_json_is_a_transform_or_is_refused_by_name(tmp_path, value):
    path = tmp_path / "transform.json"
    path.write_text(json.dumps(value))
    refused_by_name(load_transform, path)


# --- configurations --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser():
    parser = ArgumentParser(exit_on_error=False)
    cli.add_settings(parser, RegistrationConfig)
    return parser


def read_yaml(parser, path):
    "The configuration, or None where it is refused in one line."
    try:
        return cli.settings(RegistrationConfig, cli.parse(parser, ["--config", str(path)]))
    except ValueError as error:
        assert "\n" not in str(error) and str(error)
        return None


@quick
@given(name=st.sampled_from([f.name for f in fields(RegistrationConfig)]), value=VALUES)
@example(name="cells", value=10**8)
@example(name="min_overlap", value=-5)
@example(name="limits", value={"scale": -1})
@example(name="retry_long_sides", value=[10**9])
def test_any_value_of_a_setting_is_taken_as_it_is_or_refused_in_one_line(tmp_path, parser, name, value):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({name: value}))
    config = read_yaml(parser, path)
    if config is not None:
        assert RegistrationConfig(**{f.name: getattr(config, f.name) for f in fields(config)}) == config
        assert 1 <= config.cells <= 256 and 0 <= config.min_overlap <= 1


@quick
@given(text=st.text(max_size=120))
@example(text="[" * 3000)
@example(text="a: &a [*a]")
@example(text="class_path: os.system")
def test_any_text_is_a_configuration_or_is_refused_in_one_line(tmp_path, parser, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    read_yaml(parser, path)


@quick
@given(name=st.sampled_from([f.name for f in fields(MatcherConfig)]) | st.text(max_size=5), value=VALUES)
@example(name="heads", value=0)
@example(name="dims", value=[8, 16, True])
@example(name="variant", value="reference")
def test_any_configuration_in_weights_is_one_or_is_refused_by_name(tmp_path, name, value):
    path = tmp_path / "a.safetensors"
    values = asdict(MatcherConfig()) | {name: value}
    config = refused_by_name(lambda path: config_from(values, path), path)
    assert config is None or isinstance(config, MatcherConfig)
