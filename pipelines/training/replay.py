"""A step that was not finite: kept by the workers in a bundle, and repeated in one process to find its cause.

    <run>/replay/step_00000123/rank_000.safetensors   the micro-batches of a worker, for each worker
                               model.safetensors      the weights before the step
                               replay.json            step, learning rate, configuration, environment, and the sha256
                                                      of each file; written last

Nothing in it is pickled.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from maskformer import MaskFormer, build_model, compute_losses
from maskformer.optim import parameter_groups
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped, parse_json
from maskformer.weights import check_fit
from pipelines.checkpoints.state import environment
from pipelines.config.serialize import VERSION, from_dict, to_dict, upgraded
from pipelines.config.train import TrainConfig
from pipelines.data.batch import PanopticBatch
from pipelines.data.order import BatchSplit, dropout_seed
from pipelines.errors import UserError
from pipelines.storage import Location, sha256
from pipelines.training.preflight import PreparedRun
from pipelines.training.reduction import ExactReduction

Precision = Literal["bfloat16", "float32"]

_VERSION = 2
_MODEL = "model.safetensors"
_SHOWN = 5
"""Names of parameters that a report shows of each kind."""

_SHAPES = {
    "images": (torch.uint8, "B3HW"),
    "index_maps": (torch.int32, "BHW"),
    "sizes": (torch.int64, "B2"),
    "classes": (torch.int64, "N"),
    "num_segments": (torch.int64, "B"),
    "positions": (torch.int64, "B"),
    "epochs": (torch.int64, "B"),
    "image_ids": (torch.int64, "B"),
}
"""Data type and shape of the tensors of a micro-batch: B images, H W padded size, N segments of all images."""


def write_batches(folder: Location, rank: int, micro_batches: Sequence[PanopticBatch]) -> None:
    """Write a worker's micro-batches of a step into the bundle `folder`.

    Raises:
        UserError: the folder cannot be written.
        StorageUnavailableError: the storage did not answer.
    """
    (folder / _batches_file(rank)).write_bytes(safetensors.torch.save(batches_to_tensors(micro_batches)))


def write_bundle(
    folder: Location,
    *,
    run: PreparedRun,
    step: int,
    network_state: Mapping[str, Tensor],
    num_masks: float,
    factor: float,
    recent_norms: Sequence[float],
    workers: int,
    taxonomy: Taxonomy,
) -> None:
    """Complete the bundle `folder`, after every worker wrote its micro-batches into it.

    Args:
        step: index of the step, from 0: the number of steps done before it.
        network_state: the weights before the step, on any device.
        num_masks: the divisor of the step's mask losses.
        factor: on the initial learning rate of every group.
        recent_norms: gradient norms of the steps before, as far as they are known, the newest last.
        workers: number of workers of the step.

    Raises:
        UserError: the folder cannot be written.
        FileNotFoundError: the micro-batches of a worker are missing.
        StorageUnavailableError: the storage did not answer.
    """
    (folder / "replay.json").delete()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network_state.items()}
    model = safetensors.torch.save(weights)
    (folder / _MODEL).write_bytes(model)
    hashes = {name: sha256((folder / name).read_bytes()) for name in map(_batches_file, range(workers))}
    content = {
        "version": _VERSION,
        "run": run.config.run.name,
        "step": step,
        "total_steps": run.total_steps,
        "workers": workers,
        "num_masks": num_masks,
        "lr_factor": factor,
        "recent_gradient_norms": list(recent_norms),
        "environment": environment(run.config),
        "config": to_dict(run.config),
        "categories": taxonomy.to_coco(),
        "files": {_MODEL: sha256(model), **hashes},
    }
    (folder / "replay.json").write_text(json.dumps(content, indent=1))


@dataclass(frozen=True)
class Bundle:
    """A step and all that it was computed from."""

    run: str
    step: int
    total_steps: int
    workers: int
    num_masks: float
    factor: float
    recent_norms: tuple[float, ...]
    environment: Mapping[str, Any]
    config: TrainConfig
    taxonomy: Taxonomy
    network: MaskFormer
    """With the weights before the step, in training mode, on the CPU."""
    micro_batches: tuple[PanopticBatch, ...]
    """All of the step. Number i was computed by worker i % workers."""


def read_bundle(folder: Location) -> Bundle:
    """Read and verify a bundle.

    Raises:
        UserError: it is incomplete, damaged or of another version; the message names the file.
        StorageUnavailableError: the storage did not answer.
    """
    file = folder / "replay.json"
    content = _decoded(file, parse_json, _read(file))
    version = content.get("version") if isinstance(content, dict) else None
    if version not in (1, _VERSION):
        raise UserError(
            f"{file} has version {version!r}, and this program reads {_VERSION}. Use the version of maskformer-ray "
            f"that wrote it."
        )
    try:
        # The first version of bundles was written with version 2 of the settings.
        config = from_dict(TrainConfig, upgraded(content["config"], 2 if version == 1 else VERSION))
        taxonomy = Taxonomy.from_coco(content["categories"])
        workers = BatchSplit(
            global_batch=config.run.global_batch, micro_batch=config.run.micro_batch, workers=int(content["workers"])
        ).workers
        hashes = {name: str(content["files"][name]) for name in (_MODEL, *map(_batches_file, range(workers)))}
        facts: dict[str, Any] = {
            "run": str(content["run"]),
            "step": int(content["step"]),
            "total_steps": int(content["total_steps"]),
            "num_masks": float(content["num_masks"]),
            "factor": float(content["lr_factor"]),
            "recent_norms": tuple(map(float, content["recent_gradient_norms"])),
            "environment": dict(content["environment"]),
        }
        if not facts["num_masks"] > 0:
            raise ValueError(f"num_masks is {facts['num_masks']}")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise _unusable(file, error) from error

    data: dict[str, dict[str, Tensor]] = {}
    for name, expected in hashes.items():
        part = _read(folder / name)
        if sha256(part) != expected:
            raise UserError(
                f"{folder / name} is damaged: it does not have the hash in replay.json. Use an undamaged copy of the "
                f"bundle."
            )
        data[name] = _decoded(folder / name, safetensors.torch.load, part)
    _decoded(folder / _MODEL, lambda tensors: check_fit(str(folder / _MODEL), tensors, config.model), data[_MODEL])
    network = _decoded(file, build_model, config.model).train()
    _decoded(folder / _MODEL, network.load_state_dict, data[_MODEL])
    of_rank = [
        _decoded(folder / name, lambda part: batches_from_tensors(part, taxonomy.num_classes), data[name])
        for name in map(_batches_file, range(workers))
    ]
    count = config.run.global_batch // config.run.micro_batch
    if any(len(batches) != count // workers for batches in of_rank):
        raise UserError(
            f"{folder} has {', '.join(str(len(batches)) for batches in of_rank)} micro-batches of its workers instead "
            f"of {count // workers} each. Use an undamaged copy of the bundle."
        )
    ordered = tuple(of_rank[number % workers][number // workers] for number in range(count))
    return Bundle(config=config, taxonomy=taxonomy, workers=workers, network=network, micro_batches=ordered, **facts)


def batches_to_tensors(micro_batches: Sequence[PanopticBatch]) -> dict[str, Tensor]:
    """Return the content of micro-batches as named tensors on the CPU."""
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):
        parts = {
            "images": batch.images,
            "index_maps": batch.index_maps,
            "sizes": torch.tensor(batch.sizes),
            "classes": torch.cat(batch.classes),
            "num_segments": torch.tensor([len(classes) for classes in batch.classes]),
            "positions": torch.tensor(batch.positions),
            "epochs": torch.tensor(batch.epochs),
            "image_ids": torch.tensor(batch.image_ids),
        }
        tensors |= {f"{index:04d}.{name}": part.cpu().contiguous() for name, part in parts.items()}
    return tensors


def batches_from_tensors(tensors: Mapping[str, Tensor], num_classes: int) -> list[PanopticBatch]:
    """Rebuild micro-batches from the result of `batches_to_tensors`.

    Raises:
        KeyError: a tensor is missing.
        ValueError: shapes, data types or values do not fit each other or the number of classes.
    """
    return [
        _batch({name: tensors[f"{index:04d}.{name}"] for name in _SHAPES}, num_classes)
        for index in range(len({name.partition(".")[0] for name in tensors}))
    ]


def _batch(parts: dict[str, Tensor], num_classes: int) -> PanopticBatch:
    lengths = {"2": 2, "3": 3}
    for name, (dtype, letters) in _SHAPES.items():
        shape = parts[name].shape
        fits = parts[name].dtype == dtype and len(shape) == len(letters)
        if not fits or any(lengths.setdefault(letter, n) != n for letter, n in zip(letters, shape, strict=True)):
            raise ValueError(f"{name} is {parts[name].dtype} {list(shape)}")
    sizes, counts, classes = parts["sizes"], parts["num_segments"], parts["classes"]
    if not lengths["B"] or (sizes < 1).any() or (sizes > torch.tensor(parts["images"].shape[2:])).any():
        raise ValueError(f"there are images of the sizes {sizes.tolist()} in a batch of {list(parts['images'].shape)}")
    if (counts < 0).any() or counts.sum() != len(classes) or ((classes < 0) | (classes >= num_classes)).any():
        raise ValueError(f"the classes of the segments do not fit {counts.tolist()} segments of {num_classes} classes")
    batch = PanopticBatch(
        images=parts["images"],
        index_maps=parts["index_maps"],
        sizes=tuple((h, w) for h, w in sizes.tolist()),
        classes=classes.split(counts.tolist()),
        positions=tuple(parts["positions"].tolist()),
        epochs=tuple(parts["epochs"].tolist()),
        image_ids=tuple(parts["image_ids"].tolist()),
    )
    batch.targets()  # checks the index maps
    return batch


def _batches_file(rank: int) -> str:
    return f"rank_{rank:03d}.safetensors"


def _read(file: Location) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"There is no {file}, so this is not a complete bundle. Give the folder replay/step_* of a run that "
            f"stopped at a step that was not finite."
        ) from error
    except UserError:
        raise
    except OSError as error:
        raise _unusable(file, error) from error


def _decoded(file: Location, decode: Callable[[Any], Any], data: Any) -> Any:
    try:
        return decode(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: weights of another model
        raise _unusable(file, error) from error


def _unusable(file: Location, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    return UserError(
        f"{file} cannot be used ({type(error).__name__}: {escaped(text[:300])}). Use an undamaged copy of the bundle."
    )


@dataclass(frozen=True)
class Fault:
    """The first value in a forward or backward pass that is not finite."""

    place: str
    """Name of the layer."""
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: {self.detail}"


@dataclass(frozen=True)
class MicroBatchReport:
    """What a micro-batch gave."""

    number: int
    worker: int
    image_ids: tuple[int, ...]
    bad_images: tuple[int, ...]
    """Images whose logits are not finite."""
    losses: tuple[float, float, float, float] | None
    """Classification, focal, dice and total; None if the logits are not finite or too large to be matched."""
    fault: Fault | None


@dataclass(frozen=True)
class PartReport:
    """Weights and gradients of a top-level part of the network."""

    name: str
    num_parameters: int
    gradient_norm: float
    largest: tuple[float, str]
    """The largest absolute value of a finite weight, and the name of its tensor."""


@dataclass(frozen=True)
class ReplayReport:
    """What a repeated step gave."""

    title: str
    micro_batches: list[MicroBatchReport]
    parts: list[PartReport]
    gradient_norm: float
    bad_gradients: list[str]
    """Parameters with a gradient that is not finite."""
    bad_weights: list[str]
    """Parameters and buffers that were not finite before the step."""
    learning_rates: dict[str, float]
    recent_norms: tuple[float, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def reproduced(self) -> bool:
        """Whether anything in the step is not finite."""
        losses = [loss for one in self.micro_batches for loss in one.losses or (math.nan,)]
        return not all(map(math.isfinite, [*losses, self.gradient_norm]))

    def __str__(self) -> str:
        lines = [self.title, *self.notes, ""]
        if self.reproduced:
            lines.append("Reproduced: the step is not finite.")
            for one in self.micro_batches:
                if one.fault is not None:
                    images = ", ".join(map(str, one.bad_images or one.image_ids))
                    lines.append(f"  micro-batch {one.number} (worker {one.worker}), images {images}: {one.fault}")
        else:
            lines.append("Not reproduced: logits, losses and gradients of the step are finite.")
        for what, names in (("Weights", self.bad_weights), ("Gradients", self.bad_gradients)):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {what} that are not finite: {', '.join(names[:_SHOWN])}{more}")
        lines += [
            "",
            f"{'micro-batch':>11} {'worker':>6} {'class.':>10} {'focal':>10} {'dice':>10} {'total':>10}  images",
        ]
        for one in self.micro_batches:
            losses = [f"{loss:>10.4g}" for loss in one.losses] if one.losses else [f"{'-':>10}"] * 4
            images = ", ".join(map(str, one.image_ids))
            lines.append(f"{one.number:>11} {one.worker:>6} {' '.join(losses)}  {images}")
        lines += ["", f"{'part':<20} {'parameters':>11} {'gradient norm':>13} {'largest weight':>14}"]
        lines += [
            f"{part.name:<20} {part.num_parameters:>11,} {part.gradient_norm:>13.4g} {part.largest[0]:>14.4g}  "
            f"{part.largest[1]}"
            for part in self.parts
        ]
        lines.append(f"{'all':<20} {sum(part.num_parameters for part in self.parts):>11,} {self.gradient_norm:>13.4g}")
        if self.recent_norms:
            lines.append(f"gradient norms before: {', '.join(f'{norm:.4g}' for norm in self.recent_norms)}")
        lines.append("learning rates: " + "; ".join(f"{name} {lr:.4g}" for name, lr in self.learning_rates.items()))
        return "\n".join(map(escaped, lines))


def replay(bundle: Bundle, device: torch.device, precision: Precision) -> ReplayReport:
    """Repeat a step's forward passes, losses and backward passes with the dropout of the run; nothing is updated.

    On the device and in the precision of the run, with the same versions, all numbers are the run's, but for the
    rounding of gradients that `scaling.reduction fast` added in another order.

    Args:
        precision: of the network (autocast).
    """
    config = bundle.config
    if config.scaling.device == device.type == "cpu":
        torch.set_num_threads(config.scaling.threads)
    network = bundle.network.to(device)
    split = BatchSplit(global_batch=config.run.global_batch, micro_batch=config.run.micro_batch, workers=1)
    reduction = ExactReduction(network, split, device)
    reports: dict[int, MicroBatchReport] = {}
    for turn, number in enumerate(reduction.turns):
        batch = bundle.micro_batches[number]
        torch.manual_seed(dropout_seed(config.run.seed, batch.positions[0], device.type))
        with reduction.micro_batch(last=turn == len(reduction.turns) - 1), _watched(network) as faults:
            images, padding = batch.inputs(config.model.pixel_mean, config.model.pixel_std, device)
            if not images.isfinite().all():
                faults.append(Fault("the input", "the normalized images are not finite"))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                output = network(images, padding)
            losses = None
            try:
                by_kind = compute_losses(output, batch.targets(device), config.loss, bundle.num_masks)
                parts = torch.stack([by_kind.classification, by_kind.focal, by_kind.dice, by_kind.total])
                losses = tuple(parts.detach().double().tolist())
                if not all(map(math.isfinite, losses)):
                    faults.append(Fault("the losses", "they are not finite, although the logits are"))
                (by_kind.total * reduction.scale).backward()
            except ValueError as error:  # of the matching; the gradient is missing in the sum
                if not faults:
                    faults.append(Fault("the matching of queries and segments", str(error)))
        finite = [logits.isfinite().transpose(0, 1).flatten(1).all(dim=1) for logits in output]
        bad = tuple(image for image, *of_image in zip(batch.image_ids, *finite, strict=True) if not all(of_image))
        fault = faults[0] if faults else None
        reports[number] = MicroBatchReport(number, number % bundle.workers, batch.image_ids, bad, losses, fault)
    reduction.finish()
    return _report(bundle, network, device, precision, [reports[number] for number in sorted(reports)])


def _report(
    bundle: Bundle,
    network: MaskFormer,
    device: torch.device,
    precision: Precision,
    micro_batches: list[MicroBatchReport],
) -> ReplayReport:
    config = bundle.config
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    parts: list[PartReport] = []
    for part in dict.fromkeys(name.partition(".")[0] for name, _ in network.named_parameters()):
        weights = {name: p for name, p in network.named_parameters() if name.partition(".")[0] == part}
        largest = max((p.detach().abs().nan_to_num(0, 0, 0).max().item(), name) for name, p in weights.items())
        gradients = [p.grad for name, p in weights.items() if name in trained and p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
        parts.append(PartReport(part, sum(p.numel() for p in weights.values()), norm, largest))
    of_run = config.network_precision(config.scaling.device)
    notes: list[str] = []
    if (device.type, precision) != (config.scaling.device, of_run):
        what = "rounding differs" if device.type == config.scaling.device else "dropout and rounding differ"
        notes.append(f"The run used {config.scaling.device} and {of_run}, so {what}.")
    before, now = bundle.environment, environment(config)
    if changed := [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]:
        notes.append(f"The run's environment was another one: {escaped(', '.join(changed))}.")
    if any(one.losses is None for one in micro_batches):
        notes.append("Micro-batches without losses are left out of the gradients below.")
    step = f"Step {bundle.step} of {bundle.total_steps} of run {escaped(bundle.run)}"
    return ReplayReport(
        title=f"{step}, on {device.type} in {precision}.",
        micro_batches=micro_batches,
        parts=parts,
        gradient_norm=torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None]).item(),
        bad_gradients=[name for name, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()],
        bad_weights=[name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()],
        learning_rates={
            group["name"]: group["lr"] * bundle.factor for group in parameter_groups(network, config.optimizer)
        },
        recent_norms=bundle.recent_norms,
        notes=notes,
    )


@contextmanager
def _watched(network: nn.Module) -> Iterator[list[Fault]]:
    """Yield a list to which the first fault of the forward pass, and then that of the backward pass, are added."""
    faults: list[Fault] = []
    after = {"forward": "the input", "backward": "the loss"}
    last: Tensor | None = None

    def forward_hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal last
        for part, tensor in _tensors(output):
            if tensor is last:  # a container returns what its last layer returned
                return
            last = tensor
            place = name or f"the output {part} of the network"
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, place=place: backward_hook(place, gradient))
            if faults or tensor.isfinite().all():
                continue
            given = [value for _, value in _tensors(inputs) if value.numel()]
            within = after["forward"].startswith(f"{name}." if name else "")
            if not all(value.isfinite().all() for value in given):
                origin = f"its input is already not finite, so it happens between {after['forward']} and this layer"
            elif within and next(module.children(), None) is not None:
                origin = f"it happens after {after['forward']}, which is within it and finite"
            else:
                largest = max((value.abs().max().item() for value in given), default=0.0)
                origin = f"its input is finite, up to {largest:.4g}"
            # A ResNet's block computes with the weights of layers that it does not call.
            parameters = module.named_parameters(recurse=not within)
            weights = [key for key, value in parameters if not value.isfinite().all()]
            broken = f"; its {', '.join(weights)} is not finite" if weights else ""
            faults.append(
                Fault(f"forward pass, {place} ({type(module).__name__})", _count(tensor) + "; " + origin + broken)
            )
        after["forward"] = name

    def backward_hook(place: str, gradient: Tensor) -> None:
        if not faults and not gradient.isfinite().all():
            faults.append(
                Fault(
                    f"backward pass, gradient of the output of {place}",
                    f"{_count(gradient)}; the gradient of the output of {after['backward']} is still finite",
                )
            )
        after["backward"] = place

    handles = [
        module.register_forward_hook(lambda *args, name=name: forward_hook(name, *args))
        for name, module in network.named_modules()
    ]
    try:
        yield faults
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all floating-point tensors within nested tuples, lists and dictionaries, with their names."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, str(key))
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", range(len(value)))
        for key, item in zip(names, value, strict=True):
            yield from _tensors(item, str(key))


def _count(tensor: Tensor) -> str:
    nan, infinite = tensor.isnan().sum(), tensor.isinf().sum()
    return f"{nan} NaN and {infinite} infinite of {tensor.numel()} values {list(tensor.shape)}"
