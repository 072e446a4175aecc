"""The one error that is a user's to mend."""


class UserError(ValueError):
    """Bad input, said in one paragraph: the thing, its value, and the remedy.

    The command line prints the message without a traceback and exits with status 2.
    """
