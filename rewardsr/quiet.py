"""Silence for three messages of the libraries below that tell a user nothing."""

import logging


def hush() -> None:
    """Quieten what loading a pipeline prints: bitsandbytes on a CPU kernel that nobody asked for, progress bars of a
    second's loading. Warnings and errors of the libraries themselves stay."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
