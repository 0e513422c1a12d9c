"""What a training step costs by each objective, on the same batch: time against next-token training, memory, MFU.

python -m benchmarks.training.step_cost
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from decoding import NextTokenObjective
from decoding.forward.adapter import GatedAdapter
from eval.bench.results import progress
from eval.devices import clock
from finetune.estimate import GPUS, Estimate
from finetune.recipe import Recipe, fastest_attention
from finetune.tuning import Tuning
from sbd import SetBlockObjective
from setflow.commands.bench import Device, Dtype, Model
from setflow.commands.settings import parse_dtype
from setflow.loading import EMBEDDED, load_model


def step_cost(
    model: Model = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    block_size: Annotated[int, typer.Option(min=1)] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of the row-gated adapter.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each, by turns; medians are reported.")] = 5,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = OUT,
    name: Name = "training",
    overwrite: Overwrite = False,
) -> None:
    """Cost of a set-block training step, all weights or a gated adapter, against a next-token step on the same batch."""
    settings = {"batch_size": batch_size, "length": length, "block_size": block_size, "rank": rank, "rounds": rounds}
    settings["seconds_of"] = "the process on one thread" if device == "cpu" else "the clock"
    autocast = None if dtype == "fp32" else parse_dtype(dtype)
    with results_in(out, name, overwrite) as results:
        loaded = load_model(model, torch.float32)[0].to(device)
        loaded.set_attn_implementation(fastest_attention(loaded.device, loaded.config))  # as recipes do
        results.describe(loaded, **settings)
        tokens = torch.randint(
            loaded.config.vocab_size - 1, (batch_size, length), generator=torch.Generator().manual_seed(0)
        )
        batch = {"input_ids": tokens.to(device), "document_ids": torch.zeros_like(tokens).to(device)}
        with progress(3 * (rounds + 1)) as advance:
            rows = measure_steps(list(contenders(loaded, block_size, rank)), batch, rounds, autocast, advance)
        for row in rows:
            if device != "cpu":
                gpu = torch.cuda.get_device_name(loaded.device)
                row["mfu"] = share_of_peak(row, gpu, model or str(EMBEDDED), block_size, rank, length)
            results.take(row)


@dataclass
class Contender:
    """A model with what is to be trained, an objective, and the seconds of each of its steps."""

    name: str
    model: PreTrainedModel
    objective: Callable
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self):
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(self, batch: dict[str, Tensor], autocast: torch.dtype | None) -> None:
        """Forward, backward and optimizer."""
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = _now(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss, _ = self.objective(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(_now(device) - started)
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated()


def contenders(model: PreTrainedModel, block_size: int, rank: int) -> Iterator[Contender]:
    """Next-token and set-block training of all weights, and of a row-gated adapter; ``model`` stays as it is."""
    mask = model.config.vocab_size - 1  # for the cost any token will do
    options = {"block_sizes": (block_size,), "mask_token_id": mask}
    full = copy.deepcopy(model).requires_grad_(True).train()
    yield Contender("ntp", full, NextTokenObjective())
    yield Contender("sbd", full, SetBlockObjective(**options))
    gated = copy.deepcopy(full).requires_grad_(False)
    adapter = GatedAdapter(gated, rank, 2 * rank)
    adapter.mask_token_id = mask
    adapter.attach(gated)
    yield Contender("sbd gated", gated, SetBlockObjective(**options, gated=True))


def measure_steps(
    chosen: list[Contender],
    batch: dict[str, Tensor],
    rounds: int,
    autocast: torch.dtype | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """A row for each contender: median seconds of a step, and how many times those of the first. Steps take turns.

    Seconds are those of the process on a CPU, which other processes do not lengthen, and of the clock on a GPU. The
    first round warms up and is not counted.
    """
    for _ in range(rounds + 1):
        for contender in chosen:
            torch.manual_seed(len(contender.seconds))
            contender.step(batch, autocast)
            advance()
    rows, base = [], median(chosen[0].seconds[1:])
    for contender in chosen:
        seconds = median(contender.seconds[1:])
        rows.append(
            {
                "objective": contender.name,
                "seconds": round(seconds, 4),
                "times_ntp": round(seconds / base, 3),
                "tokens_per_second": round(batch["input_ids"].numel() / seconds),
                "peak_gigabytes": round(contender.peak_bytes / 1e9, 2) or None,
            }
        )
    return rows


def share_of_peak(row: dict[str, Any], gpu: str, model: str, block_size: int, rank: int, length: int) -> float | None:
    """MFU of a row of ``measure_steps``: its arithmetic by ``Estimate`` over what the GPU so named can do in bf16.

    None if that is not in the table of estimates.
    """
    peak = next((flops for name, (flops, _) in GPUS.items() if name in gpu.lower()), None)
    if peak is None:
        return None
    objective, *gated = row["objective"].split()
    recipe = Recipe(
        output="",
        data=["nothing.jsonl"],  # an estimate reads none
        model=model,
        objective=objective,
        objective_options={"block_sizes": (block_size,)} if objective == "sbd" else {},
        tuning=Tuning("gated", rank) if gated else Tuning(),
        sequence_length=length,
    )
    return round(Estimate(recipe).flops_per_token * row["tokens_per_second"] / peak, 4)


def _now(device: torch.device) -> float:
    return time.process_time() if device.type == "cpu" else clock(device)


if __name__ == "__main__":
    sys.exit(main(step_cost, "training.step_cost"))
