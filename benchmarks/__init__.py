"""Measurements behind the tables of the documentation that users do not need; from a checkout, in no wheel.

Each is a command, ``python -m benchmarks.flow.sweep --help``; ``results/`` holds what they and ``setflow bench`` wrote.
"""
