"""Who am I, and where do we meet: every launcher's variables, and what is half-set."""

from __future__ import annotations

import subprocess
import sys

import pytest

from noflush.launch.ranks import (
    PORTS,
    Rendezvous,
    device_of,
    devices_listed,
    export,
    hosts,
    port_of_job,
    rendezvous,
)

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
# As srun 22.05 sets them for the last of four tasks.
TASK = {
    "SLURM_JOB_ID": "20017",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
# As sbatch 22.05 sets them for the script itself: it too has SLURM_PROCID.
SCRIPT = {k: v for k, v in TASK.items() if not k.startswith("SLURM_STEP")} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def without(environ, *names):
    return {k: v for k, v in environ.items() if k not in names}


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("node7", ["node7"]),
        ("node[1-4]", ["node1", "node2", "node3", "node4"]),
        ("a[01-03,7],b", ["a01", "a02", "a03", "a7", "b"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack-1,rack-[2,4]", ["rack-1", "rack-2", "rack-4"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("node[1-2]-ib.cluster.org", ["node1-ib.cluster.org", "node2-ib.cluster.org"]),
    ],
)
def test_hosts(nodelist, expected):
    assert hosts(nodelist) == expected


@pytest.mark.parametrize(
    "wrong", ["", "node[1-", "node1]", "node[]", "node[4-1]", "a,,b", "node[1-2-3]", "a b", "n[1,]"]
)
def test_hosts_refuse_what_is_no_list(wrong):
    with pytest.raises(ValueError, match="expected"):
        hosts(wrong)


def test_launcher_comes_before_slurm():
    assert rendezvous(LAUNCHED | TASK) == Rendezvous(3, 8, 1, "head", 1234, "launcher")


def test_srun():
    assert rendezvous(TASK) == Rendezvous(3, 4, 1, "gpu07", 10017, "slurm")


def test_master_beside_slurm_holds():
    found = rendezvous(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert (found.master_addr, found.master_port, found.source) == ("10.0.0.1", 7, "slurm")


def test_a_step_on_some_of_the_nodes_meets_at_its_own_first():
    assert rendezvous(TASK | {"SLURM_STEP_NODELIST": "gpu[08]"}).master_addr == "gpu08"
    assert rendezvous(without(TASK, "SLURM_STEP_NODELIST")).master_addr == "gpu07"


def test_alone():
    assert rendezvous({}) == Rendezvous(0, 1, 0, "127.0.0.1", 29500, "alone")
    one = {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    assert rendezvous(SCRIPT | one).world_size == 1
    assert rendezvous(without(TASK, "SLURM_NTASKS") | one).world_size == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK=0 set, but WORLD_SIZE and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 set, but RANK and"),
        (without(LAUNCHED, "MASTER_PORT"), "but MASTER_PORT not: a launcher sets all of"),
        (without(LAUNCHED, "WORLD_SIZE") | TASK, "but WORLD_SIZE not"),
        (LAUNCHED | {"RANK": "8"}, r"RANK is 8 and WORLD_SIZE is 8: a rank is from 0 to 8 - 1"),
        (LAUNCHED | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', expected a whole number"),
        (LAUNCHED | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, expected 1 to 65535"),
        (SCRIPT, "job 20017 has 4 tasks, but this process is none of them: start it with srun"),
        (without(SCRIPT, "SLURM_PROCID"), "start it with srun"),
        (without(SCRIPT, "SLURM_NTASKS"), "job 20017 has 2 tasks"),
        (TASK | {"SLURM_STEP_NUM_TASKS": "1"}, "start it with srun"),  # the shell of an allocation as a step
        (without(TASK, "SLURM_LOCALID"), "SLURM_PROCID=3 set, but SLURM_LOCALID not"),
        (TASK | {"SLURM_PROCID": "4"}, "SLURM_PROCID is 4 and SLURM_NTASKS is 4"),
        (without(TASK, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "set MASTER_ADDR to the host of rank 0"),
    ],
)
def test_half_set(environ, message):
    with pytest.raises(ValueError, match=message):
        rendezvous(environ)


def test_exported_it_reads_the_same():
    environ = dict(TASK)
    export(rendezvous(TASK), environ)
    found = rendezvous(environ)
    assert found == Rendezvous(3, 4, 1, "gpu07", 10017, "launcher")
    assert str(found) == "rank 3 of 4, device 1, by launcher, meeting at gpu07:10017"


VISIBLE = {
    "0": 1, "3": 1, "0,1": 2, " 2, 5 ,7": 3, "": 0, "-1": 0, "NoDevFiles": 0, "0,-1,1": 1, "0,x,1": 1, "0,0": 0,
    "1gpu2,2ampere": 2, "+1,2": 2,
    "GPU-5d5ba0d6": 1, "GPU-a,GPU-b": 2, "GPU-a,1": 1, "GPU-a,GPU-a": 0, "0,GPU-a": 1, "gpu-a": 0,
    "MIG-GPU-5d5ba0d6/1/0": 1, "MIG-a,MIG-b": 2, "MIG-a,GPU-b": 1,
}  # fmt: skip


@pytest.mark.parametrize(("visible", "count"), VISIBLE.items())
def test_devices_listed_are_torchs(visible, count, monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(torch.cuda._parse_visible_devices()) == count
    assert devices_listed(visible) == count


def test_devices_not_listed():
    assert devices_listed(None) is None


@pytest.mark.parametrize(
    ("local_rank", "visible", "devices", "expected"),
    [
        (3, None, None, 3),  # nothing is known
        (3, None, 8, 3),
        (3, None, 1, 0),  # bound by SLURM's cgroup alone
        (3, "3", None, 0),
        (3, "GPU-5d5ba0d6", 1, 0),
        (3, "MIG-GPU-5d5ba0d6/1/0", 1, 0),
        (1, "4,5", None, 1),
        (1, "4,5", 2, 1),
        (0, "4,5", 1, 0),
        *((3, visible, 0, 3) for visible in (None, "", "-1", "NoDevFiles")),  # on CPUs
        *((3, visible, None, 3) for visible in ("", "-1", "NoDevFiles")),
        (3, "0,1", 0, 3),  # a list on a machine that has none
    ],
)
def test_device(local_rank, visible, devices, expected):
    assert device_of(local_rank, visible, devices) == expected


@pytest.mark.parametrize(
    ("visible", "devices", "says"),
    [
        ("0,1", None, "sees 2 devices (CUDA_VISIBLE_DEVICES is 0,1)"),
        (None, 2, "sees 2 devices (no CUDA_VISIBLE_DEVICES is set)"),
        # CUDA opens one MIG instance a process, the first that is listed: it is another process's.
        ("MIG-a,MIG-b,MIG-c", 1, "sees 1 device (CUDA_VISIBLE_DEVICES is MIG-a,MIG-b,MIG-c)"),
    ],
)
def test_more_processes_than_devices(visible, devices, says):
    with pytest.raises(ValueError, match="more processes than devices") as error:
        device_of(2, visible, devices)
    assert says in str(error.value)


def test_a_task_that_sees_one_device_takes_it():
    """As under srun --gpus-per-task=1: DeepSpeed reads LOCAL_RANK as the device's number."""
    environ = TASK | {"CUDA_VISIBLE_DEVICES": "3"}
    found = export(rendezvous(environ), environ)
    assert (environ["LOCAL_RANK"], environ["RANK"], found.local_rank) == ("0", "3", 0)
    assert str(found) == "rank 3 of 4, device 0, by slurm, meeting at gpu07:10017"


def test_a_reduced_local_rank_is_mpis_too():
    environ = TASK | {"CUDA_VISIBLE_DEVICES": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    export(rendezvous(environ), environ)
    assert environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"


def test_without_a_device_nothing_is_set():
    environ = TASK | {"SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    before = dict(environ)
    with pytest.raises(ValueError, match=r"rank 3: it is process 2 of its machine"):
        export(rendezvous(environ), environ)
    assert environ == before


def test_the_list_of_devices_is_not_asked_on_another_accelerator():
    environ = TASK | {"SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "0,1", "DS_ACCELERATOR": "cpu"}
    export(rendezvous(environ), environ)
    assert environ["LOCAL_RANK"] == "2"


def test_ports():
    assert port_of_job(0) == 10000
    assert port_of_job(20000) == 10000
    assert all(port_of_job(job) in PORTS for job in range(0, 100000, 7))


def test_it_imports_neither_torch_nor_a_host():
    code = "import noflush.launch.ranks, sys; sys.exit(bool({'torch', 'deepspeed', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
