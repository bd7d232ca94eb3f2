"""Triton's kernels run in its interpreter here: it must be told before anything imports triton."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
