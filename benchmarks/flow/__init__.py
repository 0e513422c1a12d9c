"""Flow matching: samplers against forwards, likelihood, samplers inside blocks, and the same work by flow_matching."""
