"""What the GPU bench decides without a GPU: which parts run, how ranks share devices, what fits into memory."""

from __future__ import annotations

import argparse
import sys
import time

import pytest

from tests.bench import gpu, rivals
from tests.bench.checkout import lay_out
from tests.bench.gpu_parts import model, steady, ways
from tests.bench.gpu_parts.megatron_log import figures
from tests.bench.gpu_parts.printed import last_object
from tests.bench.gpu_parts.table import BUDGET_S, PARTS, Part, chosen, lacking, skipped


@pytest.mark.parametrize(
    ("world", "gpus", "way"),
    [
        (4, ways.Gpus(0), "gloo"),
        (2, ways.Gpus(1, (), None), "gloo"),
        (1, ways.Gpus(1, (), (2, 28, 9)), "devices"),
        (4, ways.Gpus(8, (), (2, 28, 9)), "devices"),
        (8, ways.Gpus(4, (), (2, 28, 9)), "host id"),
        (2, ways.Gpus(1, (), (2, 29, 7)), "host id"),
        (2, ways.Gpus(1, (), (2, 30, 3)), "multi-rank"),
        (2, ways.Gpus(1, ("MIG-a", "MIG-b"), (2, 30, 3)), "partitions"),
        (4, ways.Gpus(1, ("MIG-a", "MIG-b"), (2, 28, 9)), "host id"),
    ],
)
def test_ranks_get_a_gpu_each_where_they_can(world, gpus, way):
    assert ways.way_of(world, gpus) == way


def test_ranks_on_one_device_are_on_hosts_of_their_own_for_nccl_and_talk_over_the_loopback():
    ranks = [ways.environment("host id", rank) for rank in range(8)]
    assert len({rank["NCCL_HOSTID"] for rank in ranks}) == 8
    assert {rank["LOCAL_RANK"] for rank in ranks} == {"0"}
    assert {rank["NCCL_SOCKET_IFNAME"] for rank in ranks} == {"lo"}
    assert [ways.environment("devices", rank)["LOCAL_RANK"] for rank in range(3)] == ["0", "1", "2"]
    assert "NCCL_HOSTID" not in ways.environment("devices", 0)
    assert "NCCL_HOSTID" not in ways.environment("plain", 0)
    assert ways.environment("partitions", 1, ("MIG-a", "MIG-b"))["CUDA_VISIBLE_DEVICES"] == "MIG-b"


def test_a_part_is_left_out_for_a_package_and_then_for_a_gpu():
    part = Part("x", "?", 10, "x", packages=("torch", "no_such_package"), devices=2)
    assert lacking(part, 2, False, lambda name: True) is None
    assert lacking(part, 1, False, lambda name: True) == "needs 2 GPUs"
    assert lacking(part, 0, True, lambda name: True) is None
    assert lacking(part, 2, False, gpu.installed) == "not installed: no_such_package"
    assert lacking(part, 2, False, lambda name: name != "torch") == "not installed: torch"
    assert all(skipped(s) for s in ("not installed: x", "needs a GPU", "needs 2 GPUs"))
    assert not any(skipped(s) for s in ("ok", "failed: exit status 1", "out of time: 3 s", "no time: 3 s left"))


def test_a_submodule_of_a_package_that_is_missing_is_not_installed():
    assert not gpu.installed("no_such_package.core")


def test_parts_are_named_once_and_each_fits_into_the_budget():
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(part.seconds < BUDGET_S / 2 for part in PARTS)
    assert [part.name for part in chosen(["sharing"])] == ["machine", "sharing"]
    assert chosen([]) == PARTS
    with pytest.raises(ValueError, match=r"--only sharng: no such part; there are machine, .*sharing"):
        chosen(["sharng"])


def row(source, seconds=20, left=100.0, **more):
    """The row of a part whose module is the text ``source``."""
    part = Part("x", "?", seconds, "x", devices=0, **more)
    command = gpu.command_of
    try:
        gpu.command_of = lambda part, dry: [sys.executable, "-c", source]
        return gpu.row_of(part, argparse.Namespace(dry=True), {}, 0, left)
    finally:
        gpu.command_of = command


def test_a_crash_costs_one_row_that_has_the_last_words_and_what_was_found_before():
    found = row("import sys; print('{\"a\": 1}'); print('log'); sys.exit('what happened')")
    assert found["status"] == "failed: exit status 1"
    assert found["a"] == 1
    assert found["stderr"] == ["what happened"]
    killed = row("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert killed["status"] == "failed: exit status -11"


def test_a_hang_ends_in_time_with_what_it_had_started():
    start = time.monotonic()
    # The child would hold the row's files open, and go on for a minute.
    source = (
        "import subprocess, sys, time; print('{\"a\": 1}', flush=True); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, file=sys.stderr, flush=True); time.sleep(60)"
    )
    found = row(source, seconds=2)
    assert found["status"] == "out of time: 2 s"
    assert found["a"] == 1
    assert time.monotonic() - start < 10
    pid = int(found["stderr"][-1])
    deadline = time.monotonic() + 5
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_whose_limit_no_longer_fits_is_not_started():
    assert row("raise SystemExit(1)", seconds=60, left=59.0)["status"].startswith("no time: 59 s of the budget left")


def test_the_last_object_printed_counts():
    assert last_object('{"a": 1}\nnot {json}\n{"b": [2]}\n[3]\n4\n') == {"b": [2]}
    assert last_object("nothing\n") == {}


def test_a_billion_parameters_become_as_many_as_fit():
    for kinds in (("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32"), ("bf16", "bf16", "bf16")):
        n = rivals.fitting(10**9, 79e9, *kinds)
        assert n * sum(rivals.bytes_held(*kinds)) <= 0.9 * 79e9
        assert n > 5e8
        assert rivals.fitting(1000, 79e9, *kinds) == 1000
    # Twice gradient, weights, target and two moments; copy; torch's weights and gradients, bf16 ones; four states.
    assert rivals.bytes_held("fp32", "fp32", "fp32")[0] == 2 * 20 + 8 + 8 + 4 + 8 + 8 + 8 + 4


def test_an_update_that_allocates_or_is_not_made_or_is_another_is_not_right():
    good = {"blocks_given_out": 0, "segments_from_driver": 0, "steps": 12, "max_difference_from_reference": 1e-6}
    assert steady.right(good)
    assert steady.right({"steps": 12, "max_difference_from_reference": 1e-6})  # a CPU counts no blocks
    for fault in ({"blocks_given_out": 1}, {"segments_from_driver": 1}, {"steps": 11}):
        assert not steady.right(good | fault)
    assert not steady.right(good | {"max_difference_from_reference": 1e-3})
    assert not steady.right(good | {"max_difference_from_reference": float("nan")})


def test_losses_that_are_missing_or_not_finite_are_not_close():
    of_rank = {"ms_a_call": 1.0, "updates": 3, "losses": [1.0, 2.0]}
    assert model.row_of([of_rank], [1.0, 2.0], argparse.Namespace(type="cpu"), 3)[1] == []
    for losses in ([1.0], [1.0, float("nan")], [1.0, 2.0000002]):
        _, wrong = model.row_of([of_rank | {"losses": losses}], [1.0, 2.0], argparse.Namespace(type="cpu"), 3)
        assert wrong == ["losses are not the simulator's"]
    slow = [of_rank, of_rank | {"ms_a_call": 2.0, "updates": 2}]
    found, wrong = model.row_of(slow, [1.0, 2.0], argparse.Namespace(type="cpu"), 3)
    assert found["ms_a_call"] == 2.0
    assert wrong == ["3 calls made [3, 2] updates"]


def test_figures_are_read_from_the_log_without_the_first_interval():
    line = (
        " [x] iteration {} | elapsed time per iteration (ms): {} | global batch size:     8 | lm loss: {} | delay: 0 |"
    )
    log = "\n".join(line.format(*of) for of in ((10, 900.5, "1.1E+01"), (20, 50.25, "1.0E+01"), (30, 49.0, "nan")))
    ms, batch, losses = figures(log)
    assert (ms, batch) == ([50.25, 49.0], 8)
    assert losses[:2] == [11.0, 10.0]
    assert losses[2] != losses[2]


def test_a_checkout_is_laid_out_as_the_package_is_installed(tmp_path):
    package = lay_out(tmp_path / "here") / "noflush"
    for name in ("__init__.py", "kernels/fused.py", "patches/__init__.py", "launch/pretrain_gpt.py"):
        assert (package / name).is_file(), name
