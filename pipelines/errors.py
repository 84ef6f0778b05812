"""The errors that a job prints as one paragraph, without a traceback."""

import re

from maskformer.untrusted import escaped

_LINE_END = re.compile(r"\s*[\n\r]\s*")


def _paragraph(message: object) -> str:
    """Return a message in one line: texts from outside in it neither begin a line nor control a terminal."""
    return escaped(_LINE_END.sub(" ", str(message)))


class UserError(ValueError):
    """An error in the command line, the configuration, the data or the environment that the user can correct.

    The message is one paragraph: what is wrong, what was found, what to do. Jobs exit with status 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_paragraph(message))


class StorageRefusedError(UserError):
    """A storage that refuses an operation: no permission, a full disk, a wrong bucket. Waiting would not help."""


class RunFailedError(RuntimeError):
    """A run that started and then failed. The message states the cause; jobs exit with status 1."""

    def __init__(self, message: object) -> None:
        super().__init__(_paragraph(message))


class StorageUnavailableError(RuntimeError):
    """A storage that did not answer for as long as the configuration allows. It is not the user's error.

    The message is one paragraph: what did not answer, for how long, its last answer, and that the same command resumes.
    Jobs exit with status 1.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_paragraph(message))
