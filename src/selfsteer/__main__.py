"""`python -m selfsteer` is the command."""

from selfsteer.cli import main

if __name__ == "__main__":
    main()
