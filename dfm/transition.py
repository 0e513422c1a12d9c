"""Few-step distillation: a flow model learns to do in one step what its frozen teacher does in several.

Transition Models (arXiv 2509.04394) on tokens. A model is told two times, t and s, and shows in one forward what stands at
time s. The best such step that draws its tokens independently is fixed by the marginals p(x^i | x_t), whatever s is; so the
model is also told a random number for each masked token, and its teacher takes its tokens by the same numbers: given all
of them the teacher's text is (nearly) one text, which independent tokens can follow. Averaged over the numbers they are
a mixture, as in arXiv 2410.08709. What the model does not make out of the numbers stays random in its output, so its
marginals are the teacher's in any case. Shapes: B rows of L tokens, N tokens that are asked for.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.forward.noise_level import TRANSITION_ROWS, add_noise_level_rows, noise_levels, transition_levels
from decoding.inputs.checks import check_count, check_range
from decoding.training.objective import RowsPerToken
from decoding.training.packed import Packing, find_loss_mask, in_chunks, next_token_losses
from dfm.flow_config import FlowTraits
from dfm.objective import FlowObjective, NoisyBatch
from dfm.paths.mixture import MixturePath


@dataclass(frozen=True)
class TransitionObjective(FlowObjective):
    """Cross-entropy in nats of the tokens that the teacher shows between t and s, and the flow loss where no step is told.

    The teacher is the model as it is when training begins: a flow model of masks, or one of set-block training.

    teacher_steps: forwards of the teacher for one of the model's; neighbouring tokens are shown in different ones.
    to_the_end: share of the texts (or blocks) whose step leads to s = 1; else s is uniform in (t, 1).
    without_step: share of them that are told t alone and learn from the data as a flow model does.

    Metrics: ``transition_loss`` (of the tokens of steps), ``flow_loss`` (of those without), and with blocks ``ntp_loss``.
    """

    tags = ("discrete-flow-matching", "distillation")

    teacher_steps: int = 8
    to_the_end: float = 0.5
    without_step: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        check_count("teacher_steps", self.teacher_steps)
        check_range("to_the_end", self.to_the_end, 0, 1)
        check_range("without_step", self.without_step, 0, 1, include_high=False)
        only: dict[str, tuple[Any, ...]] = {
            "source": ("mask",),
            "loss": ("cross_entropy",),
            "time_input": (None, "additive"),
            "gated": (False,),
        }
        for name, values in only.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {values[0]!r} for transitions, got {getattr(self, name)!r}")

    @property
    def takes_level(self) -> bool:
        return True

    def traits(self, model) -> FlowTraits:
        return replace(super().traits(model), transition=True)

    def for_tuning(self, kind: str) -> "TransitionObjective":
        if kind != "full":
            raise ValueError(f"{kind} trains no rows that tell a step, which {type(self).__name__} needs; use full")
        return self

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.check_teacher(model)
        # Not a field: two objectives of the same settings are the same, whichever models they teach.
        object.__setattr__(self, "teacher", deepcopy(model).eval().requires_grad_(False))
        add_noise_level_rows(model, TRANSITION_ROWS)

    def check_teacher(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless ``model`` was trained on this objective's noise."""
        sizes = getattr(model.generation_config, "trained_block_sizes", None)
        if getattr(model.config, "flow", None) is None and not sizes:
            raise ValueError("model must be a flow model or one with mask rows: it is the teacher; train it first")
        traits = FlowTraits.of(model.config)
        for name in ("source", "shift"):
            if getattr(traits, name) != getattr(self, name):
                raise ValueError(f"{name} must be {getattr(traits, name)!r}, as the model, got {getattr(self, name)!r}")
        if traits.transition:
            raise ValueError("model must be one that was not taught transitions yet")

    def rows_per_token(self) -> RowsPerToken:
        rows = super().rows_per_token()
        taught = self.teacher_steps * (1 - self.without_step)
        return rows._replace(constant=rows.constant + taught * rows.trained, taught=rows.labelled)

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        loss_mask = find_loss_mask(batch, packing)
        blocks, path = self._blocks(packing, loss_mask), self.path(model)
        noisy = self._noise(tokens, packing, loss_mask, blocks, path)
        unit = self._start(packing) if blocks is None else blocks.start
        until, steps = self._targets(noisy.time, unit)
        number = torch.where(noisy.asked, torch.rand(tokens.shape).to(tokens.device), 0)
        kappa, target = (path.scheduler.kappa(time) for time in (noisy.time, until))
        reveal = ((target - kappa) / (1 - kappa)).clamp(0, 1)
        shown = noisy.asked & steps & (torch.rand(tokens.shape, dtype=reveal.dtype).to(tokens.device) < reveal)
        taught = self._teach(packing, blocks, noisy, path, shown, number, reveal)

        levels = noise_levels(kappa, ~noisy.free)
        levels = torch.where(steps, transition_levels(levels, target, number), levels)
        states, clean = self._run(model, packing, blocks, noisy, path, levels)
        asked = torch.where(steps, shown, noisy.asked)
        losses = self._losses(model, states, replace(noisy, clean=taught, asked=asked), path)
        of_step = shown[asked]
        metrics: dict[str, Tensor | int] = {}
        for name, part in (("transition_loss", losses[of_step]), ("flow_loss", losses[~of_step])):
            if len(part):
                metrics[name] = part.detach().mean()
        total, count = losses.sum(), losses.numel()
        if clean is not None and self.ntp_weight:
            ntp = next_token_losses(model, clean, tokens, packing, loss_mask)
            metrics["ntp_loss"] = ntp.detach().mean()
            total, count = total + self.ntp_weight * ntp.sum(), count + ntp.numel()
        metrics["num_targets"] = count
        return total / max(1, count), metrics

    def _targets(self, time: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """s [B, L] float64 in (t, 1], and which tokens are told a step [B, L] bool: the same for all tokens of a unit."""
        drawn = torch.rand(3, *time.shape, dtype=torch.float64).to(time.device)
        far, share, none = (part.gather(1, unit) for part in drawn)
        until = torch.where(far < self.to_the_end, 1.0, time + (1 - time) * (1 - share))
        return until, none >= self.without_step

    @torch.no_grad()
    def _teach(self, packing, blocks, noisy: NoisyBatch, path: MixturePath, shown, number, reveal) -> Tensor:
        """The text [B, L] with the teacher's tokens where ``shown`` [B, L] bool; elsewhere the clean one."""
        teacher = getattr(self, "teacher", None)
        if teacher is None:
            raise ValueError("prepare must be called before training: it keeps the teacher")
        teacher.to(noisy.clean.device)
        text, kappa = noisy.noisy, path.scheduler.kappa(noisy.time)
        for i in range(self.teacher_steps):
            where = shown & (packing.index % self.teacher_steps == i)
            if not where.any():
                continue
            time = path.scheduler.inverse(kappa + (1 - kappa) * reveal * i / self.teacher_steps)
            states, _ = self._run(teacher, packing, blocks, replace(noisy, noisy=text, time=time), path)
            tokens = self._taken(teacher, states[where], number[where], path)
            text = text.masked_scatter(where, tokens)
        return torch.where(shown, text, noisy.clean)

    def _taken(self, teacher, states: Tensor, number: Tensor, path: MixturePath) -> Tensor:
        """The teacher's tokens [N] for hidden states [N, D] and the numbers [N]."""
        head, never = teacher.get_output_embeddings(), [*super().traits(teacher).excluded, path.source.mask_id]

        def take(states: Tensor, number: Tensor) -> Tensor:
            logits = head(states).float()
            logits[:, never] = -torch.inf
            return token_of_number(logits, number)

        return in_chunks(take, teacher.config.vocab_size, states, number)


def token_of_number(logits: Tensor, number: Tensor) -> Tensor:
    """Tokens [N] by inverse CDF of ``logits`` [N, V] at numbers [N] in [0, 1), from the likeliest token down.

    In that order a small number means the likeliest token whatever it is, which a network learns sooner than a place
    among ids.

    >>> token_of_number(torch.tensor([[0.2, 0.5, 0.3]]).log().repeat(3, 1), torch.tensor([0.4, 0.6, 0.9])).tolist()
    [1, 2, 0]
    """
    ordered, index = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    place = (ordered.cumsum(-1) <= number.double()[:, None]).sum(-1, keepdim=True)
    return index.gather(-1, place.clamp_max(logits.shape[-1] - 1))[:, 0]
