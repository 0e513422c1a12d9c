"""The part that lives inside vLLM's processes: config hook, models, scheduler, model state and sampler."""
