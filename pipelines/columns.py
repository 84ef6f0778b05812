"""Columns of text that stay aligned on a terminal, whatever the names in them."""

import unicodedata


def width(text: str) -> int:
    """Return how many columns of a terminal a printable text takes."""
    marks = sum(unicodedata.category(char) in ("Mn", "Me") for char in text)
    wide = sum(unicodedata.east_asian_width(char) in ("W", "F") for char in text)
    return len(text) - marks + wide


def left(text: str, columns: int) -> str:
    """Return a printable text with spaces after it, so that it takes at least `columns`."""
    return text + " " * (columns - width(text))


def right(text: str, columns: int) -> str:
    """Return a printable text with spaces before it, so that it takes at least `columns`."""
    return " " * (columns - width(text)) + text
