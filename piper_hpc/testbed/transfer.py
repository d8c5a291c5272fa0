"""One timed TCP stream, run as two processes in the namespaces at the ends of a link.

`receive ADDRESS PORT SECONDS` prints the payload bytes per second that arrived; `send ADDRESS PORT` sends until the
receiver hangs up. Everything is bounded in time: a link that is cut gives 0.0 or no answer, never a hang.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

CHUNK_BYTES = 256 * 1024
CONNECT_S = 5.0
WARM_UP_S = 0.3  # slow start, and the bucket that was full at the start


def receive(address: str, port: int, seconds: float) -> float:
    """Payload bytes per second of one stream, after the warm-up."""
    with socket.create_server((address, port)) as server:
        server.settimeout(CONNECT_S)
        connection, _ = server.accept()
    buffer = bytearray(CHUNK_BYTES)
    received, begin = 0, time.perf_counter() + WARM_UP_S
    with connection:
        connection.settimeout(seconds)
        while (now := time.perf_counter()) < begin:
            connection.recv_into(buffer)
        begin = now
        while now < begin + seconds:
            received += connection.recv_into(buffer)
            now = time.perf_counter()
    return received / (now - begin)


def send(address: str, port: int) -> None:
    """Send until the other end hangs up."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=1.0)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    chunk = bytes(CHUNK_BYTES)
    with connection, contextlib.suppress(OSError):
        connection.settimeout(CONNECT_S)
        while True:
            connection.sendall(chunk)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        print(receive(sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
    else:
        send(sys.argv[2], int(sys.argv[3]))
