"""What all samplers share: their state and queries, grids of times, distributions of a step, and the loop.

Shapes: B sequences, L positions, V vocabulary; a step goes from the times t to the times s, both [B].
"""
