"""Ranks meet at the store before torch.distributed does: whoever is missing, too many or of another run is named.

torch's own rendezvous counts ranks and does not know them, and a listener on MASTER_PORT that accepts and says nothing
holds its client for ever, whatever the timeout. So the store is asked by a thread of its own here, and everybody says
who he is. Rank 0's store is multi-tenant: torch's rendezvous afterwards takes the same one.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

_GRACE = 5.0
"""Seconds beyond its timeout for the store to say so by itself."""
_LINGER = 2.0
"""Seconds for the others to read from rank 0's store who is missing."""
_MANY = 8


class MeetingError(RuntimeError):
    """Ranks could not meet; the message says what was seen, and what to do."""


def meet(rank: int, world: int, environ: Mapping[str, str], timeout_s: float, split: str) -> Any:
    """Waits for all ranks at MASTER_ADDR:MASTER_PORT, and returns the store.

    Args:
        rank, world: of this process.
        environ: MASTER_ADDR and MASTER_PORT, and what tells jobs apart.
        timeout_s: how long, from now.
        split: how the run splits its ranks, in words; the same on every rank.

    Raises:
        MeetingError: the port is taken, nobody or somebody else is there, or a rank is missing or there twice.
    """
    deadline = time.monotonic() + timeout_s
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = _within(
        timeout_s + _GRACE,
        lambda: _open(address, port, world, rank == 0 and not agent, timeout_s),
        lambda _: _nobody(address, port, timeout_s, rank),
    )
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"noflush/{attempt}", store)
    run = json.dumps({"world": world, "split": split, "job": _job(environ)})
    party = _Party(store, rank, world, run, f"{address}:{port}", deadline, timeout_s)
    _within(deadline + _GRACE + _LINGER - time.monotonic(), party.join, party.broken)
    return store


def who() -> str:
    """This process, for people."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def _job(environ: Mapping[str, str]) -> str:
    """What tells this job, and this start of it, from others that may meet at the same port."""
    if "SLURM_JOB_ID" in environ:
        return f"SLURM job {environ['SLURM_JOB_ID']}, restart {environ.get('SLURM_RESTART_COUNT', '0')}"
    if "TORCHELASTIC_RUN_ID" in environ:
        return f"torchrun job {environ['TORCHELASTIC_RUN_ID']}"
    return "a job without a number"


def _within(seconds: float, work: Callable[[], Any], broken: Callable[[bool], MeetingError]) -> Any:
    """What ``work`` returns, or the MeetingError it raises.

    Raises ``broken(True)`` if it does neither in time (its thread is left behind), ``broken(False)`` if torch gave up.
    """
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="noflush: meeting")
    thread.start()
    thread.join(max(0.0, seconds))
    if failure:
        if isinstance(failure[0], MeetingError) or not isinstance(failure[0], RuntimeError):
            raise failure[0]
        raise broken(False) from failure[0]
    if not result:
        raise broken(True)
    return result[0]


def _open(address: str, port: int, world: int, keeps: bool, timeout_s: float) -> Any:
    try:
        return TCPStore(
            address,
            port,
            world,
            is_master=keeps,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=keeps,
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise MeetingError(
            f"rank 0 cannot listen on port {port}, which another process of {socket.gethostname()} has: a run that has "
            "not ended, or another one's. End that one, or choose another port (--master_port of deepspeed and "
            "torchrun, or MASTER_PORT)"
        ) from None


def _nobody(address: str, port: int, timeout_s: float, rank: int) -> MeetingError:
    return MeetingError(
        f"rank {rank} found no rank 0 at {address}:{port} within {timeout_s:g} s: {_seen(address, port)}. Rank 0 must "
        "run on that host, and all ranks have the same MASTER_ADDR and MASTER_PORT; choose another port (--master_port "
        "of deepspeed and torchrun, or MASTER_PORT) if another program has it"
    )


def _seen(address: str, port: int) -> str:
    """What answers at an address, in words."""
    try:
        with socket.create_connection((address, port), timeout=3):
            return "somebody accepts connections there, and does not answer as the store of rank 0 does"
    except socket.gaierror:
        return "there is no host of that name"
    except ConnectionRefusedError:
        return "nobody listens there"
    except OSError as error:
        return f"the host does not answer ({error.strerror or 'timed out'})"


class _Party:
    """One rank at the store."""

    def __init__(
        self, store: Any, rank: int, world: int, run: str, where: str, deadline: float, timeout_s: float
    ) -> None:
        self._store, self._rank, self._world, self._run = store, rank, world, run
        self._where, self._deadline, self._timeout_s = where, deadline, timeout_s

    def join(self) -> bool:
        """Says who this is, and waits for all."""
        if self._rank:
            self._check_run()
        if self._store.add(f"count/{self._rank}", 1) > 1:
            first = self._store.get(f"who/{self._rank}").decode()
            raise MeetingError(
                f"two processes are rank {self._rank} of the run at {self._where}: {first}, which was here before, and "
                f"this one ({who()}). Start each rank once, with a RANK of its own; end what is left of an older run"
            )
        self._store.set(f"who/{self._rank}", who())
        if not self._rank:
            self._store.set("run", self._run)
        self._wait_for_all()
        return True

    def _check_run(self) -> None:
        while not self._store.check(["run"]):
            if time.monotonic() > self._deadline:
                raise MeetingError(
                    f"rank {self._rank}: the store at {self._where} answers, but no rank 0 of a noflush run has come "
                    "to it: did rank 0 start? Or it is another program's: then choose another port (MASTER_PORT)"
                )
            time.sleep(0.1)
        there, mine = json.loads(self._store.get("run")), json.loads(self._run)
        if there == mine:
            return
        self._store.set(f"refused/{self._store.add('refusals', 1)}", f"rank {self._rank} of {self._world} ({who()})")
        differs = "; ".join(f"{key} {mine[key]} here, {there[key]} there" for key in mine if there[key] != mine[key])
        raise MeetingError(
            f"rank {self._rank} of {self._world} has come to another run at {self._where}: {differs}. Start all ranks "
            "by one command; end what is left of the other run, or choose another port (MASTER_PORT)"
        )

    def _wait_for_all(self) -> None:
        missing = list(range(self._world))
        while True:
            missing = [rank for rank in missing if not self._store.check([f"who/{rank}"])]
            if not missing:
                return
            if self._store.check(["missing"]):
                raise MeetingError(self._store.get("missing").decode())
            if time.monotonic() > self._deadline:
                said = self._missing(missing)
                self._store.set("missing", said)
                time.sleep(_LINGER)
                raise MeetingError(said)
            time.sleep(0.05)

    def broken(self, silent: bool) -> MeetingError:
        """The store does not answer, or its keeper has ended."""
        what = "does not answer: rank 0, which keeps it, is stopped or cut off"
        if not silent:
            what = "is gone: rank 0, which keeps it, ended before all had joined"
        return MeetingError(f"rank {self._rank}: the store at {self._where} {what}; look at its log and node first")

    def _missing(self, missing: list[int]) -> str:
        here = [rank for rank in range(self._world) if rank not in missing]
        came = ", ".join(f"rank {rank} ({self._store.get(f'who/{rank}').decode()})" for rank in here[:_MANY])
        count = self._store.add("refusals", 0)
        refused = [self._store.get(f"refused/{k}").decode() for k in range(1, min(count, _MANY) + 1)]
        more = f" Of another run, and so turned away: {', '.join(refused)}." if refused else ""
        names = ", ".join(map(str, missing[:_MANY])) + (", ..." if len(missing) > _MANY else "")
        ranks, have = ("rank", "has") if len(missing) == 1 else ("ranks", "have")
        return (
            f"{ranks} {names} of {self._world} {have} not joined at {self._where} within "
            f"{self._timeout_s:g} s (--distributed-timeout-minutes). Here are {came}"
            f"{', ...' if len(here) > _MANY else ''}.{more} Look at the logs of those that are missing: did they "
            "start, and with this MASTER_ADDR and MASTER_PORT?"
        )
