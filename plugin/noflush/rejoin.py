"""Runs a script as a rank that has died: it comes back to its pipeline, which goes on without it meanwhile.

``python -m noflush.rejoin script.py ARGS``, with the RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the one that
died, while its group trains with ``replicas.reroute`` (docs/replicas.md). The script is the same; it must go by
``engine.global_steps``, as one of a group that joins others must.
"""

from __future__ import annotations

import os
import sys

from noflush import run
from noflush.stage.alone import enter

_BY_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> None:
    """Enters a world that pretends, and becomes the script."""
    for name, of_slurm in _BY_SLURM.items():
        if of_slurm in os.environ:
            os.environ.setdefault(name, os.environ[of_slurm])
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        sys.exit(
            f"noflush.rejoin: {', '.join(missing)} not set: start it with the environment that the rank had that died"
        )
    enter(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    run.main()


if __name__ == "__main__":
    main()
