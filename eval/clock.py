"""Seconds of work on any device."""

import time

import torch


def clock(device: torch.device) -> float:
    """Seconds on a clock that only runs forward, read when ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
