"""What all jobs share: parsing flags, help, logging, exit statuses.

Exit status 0 is success, 2 a user error, 130 Ctrl-C, 1 anything else. Nothing here imports torch or Ray, so `--help`
answers at once.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NoReturn, TypeVar

import tyro

from jobs.shared import console
from jobs.shared.help import help_text
from jobs.shared.streams import guard
from pipelines.credentials import redacted, refuse_credentials
from pipelines.errors import RunFailedError, StorageUnavailableError, UserError

Config = TypeVar("Config")


def parse(
    config_type: type[Config],
    default: Config | None = None,
    description: str | None = None,
    shown: Iterable[str] | None = None,
    usage: str = "[--SETTING VALUE ...]",
    required: Iterable[str] = (),
) -> Config:
    """Read the command line into a `config_type`.

    An unknown flag or an invalid value exits with status 2 and a suggestion. So does an address with a user name, a
    password, a key or a token in it, whichever flag it is for.

    Args:
        default: an instance, such as one with a recipe, whose every setting may be overridden.
        description: for `--help`.
        shown: dotted names of the settings that `--help` shows; `--help-all` shows all. None if `--help` does.
        usage: for `--help`, what follows the program's name.
        required: dotted names of settings without a default that must be given, for `--help`.
    """
    prog = f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else sys.argv[0]
    if asks_for_help():
        everything = "--help-all" in _own_arguments()
        text = description or config_type.__doc__ or ""
        print(help_text(prog, text, config_type, default, usage, shown, required, everything))
        sys.exit(0)
    for argument in sys.argv[1:]:
        refuse_credentials(argument, "The argument")
    # What tyro prints about arguments is in a box, whose lines all begin with its border.
    return tyro.cli(
        config_type,
        prog=prog,
        default=tyro.MISSING_NONPROP if default is None else default,
        description=description,
        # A union keeps the recipe's variant and stays overridable by plain flags.
        config=(tyro.conf.AvoidSubcommands,),
    )


def asks_for_help() -> bool:
    """Tell whether the command line has `--help` or `--help-all`."""
    return bool({"--help", "--help-all", "-h"}.intersection(_own_arguments()))


def is_given(setting: str) -> bool:
    """Tell whether the command line has the flag of a setting."""
    return any(argument.partition("=")[0] == f"--{setting}" for argument in _own_arguments())


def _own_arguments() -> list[str]:
    """Return the arguments before `--`, after which a command for a cluster follows."""
    arguments = sys.argv[1:]
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a job's `main` and exit with its status (None is 0)."""
    guard()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(console.Formatter(console.FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.excepthook = _show_bug
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (RunFailedError, StorageUnavailableError) as error:
        print(f"error: {redacted(str(error))}{_details()}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:  # a bug; keep its traceback for the report
        if details := _details():
            print(details.strip(), file=sys.stderr)
        raise


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that is not handled, without secrets."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _details() -> str:
    return f" The output of Ray is in {console.log_files[-1]}." if console.log_files else ""
