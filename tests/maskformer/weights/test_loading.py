"""What `load` refuses, what it reports, and how classes move to another data set."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maskformer import DEMO, R101, SWIN_T, ModelConfig, Taxonomy, build_model, weights
from maskformer.taxonomy import COCO
from maskformer.weights import Weights
from tests.maskformer.weights.foreign_names import R50_SMALL, SWIN_SMALL, detectron2, fill, mmdet, resnet50

TINY = ModelConfig(
    backbone="small",
    num_classes=3,
    num_queries=4,
    hidden_dim=16,
    num_heads=2,
    feedforward_dim=8,
    encoder_layers=1,
    decoder_layers=1,
)


@pytest.fixture
def native() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(build_model(TINY).state_dict())


@pytest.fixture(scope="module")
def foreign() -> dict[str, Tensor]:
    return fill(mmdet(3, R50_SMALL))


# ---- another network than the configuration describes


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"backbone": "swin_t"}, "backbone.conv1.weight"),
        ({"encoder_layers": 1}, "panoptic_head.pixel_decoder.encoder.layers.1."),
        ({"decoder_layers": 1}, "panoptic_head.transformer_decoder.layers.1."),
    ],
)
def test_layers_that_the_configuration_does_not_have(
    change: dict[str, object], tensor: str, foreign: dict[str, Tensor]
) -> None:
    config = dataclasses.replace(R50_SMALL, **change)
    with pytest.raises(
        ValueError, match=rf"holds another network .*are not in the model, first {tensor}.*detect_config returns it"
    ):
        weights.load(foreign, config)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"num_queries": 5}, r"panoptic_head\.query_embed\.weight has the shape \(3, 32\) .* \(5, 32\)"),
        ({"num_classes": 7}, r"cls_embed\.weight has the shape \(5, 32\) .* other classes .* give the taxonomy"),
        ({"feedforward_dim": 17}, r"layers\.0\.0\.weight has the shape"),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, object], tensor: str, foreign: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"^The state dict does not fit the model: its tensor .*{tensor}"):
        weights.load(foreign, dataclasses.replace(R50_SMALL, **change))


def test_resnet101_is_not_cut_down_to_resnet50() -> None:
    state = {"layer3.22.conv1.weight": torch.zeros(256, 1024, 1, 1), **fill(resnet50())}
    with pytest.raises(ValueError, match=r"another network .*first layer3\.22\.conv1\.weight"):
        weights.load(state, R50_SMALL)


def test_another_architecture_is_refused(foreign: dict[str, Tensor]) -> None:
    """As a Mask2Former is: the backbone and the heads have the same names, the rest has not."""
    state = {name.replace("lateral_convs", "input_convs"): tensor for name, tensor in foreign.items()}
    with pytest.raises(
        ValueError, match=r"another architecture: it lacks 9 tensors .*laterals\.0\.0.*unknown, first .*input_convs"
    ):
        weights.load(state, R50_SMALL)


def test_tensors_only_missing_or_only_unused_are_reported(foreign: dict[str, Tensor]) -> None:
    state = {name: tensor for name, tensor in foreign.items() if "mask_embed" not in name}
    loaded, report = weights.load(state, R50_SMALL)
    assert report.missing == tuple(f"mask_head.{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias"))
    assert not loaded.keys() & set(report.missing)
    with pytest.raises(ValueError, match=r"not a complete model: it lacks 6 tensors, first mask_head\.0\.weight"):
        report.require_complete()

    loaded, report = weights.load({**foreign, "ema.decay": torch.tensor(0.9)}, R50_SMALL)
    assert report.missing == ()
    assert report.unused == ("ema.decay",)
    report.require_complete()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_of_a_diverged_training_are_refused(value: float, foreign: dict[str, Tensor]) -> None:
    name = "panoptic_head.mask_embed.2.bias"
    bad = foreign[name].clone()
    bad[3] = value
    too_large = bad.double().nan_to_num(1e300, 1e300)
    for tensor in (bad, too_large):
        with pytest.raises(ValueError, match=rf"its tensor {name} holds NaN or infinity"):
            weights.load({**foreign, name: tensor}, R50_SMALL)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int8, torch.bool, torch.uint16])
def test_only_floating_point_numbers_are_weights(dtype: torch.dtype, foreign: dict[str, Tensor]) -> None:
    name = "panoptic_head.cls_embed.weight"
    state = {**foreign, name: foreign[name].to(dtype)}
    with pytest.raises(ValueError, match=rf"its tensor {name} is of {dtype}, where class_head\.weight must be one of"):
        weights.load(state, R50_SMALL, taxonomy("a", "b", "c", "d"))


def test_only_integers_count(foreign: dict[str, Tensor]) -> None:
    name = "backbone.bn1.num_batches_tracked"
    with pytest.raises(
        ValueError, match=rf"its tensor {name} is of torch\.float32, where .* must be one of uint8, int8"
    ):
        weights.load({**foreign, name: torch.tensor(math.nan)}, R50_SMALL)
    state, report = weights.load({**foreign, name: torch.tensor(7, dtype=torch.int32)}, R50_SMALL)
    assert (state[name].dtype, report.cast) == (torch.int64, (name,))


def test_tensors_without_values_are_refused(native: dict[str, Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"class_head\.bias is of torch\.float32 without values \(on the meta device\)"
    ):
        weights.load({**native, "class_head.bias": native["class_head.bias"].to("meta")}, TINY)


def test_another_number_of_heads_is_refused(native: dict[str, Tensor]) -> None:
    """It leaves no trace in the tensors."""
    file = Weights("model.safetensors", native, {"decoder_config": {"decoder_attention_heads": 4}})
    with pytest.raises(ValueError, match=r"4 attention heads, the configuration 2.*Set model\.num_heads to 4"):
        weights.load(file, TINY)


# ---- data types and the report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_everything_becomes_float32(dtype: torch.dtype, native: dict[str, Tensor]) -> None:
    state, report = weights.load({name: tensor.to(dtype) for name, tensor in native.items()}, TINY)
    assert (report.cast, report.reshaped) == (tuple(native), ())
    assert f"cast to another data type: {len(native)} (" in str(report)
    for name, tensor in native.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor.to(dtype).float())


def test_the_report_is_a_short_block() -> None:
    _, report = weights.load(Weights("r50.pkl", fill(detectron2(R50_SMALL))), R50_SMALL)
    assert str(report) == "r50.pkl: detectron2\n  unused: 1 (criterion.empty_weight)"
    _, report = weights.load(Weights("resnet.pth", fill(resnet50())), R50_SMALL)
    lines = str(report).splitlines()
    assert lines[0] == "resnet.pth: torchvision"
    with torch.device("meta"):
        rest = sum(not name.startswith("backbone.") for name in build_model(R50_SMALL).state_dict())
    assert lines[1].startswith(f"  missing: {rest} (pixel_decoder.projection.weight, pixel_decoder.projection.bias, ")
    assert lines[1].endswith(", ...)")
    assert lines[2] == "  unused: 2 (fc.weight, fc.bias)"


# ---- what is in a file


def test_published_shapes_are_detected() -> None:
    for config in (R101, SWIN_T):
        with torch.device("meta"):
            state = build_model(config).state_dict()
        assert weights.detect_config(state) == config


def test_native_files_state_the_full_configuration(native: dict[str, Tensor]) -> None:
    stated = {"config": {"model": dataclasses.asdict(DEMO)}}
    assert weights.detect_config(Weights("model.safetensors", native, stated)) == DEMO
    stated["config"]["model"]["wings"] = 2
    with pytest.raises(ValueError, match=r"a configuration with wings, which this version does not know"):
        weights.detect_config(Weights("model.safetensors", native, stated))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_classes": 5}, "with the backbone None, which this version does not know"),
        ({"backbone": "vit"}, "with the backbone 'vit', which"),
        ({"backbone": ["small"]}, r"with the backbone \('small',\), which"),
        ({"backbone": "small", "num_classes": "x"}, "whose num_classes is 'x', where a value like 133 is expected"),
        ({"backbone": "small", "pixel_std": [1, 2]}, r"whose pixel_std is \(1, 2\), where a value like"),
    ],
)
def test_damaged_configurations_are_explained(
    model: dict[str, object], message: str, native: dict[str, Tensor]
) -> None:
    file = Weights("model.safetensors", native, {"config": {"model": model}})
    for action in (weights.detect_config, lambda source: weights.load(source, TINY)):
        with pytest.raises(ValueError, match=rf"^model\.safetensors has a configuration {message}"):
            action(file)


@pytest.mark.parametrize("categories", [5, [5], ["id name isthing"], [{"id": 1}], {"name": "cat"}])
def test_damaged_categories_are_explained(categories: object, native: dict[str, Tensor]) -> None:
    file = Weights("model.safetensors", native, {"categories": categories})
    for action in (weights.class_names, weights.stated_taxonomy):
        with pytest.raises(ValueError, match=r"^model\.safetensors has categories that are not a list of classes \("):
            action(file)


def test_sizes_that_cannot_be_are_explained(foreign: dict[str, Tensor]) -> None:
    queries, bias = "panoptic_head.query_embed.weight", "panoptic_head.cls_embed.bias"
    for name, shape in ((queries, (5,)), (bias, ())):
        state = {**foreign, name: torch.zeros(shape)}
        with pytest.raises(ValueError, match=rf"^The state dict is not a MaskFormer: its tensor {name} has the shape"):
            weights.detect_config(state)
        with pytest.raises(ValueError, match=rf"does not fit the model: its tensor {name} has the shape"):
            weights.load(state, R50_SMALL, taxonomy("a", "b", "c", "d"))
    with pytest.raises(
        ValueError, match=r"^The state dict holds a model that cannot be built: model\.hidden_dim must be"
    ):
        weights.detect_config({**foreign, queries: torch.zeros(5, 6)})


def test_a_model_that_cannot_be_detected_is_explained(native: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"not a complete MaskFormer: it has no query_embedding\.weight"):
        weights.detect_config(fill(resnet50()))
    with pytest.raises(ValueError, match=r"number of attention heads is not in the file"):
        weights.detect_config(native)
    blocks = {name: tensor for name, tensor in fill(mmdet(3, SWIN_SMALL)).items() if "stages.2.blocks.5" not in name}
    with pytest.raises(ValueError, match="a Swin with 96 channels and 5 blocks in its third stage"):
        weights.detect_config(blocks)


# ---- classes


def taxonomy(*names: str) -> Taxonomy:
    return Taxonomy.from_coco([{"id": index, "name": name, "isthing": 1} for index, name in enumerate(names, 1)])


def named(state: dict[str, Tensor], *names: str) -> Weights:
    return Weights("animals.pth", state, {"meta": {"CLASSES": names}})


def test_classes_are_moved_by_name(native: dict[str, Tensor]) -> None:
    config = dataclasses.replace(TINY, num_classes=4)
    file = named(native, "cat", "dog", "cow")
    state, report = weights.load(file, config, taxonomy("cow", "horse", "cat", "pig"))
    for head in ("class_head.weight", "class_head.bias"):
        assert torch.equal(state[head][[0, 2, 4]], native[head][[2, 0, 3]])  # cow, cat, no object
        assert state[head].shape[0] == 5
        fresh = state[head][[1, 3]]
        assert fresh.abs().max() <= 16**-0.5
        assert fresh.flatten().unique().numel() == fresh.numel()
    assert report.classes_found == ("cow", "cat")
    assert report.classes_new == ("horse", "pig")
    assert report.reshaped == ("class_head.weight", "class_head.bias")
    assert "classes initialized randomly: 2 (horse, pig)" in str(report)
    again, _ = weights.load(file, config, taxonomy("cow", "horse", "cat", "pig"))
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert build_model(config).load_state_dict(state)


def test_the_same_classes_stay(native: dict[str, Tensor]) -> None:
    for file in (named(native, "cat", "dog", "cow"), Weights("x", native)):
        state, report = weights.load(file, TINY, taxonomy("cat", "dog", "cow"))
        assert torch.equal(state["class_head.weight"], native["class_head.weight"])
        assert (report.reshaped, report.classes_found, report.classes_new) == ((), (), ())


def test_the_same_classes_in_another_order_are_moved(native: dict[str, Tensor]) -> None:
    state, report = weights.load(named(native, "cat", "dog", "cow"), TINY, taxonomy("dog", "cow", "cat"))
    assert torch.equal(state["class_head.bias"], native["class_head.bias"][[1, 2, 0, 3]])
    assert report.classes_new == ()


def test_133_classes_without_names_are_those_of_coco() -> None:
    coco = dataclasses.replace(TINY, num_classes=133)
    native = dict(build_model(coco).state_dict())
    _, report = weights.load(native, coco, COCO)
    assert report.reshaped == ()
    config = dataclasses.replace(TINY, num_classes=2)
    state, report = weights.load(native, config, taxonomy("dog", "unicorn"))
    assert torch.equal(state["class_head.weight"][[0, 2]], native["class_head.weight"][[COCO.names.index("dog"), 133]])
    assert report.classes_new == ("unicorn",)


def test_other_classes_without_names_are_refused(native: dict[str, Tensor]) -> None:
    config = dataclasses.replace(TINY, num_classes=2)
    with pytest.raises(ValueError, match="trained on other classes: its class head has 3, without names, the data set"):
        weights.load(native, config, taxonomy("cat", "dog"))
    with pytest.raises(ValueError, match=r"The model has 3 classes, the taxonomy 2\. Set model\.num_classes"):
        weights.load(native, TINY, taxonomy("cat", "dog"))


CLASS_NAMES: dict[str, Callable[[], dict[str, object]]] = {
    "native": lambda: {"categories": taxonomy("cat", "dog", "cow").to_coco()},
    "mmdet": lambda: {"meta": {"dataset_meta": {"classes": ("cat", "dog", "cow")}}},
    "huggingface": lambda: {"id2label": {"1": "dog", "0": "cat", "2": "cow"}},
}


@pytest.mark.parametrize("source", CLASS_NAMES)
def test_every_format_names_its_classes(source: str, native: dict[str, Tensor]) -> None:
    file = Weights("x", native, CLASS_NAMES[source]())
    assert weights.class_names(file) == ("cat", "dog", "cow")
    assert weights.stated_taxonomy(file) == (taxonomy("cat", "dog", "cow") if source == "native" else None)
    assert weights.stated_taxonomy(Weights("x", native, {"meta": {"CLASSES": COCO.names}})) == COCO
