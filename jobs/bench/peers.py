"""Compare losses, training steps and fusion with MaskFormer of Hugging Face's transformers, on a CPU.

python jobs/bench/peers.py --output report.md

Both run in this process, in turns and on the same random data: once to warm up, once to measure memory, then for the
times. Memory is what a call adds to the resident memory at its peak, sampled every 5 ms, after the free memory was
returned to the system. So it includes gradients, and no weights or optimizer state. The last line of the output is JSON
with all figures.
"""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.shared.cli import parse, run
from pipelines.errors import UserError

if TYPE_CHECKING:
    from jobs.bench.shared.peer_parts import Sides

PERIOD = 0.005  # seconds between samples of the memory
PARTS = ("criterion", "step", "encoder", "swin", "fusion")
ENCODER_RATIO = 7.0 / 5.1
"""A step of mmdetection with the transformer encoder in Hugging Face's steps without it, measured once on one
machine."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Compare losses, training steps and fusion with Hugging Face's MaskFormer."""

    parts: str = ",".join(PARTS)
    """Parts to run, separated by commas. step: R50 without transformer encoder. encoder: R50 with it, against an
    estimate. swin: Swin-L, forward and backward. criterion takes 13 GiB of memory."""
    repeats: int = 5
    """Timed calls of each side."""
    threads: int = 2
    """Threads of PyTorch."""
    bfloat16: bool = False
    """Measure our step with bfloat16 autocast too; theirs stays float32."""
    output: str = ""
    """File that gets the report in Markdown. Default: the console only."""


def main() -> None:
    flags = parse(Peers, Peers(), __doc__)
    chosen = flags.parts.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        raise UserError(f"There is no part {unknown[0]!r}; --parts takes some of {','.join(PARTS)}.")
    if flags.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {flags.repeats}.")
    if not find_spec("transformers"):
        raise UserError("transformers is not installed; it comes with the development tools: pip install -e .[dev].")
    environment = _environment()

    import torch  # --help should not import it

    from jobs.bench.shared.peer_parts import sides_of

    torch.set_num_threads(flags.threads)
    rows: list[dict[str, Any]] = []
    print("\n".join(HEADER))
    for part in chosen:
        torch.manual_seed(0)
        measured = _measure(sides_of(part, flags.bfloat16), flags.repeats)
        rows += _compare(part, measured)
        print("\n".join(_line(row) for row in rows if row["part"] == part), flush=True)
    environment["load at the end"] = f"{os.getloadavg()[0]:.1f}"
    if flags.output:
        file = Path(flags.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_report(environment, rows), "utf-8")
    print(json.dumps({"environment": environment, "flags": vars(flags), "rows": rows}))


# ---- measuring


class _PeakMemory:
    """Sample this process's resident memory while the block runs; `mebibytes` is the peak above that at its start."""

    def __enter__(self) -> "_PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free would hide the same amount of new memory
        self._start = self._peak = self._resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def mebibytes(self) -> float:
        return (self._peak - self._start) / 2**20

    def _sample(self) -> None:
        while not self._ended.wait(PERIOD):
            self._peak = max(self._peak, self._resident())

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measure(sides: "Sides", repeats: int) -> dict[str, dict[str, Any]]:
    """Return the seconds of every repeat and the memory in MiB of each side."""
    measured: dict[str, dict[str, Any]] = {}
    for name, call in sides.items():
        call()
        with _PeakMemory() as memory:
            call()
        measured[name] = {"seconds": [], "memory": round(memory.mebibytes)}
    for turn in range(repeats):
        # The order alternates, so that neither is always the first after a change of the load.
        for name, call in list(sides.items())[:: -1 if turn % 2 else 1]:
            gc.collect()
            start = time.perf_counter()
            call()
            measured[name]["seconds"].append(time.perf_counter() - start)
    return measured


def _compare(part: str, measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each of our sides."""
    theirs = measured.pop("theirs")
    if part == "encoder":
        theirs = {"seconds": [ENCODER_RATIO * each for each in theirs["seconds"]], "memory": None}
    rows: list[dict[str, Any]] = []
    for name, ours in measured.items():
        row: dict[str, Any] = {"part": part, "ours is": name}
        for side, figures in (("ours", ours), ("theirs", theirs)):
            seconds = figures["seconds"]
            row[side] = {"median": median(seconds), "min": min(seconds), "max": max(seconds), **figures}
        row["ratio"] = row["ours"]["median"] / row["theirs"]["median"]
        rows.append(row)
    return rows


# ---- the report

HEADER = (
    "| part | ours: median (min to max), s | theirs, s | ours / theirs | ours, MiB | theirs, MiB |",
    "|---|---|---|---|---|---|",
)


def _line(row: dict[str, Any]) -> str:
    name = row["part"] + row["ours is"].removeprefix("ours")
    times = (f"{s['median']:.3g} ({s['min']:.3g} to {s['max']:.3g})" for s in (row["ours"], row["theirs"]))
    memory = ("-" if s["memory"] is None else f"{s['memory']:,}" for s in (row["ours"], row["theirs"]))
    return f"| {' | '.join((name, *times, format(row['ratio'], '.2f'), *memory))} |"


def _environment() -> dict[str, str]:
    import psutil

    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": date.today().isoformat(),
        "CPU": cpu[0] if cpu else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "transformers")},
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def _commit() -> str:
    """Return the commit of this file and whether the working tree has changes."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return f"{git('rev-parse', 'HEAD')}, {'with changes' if git('status', '--porcelain') else 'clean'}"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _report(environment: dict[str, str], rows: list[dict[str, Any]]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in environment.items() if name not in ("date", "command"))
    table = "\n".join([*HEADER, *map(_line, rows)])
    return f"""# Ours against Hugging Face's MaskFormer, {environment["date"]}

{facts}

```bash
{environment["command"]}
```

{table}

"Theirs" is MaskFormer of transformers. Both ran in one process, in turns and on the same random data, after one call
each to warm up and one to measure memory. The ratio is that of the medians. Memory is what a call added to the resident
memory at its peak, sampled every 5 ms; it includes gradients, but no weights and no optimizer state.

- criterion: matching, losses and backward pass; input of 800x1216, two images of 30 segments, six layers.
- step: a training step of R50 without transformer encoder; two images of 512x512 with 15 segments, float32. Theirs
  trains its batch statistics, ours are frozen, and has losses for seven outputs instead of six: it counts the queries
  before the first layer.
- encoder: the same with six encoder layers. Theirs has none, so its step is multiplied by 7.0 / 5.1, the ratio of
  mmdetection's step to it, measured once on one machine.
- swin: forward pass, losses and backward pass of Swin-L; one image of 512x512 with 15 segments, no stochastic depth.
- fusion: mask logits of 200x304 to an image of 480x640, 30 kept queries. Theirs resizes probabilities and in one step,
  ours resizes logits in two, as mmdetection does.

## Not measured

- No GPU was involved.
- mmdetection itself was not run.
- The data are random, so nothing is said about quality.
"""


if __name__ == "__main__":
    run(main)
