"""Replay bundles: what they keep, what is refused, and what a repeated step reports."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import jobs.replay
from maskformer import MaskFormer, Taxonomy, build_model, compute_losses
from maskformer.optim import build_optimizer
from pipelines.config.recipes import DEMO
from pipelines.data.batch import PanopticBatch
from pipelines.data.order import dropout_seed
from pipelines.errors import UserError
from pipelines.storage import locate, sha256
from pipelines.training.preflight import PreparedRun
from pipelines.training.replay import ReplayReport, read_bundle, replay, write_batches, write_bundle

CPU = torch.device("cpu")
TAXONOMY = Taxonomy.from_coco([{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(1, 5)])
CONFIG = replace(
    DEMO,
    model=replace(
        DEMO.model, num_classes=4, num_queries=5, hidden_dim=16, feedforward_dim=32, decoder_layers=2, dropout=0.1
    ),
    run=replace(DEMO.run, name="run\x1b", storage="runs", seed=3, steps=20, global_batch=8, micro_batch=2),
    scaling=replace(DEMO.scaling, workers=2, device="cpu"),
)
NUM_MASKS, FACTOR = 2.5, 0.5


def micro_batch(number: int) -> PanopticBatch:
    """Draw two images of unequal sizes; some have no segments."""
    rng = np.random.default_rng(number)
    sizes = ((40, 48), (33, 64))
    images = torch.zeros(2, 3, 40, 64, dtype=torch.uint8)
    maps = torch.zeros(2, 40, 64, dtype=torch.int32)
    classes = []
    for place, (h, w) in enumerate(sizes):
        count = (2, 0, 7, 1)[(number + place) % 4]
        images[place, :, :h, :w] = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
        blocks = rng.integers(0, count + 1, (h // 8 + 1, w // 8 + 1), dtype=np.int32)
        maps[place, :h, :w] = torch.from_numpy(np.kron(blocks, np.ones((8, 8), np.int32))[:h, :w])
        classes.append(torch.from_numpy(rng.integers(0, 4, count)))
    first = 8 * 7 + 2 * number
    return PanopticBatch(
        images=images,
        index_maps=maps,
        sizes=sizes,
        classes=tuple(classes),
        positions=(first, first + 1),
        epochs=(0, 1),
        image_ids=(100 + first, 101 + first),
    )


BATCHES = [micro_batch(number) for number in range(4)]


def new_network() -> MaskFormer:
    torch.manual_seed(0)
    return build_model(CONFIG.model).train()


def write(folder: Path, network: MaskFormer, config: Any = CONFIG, batches: list[PanopticBatch] = BATCHES) -> Path:
    """Write a bundle of step 7 as two workers would."""
    location = locate(folder)
    for rank in range(2):
        write_batches(location, rank, batches[rank::2])
    write_bundle(
        location,
        run=PreparedRun(config, 20, cast(Any, None), cast(Any, None)),
        step=7,
        network_state=network.state_dict(),
        num_masks=NUM_MASKS,
        factor=FACTOR,
        recent_norms=[1.5, 2.5],
        workers=2,
        taxonomy=TAXONOMY,
    )
    return folder


def replayed(folder: Path) -> ReplayReport:
    return replay(read_bundle(locate(folder)), CPU, "float32")


def test_a_bundle_keeps_every_bit(tmp_path: Path) -> None:
    network = new_network()
    bundle = read_bundle(locate(write(tmp_path, network)))
    assert (bundle.run, bundle.step, bundle.total_steps, bundle.workers) == ("run\x1b", 7, 20, 2)
    assert (bundle.num_masks, bundle.factor, bundle.recent_norms) == (NUM_MASKS, FACTOR, (1.5, 2.5))
    assert (bundle.config, bundle.taxonomy) == (CONFIG, TAXONOMY)
    assert bundle.network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(bundle.network.state_dict()[name], tensor), name
    for found, batch in zip(bundle.micro_batches, BATCHES, strict=True):
        for field in fields(PanopticBatch):
            one, other = getattr(found, field.name), getattr(batch, field.name)
            if isinstance(other, torch.Tensor):
                assert torch.equal(one, other)
                assert one.dtype == other.dtype
            elif field.name == "classes":
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            else:
                assert one == other
    assert not any(path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x05") for path in tmp_path.iterdir())


def test_a_healthy_step_gives_the_numbers_of_a_direct_computation(tmp_path: Path) -> None:
    network = new_network()
    found = replayed(write(tmp_path, network))
    assert not found.reproduced
    assert (found.bad_gradients, found.bad_weights) == ([], [])
    for report, batch in zip(found.micro_batches, BATCHES, strict=True):
        torch.manual_seed(dropout_seed(3, batch.positions[0], "cpu"))
        output = network(*batch.inputs(CONFIG.model.pixel_mean, CONFIG.model.pixel_std))
        losses = compute_losses(output, batch.targets(), CONFIG.loss, NUM_MASKS)
        (losses.total / 4).backward()
        values = (losses.classification, losses.focal, losses.dice, losses.total)
        assert report.losses == tuple(value.item() for value in values)  # bit for bit
        assert (report.worker, report.image_ids, report.bad_images) == (report.number % 2, batch.image_ids, ())
    norm = nn.utils.clip_grad_norm_(network.parameters(), float("inf")).item()
    assert found.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert sum(part.gradient_norm**2 for part in found.parts) ** 0.5 == pytest.approx(norm, rel=1e-5)
    head = next(part for part in found.parts if part.name == "class_head")
    parameters = list(network.class_head.parameters())
    assert head.num_parameters == sum(p.numel() for p in parameters)
    assert head.gradient_norm == pytest.approx(
        sum(p.grad.square().sum().item() for p in parameters if p.grad is not None) ** 0.5
    )
    assert head.largest[0] == max(p.abs().max().item() for p in parameters)
    optimizer = build_optimizer(network, CONFIG.optimizer)
    assert found.learning_rates == {group["name"]: group["lr"] / 2 for group in optimizer.param_groups}
    text = str(found)
    assert text.splitlines()[0] == r"Step 7 of 20 of run run\x1b, on cpu in float32."
    assert "Not reproduced: " in text
    assert "gradient norms before: 1.5, 2.5" in text


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    network = new_network()
    name, layer = [(n, m) for n, m in network.pixel_decoder.named_modules() if isinstance(m, nn.Conv2d)][-1]
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    found = replayed(write(tmp_path, network))
    assert found.reproduced
    assert found.bad_weights == [f"pixel_decoder.{name}.weight"]
    for report in found.micro_batches:
        assert report.fault is not None
        assert report.fault.place == f"forward pass, pixel_decoder.{name} (Conv2d)"
        assert "its input is finite" in report.fault.detail
        assert "its weight is not finite" in report.fault.detail
        assert report.losses is None
        assert report.bad_images == report.image_ids
    first = f"micro-batch 0 (worker 0), images 156, 157: forward pass, pixel_decoder.{name}"
    assert f"Reproduced: the step is not finite.\n  {first}" in str(found)


def test_a_weight_of_a_resnet_is_named_with_its_block(tmp_path: Path) -> None:
    """A block computes its convolutions and norms itself, so they are not layers that were watched."""
    config = replace(CONFIG, model=replace(CONFIG.model, backbone="resnet50"))
    torch.manual_seed(0)
    network = build_model(config.model).train()
    with torch.no_grad():
        network.get_parameter("backbone.layer2.0.conv2.weight")[0, 0] = float("nan")
    found = replayed(write(tmp_path, network, config))
    assert found.bad_weights == ["backbone.layer2.0.conv2.weight"]
    for report in found.micro_batches:
        assert report.fault is not None
        assert report.fault.place == "forward pass, backbone.layer2.0 (Bottleneck)"
        assert "its input is finite" in report.fault.detail
        assert "its conv2.weight is not finite" in report.fault.detail


def test_an_image_that_overflows_is_named(tmp_path: Path) -> None:
    """All images are gray, 0 after normalization, but for a white one, which overflows in the first layer."""
    batches = [replace(batch, images=torch.full_like(batch.images, 127)) for batch in BATCHES]
    batches[2].images[1] = 255
    network = new_network()
    name, first = next((n, m) for n, m in network.backbone.named_modules() if isinstance(m, nn.Conv2d))
    config = replace(CONFIG, model=replace(CONFIG.model, pixel_mean=(127.0,) * 3, pixel_std=(1.0,) * 3))
    with torch.no_grad():
        first.weight.fill_(1e38)
    found = replayed(write(tmp_path, network, config, batches))
    assert [report.bad_images for report in found.micro_batches if report.bad_images] == [(161,)]
    bad = found.micro_batches[2]
    assert bad.fault is not None
    assert bad.fault.place == f"forward pass, backbone.{name} (Conv2d)"
    assert "its input is finite, up to 128" in bad.fault.detail
    assert "weight" not in bad.fault.detail


def fault_of(tmp_path: Path, change: Callable[[MaskFormer], object]) -> ReplayReport:
    network = new_network()
    with torch.no_grad():
        change(network)
    return replayed(write(tmp_path, network))


def mask_weights(network: MaskFormer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weights of the last two layers of the mask head and of the one that computes the mask features."""
    last, middle = cast(nn.Linear, network.mask_head[4]), cast(nn.Linear, network.mask_head[2])
    return last.weight, middle.weight, network.pixel_decoder.mask_features.weight


def test_overflow_between_layers_is_placed_there(tmp_path: Path) -> None:
    def large(network: MaskFormer) -> None:
        last, _, features = mask_weights(network)
        last.mul_(1e25)
        features.mul_(1e25)

    report = fault_of(tmp_path, large).micro_batches[0]
    assert report.bad_images == (156, 157)
    assert report.fault is not None
    assert report.fault.place == "forward pass, the output mask_logits of the network (MaskFormer)"
    assert "it happens after mask_head.4, which is within it and finite" in report.fault.detail


def test_logits_that_are_too_large_to_be_matched(tmp_path: Path) -> None:
    found = fault_of(tmp_path, lambda network: mask_weights(network)[0].mul_(1e37))
    assert found.reproduced
    report = found.micro_batches[0]
    assert (report.losses, report.bad_images) == (None, ())
    assert report.fault is not None
    assert report.fault.place == "the matching of queries and segments"


def test_gradient_that_is_not_finite_is_placed(tmp_path: Path) -> None:
    """A layer with huge weights gets tiny values: only the gradient overflows."""

    def uneven(network: MaskFormer) -> None:
        last, middle, features = mask_weights(network)
        last.sign_().mul_(3e38)
        middle.mul_(1e-40)
        cast(nn.Linear, network.mask_head[2]).bias.zero_()
        features.mul_(100)

    found = fault_of(tmp_path, uneven)
    assert found.reproduced
    assert not found.bad_weights
    assert all(report.losses is not None for report in found.micro_batches)
    fault = next(report.fault for report in found.micro_batches if report.fault)
    assert fault.place == "backward pass, gradient of the output of mask_head.3"
    assert "the gradient of the output of mask_head.4 is still finite" in fault.detail
    assert "mask_head.0.weight" in found.bad_gradients
    assert "mask_head.4.weight" not in found.bad_gradients
    assert f"Gradients that are not finite: {', '.join(found.bad_gradients[:5])} and " in str(found)


def other_number_of_batches(folder: Path) -> None:
    write_batches(locate(folder), 1, BATCHES[1:2])
    rehash(folder)


def rehash(folder: Path) -> None:
    edit(folder, files={file.name: sha256(file.read_bytes()) for file in folder.glob("*.safetensors")})


def edit(folder: Path, **facts: Any) -> None:
    content = json.loads((folder / "replay.json").read_text())
    (folder / "replay.json").write_text(json.dumps({**content, **facts}))


def edit_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    file = folder / "rank_001.safetensors"
    content = safetensors.torch.load(file.read_bytes())
    changed = {**content, **{f"0001.{name}": tensor for name, tensor in tensors.items()}}
    file.write_bytes(safetensors.torch.save({name: tensor for name, tensor in changed.items() if tensor is not None}))
    rehash(folder)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def other_model(folder: Path) -> None:
    network = build_model(replace(CONFIG.model, num_queries=6))
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(network.state_dict()))
    rehash(folder)


def no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x05not tensors")
    rehash(folder)


BATCH = {"images": BATCHES[3].images, "maps": BATCHES[3].index_maps}

DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("replay.json", lambda f: (f / "replay.json").unlink(), "not a complete bundle"),
    ("replay.json", lambda f: (f / "replay.json").write_text("{"), "JSONDecodeError"),
    ("replay.json", lambda f: (f / "replay.json").write_bytes(b'{"\xff": 1}'), "UnicodeDecodeError"),
    ("replay.json", lambda f: (f / "replay.json").write_text("[1]"), "version None"),
    ("replay.json", lambda f: edit(f, version=3), "version 3"),
    ("replay.json", lambda f: edit(f, workers=3), "3 workers"),
    ("replay.json", lambda f: edit(f, workers=0), "ZeroDivisionError"),
    ("replay.json", lambda f: edit(f, workers=float("inf")), "OverflowError"),
    ("replay.json", lambda f: edit(f, step="x"), "invalid literal"),
    ("replay.json", lambda f: edit(f, num_masks=float("nan")), "num_masks is nan"),
    ("replay.json", lambda f: edit(f, config={"recipe": "demo", "x\x1b": 1}), r"settings x\\x1b"),
    ("replay.json", lambda f: edit(f, config=[]), "AttributeError"),
    ("replay.json", lambda f: edit(f, categories=[{"id": 1}]), "ValueError"),
    ("replay.json", lambda f: edit(f, files={}), "KeyError"),
    ("rank_001.safetensors", lambda f: (f / "rank_001.safetensors").unlink(), "not a complete bundle"),
    ("rank_001.safetensors", lambda f: flip(f / "rank_001.safetensors"), "hash"),
    ("model.safetensors", lambda f: flip(f / "model.safetensors"), "hash"),
    ("model.safetensors", no_tensors, "SafetensorError"),
    ("model.safetensors", other_model, "does not fit its own configuration"),
    ("rank_001.safetensors", lambda f: edit_tensors(f, images=None), "0001.images"),
    ("rank_001.safetensors", lambda f: edit_tensors(f, images=BATCH["images"].float()), "images is torch.float32"),
    ("rank_001.safetensors", lambda f: edit_tensors(f, images=BATCH["images"][:1]), "index_maps is"),
    ("rank_001.safetensors", lambda f: edit_tensors(f, index_maps=BATCH["maps"] + 9), "index map"),
    ("rank_001.safetensors", lambda f: edit_tensors(f, sizes=torch.tensor([[40, 65], [1, 1]])), "sizes"),
    ("rank_001.safetensors", lambda f: edit_tensors(f, num_segments=torch.tensor([9, -9])), "segments"),
    ("rank_001.safetensors", lambda f: edit_tensors(f, classes=torch.tensor([4, 0, 0])), "segments of 4 classes"),
    ("", other_number_of_batches, "2, 1 micro-batches"),
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundle"), new_network())


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_damaged_bundle_is_refused(
    healthy: Path, tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(healthy, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        read_bundle(locate(folder))
    assert str(folder / file) in str(error.value)
    assert str(error.value).isprintable()


def test_an_interrupted_second_write_is_no_bundle(healthy: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rank_001.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        write_bundle(
            locate(tmp_path),
            run=PreparedRun(CONFIG, 20, cast(Any, None), cast(Any, None)),
            step=7,
            network_state=new_network().state_dict(),
            num_masks=1.0,
            factor=1.0,
            recent_norms=[],
            workers=2,
            taxonomy=TAXONOMY,
        )
    assert not (tmp_path / "replay.json").exists()


def test_job(healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/replay.py", "--bundle", str(healthy), "--precision", "bfloat16"])
    jobs.replay.main()
    first, note, _, verdict, *_ = capsys.readouterr().out.splitlines()
    assert first == r"Step 7 of 20 of run run\x1b, on cpu in bfloat16."
    assert note == "The run used cpu and float32, so rounding differs."
    assert verdict.startswith("Not reproduced")
    monkeypatch.setattr(sys, "argv", ["jobs/replay.py", "--bundle", str(healthy / "nothing")])
    with pytest.raises(UserError, match="There is no "):  # exit status 2
        jobs.replay.main()


def test_bfloat16_of_an_older_bundle_stays_for_gpus_only(tmp_path: Path) -> None:
    folder = write(tmp_path, new_network(), replace(CONFIG, precision="bfloat16"))
    assert read_bundle(locate(folder)).config.network_precision("cpu") == "bfloat16"
    edit(folder, version=1)
    config = read_bundle(locate(folder)).config
    assert (config.network_precision("cpu"), config.network_precision("cuda")) == ("float32", "bfloat16")


def test_bundle_in_an_object_store(bucket: str, healthy: Path) -> None:
    folder = locate(f"{bucket}/run/replay/step_00000007")
    for file in healthy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert read_bundle(folder).step == 7
    (folder / "rank_000.safetensors").delete()
    with pytest.raises(UserError, match=r"There is no s3://.*rank_000"):
        read_bundle(folder)
