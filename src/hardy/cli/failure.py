"""How the command ends other than well, and the exit codes."""

SUCCESS = 0
FAILURE = 1
"""Something broke; the run did not come to its end."""
USER_ERROR = 2
"""What was asked for cannot work; the text says the way out."""
HUNG_UP = 129
"""Ended by SIGHUP: the terminal was closed."""
INTERRUPTED = 130
"""Ended by Ctrl-C (SIGINT)."""
READER_GONE = 141
"""What reads our output went away, as `head` does (SIGPIPE); a run is saved and says so, else the end is
quiet."""
TERMINATED = 143
"""Ended by SIGTERM."""
SAID = "HARDY_SAID"
"""Variable of a worker's environment: the folder in which workers note what one of them has refused."""


class CommandFailedError(Exception):
    """The command failed in a way that is understood; the text is all the user needs. Exit code 1."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP came where nothing was there to be saved. Exit code 143."""
