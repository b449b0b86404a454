"""The one error users cause and users read."""


class UserError(ValueError):
    """Bad input: one line that says what, where, and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """
