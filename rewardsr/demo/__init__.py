"""The embedded demonstration: a small one-step super-resolution pipeline and the photographs it is judged on.

`photos` finds the photographs, `train_pipeline` trained the weights in `pipeline/`.
"""
