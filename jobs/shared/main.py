"""The installed command `maskformer-ray JOB ...`: the same as `python jobs/JOB.py ...`."""

import ast
import sys
from importlib import import_module
from pathlib import Path

from jobs.shared.cli import run
from jobs.shared.streams import guard

_FOLDER = Path(__file__).parents[1]


def main() -> None:
    """Run the job that the first argument names, or list the jobs."""
    guard()
    jobs = {file.stem: file for file in sorted(_FOLDER.glob("*.py")) if file.stem != "__init__"}
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else "help"
    if name in ("help", "__help", "_h"):
        print("usage: maskformer-ray JOB [--help] ...\n\nTrain, evaluate and register MaskFormer on Ray. Jobs:\n")
        for job, file in jobs.items():
            summary = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n")[0]
            print(f"  {job:<18}{summary}")
        sys.exit(0)
    if name not in jobs:
        print(f"error: There is no job {sys.argv[1]!r}. Use one of: {', '.join(jobs)}.", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"maskformer-ray {name}", *sys.argv[2:]]
    run(import_module(f"jobs.{name}").main)
