"""The releases of megatron-core that noflush is tested with, and which others it takes. No other code names one.

What `dropout` replaces and the launcher's layers use has one name in all of them; where a release differs, the
difference is told apart here.
"""

from __future__ import annotations

from packaging.version import Version

TESTED = ("0.16.1", "0.19.2")
"""Oldest first. The first takes Python 3.10 and newer, the second 3.12 and newer."""


def fault(version: str) -> str | None:
    """What is wrong with a release: None from the oldest tested to the newest, both included.

    Its layers are no public interface, so that a newer one is refused until it was tried.
    """
    if Version(TESTED[0]) <= Version(Version(version).public) <= Version(TESTED[-1]):
        return None
    return f"version {version}: it must be {TESTED[0]} or newer, and {TESTED[-1]} or older"
