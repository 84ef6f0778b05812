"""Convert a MaskFormer checkpoint to the format of another program, or export its network to run without this package.

python jobs/convert_weights.py --input maskformer_r50.pth --output maskformer_r50.onnx --to onnx
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.shared.cli import parse, run
from jobs.shared.streams import print_line
from maskformer.untrusted import escaped, read_json
from pipelines.errors import UserError

_MAX_BYTES = 2 * 2**30
"""Bytes of an annotation file, of which COCO's largest has less than half."""

if TYPE_CHECKING:
    from maskformer import MaskFormer, Segmenter, Taxonomy, weights


@dataclass(frozen=True, kw_only=True)
class ConvertWeights:
    """Turn a MaskFormer checkpoint into another format. The input's format and architecture are detected."""

    input: str
    """Checkpoint to convert, a path or URI: a file, a folder with config.json (Hugging Face or native), or a run."""
    output: str
    """A new file (.onnx or .pt2 for a network); for huggingface, a new folder."""
    to: Literal["native", "mmdet", "mmdet2", "huggingface", "onnx", "torch-export"]
    """Weights: native (safetensors), mmdet (3.x), mmdet2 (2.x), huggingface (a folder for from_pretrained). onnx and
    torch-export write the network itself, which runs without this package."""
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
    print_line(f"written to {flags.output}")


def _convert(flags: ConvertWeights) -> str:
    """Convert, and return what was found in the input."""
    import torch  # --help should not

    from maskformer import build_model, weights
    from maskformer.export import export
    from pipelines.checkpoints import pretrained
    from pipelines.checkpoints.details import model_details

    if flags.size is not None and flags.to not in ("onnx", "torch-export"):
        raise UserError(f"--size is for onnx and torch-export, got it with --to {flags.to}. Leave it out.")
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
    if flags.to == "onnx" or flags.to == "torch-export":
        model = build_model(config)
        model.load_state_dict(state)
        segmenter = _segmenter(model, flags.input, taxonomy, details)
        return f"{report}\n{export(segmenter, flags.output, flags.to, flags.size)}"
    with torch.device("meta"):
        model = build_model(config)
    model.load_state_dict(state, assign=True)
    weights.save(model, flags.output, flags.to, taxonomy, details)
    return str(report)


def _segmenter(
    model: "MaskFormer", source: str, taxonomy: "Taxonomy | None", details: "weights.ModelDetails"
) -> "Segmenter":
    from maskformer import Segmenter
    from maskformer.taxonomy import COCO

    if taxonomy is None and model.config.num_classes == COCO.num_classes:
        taxonomy = COCO
    if taxonomy is None:
        raise UserError(
            f"{source} does not name its {model.config.num_classes} classes. Give them with --categories FILE, the "
            f"annotation file of the data set it was trained on."
        )
    short_side, long_side = details.short_side, details.long_side
    return Segmenter(model, taxonomy, details.panoptic, short_side=short_side, long_side=long_side)


def _read_categories(path: Path) -> "Taxonomy":
    from maskformer import Taxonomy

    try:
        content = read_json(path, _MAX_BYTES)
        return Taxonomy.from_coco(content["categories"] if isinstance(content, dict) else content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has no categories ({type(error).__name__}: {escaped(error, 200)}). Give a COCO "
            f"panoptic annotation file, or the list of its categories."
        ) from error


if __name__ == "__main__":
    run(main)
