"""Ship the embedded model: copy what its last stage saved into the package, and write its card from the runs' files.

``python -m tools.embed build``, the last step of ``make embedded``; ``python -m tools.embed gated build`` ships the
next-token model of its first stage with a row-gated adapter, and ``python -m tools.embed smollm2 build`` the adapter for
SmolLM2-135M-Instruct, the last step of ``make smollm2``; ``python -m tools.embed selector build`` puts a draft selector
beside the embedded model.
"""

import json
import shutil
import sys
from pathlib import Path

from decoding.forward.adapter import WEIGHTS_FILE, holds_adapter, read_settings
from decoding.inputs.source import ADAPTER_FILE, SELECTOR_FILE
from finetune.recipe_file import RECIPES
from sbd import selector
from setflow.adapters import PACKAGED
from setflow.loading import EMBEDDED, EMBEDDED_GATED

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

STAGES = {
    "embedded-ntp": "1, next-token",
    "embedded-sbd": "2, set-block",
    "embedded": "3, set-block, additions",
    "embedded-control-1": "stage 1 once more, for the control",
    "embedded-control-2": "control of stage 2",
    "embedded-control": "control of stage 3",
}
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

CARD = """---
license: apache-2.0
language: [en]
tags: [setflow, set-block-decoding]
---
# The embedded model of setflow

A Llama of {parameters:.1f} million parameters (bf16) with a byte-level BPE of 2,048 tokens, in which every digit stands
alone. It continues Python source and solves additions step by step; it is there so that every command works on a fresh
machine, and is good for nothing else.

Data: the source of the Python standard library of the machine it was trained on (5 % of the files held out by a hash of
their path) and 30,000 generated worked additions of 2 to 4 digits (2 % of all pairs held out by a hash). Stage 1 sees
additions in a brief form, later stages in the form that restates the operands. Context: {context} tokens.

Training: `make embedded`. AdamW, rows of 512 tokens, bf16 autocast where the processor knows bf16; recipes in
`finetune/recipes/embedded-*.yaml`. The control goes from stage 1 through the batches of stages 2 and 3 with next-token
loss only.

| stage | objective | steps | tokens per step | minutes | machine | held-out next-token loss, nats per token |
|---|---|---|---|---|---|---|
{stages}

Next-token loss of stage 3 against the control of as many steps, on held-out text: {against}.

The source of the standard library is under the PSF licence; no text of it is shipped here.
"""


def ship(build: Path) -> None:
    """Copy the model of ``build/embedded`` into the package and write its card.

    Where ``build`` holds no such model, the one in the package stays, and the controls of ``build`` are added to its card.
    """
    runs, anew = {}, (build / "embedded" / "training.json").is_file()
    if not anew:
        runs = json.loads((EMBEDDED / "training.json").read_text())
    for name in STAGES:
        path = build / name / "training.json"
        if path.is_file() and (anew or "control" in name):
            runs[name] = json.loads(path.read_text())
        elif anew and "control" not in name:
            raise ValueError(f"{path} does not exist; run the recipe {name} first")
    EMBEDDED.mkdir(exist_ok=True)
    for file in FILES if anew else ():
        shutil.copy(build / "embedded" / file, EMBEDDED / file)
    (EMBEDDED / "training.json").write_text(json.dumps(runs, indent=1) + "\n")
    (EMBEDDED / "README.md").write_text(card(runs, EMBEDDED))


def card(runs: dict[str, dict], model: Path) -> str:
    """The model card, every number in it from the files of the runs."""
    config = json.loads((model / "config.json").read_text())
    parameters = (model / "model.safetensors").stat().st_size / 2e6  # two bytes each
    stages = []
    for name, run in runs.items():
        losses = ", ".join(
            f"{key.removesuffix('_heldout')} {loss:.3f}" for key, loss in run["held_out_next_token_loss_nats"].items()
        )
        stages.append(
            f"| {STAGES[name]} | `{run['objective'].split('(')[0]}` | {run['steps']:,} | {run['tokens_per_step']:,} "
            f"| {run['minutes_of_last_run']:.0f} | {run['machine']} | {losses} |"
        )
    against = "not measured"
    if "embedded-control" in runs:
        ours, control = (runs[name]["held_out_next_token_loss_nats"] for name in ("embedded", "embedded-control"))
        against = ", ".join(
            f"{key.removesuffix('_heldout')} {100 * (ours[key] / control[key] - 1):+.1f} %" for key in ours
        )
    return CARD.format(
        parameters=parameters, context=config["max_position_embeddings"], stages="\n".join(stages), against=against
    )


def ship_gated(build: Path) -> None:
    """Put the next-token model of stage 1 and its row-gated adapter, side by side, into the package."""
    base, adapter = build / "embedded-ntp", build / "embedded-gated"
    if not holds_adapter(adapter):
        raise ValueError(f"{adapter} holds no gated adapter; run the recipe embedded-gated first")
    EMBEDDED_GATED.mkdir(exist_ok=True)
    for file in FILES:
        # The tokenizer is the same, but for what it is told to return.
        shutil.copy((EMBEDDED if file.startswith("tokenizer") else base) / file, EMBEDDED_GATED / file)
    for file in (WEIGHTS_FILE, "README.md", "training.json"):
        shutil.copy(adapter / file, EMBEDDED_GATED / file)
    settings = read_settings(adapter) | {"base_model": "."}
    (EMBEDDED_GATED / ADAPTER_FILE).write_text(json.dumps(settings, indent=1) + "\n")


MADE = """
## How it was made

`make smollm2`, which can be stopped and goes on where it was:

    {commands}

The texts are the model's own answers to prompts of four domains, sampled at temperature 0.7. Held out are the topics of
the chat, the test set of GSM8K, HumanEval, and the last stories; nothing of them was trained on.

## Domain by domain

`{command}`

| held-out prompts | decoder | prompts | tokens per forward | accepted drafts of a forward |
|---|---|---|---|---|
{rows}

Greedy, batch {batch_size}, {dtype}, {device}.
"""
SMOLLM2_BYTES = 6_000_000  # most that the adapter may take of the package


def ship_smollm2(build: Path, results: Path = RESULTS / "quality-smollm2.json") -> None:
    """Put the adapter of ``build/smollm2-gated`` into the package, its card with what ``bench quality`` has found."""
    adapter, target = build / "smollm2-gated", PACKAGED["smollm2"]
    if not holds_adapter(adapter):
        raise ValueError(f"{adapter} holds no gated adapter; run the recipe smollm2-gated first")
    if not results.is_file():
        raise ValueError(f"{results} does not exist; run make smollm2, which measures the adapter on held-out prompts")
    files = [path for path in sorted(adapter.iterdir()) if path.name.startswith(("gated_adapter.", "draft_selector."))]
    size = sum(path.stat().st_size for path in files)
    if size > SMOLLM2_BYTES:
        raise ValueError(
            f"the adapter in {adapter} takes {size:,} bytes, and the package has room for {SMOLLM2_BYTES:,}"
        )
    target.mkdir(exist_ok=True)
    for path in [*files, adapter / "training.json"]:
        shutil.copy(path, target / path.name)
    settings = read_settings(adapter) | {"base_model": "build/smollm2-135m"}  # where setflow fetch puts it
    (target / ADAPTER_FILE).write_text(json.dumps(settings, indent=1) + "\n")
    found = json.loads(results.read_text())
    made = MADE.format(
        commands="\n    ".join(smollm2_commands()),
        command=found["command"],
        rows="\n".join(map(_domain, found["rows"])),
        batch_size=found["settings"]["batch_size"],
        dtype=found["conditions"]["dtype"],
        device=found["conditions"]["device"],
    )
    (target / "README.md").write_text((adapter / "README.md").read_text() + made)


def smollm2_commands() -> list[str]:
    """The commands in the head of the recipe."""
    lines = (RECIPES / "smollm2-gated.yaml").read_text().splitlines()
    return [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]


def _domain(row: dict) -> str:
    lengths = row.get("acceptance_histogram", [])
    mean = sum(length * count for length, count in enumerate(lengths)) / max(1, sum(lengths))
    accepted = f"{mean:.2f}" if lengths else "-"
    return f"| {row['prompts']} | `{row['decoder']}` | {row['count']} | {row['tokens_per_forward']:.2f} | {accepted} |"


def ship_selector(build: Path) -> None:
    """Put the draft selector of ``build/embedded-selector`` beside the embedded model."""
    folder = build / "embedded-selector"
    settings = selector.read_settings(folder) | {"base_model": "."}
    shutil.copy(folder / selector.WEIGHTS_FILE, EMBEDDED / selector.WEIGHTS_FILE)
    shutil.copy(folder / "training.json", EMBEDDED / "selector-training.json")
    (EMBEDDED / SELECTOR_FILE).write_text(json.dumps(settings, indent=1) + "\n")


SHIPS = {"gated": ship_gated, "selector": ship_selector, "smollm2": ship_smollm2}

if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["build"]
    if what in SHIPS:
        SHIPS[what](Path(rest[0] if rest else "build"))
    else:
        ship(Path(what))
