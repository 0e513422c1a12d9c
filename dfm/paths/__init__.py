"""Paths from noise to text: sources, schedulers, mixture and metric paths, fitted schedules, given tokens.

Given x0 and x1 every position is independent of the others. Shapes: B sequences, L positions, V vocabulary; ``x0``,
``x1`` [B, L] ids; time ``t`` [B] from 0 (source) to 1 (data), or [B, L] for a time of its own at each position;
ValueError for t outside [0, 1]. Schedules take ``t`` and ``k`` of any shape. Losses in nats.
"""
