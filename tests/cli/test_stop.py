"""Signals during training."""

import os
import signal

import pytest

from hardy.cli.failure import Terminated
from hardy.cli.stop import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_once_training_asks_the_first_signal_is_only_remembered(number):
    with StopSignal() as stop:
        assert stop() is None
        os.kill(os.getpid(), number)
        assert stop() == number


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_before_training_a_signal_ends_at_once(number, kind):
    with pytest.raises(kind), StopSignal():
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_the_second_signal_ends_at_once(number, kind):
    with StopSignal() as stop:
        stop()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(kind):
            os.kill(os.getpid(), number)
        assert stop() == signal.SIGINT


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_nohup_keeps_its_word():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            stop()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_goes_away_asks_as_a_signal_does_and_hides_none():
    stop = StopSignal()
    stop.reader_gone()
    assert stop() == signal.SIGPIPE
    with StopSignal() as stop:
        stop()
        os.kill(os.getpid(), signal.SIGTERM)
        stop.reader_gone()
        assert stop() == signal.SIGTERM


def test_a_worker_whose_launcher_is_gone_stops_as_if_terminated():
    with StopSignal(launcher=os.getppid()) as stop:
        assert stop() is None
    with StopSignal(launcher=1 if os.getppid() != 1 else 2) as stop:
        assert stop() == signal.SIGTERM
