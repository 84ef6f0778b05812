"""The classes of a data set: the only place that maps category id, class index, name, and thing or stuff.

A category id is the id in the annotation files (COCO: 1..200 with gaps). A class index is a column of the class logits
(0..K-1 without gaps). Things come first, by ascending id, then stuff, by ascending id. "No object" is index K and is
not part of a taxonomy.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from maskformer.untrusted import escaped, shown

MAX_CATEGORIES = 50_000
MAX_ID = 2**31 - 1
MAX_NAME = 200
"""Most characters in the name of a category."""


@dataclass(frozen=True)
class Category:
    """One class of a data set."""

    id: int
    """In 0..2**31-1."""
    name: str
    """One line of 1 to 200 printable characters."""
    isthing: bool
    color: tuple[int, int, int] | None = None
    """RGB in 0..255, used for visualization only."""


@dataclass(frozen=True)
class Taxonomy:
    """The classes of a data set in class-index order; equal and hashed by value.

    Raises:
        ValueError: there are no categories or more than 50,000, one has an id or a name that is not as in `Category`,
            an id or a name occurs twice, or the order is not things by ascending id, then stuff by ascending id
            (`from_coco` sorts).
    """

    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        if not self.categories:
            raise ValueError(
                "A taxonomy needs at least one category, got none; check the file the categories come from."
            )
        if len(self.categories) > MAX_CATEGORIES:
            raise ValueError(
                f"A taxonomy has at most {MAX_CATEGORIES:,} categories, got {len(self.categories):,}; check the file "
                f"the categories come from."
            )
        for category in self.categories:
            _check_category(category)
        _refuse_repeated("id", [category.id for category in self.categories])
        # Results per class are reported by name.
        _refuse_repeated("name", [category.name for category in self.categories])
        if list(self.categories) != sorted(self.categories, key=_class_order):
            raise ValueError(
                f"The categories must be in class-index order, things by ascending id, then stuff by ascending id, "
                f"got the ids {_listed([category.id for category in self.categories])}; Taxonomy.from_coco sorts them."
            )

    @classmethod
    def from_coco(cls, categories: Sequence[Mapping[str, object]]) -> "Taxonomy":
        """Read the `categories` list of a COCO panoptic annotation file, in any order.

        Keys other than the fields of `Category` are ignored.

        Raises:
            ValueError: an entry lacks `id`, `name` or `isthing`, or one of them has the wrong type.
        """
        if not _is_list(categories):
            raise ValueError(
                f"The categories of a panoptic file are a list, got {type(categories).__name__}; check it."
            )
        if len(categories) > MAX_CATEGORIES:
            raise ValueError(
                f"A taxonomy has at most {MAX_CATEGORIES:,} categories, got {len(categories):,}; check them."
            )
        return cls(tuple(sorted(map(_read_category, categories), key=_class_order)))

    def to_coco(self) -> list[dict[str, object]]:
        """Return the `categories` list of a COCO panoptic annotation file; `from_coco` reads it back unchanged."""
        entries: list[dict[str, object]] = []
        for category in self.categories:
            color = {} if category.color is None else {"color": list(category.color)}
            entries.append({"id": category.id, "name": category.name, "isthing": int(category.isthing), **color})
        return entries

    @property
    def num_classes(self) -> int:
        """Number of classes K, things and stuff together; also the index of "no object"."""
        return len(self.categories)

    @property
    def num_things(self) -> int:
        """Number of things; a class is a thing if `class_index < num_things`."""
        return sum(category.isthing for category in self.categories)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by class index."""
        return tuple(category.name for category in self.categories)

    def class_index(self, category_id: int) -> int:
        """Return the class index of a category id.

        Raises:
            ValueError: the data set has no such category.
        """
        try:
            return self._class_index_of[category_id]
        except KeyError:
            raise ValueError(
                f"Unknown category id {category_id}: the taxonomy has {self.num_classes} categories with ids from "
                f"{min(self._class_index_of)} to {max(self._class_index_of)}; use the categories of the same "
                f"annotation file."
            ) from None

    def category_id(self, class_index: int) -> int:
        """Return the category id of a class index.

        Raises:
            ValueError: the class index is outside 0..K-1 ("no object" has no category id).
        """
        return self._at(class_index).id

    def is_thing(self, class_index: int) -> bool:
        """Return whether a class is a thing (countable) rather than stuff.

        Raises:
            ValueError: the class index is outside 0..K-1.
        """
        return self._at(class_index).isthing

    def __contains__(self, category_id: object) -> bool:
        return category_id in self._class_index_of

    @cached_property
    def _class_index_of(self) -> dict[int, int]:
        return {category.id: index for index, category in enumerate(self.categories)}

    def _at(self, class_index: int) -> Category:
        # A negative index would silently count from the end.
        if not 0 <= class_index < self.num_classes:
            raise ValueError(f"A class index lies in 0..{self.num_classes - 1}, got {class_index}.")
        return self.categories[class_index]


def _class_order(category: Category) -> tuple[bool, int]:
    return not category.isthing, category.id


def _refuse_repeated(what: str, values: Iterable[int | str]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(
            f"Each category needs its own {what}, got these more than once: {_listed(repeated)}; rename or remove one."
        )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _listed(values: Sequence[object]) -> str:
    return f"{escaped(list(values[:50]), 1000)}{' and more' if len(values) > 50 else ''}"


def is_name(name: object) -> bool:
    """Return whether a category may have this name: 1 to MAX_NAME printable characters."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME


def _check_category(category: Category) -> None:
    identifier, name = category.id, category.name
    if type(identifier) is not int or not 0 <= identifier <= MAX_ID:
        raise ValueError(f"A category has an integer id in 0..{MAX_ID}, got {shown(identifier)}; correct this id.")
    if not is_name(name):
        raise ValueError(
            f"A category has a name of 1 to {MAX_NAME} printable characters, got {shown(name)} for the id "
            f"{identifier}; rename it."
        )


def _read_category(entry: Mapping[str, object]) -> Category:
    if not isinstance(entry, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # from a file
        raise ValueError(
            f"A panoptic category is an object with id, name and isthing, got {shown(entry, 200)}; correct it."
        )
    missing = [key for key in ("id", "name", "isthing") if key not in entry]
    if missing:
        raise ValueError(
            f"A panoptic category needs id, name and isthing, got {shown(dict(entry), 300)} without "
            f"{' and '.join(missing)}; use the categories of a COCO panoptic file "
            f"(those of a detection file have no isthing)."
        )
    identifier, name, isthing, color = entry["id"], entry["name"], entry["isthing"], entry.get("color")
    if type(identifier) is not int or not isinstance(name, str) or isthing not in (0, 1):
        raise ValueError(
            f"A panoptic category has an integer id, a string name and isthing 0 or 1, got {shown(dict(entry), 300)}; "
            f"correct this entry."
        )
    return Category(identifier, name, bool(isthing), _read_color(color))


def _read_color(color: object) -> tuple[int, int, int] | None:
    match color:
        case None:
            return None
        case [int(red), int(green), int(blue)] if all(
            type(part) is int and 0 <= part <= 255 for part in (red, green, blue)
        ):
            return red, green, blue
        case _:
            shown = escaped(color, 100)
            raise ValueError(f"A category's color is three integers in 0..255, got {shown}; correct or remove it.")


def _read_table(table: str, isthing: bool) -> Iterable[Category]:
    for entry in " ".join(table.split()).split(", "):
        identifier, *name, color = entry.split(" ")
        red, green, blue = bytes.fromhex(color.removeprefix("#"))
        yield Category(int(identifier), " ".join(name), isthing, (red, green, blue))


_COCO_THINGS = """
1 person #dc143c, 2 bicycle #770b20, 3 car #00008e, 4 motorcycle #0000e6, 5 airplane #6a00e4, 6 bus #003c64,
7 train #005064, 8 truck #000046, 9 boat #0000c0, 10 traffic light #faaa1e, 11 fire hydrant #64aa1e,
13 stop sign #dcdc00, 14 parking meter #af74af, 15 bench #fa001e, 16 bird #a52a2a, 17 cat #ff4dff,
18 dog #00e2fc, 19 horse #b6b6ff, 20 sheep #005200, 21 cow #78a69d, 22 elephant #6e4c00, 23 bear #ae39ff,
24 zebra #c76400, 25 giraffe #480076, 27 backpack #ffb3f0, 28 umbrella #007d5c, 31 handbag #d10097,
32 tie #bcd0b6, 33 suitcase #00dcb0, 34 frisbee #ff63a4, 35 skis #5c0049, 36 snowboard #8581ff,
37 sports ball #4eb4ff, 38 kite #00e400, 39 baseball bat #aefff3, 40 baseball glove #2d59ff,
41 skateboard #868667, 42 surfboard #9194ae, 43 tennis racket #ffd0ba, 44 bottle #c5e2ff,
46 wine glass #ab8601, 47 cup #6d3f36, 48 fork #cf8aff, 49 knife #97005f, 50 spoon #09503d, 51 bowl #546933,
52 banana #4a4169, 53 apple #a6c466, 54 sandwich #d0c3d2, 55 orange #ff6d41, 56 broccoli #008f95,
57 carrot #b300c2, 58 hot dog #d1636a, 59 pizza #057900, 60 donut #e3ffcd, 61 cake #93bad0, 62 chair #994501,
63 couch #035fa1, 64 potted plant #a3ff00, 65 bed #7700aa, 67 dining table #00b6c7, 70 toilet #00a578,
72 tv #b78258, 73 laptop #5f2000, 74 mouse #827287, 75 remote #6e8185, 76 keyboard #a64a76,
77 cell phone #db8eb9, 78 microwave #4fd272, 79 oven #b25a3e, 80 toaster #41460f, 81 sink #7fa773,
82 refrigerator #3b696a, 84 book #8e6c2d, 85 clock #c4ac00, 86 vase #5f3650, 87 scissors #804cff,
88 teddy bear #c93901, 89 hair drier #f6007a, 90 toothbrush #bfa2d0
"""

_COCO_STUFF = """
92 banner #ffff80, 93 blanket #93d3cb, 95 bridge #966464, 100 cardboard #a8abac, 107 counter #9270c6,
109 curtain #d2aa64, 112 door-stuff #5c8859, 118 floor-wood #da58b8, 119 flower #f18100, 122 fruit #d911ff,
125 gravel #7c4ab5, 128 house #464646, 130 light #ffe4ff, 133 mirror-stuff #9ad000, 138 net #c1005c,
141 pillow #4c5b71, 144 platform #ffb4c3, 145 playingfield #6a9ab0, 147 railroad #e6968c, 148 river #3c8fff,
149 road #804080, 151 roof #5c5237, 154 sand #fed47c, 155 sea #494dae, 156 shelf #ffa062, 159 snow #ffffff,
161 stairs #68546d, 166 tent #a9a483, 168 towel #e1c7ff, 171 wall-brick #89364a, 175 wall-stone #879edf,
176 wall-tile #07f6e7, 177 wall-wood #6bffc8, 178 water-other #3a2995, 180 window-blind #b7798e,
181 window-other #ff4961, 184 tree-merged #6b8e23, 185 fence-merged #be9999, 186 ceiling-merged #928b8d,
187 sky-other-merged #4682b4, 188 cabinet-merged #86c79c, 189 table-merged #d1e28c,
190 floor-other-merged #60246c, 191 pavement-merged #606060, 192 mountain-merged #40aa40,
193 grass-merged #98fb98, 194 dirt-merged #d0e5e4, 195 paper-merged #cebaab, 196 food-other-merged #98a140,
197 building-other-merged #747000, 198 rock-merged #00728f, 199 wall-other-merged #66669c,
200 rug-merged #fa8dff
"""

COCO = Taxonomy((*_read_table(_COCO_THINGS, isthing=True), *_read_table(_COCO_STUFF, isthing=False)))
"""The 133 classes of COCO panoptic 2017: 80 things with ids 1..90, 53 stuff with ids 92..200."""
