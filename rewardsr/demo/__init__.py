"""The embedded demonstration: a small one-step super-resolution pipeline and the photographs it is judged on.

`photos` finds the photographs; `tools/` in the repository made the weights in `pipeline/`.
"""

from pathlib import Path

__all__ = ["PIPELINE"]

PIPELINE = Path(__file__).parent / "pipeline"
"""Folder of the embedded pipeline, in the usual diffusers layout."""
