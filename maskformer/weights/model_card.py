"""The model card of a folder for transformers: what the model is, its classes and quality, and code that runs it."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Template

from maskformer.config import ModelConfig, PanopticConfig
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The panoptic quality of a model on a data set."""

    data: str
    """Name of the data set."""
    num_images: int
    metrics: Mapping[str, float]
    """Fractions 0..1 by name, such as `pq/all` and `rq/stuff`."""


@dataclass(frozen=True, kw_only=True)
class ModelDetails:
    """How a model is used and what is known of it. The defaults are those of the published models."""

    short_side: int = 800
    """Short side of the resized image in pixels."""
    long_side: int = 1333
    """Upper limit of the long side in pixels."""
    panoptic: PanopticConfig = field(default_factory=PanopticConfig)
    recipe: str = ""
    """What trained it; empty if unknown."""
    evaluations: Sequence[Evaluation] = ()


SNIPPET = Template("""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, MaskFormerForInstanceSegmentation

folder = "."  # this folder, or the name of its repository
processor = AutoImageProcessor.from_pretrained(folder)
model = MaskFormerForInstanceSegmentation.from_pretrained(folder).eval()

image = Image.open("image.jpg").convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
result = processor.post_process_panoptic_segmentation(
    outputs,
    threshold=$score_threshold,
    overlap_mask_area_threshold=$overlap_threshold,
    label_ids_to_fuse=set(),
    target_sizes=[(image.height, image.width)],
)[0]

# All stuff of a class is one segment.
ids, segments, stuff = result["segmentation"].int(), [], {}
for segment in result["segments_info"]:
    label = segment["label_id"]
    first = stuff.setdefault(label, segment) if label in model.config.label_ids_to_fuse else segment
    if first is segment:
        segments.append(segment)
    ids[ids == segment["id"]] = first["id"]
for segment in segments:
    pixels = int((ids == segment["id"]).sum())
    print(model.config.id2label[segment["label_id"]], f"{segment['score']:.2f}", pixels, "pixels")
""")
"""Code that segments `image.jpg` with the folder in which it runs."""

_CARD = Template("""\
---
library_name: transformers
pipeline_tag: image-segmentation
tags:
- maskformer
- panoptic-segmentation
---

# MaskFormer for panoptic segmentation

[MaskFormer](https://arxiv.org/abs/2107.06278) with the backbone $backbone, $num_queries queries and $num_classes
classes, $training. Written by maskformer-ray for transformers, tested with version 5.23.

## Use

```python
$snippet```

`ids` is a map of segment ids at the size of the image; 0 and -1 are void. `model.config.label_ids_to_fuse` lists the
classes of stuff, whose segments are merged. `post_process_panoptic_segmentation` merges them itself if it is given
`label_ids_to_fuse=set(model.config.label_ids_to_fuse)`, but up to version 5.23 it then uses some ids
[for two segments](https://github.com/huggingface/transformers/issues/23461); the loop above does not.

Images are resized to a short side of $short_side pixels, the long side at most $long_side.

## Quality

$quality

## Classes

$classes

## License

No license is stated for these weights. Before you publish them, state one that the licenses of the training images, of
their annotations and of the weights that the training started from allow.
""")


def model_card(config: ModelConfig, taxonomy: Taxonomy | None, details: ModelDetails) -> str:
    """Return the text of README.md; names of classes and data sets are escaped.

    Args:
        taxonomy: None if it is not known which classes are stuff.
    """
    thresholds = vars(details.panoptic)
    return _CARD.substitute(
        vars(config),
        short_side=details.short_side,
        long_side=details.long_side,
        training=f"trained with the recipe {_text(details.recipe)}" if details.recipe else "trained elsewhere",
        snippet=SNIPPET.substitute(thresholds),
        quality=_quality(details.evaluations),
        classes=_classes(taxonomy),
    )


def _quality(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "This model was not evaluated before it was written."
    lines = [
        "In percent, at the size of the images.",
        "",
        "| data | images | classes | PQ | SQ | RQ |",
        "|---|---|---|---|---|---|",
    ]
    for evaluation in evaluations:
        for group in ("all", "things", "stuff"):
            values = [evaluation.metrics.get(f"{name}/{group}") for name in ("pq", "sq", "rq")]
            if None not in values:
                cells = " | ".join(f"{100 * value:.1f}" for value in values if value is not None)
                lines.append(f"| {_text(evaluation.data)} | {evaluation.num_images} | {group} | {cells} |")
    return "\n".join(lines)


def _classes(taxonomy: Taxonomy | None) -> str:
    if taxonomy is None:
        return "`id2label` in config.json names them. It is not known which of them are stuff, so none are merged."
    parts = [
        (title, [category.name for category in taxonomy.categories if category.isthing == isthing])
        for title, isthing in (("Things", True), ("Stuff", False))
    ]
    return "\n\n".join(f"{title} ({len(names)}): {', '.join(map(_text, names)) or 'none'}." for title, names in parts)


def _text(name: str) -> str:
    """Return a name as text of Markdown in one line."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]|#!~$" else sign for sign in html.escape(escaped(name), quote=False))
