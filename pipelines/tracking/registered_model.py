"""The model class of versions in MLflow's registry. This file is stored with each version and runs when it is loaded.

It needs the package `maskformer`, which is stored beside it, but neither Ray nor this repository. Loading unpickles
nothing.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from maskformer import MaskFormer, ModelConfig, PanopticConfig, Segmenter, Taxonomy, build_model
from maskformer.coco_format import encode_ids


class PanopticSegmenter(PythonModel):
    """Segments images and returns COCO panoptic results."""

    def load_context(self, context: Any) -> None:
        """Build the network and load its weights, onto a GPU if there is one.

        `mlflow.pyfunc.load_model(..., model_config={"device": "cpu"})` chooses another device.
        """
        about = json.loads(Path(context.artifacts["about"]).read_text())
        device = (context.model_config or {}).get("device", "auto")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = _read_model(about["model"], context.artifacts["weights"]).to(device)
        self._taxonomy = Taxonomy.from_coco(about["categories"])
        self._size = {"short_side": about["short_side"], "long_side": about["long_side"]}
        self._thresholds = about["panoptic"]
        self._segmenter = self._with_thresholds({})

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] -- MLflow annotates it as returning None
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment the `image` of each row, the bytes of an image file.

        Args:
            params: `score_threshold` and `overlap_threshold`. Default: those that the model was evaluated with.

        Returns:
            Columns `png`, the segment ids at the size of the image as R + 256 G + 65536 B with 0 for void, and
            `segments_info`, a JSON list with `id`, `category_id`, `area` and `score` of each segment.
        """
        changed = {name: value for name, value in (params or {}).items() if value != self._thresholds.get(name)}
        segment = self._with_thresholds(changed) if changed else self._segmenter
        rows = []
        for number, content in enumerate(model_input["image"]):
            ids, segments = segment(_read_image(content, number))
            png = io.BytesIO()
            Image.fromarray(encode_ids(ids)).save(png, "PNG")
            rows.append({"png": png.getvalue(), "segments_info": json.dumps(segments)})
        return pd.DataFrame(rows, columns=["png", "segments_info"])

    def _with_thresholds(self, changed: dict[str, float]) -> Segmenter:
        """Return a segmenter of the model in memory; servers answer several requests at once, so it is a new one."""
        try:
            config = PanopticConfig(**{**self._thresholds, **changed})
        except (TypeError, ValueError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return Segmenter(self._model, self._taxonomy, config, **self._size)


def _read_model(values: dict[str, Any], weights: str) -> MaskFormer:
    config: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    model = build_model(ModelConfig(**config))
    model.load_state_dict(safetensors.torch.load_file(weights))
    return model


def _read_image(content: bytes, row: int) -> np.ndarray:
    """Return the RGB pixels of an image file, or of one in base64."""
    try:
        if content[:64].isascii():  # MLflow's server decodes base64 in the dataframe formats, but not in `inputs`
            content = base64.b64decode(content)
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, ValueError, TypeError) as error:
        raise MlflowException.invalid_parameter_value(f"The image of row {row} cannot be read: {error}") from error


set_model(PanopticSegmenter())
