"""Which rank a process is and where its peers meet, read from whatever launcher started it. Pure.

DeepSpeed falls back to mpi4py where RANK is missing, and its own SLURM launcher exports none of what it needs. So
SLURM's variables are translated here, before `deepspeed.init_distributed` looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(10000, 30000)
"""Where a port is derived from a job's number: above the reserved ones, below those that kernels give to clients."""


@dataclass(frozen=True)
class Rendezvous:
    """This process among all, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its machine; once exported, of its device among those that it sees."""
    master_addr: str
    master_port: int
    source: str
    """Who said so: "launcher" (torchrun, DeepSpeed), "slurm" (srun) or "alone"."""

    def __str__(self) -> str:
        meeting = f"{self.master_addr}:{self.master_port}"
        return (
            f"rank {self.rank} of {self.world_size}, device {self.local_rank}, by {self.source}, meeting at {meeting}"
        )


def rendezvous(environ: Mapping[str, str]) -> Rendezvous:
    """Reads torchrun's and DeepSpeed's variables if there are any, else srun's; a process with neither is alone.

    MASTER_ADDR and MASTER_PORT may be set beside srun's variables, and then hold.

    Raises:
        ValueError: some of the variables are there and others missing, or they contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_launcher(environ)
    if "SLURM_JOB_ID" in environ and _slurm_tasks(environ) > 1:
        return _from_slurm(environ)
    return Rendezvous(0, 1, 0, environ.get("MASTER_ADDR", "127.0.0.1"), _port(environ), "alone")


def export(found: Rendezvous, environ: MutableMapping[str, str], devices: int | None = None) -> Rendezvous:
    """Sets what `deepspeed.init_distributed` and torch read, so that neither asks mpi4py; returns what was set.

    DeepSpeed takes LOCAL_RANK for the number of the device, so it is set to `device_of`: 0 where the task sees one
    device (``srun --gpus-per-task=1``). ``devices``: how many this process sees, where it is known.

    Raises:
        ValueError: this process has no device; nothing is set.
    """
    device = found.local_rank
    if uses_cuda(environ):
        try:
            device = device_of(found.local_rank, environ.get("CUDA_VISIBLE_DEVICES"), devices)
        except ValueError as error:
            raise ValueError(f"rank {found.rank}: {error}") from None
    if device != found.local_rank and "OMPI_COMM_WORLD_LOCAL_RANK" in environ:
        environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device)  # DeepSpeed insists that both say the same
    found = replace(found, local_rank=device)
    environ.update(
        RANK=str(found.rank),
        WORLD_SIZE=str(found.world_size),
        LOCAL_RANK=str(found.local_rank),
        MASTER_ADDR=found.master_addr,
        MASTER_PORT=str(found.master_port),
    )
    return found


def uses_cuda(environ: Mapping[str, str]) -> bool:
    """Whether DeepSpeed takes CUDA devices where there are any: no other kind is asked for."""
    return environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def device_of(local_rank: int, visible: str | None, devices: int | None = None) -> int:
    """Number of the device of the process ``local_rank`` of its machine, among those that it sees.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None if it is not set.
        devices: how many devices the process sees; None if that is not known.

    A process that sees one device takes it; one that sees none runs on CPUs, and keeps its number.

    Raises:
        ValueError: it sees several, but fewer than there are processes on its machine.
    """
    listed = devices_listed(visible)
    counts = [count for count in (listed, devices) if count is not None]
    if not counts or local_rank < min(counts) or 0 in counts:
        return local_rank
    if set(counts) == {1}:
        return 0
    says = "no CUDA_VISIBLE_DEVICES is set" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible}"
    sees = min(counts)
    raise ValueError(
        f"it is process {local_rank} of its machine, counted from 0, and sees {sees} device{'s' * (sees > 1)} "
        f"({says}): there are more processes than devices. Start as many as there are devices (srun --ntasks-per-node, "
        "torchrun --nproc_per_node, deepspeed --num_gpus), or let each see one of its own (srun --gpus-per-task=1)"
    )


def devices_listed(visible: str | None) -> int | None:
    """How many devices CUDA_VISIBLE_DEVICES lists; None if it is not set, and so all are seen.

    As CUDA reads it: numbers, or names that begin with GPU- or with MIG-; up to the first entry that is no such, and
    none at all where one comes twice.
    """
    if visible is None:
        return None
    kind = next((kind for kind in ("GPU-", "MIG-") if visible.startswith(kind)), None)
    found: list[str | int] = []
    for entry in visible.split(","):
        number = re.match(r"\s*\+?(\d+)", entry)
        device = int(number[1]) if kind is None and number else entry if kind and entry.startswith(kind) else None
        if device is None:
            break
        if device in found:
            return 0
        found.append(device)
    return len(found)


def hosts(nodelist: str) -> list[str]:
    """The hosts of SLURM's notation: ``a[01-03,7],b`` is a01 a02 a03 a7 b. (`scontrol show hostnames`, without it.)"""
    if not re.fullmatch(r"([^][,\s]|\[\d[\d,-]*\])+(,([^][,\s]|\[\d[\d,-]*\])+)*", nodelist):
        raise ValueError(f"host list is {nodelist!r}, expected SLURM's notation such as node[1-4,7],login")
    found: list[str] = []
    for word in re.findall(r"(?:[^][,]|\[[^]]*\])+", nodelist):
        found += _expand(word)
    return found


def port_of_job(job: int) -> int:
    """A port for rank 0 that two jobs on one machine rarely share; the same whenever SLURM restarts the job."""
    return PORTS.start + job % len(PORTS)


# ---- the two sources -------------------------------------------------------------------------------------


def _from_launcher(environ: Mapping[str, str]) -> Rendezvous:
    missing = [name for name in LAUNCHER if name not in environ]
    if missing:
        there = ", ".join(f"{name}={environ[name]}" for name in LAUNCHER if name in environ)
        raise ValueError(
            f"{there} set, but {' and '.join(missing)} not: a launcher sets all of {', '.join(LAUNCHER)}. "
            "Start it with deepspeed, torchrun or srun, or unset what is left over from another run"
        )
    rank, world, local = (_number(environ, name) for name in LAUNCHER[:3])
    _check_rank("RANK", rank, "WORLD_SIZE", world)
    return Rendezvous(rank, world, local, environ["MASTER_ADDR"], _port(environ), "launcher")


def _from_slurm(environ: Mapping[str, str]) -> Rendezvous:
    world = _slurm_tasks(environ)
    # In a batch script, and in the shell of an allocation, SLURM_PROCID is 0: only a step's number tells them apart.
    # The shell may be a step of its own, of one task.
    in_step = "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", world)) == world
    if not in_step or "SLURM_PROCID" not in environ:
        raise ValueError(
            f"job {environ['SLURM_JOB_ID']} has {world} tasks, but this process is none of them: start it with srun "
            "(srun python ...), not with python alone, or set RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR and "
            "MASTER_PORT for a single process"
        )
    rank = _number(environ, "SLURM_PROCID")
    _check_rank("SLURM_PROCID", rank, "SLURM_NTASKS", world)
    if "SLURM_LOCALID" not in environ:
        raise ValueError(f"SLURM_PROCID={rank} set, but SLURM_LOCALID not: srun sets both, start it with srun")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = environ.get("MASTER_ADDR") or (hosts(nodes)[0] if nodes else None)
    if address is None:
        raise ValueError(
            f"SLURM_PROCID={rank} set, but none of SLURM_STEP_NODELIST, SLURM_JOB_NODELIST and MASTER_ADDR: "
            "set MASTER_ADDR to the host of rank 0"
        )
    return Rendezvous(rank, world, _number(environ, "SLURM_LOCALID"), address, _port(environ), "slurm")


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """How many tasks the step has, or the job was given; a job that names only nodes gets a task a node."""
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
        if name in environ:
            return _number(environ, name)
    return 1


def _port(environ: Mapping[str, str]) -> int:
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
        if not 0 < port < 65536:
            raise ValueError(f"MASTER_PORT is {port}, expected 1 to 65535")
        return port
    return port_of_job(_number(environ, "SLURM_JOB_ID")) if "SLURM_JOB_ID" in environ else 29500


def _check_rank(name: str, rank: int, world_name: str, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"{name} is {rank} and {world_name} is {world}: a rank is from 0 to {world} - 1")


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} is {environ[name]!r}, expected a whole number") from None


# ---- SLURM's notation ------------------------------------------------------------------------------------


def _expand(word: str) -> list[str]:
    match = re.match(r"(.*?)\[([^]]*)\](.*)", word)
    if match is None:
        return [word]
    before, ranges, after = match.groups()
    tails = _expand(after) if after else [""]
    return [f"{before}{number}{tail}" for number in _numbers(ranges) for tail in tails]


def _numbers(ranges: str) -> Iterator[str]:
    """The numbers of ``01-03,7``, each as wide as its range's start is written."""
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise ValueError(f"range {part!r} of a host list, expected a number or from-to such as 01-16")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"
