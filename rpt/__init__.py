"""Resample-Previous-Tokens (arXiv 2506.06215): the package is reserved, nothing is in it yet."""
