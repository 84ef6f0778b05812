"""The model class of versions in MLflow's registry. This file is stored with each version and runs when it is loaded.

It needs the package `maskformer`, which is stored beside it, but neither Ray nor this repository. Loading unpickles
nothing.
"""

import base64
import binascii
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image

import maskformer
from maskformer import Segmenter
from maskformer.coco_format import encode_ids


class PanopticSegmenter(PythonModel):
    """Segments images and returns COCO panoptic results."""

    def load_context(self, context: Any) -> None:
        """Build the network and load its weights, onto a GPU if there is one.

        `mlflow.pyfunc.load_model(..., model_config={"device": "cpu"})` chooses another device.
        """
        device = (context.model_config or {}).get("device", "auto")
        self._segmenter = maskformer.load(Path(context.artifacts["about"]).parent, device)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] -- MLflow annotates it as returning None
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment the `image` of each row, the bytes of an image file; its EXIF orientation is applied.

        Args:
            params: `score_threshold` and `overlap_threshold`. Default: those that the model was evaluated with.

        Returns:
            Columns `png`, the segment ids at the size of the image as R + 256 G + 65536 B with 0 for void, and
            `segments_info`, a JSON list with `id`, `category_id`, `area` and `score` of each segment.
        """
        segmenter = self._with_thresholds(params or {})
        rows = []
        for number, content in enumerate(model_input["image"]):
            ids, segments = segmenter.segment(_read_image(content, number))
            png = io.BytesIO()
            Image.fromarray(encode_ids(ids)).save(png, "PNG")
            rows.append({"png": png.getvalue(), "segments_info": json.dumps(segments)})
        return pd.DataFrame(rows, columns=["png", "segments_info"])

    def _with_thresholds(self, changed: dict[str, Any]) -> Segmenter:
        """Return a segmenter of the model in memory; servers answer several requests at once, so it is a new one."""
        evaluated = self._segmenter
        try:
            config = dataclasses.replace(evaluated.config, **changed)
        except (TypeError, ValueError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        size = {"short_side": evaluated.short_side, "long_side": evaluated.long_side}
        return Segmenter(evaluated.model, evaluated.taxonomy, config, **size)


def _read_image(content: bytes | str, row: int) -> Any:
    """Return the pixels of an image file, or of one in base64. A text of a request is never taken for a path."""
    name = f"The image of row {row}"
    try:
        with contextlib.suppress(binascii.Error):  # MLflow's server decodes base64 in dataframes, but not in `inputs`
            content = base64.b64decode(content, validate=True)
        if not isinstance(content, bytes):
            raise TypeError("it is neither the bytes of an image file nor base64")
        return maskformer.read_image(content, name=name)
    except (ValueError, TypeError) as error:
        raise MlflowException.invalid_parameter_value(f"{name} cannot be read: {error}") from error


set_model(PanopticSegmenter())
