"""The Triton kernels compile for sm_80 and sm_90 without a GPU: no spills, and 128-bit accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    # Another process: in this one Triton interprets.
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_variant_compiles_for_both_architectures(compiled):
    from tests.kernels.ahead_of_time import variants

    assert {(r["kernel"], r["arch"]) for r in compiled} == {(k, a) for k in variants() for a in ("sm_80", "sm_90")}


def test_nothing_spills_and_three_blocks_fit_a_multiprocessor(compiled):
    for r in compiled:
        assert r["spilled_bytes"] == 0, r
        # 65,536 registers, 128 threads a block: latency is hidden by three blocks and more.
        assert r["registers"] <= 168, r


def test_whole_blocks_move_128_bits_an_access(compiled):
    for r in compiled:
        name, accesses = r["kernel"], r["accesses"]
        if name.startswith("prepare"):
            continue
        assert accesses["ld.global.v4.b32"] > 0, r
        if name.startswith("step"):
            # Eight elements a thread: two accesses a float32 tensor, one a 16-bit tensor; nothing else is vectorised.
            half = {"fp32": 2, "bf16": 1, "fp16": 1}
            words = name.replace(",", "").split()
            gradient, model, moments = (half[words[words.index(k) + 1]] for k in ("gradient", "model", "moments"))
            states = 1 if words[1] == "nag" else 2
            assert accesses["ld.global.v4.b32"] == gradient + 2 + states * moments, r
            master = 2 if model == 1 or "ahead" in words else 0
            assert accesses["st.global.v4.b32"] == states * moments + master + model + gradient, r
