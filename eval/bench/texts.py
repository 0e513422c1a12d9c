"""Tokens per second at batch 1: stock ``generate`` and our decoders on the same weights, in turns.

With recorded acceptance (:mod:`eval.bench.replay`) decoders that draft are measured on weights that were never trained.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from decoding import Engine, decoder_from_spec
from eval.bench.contenders import metered
from eval.bench.engine import Row, WeightSpeed, check_contexts
from eval.bench.peers import peer_seconds
from eval.bench.replay import ReplayEngine, lay_down
from eval.devices import clock

STOCK = "model.generate"
REPLAYED = (
    "prompt-lookup:block_size=8",
    "sbd:block_size=16,entropy_bound=0.1",
    "sbd-lossless:block_size=8,look_ahead=auto",
)
# Seconds of one text, and what else is known of it.
Run = Callable[[], tuple[float, Row]]


def measure_texts(
    model: PreTrainedModel,
    contexts: Iterable[int],
    copied: float,
    new_tokens: int = 64,
    rounds: int = 3,
    compiled: bool = False,
    static: bool = False,
    lengths: Sequence[int] = (),
    specs: Sequence[str] = REPLAYED,
    peers: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield tokens per second behind a prompt of each of ``contexts``: stock ``generate``, ``ntp``, and those that draft.

    They take turns, after a run of each that warms up; figures are medians over ``rounds`` and count the time of the prompt.
    ``outside_model`` is the share of that time which was spent outside of forwards and heads.

    compiled: also stock ``generate`` with a static cache, compiled. static: whether drafts run through the static path,
    too. lengths: tokens of each forward, to be replayed by
    decoders ``specs``. peers: other programs on the same weights (:mod:`eval.bench.peers`).
    """
    contexts = list(contexts)
    check_contexts(model.config, contexts, new_tokens, "new tokens")
    speed = WeightSpeed(model, copied)
    for context in contexts:
        runs = _runs(model, context, new_tokens, compiled, static, lengths, specs)
        runs |= {name: peer_seconds(name, model, context, new_tokens) for name in peers}
        found: dict[str, list[float]] = {name: [] for name in runs}
        known: dict[str, list[Row]] = {name: [] for name in runs}
        for round_ in range(rounds + 1):
            for name, run in runs.items():
                seconds, more = run()
                if round_:  # the first warms up
                    found[name].append(seconds / new_tokens)
                    known[name].append(more)
        for name, seconds in found.items():
            per_token = statistics.median(seconds)
            yield {
                "what": name,
                "batch_size": 1,
                "context": context,
                "rows": 1,
                "milliseconds": round(1e3 * per_token, 3),
                **speed.of(per_token),
                "tokens_per_second": round(1 / per_token, 1),
                "speed_up": round(statistics.median(a / b for a, b in zip(found[STOCK], seconds, strict=True)), 3),
                **{key: round(statistics.median(row[key] for row in known[name]), 3) for key in known[name][0]},
            }


def _runs(
    model: PreTrainedModel,
    context: int,
    new_tokens: int,
    compiled: bool,
    static: bool,
    lengths: Sequence[int],
    specs: Sequence[str],
) -> dict[str, Run]:
    """What is timed, by name."""
    vocab_size, device = model.config.vocab_size, model.device
    ids = torch.randint(vocab_size, (1, context), generator=torch.Generator().manual_seed(0)).to(device)
    runs: dict[str, Run] = {STOCK: lambda: (text_seconds(model, ids, new_tokens, {}), {})}
    if compiled:
        settings = {"cache_implementation": "static", "compile_config": compile_everywhere()}
        runs[f"{STOCK}, static cache, compiled"] = lambda: (text_seconds(model, ids, new_tokens, settings), {})
    runs["ntp"] = _decoder_run(model, "ntp", Engine(model), ids, new_tokens)
    runs["ntp, static path"] = _decoder_run(model, "ntp", Engine(model, static=True), ids, new_tokens)
    if lengths:
        model.generation_config.mask_token_id = mask = vocab_size - 1
        text, starts = lay_down(lengths, context, new_tokens, vocab_size)
        prompt = torch.tensor([text[:context]], device=device)
        for spec in specs:
            engine = ReplayEngine(model, text, starts, mask, static)
            runs[f"{spec}, replayed"] = _decoder_run(model, spec, engine, prompt, new_tokens)
    return runs


def _decoder_run(model: PreTrainedModel, spec: str, engine: Engine, ids: torch.Tensor, new_tokens: int) -> Run:
    settings = {"custom_generate": decoder_from_spec(spec), "engine": engine, "return_dict_in_generate": True}

    def run() -> tuple[float, Row]:
        with metered(engine) as meter:
            seconds = text_seconds(model, ids, new_tokens, settings)
        outside = 1 - meter.seconds / seconds
        return seconds, {"tokens_per_forward": new_tokens / meter.forwards, "outside_model": outside}

    return run


def text_seconds(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, settings: dict[str, Any]) -> float:
    """Seconds of one greedy text of ``new_tokens`` tokens behind ``ids`` [1, P]."""
    started = clock(model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **settings
    )
    seconds = clock(model.device) - started
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    assert sequences.shape[1] == ids.shape[1] + new_tokens
    return seconds


def compile_everywhere() -> CompileConfig:
    """Let transformers compile ``generate`` on a CPU, too, which it does on GPUs alone."""
    config = CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True
    return config
