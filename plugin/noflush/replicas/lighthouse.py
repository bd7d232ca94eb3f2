"""A lighthouse of torchft's in this process: for demos and tests, and one group's host of a small run."""

from __future__ import annotations

from contextlib import ExitStack

from noflush.demo.port import held_port
from noflush.replicas.torchft_log import quieten


class Lighthouse:
    """Where groups find each other; `torchft_lighthouse` is the same as a program of its own.

    Args:
        bind: address that it listens at.
        port: 0 takes a free one.
        min_groups: it answers no fewer.
        join_timeout_s: how long it waits for a group that is alive and has not asked, once most have.
        heartbeat_timeout_s: after which a silent group is gone.

    Attributes:
        address: ``host:port``, for the block's ``replicas.lighthouse``.
    """

    def __init__(
        self,
        bind: str = "127.0.0.1",
        port: int = 0,
        min_groups: int = 1,
        join_timeout_s: float = 2.0,
        heartbeat_timeout_s: float = 3.0,
    ) -> None:
        quieten()
        from torchft.coordination import LighthouseServer

        self._held = ExitStack()
        port = port or self._held.enter_context(held_port())
        self.address = f"{bind}:{port}"
        self._server = LighthouseServer(
            bind=self.address,
            min_replicas=min_groups,
            join_timeout_ms=int(1000 * join_timeout_s),
            quorum_tick_ms=20,
            heartbeat_timeout_ms=int(1000 * heartbeat_timeout_s),
        )

    def close(self) -> None:
        """Ends it; groups go on alone."""
        self._server.shutdown()
        self._held.close()
