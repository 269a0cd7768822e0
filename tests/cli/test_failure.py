"""How the command ends."""

from hardy.cli import failure


def test_exit_codes_are_those_of_the_shell():
    assert (failure.SUCCESS, failure.FAILURE, failure.USER_ERROR) == (0, 1, 2)
    assert (failure.INTERRUPTED, failure.TERMINATED) == (128 + 2, 128 + 15)


def test_termination_passes_handlers_of_ordinary_exceptions():
    assert not issubclass(failure.Terminated, Exception)
    assert issubclass(failure.CommandFailedError, Exception)
