"""The one error a user can mend: what was given, what is allowed, what to do."""


class RebelError(ValueError):
    """A wrong setting or input. The command line prints the message alone and exits with code 2."""


class RunStopped(RuntimeError):
    """A run that had to stop in the middle, after its state was written down. The command line exits with code 1."""
