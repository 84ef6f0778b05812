"""COCO's encodings of segment ids and masks, decoded pixel by pixel."""

import numpy as np
import pytest

from maskformer.coco_format import decode_ids, encode_ids, run_lengths


def test_ids_survive_the_png_encoding():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 2**24 - 1, 1234567]])
    rgb = encode_ids(ids)
    assert rgb.dtype == np.uint8
    assert rgb[1, 3].tolist() == [1234567 % 256, 1234567 // 256 % 256, 1234567 // 65536]
    decoded = decode_ids(rgb)
    assert decoded.dtype == np.int32
    assert (decoded == ids).all()


@pytest.mark.parametrize("bad", [-1, 2**24])
def test_refuses_ids_a_png_cannot_hold(bad: int):
    with pytest.raises(ValueError, match=rf"{bad}"):
        encode_ids(np.array([[0, bad]]) if bad > 0 else np.array([[bad, 0]]))


def decode(segmentation) -> np.ndarray:
    """A mask from COCO's uncompressed run lengths, pixel by pixel down the columns."""
    pixels: list[bool] = []
    for run, count in enumerate(segmentation["counts"]):
        pixels += [run % 2 == 1] * count
    height, width = segmentation["size"]
    return np.array([[pixels[x * height + y] for x in range(width)] for y in range(height)])


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        (["##", "##"], [0, 4]),
        (["..", ".."], [4]),
        (["#.", ".#"], [0, 1, 2, 1]),
        ([".#.", ".#."], [2, 2, 2]),
        (["#"], [0, 1]),
    ],
)
def test_run_lengths_go_down_the_columns_and_start_outside(rows: list[str], counts: list[int]):
    mask = np.array([[pixel == "#" for pixel in row] for row in rows])
    lengths = run_lengths(mask)
    assert lengths == {"size": [len(rows), len(rows[0])], "counts": counts}
    assert all(type(number) is int for number in lengths["size"] + lengths["counts"])  # for JSON
    assert (decode(lengths) == mask).all()
