"""How a newcomer is given a peer's state: over HTTP, as safetensors and JSON.

torchft's own transport unpickles what it receives; a peer must not be able to run code here.
"""

from __future__ import annotations

import json
import struct
import threading
import urllib.request
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import safetensors.torch
from torch import Tensor
from torchft.checkpointing.transport import CheckpointTransport

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and what JSON can say."""


def to_bytes(state: State) -> bytes:
    """``state`` as one safetensors file. Raises TypeError for a value that JSON cannot say."""
    tensors, plain = state
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(whole, metadata={"plain": json.dumps(plain)})


def from_bytes(data: bytes) -> State:
    """The inverse of `to_bytes`. Raises ValueError or safetensors' error for anything else."""
    tensors = safetensors.torch.load(data)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return tensors, json.loads(header["__metadata__"]["plain"])


class TensorTransport(CheckpointTransport[dict[str, Any]]):  # type: ignore[misc]
    """Serves the newest state that was asked for, and fetches peers'.

    Args:
        bind: the address that it listens at, and is reached by.
        patience_s: how long a newcomer that asks is kept waiting for there to be a state.
    """

    def __init__(self, bind: str, patience_s: float = 60.0) -> None:
        served: dict[str, bytes] = {}
        changed = threading.Condition()

        class Handler(BaseHTTPRequestHandler):
            timeout = patience_s

            def do_GET(self) -> None:
                with changed:  # a newcomer may ask before there is anything
                    there = changed.wait_for(lambda: self.path in served, patience_s)
                    data = served[self.path] if there else b""
                if not there:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Nothing: the log is training's."""

        self._served, self._changed = served, changed
        self._server = ThreadingHTTPServer((bind, 0), Handler)
        self._address = f"http://{bind}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="noflush-state", daemon=True).start()

    def metadata(self) -> str:
        """Where a peer fetches from."""
        return self._address

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        """Serves it from now on, until `disallow_checkpoint`."""
        data = to_bytes(state_dict["user"]["default"])
        with self._changed:
            self._served[f"/{step}"] = data
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """Serves nothing: the round is over, and what comes next is newer."""
        with self._changed:
            self._served.clear()

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        """Fetches a peer's."""
        with urllib.request.urlopen(f"{metadata}/{step}", timeout=timeout.total_seconds()) as answer:
            state = from_bytes(answer.read())
        return {"user": {"default": state}, "torchft": {"step": step, "batches_committed": 0}}

    def shutdown(self, wait: bool = True) -> None:
        """Ends the server."""
        threading.Thread(target=self._server.shutdown, daemon=True).start()
