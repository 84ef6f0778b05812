"""The shell around every job: flags from a configuration, log lines, and the meaning of exit statuses.

Exit status 0 is success, 2 a mistake the user can mend, 130 Ctrl-C, 1 anything else. Nothing here imports Ray,
so `--help` answers at once.
"""

import logging
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import tyro

from pipelines.errors import RunFailed, UserError

Config = TypeVar("Config")


def parse(config_type: type[Config], default: Config | None = None, description: str | None = None) -> Config:
    """Read the command line into a `config_type`; `default` is a recipe whose every leaf may be overridden.

    An unknown flag or a refused value exits with status 2 and says what was meant.
    """
    return tyro.cli(
        config_type,
        default=tyro.MISSING_NONPROP if default is None else default,
        description=description,
        # A union keeps the recipe's variant and stays overridable by plain flags.
        config=(tyro.conf.AvoidSubcommands,),
    )


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a job's `main` and exit with its status (None is 0)."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
