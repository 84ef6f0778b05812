"""From logits to a panoptic map: the fusion of arXiv:2107.06278, section 3.4, step by step as mmdetection does it.

Q queries, K classes (K1 = K + 1: no-object is index K), H W original image, h w stride-4 map of the padded input.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32, Integer, UInt8
from torch import Tensor

from maskformer.config import PanopticConfig
from maskformer.taxonomy import Taxonomy

Size: TypeAlias = tuple[int, int]
"""Height, width in pixels."""


@torch.no_grad()
def panoptic(
    class_logits: Float[Tensor, "Q K1"],
    mask_logits: Float[Tensor, "Q h w"],
    size: tuple[Size, Size, Size],
    config: PanopticConfig,
    taxonomy: Taxonomy,
) -> tuple[Int32[np.ndarray, "H W"], list[dict[str, Any]]]:
    """Fuse the queries of one image into segments that do not overlap.

    `size` is (padded input, valid part of the input without padding, original image). Each pixel belongs to the
    kept query with the highest class score times mask probability; a query left with too little of its own mask
    is dropped and its pixels become void. Stuff of a class is one segment.

    Returns the index map (0 is void, segments are numbered 1, 2, ... by query) and COCO's `segments_info`: `id`,
    `category_id`, `isthing`, `area` in pixels, and `score`, of merged stuff the highest.

    Raises ValueError if the logits and the taxonomy differ in classes, or the sizes do not nest.
    """
    padded, valid, original = size
    if class_logits.shape[-1] != taxonomy.num_classes + 1:
        raise ValueError(
            f"The class logits need {taxonomy.num_classes} classes and no-object, got {class_logits.shape[-1]} "
            f"columns; use the taxonomy the model was trained with."
        )
    if valid[0] > padded[0] or valid[1] > padded[1] or min(*valid, *original) < 1:
        raise ValueError(
            f"The valid size must lie within the padded one and none be empty, got padded {padded}, valid {valid}, "
            f"original {original}; give (height, width) pairs in the order padded, valid, original."
        )
    scores, classes = class_logits.float().softmax(dim=-1).max(dim=-1)
    kept = torch.nonzero((classes != taxonomy.num_classes) & (scores > config.score_threshold))[:, 0]
    scores, classes = scores[kept], classes[kept]

    # A running maximum, one query at a time: a stack of all probabilities of a 4000x5000 image would be 8 GB.
    owner = torch.zeros(original, dtype=torch.int32, device=mask_logits.device)
    highest = torch.full(original, -1.0, dtype=torch.float32, device=mask_logits.device)
    full_areas: list[Tensor] = []
    for index, query in enumerate(kept):
        probability = _resize(mask_logits[query].float(), padded, valid, original).sigmoid()
        weighted = scores[index] * probability
        better = weighted > highest  # strict, so that a tie goes to the lower query, as in an argmax
        owner.masked_fill_(better, index)
        highest = torch.where(better, weighted, highest)
        full_areas.append((probability >= 0.5).sum())

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


def _number_segments(
    classes: Int[np.ndarray, " kept"],
    scores: Float[np.ndarray, " kept"],
    owned_areas: Int[np.ndarray, " kept"],
    full_areas: Int[np.ndarray, " kept"],
    config: PanopticConfig,
    taxonomy: Taxonomy,
) -> tuple[list[dict[str, Any]], Int32[np.ndarray, " kept"]]:
    """Drop what lost too much of its mask, join stuff, and say which id each query's pixels get (0 if dropped)."""
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


def _resize(logits: Float[Tensor, "h w"], padded: Size, valid: Size, original: Size) -> Float[Tensor, "H W"]:
    """Undo stride, padding and test-time resizing, on logits, in the two steps of the published codes."""
    as_input = F.interpolate(logits[None, None], size=padded, mode="bilinear", align_corners=False)
    cropped = as_input[..., : valid[0], : valid[1]]
    return F.interpolate(cropped, size=original, mode="bilinear", align_corners=False)[0, 0]


def encode_ids(ids: Integer[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Write an index map as the RGB of a COCO panoptic PNG: id = R + 256 G + 65536 B.

    Raises ValueError if an id is negative or needs more than 24 bits.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(
            f"A panoptic PNG holds ids in 0..{(1 << 24) - 1}, got {ids.min()}..{ids.max()}; number the segments anew."
        )
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def decode_ids(rgb: UInt8[np.ndarray, "H W 3"]) -> Int32[np.ndarray, "H W"]:
    """Read the index map out of the RGB of a COCO panoptic PNG."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    return red + (green << 8) + (blue << 16)
