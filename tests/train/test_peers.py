"""Agreeing with oneself; across processes it is tested in tests/mp/test_checkpoint.py."""

import pytest

from hardy.distributed.comm import Alone
from hardy.train.peers import Peers


def test_alone_there_is_no_group_and_errors_pass_as_they_are():
    peers = Peers(Alone())
    assert peers.group is None and (peers.rank, peers.size) == (0, 1)
    assert peers.agree(lambda: 3, lambda values: [sum(values) + 1]) == 4
    with pytest.raises(ZeroDivisionError):
        peers.agree(lambda: 1 // 0, lambda values: values)
