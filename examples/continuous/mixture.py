"""A mixture of round Gaussians in the plane: exact velocity, denoiser and posterior on the path x_t = t z + (1 - t) eps.

t = 0 is noise, t = 1 data. Shapes: N points [N, 2], K components.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """weights [K], means [K, 2], variance of every component."""

    weights: Tensor
    means: Tensor
    variance: float

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 2]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
        return self.means[chosen] + self.variance**0.5 * noise

    def responsibilities(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """p(component | alpha z + sigma eps = x) [N, K]."""
        spread = alpha**2 * self.variance + sigma**2
        square = (x[:, None] - alpha * self.means).square().sum(-1)
        return (self.weights.log() - square / (2 * spread)).softmax(-1)

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[z | x_t = x] [N, 2]."""
        alpha = torch.as_tensor(t, dtype=x.dtype)
        sigma = 1 - alpha
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        each = self.means + gain * (x[:, None] - alpha * self.means)
        return (self.responsibilities(x, alpha, sigma)[..., None] * each).sum(1)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[z - eps | x_t = x] [N, 2], for t < 1; D = x + (1 - t) u."""
        return (self.denoise(x, t) - x) / (1 - torch.as_tensor(t, dtype=x.dtype))


def four_corners() -> Mixture:
    """Unequal weights on a square."""
    corners = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]], dtype=torch.float64)
    return Mixture(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), corners, 0.1)


def standard_noise(count: int, generator: torch.Generator) -> Tensor:
    """eps [count, 2]."""
    return torch.randn(count, 2, dtype=torch.float64, generator=generator)


def sliced_distance(a: Tensor, b: Tensor, directions: int = 32) -> float:
    """Mean over directions of the distance (W1) between two clouds of as many points, projected on each."""
    angles = torch.arange(directions, dtype=a.dtype) * torch.pi / directions
    axes = torch.stack([angles.cos(), angles.sin()])
    return ((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean().item()
