"""The Segmenter gives the results of its parts, applied one after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from maskformer import DEMO, PanopticConfig, Segmenter, Taxonomy, build_model
from maskformer.postprocess import instances, panoptic, semantic
from maskformer.preprocess import resize_image

TAXONOMY = Taxonomy.from_coco(
    [{"id": 10 * index, "name": f"class {index}", "isthing": int(index < 5)} for index in range(1, 8)]
)
ANY_SCORE = PanopticConfig(score_threshold=0.0, overlap_threshold=0.0)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    model = build_model(replace(DEMO, hidden_dim=32, feedforward_dim=64, dropout=0.5))
    with torch.no_grad():
        model.query_embedding.weight *= 10  # so that the queries differ in class and in mask
        model.class_head.weight *= 20
        for parameter in model.mask_head.parameters():
            parameter *= 3
    return Segmenter(model, TAXONOMY, ANY_SCORE, short_side=48, long_side=70)


@pytest.mark.parametrize(
    ("original", "resized"), [((33, 41), (48, 60)), ((120, 60), (70, 35))], ids=["short side", "long side"]
)
def test_all_three_results_equal_those_of_the_parts(segmenter: Segmenter, original, resized):
    image = np.random.default_rng(0).integers(0, 256, (*original, 3), dtype=np.uint8)
    planes = torch.as_tensor(resize_image(image, resized)).permute(2, 0, 1)[None].float()
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (DEMO.pixel_mean, DEMO.pixel_std))
    with torch.no_grad():
        output = segmenter.model((planes - mean) / deviation, None)
    logits = output.class_logits[-1, 0], output.mask_logits[-1, 0]
    size = (resized, resized, original)

    classes = segmenter.semantic(image)
    assert classes.shape == original
    assert (classes == semantic(*logits, size)).all()
    assert len(np.unique(classes)) > 1

    found = segmenter.instances(image)
    assert found == instances(*logits, size, TAXONOMY)
    assert {tuple(one["segmentation"]["size"]) for one in found} == {original}

    ids, segments = segmenter(image)
    expected_ids, expected_segments = panoptic(*logits, size, ANY_SCORE, TAXONOMY)
    assert (ids == expected_ids).all()
    assert segments == expected_segments
    assert segments


def test_an_image_resized_beforehand_gives_the_same_segments(segmenter: Segmenter):
    image = np.random.default_rng(1).integers(0, 256, (48, 60, 3), dtype=np.uint8)  # already of the short side
    ids, segments = segmenter(image)
    again_ids, again_segments = segmenter.segment_resized(image, (48, 60))
    assert (ids == again_ids).all()
    assert segments == again_segments
