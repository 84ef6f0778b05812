"""The error map of planted mistakes."""

import numpy as np

from maskformer.analysis.error_map import error_map
from maskformer.analysis.lost_quality import CAUSES, Cause
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco([{"id": k + 1, "name": f"class {k}", "isthing": int(k < 2)} for k in range(3)])
COLORS: dict[Cause, tuple[int, int, int]] = {cause: (250, 10 * number, 0) for number, cause in enumerate(CAUSES)}


def wrong(true: list[int], predicted: list[int], classes: dict[int, int], crowds: tuple[int, ...] = ()) -> list[str]:
    """Return the cause of each pixel of a row, empty if it is not wrong."""
    truth = [{"id": i, "category_id": classes[i], "iscrowd": int(i in crowds)} for i in sorted({*true} - {0})]
    prediction = [{"id": i, "category_id": classes[i]} for i in sorted({*predicted} - {0})]
    image = np.full((1, len(true), 3), 128, np.uint8)
    drawn = error_map(image, (np.array([predicted]), prediction), (np.array([true]), truth), TAXONOMY, COLORS)[
        0
    ].astype(int)
    found = []
    for pixel in drawn:
        red, green, blue = pixel.tolist()  # the colors have 250 of red and 0 of blue
        shade = 250 * (green - blue) / max(red - blue, 1)
        found.append(min(CAUSES, key=lambda cause: abs(COLORS[cause][1] - shade)) if red - blue > 40 else "")
    return found


def test_pixels_have_the_cause_of_their_segment() -> None:
    classes = {1: 1, 2: 1, 3: 3, 11: 1, 12: 2, 13: 3}
    row = [1, 1, 1, 1, 1, 1, 3, 3, 3, 3]
    assert wrong(row, [11] * 6 + [13] * 4, classes) == [""] * 10
    assert wrong(row, [11] * 5 + [0] + [13] * 4, classes) == [""] * 5 + ["boundary"] + [""] * 4
    assert wrong(row, [12] * 6 + [13] * 4, classes) == ["wrong_class"] * 6 + [""] * 4
    assert wrong(row, [0] * 6 + [13] * 4, classes) == ["missed"] * 6 + [""] * 4
    assert wrong(row, [11] * 6 + [12] + [13] * 3, classes) == [""] * 6 + ["false_alarm"] + [""] * 3
    assert wrong([0] * 6 + [3] * 4, [11] * 6 + [13] * 4, classes) == [""] * 10, "void is never wrong"
    assert wrong(row, [12] * 6 + [13] * 4, classes, crowds=(1,)) == [""] * 10, "nor are crowds"
