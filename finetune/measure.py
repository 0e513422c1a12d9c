"""What fine-tuning is for, measured on held-out text: losses, acceptance of drafts, tokens per forward."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding import Objective, decoder_from_spec, find_mask_token
from decoding.forward.mask_token import has_mask_token
from decoding.inputs.checks import check_count
from decoding.training.blocks import BlockGrid
from decoding.training.copies import run_copies
from decoding.training.packed import Packing, find_loss_mask
from sbd.chains import expected_tau
from sbd.selector import draft_selector

CHUNK = 512  # rows whose distributions are held at once


@dataclass(frozen=True)
class Measure:
    """The ``measure`` key of a recipe: what is measured at each evaluation and for the model card.

    decoders: specs whose tokens per forward are measured; none are by default.
    block_size: of the masked blocks for which the acceptance of drafts is measured.
    rows: held-out rows for the objective's losses and the acceptance.
    prompts, prompt_tokens, max_new_tokens: decoding continues the first ``prompt_tokens`` tokens of the first
        ``prompts`` held-out rows, greedily.
    """

    decoders: tuple[str, ...] = ()
    block_size: int = 8
    rows: int = 16
    prompts: int = 4
    prompt_tokens: int = 16
    max_new_tokens: int = 64

    def __post_init__(self):
        object.__setattr__(self, "decoders", tuple(self.decoders))
        for spec in self.decoders:
            decoder_from_spec(spec)
        for name in ("block_size", "rows", "prompts", "prompt_tokens", "max_new_tokens"):
            check_count(f"measure.{name}", getattr(self, name))

    def __call__(self, model, objective: Objective, rows: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Figures of ``model`` on held-out ``rows`` (items of a PackedDataset): a flat dictionary for logs and cards."""
        was_training = model.training
        model.eval()
        batches = [{name: column[None].to(model.device) for name, column in row.items()} for row in rows]
        figures = objective_losses(model, objective, batches[: self.rows])
        if has_mask_token(model):
            accepted, figures["expected_tau"] = acceptance_of_drafts(model, batches[: self.rows], self.block_size)
            figures |= {f"acceptance_{offset}": value for offset, value in enumerate(accepted)}
        prompts, texts = [batch["input_ids"][:, : self.prompt_tokens] for batch in batches[: self.prompts]], {}
        form = model.config._attn_implementation
        model.set_attn_implementation("sdpa")  # FlexAttention compiles a kernel for every shape, and decoding has many
        for spec in ("ntp", *self.decoders) if self.decoders else ():
            speed, texts[spec] = tokens_per_forward(model, prompts, spec, self.max_new_tokens)
            figures[f"tokens_per_forward/{spec}"] = speed
            same = sum(torch.equal(ours, other) for ours, other in zip(texts[spec], texts["ntp"], strict=True))
            figures[f"same_text/{spec}"] = same / len(prompts)
        model.set_attn_implementation(form)
        model.train(was_training)
        return {name: round(value, 4) for name, value in figures.items()}


@torch.no_grad()
def objective_losses(model, objective: Objective, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """The objective's metrics on ``batches``, with the same masks at every call; means over targets, in nats."""
    sums, num_targets = {}, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches:
            loss, metrics = objective(model, batch)
            count = metrics.pop("num_targets")
            num_targets += count
            for name, value in {"objective_loss": loss, **metrics}.items():
                if torch.isfinite(torch.as_tensor(value)):
                    sums[name] = sums.get(name, 0.0) + float(value) * count
    return {name: total / max(1, num_targets) for name, total in sums.items()}


@torch.no_grad()
def acceptance_of_drafts(model, batches: list[dict[str, Tensor]], block_size: int) -> tuple[list[float], float]:
    """1 - TV(p, q) for each offset in a whole masked block: how often speculative sampling accepts the draft there.

    p is the next-token distribution of a token and q that of its mask row, corrected by the token before it if the model
    has a selector, both without the mask token, at temperature 1. Returns ``block_size`` numbers between 0 and 1, means
    over the targets that have a token before them, and the tokens of a draft-verify cycle that follow from them.
    """
    mask_id, head, selector = find_mask_token(model), model.get_output_embeddings(), draft_selector(model)
    sums, counts = torch.zeros(block_size), torch.zeros(block_size)
    tau, whole = 0.0, 0
    for batch in batches:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        loss_mask = find_loss_mask(batch, packing)
        blocks = BlockGrid.from_packing(packing, loss_mask, block_size)
        clean, masked = run_copies(model, tokens, [tokens.masked_fill(loss_mask, mask_id)], packing, [blocks])
        if selector is not None:
            masked = selector(masked, model.get_input_embeddings()(tokens.roll(1, dims=1)))
        chosen = loss_mask & (packing.position > 0)
        offsets = (packing.index - blocks.start)[chosen]
        pairs = zip(clean.roll(1, dims=1)[chosen].split(CHUNK), masked[chosen].split(CHUNK), strict=True)
        overlap = torch.cat([_overlap(head(p), head(q), mask_id) for p, q in pairs])
        sums.index_add_(0, offsets.cpu(), overlap.cpu())
        counts.index_add_(0, offsets.cpu(), torch.ones(len(offsets)))
        grid = overlap.new_ones(chosen.shape).masked_scatter(chosen, overlap)
        total, count = expected_tau(blocks, grid, loss_mask)
        tau, whole = tau + float(total), whole + int(count)
    return (sums / counts.clamp_min(1)).tolist(), tau / max(1, whole)


def _overlap(p: Tensor, q: Tensor, mask_id: int) -> Tensor:
    """Sum of min(p, q) [N] for logits [N, V]."""
    distributions = []
    for logits in (p, q):
        logits = logits.float()
        logits[:, mask_id] = -torch.inf
        distributions.append(logits.softmax(-1))
    return torch.minimum(*distributions).sum(-1)


def tokens_per_forward(model, prompts: list[Tensor], spec: str, max_new_tokens: int) -> tuple[float, list[Tensor]]:
    """Tokens per forward over all ``prompts`` [1, P], decoded greedily one by one, and what was decoded."""
    tokens, forwards, texts = 0, 0, []
    for prompt in prompts:
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stop_strings=None,  # those of a generation config need a tokenizer, and nothing is read here
            custom_generate=decoder_from_spec(spec),
        )
        tokens += int(out.new_tokens.sum())
        forwards += int(out.forwards.sum())
        texts.append(out.sequences[0].cpu())
    return tokens / forwards, texts
