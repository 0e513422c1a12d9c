"""Ship the embedded model: copy what its last stage saved into the package, and write its card from the runs' files.

``python -m tools.embed build``, the last step of ``make embedded``; ``python -m tools.embed gated build`` ships the
next-token model of its first stage with a row-gated adapter.
"""

import json
import shutil
import sys
from pathlib import Path

from decoding.forward.adapter import WEIGHTS_FILE, holds_adapter, read_settings
from decoding.inputs.source import ADAPTER_FILE
from setflow.loading import EMBEDDED, EMBEDDED_GATED

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


if __name__ == "__main__":
    if sys.argv[1:2] == ["gated"]:
        ship_gated(Path(sys.argv[2] if len(sys.argv) > 2 else "build"))
    else:
        ship(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))
