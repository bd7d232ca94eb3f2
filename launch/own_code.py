"""A script of this folder that is run by its path runs the code beside it, or says that it does not.

``python launch/pretrain_gpt.py`` in a checkout imports the installed ``noflush.launch``: after ``pip install .`` a
copy, which edits of the checkout never reach. Scripts run this file by its path before they import anything of noflush,
for a copy may be too old to have it. Imports noflush alone.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def or_exit(script: str) -> None:
    """Ends the process with status 2 and one line on stderr unless ``noflush.launch`` is the folder of ``script``."""
    path = Path(script).resolve()
    try:
        found = find_spec("noflush.launch")
    except ModuleNotFoundError as error:
        if error.name != "noflush":
            raise
        found = None
    if found is None or found.origin is None:
        wrong = (
            f"{path} needs noflush, which is not installed for {sys.executable}: pip install -e {path.parent.parent}"
        )
    elif (there := Path(found.origin).resolve().parent) != path.parent:
        wrong = (
            f"{path} would run the code in {there}, not its own: pip install -e {path.parent.parent} to run this one, "
            f"or say python -m noflush.launch.{path.stem} to run that one"
        )
    else:
        return
    print(f"noflush: {wrong}", file=sys.stderr)  # noqa: T201
    sys.exit(2)
