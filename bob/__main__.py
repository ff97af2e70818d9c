"""`python -m bob` and the console script `bob`."""

import sys


def main() -> None:
    """Run the command line, with one line instead of a traceback where the environment is wrong."""
    try:
        from bob.cli import cli

        cli(prog_name="bob")
    except ModuleNotFoundError as error:
        # DVC starts stages with the first `python` on PATH, which need not be the project's.
        sys.exit(
            f"bob: {sys.executable} has no module {error.name!r}; activate the project's "
            "environment first: source .venv/bin/activate (`make repro` creates it)"
        )


if __name__ == "__main__":
    main()
