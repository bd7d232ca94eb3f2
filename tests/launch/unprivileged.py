"""Files that this process may not read, also where the tests run as root."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def without_rights_to(path):
    """Within, ``path`` cannot be opened; its folders stay passable."""
    path.chmod(0)
    if os.geteuid() != 0:
        yield
        return
    for folder in path.parents:
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
