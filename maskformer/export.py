"""Export a network as an ONNX file or as a program of torch.export, which run without this package.

The input `pixel_values` [1, 3, H, W] is an RGB image in float32 on the scale 0..255, resized as for `Segmenter`; the
network normalizes it. The outputs are those of the last decoder layer, `class_logits` [1, Q, K + 1] and `mask_logits`
[1, Q, h, w]. What else inference needs is stored in the file and beside it, in FILE.json: see `metadata`.

Letters: Q queries, K classes, H W image, h w map of the mask logits.
"""

import copy
import json
import logging
import os
import shutil
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskformer.config import ModelConfig
from maskformer.inference import Segmenter
from maskformer.model import MaskFormer
from maskformer.postprocess import Size

ExportFormat: TypeAlias = Literal["onnx", "torch-export"]
"""A program to write: an ONNX file (.onnx), or a program that `torch.export.load` opens (.pt2)."""

SMALLEST_SIDE = 33
"""Smallest height and width in pixels. Up to 32, the coarsest map has one row, which programs treat in another way."""

_SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
_INPUT, _OUTPUTS = "pixel_values", ["class_logits", "mask_logits"]
_EXAMPLE = (75, 101)  # not the size of any feature map, so that nothing is taken for constant
_LARGEST_FILE = 2_000_000_000  # in bytes; protobuf, the format of ONNX files, ends at 2 GiB


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how it compares with the model."""

    files: tuple[Path, ...]
    """The program, its metadata, and beyond 2 GB the weights of an ONNX file."""
    sizes: tuple[Size, ...]
    """Height and width of the images of noise on which the written program was compared with the model."""
    difference: float
    """Largest absolute difference of a logit."""

    def __str__(self) -> str:
        sizes = " and ".join(f"{height}x{width}" for height, width in self.sizes)
        return f"largest difference of a logit from PyTorch, on noise of {sizes} pixels: {self.difference:.1e}"


def export(segmenter: Segmenter, path: str | Path, format: ExportFormat, size: Size | None = None) -> ExportReport:
    """Write the network of a segmenter to `path`, and its metadata beside it; no GPU is needed.

    The written file is read again and compared with the model. Files appear only when they are complete.

    Args:
        size: the only height and width that the program accepts. None accepts any from `SMALLEST_SIDE` on, which a
            Swin cannot: its windows are laid out for one size.

    Raises:
        ValueError: the name has another suffix, a file exists, the size is too small or missing, a package of the
            extra `onnx` is not installed, or the written program is not equal to the model.
    """
    path = Path(path)
    files = _require_possible(segmenter.model.config, path, format, size)
    network = _Network(segmenter.model).eval()
    about = metadata(segmenter, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    scratch.mkdir()
    try:
        program = _trace(network, size)
        sizes = (size,) if size else (_EXAMPLE, (64, 96))
        if format == "onnx":
            _write_onnx(program, scratch / path.name, about)
            outputs = _run_onnx(scratch / path.name, sizes)
        else:
            torch.export.save(program, scratch / path.name, extra_files={"metadata.json": json.dumps(about)})
            outputs = _run_torch(scratch / path.name, sizes)
        report = ExportReport(
            files=tuple(file for file in files if file.suffix == ".json" or (scratch / file.name).exists()),
            sizes=sizes,
            difference=_require_equal(network, sizes, outputs, path),
        )
        text = json.dumps(about, indent=2) + "\n"
        (scratch / files[1].name).write_text(text, "utf-8")
        for file in reversed(report.files):  # the program last: who finds it finds everything
            (scratch / file.name).replace(file)
    finally:
        shutil.rmtree(scratch)
    return report


def metadata(segmenter: Segmenter, size: Size | None) -> dict[str, Any]:
    """Return what inference needs besides the network, as JSON values.

    `categories` has the classes in the order of `class_logits`, for `Taxonomy.from_coco`; `short_side` and `long_side`
    say to what size an image is resized (`maskformer.preprocess.resized_shape`), or `height` and `width` if the program
    accepts one size only; `score_threshold` and `overlap_threshold` are the fields of `PanopticConfig`. `pixel_mean`
    and `pixel_std` are applied inside the network and listed for information.
    """
    network = segmenter.model.config
    return {
        "format": "maskformer-ray 1",
        "backbone": network.backbone,
        "categories": segmenter.taxonomy.to_coco(),
        "short_side": segmenter.short_side,
        "long_side": segmenter.long_side,
        "height": size[0] if size else None,
        "width": size[1] if size else None,
        "smallest_side": SMALLEST_SIDE,
        "score_threshold": segmenter.config.score_threshold,
        "overlap_threshold": segmenter.config.overlap_threshold,
        "pixel_mean": list(network.pixel_mean),
        "pixel_std": list(network.pixel_std),
    }


class _Network(nn.Module):
    """The model with normalization before it, and of its outputs the last layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: MaskFormer) -> None:
        super().__init__()
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.model = model if on_cpu else copy.deepcopy(model).cpu()
        for name, values in (("mean", model.config.pixel_mean), ("std", model.config.pixel_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(
        self, pixel_values: Float[Tensor, "1 3 H W"]
    ) -> tuple[Float[Tensor, "1 Q K1"], Float[Tensor, "1 Q h w"]]:
        output = self.model((pixel_values - self.mean) / self.std)
        return output.class_logits[-1], output.mask_logits[-1]


def _require_possible(config: ModelConfig, path: Path, format: ExportFormat, size: Size | None) -> tuple[Path, ...]:
    """Return the files that may be written: the program, the metadata and the weights."""
    if path.suffix != _SUFFIXES[format]:
        raise ValueError(f"{path} is not a name for {format}. Give a name that ends in {_SUFFIXES[format]}.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The export to ONNX needs {', '.join(missing)}, which this environment does not have. Install the extra: "
            f'pip install "maskformer-ray[onnx]".'
        )
    if size is None and config.backbone.startswith("swin"):
        raise ValueError(
            f"A network with {config.backbone} can be exported for one size only, and none was given. Give the height "
            f"and width of the resized images: size=(800, 1216), or --size 800 1216."
        )
    if size is not None and min(size) < SMALLEST_SIDE:
        raise ValueError(
            f"Height and width must be at least {SMALLEST_SIDE} pixels, since the network has a stride of 32, got "
            f"{size[0]} and {size[1]}. Give the size of the resized images, for example 800 and 1216."
        )
    files = path, path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.data")
    for file in files:
        if file.exists():
            raise ValueError(f"{file} already exists. Choose another output, or delete it.")
    return files


def _trace(network: nn.Module, size: Size | None) -> torch.export.ExportedProgram:
    sides = {axis: torch.export.Dim(name, min=SMALLEST_SIDE) for axis, name in ((2, "height"), (3, "width"))}
    with torch.no_grad():
        return torch.export.export(
            network, (_noise(size or _EXAMPLE),), dynamic_shapes=None if size else {_INPUT: sides}
        )


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)  # they list each node that they do not simplify
        onnx: Any = torch.onnx.export(  # pyright: ignore[reportUnknownMemberType]  # torch leaves some arguments untyped
            program, dynamo=True, input_names=[_INPUT], output_names=_OUTPUTS, verbose=False, external_data=False
        )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    onnx.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    onnx.save(path, external_data=weights > _LARGEST_FILE)


def _run_onnx(path: Path, sizes: tuple[Size, ...]) -> list[list[Tensor]]:
    session: Any = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [session.run(_OUTPUTS, {_INPUT: _noise(size).numpy()}) for size in sizes]
    return [[torch.as_tensor(each) for each in output] for output in outputs]


def _run_torch(path: Path, sizes: tuple[Size, ...]) -> list[list[Tensor]]:
    module = torch.export.load(path).module()
    with torch.no_grad():
        return [list(module(_noise(size))) for size in sizes]


def _require_equal(network: nn.Module, sizes: tuple[Size, ...], outputs: list[list[Tensor]], path: Path) -> float:
    """Return the largest difference of a logit."""
    largest = 0.0
    for size, found in zip(sizes, outputs, strict=True):
        with torch.no_grad():
            expected = list(network(_noise(size)))
        for name, left, right in zip(_OUTPUTS, found, expected, strict=True):
            difference = float((left - right).abs().max())
            # A few units in the last place of the largest logit, after hundreds of operations.
            if not difference <= 1e-3 * max(1.0, float(right.abs().max())):
                raise ValueError(
                    f"{path} was not written: its {name} differ by {difference:.2g} from those of the model, on an "
                    f"image of {size[0]}x{size[1]}. Use the tested versions of constraints.txt."
                )
            largest = max(largest, difference)
    return largest


def _noise(size: Size) -> Float[Tensor, "1 3 H W"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, *size), generator=generator).float()
