"""Errors that are the user's to mend."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do. The CLI prints it and exits with code 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (numbers stopped being finite, say); what was reached so far has been kept."""
