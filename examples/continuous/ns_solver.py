"""Non-stationary solvers: an ODE solver whose every coefficient is fitted to a frozen velocity (arXiv 2403.01329).

    0 = t_0 < t_1 < .. < t_n = 1,   U_j = u(x_j, t_j),   x_{i+1} = a_i x_0 + sum_{j <= i} b_ij U_j

Euler's and the midpoint rule are points of this family, and what a fit starts from. n (n + 5) / 2 + 1 numbers: fewer than
200 up to n = 16.
"""

import math

import torch
from mixture import four_corners, standard_noise
from torch import Tensor, nn


class NSSolver(nn.Module):
    """A solver of ``steps`` evaluations. gaps: logits of the lengths of the steps; a [n]; b [n, n], of which the lower
    triangle counts."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps
        self.gaps = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
        self.a = nn.Parameter(torch.ones(steps, dtype=torch.float64))
        self.b = nn.Parameter(torch.full((steps, steps), 1 / steps, dtype=torch.float64))

    @classmethod
    def euler(cls, steps: int) -> "NSSolver":
        """x_{i+1} = x_0 + (U_0 + .. + U_i) / n: the sum of all of Euler's steps."""
        return cls(steps)

    @classmethod
    def midpoint(cls, steps: int) -> "NSSolver":
        """n / 2 steps of length h = 2 / n: odd rows go the whole step with the velocity in its middle."""
        if steps % 2:
            raise ValueError(f"steps must be even for the midpoint rule, got {steps}")
        solver, h = cls(steps), 2 / steps
        with torch.no_grad():
            solver.b.zero_()
            for i in range(steps):
                solver.b[i, 1:i:2] = h
                solver.b[i, i] = h if i % 2 else h / 2
        return solver

    def times(self) -> Tensor:
        """t_0 .. t_{n-1}."""
        lengths = self.gaps.softmax(0)
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])

    def forward(self, velocity, x0: Tensor) -> Tensor:
        """x_n for the starts x0 [N, 2]."""
        times, x, found = self.times(), x0, []
        for i in range(self.steps):
            found.append(velocity(x, times[i]))
            x = self.a[i] * x0 + torch.einsum("j,jnd->nd", self.b[i, : i + 1], torch.stack(found))
        return x

    def fit(self, velocity, x0: Tensor, x1: Tensor, iterations: int = 40) -> "NSSolver":
        """Minimise the mean of log |x_n - x1|^2 (so raise the PSNR) over starts x0 and exact ends x1, both [N, 2].

        Where that is not lower in the end, the start is kept.
        """
        before = {name: value.clone() for name, value in self.state_dict().items()}
        first = self.loss(velocity, x0, x1).item()
        optimiser = torch.optim.LBFGS(self.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.loss(velocity, x0, x1)
            loss.backward()
            return loss

        optimiser.step(closure)
        if not self.loss(velocity, x0, x1).item() < first:
            self.load_state_dict(before)
        return self

    def loss(self, velocity, x0: Tensor, x1: Tensor) -> Tensor:
        return (self(velocity, x0) - x1).square().mean(-1).clamp_min(1e-20).log().mean()

    @torch.no_grad()
    def psnr(self, velocity, x0: Tensor, x1: Tensor) -> float:
        """Mean of -10 log10 MSE over starts, in dB for signals of size 1."""
        return -10 / math.log(10) * self.loss(velocity, x0, x1).item()


def midpoint_rule(velocity, x: Tensor, steps: int, end: float = 1.0) -> Tensor:
    """``steps`` evaluations of the ordinary midpoint rule, to compare with and, with many, for the truth."""
    h = 2 * end / steps
    for i in range(steps // 2):
        half = x + h / 2 * velocity(x, i * h)
        x = x + h * velocity(half, (i + 0.5) * h)
    return x


def euler_rule(velocity, x: Tensor, steps: int) -> Tensor:
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
    return x


def main(count: int = 500, steps: tuple[int, ...] = (4, 8), iterations: int = 100) -> list[dict[str, float]]:
    """PSNR on starts that no fit has seen."""
    velocity, generator = four_corners().velocity, torch.Generator().manual_seed(0)
    starts, fresh = standard_noise(count, generator), standard_noise(2 * count, generator)
    ends, truth = (midpoint_rule(velocity, x, 1000) for x in (starts, fresh))
    rows = []
    for n in steps:
        for name, solver in (("euler", NSSolver.euler(n)), ("midpoint", NSSolver.midpoint(n))):
            before = solver.psnr(velocity, fresh, truth)
            after = solver.fit(velocity, starts, ends, iterations).psnr(velocity, fresh, truth)
            rows.append({"steps": n, "start": name, "psnr": before, "fitted psnr": after})
            print(f"{n} steps from {name}: {before:.1f} dB -> {after:.1f} dB")
    return rows


if __name__ == "__main__":
    main()
