"""Time reading a Swin-L checkpoint of mmdetection, beside torch.load in the same run.

python jobs/bench/read_weights.py

The file is made first, with random weights: 850 MB, or 2.5 GB with --optimizer. Each reading is a process of its own,
and the two readers take turns. A figure is the median of the repeats: seconds for reading, and the most memory that it
added to the process.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jobs.shared.cli import parse, run

READERS = {
    "maskformer.weights.read": "from maskformer.weights import read; read(path)",
    "torch.load(weights_only=True)": "torch.load(path, map_location='cpu', weights_only=True)",
}
_PROCESS = """
import json, re, sys, time
import torch, maskformer.weights
path, command = sys.argv[1:]
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before, start = memory("VmRSS"), time.perf_counter()
exec(command)
seconds = time.perf_counter() - start
print(json.dumps([seconds, memory("VmHWM") - before]))  # ru_maxrss would count the process that started this one
"""


@dataclass(frozen=True, kw_only=True)
class ReadWeights:
    """Time reading a Swin-L checkpoint of mmdetection."""

    optimizer: bool = False
    """Add the state of AdamW, as in a checkpoint of a training."""
    repeats: int = 5
    """Readings by each reader, of which the median is printed."""
    file: str = ""
    """Checkpoint to read. Default: one that is made for this and deleted."""


def main() -> None:
    flags = parse(ReadWeights, ReadWeights(), __doc__)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(flags.file or Path(scratch) / "swin_l.pth")
        if not flags.file:
            _write(path, flags.optimizer)
        found: dict[str, list[list[float]]] = {name: [] for name in READERS}
        path.read_bytes()  # into the page cache
        for _ in range(flags.repeats):
            for name, command in READERS.items():
                line = [sys.executable, "-c", _PROCESS, str(path), command]
                result = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
                found[name].append(json.loads(result.stdout))
        print(f"{path.name}: {path.stat().st_size / 1e6:,.0f} MB")
    for name, readings in found.items():
        seconds, memory = (statistics.median(column) for column in zip(*readings, strict=True))
        print(f"{name}: {seconds:.2f} s, {memory / 1e6:,.0f} MB of memory")


def _write(path: Path, with_optimizer: bool) -> None:
    import torch

    from maskformer import build_model, weights
    from maskformer.config import SWIN_L, OptimizerConfig
    from maskformer.optim import build_optimizer

    model = build_model(SWIN_L)
    weights.save(model, path, "mmdet")
    if with_optimizer:
        optimizer = build_optimizer(model, OptimizerConfig())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        content = torch.load(path, weights_only=True)
        torch.save({**content, "optimizer": optimizer.state_dict()}, path)


if __name__ == "__main__":
    run(main)
