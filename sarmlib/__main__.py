"""``python -m sarmlib``: the command line."""

import sys


def main() -> int:
    """Run the command that the arguments name."""
    from sarmlib.cli import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
