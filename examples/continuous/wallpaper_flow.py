"""Flow matching under a wallpaper group: noise with the symmetry, and a field made equivariant (arXiv 2509.23822).

A crystal is the orbit of one point of the flat torus under the group. The noise is the orbit of a uniform point, the path
the geodesic. Averaging over the group makes any field f equivariant, by one call instead of |G| where its input is symmetric:

    u(c)_i = 1/|G| sum_g R_g f(c)_{g^-1 i}

Data are a few crystals, so the exact field is known. The network stands in as that field plus an error that breaks the
symmetry; averaging removes it, and keeps every atom in its place of symmetry.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Operations x -> R x mod 1. rotations: [G, 2, 2], integer matrices with entries -1, 0, 1."""

    rotations: Tensor

    @classmethod
    def generated(cls, *generators: list[list[int]]) -> "Group":
        """All products of the generators."""
        found = [torch.eye(2, dtype=torch.float64)]
        for known in found:  # grows while it is walked
            for generator in generators:
                new = torch.tensor(generator, dtype=torch.float64) @ known
                if not any(torch.equal(new, old) for old in found):
                    found.append(new)
        return cls(torch.stack(found))

    def orbit(self, x: Tensor) -> Tensor:
        """[.., G, 2] images of x [.., 2]; atom i is the image under operation i."""
        return torch.einsum("gij,...j->...gi", self.rotations, x) % 1

    def permutations(self) -> Tensor:
        """[G (g), G (i)]: which atom g^-1 i is."""
        table = torch.zeros(len(self.rotations), len(self.rotations), dtype=torch.long)
        for g, i in product(range(len(self.rotations)), repeat=2):
            wanted = torch.linalg.inv(self.rotations[g]) @ self.rotations[i]
            table[g, i] = (self.rotations - wanted).abs().amax((1, 2)).argmin()
        return table

    def average(self, field: Tensor) -> Tensor:
        """The equivariant part [N, G, 2] of a field [N, G, 2] on orbits, from one call of it."""
        moved = torch.einsum("gij,ngkj->ngki", self.rotations, field[:, self.permutations()])
        return moved.mean(1)

    def average_by_calls(self, function, crystal: Tensor) -> Tensor:
        """The same for any input, by |G| calls: u(c) = 1/|G| sum_g R_g f(g^-1 c)."""
        back = torch.linalg.inv(self.rotations)
        parts = [r @ function((crystal @ b.T) % 1).mT for r, b in zip(self.rotations, back, strict=True)]
        return torch.stack(parts).mean(0).mT


GROUPS = {
    "p2": Group.generated([[-1, 0], [0, -1]]),
    "pm": Group.generated([[-1, 0], [0, 1]]),
    "p4": Group.generated([[0, -1], [1, 0]]),
    "p4m": Group.generated([[0, -1], [1, 0]], [[-1, 0], [0, 1]]),
}


def shortest(x: Tensor) -> Tensor:
    """The torus's logarithm: differences moved to [-1/2, 1/2)."""
    return (x + 0.5) % 1 - 0.5


def exact_field(x: Tensor, t: float, places: Tensor, weights: Tensor) -> Tensor:
    """The velocity [N, 2] at one atom x [N, 2] on the way from uniform noise to the points ``places`` [K, 2].

    Given the end c a point is uniform in a box around c with sides 1 - t, and goes straight to c.
    """
    ways = shortest(places - x[:, None])
    inside = (ways.abs() <= (1 - t) / 2 + 1e-12).all(-1)
    share = weights * inside
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-300)
    return (share[..., None] * ways).sum(1) / (1 - t)


def network(group: Group, crystal: Tensor, t: float, places: Tensor, weights: Tensor, error: float) -> Tensor:
    """[N, G, 2]: the exact field of the first atom carried to the others, and the same drift for all, which is wrong."""
    first = exact_field(crystal[:, 0], t, places, weights)
    field = torch.einsum("gij,nj->ngi", group.rotations, first)
    return field + error * torch.tensor([0.3, 0.2], dtype=field.dtype)


def sample(group: Group, x: Tensor, steps: int, places, weights, error: float, averaged: bool) -> Tensor:
    """Crystals [N, G, 2] from the noise orbits of x [N, 2], in Euler steps."""
    crystal = group.orbit(x)
    for i in range(steps):
        field = network(group, crystal, i / steps, places, weights, error)
        crystal = (crystal + (group.average(field) if averaged else field) / steps) % 1
    return crystal


def main(count: int = 4000, steps: int = 100) -> dict[tuple[str, bool], float]:
    """Total variation between the crystals that were reached and the weights of the data; what is off counts as wrong."""
    places = torch.tensor([[0.12, 0.31], [0.4, 0.22], [0.27, 0.45]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = {}
    for name in ("p2", "p4", "p4m"):
        for averaged in (False, True):
            x = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            ends = sample(GROUPS[name], x, steps, places, weights, 1.0, averaged)[:, 0]
            near = shortest(places - ends[:, None]).norm(dim=-1) < 1e-3
            shares = near.double().mean(0)
            found[name, averaged] = ((shares - weights).abs().sum() + 1 - shares.sum()).item() / 2
            print(f"{name}, {'averaged' if averaged else 'as it is'}: {found[name, averaged]:.3f}")
    return found


if __name__ == "__main__":
    main()
