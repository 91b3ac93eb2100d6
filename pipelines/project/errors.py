"""The one error that the user, not the program, has to mend."""


class InputError(Exception):
    """Bad input; the text is one line: what was wrong, where, what was found, what to do."""
