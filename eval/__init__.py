"""Evaluation: lm-eval with our decoders and what each answer cost, a sandbox for generated code, and benchmarks."""
