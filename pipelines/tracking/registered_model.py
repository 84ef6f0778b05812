"""The model class of versions in MLflow's registry. This file is stored with each version and runs when it is loaded.

It needs the package `maskformer`, which is stored beside it, but neither Ray nor this repository. Loading unpickles
nothing.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from maskformer import ModelConfig, PanopticConfig, Segmenter, Taxonomy, build_model
from maskformer.coco_format import encode_ids


class PanopticSegmenter(PythonModel):
    """Segments images and returns COCO panoptic results."""

    def load_context(self, context: Any) -> None:
        """Build the network and load its weights."""
        about = json.loads(Path(context.artifacts["about"]).read_text())
        network: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in about["model"].items()
        }
        model = build_model(ModelConfig(**network))
        model.load_state_dict(safetensors.torch.load_file(context.artifacts["weights"]))
        self._segment = Segmenter(
            model,
            Taxonomy.from_coco(about["categories"]),
            PanopticConfig(**about["panoptic"]),
            short_side=about["short_side"],
            long_side=about["long_side"],
        )

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] -- MLflow annotates it as returning None
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment the `image` of each row, the bytes of an image file.

        Returns:
            Columns `png`, the segment ids at the size of the image as R + 256 G + 65536 B with 0 for void, and
            `segments_info`, a JSON list with `id`, `category_id`, `area` and `score` of each segment.
        """
        rows = []
        for content in model_input["image"]:
            image = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
            ids, segments = self._segment(image)
            png = io.BytesIO()
            Image.fromarray(encode_ids(ids)).save(png, "PNG")
            rows.append({"png": png.getvalue(), "segments_info": json.dumps(segments)})
        return pd.DataFrame(rows, columns=["png", "segments_info"])


set_model(PanopticSegmenter())
