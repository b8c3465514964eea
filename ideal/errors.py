"""What a user did wrong, as one line."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the place (file and row, or key) and what to do.

    main.py prints it without a traceback and exits with 2.
    """
