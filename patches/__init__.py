"""The only place that replaces a host's symbols. Registration is lazy, idempotent and reversible."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_HOST = "deepspeed"


def register() -> None:
    """Patches DeepSpeed now if it is imported, else right after its import. Twice is as good as once."""
    if _HOST in sys.modules and hasattr(sys.modules[_HOST], "initialize"):
        _patch()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def unregister() -> None:
    """Puts DeepSpeed's own symbols back. Engines that exist already go on as they are."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
    if "noflush.patches.deepspeed.seam" in sys.modules:
        sys.modules["noflush.patches.deepspeed.seam"].unpatch()


def registered() -> bool:
    """True when DeepSpeed is patched, or will be as soon as it is imported."""
    patched = sys.modules.get("noflush.patches.deepspeed.seam")
    waiting = any(isinstance(finder, _AfterImport) for finder in sys.meta_path)
    return waiting or (patched is not None and patched.is_patched())


def _patch() -> None:
    from noflush.patches.deepspeed import seam

    seam.patch()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds DeepSpeed as the finders behind it would, and patches it when its import is complete."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_then_patch(module: ModuleType) -> None:
            run(module)
            _patch()

        spec.loader.exec_module = run_then_patch  # type: ignore[method-assign]
        return spec
