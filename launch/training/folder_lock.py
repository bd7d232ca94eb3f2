"""One run at a time saves into a folder: a lock file that says who, and that can be taken over from who is gone.

Who was killed leaves the lock behind. So it is taken over from the same job after SLURM or torchrun restarted it, from
a process of this machine that is no more, and from anyone who does not touch it while it is watched for `WATCH`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from noflush.launch.refusal import RefusedError
from noflush.stage.checkpoint import PARTIAL

LOCK = "lock"
BEAT = 10.0
"""Seconds between two touches of a lock that is held."""
WATCH = 30.0
"""Seconds without a touch after which nobody holds a lock."""
_SETTLED = 1.0
"""Seconds in which somebody else who takes over the same lock has done so."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        machine: tells where ``pid`` means something: boot and process namespace.
        job: of SLURM or torchrun, with its kind; empty without one.
        restart: how often that was restarted.
        begun: when the process began, in clock ticks since its machine did; 0 where that cannot be read.
        since: when it took the lock.
        token: of this lock alone.
    """

    host: str
    machine: str
    pid: int
    begun: int
    job: str
    restart: int
    since: str
    token: str

    def __str__(self) -> str:
        return f"{self.job or 'a run'} (process {self.pid} on {self.host}, since {self.since})"


def myself(environ: Mapping[str, str]) -> Holder:
    """This process, as the holder of a lock."""
    job, restart = "", "0"
    if environ.get("SLURM_JOB_ID"):
        job, restart = f"SLURM job {environ['SLURM_JOB_ID']}", environ.get("SLURM_RESTART_COUNT", "0")
    elif environ.get("TORCHELASTIC_RUN_ID", "none") != "none":
        job = f"torchrun {environ['TORCHELASTIC_RUN_ID']}"
        restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        begun=_begun(os.getpid()),
        job=job,
        restart=int(restart) if restart.isdigit() else 0,
        since=datetime.now().isoformat(" ", "seconds"),
        token=uuid.uuid4().hex,
    )


def is_gone(holder: Holder, me: Holder) -> bool | None:
    """Whether ``holder`` has ended; None if ``me`` cannot know from here."""
    if me.job and me.job == holder.job and me.restart > holder.restart:
        return True
    if me.machine and me.machine == holder.machine:
        return _begun(holder.pid) != holder.begun
    return None


class FolderLock:
    """The lock of ``folder``, taken; held until `release`.

    Raises:
        RefusedError: another run holds it, or it cannot be written.
    """

    def __init__(self, folder: str | Path, environ: Mapping[str, str]) -> None:
        self.path, self.me = Path(folder) / LOCK, myself(environ)
        self._released = threading.Event()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise RefusedError(f"--save {folder}: its lock {self.path} cannot be written ({error.strerror})") from None
        threading.Thread(target=self._beat, name="noflush folder lock", daemon=True).start()

    def check(self) -> None:
        """Raises RefusedError unless the lock is still this process's: nobody else has saved, then."""
        holder = _read(self.path)
        if holder is None or holder.token != self.me.token:
            who = "is gone" if holder is None else f"was taken over by {holder}"
            raise RefusedError(
                f"--save {self.path.parent}: this run's lock {self.path} {who}, so it saves no more there: another run "
                "may be writing. Let one of them end, and go on with --load"
            )

    def release(self) -> None:
        """Gives the folder free, if it is still this process's."""
        self._released.set()
        holder = _read(self.path)
        if holder is not None and holder.token == self.me.token:
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        text = json.dumps(asdict(self.me))
        try:
            _create(self.path, text)
            return
        except FileExistsError:
            pass
        holder = _read(self.path)
        gone = None if holder is None else is_gone(holder, self.me)
        if gone is None:
            gone = not _touched(self.path, WATCH)
        if not gone:
            raise RefusedError(
                f"--save {self.path.parent}: {holder or 'another run'} holds {self.path}; two runs in one folder would "
                "overwrite each other's checkpoints. Wait for its end, or give another folder; if it has ended, remove "
                f"{self.path}"
            )
        scratch = self.path.with_name(f"{LOCK}.{self.me.token}{PARTIAL}")
        _create(scratch, text)
        os.replace(scratch, self.path)
        # Somebody else may be taking it over at this moment; the later one has it.
        time.sleep(_SETTLED)
        self.check()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            # A lock that is gone is told by `check`, before the next checkpoint.
            with contextlib.suppress(OSError):
                os.utime(self.path, follow_symlinks=False)


def _create(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def _read(path: Path) -> Holder | None:
    """The holder; None if there is none, or what is there is no lock."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as stream:
            return Holder(**json.loads(stream.read(4096)))
    except (OSError, ValueError, TypeError):
        return None


def _touched(path: Path, seconds: float) -> bool:
    """Whether somebody touches ``path``, or puts another in its place, within ``seconds``."""
    first, deadline = _stamp(path), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, seconds / 4))
        if _stamp(path) != first:
            return True
    return False


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        # Opened, because file servers' clients may show an old time until then.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return found.st_ino, found.st_mtime_ns


def _begun(pid: int) -> int:
    """When process ``pid`` of this machine began, in clock ticks; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _machine() -> str:
    """Boot and process namespace: where a process number means the same; empty where the system does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
