"""Reading lists of a JSON file entry by entry: the oracle is json.loads of the whole text."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data import json_stream
from pipelines.data.json_stream import JsonLists
from pipelines.errors import UserError
from pipelines.storage import locate

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "file.json"


def lists_of(file: Path) -> tuple[JsonLists, dict[str, list[Any]]]:
    reader = JsonLists(locate(file))
    found: dict[str, list[Any]] = {}
    for key, number, entry in reader:
        assert number == len(found.setdefault(key, []))
        found[key].append(entry)
    return reader, found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.dictionaries(st.text(max_size=4), VALUES | st.lists(VALUES, max_size=6), max_size=5),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_entries_equal_those_of_the_whole_document(file, document, chunk, indent, ascii_only):
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    file.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        reader, found = lists_of(file)
    expected = {key: value for key, value in document.items() if isinstance(value, list)}
    assert {**{key: [] for key in reader.lists}, **found} == expected
    assert reader.lists == {key: len(value) for key, value in expected.items()}
    assert sorted(reader.others) == sorted(document.keys() - expected.keys())
    assert reader.sha256 == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_any_truncation_is_refused_where_the_standard_library_refuses_it(file, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    text = json.dumps({"a": [{"b": 1.5e3}, -12, "é", []], "info": {"x": True}, "c": []}, indent=1)
    for end in range(len(text)):
        file.write_text(text[:end])
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text[:end])
        with pytest.raises(UserError, match="is not valid JSON") as error:
            lists_of(file)
        assert f"at line {expected.value.lineno}, column" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [1, 2,]}', "Expecting value at line 1, column 13"),
        ('{"a": [1 2]}', "Expecting ',' at line 1, column 10"),
        ('{"a": [1],}', "Expecting property name enclosed in double quotes"),
        ('{"a": [1]}\n{"b": 2}', "Extra data at line 2, column 1"),
        ('{"a": [1],\n "a": [2]}', "has the key 'a' twice"),
        ('{"a": [' + "1" * 5000 + "]}", "Exceeds the limit"),
        ('{"a": [' + "[" * 100_000, "recursion"),
        ("", "Expecting value at line 1, column 1"),
    ],
)
def test_broken_text_is_explained(file, text, message):
    file.write_text(text)
    with pytest.raises(UserError) as error:
        lists_of(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_that_is_no_object_has_no_entries(file):
    file.write_text("[1, 2]")
    reader, found = lists_of(file)
    assert (reader.kind, reader.lists, found) == ("list", {}, {})


def test_a_byte_order_mark_is_skipped(file):
    file.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert lists_of(file)[1] == {"a": [1]}
