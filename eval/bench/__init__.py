"""Benchmarks: quality against forwards, wall clock against ``model.generate``, losslessness, memory.

Each prints a table for people and writes one JSON file; both name device, dtype, batch, lengths and versions.
"""
