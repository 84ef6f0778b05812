"""Break small runs at random, and compare how they end with a run that nobody touched.

python jobs/bench/chaos.py --trials 100 --seed 1 --output docs/chaos.jsonl

Each trial is a complete run of a tiny model with dropout, accumulation and quick PQ on a simulated cluster. One thing,
or two, is broken at a random moment; then the run has to end by itself, or by the same command, with the weights and
the optimizer state of the reference, bit for bit. One reference serves 1, 2 and 4 workers. The trials share Ray, except
those that kill it; the storage is a local folder or an S3 server behind a proxy that fails on demand.

Every trial is one JSON line: its seed, what was done, steps repeated, seconds to recover, whether each sample was used
exactly once, hashes. `--only SEED` repeats one, `--summarize FILE` prints a table of the lines.
"""

import json
import logging
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from jobs.shared.cli import parse, run
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Break small runs at random, and compare how they end with a run that nobody touched."""

    trials: int = 100
    """Number of trials."""
    seed: int = 1
    """Seed of the first trial; the others follow."""
    kinds: tuple[str, ...] = ()
    """Kinds of faults. Default: all. The seed chooses among them."""
    only: int | None = None
    """Repeat the trial of this seed alone."""
    output: str = ""
    """File that gets one JSON line per trial. Default: the console only."""
    longest: float = 60
    """Maximum time in seconds that a storage or MLflow is away."""
    summarize: str = ""
    """Print the table of this output file, and make no trials. A repeated seed counts as it ended last."""


def main() -> None:
    flags = parse(Chaos, Chaos(), __doc__)
    if flags.summarize:
        print(_table(Path(flags.summarize)))
        return
    from jobs.bench.shared.faults import KINDS  # these import Ray
    from jobs.bench.shared.trial_environment import base_config, trial_environment
    from jobs.bench.shared.trials import attempt, reference_of

    logging.basicConfig(level=logging.ERROR)
    chosen = flags.kinds or tuple(KINDS)
    seeds = [flags.only] if flags.only is not None else range(flags.seed, flags.seed + flags.trials)
    failed = 0
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        trial_environment() as (cluster, servers),
    ):
        base = base_config(Path(folder))
        reference = cache(lambda ema: reference_of(base, ema))
        for seed in seeds:
            line = attempt(seed, chosen[seed % len(chosen)], base, reference, cluster, servers, flags.longest)
            failed += not line["ok"]
            _say(flags.output, line)
    print(f"{len(seeds) - failed} of {len(seeds)} trials ended like the reference.")
    sys.exit(1 if failed else 0)


def _table(file: Path) -> str:
    """Return a Markdown table of the trials, one row per kind of fault."""
    try:
        trials = {line["seed"]: line for line in map(json.loads, file.read_text().splitlines())}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read as an output of this command ({error}).") from error
    of_kind: dict[str, list[dict[str, Any]]] = {}
    for seed in sorted(trials):
        of_kind.setdefault(trials[seed]["kind"], []).append(trials[seed])
    header = ("kind", "trials", "ok", "restarts", "most steps repeated", "median seconds to recover")
    rows = [header, ("---",) * len(header)]
    for kind, lines in sorted(of_kind.items()):
        restarts = sum(line["attempts"] - 1 for line in lines)
        # The log of samples says how many steps were repeated; runs on S3 have none, and the ledger knows the loss.
        repeated = [line["steps_repeated"] for line in lines if line["steps_repeated"] is not None]
        repeated = repeated or [steps for line in lines for steps in line["steps_lost"] if steps is not None]
        seconds = [each for line in lines for each in line["seconds_to_recover"]]
        ok = sum(line["ok"] for line in lines)
        time = f"{median(seconds):.0f}" if seconds else ""
        rows.append((f"`{kind}`", str(len(lines)), str(ok), str(restarts), str(max(repeated, default=0)), time))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _say(output: str, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if output:
        with open(output, "a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    run(main)
