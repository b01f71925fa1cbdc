"""``python -m sarmlib``: the command line."""

if __name__ == "__main__":
    import sys

    from sarmlib.cli import main
    sys.exit(main())
