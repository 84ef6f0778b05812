"""Fit the class head of a file to the classes of another data set by moving its rows by class name."""

from dataclasses import dataclass

import torch
from torch import Tensor

from maskformer.taxonomy import COCO, Taxonomy
from maskformer.weights.description import class_names
from maskformer.weights.reading import Weights

HEAD = ("class_head.weight", "class_head.bias")


@dataclass(frozen=True)
class MovedClasses:
    """A class head fitted to a taxonomy."""

    head: dict[str, Tensor]
    """The tensors of `HEAD` by name."""
    found: tuple[str, ...]
    """Classes of the taxonomy that the file has."""
    new: tuple[str, ...]
    """Classes of the taxonomy that the file does not have; their rows are random."""


def move_classes(weights: Weights, head: dict[str, Tensor], taxonomy: Taxonomy) -> MovedClasses | None:
    """Fit the class head of a file to a taxonomy; return None if it has the same classes or is no class head.

    The row of "no object" is kept. A file without class names is assumed to have COCO's classes if it has as many.

    Raises:
        ValueError: the file does not name its classes, and their number differs from the taxonomy's and COCO's.
    """
    weight, bias = (head[name] for name in HEAD)
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or not weight.numel():
        return None
    num_classes = len(bias) - 1
    names = class_names(weights)
    if names is None or len(names) != num_classes:
        if num_classes == COCO.num_classes:
            names = COCO.names
        elif num_classes == taxonomy.num_classes:
            return None
        else:
            raise ValueError(
                f"{weights.source} was trained on other classes: its class head has {num_classes}, without names, the "
                f"data set has {taxonomy.num_classes}. Give a file that names its classes, or a backbone alone."
            )
    if names == taxonomy.names:
        return None
    row_of_name = {name: row for row, name in enumerate(names)}
    rows = [row_of_name.get(name, -1) for name in taxonomy.names]
    known = torch.tensor([row >= 0 for row in rows] + [True])
    source_rows = torch.tensor([*rows, num_classes])
    # The initialization of nn.Linear, the same on every machine.
    bound = weight.shape[1] ** -0.5
    generator = torch.Generator().manual_seed(0)
    moved: dict[str, Tensor] = {}
    for name, tensor in zip(HEAD, (weight, bias), strict=True):
        fresh = torch.empty(len(source_rows), *tensor.shape[1:], dtype=tensor.dtype)
        fresh.uniform_(-bound, bound, generator=generator)
        fresh[known] = tensor[source_rows[known]]
        moved[name] = fresh
    by_name = dict(zip(taxonomy.names, rows, strict=True))
    return MovedClasses(
        moved,
        tuple(name for name, row in by_name.items() if row >= 0),
        tuple(name for name, row in by_name.items() if row < 0),
    )
