"""The description of a version in MLflow's registry: what it is, what was measured and how, and what it inherits."""

import re
from collections.abc import Mapping

from maskformer.analysis.bootstrap import Interval
from maskformer.panoptic_quality import PanopticResult
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.tracking.evaluations import EvaluatedData

LONGEST = 5000
"""Characters that MLflow's databases keep of a description."""

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$:@-])")


def model_card(
    saved: SavedModel, data: EvaluatedData, quality: PanopticResult, intervals: Mapping[str, Interval]
) -> str:
    """Return a model card in Markdown.

    Args:
        quality: of the evaluation that the model is registered with.
        intervals: of PQ, by group: all, things, stuff.
    """
    config = saved.config
    parameters = sum(tensor.numel() for tensor in saved.weights.values())
    confidence = next((f" {100 * interval.confidence:g} % interval |" for interval in intervals.values()), "")
    lines = [
        "Panoptic segmentation with MaskFormer (arXiv 2107.06278).",
        "",
        f"- recipe: {_plain(config.recipe)}, initial weights: {_plain(config.weights)}",
        f"- checkpoint: {_plain(saved.uri)}, step {saved.step}, {parameters / 1e6:.1f} M parameters",
        f"- image size: short side {config.evaluation.short_side}, long side at most {config.evaluation.long_side}",
        f"- thresholds: score {config.panoptic.score_threshold:g}, overlap {config.panoptic.overlap_threshold:g}",
        f"- measured on: {_plain(data.name)}, {quality.num_images} images, hash {_plain(data.hash)}",
        "",
        f"| percent | PQ |{confidence} SQ | RQ | classes |",
        "|---|---|" + ("---|" if confidence else "") + "---|---|---|",
    ]
    for name in ("all", "things", "stuff"):
        group = getattr(quality, name)
        if group.num_classes:
            between = ""
            if confidence:
                low_high = intervals.get(name)
                between = f" {100 * low_high.low:.1f} to {100 * low_high.high:.1f} |" if low_high else " |"
            lines.append(
                f"| {name} | {100 * group.pq:.1f} |{between} {100 * group.sq:.1f} | {100 * group.rq:.1f} | "
                f"{group.num_classes} |"
            )
    if confidence:
        lines += ["", "The intervals are of a bootstrap over these images; another training is another matter."]
    license_note = (
        "License: weights inherit the terms of the data that they were trained on and of the pretrained weights that "
        "they started from. This card grants none."
    )
    things = saved.taxonomy.num_things
    lists = (("Things", saved.taxonomy.names[:things]), ("Stuff", saved.taxonomy.names[things:]))
    room = LONGEST - len("\n".join([*lines, license_note])) - 200
    for kind, names in lists:
        if names:
            listed = _listed(names, room // 2)
            lines += ["", f"{kind} ({len(names)}): {listed}."]
    return "\n".join([*lines, "", license_note])[:LONGEST]


def _listed(names: tuple[str, ...], room: int) -> str:
    plain = [_plain(name) for name in names]
    shown = len(plain)
    while shown and len(", ".join(plain[:shown])) > room:
        shown -= 1
    more = [f"and {len(plain) - shown} more"] if shown < len(plain) else []
    return ", ".join([*plain[:shown], *more])


def _plain(text: str) -> str:
    """Return `text` so that Markdown and HTML show it as it is, in one line."""
    return _MARKUP.sub(r"\\\1", " ".join("".join(c if c.isprintable() else "?" for c in text).split()))
