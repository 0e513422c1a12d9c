"""Benchmarks: quality against forwards, wall clock against ``model.generate``, losslessness, memory.

Each prints a table for people and one line of JSON, and writes the same as one JSON file with device, dtype, batch,
lengths and versions.
"""
