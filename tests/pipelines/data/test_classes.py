"""Classes to train on: what a YAML file may say, and every way in which it may be wrong."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskformer.taxonomy import COCO, Taxonomy
from pipelines.data.classes import ClassMap
from pipelines.errors import UserError
from pipelines.storage import locate

CATEGORIES: list[dict[str, Any]] = [
    {"id": 7, "name": "truck", "isthing": 1, "color": [7, 7, 7]},
    {"id": 3, "name": "car", "isthing": 1, "color": [3, 3, 3]},
    {"id": 40, "name": "sky", "isthing": 0},
    {"id": 5, "name": "bus", "isthing": 1},
    {"id": 1, "name": "person", "isthing": 1, "supercategory": "alive"},
    {"id": 92, "name": "banner", "isthing": 0},
]


def parse(text: str, categories: list[dict[str, Any]] = CATEGORIES) -> ClassMap:
    return ClassMap.parse(text, categories)


def named(found: ClassMap) -> dict[str, tuple[int, bool]]:
    return {category.name: (category.id, category.isthing) for category in found.taxonomy.categories}


def test_without_a_file_everything_stays() -> None:
    found = ClassMap.from_coco(COCO.to_coco())
    assert found.taxonomy == COCO
    assert found.category_of == {category.id: category.id for category in COCO.categories}


@pytest.mark.parametrize(
    "text", ["{}", "things:", "things: {}\nstuff:\ndrop:\n", "things: [person]\nstuff: {sky: sky}"]
)
def test_a_file_that_changes_nothing(text: str) -> None:
    assert parse(text) == ClassMap.from_coco(CATEGORIES)


def test_merge_rename_and_drop() -> None:
    found = parse(
        """
        things:            # comments are fine
          vehicle: [truck, car]
        stuff:
          air: sky
        drop: [banner]
        """
    )
    assert named(found) == {
        "person": (1, True),
        "vehicle": (3, True),  # the smallest id of its members
        "bus": (5, True),
        "air": (40, False),
    }
    assert found.category_of == {7: 3, 3: 3, 40: 40, 5: 5, 1: 1, 92: None}
    assert found.taxonomy.categories[found.taxonomy.class_index(3)].color == (3, 3, 3)
    assert pickle.loads(pickle.dumps(found)) == found


def test_every_category_becomes_a_class_of_the_taxonomy_or_none() -> None:
    """The oracle is a walk over the names, in another order than the program's."""
    merged = {"vehicle": ["car", "truck", "bus"], "ground": ["road", "pavement-merged", "dirt-merged"]}
    dropped = ["net", "banner"]
    text = f"things:\n  vehicle: {merged['vehicle']}\nstuff:\n  ground: {merged['ground']}\ndrop: {dropped}"
    found = ClassMap.parse(text, COCO.to_coco())
    name_of = {category.id: category.name for category in found.taxonomy.categories}
    for category in COCO.categories:
        expected = next((new for new, old in merged.items() if category.name in old), category.name)
        new_id = found.category_of[category.id]
        assert (None if new_id is None else name_of[new_id]) == (None if category.name in dropped else expected)
    assert found.taxonomy.num_classes == COCO.num_classes - 2 - 2 - len(dropped)


def test_things_may_become_stuff_and_the_reverse() -> None:
    found = parse("stuff: {traffic: [car, sky]}\nthings: [banner]")
    assert named(found)["traffic"] == (3, False)
    assert named(found)["banner"] == (92, True)


def test_a_class_may_take_the_name_of_one_of_its_members_or_of_a_dropped_class() -> None:
    assert named(parse("things: {car: [car, truck]}"))["car"] == (3, True)
    assert named(parse("things: {banner: [car]}\ndrop: banner"))["banner"] == (3, True)


def test_the_file_says_what_is_a_thing_if_the_annotations_do_not() -> None:
    bare = [{key: value for key, value in entry.items() if key != "isthing"} for entry in CATEGORIES]
    found = parse("things: [car, truck, bus, person]\nstuff: [sky]\ndrop: [banner]", bare)
    assert found.taxonomy == Taxonomy.from_coco(CATEGORIES[:-1])
    with pytest.raises(UserError, match=r"does not say whether 'truck', 'sky' are things or stuff"):
        parse("things: [car, bus, person]\nstuff: [banner]", bare)


def test_names_are_text_also_where_yaml_knows_another_type() -> None:
    categories = [
        {"id": number, "name": name, "isthing": 0} for number, name in enumerate(["no", "1", "null", "2020-01-01"])
    ]
    found = parse('things: {yes: [no, 1]}\nstuff: {off: "null"}\ndrop: [2020-01-01]', categories)
    assert named(found) == {"yes": (0, True), "off": (2, False)}


WRONG = {
    "things: {vehicle: [car, trcuk]}": r"do not have: 'trcuk' \(did you mean 'truck'\?\)",
    "drop: [zzz]": r"do not have: 'zzz';",
    "things: {vehicle: [car, car]}": "uses 'car' more than once",
    "things: [car]\ndrop: [car]": "uses 'car' more than once",
    "things: {a: [car], b: [car]}": "uses 'car' more than once",
    "things: [car]\nthings: [bus]": "has 'things' twice, the second in line 2",
    "things:\n  a: car\n  a: bus": "has 'a' twice, the second in line 3",
    "things: {person: [car]}": "more than one class the name 'person'",
    "things: {a: [car]}\nstuff: {a: [sky]}": "more than one class the name 'a'",
    "drop: [truck, car, sky, bus, person, banner]": "drops all 6 classes",
    "thing: [car]": r"unknown section\(s\) 'thing'; use things, stuff, drop",
    "[car, bus]": "holds no sections, got a list",
    "car": "holds no sections, got 'car'",
    "": "holds no sections, got nothing",
    "things: {a: {b: c}}": "needs names of classes under things: 'a', got a mapping",
    "things: {a: [[car]]}": "under things: 'a', got a list",
    "drop: {car: }": "under drop, got a mapping",
    "drop: [car, ]\nstuff: ['']": "under stuff, got nothing in line 2",
    "things: {a: []}": "empty list under things: 'a'",
    "? [car]\n: bus": "a list in line 1 instead of a name",
    "things: [car": "not valid YAML: .*line 1",
    "things: [car]\n---\ndrop: [bus]": "not valid YAML",
    "drop: ['\0']": "not valid YAML: unacceptable character",
    "things: &x [car]\ndrop: *x": "anchor, an alias or a tag in line 1",
    "drop: !!python/object/apply:os.system [car]": "anchor, an alias or a tag",
    "things: {a: [{b: [c]}]}": "nested too deeply",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_refused_in_one_paragraph(text: str) -> None:
    with pytest.raises(UserError, match=WRONG[text]) as refused:
        parse(text)
    assert str(refused.value).startswith("The text of classes ")
    assert str(refused.value).isprintable()


HOSTILE = {
    "bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]",
    "deep": "[" * 500_000,
    "deep in blocks": "".join(" " * depth + "- \n" for depth in range(600)),
    "wide": "things: {" + "a, " * 200_000 + "}",
    "long name": "drop: [" + "x" * 500_000 + "]",
    "many names": "drop: [" + ", ".join(f"car{number}" for number in range(8_000)) + "]",
    "terminal": "drop: ['\x1b[31m']",
    "escaped": r'drop: ["\x1b[31m\n\u202e"]',
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_soon_and_printed_escaped(name: str) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as refused:
        parse(HOSTILE[name])
    assert time.process_time() - started < 20
    assert len(str(refused.value)) < 1500
    assert str(refused.value).isprintable()


def write(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda file: None, "There is no file of classes"),
        (lambda file: file.mkdir(), "There is no file of classes"),
        (write(b"drop: [\xff]"), "is not UTF-8 text"),
        (write(b"#" * (1 << 20) + b"\n"), "has 1,048,577 bytes"),
        (write(b"drop: [cra]"), "did you mean 'car'"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, prepare: Callable[[Path], object], message: str) -> None:
    file = tmp_path / "classes.yaml"
    prepare(file)
    with pytest.raises(UserError, match=message) as refused:
        ClassMap.read(locate(str(file)), CATEGORIES)
    assert repr(str(file)) in str(refused.value)


def test_a_file_is_read_as_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("stuff: {größe: sky}", encoding)
        assert named(ClassMap.read(locate(str(file)), CATEGORIES))["größe"] == (40, False)


@pytest.mark.parametrize("name", ["big\u00a0truck", "big\ttruck", "\x1b[31m", "", "x" * 201, "a\u200bb"])
def test_a_new_name_that_no_category_can_have_is_refused(name: str) -> None:
    for section in ("things", "stuff"):
        with pytest.raises(UserError, match="a name is 1 to 200 printable characters") as refused:
            parse(json.dumps({section: {name: "truck"}}))
        assert str(refused.value).isprintable()
    assert named(parse(json.dumps({"things": {"x" * 200: "truck"}})))["x" * 200] == (7, True)


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 1, "isthing": 1}],
        [*CATEGORIES, CATEGORIES[0]],
        [{"id": "1", "name": "car", "isthing": 1}],
        [{"id": 1, "name": "car", "isthing": 2}],
        [],
    ],
)
def test_unusable_categories_are_not_blamed_on_the_file(categories: list[dict[str, Any]]) -> None:
    for make in (ClassMap.from_coco, lambda categories: parse("drop: [car]", categories)):
        with pytest.raises(ValueError, match="category") as refused:
            make(categories)
        assert not isinstance(refused.value, UserError)
