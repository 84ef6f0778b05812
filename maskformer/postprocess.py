"""Post-processing of logits to results at the size of the original image (arXiv:2107.06278, section 3.4).

The panoptic fusion and the instances follow mmdetection step by step; the semantic map follows the original code. No
tensor holds all queries or all classes at the original size: for 4000x5000 pixels that would take 8 to 11 GB.

Letters: Q queries, K classes (K1 = K + 1, "no object" is index K), H W original image, h w map of the mask logits,
N masks.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from maskformer.coco_format import run_lengths
from maskformer.config import PanopticConfig
from maskformer.taxonomy import Taxonomy

Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

STRIP_PIXELS = 1 << 16
"""Pixels that `semantic` processes at a time; with 100 queries and 133 classes they take 60 MB of float32."""

_SMALL = 128  # of results whose height and width add up to at most this, PyTorch sums the four neighbors at once


@torch.no_grad()
def panoptic(
    class_logits: Float[Tensor, "Q K1"],
    mask_logits: Float[Tensor, "Q h w"],
    size: tuple[Size, Size, Size],
    config: PanopticConfig,
    taxonomy: Taxonomy,
) -> tuple[Int32[np.ndarray, "H W"], list[dict[str, Any]]]:
    """Fuse the queries of one image into segments that do not overlap.

    Each pixel goes to the kept query with the highest product of class score and mask probability. A query that wins
    too little of its own mask is dropped, and its pixels become void. All stuff of a class is one segment.

    Args:
        size: sizes of the padded input, of its valid part without padding, and of the original image.

    Returns:
        the index map (0 is void, segments are numbered 1, 2, ... by query) and COCO's `segments_info`: `id`,
        `category_id`, `isthing`, `area` in pixels, and `score`, for merged stuff the highest.

    Raises:
        ValueError: the logits and the taxonomy differ in their number of classes, or the valid size exceeds the padded
            one.
    """
    _check_classes(class_logits, taxonomy)
    _check_sizes(size)
    original = size[2]
    kept, scores, classes = _kept(class_logits, config, taxonomy)

    # A running maximum, one query at a time.
    owner = torch.zeros(original, dtype=torch.int32, device=mask_logits.device)
    highest = torch.full(original, -1.0, dtype=torch.float32, device=mask_logits.device)
    resizer = _Resizer(mask_logits, *size)
    full_areas: list[Tensor] = []
    for index, query in enumerate(kept):
        probability = resizer(mask_logits[query]).sigmoid_()
        full_areas.append(torch.count_nonzero(probability >= 0.5))
        weighted = probability.mul_(scores[index])
        owner.masked_fill_(weighted > highest, index)  # strict, so that a tie goes to the lower query, as in an argmax
        torch.maximum(highest, weighted, out=highest)

    if not full_areas:
        return np.zeros(original, dtype=np.int32), []
    owned_areas = torch.bincount(owner.flatten(), minlength=len(kept))
    segments, id_of_query = _number_segments(
        classes.cpu().numpy(),
        scores.cpu().numpy(),
        owned_areas.cpu().numpy(),
        torch.stack(full_areas).cpu().numpy(),
        config,
        taxonomy,
    )
    return id_of_query[owner.cpu().numpy()], segments


@torch.no_grad()
def keep_queries(
    class_logits: Float[Tensor, "Q K1"],
    mask_logits: Float[Tensor, "Q h w"],
    config: PanopticConfig,
    taxonomy: Taxonomy,
) -> tuple[Float[Tensor, "kept K1"], Float[Tensor, "kept h w"]]:
    """Return the logits of the queries that `panoptic` uses, from which it computes the same result.

    They are a small part of all, and cheap to send to another process.

    Raises:
        ValueError: the logits and the taxonomy differ in their number of classes.
    """
    _check_classes(class_logits, taxonomy)
    kept, _, _ = _kept(class_logits, config, taxonomy)
    return class_logits[kept], mask_logits[kept]


def _kept(
    class_logits: Float[Tensor, "Q K1"], config: PanopticConfig, taxonomy: Taxonomy
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"], Int[Tensor, " kept"]]:
    """Return the queries with a class and a score above the threshold, with their scores and classes."""
    scores, classes = class_logits.float().softmax(dim=-1).max(dim=-1)
    kept = torch.nonzero((classes != taxonomy.num_classes) & (scores > config.score_threshold))[:, 0]
    return kept, scores[kept], classes[kept]


def _number_segments(
    classes: Int[np.ndarray, " kept"],
    scores: Float[np.ndarray, " kept"],
    owned_areas: Int[np.ndarray, " kept"],
    full_areas: Int[np.ndarray, " kept"],
    config: PanopticConfig,
    taxonomy: Taxonomy,
) -> tuple[list[dict[str, Any]], Int32[np.ndarray, " kept"]]:
    """Return the segments and the segment id of each query (0 if dropped); merge the stuff of each class."""
    segments: list[dict[str, Any]] = []
    segment_of_stuff: dict[int, dict[str, Any]] = {}
    id_of_query = np.zeros(len(classes), dtype=np.int32)
    for query, class_index in enumerate(map(int, classes)):
        owned_area, full_area = int(owned_areas[query]), int(full_areas[query])
        if owned_area == 0 or full_area == 0 or owned_area / full_area < config.overlap_threshold:
            continue
        segment = segment_of_stuff.get(class_index)
        if segment is None:
            isthing = taxonomy.is_thing(class_index)
            category_id = taxonomy.category_id(class_index)
            segment = {"id": len(segments) + 1, "category_id": category_id, "isthing": isthing, "area": 0, "score": 0.0}
            segments.append(segment)
            if not isthing:
                segment_of_stuff[class_index] = segment
        segment["area"] += owned_area
        segment["score"] = max(segment["score"], float(scores[query]))
        id_of_query[query] = segment["id"]
    return segments, id_of_query


@torch.no_grad()
def semantic(
    class_logits: Float[Tensor, "Q K1"], mask_logits: Float[Tensor, "Q h w"], size: tuple[Size, Size, Size]
) -> Int32[np.ndarray, "H W"]:
    """Return the map of class indices, at each pixel the class with the most votes of all queries.

    A query's vote for a class is its class probability (softmax with "no object", whose column is then dropped) times
    its mask probability. The votes are summed in float32 even under autocast.

    Args:
        size: as for `panoptic`.

    Raises:
        ValueError: the valid size exceeds the padded one.
    """
    _check_sizes(size)
    padded, _, original = size
    with torch.autocast(mask_logits.device.type, enabled=False):
        probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
        mask_logits = mask_logits.float()
        # Bilinear resizing is linear and separable. Resizing the unit vectors of a column gives the share of each
        # coarse row in each row of the result, so a strip of rows can be computed separately.
        num_coarse = mask_logits.shape[1]
        heights = [(height, num_coarse) for height, _ in size]
        shares = _resize(torch.eye(num_coarse, device=mask_logits.device)[None], *heights)[0]

        result = torch.empty(original, dtype=torch.int32, device=mask_logits.device)
        num_rows = max(1, STRIP_PIXELS // max(padded[1], original[1]))
        for strip, rows in zip(torch.split(result, num_rows), torch.split(shares, num_rows), strict=True):
            widths = [(len(rows), width) for _, width in size]
            masks = _resize(rows @ mask_logits, *widths).sigmoid()
            votes = torch.einsum("qk,qrw->krw", probabilities, masks)
            strip.copy_(votes.max(dim=0).indices)  # twice as fast as argmax on a CPU
    return result.cpu().numpy()


@torch.no_grad()
def instances(
    class_logits: Float[Tensor, "Q K1"],
    mask_logits: Float[Tensor, "Q h w"],
    size: tuple[Size, Size, Size],
    taxonomy: Taxonomy,
    top: int = 100,
) -> list[dict[str, Any]]:
    """Return the things of one image in COCO's instance result format, highest score first; they may overlap.

    Of all queries and classes ("no object" dropped after the softmax), the `top` highest class probabilities are taken,
    and those of things become instances. A query can therefore occur with several classes.

    Args:
        size: as for `panoptic`.
        top: number of class probabilities to consider.

    Returns:
        for each instance `category_id`; `bbox`, x y width height in pixels, tight around the mask; `score`, the class
        probability times the mean mask probability inside the mask (where it is above one half); and `segmentation`,
        the mask as run lengths (see `run_lengths`). An instance without a pixel is omitted: it has score 0 and no box
        and cannot change an average precision (mmdetection lists it with a box of zeros).

    Raises:
        ValueError: the logits and the taxonomy differ in their number of classes, or the valid size exceeds the padded
            one.
    """
    _check_classes(class_logits, taxonomy)
    _check_sizes(size)
    probabilities = class_logits.float().softmax(dim=-1)[:, :-1].flatten()
    scores, indices = probabilities.topk(min(top, len(probabilities)))
    things_of_query: dict[int, list[tuple[int, float]]] = {}
    for score, index in zip(scores.cpu().numpy(), indices.cpu().numpy(), strict=True):
        query, class_index = divmod(int(index), taxonomy.num_classes)
        if taxonomy.is_thing(class_index):
            things_of_query.setdefault(query, []).append((class_index, float(score)))

    found: list[dict[str, Any]] = []
    resizer = _Resizer(mask_logits, *size)
    for query, things in things_of_query.items():
        logits = resizer(mask_logits[query])
        inside = logits > 0
        area = int(inside.sum())
        if not area:
            continue
        mask_score = float((logits.sigmoid() * inside).sum()) / (area + 1e-6)
        mask = inside.cpu().numpy()
        shape = {"bbox": _tight_box(mask), "segmentation": run_lengths(mask)}
        for class_index, score in things:
            found.append({"category_id": taxonomy.category_id(class_index), "score": score * mask_score, **shape})
    return sorted(found, key=lambda instance: instance["score"], reverse=True)


def _tight_box(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """Return x, y, width and height of the smallest box around the mask, which must not be empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _check_classes(class_logits: Float[Tensor, "Q K1"], taxonomy: Taxonomy) -> None:
    if class_logits.shape[-1] != taxonomy.num_classes + 1:
        raise ValueError(
            f"The class logits need {taxonomy.num_classes} columns for classes and one for no object, got "
            f"{class_logits.shape[-1]} columns; use the taxonomy the model was trained with."
        )


def _check_sizes(size: tuple[Size, Size, Size]) -> None:
    padded, valid, original = size
    if valid[0] > padded[0] or valid[1] > padded[1] or min(*valid, *original) < 1:
        raise ValueError(
            f"The valid size must lie within the padded one and none be empty, got padded {padded}, valid {valid}, "
            f"original {original}; give (height, width) pairs in the order padded, valid, original."
        )


class _Resizer:
    """`_resize` for one map at a time, to the bit, and faster on a CPU.

    Every map uses the same memory: taking it from the system anew costs as much as the arithmetic. The first step, the
    larger one, resizes rows and then columns. Bilinear interpolation does the same inside, so nothing is rounded
    differently, and the columns pass for channels, whose interpolation is vectorized.

    Args:
        mask_logits: maps of the size and on the device of those that follow.
    """

    def __init__(self, mask_logits: Float[Tensor, "Q h w"], padded: Size, valid: Size, original: Size) -> None:
        self._sizes = padded, valid, original
        self._wide = mask_logits.new_empty(1, 1, mask_logits.shape[1], padded[1], dtype=torch.float32)
        self._as_input = mask_logits.new_empty(1, padded[0], valid[1], dtype=torch.float32)
        self._result = mask_logits.new_empty(1, 1, *original, dtype=torch.float32)

    def __call__(self, logits: Float[Tensor, "h w"]) -> Float[Tensor, "H W"]:
        """Return the resized map in float32, which the caller may change and the next call overwrites."""
        padded, valid, _ = self._sizes
        if sum(padded) <= _SMALL or logits.device.type != "cpu":
            return _resize(logits.float()[None], *self._sizes)[0]
        _interpolate_into(self._wide, logits.float()[None, None])
        cropped = self._wide[0, :, :, : valid[1]]
        _interpolate_into(_columns_as_channels(self._as_input), _columns_as_channels(cropped))
        _interpolate_into(self._result, self._as_input[None, :, : valid[0]])
        return self._result[0, 0]


def _columns_as_channels(plane: Float[Tensor, "1 h w"]) -> Float[Tensor, "1 w 1 h"]:
    """Return a view in the memory format "channels last"."""
    return plane.transpose(1, 2)[:, :, None]


def _interpolate_into(result: Float[Tensor, "1 C H W"], maps: Float[Tensor, "1 C h w"]) -> None:
    """Do what `F.interpolate` does, which cannot write into given memory."""
    bilinear: Any = torch.ops.aten.upsample_bilinear2d.out
    bilinear(maps, result.shape[-2:], False, out=result)


def _resize(logits: Float[Tensor, "N h w"], padded: Size, valid: Size, original: Size) -> Float[Tensor, "N H W"]:
    """Undo stride, padding and test-time resizing of logits, in the two steps of the published implementations."""
    as_input = F.interpolate(logits[None], size=padded, mode="bilinear", align_corners=False)
    cropped = as_input[..., : valid[0], : valid[1]]
    return F.interpolate(cropped, size=original, mode="bilinear", align_corners=False)[0]
