"""What the user did wrong, as exceptions; nothing else is imported here, so that a client of a server needs nothing else."""


class UserError(ValueError):
    """A mistake of the user: one line that says what was given, what is allowed and what to try."""


class NotImportable(UserError):
    """A class of the user's own, which a configuration names, cannot be imported here."""
