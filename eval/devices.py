"""Where models run: devices that this machine has, and seconds of work on any of them."""

import time

import torch


def check_device(name: str) -> str:
    """``name`` if this machine has such a device; raises ValueError if not."""
    known = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        known += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in known:
        raise ValueError(f"device must be one that this machine has, {' or '.join(known)}, got {name!r}")
    return name


def clock(device: torch.device) -> float:
    """Seconds on a clock that only runs forward, read when ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
