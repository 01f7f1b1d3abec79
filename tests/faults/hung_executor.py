"""An executor that takes work and never answers, though its heart beats: ``hung_executor.py RUN_DIR SESSION``."""

from __future__ import annotations

import socket
import sys

from ctrl_hpc.cluster.registry import Registry


def main(run_dir: str, session: str) -> None:
    """Accept connections until this process is killed."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        registry = Registry(run_dir, heartbeat_s=1.0)
        with registry.register("executor", f"http://127.0.0.1:{port}", id=f"hung-{port}", session=session):
            print(f"http://127.0.0.1:{port}", flush=True)
            while True:
                accepted.append(sock.accept()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
