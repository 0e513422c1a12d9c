"""Generator matching: a jump process, a flow, and both at once, with the same marginals (arXiv 2410.20587).

Data are points z_k of the plane; given z every coordinate is N(t z, (1 - t)^2). In u = (x - t z) / (1 - t) its jumps are, from
the general rule "leave where the density falls, land where it rises",

    rate      [u^2 - u z - 1]_+ / (1 - t)          landing density of u, at every t   [1 + u z - u^2]_+ N(u; 0, 1)

The generator of the data is the posterior mean of these; a share of it and the rest of the flow's velocity
superpose to a process with the same marginals again.
"""

from dataclasses import dataclass

import torch
from mixture import sliced_distance
from torch import Tensor


@dataclass(frozen=True)
class Points:
    """weights [K], places [K, 2]."""

    weights: Tensor
    places: Tensor

    def sample(self, count: int, t: float, generator: torch.Generator) -> Tensor:
        """X_t [count, 2]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
        return t * self.places[chosen] + (1 - t) * noise

    def posterior(self, x: Tensor, t: float) -> Tensor:
        """p(z_k | X_t = x) [N, K]."""
        square = (x[:, None] - t * self.places).square().sum(-1)
        return (self.weights.log() - square / (2 * (1 - t) ** 2)).softmax(-1)


def jump_rate(x: Tensor, z: Tensor, t: float) -> Tensor:
    """Given z, of one coordinate."""
    u = (x - t * z) / (1 - t)
    return (u * u - u * z - 1).clamp_min(0) / (1 - t)


def landing_quantiles(z: Tensor, count: int = 2000) -> Tensor:
    """[.., count] values of u at evenly spaced quantiles of the landing density given z [..]."""
    root = (z * z + 4).sqrt()
    low, high = (z - root) / 2, (z + root) / 2
    u = low[..., None] + (high - low)[..., None] * torch.linspace(0, 1, 4 * count, dtype=z.dtype)
    mass = ((1 + u * z[..., None] - u * u).clamp_min(0) * (-u * u / 2).exp()).cumsum(-1)
    wanted = (torch.arange(count, dtype=z.dtype) + 0.5) / count * mass[..., -1:]
    return u.gather(-1, torch.searchsorted(mass, wanted).clamp_max(4 * count - 1))


def simulate(data: Points, count: int, jumps: float, steps: int, end: float, generator: torch.Generator) -> Tensor:
    """X_end [count, 2] in Euler steps, with the share ``jumps`` of the jump process and the rest of the flow."""
    x, h = torch.randn(count, 2, dtype=torch.float64, generator=generator), end / steps
    quantiles = landing_quantiles(data.places)  # [K, 2, Q]
    for i in range(steps):
        t = i * h
        share = data.posterior(x, t)
        flow = (share @ data.places - x) / (1 - t)
        rates = share[..., None] * jump_rate(x[:, None], data.places, t)  # [N, K, 2]
        moved = x + h * (1 - jumps) * flow
        for axis in range(2):
            rate = rates[..., axis].sum(1)
            leaves = torch.rand(count, dtype=x.dtype, generator=generator) < -torch.expm1(-h * jumps * rate)
            if not leaves.any():
                continue
            towards = torch.multinomial(rates[leaves, :, axis], 1, generator=generator)[:, 0]
            place = torch.randint(quantiles.shape[-1], (len(towards),), generator=generator)
            moved[leaves, axis] = t * data.places[towards, axis] + (1 - t) * quantiles[towards, axis, place]
        x = moved
    return x


def three_points() -> Points:
    places = torch.tensor([[1.0, 0.5], [-0.8, 0.9], [0.1, -1.0]], dtype=torch.float64)
    return Points(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), places)


def main(count: int = 10_000, steps: int = 400, end: float = 0.97) -> dict[float, float]:
    """Distance to X_end of the flow, of half and half, and of jumps alone, beside that of two exact samples."""
    data, generator = three_points(), torch.Generator().manual_seed(0)
    truth, other = (data.sample(count, end, generator) for _ in range(2))
    print(f"two exact samples: {sliced_distance(truth, other):.4f}")
    found = {}
    for jumps in (0.0, 0.5, 1.0):
        found[jumps] = sliced_distance(simulate(data, count, jumps, steps, end, generator), truth)
        print(f"{jumps:.0%} jumps: {found[jumps]:.4f}")
    return found


if __name__ == "__main__":
    main()
