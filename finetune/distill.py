"""Training text from the model itself, so that its next-token mode does not move while it learns to draft.

Greedy or sampled continuations of prompts, one JSON line each, through vLLM where it is installed and transformers
elsewhere. A run that was stopped goes on behind its last whole line, and gives what it would have given in one go.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch

from decoding import NextTokenDecoder
from decoding.forward.loading import load_tokenizer, load_weights, weights_of
from decoding.inputs.checks import check_choice, check_count, check_range
from finetune.arguments import cpu_has_bf16
from finetune.continued import keep_settings, kept_settings, locked, whole_records
from finetune.interrupts import full_disk_named
from finetune.prompts import Prompt, answered, read_prompts

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Distillation:
    """What to sample.

    model: folder or hub name. output: the JSONL file to write.
    prompts: a JSONL file whose lines have ``messages`` (answered from the last turn of the user on), ``prompt``, or
        ``text``, of which the first ``prompt_tokens`` tokens are taken; or the columns of alpaca or sharegpt, as
        ``finetune.documents.Encoder`` has them. None samples whole texts from the BOS token on.
    samples: number of texts. batch_size: texts at once. max_new_tokens: per text.
    temperature: 1 samples the model's own distribution, 0 is greedy. seed: together with a text's number it decides the batch.
    """

    model: str
    output: str
    prompts: str | None = None
    samples: int = 1000
    prompt_tokens: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    batch_size: int = 32
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self):
        check_choice("dtype", self.dtype, (None, *DTYPES))
        for name in ("samples", "prompt_tokens", "max_new_tokens", "batch_size"):
            check_count(name, getattr(self, name))
        check_range("temperature", self.temperature, 0)
        if self.prompts is None and self.temperature == 0:
            raise ValueError("temperature 0 without prompts gives the same text each time; name a file of prompts")

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the texts are computed in; they depend on it."""
        if self.dtype is None:
            return DTYPES["bf16" if torch.cuda.is_available() or cpu_has_bf16() else "fp32"]
        return DTYPES[self.dtype]


# From prompts (lists of token ids) and a seed to their continuations (lists of token ids, the stop token included).
Generator = Callable[[list[list[int]], int], list[list[int]]]


def distill(
    settings: Distillation, generator: Generator | None = None, advance: Callable[[int], None] = lambda n: None
) -> int:
    """Write the samples of ``settings`` into its output file; returns how many were there already.

    Each line has what it was made from and what the model said, in the form that a recipe's ``data`` takes: "text",
    "prompt" and "completion", or "messages" with what else the chat template asked for; and "complete", false if
    ``max_new_tokens`` cut it off. A file that is there is continued behind its last whole record, with the texts that it
    would have got in one go; beside it the settings are kept. ``advance`` is told of every batch that is done, as a number
    of texts. Raises ValueError for prompts or a file that make no sense, for a file of other settings, and while another
    run writes the file.
    """
    tokenizer = load_tokenizer(settings.model)
    path = Path(settings.output)
    with _named_failures(settings.output), locked("output", path):
        done = whole_records("output", path)
        identity = _identity(settings)
        if done and (kept := kept_settings(path)) is not None:
            _check_same(settings, identity, kept)
        advance(min(done, settings.samples))
        if done >= settings.samples:
            return done
        begun = done % settings.batch_size  # texts of a batch whose others are missing: it is drawn again as a whole
        prompts = list(islice(_prompts(settings, tokenizer), done - begun, settings.samples))
        if done - begun + len(prompts) < settings.samples:
            raise ValueError(
                f"prompts: {settings.prompts!r} holds {done - begun + len(prompts)} prompts, fewer than samples "
                f"{settings.samples}"
            )
        generator = generator or make_generator(settings)
        keep_settings(path, identity)
        with path.open("a", encoding="utf-8") as file:
            for start in range(0, len(prompts), settings.batch_size):
                batch = prompts[start : start + settings.batch_size]
                seed = (settings.seed * 1_000_003 + done - begun + start) % 2**31
                said = generator([prompt.ids for prompt in batch], seed)
                there = begun if start == 0 else 0
                for prompt, ids in list(zip(batch, said, strict=True))[there:]:
                    file.write(json.dumps(answered(prompt, ids, tokenizer), ensure_ascii=False) + "\n")
                file.flush()
                advance(len(batch) - there)
    return done


def _prompts(settings: Distillation, tokenizer) -> Iterable[Prompt]:
    if settings.prompts is not None:
        return read_prompts(settings.prompts, settings.prompt_tokens, tokenizer)
    if tokenizer.bos_token_id is None:
        raise ValueError("prompts: the tokenizer has no BOS token to start from; name a file of prompts")
    return repeat(Prompt([tokenizer.bos_token_id], {}))


@contextmanager
def _named_failures(output: str) -> Iterator[None]:
    try:
        with full_disk_named(output, "text"):
            yield
    except OSError as error:
        raise ValueError(f"output: {output!r} cannot be written: {error.strerror or error}") from error


def _identity(settings: Distillation) -> dict[str, Any]:
    """What decides the texts, wherever the files lie; neither their number nor how many are made at once."""
    folder = Path(settings.model)
    model = str(folder.resolve()) if folder.exists() else settings.model
    identity = {"model": model, "prompts": settings.prompts, "dtype": str(settings.torch_dtype).removeprefix("torch.")}
    for name in ("max_new_tokens", "temperature", "seed"):
        identity[name] = getattr(settings, name)
    if settings.prompts is not None:
        data = _prompt_bytes(settings.prompts)
        identity |= {
            "prompt_tokens": settings.prompt_tokens,
            "prompts_bytes": len(data),
            "prompts_sha256": _sha256(data),
        }
    return identity


def _check_same(settings: Distillation, wanted: dict[str, Any], kept: dict[str, Any]) -> None:
    """Raise ValueError unless ``kept`` decides the same texts; prompts may have been added at the end of their file."""
    content = ("prompts_bytes", "prompts_sha256")
    changed = [
        f"{name} was {kept.get(name)!r} and is {wanted.get(name)!r}"
        for name in dict.fromkeys((*kept, *wanted))
        if name not in ("prompts", *content) and kept.get(name) != wanted.get(name)
    ]
    if (kept.get("prompts") is None) != (settings.prompts is None):
        changed.append(f"prompts was {kept.get('prompts')!r} and is {settings.prompts!r}")
    elif settings.prompts is not None:
        before = _prompt_bytes(settings.prompts)[: kept.get("prompts_bytes")]
        if _sha256(before) != kept.get("prompts_sha256"):
            changed.append(f"the prompts in {settings.prompts!r} are not those that were in {kept['prompts']!r}")
    if changed:
        raise ValueError(
            f"output: {settings.output!r} holds texts of other settings: {'; '.join(changed)}. Give another output, or "
            f"remove the file to start anew"
        )


def _prompt_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"prompts: the file {path!r} does not exist") from None
    except OSError as error:
        raise ValueError(f"prompts: {path!r} cannot be read: {error.strerror}") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_generator(settings: Distillation) -> Generator:
    """vLLM if it is installed, transformers if not."""
    return _vllm(settings) if importlib.util.find_spec("vllm") else _transformers(settings)


def _vllm(settings: Distillation) -> Generator:
    from vllm import LLM, SamplingParams

    engine = LLM(model=weights_of(settings.model), dtype=str(settings.torch_dtype).removeprefix("torch."))

    def generate(prompts: list[list[int]], seed: int) -> list[list[int]]:
        distributions = [
            SamplingParams(temperature=settings.temperature, max_tokens=settings.max_new_tokens, seed=seed + i)
            for i in range(len(prompts))  # of one seed, equal prompts would get equal texts
        ]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], distributions, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def _transformers(settings: Distillation) -> Generator:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_weights(settings.model, dtype=settings.torch_dtype).to(device)
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = {token for token in (*ends, config.bos_token_id) if token is not None}  # BOS: the next text begins
    pad = config.pad_token_id if config.pad_token_id is not None else min(stops, default=0)

    def generate(prompts: list[list[int]], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        sampled = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        distribution = sampled if settings.temperature > 0 else {"do_sample": False}
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(stops),
            stop_strings=None,  # those of a generation config are for users; texts end where the model ends them
            pad_token_id=pad,
            custom_generate=NextTokenDecoder(),  # on a CPU several times as fast as stock generate at such batches
            **distribution,
        )
        return [until_stop(row[width:].tolist(), stops) for row in out]

    return generate


def until_stop(ids: Iterable[int], stops: set[int]) -> list[int]:
    """``ids`` up to the first stop token, which is kept."""
    kept = []
    for token in ids:
        kept.append(token)
        if token in stops:
            break
    return kept
