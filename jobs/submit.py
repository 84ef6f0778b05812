"""Submit a job to a Ray cluster, after checking what `ray job submit` would only report later.

python jobs/submit.py --address http://127.0.0.1:8265 -- python jobs/train_r50.py --run.name r50-first

Run it in the root of the project: this folder is sent, except what .gitignore and .rayignore exclude. The log is
followed, and the exit status is the job's own: 0 success, 130 stopped. Ctrl-C stops following; the job continues.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.shared.cli import parse, run
from jobs.shared.streams import print_line, printable
from maskformer.untrusted import escaped


@dataclass(frozen=True, kw_only=True)
class _Flags:
    entrypoint: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="command", metavar="COMMAND")] = ()
    """Command for the cluster to run, after `--`."""
    address: str = ""
    """The cluster's dashboard, http://HOST:8265. Default: $RAY_API_SERVER_ADDRESS, else $RAY_ADDRESS."""
    name: str = ""
    """Name of the job, for `ray job logs` and `ray job stop`. Default: chosen by Ray."""
    wait: bool = True
    """Follow the log until the job ends."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Environment variable for the job: KEY=VALUE, or NAME for its value here. May be given several times. Nothing else
    of this environment is sent. Not for secrets, which everyone who can list jobs could read: set those where the
    cluster is started."""
    max_mib: int = 50
    """Largest size of the folder to send, in MiB. Ray's own limit is 512."""


def main() -> int:
    flags = parse(_Flags, _Flags(), __doc__, usage="[--SETTING VALUE ...] -- COMMAND")
    from pipelines.cluster import submission  # imports Ray, which --help should not

    root = Path.cwd()
    submission.check_package(root, flags.entrypoint, flags.max_mib)
    variables = submission.environment(flags.env)
    client = submission.connect(flags.address)
    name = submission.submit(client, root, shlex.join(flags.entrypoint), flags.name or None, variables)
    print_line(f"job {name} is submitted. {submission.hints(name)}")
    if not flags.wait:
        return 0
    try:
        outcome = submission.follow(client, name, _show)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the ^C of the terminal
        print(escaped(f"job {name} continues. {submission.hints(name)}"), file=sys.stderr)
        return 130
    if outcome.status == "FAILED":
        print(escaped(f"job {name} failed with exit status {outcome.exit_code}: {outcome.cause}"), file=sys.stderr)
    else:
        print_line(f"job {name} {outcome.status.lower()}")
    return outcome.exit_code


def _show(lines: str) -> None:
    """Print what the cluster sent, without its colors."""
    print(printable(lines), end="", flush=True)


if __name__ == "__main__":
    run(main)
