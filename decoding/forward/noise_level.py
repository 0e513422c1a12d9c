"""Tell a model how much of its input is noise: a learned direction added to the token embeddings.

A level is an integer for each row: LEVELS times the share of data, 0 .. LEVELS, at a row that may be noise; GIVEN at a
row that is known to be clean though its neighbours are not; NONE for everything else, where nothing is added. The
directions are the last rows of the model's own embedding table, which ``config.noise_level_rows`` counts, so that a model
is saved and loaded by transformers alone. They are zero to begin with.
"""

import math

import torch
from torch import Tensor

LEVELS, GIVEN, NONE = 1000, 1001, -1
WAVES = 8  # cosines of the level, from the constant one on
ROWS = WAVES + 1  # and one for GIVEN


def noise_levels(kappa: Tensor, given: Tensor) -> Tensor:
    """Levels [B, R] from the share of data ``kappa`` [B] or [B, R] and ``given`` [B, R] bool.

    >>> noise_levels(torch.tensor([0.25]), torch.tensor([[True, False]])).tolist()
    [[1001, 250]]
    """
    kappa = kappa[:, None] if kappa.dim() == 1 else kappa
    return torch.where(given, GIVEN, (LEVELS * kappa).round().long())


def level_features(levels: Tensor) -> Tensor:
    """[B, R, ROWS] float32: cos(pi f k) for f = 0 .. WAVES - 1 at a level k, one at GIVEN, zeros at NONE."""
    share = levels.clamp(0, LEVELS)[..., None] / LEVELS
    waves = torch.cos(math.pi * torch.arange(WAVES, device=levels.device) * share)
    given = (levels == GIVEN)[..., None]
    noisy = ((levels >= 0) & (levels <= LEVELS))[..., None]
    return torch.cat([waves * noisy, given.float()], dim=-1)


def with_noise_level(model, tokens: Tensor, levels: Tensor | None) -> Tensor | None:
    """Input embeddings [B, R, D] of ``tokens`` at ``levels``, both [B, R]; None where the model takes no levels."""
    if levels is None or not getattr(model.config, "noise_level_rows", 0):
        return None
    embedding = model.get_input_embeddings()
    embedded, table = embedding(tokens), embedding.weight[-model.config.noise_level_rows :]
    return embedded + level_features(levels).to(embedded.dtype) @ table


def add_noise_level_rows(model) -> None:
    """Give ``model`` the rows of the level, zero; harmless if it has them. Adapters must be added after that."""
    if getattr(model.config, "noise_level_rows", 0):
        return
    first = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(first + ROWS, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[first:] = 0
    model.config.noise_level_rows = ROWS


def noise_level_ids(model) -> list[int]:
    """The ids of those rows, which are no tokens."""
    count = model.config.vocab_size
    return list(range(count - getattr(model.config, "noise_level_rows", 0), count))
