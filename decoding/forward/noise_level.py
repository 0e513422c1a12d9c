"""Tell a model how much of its input is noise: a learned direction added to the token embeddings.

A level is an integer for each row: LEVELS times the share of data, 0 .. LEVELS, at a row that may be noise; GIVEN at a
row that is known to be clean though its neighbours are not; NONE for everything else, where nothing is added. The
directions are the last rows of the model's own embedding table, which ``config.noise_level_rows`` counts, so that a model
is saved and loaded by transformers alone. They are zero to begin with.

A model of transitions (arXiv 2509.04394) has TRANSITION_ROWS of them: it is also told the level that a step leads to, and
a random number of the row. Both travel in the same integer, level + STRIDE (target + 1) + STRIDE^2 (number + 1); a level
alone says that there is no step.
"""

import math

import torch
from torch import Tensor

LEVELS, GIVEN, NONE = 1000, 1001, -1
WAVES = 8  # cosines of the level, from the constant one on
ROWS = WAVES + 1  # and one for GIVEN
TRANSITION_ROWS = ROWS + 2 * WAVES  # and cosines of the target and of the random number
STRIDE = LEVELS + 2


def noise_levels(kappa: Tensor, given: Tensor) -> Tensor:
    """Levels [B, R] from the share of data ``kappa`` [B] or [B, R] and ``given`` [B, R] bool.

    >>> noise_levels(torch.tensor([0.25]), torch.tensor([[True, False]])).tolist()
    [[1001, 250]]
    """
    kappa = kappa[:, None] if kappa.dim() == 1 else kappa
    return torch.where(given, GIVEN, (LEVELS * kappa).round().long())


def transition_levels(levels: Tensor, target: Tensor, number: Tensor) -> Tensor:
    """``levels`` [B, R] with the share of data ``target`` [B, R] of a step and numbers in [0, 1] of the rows, but for GIVEN.

    >>> transition_levels(torch.tensor([[250, GIVEN]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 0.0]])).tolist()
    [[1506256, 1001]]
    """
    steps = STRIDE * ((LEVELS * target).round().long() + 1) + STRIDE**2 * ((LEVELS * number).round().long() + 1)
    return torch.where(levels == GIVEN, levels, levels + steps)


def level_features(levels: Tensor, rows: int = ROWS) -> Tensor:
    """[B, R, rows] float32: cos(pi f k) for f = 0 .. WAVES - 1 at a level k, one at GIVEN, zeros at NONE.

    rows: with TRANSITION_ROWS the cosines of target and number follow, zeros where a level is told alone.
    """
    level, steps = levels % STRIDE, levels.clamp_min(0) // STRIDE
    given, noisy = levels == GIVEN, (levels >= 0) & (level <= LEVELS)
    parts = [_waves(level, noisy), given[..., None].float()]
    if rows == TRANSITION_ROWS:
        target, number = steps % STRIDE, steps // STRIDE
        parts += [_waves(target - 1, target > 0), _waves(number - 1, number > 0)]
    return torch.cat(parts, dim=-1)


def _waves(level: Tensor, where: Tensor) -> Tensor:
    share = level.clamp(0, LEVELS)[..., None] / LEVELS
    return torch.cos(math.pi * torch.arange(WAVES, device=level.device) * share) * where[..., None]


def with_noise_level(model, tokens: Tensor, levels: Tensor | None) -> Tensor | None:
    """Input embeddings [B, R, D] of ``tokens`` at ``levels``, both [B, R]; None where the model takes no levels."""
    if levels is None or not getattr(model.config, "noise_level_rows", 0):
        return None
    embedding, rows = model.get_input_embeddings(), model.config.noise_level_rows
    embedded, table = embedding(tokens), embedding.weight[-rows:]
    return embedded + level_features(levels, rows).to(embedded.dtype) @ table


def add_noise_level_rows(model, rows: int = ROWS) -> None:
    """Give ``model`` the rows of the level, zero, as far as it has none. Adapters must be added after that."""
    missing = rows - getattr(model.config, "noise_level_rows", 0)
    if missing <= 0:
        return
    first = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(first + missing, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[first:] = 0
    model.config.noise_level_rows = rows


def noise_level_ids(model) -> list[int]:
    """The ids of those rows, which are no tokens."""
    count = model.config.vocab_size
    return list(range(count - getattr(model.config, "noise_level_rows", 0), count))
