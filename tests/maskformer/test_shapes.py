"""Shapes in signatures are enforced in the tests: a wrong one is refused at the call."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from maskformer.coco_format import run_lengths
from maskformer.transformer import sine_positions

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_this_session_refuses_wrong_shapes() -> None:
    """tests/conftest.py calls `tests.shapes.enforce` before anything imports maskformer."""
    with pytest.raises(TypeCheckError, match="padding"):
        sine_positions(torch.zeros(2, 3, dtype=torch.bool), 8)
    with pytest.raises(TypeCheckError, match="mask"):
        run_lengths(np.zeros((2, 3), dtype=np.uint8))  # pyright: ignore[reportArgumentType]  # the point of the test


WRONG_CALL = """
import numpy as np
from maskformer.coco_format import decode_ids
decode_ids(np.zeros((2, 3), dtype=np.uint8))
"""


def test_enforce_makes_a_wrong_call_an_error() -> None:
    enforced = run_python(f"from tests.shapes import enforce\nenforce()\n{WRONG_CALL}")
    assert enforced.returncode == 1
    assert "jaxtyping.TypeCheckError" in enforced.stderr
    assert "jaxtyping" not in run_python(WRONG_CALL).stderr  # without it, numpy fails inside the function


def test_enforce_refuses_to_come_too_late() -> None:
    late = run_python("import maskformer.matcher\nfrom tests.shapes import enforce\nenforce()")
    assert late.returncode == 1
    imported = "maskformer.mask_losses, maskformer.matcher, maskformer.targets"
    assert f"before anything imports maskformer; imported are {imported}." in late.stderr
