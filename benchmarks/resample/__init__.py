"""Resample-Previous-Tokens: what revising tokens is worth."""
