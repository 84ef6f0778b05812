"""How the tensor names of another code map to ours, as tables that are read in both directions.

A table is a list of rows `our name <-> its name`. In both, `{}` is an index, the same on both sides, `*` is any rest,
and the last part (`.weight`, `.running_mean` and so on) is left out because it is the same everywhere.
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
    """One kind of tensor under our name and under the other code's."""

    own: str
    foreign: str | tuple[str, str, str]
    """Three names: query, key and value, which are one tensor here."""
    channel_major: bool = False
    """The last axis is four pixels of C channels (Swin's patch merging); there the channel counts slowest."""
    encoder: bool | None = None
    """The name is for models with (True) or without (False) transformer layers in the pixel decoder."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The other code's names of what is one tensor here."""
        return (self.foreign,) if isinstance(self.foreign, str) else self.foreign

    @property
    def changes(self) -> bool:
        """Whether the values are laid out in another way there."""
        return self.channel_major or len(self.parts) > 1

    @cached_property
    def own_regex(self) -> re.Pattern[str]:
        """Matches our names."""
        return _regex(self.own)

    @cached_property
    def foreign_regexes(self) -> tuple[re.Pattern[str], ...]:
        """Match the other code's names, one for each part."""
        return tuple(map(_regex, self.parts))

    def to_own(self, parts: Sequence[Tensor]) -> Tensor:
        """Turn the other code's tensors into ours."""
        if self.channel_major:  # [C, y, x] becomes [x, y, C]
            return parts[0].reshape(*parts[0].shape[:-1], -1, 2, 2).transpose(-1, -3).flatten(-3)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def to_foreign(self, tensor: Tensor) -> list[Tensor]:
        """Turn our tensor into the other code's; the inverse of `to_own`."""
        if self.channel_major:
            return [tensor.reshape(*tensor.shape[:-1], 2, 2, -1).transpose(-1, -3).flatten(-3)]
        return [tensor] if len(self.parts) == 1 else list(tensor.chunk(3))


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file under our names."""

    tensors: dict[str, Tensor]
    foreign: dict[str, str]
    """What the file calls each (the first of three), for messages."""
    changed: list[str]
    """Ours whose values were laid out in another way."""
    leftovers: list[str]
    """The file's that are known not to be weights of the model."""
    unknown: list[str]
    """The file's that no row names."""


@dataclass(frozen=True)
class Layout:
    """The names of one code."""

    name: str
    rows: Sequence[Row]
    leftovers: str = r"(?!)"
    """Finds names, beside those constants of Swin that follow from the size of its window, that are no weights."""

    def knows(self, name: str) -> bool:
        """Tell whether a row has this foreign name."""
        return self._find(name) is not None

    def to_own(self, tensors: Mapping[str, Tensor], source: str) -> Renamed:
        """Rename a file's tensors to ours.

        Raises:
            ValueError: of query, key and value some are missing or of other shapes, or two tensors are the same one
                of ours.
        """
        found: dict[str, tuple[Row, dict[int, str]]] = {}
        leftovers: list[str] = []
        unknown: list[str] = []
        for name in tensors:
            if re.search(rf"relative_position_index$|attn_mask$|{self.leftovers}", name):
                leftovers.append(name)
            elif (place := self._find(name)) is None:
                unknown.append(name)
            else:
                own, row, part = place
                names = found.setdefault(own, (row, {}))[1]
                if part in names:
                    raise ValueError(
                        f"{source} has {own} twice, as {names[part]} and as {name}. Delete one of them from the file."
                    )
                names[part] = name
        own_tensors: dict[str, Tensor] = {}
        for own, (row, names) in found.items():
            if len(names) < len(row.parts):
                raise ValueError(
                    f"{source} has {', '.join(names.values())} but not all of query, key and value, which make up "
                    f"{own}. Give a file that has them."
                )
            parts = [tensors[names[part]] for part in range(len(names))]
            try:
                own_tensors[own] = row.to_own(parts)
            except (RuntimeError, IndexError):
                raise ValueError(
                    f"{source} does not fit the model: {', '.join(names.values())} cannot become {own} with the "
                    f"shape {', '.join(str(tuple(part.shape)) for part in parts)}. Give the checkpoint of a MaskFormer."
                ) from None
        return Renamed(
            own_tensors,
            {own: names[0] for own, (_, names) in found.items()},
            [own for own, (row, _) in found.items() if row.changes],
            leftovers,
            unknown,
        )

    def to_foreign(self, tensors: Mapping[str, Tensor], encoder: bool) -> dict[str, Tensor]:
        """Rename our tensors to the file's. `encoder`: the model has transformer layers in the pixel decoder.

        Raises:
            ValueError: the other code has no name for one of them.
        """
        renamed: dict[str, Tensor] = {}
        for own, tensor in tensors.items():
            for row in self.rows:
                match = row.own_regex.fullmatch(own) if row.encoder in (None, encoder) else None
                if match:
                    names = [_fill(part, match) for part in row.parts]
                    renamed.update(zip(names, row.to_foreign(tensor), strict=True))
                    break
            else:
                raise ValueError(
                    f"The tensor {own} has no name in {self.name}, so this model cannot be written in that format. "
                    f"Write it in our own format."
                )
        return renamed

    def _find(self, name: str) -> tuple[str, Row, int] | None:
        for row in self.rows:
            for part, regex in enumerate(row.foreign_regexes):
                if match := regex.fullmatch(name):
                    return _fill(row.own, match), row, part
        return None
