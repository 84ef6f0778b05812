"""What the registered model reads: bytes of an image file, or base64 of them, and never a file of its server."""

import base64
import io
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from pipelines.tracking.registered_model import _read_image


def test_a_text_is_never_taken_for_a_path(tmp_path: Path) -> None:
    """A server that gets `text/csv` passes each cell on as a str."""
    content = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(content, "PNG")
    file = tmp_path / "x.secret.png"
    file.write_bytes(content.getvalue())
    for source in (content.getvalue(), base64.b64encode(content.getvalue()).decode()):
        assert _read_image(source, 7).tolist() == [[[1, 2, 3]] * 5] * 4
    for source in (str(file), file, "x.secret.png", "größe", 5, None):
        with pytest.raises(MlflowException, match="The image of row 7 cannot be read") as refused:
            _read_image(source, 7)  # pyright: ignore[reportArgumentType]
        assert "secret" not in str(refused.value)
