"""The table of facts names existing fields; every field has a help text; types are described and converted."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from typing import Any, Literal

import pytest

from pipelines.config.fields import ESSENTIAL, FACTS, Facts, convert, describe_type, facts, field_types, without_none
from pipelines.config.hardware import Hardware
from pipelines.config.publish import PublishConfig
from pipelines.config.recipes import DEMO
from pipelines.config.sweep import SweepConfig
from pipelines.config.train import TrainConfig
from tests.pipelines.config.settings import field_types_of

FIELDS = field_types_of(DEMO)


def test_every_fact_is_about_an_existing_field_or_part() -> None:
    parts = {name.partition(".")[0] for name in FIELDS if "." in name}
    assert set(FACTS) <= parts | FIELDS.keys()


def test_essential_settings_exist_and_appear_once() -> None:
    assert set(ESSENTIAL) <= FIELDS.keys()
    assert len(set(ESSENTIAL)) == len(ESSENTIAL)


def test_field_types_are_those_of_the_dataclasses() -> None:
    assert field_types() == FIELDS
    assert field_types(SweepConfig)["trials"] is int
    assert field_types(PublishConfig)["scaling.workers"] is int


def test_a_field_inherits_the_facts_of_its_part() -> None:
    assert facts("scaling.threads") == FACTS["scaling"]
    assert facts("tracking.uri") == FACTS["tracking.uri"] != facts("tracking.parent")
    assert facts("optimizer.lr") == Facts()


def configuration_classes(kind: type) -> set[type]:
    """Return a dataclass and those nested in it."""
    nested = [hint for hint in typing.get_type_hints(kind).values() if dataclasses.is_dataclass(hint)]
    return {kind}.union(*(configuration_classes(typing.cast(type, each)) for each in nested))


def docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


CLASSES = sorted(
    set[type]().union(*map(configuration_classes, (TrainConfig, PublishConfig, SweepConfig, Hardware))),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_setting_has_a_help_text_with_a_short_first_sentence(kind: type) -> None:
    texts, hints = docstrings(kind), typing.get_type_hints(kind)
    assert kind.__doc__
    settings = [name for name in hints if not dataclasses.is_dataclass(hints[name])]
    assert [name for name in settings if name not in texts] == []
    for name in settings:
        first = re.split(r"(?<=[.])\s+(?=[A-Z$`\"])", texts[name], maxsplit=1)[0]
        assert first.endswith("."), (name, first)
        assert len(first) <= 80, (name, first)


@pytest.mark.parametrize(
    ("hint", "text", "values", "others"),
    [
        (bool, "true or false", [(True, True)], [1, None, "true"]),
        (int, "an integer", [(3, 3), (-1, -1)], [3.0, True, "3", None]),
        (float, "a finite number", [(3, 3.0), (0.5, 0.5)], [True, "1", None, float("inf"), float("nan"), 10**400]),
        (str, "a string", [("a", "a")], [1, None, ["a"]]),
        (int | None, "an integer, or none", [(None, None), (3, 3)], [3.5, "none"]),
        (Literal["a", "b"], "one of a, b", [("a", "a")], ["c", None, []]),
        (tuple[float, float], "a list of 2, each a finite number", [([1, 0.5], (1.0, 0.5))], [[1], [1, 2, 3], 1]),
        (tuple[int, ...], "a list, each an integer", [([], ()), ((1, 2), (1, 2))], [[1.5], "12", None]),
    ],
    ids=str,
)
def test_conversion_to_a_type(hint: Any, text: str, values: list[tuple[Any, Any]], others: list[Any]) -> None:
    assert describe_type(hint) == text
    for given, expected in values:
        assert repr(convert(hint, given)) == repr(expected)  # 1 == 1.0 == True
    for other in others:
        with pytest.raises(TypeError):
            convert(hint, other)


def test_without_none() -> None:
    assert without_none(int | None) is int
    assert without_none(str) is str
    assert without_none(tuple[int, int] | None) == tuple[int, int]
