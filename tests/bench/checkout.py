"""This checkout as the package noflush, without installing it: a folder of links for PYTHONPATH."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def lay_out(folder: Path) -> Path:
    """Makes ``folder``/noflush as pyproject.toml maps it, by links; returns ``folder``."""
    package = folder / "noflush"
    package.mkdir(parents=True)
    for entry in (*(ROOT / "plugin" / "noflush").iterdir(), ROOT / "patches", ROOT / "launch"):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    return folder
