"""The embedded Prefect server's own process: ``python -m orchestrator_flows.server_process SOCKET READY``.

Both arguments are inherited file descriptors: the socket to listen on, and a pipe that gets one line once the server
answers. stdin is a pipe that closes when the parent ends, however it ends; then this process ends too.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import uvicorn

from orchestrator.journal import lease

_CONNECTIONS_SECONDS = 5  # for open connections, once the parent is gone
_GRACE_SECONDS = 30.0  # for everything: the last task states are written when the server's services stop


class EmbeddedServer(uvicorn.Server):
    """A server that says when it is ready, and whose start neither overlaps another's nor is cut off."""

    def __init__(self, config: uvicorn.Config, ready: int) -> None:
        super().__init__(config)
        self._ready = ready
        self.settled = threading.Event()  # started, or will not start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Migrate the database and listen. One server at a time: two migrations of one database break it."""
        from prefect.settings import get_current_settings

        try:
            with lease(get_current_settings().home, "server-start"):
                if not self.should_exit:
                    await super().startup(sockets)
                    os.write(self._ready, b"ready\n")
        finally:
            self.settled.set()


def _end_with_parent(server: EmbeddedServer) -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock a thread must not hold when the process ends
        pass
    server.should_exit = True
    server.settled.wait()  # a migration that is cut off would leave a database that no server starts on
    time.sleep(_GRACE_SECONDS)
    os._exit(0)


def main() -> None:
    """Serve until the parent ends."""
    listener, ready = (int(argument) for argument in sys.argv[1:])
    from prefect.server.api.server import create_app

    config = uvicorn.Config(
        create_app(ephemeral=True, final=True),
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=_CONNECTIONS_SECONDS,
    )
    server = EmbeddedServer(config, ready)
    threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    server.run(sockets=[socket.socket(fileno=listener)])


if __name__ == "__main__":
    main()
