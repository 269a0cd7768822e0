"""The store: listens where it is told, is found after a connection that hangs, says what is wrong."""

import socket

import pytest
from torch.distributed import TCPStore

from hardy.config import UserError
from hardy.distributed import store
from hardy.distributed.store import connect_store, open_store


def test_it_listens_at_the_given_interface_alone():
    host = open_store("127.0.0.1")
    with socket.create_connection(("127.0.0.1", host.port), timeout=1.0):
        pass
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", host.port), timeout=1.0).close()  # another of this machine's


def test_it_takes_the_port_it_is_given():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = open_store("127.0.0.1", port=port)
    connect_store(f"127.0.0.1:{port}", timeout_s=5.0).set("a", "b")
    assert host.get("a") == b"b"
    with pytest.raises(UserError, match=f"port {port}; give .* port that is free"):
        open_store("127.0.0.1", port=port)


def test_another_machines_interface_is_refused():
    with pytest.raises(UserError, match=r"cannot listen at .192.0.2.1., port any; give a name"):
        open_store("192.0.2.1")


@pytest.mark.parametrize("address", ["localhost", ":29500", "host:port", ""])
def test_an_address_without_host_or_port_is_refused(address):
    with pytest.raises(UserError, match="the address of the store is host:port, got"):
        connect_store(address, timeout_s=1.0)


def test_a_connection_that_fails_is_tried_again_until_time_is_up(monkeypatch):
    tries = []

    def fail_twice(host, port, *, is_master, timeout):
        tries.append(timeout.total_seconds())
        if len(tries) < 3:
            raise RuntimeError("the connection hangs")
        return TCPStore(host, port, is_master=is_master, timeout=timeout)

    host = open_store("127.0.0.1")
    monkeypatch.setattr(store, "TCPStore", fail_twice)
    connect_store(f"127.0.0.1:{host.port}", timeout_s=60.0).set("a", "b")
    assert tries == [2.0, 2.0, 2.0] and host.get("a") == b"b"
    tries.clear()
    with pytest.raises(RuntimeError, match="the connection hangs"):
        connect_store(f"127.0.0.1:{host.port}", timeout_s=0.0)
    assert tries == [0.1]


def test_an_answer_may_take_as_long_as_was_asked_for():
    host = open_store("127.0.0.1")
    link = connect_store(f"127.0.0.1:{host.port}", timeout_s=30.0)
    assert link.timeout.total_seconds() == 30.0
