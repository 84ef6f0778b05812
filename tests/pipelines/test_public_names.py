"""The names that notebooks import."""

import subprocess
import sys

NAMES = """
import maskformer
from pipelines.evaluation import evaluate
from pipelines.recipes import DEMO
from pipelines.training import fit
import pipelines.recipes
assert pipelines.recipes.DEMO is DEMO
assert DEMO.recipe == "demo"
assert maskformer.R50.backbone == "resnet50"
assert callable(fit) and callable(evaluate)
"""


def test_they_can_be_imported() -> None:
    result = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
