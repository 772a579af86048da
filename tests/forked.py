"""Two processes of a group from one that has imported everything: a stand-in for accelerate's launcher, twice as fast.

    python forked.py MODULE JOB

For tests of what the group does. How it is started, stopped and killed is tested with accelerate's own launcher.
"""

import importlib
import os
import socket
import sys

COUNT = 2


def main(module: str) -> int:
    """Run the module in both processes; the first status that is not 0."""
    run = importlib.import_module(module).main
    del sys.argv[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(COUNT), "LOCAL_WORLD_SIZE": str(COUNT)}
    started: list[int] = []
    for rank in range(COUNT):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run()
            return 0
        started.append(child)
    return next(filter(None, (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
