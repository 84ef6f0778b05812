"""The model class of versions in MLflow's registry. This file is stored with each version and runs when it is loaded.

It needs the package `maskformer`, which is stored beside it, but neither Ray nor this repository. Loading unpickles
nothing.
"""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image

import maskformer
from maskformer.coco_format import encode_ids


class PanopticSegmenter(PythonModel):
    """Segments images and returns COCO panoptic results."""

    def load_context(self, context: Any) -> None:
        """Build the network and load its weights, on a GPU if there is one."""
        self._segmenter = maskformer.load(Path(context.artifacts["about"]).parent)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] -- MLflow annotates it as returning None
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment the `image` of each row, the bytes of an image file; its EXIF orientation is applied.

        Returns:
            Columns `png`, the segment ids at the size of the image as R + 256 G + 65536 B with 0 for void, and
            `segments_info`, a JSON list with `id`, `category_id`, `area` and `score` of each segment.
        """
        rows = []
        for content in model_input["image"]:
            ids, segments = self._segmenter.segment(content)
            png = io.BytesIO()
            Image.fromarray(encode_ids(ids)).save(png, "PNG")
            rows.append({"png": png.getvalue(), "segments_info": json.dumps(segments)})
        return pd.DataFrame(rows, columns=["png", "segments_info"])


set_model(PanopticSegmenter())
