"""What importing `maskformer` costs, and that its lazy names resolve; in fresh interpreters."""

import subprocess
import sys

import pytest

import maskformer

HEAVY = {"torch", "torchvision", "scipy"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after a statement."""
    modules = run_python(f"{statement}\nimport sys\nprint(*sys.modules)").split()
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    "statement",
    [
        "import maskformer",
        "from maskformer import ModelConfig, R50, PanopticConfig",
        "from maskformer import Taxonomy; Taxonomy.from_coco([{'id': 1, 'name': 'cow', 'isthing': 1}])",
        "import maskformer; maskformer.taxonomy.COCO.names",
    ],
)
def test_configuration_and_taxonomy_load_no_heavy_library(statement: str) -> None:
    loaded = loaded_by(statement)
    assert "maskformer" in loaded
    assert loaded & HEAVY == set()


def test_the_model_would_have_loaded_them() -> None:
    assert loaded_by("from maskformer import build_model, match, R50; build_model(R50)") >= HEAVY


def test_every_public_name_resolves() -> None:
    code = "import maskformer\nfor name in maskformer.__all__:\n    print(name, getattr(maskformer, name) is not None)"
    assert run_python(code).split() == [word for name in maskformer.__all__ for word in (name, "True")]
    assert run_python("from maskformer import *\nprint(build_model.__module__)") == "maskformer.model\n"


def test_modules_are_attributes() -> None:
    code = "import maskformer as mf\nprint(mf.taxonomy.COCO.num_classes, mf.weights.load.__module__)"
    assert run_python(code) == "133 maskformer.weights.loading\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'maskformer' has no attribute 'nothing'"):
        _ = maskformer.nothing  # pyright: ignore[reportAttributeAccessIssue]  # the point of the test
