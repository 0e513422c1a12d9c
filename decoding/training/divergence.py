"""Losses of drafts against the model's own next-token distribution, with a backward pass that keeps two matrices.

Shapes: N rows, V vocabulary. p is the distribution that drafts are verified by, q the one that they are drawn from. A draft
is accepted with probability alpha = sum_v min(p_v, q_v) = 1 - TV(p, q), so that is what training is for; KL has a
gradient also where alpha is almost none.

Sources: LK losses (arXiv 2602.23881): lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha) for each token, and -log alpha.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Divergence = Literal["kl", "tv", "hybrid", "nla"]
DIVERGENCES = ("kl", "tv", "hybrid", "nla")
RATE = 3.0  # of the hybrid, as published


def draft_losses(student: Tensor, teacher: Tensor, labels: Tensor, kind: Divergence) -> Tensor:
    """[N, 3]: cross-entropy of ``labels`` [N] under q, the divergence ``kind`` of q from p, and alpha, without gradient.

    student, teacher: logits [N, V] of q and p; p has no gradient. Both losses in nats but for "tv", which is a probability.
    """
    return _DraftLosses.apply(student, teacher, labels, kind)  # type: ignore[no-any-return]


class _DraftLosses(torch.autograd.Function):
    """Autograd would keep seven matrices [N, V] for the same gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, kind: Divergence) -> Tensor:  # type: ignore[override]
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        cross_entropy = -log_q.gather(-1, labels[:, None])[:, 0]
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)  # where p is 0 the logarithm may be infinite
        q = log_q.exp()
        tv = (q - p).abs().sum(-1) / 2
        alpha = 1 - tv
        share = _share_of_kl(alpha, kind)
        if kind == "nla":
            loss = -_at_least_tiny(alpha).log()
        else:
            loss = share * kl + (1 - share) * tv
        ctx.kind = kind
        ctx.save_for_backward(q, p, labels, alpha)
        return torch.stack([cross_entropy, loss, alpha], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        q, p, labels, alpha = ctx.saved_tensors
        of_cross_entropy, of_loss, _ = gradient[..., None].unbind(1)  # each [N, 1]
        share = _share_of_kl(alpha, ctx.kind)[:, None]
        of_kl, of_tv = share * of_loss, (1 - share) * of_loss
        if ctx.kind == "nla":
            of_tv = of_tv / _at_least_tiny(alpha)[:, None]
        # dTV / dlogits = q (s - sum q s) with s = sign(q - p) / 2
        signed = (q - p).sign_().mul_(q).mul_(of_tv / 2)
        total = signed.sum(-1, keepdim=True)
        found = q * (of_cross_entropy + of_kl - total) + signed - of_kl * p
        found.scatter_add_(1, labels[:, None], -of_cross_entropy)
        return found, None, None, None


def _share_of_kl(alpha: Tensor, kind: Divergence) -> Tensor:
    """[N]: 1 where the loss is KL, 0 where it is TV or a function of it."""
    if kind == "hybrid":
        return (-RATE * alpha).exp()
    return torch.full_like(alpha, float(kind == "kl"))


def _at_least_tiny(alpha: Tensor) -> Tensor:
    return alpha.clamp_min(torch.finfo(alpha.dtype).tiny ** 0.5)
