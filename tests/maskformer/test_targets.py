import pytest
import torch

from maskformer.targets import Targets

INDEX_MAP = torch.tensor([[0, 1, 1, 3], [2, 1, 3, 3], [2, 2, 0, 3]], dtype=torch.int32)
CLASSES = torch.tensor([5, 0, 5])
MASKS = torch.stack([torch.eq(INDEX_MAP, k) for k in (1, 2, 3)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_an_index_map_equals_its_masks(dtype: torch.dtype):
    plane, masks = Targets(CLASSES, INDEX_MAP.to(dtype)), Targets(CLASSES, MASKS)
    indices = torch.tensor([2, 0, 2])
    assert torch.equal(plane.selected(indices), MASKS[indices])
    assert torch.equal(masks.selected(indices), MASKS[indices])
    for height, width in ((3, 4), (2, 2), (1, 3), (5, 9)):
        numbers = torch.arange(1, 4)[:, None, None]
        assert torch.equal(plane.resized(height, width) == numbers, masks.resized(height, width))
    assert (len(plane), plane.max_class) == (3, 5)


def test_resizing_takes_the_upper_left_pixel_of_each_cell():
    resized = Targets(CLASSES, MASKS).resized(2, 3)
    for i in range(2):
        for j in range(3):
            assert torch.equal(resized[:, i, j], MASKS[:, i * 3 // 2, j * 4 // 3])


@pytest.mark.parametrize("masks", [torch.zeros(4, 4, dtype=torch.int32), torch.zeros(0, 4, 4, dtype=torch.bool)])
def test_an_image_may_have_no_segments(masks: torch.Tensor):
    empty = Targets(torch.zeros(0, dtype=torch.int64), masks)
    assert len(empty) == 0
    assert empty.resized(2, 2).shape == (*masks.shape[:-2], 2, 2)
    assert empty.selected(torch.zeros(0, dtype=torch.int64)).shape == (0, 4, 4)


def test_a_segment_may_be_empty():
    targets = Targets(torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.int32))
    assert targets.resized(1, 1).item() == 1
    assert not targets.selected(torch.tensor([1])).any()


def test_an_index_map_of_bytes_has_no_pixels_of_segment_256() -> None:
    targets = Targets(torch.zeros(300, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.uint8))
    assert not targets.selected(torch.tensor([255])).any()


def test_moved_targets_are_equal() -> None:
    moved = Targets(CLASSES, INDEX_MAP).to(torch.device("cpu"))
    assert torch.equal(moved.classes, CLASSES)
    assert torch.equal(moved.masks, INDEX_MAP)
    assert moved.max_class == 5


@pytest.mark.parametrize(
    ("classes", "masks", "message"),
    [
        (CLASSES.int(), MASKS, "int64"),
        (CLASSES[None], MASKS, "int64"),
        (CLASSES, MASKS.float(), "bool"),
        (CLASSES, MASKS[0], "bool"),
        (CLASSES, INDEX_MAP.float(), "bool"),
        (CLASSES, INDEX_MAP[None], "bool"),
        (CLASSES[:2], MASKS, "2 classes and 3 masks"),
        (CLASSES[:2], INDEX_MAP, "values from 0 to 3"),
        (CLASSES, INDEX_MAP - 1, "values from -1 to 2"),
        (CLASSES - 1, MASKS, "got -1"),
    ],
)
def test_refuses_what_does_not_fit(classes: torch.Tensor, masks: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        Targets(classes, masks)
