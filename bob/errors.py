"""The one error a user is meant to see."""


class BobError(Exception):
    """Bad input, told in one line that names the file, key or class and says what to do.

    The command line prints the message without a traceback and exits with status 1.
    """
