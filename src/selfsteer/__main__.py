"""`selfsteer`, or `python -m selfsteer`: the command, and what a ^C gets that comes before it has been loaded."""

import signal
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from selfsteer.cli import main as command

        command()
    except KeyboardInterrupt:
        print("stopped by SIGINT before anything began", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
