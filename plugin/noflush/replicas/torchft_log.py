"""torchft's own log, which tells every heartbeat and quorum: errors alone."""

from __future__ import annotations

import logging
import os


def quieten() -> None:
    """Before torchft is first imported, which reads this once; a user's own ``RUST_LOG`` stays."""
    os.environ.setdefault("RUST_LOG", "error")
    for name in ("torchft.manager", "torchft.process_group"):  # a round that fails is told by noflush
        logging.getLogger(name).setLevel(logging.CRITICAL)
