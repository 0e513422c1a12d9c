"""Losses of drafts: the formulas, and a backward pass that is autograd's."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from decoding.training.divergence import DIVERGENCES, draft_losses


def by_autograd(student, teacher, labels, kind):
    """The same losses, written down plainly."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    alpha = torch.minimum(p, q).sum(-1)
    kl = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    share = (-3 * alpha.detach()).exp()
    loss = {"kl": kl, "tv": 1 - alpha, "nla": -alpha.log(), "hybrid": share * kl + (1 - share) * (1 - alpha)}[kind]
    return torch.stack([cross_entropy(student, labels, reduction="none"), loss], dim=1), alpha


@pytest.fixture
def rows():
    """Logits of q and p, labels, and a weight for each loss; p excludes some tokens."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 40, 23, generator=generator, dtype=torch.float64)).unbind()
    teacher[::3, 5] = -torch.inf
    labels = torch.randint(23, (40,), generator=generator)
    return student, teacher, labels, torch.rand(40, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_losses_and_gradients_are_those_of_autograd(rows, kind):
    student, teacher, labels, weights = rows
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = draft_losses(ours, teacher, labels, kind)
    teacher = teacher.masked_fill(teacher.isinf(), -1e30)  # autograd would make nan of 0 times infinity
    expected, alpha = by_autograd(plain, teacher, labels, kind)
    torch.testing.assert_close(found[:, :2], expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found[:, 2], alpha, atol=1e-12, rtol=1e-10)
    (found[:, :2] * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_draft_from_the_models_own_distribution_costs_nothing(rows, kind):
    student, _, labels, _ = rows
    student.requires_grad_()
    found = draft_losses(student, student.detach(), labels, kind)
    found[:, 1].sum().backward()
    assert found[:, 1].abs().max() < 1e-12 and (found[:, 2] - 1).abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["nla", "hybrid", "kl"])
def test_a_draft_that_is_never_accepted_has_a_finite_gradient(kind):
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    found = draft_losses(student, torch.tensor([[-200.0, 0.0, 200.0]]), torch.tensor([2]), kind)
    found[:, :2].sum().backward()
    assert found.isfinite().all() and student.grad.isfinite().all()
