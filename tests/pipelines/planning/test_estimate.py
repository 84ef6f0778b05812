"""The plan against measurements on CPUs, published figures, and arithmetic by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from maskformer import Targets, build_model, compute_losses
from maskformer.config import DEMO as DEMO_MODEL
from maskformer.config import R50, SWIN_L, SWIN_T, LossConfig, ModelConfig, OptimizerConfig
from maskformer.mask_losses import mask_losses
from maskformer.matcher import match_layers
from maskformer.optim import AveragedWeights, build_optimizer
from maskformer.taxonomy import COCO
from pipelines.checkpoints import state as checkpoint
from pipelines.cluster.capacity import Capacity
from pipelines.config.hardware import Hardware
from pipelines.config.recipes import COCO_TRAIN_IMAGES, DEMO, R50_MMDET, R50_ORIGINAL, SWIN_L_MMDET, SWIN_L_ORIGINAL
from pipelines.config.train import CheckpointConfig, TrainConfig
from pipelines.errors import UserError
from pipelines.planning.estimate import Plan, Range, image_sizes, make_plan, planned_capacity
from pipelines.planning.memory import activations, multiply_adds, published_layout, state_memory
from pipelines.storage import locate

SMALL = replace(DEMO_MODEL, hidden_dim=32, feedforward_dim=64, encoder_layers=0, decoder_layers=2, num_classes=133)

COUNTED = lru_cache(activations)


def run_for_real(config: ModelConfig, size: tuple[int, int], masks: int) -> None:
    """Do a forward and a backward pass on the CPU, with gradients that are there before."""
    torch.manual_seed(0)
    model = build_model(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    targets = Targets(torch.arange(masks), torch.randint(0, masks + 1, size))
    output = model(torch.randn(1, 3, *size))
    compute_losses(output, [targets], LossConfig()).total.backward()


@pytest.mark.parametrize("config", [R50, pytest.param(SWIN_T, marks=pytest.mark.slow)], ids=["R50", "Swin-T"])
def test_saved_bytes_are_those_that_a_cpu_saves(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = build_model(config).train()
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for size in ((128, 192), (192, 256)):
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in model_storages:
                kept[storage.data_ptr()] = storage
            return tensor.detach()

        targets = Targets(torch.arange(11), torch.randint(0, 12, size))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(1, 3, *size))
            network = sum(storage.nbytes() for storage in kept.values())
            pairs = match_layers(output.class_logits, output.mask_logits, [targets], LossConfig())
            mask_losses(output.mask_logits, pairs, [targets], LossConfig())
        measured = sum(storage.nbytes() for storage in kept.values())

        modeled = activations(config, 1, size, (3, 11), "cpu")
        assert modeled.network == pytest.approx(network, rel=0.01)
        assert modeled.saved[1] == pytest.approx(measured, rel=0.01)
        assert modeled.network < modeled.saved[0] < modeled.saved[1] < modeled.peak[1]


@pytest.mark.parametrize("config", [R50, pytest.param(SWIN_T, marks=pytest.mark.slow)], ids=["R50", "Swin-T"])
def test_recomputed_activations_are_not_counted_as_saved(config: ModelConfig) -> None:
    """What is left of the blocks of a backbone are their inputs: one map of four or more."""
    whole = activations(config, 1, (256, 320), (3,), "cuda")
    less = activations(replace(config, checkpoint_activations=True), 1, (256, 320), (3,), "cuda")
    assert less.network < 0.6 * whole.network
    assert less.peak[0] < whole.peak[0]
    assert less.saved[0] - less.network == whole.saved[0] - whole.network  # the losses are not recomputed


def test_the_peak_is_that_of_a_profiler_on_a_cpu() -> None:
    size = (160, 224)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_for_real(replace(SMALL, num_queries=40), size, 30)
    kineto: Any = profiler.profiler
    live = peak = 0
    for event in kineto.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    config = replace(SMALL, num_queries=40)
    state = state_memory(config)
    modeled = activations(config, 1, size, (30,), "cpu").peak[0] + state.parameters + state.gradients
    assert modeled == pytest.approx(peak, rel=0.1)


def test_bfloat16_halves_the_network_and_not_the_losses() -> None:
    config = replace(R50, encoder_layers=0, decoder_layers=1)
    single = activations(config, 1, (512, 640), (4,), "cuda")
    half = activations(config, 1, (512, 640), (4,), "cuda", bfloat16=True)
    weights = 2 * sum(parameter.numel() for parameter in build_model(config).parameters())
    # Every large map of a ResNet is bfloat16, and so is a copy of the weights.
    assert single.network / 2 < half.network < 0.65 * single.network + weights
    assert half.saved[0] - half.network == pytest.approx(single.saved[0] - single.network, rel=0.05)
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(("config", "published"), [(R50, 16.2e9), (SWIN_L, 27.2e9)], ids=["R50", "Swin-L"])
def test_the_published_layout_needs_the_published_memory(config: ModelConfig, published: float) -> None:
    """Training memory of mmdetection's model zoo, at images of 800x1333 and the most segments of COCO."""
    assert published_layout(config, (800, 1333), 67) == pytest.approx(published, rel=0.2)


def test_multiply_adds_are_the_known_ones() -> None:
    assert multiply_adds(R50, (800, 1333)) / 1e9 == pytest.approx(211.4, abs=0.05)


def test_state_of_r50() -> None:
    state = state_memory(R50)
    assert (state.parameters, state.gradients) == (4 * 45_065_158, 4 * 45_012_038)
    assert state.total == 4 * (45_065_158 + 3 * 45_012_038)


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoint_bytes_are_those_of_a_checkpoint(tmp_path: Any, averaged: bool) -> None:
    model = build_model(DEMO_MODEL)
    optimizer = build_optimizer(model, OptimizerConfig())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # pyright: ignore[reportAttributeAccessIssue]  # a tensor
    optimizer.step()
    ema = AveragedWeights(model, 0.9).state_dict() if averaged else None
    state = checkpoint.TrainingState(1, model.state_dict(), optimizer.state_dict(), ema)
    checkpoint.save(locate(tmp_path), state, DEMO, COCO)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert state_memory(DEMO_MODEL, averaged).checkpoint == pytest.approx(written, rel=0.02)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Return a function that plans a recipe with a small model in place of its own, whose memory is counted once."""
    monkeypatch.setattr("pipelines.planning.estimate.activations", COUNTED)

    def plan(recipe: TrainConfig, hardware: Hardware | None = None, **scaling: Any) -> Plan:
        config = replace(recipe, model=SMALL, scaling=replace(recipe.scaling, **scaling))
        hardware = hardware or Hardware()
        return make_plan(
            config,
            hardware,
            planned_capacity(hardware, config.scaling),
            images=COCO_TRAIN_IMAGES,
            masks=(1, 2, 3),
            images_per_cpu=50.0,
        )

    return plan


@pytest.mark.parametrize("recipe", [R50_MMDET, SWIN_L_MMDET, R50_ORIGINAL, SWIN_L_ORIGINAL], ids=lambda r: r.recipe)
def test_published_recipes_take_554_thousand_steps(planned: Callable[..., Plan], recipe: TrainConfig) -> None:
    plan = planned(recipe)
    assert plan.steps == (554_400 if recipe.recipe.endswith("original") else 554_471)
    assert plan.capacity.total("GPU") == recipe.run.global_batch
    assert plan.config.batch_split.accumulation == 1


def test_hours_by_hand(planned: Callable[..., Plan]) -> None:
    hardware = Hardware(nodes=2, gpus_per_node=4, network=0.01, tflops=(1e-3, 2e-3))
    plan = planned(R50_MMDET, hardware, workers=8)
    operations = 6 * multiply_adds(SMALL, (640, 853))
    assert plan.typical == (640, 853)
    assert plan.compute == pytest.approx((2 * operations / 2e9, 2 * operations / 1e9))
    trained = state_memory(SMALL).gradients
    assert plan.network_bytes == pytest.approx(trained * 2 * 7 / 8)
    assert plan.network_seconds == pytest.approx(plan.network_bytes / 1e7)
    assert plan.step_seconds.best == pytest.approx(max(plan.compute.best, plan.network_seconds))
    assert plan.step_seconds.worst == pytest.approx(plan.compute.worst + plan.network_seconds)
    assert plan.hours == pytest.approx([554_471 * seconds / 3600 for seconds in plan.step_seconds])
    assert plan.gpu_hours == pytest.approx([8 * hours for hours in plan.hours])
    assert planned(R50_MMDET, replace(hardware, nodes=1, gpus_per_node=8), workers=8).network_seconds == 0


def test_slow_data_limits_the_step(planned: Callable[..., Plan]) -> None:
    fast = Hardware(tflops=(10.0, 10.0))
    plan = planned(R50_MMDET, fast, data_cpus=2.0)
    assert plan.supply == 100
    assert plan.step_seconds == Range(16 / 100, 16 / 100)
    assert plan.data_cpus.best >= plan.demand.best / 50 > 2
    assert any("2 data CPUs" in warning and "supply 100 images/s" in warning for warning in plan.warnings)
    plan = planned(R50_MMDET, replace(fast, storage=0.0016))
    assert plan.supply == pytest.approx(10)
    assert any("Storage at 0.0016 GB/s supplies 10 images/s" in warning for warning in plan.warnings)
    often = replace(R50_MMDET, checkpoint=CheckpointConfig(every=1))
    assert any(
        "Writing a checkpoint takes" in warning for warning in planned(often, replace(fast, storage=0.05)).warnings
    )
    assert planned(R50_MMDET, Hardware(tflops=(0.1, 0.1))).warnings == ()


def test_warnings_about_idle_gpus_slow_networks_and_tight_memory(planned: Callable[..., Plan]) -> None:
    idle = planned(R50_MMDET, Hardware(nodes=4))
    assert any(warning.startswith("16 of 32 GPUs are paid for and idle") for warning in idle.warnings)
    slow = planned(R50_MMDET, Hardware(network=1e-3))
    assert any("the network is the bottleneck" in warning for warning in slow.warnings)
    mean, percentile, most = idle.memory
    assert mean < percentile < most
    tight = planned(R50_MMDET, Hardware(gpu_memory=percentile / 1e9 * 1.01))
    assert any("with 3 segments" in warning and "out of memory" in warning for warning in tight.warnings)


@pytest.mark.parametrize(
    ("hardware", "scaling", "message"),
    [
        (Hardware(gpus_per_node=0), {}, r"r50_mmdet needs .*16 GPU: .* has 96 CPU, 0 GPU, .*--scaling\.device cpu"),
        (
            Hardware(nodes=1),
            {},
            r"96 CPU, 16 GPU: .*The cluster has 96 CPU, 8 GPU, with room for 8 workers .*--cluster\.nodes",
        ),
        (Hardware(), {"workers": 3}, r"3 workers cannot .* global batch of 16 .*--scaling\.workers 2"),
        (
            Hardware(cpus_per_node=40),
            {},
            r"needs 96 CPU, 16 GPU: 16 .* and 64 CPU for data tasks\. The cluster has 80 CPU",
        ),
        (Hardware(gpu_memory=0.01), {}, r"\d\.\d GB with 2 segments in an image of 800x1333, but a GPU has 0\.01 GB"),
    ],
)
def test_impossible_runs_are_refused_with_numbers(
    planned: Callable[..., Plan], hardware: Hardware, scaling: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(R50_MMDET, hardware, **scaling)


@pytest.mark.parametrize(
    "wrong",
    [{"nodes": 0}, {"network": 0.0}, {"tflops": (3.0, 2.0)}, {"gpus_per_node": -1}, {"gpu_memory": float("nan")}],
)
def test_impossible_hardware_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"cluster\.{next(iter(wrong))} "):
        Hardware(**wrong)


def test_a_planned_cluster_has_as_many_nodes_as_the_workers_need() -> None:
    node = {"CPU": 96, "GPU": 8}
    assert planned_capacity(Hardware(), R50_MMDET.scaling) == Capacity.of([node] * 2)
    odd = replace(R50_MMDET.scaling, workers=17)
    assert planned_capacity(Hardware(), odd) == Capacity.of([node] * 3)
    assert planned_capacity(Hardware(nodes=5), odd) == Capacity.of([node] * 5)
    assert planned_capacity(Hardware(cpus_per_node=3), DEMO.scaling) == Capacity.of([{"CPU": 3, "GPU": 8}])


def test_image_sizes() -> None:
    assert image_sizes(R50_MMDET.data.augment) == ((800, 1333), (640, 853))
    assert image_sizes(SWIN_L_ORIGINAL.data.augment) == ((800, 1000), (640, 853))
    assert image_sizes(DEMO.data.augment) == ((60, 96), (56, 75))
