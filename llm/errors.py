"""The exceptions that a verb turns into one line and an exit code."""


class InputError(ValueError):
    """Wrong usage, config or input: exit code 2. The message says what is wrong, where, and what to do."""


class RunFailed(Exception):
    """The run cannot go on: exit code 1. The message is all that the user needs."""


class Stopped(BaseException):
    """The run was asked to stop, has saved what it needs, and goes on by the same command: exit code 75.

    It is no error, so not an Exception: no handler of errors may swallow it.
    """
