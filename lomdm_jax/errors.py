"""The one error that is a user's to mend."""


class UserError(ValueError):
    """Bad input, said in one paragraph: the thing, its value, and the remedy.

    The command line prints the message without a traceback and exits with status 2.
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, in one line; of a long one the middle is left out."""
    line = next(iter(f"{error}".splitlines()), "") or type(error).__name__
    half = limit // 2
    return line if len(line) <= limit else f"{line[:half]} ... {line[-half:]}"
