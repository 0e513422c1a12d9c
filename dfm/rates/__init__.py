"""What moves a text along a path: velocities, finite-step kernels, posteriors, guidance, and the losses they come from.

Shapes: B sequences, L positions, V vocabulary; z = X_t, x1 the data [B, L]; ``p1`` = p_1t(x | X_t) [B, L, V], the
distribution of each data token given the whole noisy text; ``t`` [B]; ``k`` = kappa_t, broadcast to p1. Rates are
per unit of time.
"""
