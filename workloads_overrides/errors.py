"""The one exception that the launcher turns into a single line on the terminal."""


class LaunchError(Exception):
    """A run that cannot start (or did not do its job); the message says what to do about it."""
