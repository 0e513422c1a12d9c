"""GLASS flows: random transitions X_t -> X_t' of a chosen correlation, by an ODE inside each (arXiv 2509.25170).

Given z the pair has the path's marginals and noise of correlation rho. One call of the ordinary denoiser answers for two
observations of z, through the single time t* that knows as much. rho = alpha_t sigma_t' / (sigma_t alpha_t') is the transition
of DDPM; rho = 1 shares the noise. alpha_t = t, sigma_t = 1 - t; one inner step is DDIM's.
"""

import torch
from mixture import Mixture, four_corners, sliced_distance, standard_noise
from torch import Tensor


def ddpm_correlation(t: float, s: float) -> float:
    return t * (1 - s) / ((1 - t) * s)


def denoise_two(data: Mixture, x: Tensor, bar: Tensor, mu: Tensor, covariance: Tensor) -> Tensor:
    """E[z | x, bar] [N, 2], where (x, bar) = mu z + noise of ``covariance`` [2, 2], by one call of the denoiser."""
    weights = torch.linalg.solve(covariance, mu)
    q = (weights * mu).sum()
    enough = (weights[0] * x + weights[1] * bar) / q  # as z + noise of variance 1 / q
    time = 1 / (1 + (1 / q).sqrt())
    return data.denoise(time * enough, time)


def transition(
    data: Mixture, x: Tensor, t: float, s: float, rho: float, inner_steps: int, generator: torch.Generator
) -> Tensor:
    """X_s [N, 2] given X_t = x, in ``inner_steps`` Euler steps of the inner flow."""
    sigma_t, sigma_s = 1 - t, 1 - s
    gamma = rho * sigma_s / sigma_t
    far, last, first = s - gamma * t, sigma_s * (1 - rho**2) ** 0.5, 1.0
    bar = gamma * x + first * standard_noise(len(x), generator)
    for i in range(inner_steps):
        r = i / inner_steps
        scale, width = r * far, (1 - r) * first + r * last
        mu = torch.tensor([t, scale + gamma * t], dtype=x.dtype)
        cross = gamma * sigma_t**2
        covariance = torch.tensor([[sigma_t**2, cross], [cross, width**2 + gamma**2 * sigma_t**2]], dtype=x.dtype)
        w1 = (last - first) / width
        w2 = far - scale * w1
        drift = w1 * bar + w2 * denoise_two(data, x, bar, mu, covariance) - gamma * w1 * x
        bar = bar + drift / inner_steps
    return bar


def exact_pair(data: Mixture, count: int, t: float, s: float, rho: float, generator: torch.Generator):
    """(X_t, X_s), both [count, 2]: from z and correlated noise."""
    z, shared, own = data.sample(count, generator), *(standard_noise(count, generator) for _ in range(2))
    return t * z + (1 - t) * shared, s * z + (1 - s) * (rho * shared + (1 - rho**2) ** 0.5 * own)


def exact_moments(data: Mixture, x: Tensor, t: float, s: float, rho: float) -> tuple[Tensor, Tensor]:
    """Mean [N, 2] and mean square [N, 2] of X_s given X_t = x: in each component the pair is Gaussian."""
    v, sigma_t, sigma_s = data.variance, 1 - t, 1 - s
    here, there = t**2 * v + sigma_t**2, s**2 * v + sigma_s**2
    cross = t * s * v + rho * sigma_t * sigma_s
    share = data.responsibilities(x, t, sigma_t)[..., None]
    means = s * data.means + cross / here * (x[:, None] - t * data.means)
    return (share * means).sum(1), (share * (means**2 + there - cross**2 / here)).sum(1)


def main(count: int = 20_000, inner_steps: tuple[int, ...] = (1, 4, 50)) -> list[dict[str, float]]:
    """Errors of the marginal at s, and of the mean and mean square of X_s given one X_t."""
    data, t, s = four_corners(), 0.3, 0.6
    rows = []
    for rho in (-0.3, 0.0, ddpm_correlation(t, s), 0.4, 0.9, 1.0):
        for steps in inner_steps:
            generator = torch.Generator().manual_seed(0)
            x, wanted = exact_pair(data, count, t, s, rho, generator)
            found = transition(data, x, t, s, rho, steps, generator)
            point = torch.tensor([[0.4, 0.1]], dtype=torch.float64)
            behind = transition(data, point.expand(count, 2), t, s, rho, steps, generator)
            mean, square = exact_moments(data, point, t, s, rho)
            error = max(
                (behind.mean(0) - mean).abs().max().item(), (behind.square().mean(0) - square).abs().max().item()
            )
            row = {"rho": rho, "steps": steps, "marginal": sliced_distance(found, wanted), "given": error}
            rows.append(row)
            print(f"rho {rho:5.2f}, {steps:2d} steps: marginal {row['marginal']:.3f}, given X_t {error:.3f}")
    return rows


if __name__ == "__main__":
    main()
