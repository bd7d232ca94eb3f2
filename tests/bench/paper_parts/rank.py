"""One rank: the launcher, which ends with whoever started it."""

from __future__ import annotations

import os
import sys
import threading
import time

from noflush.failure.exit_guard import end_within
from noflush.launch.pretrain_gpt import main

_LEAVING = 60.0


def watch(parent):
    """Ends this process once ``parent`` is gone: a killed bench must not leave ranks that hold folder and devices."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    ended = main()
    end_within(_LEAVING, ended)
    sys.exit(ended)
