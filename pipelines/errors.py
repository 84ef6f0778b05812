"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in the command line, the configuration, the data or the surroundings.

    The message is one paragraph: what is wrong, what was found, what to do. Jobs print it without a
    traceback and exit with status 2.
    """


class RunFailed(RuntimeError):
    """A run that was started properly and failed. The message is its cause; jobs print it and exit with status 1."""
