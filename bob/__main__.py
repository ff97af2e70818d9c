"""`python -m bob` and the console script `bob`."""

import sys

from bob.errors import LINE, shown
from bob.failures import guarded


def main() -> None:
    """Run the command line; whatever goes wrong ends it with one line and an exit status."""
    guarded(_command_line)


def _command_line() -> None:
    # Imported here: where the environment is wrong, so is this.
    import click

    from bob.cli import cli

    try:
        sys.exit(cli.main(prog_name="bob", standalone_mode=False))
    except click.ClickException as error:
        # Made of what was typed, which may hold anything.
        message = shown(" ".join(error.format_message().split()), LINE)
        error.format_message = lambda: message  # type: ignore[method-assign]
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as abort:  # what click makes of Ctrl-C, and of a file that ends too early
        raise abort.__cause__ or abort from None


if __name__ == "__main__":
    main()
