"""A held port is given to nobody else, and serves the store."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from noflush.demo.port import held_port


def test_a_held_port_is_refused_to_others_until_it_is_let_go():
    with held_port() as port:
        for address in ("127.0.0.1", ""):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((address, port))
    with socket.socket() as other:
        other.bind(("", port))


def test_the_store_listens_on_a_port_that_is_held():
    with held_port() as port:
        server = TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=10), wait_for_workers=False)
        client = TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=10), wait_for_workers=False)
        client.set("a", "b")
        assert server.get("a") == b"b"
