"""What eval/sandbox.py stands on: the processes inside a sandbox, what they say to each other, and limits from outside.

Nothing here imports more than the standard library: the inside runs with ``python -I -S``.
"""
