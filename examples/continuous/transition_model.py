"""Transition models: one network for the step between any two times (arXiv 2509.04394).

Their direction of time: x_t = (1 - t) x + t eps, from noise at t = 1 back to data, in steps t -> r with r < t:

    x_r = x_t - (t - r) F(x_t, t, r),     F = v - (t - r) dF/dt,     v = eps - x

F is the mean velocity between r and t. dF/dt follows the path; a difference of two forwards with the same x and eps takes the
place of a Jacobian product. r = t is flow matching, r = 0 a consistency model.
"""

import torch
from mixture import four_corners, sliced_distance, standard_noise
from torch import Tensor, nn

STEP = 0.005


def gaussian_average_velocity(mean: Tensor, variance: float, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The exact F for data N(mean, variance): its flow keeps (x - centre) / width, so x_r has a closed form. t > r."""

    def width(u: Tensor) -> Tensor:
        return ((1 - u) ** 2 * variance + u**2).sqrt()

    x_r = (1 - r) * mean + width(r) / width(t) * (x - (1 - t) * mean)
    return (x - x_r) / (t - r)


def gaussian_velocity(mean: Tensor, variance: float, x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x | x_t] for such data."""
    spread = (1 - t) ** 2 * variance + t**2
    gap = x - (1 - t) * mean
    return t / spread * gap - mean - (1 - t) * variance / spread * gap


def identity_error(function, velocity, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """F - v + (t - r) dF/dt [N, 2] along the flow, with the exact derivative."""
    v = velocity(x, t)
    value, slope = torch.func.jvp(lambda x, t: function(x, t, r), (x, t), (v, torch.ones_like(t)))
    return value - v + (t - r) * slope


class Network(nn.Module):
    """F(x, t, r), told t and t - r."""

    def __init__(self, width: int = 96):
        super().__init__()
        sizes = (2 + 4, width, width, width, 2)
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        between = [module for layer in layers[:-1] for module in (layer, nn.SiLU())]
        self.layers = nn.Sequential(*between, layers[-1])

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        gap = t - r
        return self.layers(torch.cat([x, t, (torch.pi * t).cos(), gap, (torch.pi * gap).cos()], dim=-1))


def draw_times(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t >= r [count, 1]: half of them equal, a tenth with r = 0 (section 3 of the paper)."""
    u = torch.rand(2, count, 1, generator=generator)
    kind = torch.rand(count, 1, generator=generator)
    t, r = u.amax(0), u.amin(0)
    return t, torch.where(kind < 0.5, t, torch.where(kind < 0.6, 0.0, r))


def loss(network: Network, x: Tensor, noise: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The mean of |F - target|^2. The paper divides each by its own size, which in two dimensions would move its minimum
    away from the mean of the targets."""
    v = noise - x
    with torch.no_grad():
        late, early = (t + STEP).clamp_max(1), (t - STEP).clamp_min(0)
        slope = network((1 - late) * x + late * noise, late, r) - network((1 - early) * x + early * noise, early, r)
        target = v - (t - r) * slope / (late - early)
    return (network((1 - t) * x + t * noise, t, r) - target).square().sum(-1).mean()


def train(steps: int, batch: int = 256, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network, data, generator = Network(), four_corners(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x, noise = data.sample(batch, generator).float(), torch.randn(batch, 2, generator=generator)
        value = loss(network, x, noise, *draw_times(batch, generator))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    return network


@torch.no_grad()
def sample(network: Network, x: Tensor, steps: int) -> Tensor:
    """Data [N, 2] from noise x [N, 2] in any number of steps."""
    for i in range(steps, 0, -1):
        t, r = (torch.full((len(x), 1), j / steps) for j in (i, i - 1))
        x = x - (t - r) * network(x, t, r)
    return x


def main(steps: int = 4000, count: int = 5000) -> dict[int, float]:
    """Distance to the data in 1 to 32 steps, by one network."""
    network, generator = train(steps), torch.Generator().manual_seed(1)
    truth = four_corners().sample(count, generator).float()
    noise = standard_noise(count, generator).float()
    found = {n: sliced_distance(sample(network, noise, n), truth) for n in (1, 2, 4, 8, 32)}
    print(", ".join(f"{n} steps: {distance:.3f}" for n, distance in found.items()))
    return found


if __name__ == "__main__":
    main()
