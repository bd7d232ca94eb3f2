"""One host of a pipeline of plain TCP sockets: what the link itself lets a pipeline's messages take.

python -m tests.bench.wan_parts.sockets '{"stages": 4, "bytes": 2000000, ...}'    # RANK, MASTER_PORT in the environment

Activations go down and gradients up as noflush's do, so many of them in flight, and nobody computes.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from itertools import pairwise

PIECE = 1 << 20


class Host:
    """One stage; every link is a connection each way.

    Args:
        rank, stages: which of how many.
        addresses: of all hosts, in order.
        port: that all listen at.
        size: bytes of a message.
    """

    def __init__(self, rank, stages, addresses, port, size):
        self.size, self.out, self.into = size, {}, {}
        server = socket.create_server((addresses[rank], port), backlog=8)
        neighbours = [host for host in (rank - 1, rank + 1) if 0 <= host < stages]
        dials = [threading.Thread(target=self._dial, args=(host, addresses[host], port, rank)) for host in neighbours]
        for dial in dials:
            dial.start()
        while len(self.into) < len(neighbours):
            connection, _ = server.accept()
            self.into[connection.recv(1)[0]] = connection
        for dial in dials:
            dial.join()

    def _dial(self, host, address, port, rank):
        while True:
            try:
                connection = socket.create_connection((address, port))
                break
            except OSError:  # it does not listen yet
                time.sleep(0.05)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(bytes([rank]))
        self.out[host] = connection

    def send(self, host):
        self.out[host].sendall(bytes(self.size))

    def take(self, host):
        left, piece = self.size, bytearray(PIECE)
        while left:
            got = self.into[host].recv_into(piece, min(left, PIECE))
            if not got:
                raise SystemExit(f"host {host} is gone")
            left -= got

    def relay(self, source, target, messages):
        for _ in range(messages):
            self.take(source)
            self.send(target)


def seconds_a_message(host, rank, stages, messages, in_flight):
    """At host 0, in the middle: without those messages that fill the pipeline and those that empty it."""
    if rank == stages - 1:
        host.relay(rank - 1, rank - 1, messages)
        return []
    if rank:
        down = threading.Thread(target=host.relay, args=(rank - 1, rank + 1, messages))
        down.start()
        host.relay(rank + 1, rank - 1, messages)
        down.join()
        return []
    free = threading.Semaphore(in_flight)

    def start():
        for _ in range(messages):
            free.acquire()
            host.send(1)

    threading.Thread(target=start, daemon=True).start()
    marks = []
    for _ in range(messages):
        host.take(1)
        marks.append(time.perf_counter())
        free.release()
    return [b - a for a, b in pairwise(marks[2 * in_flight : -in_flight])]


def main():
    args, rank = json.loads(sys.argv[1]), int(os.environ["RANK"])
    host = Host(rank, args["stages"], args["addresses"], int(os.environ["MASTER_PORT"]), args["bytes"])
    messages = args["calls"] + 3 * args["in_flight"]
    steady = seconds_a_message(host, rank, args["stages"], messages, args["in_flight"])
    print("RESULT " + json.dumps({"steady": steady}), flush=True)
    time.sleep(1)  # the last message travels


if __name__ == "__main__":
    main()
