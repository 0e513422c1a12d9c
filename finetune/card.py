"""The model card: what was trained on what, how fast it decodes and what that costs, and the command that does it again."""

from collections.abc import Sequence
from pathlib import Path

from finetune.measure import Measure
from finetune.recipe import Recipe
from finetune.report import TrainingReport

CARD = """---
library_name: transformers
tags: [{tags}]{base}
---
# {title}

{what}

{use}

## Measured

{losses}

{table}

{acceptance}

Greedy, batch 1, {dtype}, {machine}; {prompts} held-out prompts of {prompt_tokens} tokens, up to {max_new_tokens} new
tokens each. Tokens per forward count neither the prefill nor anything after the end of a text.

## Training

{steps:,} steps of {tokens_per_step:,} tokens, {minutes} minutes in the last run. Objective: `{objective}`.

    {command}
"""
WHAT = {
    "full": "All weights were trained, so its next-token text is not that of the model it started from.",
    "lora": "LoRA on all rows: its next-token text is not that of the model it started from.",
    "gated": "A row-gated adapter: it acts on mask rows only, which draft the next-token text of the base model.",
    "selector": "A draft selector for that model: mask rows draft the same text as before, in better agreement.",
}
TAU = "Expected tokens of a draft-verify cycle at temperature 1, 1 + the sum of products of acceptances: {}."
USE = """```python
from decoding import decoder_from_spec, load_model

model, tokenizer = load_model("{saved}")
inputs = tokenizer("PROMPT", return_tensors="pt")
decoder = decoder_from_spec("{spec}")
model.generate(**inputs, custom_generate=decoder)
```"""


def write_card(recipe: Recipe, tags: Sequence[str], report: TrainingReport, folder: Path) -> None:
    """Write ``README.md`` into ``folder``, every figure in it from ``report``; ``tags`` are those of the objective."""
    kind, measure, after = recipe.tuning.kind, recipe.measure or Measure(), report.measured
    before = report.measured_before or {}
    saved = folder / "merged" if recipe.tuning.merge else folder
    losses = ["| held-out text | next-token loss before | after, nats per token |", "|---|---|---|"]
    earlier = report.held_out_before or {}
    for name, loss in report.held_out_next_token_loss_nats.items():
        losses.append(f"| {name} | {_shown(earlier.get(name), 4)} | {loss:.4f} |")
    table = ["| decoder | tokens per forward before | after | same text as next-token decoding |", "|---|---|---|---|"]
    for spec in ("ntp", *measure.decoders) if measure.decoders else ():
        key = f"tokens_per_forward/{spec}"
        table.append(
            f"| `{spec}` | {_shown(before.get(key), 2)} | {after[key]:.2f} | {after[f'same_text/{spec}']:.0%} |"
        )
    accepted = [f"{value:.2f}" for name, value in after.items() if name.startswith("acceptance_")]
    acceptance = ""
    if accepted:
        tau = f"{after['expected_tau']:.2f} ({_shown(before.get('expected_tau'), 2)} before)"
        acceptance = f"Acceptance 1 - TV(p, q) by offset in a masked block: {', '.join(accepted)}. {TAU.format(tau)}"
    (folder / "README.md").write_text(
        CARD.format(
            tags=", ".join(["setflow", *tags]),
            base=f"\nbase_model: {recipe.model}" if recipe.model and "/" in recipe.model else "",
            title=Path(recipe.output).name,
            what=" ".join([WHAT[kind], *_compared(kind, report), *_changed(report)]),
            use=USE.format(saved=saved, spec=recipe.decoder or next(iter(measure.decoders), "ntp")),
            losses="\n".join(losses) if len(losses) > 2 else "No held-out text was given.",
            table="\n".join(table) if len(table) > 2 else "Tokens per forward were not measured.",
            acceptance=acceptance,
            dtype=report.dtype,
            machine=report.machine,
            prompts=measure.prompts,
            prompt_tokens=measure.prompt_tokens,
            max_new_tokens=measure.max_new_tokens,
            steps=report.steps,
            tokens_per_step=report.tokens_per_step,
            minutes=report.minutes_of_last_run,
            objective=report.objective,
            command=report.command,
        )
    )


def _compared(kind: str, report: TrainingReport) -> list[str]:
    """For an adapter that leaves the next-token loss alone: whether it did, where that was measured."""
    before, after = report.held_out_before, report.held_out_next_token_loss_nats
    if kind not in ("gated", "selector") or not before or before.keys() != after.keys():
        return []
    if before == after:
        return ["Measured on held-out text, its next-token loss is that of the base model to the last digit shown."]
    return ["Its next-token loss differs from that of the base model, which should not be: see the table."]


def _changed(report: TrainingReport) -> list[str]:
    return [
        f"From {step} on these files were not what they were before: {', '.join(names)}."
        for step, names in (report.changed_files or {}).items()
    ]


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
