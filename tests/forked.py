"""Groups of two processes, forked from one that has imported everything once: a stand-in for accelerate's launcher.

    python forked.py serve
    python forked.py run PORT MODULE JOB

For tests of what a group does; how it is started, stopped and killed is tested with accelerate's own launcher. `run` is what
stands in its place: it asks the server for the group, waits for it, and ends with its status.
"""

import importlib
import os
import select
import socket
import sys

COUNT = 2
MODULES = ("selfsteer.training.launch", "selfsteer.training.scoring")


def serve() -> None:
    """Say the port; answer one request after the other until the other end of stdin is closed, however its holder ended."""
    for module in MODULES:
        importlib.import_module(module)
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        os.dup2(2, 1)  # what the groups print nobody would read
        while server in select.select([server, sys.stdin], [], [])[0]:
            with server.accept()[0] as asked:
                module, job = asked.recv(4096).decode().split("\n")
                asked.send(bytes([group(module, job)]))


def group(module: str, job: str) -> int:
    """Run the module in its processes; the first status that is not 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(COUNT), "LOCAL_WORLD_SIZE": str(COUNT)}
    started: list[int] = []
    for rank in range(COUNT):
        child = os.fork()
        if child == 0:
            os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = [module, job]
            importlib.import_module(module).main()
            sys.exit(0)
        started.append(child)
    return next(filter(None, (abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in started)), 0)


def run(port: str, module: str, job: str) -> int:
    """The status of the group."""
    with socket.create_connection(("127.0.0.1", int(port))) as server:
        server.send(f"{module}\n{job}".encode())
        return server.recv(1)[0]


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    sys.exit(serve(*given) if command == "serve" else run(*given))
