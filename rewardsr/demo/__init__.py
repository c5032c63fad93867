"""The embedded demonstration: a small one-step super-resolution pipeline and the photographs it is judged on.

`photos` finds the photographs; `tools/` in the repository made the weights in `pipeline/`.
"""
