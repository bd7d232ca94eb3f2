"""Hosts that are far from each other, on one machine: a network namespace each, joined by a switch in user space.

This kernel has no netem, so the delay is made here. A frame leaves by its sender's uplink, travels, and arrives by its
receiver's downlink; a host has one of each, of the same rate, whoever it talks to. An uplink takes the next frame when
it is free, so that the sender's own queue holds the rest; a downlink keeps ``BUFFER_S`` seconds and drops what is more.
Frames of one pair of hosts stay in order, whatever the jitter. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import multiprocessing
import os
import random
import select
import signal
import struct
import subprocess
import time
from dataclasses import dataclass

BUFFER_S = 0.4
_AHEAD_S = 0.005  # how far an uplink is filled ahead
_JITTER_EVERY_S = 0.1
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x1002
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Wan:
    """``hosts`` hosts: one-way ``delay_s`` and up to ``jitter_s`` more, ``bits_per_s`` in and out of each.

    Their TCP goes by the rule ``congestion``.
    """

    hosts: int
    delay_s: float
    jitter_s: float
    bits_per_s: float
    mtu: int
    congestion: str = "cubic"

    def name(self, host: int) -> str:
        """Of the host's namespace, which no other run has."""
        return f"noflush-{os.getpid()}-{host}"

    def address(self, host: int) -> str:
        """The host's."""
        return f"10.231.77.{host + 1}"


class Links:
    """What each host's link is, to be changed while hosts talk. Two hosts are as far apart as the farther one says."""

    def __init__(self, wan: Wan) -> None:
        self._wan = wan
        self.bits_per_s = multiprocessing.Array("d", [wan.bits_per_s] * wan.hosts, lock=False)
        self.delay_s = multiprocessing.Array("d", [wan.delay_s] * wan.hosts, lock=False)

    def change(self, host: int, bits_per_s: float, delay_s: float) -> None:
        """From now on; what is on its way goes on as it was."""
        self.bits_per_s[host], self.delay_s[host] = bits_per_s, delay_s

    def restore(self, host: int) -> None:
        """As it was in the beginning."""
        self.change(host, self._wan.bits_per_s, self._wan.delay_s)


def enter(name: str) -> None:
    """Has this thread, and the threads and processes that it starts, be on the host of namespace ``name``."""
    with open(f"/run/netns/{name}") as there:
        _set_namespace(there.fileno(), name)


def carried() -> tuple[int, int, int]:
    """Bytes that have come and gone by this process's own ``wan0``, headers included; TCP segments sent again."""
    with open("/proc/self/net/dev") as lines:
        (words,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("wan0:")]
    with open("/proc/self/net/snmp") as lines:
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(words[0]), int(words[8]), int(values[names.index("RetransSegs")])


@contextlib.contextmanager
def running(wan: Wan, links: Links | None = None):
    """Within, the hosts are there; yields their namespaces' names, for ``ip netns exec NAME command``."""
    links = links or Links(wan)
    names = [wan.name(host) for host in range(wan.hosts)]
    try:
        taps = [_make_host(wan, host, name) for host, name in enumerate(names)]
        switch = multiprocessing.get_context("fork").Process(target=_switch, args=(wan, links, taps), daemon=True)
        switch.start()
        for tap in taps:
            os.close(tap)
        yield names
        switch.terminate()
        switch.join()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _make_host(wan: Wan, host: int, name: str) -> int:
    """Makes the namespace and its interface ``wan0``; returns the other end of its cable."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    tap = _tap_within(name)
    for words in (
        ["link", "set", "lo", "up"],
        ["link", "set", "wan0", "address", f"02:00:00:00:00:{host:02x}", "mtu", str(wan.mtu), "up"],
        ["addr", "add", f"{wan.address(host)}/24", "dev", "wan0"],
        ["route", "change", "10.231.77.0/24", "dev", "wan0", "congctl", wan.congestion],
    ):
        subprocess.run(["ip", "-n", name, *words], check=True)
    return tap


def _tap_within(name: str) -> int:
    with open("/proc/self/ns/net") as here:
        enter(name)
        try:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"wan0", _TAP_WITHOUT_HEADER))
        finally:
            _set_namespace(here.fileno(), "of the caller")
    return tap


def _set_namespace(descriptor: int, name: str) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {name}")


def _switch(wan: Wan, links: Links, taps: list[int]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(-20)
    draw = random.Random(0)
    hosts = range(wan.hosts)
    up, down = [0.0] * wan.hosts, [0.0] * wan.hosts  # when each is free again
    newest = {(a, b): 0.0 for a in hosts for b in hosts}
    late, until = 0.0, 0.0
    travelling: list[tuple[float, int, int, bytes]] = []
    arriving: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        now = time.monotonic()
        if now > until:
            late, until = draw.uniform(0, wan.jitter_s), now + _JITTER_EVERY_S
        while travelling and travelling[0][0] <= now:
            due, order, host, frame = heapq.heappop(travelling)
            if down[host] - due < BUFFER_S:
                down[host] = max(due, down[host]) + 8 * len(frame) / links.bits_per_s[host]
                heapq.heappush(arriving, (down[host], order, host, frame))
        while arriving and arriving[0][0] <= now:
            _, _, host, frame = heapq.heappop(arriving)
            with contextlib.suppress(OSError):  # a host that is ending
                os.write(taps[host], frame)
        waiting = [queue[0][0] for queue in (travelling, arriving) if queue]
        free = [host for host in hosts if up[host] - now < _AHEAD_S]
        busy = [up[host] - _AHEAD_S for host in hosts if host not in free]
        timeout = max(0.0, min([*waiting, *busy, now + 0.05]) - now)
        for tap in select.select([taps[host] for host in free], [], [], timeout)[0]:
            host = taps.index(tap)
            with contextlib.suppress(BlockingIOError):
                frame = os.read(tap, 65536)
                now = time.monotonic()
                up[host] = max(now, up[host]) + 8 * len(frame) / links.bits_per_s[host]
                # To whom: the last byte of the address, or to all.
                for other in [frame[5]] if frame[0] == 2 else [h for h in hosts if h != host]:
                    if other in hosts:
                        delay_s = max(links.delay_s[host], links.delay_s[other])
                        newest[host, other] = max(newest[host, other], up[host] + delay_s + late)
                        number += 1
                        heapq.heappush(travelling, (newest[host, other], number, other, frame))
