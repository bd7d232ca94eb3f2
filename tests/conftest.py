"""What must be set before anything imports torch or triton, here and in every process that a test starts."""

import os

# Triton's kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests share two cores, and with a pool of threads each they wait for one another: seconds become minutes. One thread
# also fixes the order of sums, on which bit-equality rests.
os.environ["OMP_NUM_THREADS"] = "1"
