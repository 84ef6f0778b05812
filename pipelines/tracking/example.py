"""The picture that a registered model has as its input example."""

import io

import numpy as np
from PIL import Image


def example_image() -> bytes:
    """Return a PNG of 96 x 64 pixels: a sky, a meadow and a red disc."""
    rows, columns = np.mgrid[:64, :96]
    picture = np.where((rows < 40)[..., None], (120, 170, 230), (70, 140, 60)).astype(np.uint8)
    picture[(rows - 36) ** 2 + (columns - 48) ** 2 < 18**2] = (200, 40, 40)
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    return png.getvalue()
