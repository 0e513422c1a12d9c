"""Two-token toys whose every distribution is a table, a table model behind the engine's interface, and the exact recursion."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from decoding import Engine, SlotCache
from decoding.batch import Batch, Sequence, Stopping
from decoding.decoder import decode
from decoding.forward.rows import Rows
from decoding.sampling import LogitsPipeline
from rpt.config import ResampleConfig


def rows_normalised(table: np.ndarray) -> np.ndarray:
    return table / table.sum(-1, keepdims=True)


def conditionals(joint: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Marginal of the first token, distribution of the second given the first, distribution of the first given the second."""
    return joint.sum(1), rows_normalised(joint), rows_normalised(joint.T)


def noisy(rng: np.random.Generator, table: np.ndarray, sd: float) -> np.ndarray:
    return rows_normalised(table * np.exp(sd * rng.standard_normal(table.shape)))


def acceptance_toys(ptp_noise: float, count: int = 40, size: int = 20):
    """(joint, m, N, P) of the acceptance toy: exact joint, and noisy tables of what a network would say."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        joint = rng.dirichlet(0.3 * np.ones(size * size)).reshape(size, size)
        m, n, p = conditionals(joint)
        yield joint, noisy(rng, m, 0.5), noisy(rng, n, 0.5), noisy(rng, p, ptp_noise)


def recursion(m: np.ndarray, n: np.ndarray, p: np.ndarray, iterations: float, redraw: str = "always") -> np.ndarray:
    """Exact joint distribution [V, V] of the window after ``iterations``, gibbs acceptance."""
    distribution = m[:, None] * n
    unchanged = np.diag(np.ones(len(m)))
    # By token of the first place before and after the last odd half step, and token of the second place.
    for half in range(1, round(2 * iterations) + 1):
        if half % 2:
            moved = distribution[:, None, :] * p.T[None, :, :]  # [old, new, second]
            distribution = moved.sum(0)
        elif redraw == "always":
            distribution = distribution.sum(1)[:, None] * n
        else:
            kept = (moved * unchanged[:, :, None]).sum(0)
            distribution = kept + (moved.sum(0) - kept).sum(1)[:, None] * n
    return distribution


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


class TableEngine(Engine):
    """A model made of tables: a row that predicts the next token reads ``n``, the prompt's row ``m``, a previous-token row
    ``p``. Hidden states are log-probabilities and the head is the identity."""

    device = torch.device("cpu")

    def __init__(self, m, n, p, prompt_length: int = 1):
        self.m, self.n, self.p = (torch.tensor(table).log() for table in (m, n, p))
        self.prompt_length, self.forwards = prompt_length, 0
        super().__init__(SimpleNamespace(config=SimpleNamespace(resample=ResampleConfig().as_dict())))

    def forward(self, rows: Rows, cache: SlotCache) -> Tensor:
        self.forwards += 1
        tokens = rows.tokens
        distributions = torch.where((rows.offset == -1)[..., None], self.p[tokens], self.n[tokens])
        first = (rows.positions == self.prompt_length - 1) & (rows.offset == 1)
        return torch.where(first[..., None], self.m, distributions)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def sample_table(decoder, tables, batch_size: int, new_tokens: int, seed: int = 0, greedy: bool = False):
    """Run ``decoder`` on a TableEngine; the finished sequences, each from the prompt [0]."""
    sequences = [Sequence(i, [0], 1 + new_tokens, torch.Generator().manual_seed(seed + i)) for i in range(batch_size)]
    distribution = LogitsPipeline(LogitsProcessorList(), not greedy, None, batch_size)
    decode(TableEngine(*tables), decoder, Batch(sequences, distribution, Stopping()), SlotCache(0, batch_size))
    return sequences
