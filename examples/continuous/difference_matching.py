"""Difference Transition Matching: draw Y = X_1 - X_0 given X_t, then go a step of it (arXiv 2506.23589).

    X_t = (1 - t) X_0 + t X_1,   Y ~ p(Y | X_t),   X_{t + 1/T} = X_t + Y / T

Flow matching goes by the mean of Y. With Y drawn from its distribution the chain has the right marginals for every T, also
for T = 1. A large network would look at X_t once and a small head would draw Y by a flow of its own; here both are exact:
p(Y | X_t) is a mixture of Gaussians again, so the head is that mixture's own velocity.
"""

import torch
from mixture import Mixture, four_corners, sliced_distance, standard_noise
from torch import Tensor


def posterior(data: Mixture, x: Tensor, t: float) -> tuple[Tensor, Tensor, float]:
    """p(Y | X_t = x): weights [N, K], means [N, K, 2] and the variance of its components, for t < 1."""
    v, sigma = data.variance, 1 - t
    spread = t**2 * v + sigma**2
    weights = data.responsibilities(x, t, sigma)
    ends = data.means + t * v / spread * (x[:, None] - t * data.means)
    # X_0 = (x - t X_1) / (1 - t), so Y = (X_1 - x) / (1 - t).
    return weights, (ends - x[:, None]) / sigma, v * sigma**2 / spread / sigma**2


def head_velocity(weights: Tensor, means: Tensor, variance: float, y: Tensor, r: float) -> Tensor:
    """The flow from N(0, 1) to Y at r in [0, 1): E[Y - noise | r Y + (1 - r) noise = y] [N, 2]."""
    spread = r**2 * variance + (1 - r) ** 2
    square = (y[:, None] - r * means).square().sum(-1)
    share = (weights.log() - square / (2 * spread)).softmax(-1)[..., None]
    end = (share * (means + r * variance / spread * (y[:, None] - r * means))).sum(1)
    return (end - y) / (1 - r)


def draw_by_head(data: Mixture, x: Tensor, t: float, head_steps: int, generator: torch.Generator) -> Tensor:
    """Y [N, 2] by the midpoint rule on the head's flow."""
    weights, means, variance = posterior(data, x, t)
    y, h = standard_noise(len(x), generator), 1 / head_steps
    for i in range(head_steps):
        half = y + h / 2 * head_velocity(weights, means, variance, y, i * h)
        y = y + h * head_velocity(weights, means, variance, half, (i + 0.5) * h)
    return y


def draw_exactly(data: Mixture, x: Tensor, t: float, generator: torch.Generator) -> Tensor:
    """Y [N, 2]: a component, then a Gaussian."""
    weights, means, variance = posterior(data, x, t)
    chosen = torch.multinomial(weights, 1, generator=generator)[..., None].expand(-1, -1, 2)
    return means.gather(1, chosen)[:, 0] + variance**0.5 * standard_noise(len(x), generator)


def mean_difference(data: Mixture, x: Tensor, t: float) -> Tensor:
    """E[Y | X_t = x] [N, 2]: the velocity of flow matching."""
    weights, means, _ = posterior(data, x, t)
    return (weights[..., None] * means).sum(1)


def chain(count: int, steps: int, draw, seed: int = 0) -> Tensor:
    """X_1 [count, 2] after T = ``steps`` transitions with Y = draw(x, t, generator)."""
    generator = torch.Generator().manual_seed(seed)
    x = standard_noise(count, generator)
    for i in range(steps):
        x = x + draw(x, i / steps, generator) / steps
    return x


def main(count: int = 20_000, steps: tuple[int, ...] = (1, 2, 4, 16), head_steps: int = 32) -> list[dict[str, float]]:
    """Distance to the data of flow matching, of exact differences, and of those that the head draws."""
    data = four_corners()
    truth = data.sample(count, torch.Generator().manual_seed(1))
    kinds = {
        "flow": lambda x, t, generator: mean_difference(data, x, t),
        "exact": lambda x, t, generator: draw_exactly(data, x, t, generator),
        "head": lambda x, t, generator: draw_by_head(data, x, t, head_steps, generator),
    }
    rows = []
    for n in steps:
        row: dict[str, float] = {"steps": n}
        row |= {name: sliced_distance(chain(count, n, draw), truth) for name, draw in kinds.items()}
        rows.append(row)
        print(f"T = {n:2d}: " + ", ".join(f"{name} {row[name]:.3f}" for name in kinds))
    return rows


if __name__ == "__main__":
    main()
