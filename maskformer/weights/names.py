"""Tables that map the tensor names of another implementation (foreign) to native names, in both directions.

A table is a list of rows `native name <-> foreign name`. In both names `{}` is an index, the same on both sides, and
`*` matches any rest. The last part (`.weight`, `.running_mean` and so on) is omitted because it is the same everywhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_LAST_PART = r"(|\.weight|\.bias|\.running_mean|\.running_var|\.num_batches_tracked)"


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)") + _LAST_PART)


def _fill(pattern: str, match: re.Match[str]) -> str:
    *parts, last = match.groups()
    return pattern.replace("*", "{}").format(*parts) + last


@dataclass(frozen=True)
class Row:
    """One kind of tensor by its native and its foreign name."""

    native: str
    foreign: str | tuple[str, str, str]
    """The foreign name, or three for query, key and value, which are one native tensor."""
    channel_major: bool = False
    """Whether the foreign last axis is channel-major. It has four pixels of C channels (Swin's patch merging); native
    tensors are pixel-major."""
    encoder: bool | None = None
    """Whether the row is for models with (True) or without (False) transformer encoder layers; None: for both."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The foreign names that make up one native tensor."""
        return (self.foreign,) if isinstance(self.foreign, str) else self.foreign

    @property
    def changes(self) -> bool:
        """Whether the foreign values have another layout."""
        return self.channel_major or len(self.parts) > 1

    @cached_property
    def native_regex(self) -> re.Pattern[str]:
        """Pattern of the native names."""
        return _regex(self.native)

    @cached_property
    def foreign_regexes(self) -> tuple[re.Pattern[str], ...]:
        """Patterns of the foreign names, one for each part."""
        return tuple(map(_regex, self.parts))

    def to_native(self, parts: Sequence[Tensor]) -> Tensor:
        """Convert the foreign tensors to the native one."""
        if self.channel_major:  # [C, y, x] becomes [x, y, C]
            return parts[0].reshape(*parts[0].shape[:-1], -1, 2, 2).transpose(-1, -3).flatten(-3)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def to_foreign(self, tensor: Tensor) -> list[Tensor]:
        """Convert the native tensor to the foreign ones; the inverse of `to_native`."""
        if self.channel_major:
            return [tensor.reshape(*tensor.shape[:-1], 2, 2, -1).transpose(-1, -3).flatten(-3)]
        return [tensor] if len(self.parts) == 1 else list(tensor.chunk(3))


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file by native name."""

    tensors: dict[str, Tensor]
    """Converted tensors by native name."""
    foreign: dict[str, str]
    """Foreign name of each native tensor (the first of three), for messages."""
    changed: list[str]
    """Native names of tensors whose layout was converted."""
    leftovers: list[str]
    """Foreign names known not to be weights of the model."""
    unknown: list[str]
    """Foreign names that no row matches."""


@dataclass(frozen=True)
class Layout:
    """The tensor names of one format."""

    name: str
    """Name of the format, for messages."""
    rows: Sequence[Row]
    leftovers: str = r"(?!)"
    """Pattern of names that are not weights, besides the constants that follow from Swin's window size."""

    def matches(self, name: str) -> bool:
        """Return whether a row matches this foreign name."""
        return self._find(name) is not None

    def to_native(self, tensors: Mapping[str, Tensor], source: str) -> Renamed:
        """Convert the tensors of a file to native ones.

        Raises:
            ValueError: some of query, key and value are missing or have unequal shapes, or two tensors have the same
                native name.
        """
        found: dict[str, tuple[Row, dict[int, str]]] = {}
        leftovers: list[str] = []
        unknown: list[str] = []
        for name in tensors:
            if re.search(rf"relative_position_index$|attn_mask$|{self.leftovers}", name):
                leftovers.append(name)
            elif (match := self._find(name)) is None:
                unknown.append(name)
            else:
                native, row, part = match
                names = found.setdefault(native, (row, {}))[1]
                if part in names:
                    raise ValueError(
                        f"{source} has {native} twice, as {names[part]} and as {name}. Delete one from the file."
                    )
                names[part] = name
        native_tensors: dict[str, Tensor] = {}
        for native, (row, names) in found.items():
            if len(names) < len(row.parts):
                raise ValueError(
                    f"{source} has {', '.join(names.values())} but not all of query, key and value, which make up "
                    f"{native}. Give a file that has them."
                )
            parts = [tensors[names[part]] for part in range(len(names))]
            try:
                native_tensors[native] = row.to_native(parts)
            except (RuntimeError, IndexError):
                raise ValueError(
                    f"{source} does not fit the model: {', '.join(names.values())} cannot become {native} with the "
                    f"shape {', '.join(str(tuple(part.shape)) for part in parts)}. Give the checkpoint of a MaskFormer."
                ) from None
        return Renamed(
            native_tensors,
            {native: names[0] for native, (_, names) in found.items()},
            [native for native, (row, _) in found.items() if row.changes],
            leftovers,
            unknown,
        )

    def to_foreign(self, tensors: Mapping[str, Tensor], encoder: bool) -> dict[str, Tensor]:
        """Convert native tensors to foreign ones.

        Args:
            encoder: whether the model has transformer encoder layers in the pixel decoder.

        Raises:
            ValueError: the format has no name for one of the tensors.
        """
        renamed: dict[str, Tensor] = {}
        for native, tensor in tensors.items():
            for row in self.rows:
                match = row.native_regex.fullmatch(native) if row.encoder in (None, encoder) else None
                if match:
                    names = [_fill(part, match) for part in row.parts]
                    renamed.update(zip(names, row.to_foreign(tensor), strict=True))
                    break
            else:
                raise ValueError(
                    f"The tensor {native} has no name in {self.name}, so this model cannot be written in that format. "
                    f"Write it in the native format."
                )
        return renamed

    def _find(self, name: str) -> tuple[str, Row, int] | None:
        for row in self.rows:
            for part, regex in enumerate(row.foreign_regexes):
                if match := regex.fullmatch(name):
                    return _fill(row.native, match), row, part
        return None
