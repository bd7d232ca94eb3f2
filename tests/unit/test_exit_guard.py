"""A process ends within its bound whatever blocks: a handler, the interpreter itself, a pipe that nobody reads."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.multiproc]


def ended(code, says=None, **more):
    """(exit status, seconds) of a process that runs ``code``; with ``says``, since it said so, imports done."""
    start = time.monotonic()
    out = subprocess.PIPE if says else None
    with subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, **more) as process:
        try:
            if says:
                assert process.stdout.readline().decode().strip() == says
                start = time.monotonic()
            return process.wait(timeout=40), time.monotonic() - start  # its pipe is not read meanwhile
        finally:
            process.kill()


ARMED = "import atexit, ctypes, sys, time\nfrom noflush.failure.exit_guard import end_within\nend_within(1.0, 3)\n"


@pytest.mark.parametrize(
    ("blocks", "status"),
    [
        ("atexit.register(time.sleep, 60)", 3),
        ("time.sleep(60)", 3),
        ("sys.stderr.write('x' * 10**7)", 3),
        # Nobody else gets the interpreter's lock: no thread of it can end the process.
        ("ctypes.PyDLL(None).sleep(60)", -signal.SIGALRM),
    ],
)
def test_it_ends_whatever_blocks(blocks, status):
    got, seconds = ended(ARMED + blocks)
    assert got == status
    assert seconds < 15


def test_it_may_end_before_by_itself_or_be_called_off():
    assert ended(ARMED)[0] == 0
    code = ARMED.replace("end_within(1.0, 3)", "call_off = end_within(0.5, 3)") + "call_off()\ntime.sleep(4)"
    assert ended(code)[0] == 0


PLAIN = """
import atexit, time
from noflush.failure.last_words import PeerError, attend
atexit.register(time.sleep, 60)
attend(1, 2, "rank {}".format)
print("attended", flush=True)
"""


@pytest.mark.parametrize(
    "end",
    [
        "raise PeerError('stage 0 (rank 0) is gone')",
        pytest.param(
            "import sys\nfrom noflush.failure.last_words import explain\nexplain(PeerError('gone'))\nsys.exit(5)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_plain_script_ends_in_time_after_an_uncaught_error_and_after_one_about_a_peer(end):
    status, seconds = ended(PLAIN + end, says="attended")
    assert status == 1
    assert 9 < seconds < 25
