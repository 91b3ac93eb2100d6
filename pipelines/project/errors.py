"""The one error that the user, not the program, has to mend."""


class InputError(Exception):
    """Bad input; the text is one line: what was wrong, where, what was found, what to do."""


class GateClosedError(InputError):
    """A step broke a limit of its gate; a person may let it through."""
