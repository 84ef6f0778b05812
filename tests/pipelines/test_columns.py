"""Columns are aligned as a terminal shows them."""

import pytest

from pipelines.columns import left, right, width


@pytest.mark.parametrize(
    ("text", "columns"),
    [("", 0), ("disk", 4), ("猫", 2), ("ｆ", 2), ("e\u0301", 1), ("é", 1), (r"\x1b[2J", 7)],
)
def test_width(text: str, columns: int) -> None:
    assert width(text) == columns
    for side in (left, right):
        assert width(side(text, 9)) == 9
        assert side(text, 0) == text
    assert left(text, 9).startswith(text)
    assert right(text, 9).endswith(text)
