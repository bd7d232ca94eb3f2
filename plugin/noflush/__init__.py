"""noflush: asynchronous 1F1B pipeline training without the flush, as a plug-in for DeepSpeed.

Importing this package registers it: `deepspeed.initialize` then builds a `NoFlushEngine` for a config whose
``async_pipeline`` block is enabled, and is untouched otherwise. It imports neither torch nor DeepSpeed itself.
"""

from __future__ import annotations

from noflush.patches import register, unregister

__version__ = "0.1.0"
__all__ = ["register", "unregister", "__version__"]

register()
