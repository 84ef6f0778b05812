"""From Arrow tables to padded batches. The oracle sets each pixel individually."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data.batch import PanopticBatch
from pipelines.data.schema import AUGMENTED

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RAGGED = ((5, 9), (8, 4), (6, 6))


def sample(size: tuple[int, int], number: int, num_segments: int = 3) -> dict:
    rng = np.random.default_rng([number, *size])
    return {
        "position": 1000 + number,
        "epoch": 7 + number,
        "image_id": 2**40 + number,
        "height": size[0],
        "width": size[1],
        "image": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "index_map": rng.integers(0, num_segments + 1, size, dtype=np.uint16),
        "classes": rng.integers(0, 133, num_segments, dtype=np.int16),
    }


def table(samples: list[dict]) -> pa.Table:
    rows = [
        {
            **row,
            "image": row["image"].tobytes(),
            "index_map": row["index_map"].astype("<u2" if len(row["classes"]) > 255 else "u1").tobytes(),
            "classes": list(row["classes"]),
        }
        for row in samples
    ]
    return pa.Table.from_pylist(rows, schema=AUGMENTED)


def batch(samples: list[dict]) -> PanopticBatch:
    return PanopticBatch.from_arrow(table(samples))


@pytest.fixture
def ragged() -> list[dict]:
    return [sample(size, number, num_segments=number) for number, size in enumerate(RAGGED)]


def test_padded_and_stacked_pixel_by_pixel(ragged: list[dict]) -> None:
    found = batch(ragged)
    assert found.images.shape == (3, 3, 8, 9)
    assert found.images.dtype == torch.uint8
    assert found.index_maps.shape == (3, 8, 9)
    for index, row in enumerate(ragged):
        for y in range(8):
            for x in range(9):
                inside = y < row["height"] and x < row["width"]
                assert found.images[index, :, y, x].tolist() == (row["image"][y, x].tolist() if inside else [0, 0, 0])
                assert found.index_maps[index, y, x] == (row["index_map"][y, x] if inside else 0)
    assert found.sizes == RAGGED
    assert found.positions == (1000, 1001, 1002)
    assert found.epochs == (7, 8, 9)
    assert found.image_ids == (2**40, 2**40 + 1, 2**40 + 2)


def test_replaced_images_are_told(ragged: list[dict]) -> None:
    assert batch(ragged).skipped == ()
    ragged[1]["skipped"] = "Row 5 is damaged. Image 7 took its place."
    assert batch(ragged).skipped == ("Row 5 is damaged. Image 7 took its place.",)


def test_index_maps_keep_all_16_bits() -> None:
    row = sample((2, 2), 0)
    row["index_map"] = np.array([[0, 255], [256, 65535]], np.uint16)
    row["classes"] = np.zeros(65535, np.int16)
    assert batch([row]).index_maps[0].tolist() == [[0, 255], [256, 65535]]


def test_targets_are_the_index_maps(ragged: list[dict]) -> None:
    for row, target in zip(ragged, batch(ragged).targets(), strict=True):
        assert target.classes.tolist() == row["classes"].tolist()
        masks = target.selected(torch.arange(len(target)))
        assert masks.shape == (len(row["classes"]), 8, 9)
        for number, mask in enumerate(masks, start=1):
            padded = np.zeros((8, 9), bool)
            padded[: row["height"], : row["width"]] = row["index_map"] == number
            np.testing.assert_array_equal(mask.numpy(), padded)


def test_an_index_map_that_does_not_fit_its_classes_names_the_image(ragged: list[dict]) -> None:
    whole = batch(ragged)
    broken = whole.index_maps.clone()
    broken[1, 0, 0] = 1 + len(whole.classes[1])
    with pytest.raises(ValueError, match=f"^Image {whole.image_ids[1]}: An index map with"):
        replace(whole, index_maps=broken).targets()


def test_inputs_are_normalized_with_zeros_in_the_padding(ragged: list[dict]) -> None:
    images, padding = batch(ragged).inputs(MEAN, STD)
    assert padding is not None
    for index, row in enumerate(ragged):
        h, w = row["height"], row["width"]
        expected = (row["image"].astype(np.float64) - MEAN) / STD
        np.testing.assert_allclose(images[index, :, :h, :w].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-5)
        outside = torch.ones(8, 9, dtype=torch.bool)
        outside[:h, :w] = False
        assert torch.equal(padding[index], outside)
        assert not images[index, :, outside].any()


def test_no_padding_is_none() -> None:
    _, padding = batch([sample((5, 9), 0), sample((5, 9), 1)]).inputs(MEAN, STD)
    assert padding is None


def test_an_image_counts_at_most_as_many_masks_as_queries() -> None:
    samples = [sample((4, 4), number, num_segments) for number, num_segments in enumerate((0, 2, 5))]
    assert [batch(samples).num_masks(num_queries) for num_queries in (1, 4, 5, 100)] == [2, 6, 7, 7]


def renamed(schema: pa.Schema) -> pa.Schema:
    return schema.with_metadata({**(schema.metadata or {}), b"maskformer.version": b"0"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: good.drop_columns("classes"), "column classes is missing"),
        (lambda good: good.cast(renamed(good.schema)), "schema augmented v0 instead of augmented v3"),
        (lambda good: good.replace_schema_metadata(None), "schema without a name"),
        (
            lambda good: good.set_column(0, "position", good["position"].cast(pa.int32())),
            "column position is int32 instead of int64",
        ),
    ],
)
def test_another_schema_is_refused(ragged: list[dict], change, message: str) -> None:
    changed = change(table(ragged))
    with pytest.raises(ValueError, match=f"A batch from the data stream .*{message}"):
        PanopticBatch.from_arrow(changed)
