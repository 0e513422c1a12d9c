"""A fingerprint of a model's head, by which what was trained on top of one model is not put on another."""

import hashlib

import torch
from torch import Tensor

ROWS = 256  # of the head, spread over the vocabulary


@torch.no_grad()
def fingerprint(head: Tensor) -> str:
    """SHA-256 of rows of the output embedding [V, D], rounded to bf16: whatever dtype it is loaded in, it is the same."""
    rows = head[:: max(1, len(head) // ROWS)].to(device="cpu", dtype=torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()
