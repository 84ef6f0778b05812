"""The classes to train on, from those of the annotations: kept as they are, or changed by a short YAML file.

    things:            # things are countable
      vehicle: [car, truck, bus]   # three classes become one, with this name
      person:                      # the class of that name is a thing
    stuff:
      sky: sky-other-merged        # a new name
    drop: [banner, net]            # their pixels become void

All three parts are optional, `things` and `stuff` may also be plain lists of names, and a class that the file does not
mention stays as it is.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from maskformer.taxonomy import MAX_NAME, Taxonomy, is_name
from pipelines.errors import UserError
from pipelines.storage import Location

_MAX_BYTES = 1 << 20
_MAX_NAMES, _MAX_DEPTH = 20_000, 4
_FORM = (
    "Its form is, each part optional:  things: {vehicle: [car, truck], person: }  stuff: {sky: old-name}  drop: [net]"
)
_SECTIONS = ("things", "stuff", "drop")


@dataclass(frozen=True)
class ClassMap:
    """The classes to train on, and what becomes of each category of the annotations."""

    taxonomy: Taxonomy
    """The classes to train on. A class has the smallest id, and the color, of the categories merged into it."""
    category_of: Mapping[int, int | None]
    """Category id in `taxonomy` of each category id in the annotations; None if it is dropped: its pixels are void."""
    changed: bool = False
    """Whether a class is not as in the annotations."""

    def to_json(self) -> dict[str, Any]:
        """Return what the map consists of, as JSON-able values."""
        return {"categories": self.taxonomy.to_coco(), "category_of": {str(k): v for k, v in self.category_of.items()}}

    @classmethod
    def from_coco(cls, categories: Sequence[Mapping[str, object]]) -> "ClassMap":
        """Keep the `categories` of an annotation file as they are.

        Raises:
            ValueError: the categories are unusable, see `Taxonomy.from_coco`.
        """
        taxonomy = Taxonomy.from_coco(categories)
        return cls(taxonomy, {category.id: category.id for category in taxonomy.categories})

    @classmethod
    def read(cls, file: Location, categories: Sequence[Mapping[str, object]]) -> "ClassMap":
        """Change the `categories` of an annotation file as a YAML file says.

        Categories that the file declares things or stuff need no `isthing`.

        Raises:
            UserError: there is no such file, or it cannot be applied to these categories.
            ValueError: the categories are unusable, whatever the file says, see `Taxonomy.from_coco`.
        """
        if file.is_dir() or not file.exists():
            raise UserError(f"There is no file of classes {str(file)!r}. Give a YAML file. {_FORM}.")
        if (size := file.size()) > _MAX_BYTES:
            raise UserError(
                f"The file of classes {str(file)!r} has {size:,} bytes, and at most {_MAX_BYTES:,} are read; give a "
                f"YAML file that names classes."
            )
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"The file of classes {str(file)!r} is not UTF-8 text ({error.reason}); {_FORM}."
            ) from error
        return cls.parse(text, categories, f"The file of classes {str(file)!r}")

    @classmethod
    def parse(
        cls, text: str, categories: Sequence[Mapping[str, object]], what: str = "The text of classes"
    ) -> "ClassMap":
        """Change the `categories` of an annotation file as a YAML text says; like `read`.

        Args:
            what: names the text in messages.
        """
        # With some `isthing`, so that all else is checked first.
        source = {
            entry.name: entry for entry in Taxonomy.from_coco([{"isthing": 0, **c} for c in categories]).categories
        }
        unsaid = {entry["name"] for entry in categories if "isthing" not in entry}  # not told in the annotations
        things, stuff, drop = _sections(text, what)
        _require_known([*_members(things), *_members(stuff), *drop], source, what)
        _require_usable([*things, *stuff], what)

        groups = [(name, members, True) for name, members in things.items()]
        groups += [(name, members, False) for name, members in stuff.items()]
        mentioned = {*_members(things), *_members(stuff), *drop}
        if unclear := [name for name in source if name in unsaid and name not in mentioned]:
            raise UserError(
                f"{what} does not say whether {_listed(unclear)} are things or stuff, nor do the annotations (no "
                f"isthing); add each under things, stuff or drop."
            )
        groups += [(name, (name,), entry.isthing) for name, entry in source.items() if name not in mentioned]
        if not groups:
            raise UserError(f"{what} drops all {len(source)} classes; keep at least one.")
        _require_distinct([name for name, _, _ in groups], what)

        merged: list[dict[str, Any]] = []
        category_of: dict[int, int | None] = {source[name].id: None for name in drop}
        for name, members, isthing in groups:
            first = min((source[member] for member in members), key=lambda category: category.id)
            color = {} if first.color is None else {"color": list(first.color)}
            merged.append({"id": first.id, "name": name, "isthing": int(isthing), **color})
            category_of.update({source[member].id: first.id for member in members})
        taxonomy = Taxonomy.from_coco(merged)
        changed = bool(unsaid) or taxonomy != Taxonomy.from_coco(categories)
        return cls(taxonomy, dict(sorted(category_of.items())), changed)


def _sections(text: str, what: str) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Return the members of each class under things, and of each under stuff; and the names to drop.

    The nodes of the YAML are read, not the values that it would make of them: a class may be named `no` or `1`.
    """
    root = _root(text, what)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{what} holds no sections, got {_kind(root)}. {_FORM}.")
    sections = dict(_entries(root, what))
    unknown = [name for name in sections if name not in _SECTIONS]
    if unknown:
        raise UserError(f"{what} has the unknown section(s) {_listed(unknown)}; use {', '.join(_SECTIONS)}. {_FORM}.")
    things, stuff = (_classes(sections.get(name), name, what) for name in ("things", "stuff"))
    dropped = sections.get("drop")
    return things, stuff, () if dropped is None or _is_null(dropped) else _names(dropped, "drop", what)


def _root(text: str, what: str) -> yaml.Node | None:
    """Parse a YAML document, without building what aliases or tags ask for."""
    try:
        depth = names = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise UserError(
                    f"{what} uses an anchor, an alias or a tag in line {event.start_mark.line + 1}; write the names "
                    f"out. {_FORM}."
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            names += isinstance(event, yaml.ScalarEvent)
            if depth > _MAX_DEPTH or names > _MAX_NAMES:  # too much for `compose`, which recurses and is slow
                raise UserError(
                    f"{what} is nested too deeply, or has more than {_MAX_NAMES:,} names, in line "
                    f"{event.start_mark.line + 1}. {_FORM}."
                )
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{what} is not valid YAML: {error.problem or error.context}{place}. {_FORM}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}. {_FORM}.") from error


def _entries(node: yaml.MappingNode, what: str) -> Iterator[tuple[str, yaml.Node]]:
    found: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{what} has {_kind(key)} instead of a name. {_FORM}.")
        if key.value in found:
            raise UserError(f"{what} has {_shown(key.value)} twice, the second {_line(key)}; write it once.")
        found.add(key.value)
        yield key.value, value


def _classes(node: yaml.Node | None, section: str, what: str) -> dict[str, tuple[str, ...]]:
    if node is None or _is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        return {name: (name,) for name in _names(node, section, what)}
    return {
        name: (name,) if _is_null(value) else _names(value, f"{section}: {_shown(name)}", what)
        for name, value in _entries(node, what)
    }


def _names(node: yaml.Node, part: str, what: str) -> tuple[str, ...]:
    """Return the names in a list, or the one name that stands for a list."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for each in nodes:
        if not isinstance(each, yaml.ScalarNode) or each.value == "":
            raise UserError(f"{what} needs names of classes under {part}, got {_kind(each)}. {_FORM}.")
    if not nodes:
        raise UserError(f"{what} has an empty list under {part}; name a class, or remove this part.")
    return tuple(each.value for each in nodes)


def _members(classes: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [member for members in classes.values() for member in members]


def _require_known(used: Sequence[str], known: Collection[str], what: str) -> None:
    """Refuse classes that the annotations lack, and those used more than once."""
    unknown = [name for name in dict.fromkeys(used) if name not in known]
    if unknown:
        near = {name: difflib.get_close_matches(name[:100], known, 1) for name in unknown[:10]}
        listed = [_shown(name) + (f" (did you mean {_shown(near[name][0])}?)" if near[name] else "") for name in near]
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise UserError(
            f"{what} names classes that the annotations do not have: {', '.join(listed)}{more}; use the names in the "
            f"categories of the annotations."
        )
    if repeated := _repeated(used):
        raise UserError(f"{what} uses {_listed(repeated)} more than once; a class can become one class only.")


def _require_usable(names: Sequence[str], what: str) -> None:
    """Refuse names that a category cannot have."""
    if unusable := [name for name in names if not is_name(name)]:
        raise UserError(
            f"{what} gives classes the names {_listed(unusable)}; a name is 1 to {MAX_NAME} printable characters "
            f"on one line, without a tab or a no-break space. Choose other names."
        )


def _require_distinct(names: Sequence[str], what: str) -> None:
    if repeated := _repeated(names):
        raise UserError(
            f"{what} gives more than one class the name {_listed(repeated)}. A class that the file does not mention "
            f"keeps its name: add it to the list, drop it, or choose another name."
        )


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node | None) -> str:
    match node:
        case None:
            return "nothing"
        case yaml.MappingNode():
            return f"a mapping {_line(node)}"
        case yaml.SequenceNode():
            return f"a list {_line(node)}"
        case _:
            return f"{_shown(node.value)} {_line(node)}" if node.value else f"nothing {_line(node)}"


def _line(node: yaml.Node) -> str:
    return f"in line {node.start_mark.line + 1}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_shown, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}...")
