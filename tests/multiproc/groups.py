"""Groups of pipelines for the tests: a lighthouse, and each group's ranks in a world of their own."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest

from tests.multiproc.ranks import run_ranks


@contextmanager
def lighthouse(min_groups=1):
    """``host:port`` of one."""
    pytest.importorskip("torchft")
    from noflush.replicas.lighthouse import Lighthouse

    server = Lighthouse(min_groups=min_groups, join_timeout_s=1.0)
    try:
        yield server.address
    finally:
        server.close()


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
