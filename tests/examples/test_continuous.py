"""The worked examples in the plane: each against what is known exactly of it, and each short and on its own."""

import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "continuous"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
DOUBLE = torch.float64


@pytest.fixture
def example(monkeypatch):
    """``example(name)``: the module of that file, which imports its neighbours by name as it does when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in NAMES:
            del sys.modules[name]


def points(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_each_is_one_short_file_of_torch_alone(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 150
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert {name.partition(".")[0] for name in imported} <= {"torch", "math", "dataclasses", "itertools", "mixture"}
    assert name == "mixture" or f"`{name}.py`" in (FOLDER / "README.md").read_text()


def test_ns_solvers_contain_euler_and_midpoint(example):
    ns = example("ns_solver")
    velocity, x = example("mixture").four_corners().velocity, points(50)
    for steps in (2, 4, 8, 16):
        with torch.no_grad():
            assert (ns.NSSolver.euler(steps)(velocity, x) - ns.euler_rule(velocity, x, steps)).abs().max() < 1e-12
            assert (ns.NSSolver.midpoint(steps)(velocity, x) - ns.midpoint_rule(velocity, x, steps)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="steps must be even for the midpoint rule, got 3"):
        ns.NSSolver.midpoint(3)


def test_a_fitted_solver_is_nearer_on_starts_that_it_has_not_seen(example, capsys):
    for row in example("ns_solver").main(count=100, steps=(4,), iterations=30):
        assert row["fitted psnr"] > row["psnr"] + 5, row
    assert "4 steps from euler" in capsys.readouterr().out


def test_fewer_than_200_numbers(example):
    solver = example("ns_solver").NSSolver(16)
    lower = 16 * 17 // 2
    assert solver.gaps.numel() + solver.a.numel() + lower == 16 * (16 + 5) // 2 < 200
    times = solver.times()
    assert times[0] == 0 and (times.diff() > 0).all() and times[-1] < 1


def test_one_inner_step_of_glass_is_ddim(example):
    glass, data = example("glass_flow"), example("mixture").four_corners()
    x, t, s = points(20), 0.3, 0.6
    for rho in (-0.3, 0.4, 1.0):
        found = glass.transition(data, x, t, s, rho, 1, torch.Generator().manual_seed(1))
        noise = torch.randn(20, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        gamma = rho * (1 - s) / (1 - t)
        wanted = gamma * x + (s - gamma * t) * data.denoise(x, t) + (1 - s) * (1 - rho**2) ** 0.5 * noise
        assert (found - wanted).abs().max() < 1e-12


def test_glass_transitions_become_exact(example):
    rows = example("glass_flow").main(count=4000, inner_steps=(4, 40))
    for coarse, fine in zip(rows[::2], rows[1::2], strict=True):
        assert fine["marginal"] < 0.06 and fine["given"] < 0.12, fine
        assert coarse["given"] > 1.5 * fine["given"]


def test_differences_that_are_drawn_need_no_short_steps(example):
    matching, data = example("difference_matching"), example("mixture").four_corners()
    one, four = matching.main(count=4000, steps=(1, 4), head_steps=16)
    for row in (one, four):
        assert row["exact"] < 0.06 and row["head"] < 0.1 and row["flow"] > 0.15
    x = points(30)
    for t in (0.0, 0.4, 0.9):  # in the mean, a step is Euler's
        assert (matching.mean_difference(data, x, t) - data.velocity(x, t)).abs().max() < 1e-12


def test_the_identity_of_transition_models(example):
    model, mean = example("transition_model"), torch.tensor([0.7, -0.3], dtype=DOUBLE)

    def exact(x, t, r):
        return model.gaussian_average_velocity(mean, 0.4, x, t, r)

    def velocity(x, t):
        return model.gaussian_velocity(mean, 0.4, x, t)

    x, r = points(40), torch.full((40, 1), 0.2, dtype=DOUBLE)
    t = torch.linspace(0.3, 0.95, 40, dtype=DOUBLE)[:, None]
    assert model.identity_error(exact, velocity, x, t, r).abs().max() < 1e-10
    assert model.identity_error(lambda x, t, r: velocity(x, t), velocity, x, t, r).abs().max() > 0.1
    middle = (t + r) / 2  # two steps are one
    half = x - (t - middle) * exact(x, t, middle)
    assert (half - (middle - r) * exact(half, middle, r) - (x - (t - r) * exact(x, t, r))).abs().max() < 1e-12


def test_a_transition_model_is_trained_by_it(example):
    model = example("transition_model")
    truth, noise = (
        example("mixture").four_corners().sample(2000, torch.Generator().manual_seed(1)).float(),
        points(2000),
    )
    distance = example("mixture").sliced_distance
    before, after = (distance(model.sample(model.train(steps), noise.float(), 2), truth) for steps in (1, 400))
    assert after < 0.7 < 1.0 < before


def test_jumps_and_flow_have_the_same_marginals(example):
    found = example("jump_and_flow").main(count=3000, steps=150, end=0.9)
    assert set(found) == {0.0, 0.5, 1.0} and max(found.values()) < 0.05


def test_jumps_leave_where_the_density_falls(example):
    """rate = [dp/dt]_- / p, and the jumps of a short time land where it rises."""
    jump, t, z = example("jump_and_flow"), 0.4, torch.tensor(0.7, dtype=DOUBLE)
    x = torch.linspace(-3, 3, 2001, dtype=DOUBLE)

    def log_density(t):
        return -((x - t * z) ** 2) / (2 * (1 - t) ** 2) - torch.log(1 - t)

    _, slope = torch.func.jvp(log_density, (torch.tensor(t, dtype=DOUBLE),), (torch.ones((), dtype=DOUBLE),))
    assert (jump.jump_rate(x, z, t) - (-slope).clamp_min(0)).abs().max() < 1e-9
    rising = log_density(torch.tensor(t, dtype=DOUBLE)).exp() * slope.clamp_min(0)
    landed = t * z + (1 - t) * jump.landing_quantiles(z)
    assert abs((x * rising).sum() / rising.sum() - landed.mean()) < 2e-3


def test_averaging_makes_the_field_exact(example):
    found = example("wallpaper_flow").main(count=1500, steps=40)
    for (_, averaged), distance in found.items():
        assert distance < 0.04 if averaged else distance > 0.9


@pytest.mark.parametrize("name", ["p2", "pm", "p4", "p4m"])
def test_symmetry_under_the_group(example, name):
    wallpaper = example("wallpaper_flow")
    group = wallpaper.GROUPS[name]
    assert len(group.rotations) == {"p2": 2, "pm": 2, "p4": 4, "p4m": 8}[name]
    weights = points(2, 3)

    def network(crystal):  # sees all atoms and keeps no symmetry; its atoms are exchanged as its inputs are
        waves = (2 * torch.pi * crystal).sin()
        return waves @ weights + waves.mean(1, keepdim=True) ** 2 + 0.3

    crystal = group.orbit(torch.rand(5, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))
    field = group.average(network(crystal))
    assert torch.allclose(group.average_by_calls(network, crystal), field, atol=1e-12)
    for i, rotation in enumerate(group.rotations):  # every atom moves as the image of the first
        assert torch.allclose(field[:, i], field[:, 0] @ rotation.T, atol=1e-12)
    centre = group.orbit(torch.tensor([[0.5, 0.5]], dtype=DOUBLE))
    axis = group.average(network(centre))[0, 0]
    assert torch.allclose(axis, torch.tensor([0.0, axis[1].item() if name == "pm" else 0.0], dtype=DOUBLE), atol=1e-12)
