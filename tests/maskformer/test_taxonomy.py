import json
import os
import pickle
from pathlib import Path

import pytest

from maskformer.taxonomy import COCO, Category, Taxonomy

ANIMALS = [
    {"id": 9, "name": "meadow", "isthing": 0, "color": [0, 255, 0], "supercategory": "ground"},
    {"id": 7, "name": "horse", "isthing": 1},
    {"id": 3, "name": "pond", "isthing": 0},
    {"id": 5, "name": "cow", "isthing": 1},
]


@pytest.fixture
def animals() -> Taxonomy:
    return Taxonomy.from_coco(ANIMALS)


def test_things_come_first_then_stuff_each_by_ascending_id(animals: Taxonomy):
    assert [category.id for category in animals.categories] == [5, 7, 3, 9]
    assert animals.names == ("cow", "horse", "pond", "meadow")
    assert [animals.is_thing(k) for k in range(4)] == [True, True, False, False]
    assert (animals.num_classes, animals.num_things) == (4, 2)
    assert animals.categories[3].color == (0, 255, 0)


def test_category_ids_and_class_indices_are_inverse(animals: Taxonomy):
    for taxonomy in (animals, COCO):
        for index in range(taxonomy.num_classes):
            assert taxonomy.class_index(taxonomy.category_id(index)) == index
    assert 7 in animals
    assert 1 not in animals


def test_round_trip_through_json(animals: Taxonomy):
    for taxonomy in (animals, COCO):
        again = Taxonomy.from_coco(json.loads(json.dumps(taxonomy.to_coco())))
        assert again == taxonomy
        assert hash(again) == hash(taxonomy)


def test_survives_pickling_after_use(animals: Taxonomy):
    animals.class_index(7)
    again = pickle.loads(pickle.dumps(animals))
    assert again == animals
    assert again.class_index(9) == 3


@pytest.mark.parametrize("key", ["id", "name", "isthing"])
def test_refuses_a_category_without_a_key(key: str):
    broken = {name: value for name, value in ANIMALS[1].items() if name != key}
    with pytest.raises(ValueError, match=f"without {key}"):
        Taxonomy.from_coco([ANIMALS[0], broken])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 9}, r"own id.*\[9\]"),
        ({"name": "pond"}, r"own name.*\['pond'\]"),
        ({"id": "7"}, "integer id"),
        ({"isthing": 2}, "isthing 0 or 1"),
        ({"color": [0, 0, 256]}, "0..255"),
        ({"color": "red"}, "0..255"),
    ],
)
def test_refuses_wrong_categories(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_coco([ANIMALS[0], {**ANIMALS[1], **change}, ANIMALS[2]])


def test_refuses_no_categories_and_a_wrong_order():
    with pytest.raises(ValueError, match="at least one"):
        Taxonomy(())
    with pytest.raises(ValueError, match="class-index order"):
        Taxonomy((Category(1, "sky", isthing=False), Category(2, "kite", isthing=True)))


@pytest.mark.parametrize("index", [-1, 4])
def test_refuses_a_class_index_outside_the_classes(animals: Taxonomy, index: int):
    with pytest.raises(ValueError, match=rf"0\.\.3, got {index}"):
        animals.category_id(index)
    with pytest.raises(ValueError, match=rf"0\.\.3, got {index}"):
        animals.is_thing(index)


def test_refuses_an_unknown_category_id(animals: Taxonomy):
    with pytest.raises(ValueError, match="category id 4"):
        animals.class_index(4)


def test_coco_has_80_things_and_53_stuff():
    assert (COCO.num_classes, COCO.num_things) == (133, 80)
    assert COCO.category_id(79) == 90
    assert COCO.category_id(80) == 92
    assert COCO.names[COCO.class_index(10)] == "traffic light"


@pytest.mark.skipif("COCO_PANOPTIC_SAMPLE" not in os.environ, reason="COCO_PANOPTIC_SAMPLE names no folder")
def test_coco_equals_the_official_annotation_file():
    folder = Path(os.environ["COCO_PANOPTIC_SAMPLE"])
    annotations = json.loads((folder / "annotations" / "panoptic_val2017.json").read_text())
    assert Taxonomy.from_coco(annotations["categories"]) == COCO
