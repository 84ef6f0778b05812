"""Submit a job to a Ray cluster: `ray job submit --working-dir .`, with what would go wrong later checked beforehand.

python jobs/submit.py --address http://127.0.0.1:8265 -- python jobs/train_r50.py --run.name r50-first

Called in the project's root, which is what the cluster gets, without what .gitignore and .rayignore name. Follows the
log and exits with the job's own status: 0 success, 130 stopped. Ctrl-C stops following; the job goes on.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.cli import parse, run


@dataclass(frozen=True, kw_only=True)
class _Flags:
    entrypoint: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="command", metavar="COMMAND")] = ()
    """After `--`: what the cluster is to run."""
    address: str = ""
    """The cluster's dashboard, http://HOST:8265. Default: $RAY_API_SERVER_ADDRESS, else $RAY_ADDRESS."""
    name: str = ""
    """Of the job, for `ray job logs` and `ray job stop`. Default: Ray's choice."""
    wait: bool = True
    """Follow the log until the job ends."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE, or NAME for the value it has here: set for the job and its workers. Nothing else of this environment
    is sent. Not for secrets, which everyone who can list jobs would read: set those where the cluster is started."""
    max_mib: int = 50
    """Refuse to send more than this. Ray's own limit is 512."""


def main() -> int:
    flags = parse(_Flags, _Flags(), __doc__)
    from pipelines import submission  # imports Ray, which --help should not

    root = Path.cwd()
    submission.check_package(root, flags.entrypoint, flags.max_mib)
    variables = submission.environment(flags.env)
    client = submission.connect(flags.address)
    name = submission.submit(client, root, shlex.join(flags.entrypoint), flags.name or None, variables)
    print(f"job {name} is submitted. {submission.hints(name)}", flush=True)
    if not flags.wait:
        return 0
    try:
        outcome = submission.follow(client, name, lambda lines: print(lines, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\njob {name} goes on. {submission.hints(name)}", file=sys.stderr)
        return 130
    if outcome.status == "FAILED":
        print(f"job {name} failed with exit status {outcome.exit_code}: {outcome.cause}", file=sys.stderr)
    else:
        print(f"job {name} {outcome.status.lower()}")
    return outcome.exit_code


if __name__ == "__main__":
    run(main)
