"""Convert a MaskFormer checkpoint to the format of another program, or export its network to run without this package.

python jobs/convert_weights.py --input maskformer_r50.pth --output maskformer_r50.onnx --to onnx
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.shared.cli import parse, run
from maskformer.config import WeightFormat
from pipelines.errors import UserError

if TYPE_CHECKING:
    from maskformer import MaskFormer, Taxonomy, weights


@dataclass(frozen=True, kw_only=True)
class ConvertWeights:
    """Turn a MaskFormer checkpoint into another format. The input's format and architecture are detected."""

    input: str
    """Checkpoint to convert, a path or URI: a file, a folder with config.json (Hugging Face or native), or a run."""
    output: str
    """A new file (.onnx or .pt2 for a network); for huggingface, a new folder."""
    to: WeightFormat | Literal["onnx", "torch-export"]
    """Weights: native (safetensors), mmdet (3.x), mmdet2 (2.x), huggingface (a folder for from_pretrained). The network
    itself: onnx or torch-export."""
    categories: str | None = None
    """JSON file with COCO panoptic `categories`. The class head is matched to them by name."""
    size: tuple[int, int] | None = None
    """Height and width of the images that an exported network takes. Default: any; a Swin needs a fixed size."""


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
    from pipelines.checkpoints.details import model_details

    network = flags.to in ("onnx", "torch-export")
    if flags.size is not None and not network:
        raise UserError(
            f"--size is for onnx and torch-export; weights in the format {flags.to} have none. Leave it out."
        )
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
    details = model_details(flags.input, file)
    with torch.device("cpu" if network else "meta"):  # a network has constants that are not among its weights
        model = build_model(config)
    model.load_state_dict(state, assign=True)
    if flags.to == "onnx" or flags.to == "torch-export":
        return f"{report}\n{_export(model, flags, taxonomy, details)}"
    weights.save(model, flags.output, flags.to, taxonomy, details)
    return str(report)


def _export(
    model: "MaskFormer", flags: ConvertWeights, taxonomy: "Taxonomy | None", details: "weights.ModelDetails"
) -> str:
    """Export the network, and return how it compares with the model."""
    from maskformer import Segmenter
    from maskformer.export import export
    from maskformer.taxonomy import COCO

    if taxonomy is None and model.config.num_classes == COCO.num_classes:
        taxonomy = COCO
    if taxonomy is None:
        raise UserError(
            f"{flags.input} does not name its {model.config.num_classes} classes. Give them with --categories FILE, "
            f"the annotation file of the data set it was trained on."
        )
    assert flags.to == "onnx" or flags.to == "torch-export"
    sides = {"short_side": details.short_side, "long_side": details.long_side}
    return str(export(Segmenter(model, taxonomy, details.panoptic, **sides), flags.output, flags.to, flags.size))


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
