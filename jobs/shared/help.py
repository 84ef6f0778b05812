"""One-screen help of a job: a line for each setting, taken from the docstrings of its dataclass."""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import shutil
import textwrap
import typing
from collections.abc import Iterable
from typing import Any, Literal

import tyro

from pipelines.config.fields import facts, without_none

_INDENT = 34
_METAVARS = {"recipe": "NAME", "config": "FILE", "run.name": "NAME"}


def help_text(
    prog: str,
    description: str,
    kind: type,
    default: Any,
    usage: str,
    shown: Iterable[str] | None = None,
    required: Iterable[str] = (),
    everything: bool = False,
) -> str:
    """Return usage, description, and a line or two for each setting.

    Args:
        kind: the dataclass of the command line.
        default: an instance of it, or None if some settings have no default.
        usage: what follows the program's name.
        shown: dotted names of the settings to show, in this order; None for all.
        required: those that must be given, as a flag or by an environment variable.
        everything: show all settings, with their whole texts.
    """
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    fields = _fields(kind, default)
    names = list(fields) if shown is None or everything else list(shown)
    lines = [f"usage: {prog} {usage}", "", *_wrapped(description, width), ""]
    part = ""
    for name in names:
        if everything and part != (part := name.rpartition(".")[0]):
            lines.append("")
        hint, text, value = fields[name]
        variable = facts(name).variable
        if value == "" and variable and f"${variable}" in text:
            value = f"required, or ${variable}" if name in required else f"${variable}"
        elif name in required and not value:
            value = "required"
        if shown is not None and not everything:
            text = _short(text, has_default=value not in ("", None, ()))
        lines += _lines(name, hint, text, value, width)
    rest = "" if shown is None or everything else "; --help-all shows all settings"
    lines.append(_line("--help", f"Show this page{rest}."))
    return "\n".join(lines)


def _fields(kind: type, default: Any, prefix: str = "") -> dict[str, tuple[Any, str, Any]]:
    """Return type, text and default of every setting by its dotted name."""
    hints, texts = typing.get_type_hints(kind, include_extras=True), _texts(kind)
    found: dict[str, tuple[Any, str, Any]] = {}
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
            if any(getattr(mark, "name", None) == "" for mark in marks):
                name = prefix.rstrip(".")
            if tyro.conf.Positional in marks:
                continue
        value = getattr(default, field.name) if default is not None else _default_of(field)
        if dataclasses.is_dataclass(hint):
            inner = value if value is not dataclasses.MISSING else None
            found.update(_fields(typing.cast(type, hint), inner, f"{name}." if name else ""))
        else:
            found[name] = hint, texts.get(field.name, ""), value
    return found


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass and of its parents."""
    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        statements = typing.cast(ast.ClassDef, body).body
        for field, below in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = typing.cast(ast.Constant, below.value).value
                texts[typing.cast(ast.Name, field.target).id] = " ".join(str(text).split())
    return texts


def _lines(name: str, hint: Any, text: str, value: Any, width: int) -> list[str]:
    part, dot, last = name.replace("_", "-").rpartition(".")
    flag = f"--{part}{dot}{last}"
    if value is True:
        flag += f", --{part}{dot}no-{last}"
    first = f"  {flag} {_METAVARS.get(name) or _metavar(hint)}".rstrip()
    described = text
    if value is dataclasses.MISSING:
        described += " Required."
    elif not isinstance(value, bool) and value not in ("", None, ()):
        described += f" [{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"
    body = textwrap.wrap(described.strip(), width - _INDENT) or [""]
    if len(first) > _INDENT - 2:
        return [first, *(" " * _INDENT + line for line in body)]
    return [f"{first:<{_INDENT}}{body[0]}", *(" " * _INDENT + line for line in body[1:])]


def _short(text: str, has_default: bool) -> str:
    """Return the first sentence, and the one that describes the default of a setting without a default value."""
    first, *others = re.split(r"(?<=[.])\s+(?=[A-Z$`\"])", text)
    kept = [sentence for sentence in others if sentence.startswith("Default:") and "$" not in sentence]
    return first if has_default else " ".join([first, *kept])


def _line(flag: str, text: str) -> str:
    return f"  {flag:<{_INDENT - 2}}{text}"


def _metavar(hint: Any) -> str:
    hint = without_none(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return f"{_metavar(items[0])} ..." if items[-1] is Ellipsis else " ".join(map(_metavar, items))
    return {bool: "", int: "N", float: "X", str: "TEXT"}.get(hint, "")


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap each paragraph; indented lines, such as a command, stay as they are."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        command = paragraph.startswith(("python ", " "))
        lines += ["", *(paragraph.splitlines() if command else textwrap.wrap(paragraph, width))]
    return lines[1:]
