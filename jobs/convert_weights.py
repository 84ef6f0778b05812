"""Convert a MaskFormer checkpoint of mmdetection, detectron2, Hugging Face or the native format to another format.

python jobs/convert_weights.py --input maskformer_r50.pth --output maskformer_r50.safetensors --to native
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.shared.cli import parse, run
from maskformer.config import WeightFormat
from pipelines.errors import UserError

if TYPE_CHECKING:
    from maskformer import Taxonomy


@dataclass(frozen=True, kw_only=True)
class ConvertWeights:
    """Turn a MaskFormer checkpoint into another format. The input's format and architecture are detected."""

    input: str
    """Checkpoint to convert, a path or URI: a file, a folder with config.json (Hugging Face or native), or a run."""
    output: str
    """A new file; for huggingface, a new folder."""
    to: WeightFormat
    """native (safetensors), mmdet (3.x), mmdet2 (2.x) or huggingface (a folder for from_pretrained)."""
    categories: str | None = None
    """JSON file with COCO panoptic `categories`. The class head is matched to them by name."""


def main() -> None:
    flags = parse(ConvertWeights, description=__doc__)
    try:
        print(_convert(flags))
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or flags.output}: {error.strerror}. Name another path.") from error
    print(f"written to {flags.output}")


def _convert(flags: ConvertWeights) -> str:
    """Convert, and return what was found in the input."""
    import torch  # --help should not

    from maskformer import build_model, weights
    from pipelines.checkpoints import pretrained

    file = pretrained.read(flags.input)
    config = weights.detect_config(file)
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
    return str(report)


def _read_categories(path: Path) -> "Taxonomy":
    from maskformer import Taxonomy

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
