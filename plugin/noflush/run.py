"""Runs an unchanged script with noflush registered: ``deepspeed --module noflush.run script.py ARGS``.

Also ``torchrun -m noflush.run script.py ARGS``. DeepSpeed's launcher puts its own ``--local_rank=N`` before the
script's name; it is handed on behind it. A config named by ``--deepspeed_config`` is checked before anything
starts.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import noflush
from noflush.config import ConfigError
from noflush.patches.deepspeed.config_file import read_host_config
from noflush.patches.deepspeed.faults import check_config


def split_arguments(argv: list[str]) -> tuple[str, list[str]]:
    """The script and its arguments out of what a launcher passes.

    Raises ValueError if there is no script, with the usage.
    """
    before: list[str] = []
    for at, word in enumerate(argv):
        if not word.startswith("--local_rank") and not word.startswith("--local-rank"):
            return word, argv[at + 1 :] + before
        before.append(word)
    raise ValueError("no script given; usage: deepspeed --num_gpus N --module noflush.run script.py ARGS")


def check_named_config(arguments: list[str]) -> None:
    """Checks the config that ``--deepspeed_config`` names, where it can be read: its own faults are the script's.

    Raises ConfigError.
    """
    for at, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name == "--deepspeed_config":
            try:
                found = read_host_config(value or (arguments[at + 1] if at + 1 < len(arguments) else ""))
            except ValueError:
                return
            check_config(found)


def main() -> None:
    """Registers noflush and becomes the script."""
    try:
        script, arguments = split_arguments(sys.argv[1:])
        if not Path(script).is_file():
            raise ValueError(
                f"{script} is not a file; usage: deepspeed --num_gpus N --module noflush.run script.py ARGS"
            )
        check_named_config(arguments)
    except (ValueError, ConfigError) as error:
        sys.exit(f"noflush.run: {error}")
    noflush.register()
    sys.argv = [script, *arguments]
    # As `python script.py` would have it: the script's folder first, for its own imports.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
