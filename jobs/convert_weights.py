"""Turn a MaskFormer checkpoint of mmdetection, detectron2, Hugging Face or ours into another of these formats.

python jobs/convert_weights.py --input maskformer_r50.pth --output maskformer_r50.safetensors --to own
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jobs.cli import parse, run
from maskformer import Taxonomy, build_model, weights
from pipelines import pretrained
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ConvertWeights:
    """Turn a MaskFormer checkpoint into another format. The input's format and architecture are found out."""

    input: str
    """A file, a folder with config.json as Hugging Face's and our own checkpoints are, or a run's; or its URI."""
    output: str
    """A new file; for huggingface, a new folder."""
    to: weights.Format
    """own (safetensors), mmdet (3.x), mmdet2 (2.x) or huggingface (a folder for from_pretrained)."""
    categories: str | None = None
    """A JSON with COCO panoptic `categories`, to which the class head is then fitted by name."""


def main() -> None:
    flags = parse(ConvertWeights)
    try:
        print(_convert(flags))
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or flags.output}: {error.strerror}. Name another path.") from error
    print(f"written to {flags.output}")


def _convert(flags: ConvertWeights) -> weights.LoadReport:
    file = pretrained.read(flags.input)
    config = weights.detect(file)
    taxonomy = None
    if flags.categories is not None:
        taxonomy = _read_categories(Path(flags.categories))
        config = replace(config, num_classes=taxonomy.num_classes)
    state, report = weights.load(file, config, taxonomy)
    report.require_complete()
    if taxonomy is None:
        taxonomy = weights.stated_taxonomy(file)
        if taxonomy is None and weights.class_names(file) is not None:
            raise UserError(
                f"{flags.input} names {config.num_classes} classes that are not COCO's, but not which of them are "
                f"things. Give them with --categories FILE, the annotation file of the data set it was trained on."
            )
    with torch.device("meta"):
        model = build_model(config)
    model.load_state_dict(state, assign=True)
    weights.save(model, flags.output, flags.to, taxonomy)
    return report


def _read_categories(path: Path) -> Taxonomy:
    try:
        content = json.loads(path.read_text("utf-8"))
        return Taxonomy.from_coco(content["categories"] if isinstance(content, dict) else content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has no categories ({type(error).__name__}: {error}). Give a COCO panoptic annotation file, or the "
            f"list of its categories."
        ) from error


if __name__ == "__main__":
    run(main)
