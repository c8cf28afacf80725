"""The one exception that this package raises on purpose."""


class CompareError(Exception):
    """The request cannot be answered; the message is one line that says what to do."""
