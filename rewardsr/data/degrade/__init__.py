"""Degradations, which make the low-quality image that a pipeline starts from of a high-quality one: the plug-in group
`degradations`. `contract` says what one is; `light`, `plain` and `realesrgan` are the built-in ones.
"""
