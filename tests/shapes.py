"""Enforce the array shapes and data types in the signatures of `maskformer` while the tests run."""

import sys
from pathlib import Path

from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "maskformer"
# The numeric tower accepts an int where a float is declared, as type checkers do.
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"


def enforce() -> None:
    """Check arguments and results of every `maskformer` module that declares shapes, from its import on.

    Raises:
        RuntimeError: one of these modules is imported already, so its functions would stay unchecked.
    """
    modules = [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in PACKAGE.rglob("*.py")
        if "from jaxtyping import" in file.read_text()
    ]
    imported = sorted(sys.modules.keys() & set(modules))
    if imported:
        raise RuntimeError(f"Call enforce() before anything imports maskformer; imported are {', '.join(imported)}.")
    install_import_hook(modules, TYPECHECKER)
