"""Groups of pipelines for the tests: a lighthouse, and each group's ranks in a world of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from contextlib import contextmanager

from noflush.demo.port import held_port
from tests.multiproc.ranks import CONTEXT, run_ranks


@contextmanager
def lighthouse(min_groups=1):
    """``host:port`` of one."""
    from noflush.replicas.lighthouse import Lighthouse

    server = Lighthouse(min_groups=min_groups, join_timeout_s=1.0)
    try:
        yield server.address
    finally:
        server.close()


class LighthouseProcess:
    """A lighthouse that can be killed."""

    def __init__(self, port, min_groups=1):
        self.address = f"127.0.0.1:{port}"
        self._arguments = (port, min_groups)

    def start(self):
        """And waits until it answers."""
        self._process = CONTEXT.Process(target=serve, args=self._arguments)
        self._process.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._arguments[0]), timeout=1).close()
                return
            time.sleep(0.05)
        raise TimeoutError("the lighthouse does not answer")

    def kill(self):
        """At once."""
        self._process.kill()
        self._process.join()


def serve(port, min_groups):
    """A lighthouse, until it is killed."""
    from noflush.replicas.lighthouse import Lighthouse

    server = Lighthouse(port=port, min_groups=min_groups, join_timeout_s=1.0)
    while server.address and multiprocessing.parent_process().is_alive():  # it ends with its last reference
        time.sleep(1)


@contextmanager
def lighthouse_process(min_groups=1):
    """A `LighthouseProcess`, started."""
    with held_port() as port:
        server = LighthouseProcess(port, min_groups)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def run_groups(function, worlds, per_group, **same):
    """Runs ``function(rank, **kwargs)`` on every group's ranks at the same time; results by group and rank.

    Args:
        worlds: ranks of each group.
        per_group: kwargs of each.
    """
    found = [None] * len(per_group)

    def run(number):
        try:
            found[number] = run_ranks(function, worlds, **same, **per_group[number])
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(per_group))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        raise AssertionError("\n\n".join(str(error) for error in errors)) from errors[0]
    return found
