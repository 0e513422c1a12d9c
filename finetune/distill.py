"""Training text from the model itself, so that its next-token mode does not move while it learns to draft.

Greedy or sampled continuations of prompts, one JSON line each, through vLLM where it is installed and transformers
elsewhere. A run that was stopped goes on behind its last line, and gives what it would have given in one go.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from decoding.checks import check_count, check_range
from decoding.loading import load_tokenizer, load_weights, weights_of
from finetune.interrupts import full_disk_named


@dataclass(frozen=True)
class Distillation:
    """What to sample.

    model: folder or hub name. output: the JSONL file to write.
    prompts: a JSONL file whose lines have ``messages`` (answered from the last turn of the user on), ``prompt``, or
        ``text``, of which the first ``prompt_tokens`` tokens are taken; None samples whole texts from the BOS token on.
    samples: number of texts. batch_size: texts at once. max_new_tokens: per text.
    temperature: 1 samples the model's own law, 0 is greedy. seed: together with a text's number it decides the batch.
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

    def __post_init__(self):
        for name in ("samples", "prompt_tokens", "max_new_tokens", "batch_size"):
            check_count(name, getattr(self, name))
        check_range("temperature", self.temperature, 0)
        if self.prompts is None and self.temperature == 0:
            raise ValueError("temperature 0 without prompts gives the same text each time; name a file of prompts")


# From prompts (lists of token ids) and a seed to their continuations (lists of token ids, the stop token included).
Generator = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the fields of the record that they came from."""

    ids: list[int]
    record: dict


def distill(
    settings: Distillation, generator: Generator | None = None, advance: Callable[[int], None] = lambda n: None
) -> int:
    """Write the samples of ``settings`` into its output file; returns how many were there already.

    Each line has what it was made from and what the model said, in the form that a recipe's ``data`` takes: "text",
    "prompt" and "completion", or "messages"; and "complete", false if ``max_new_tokens`` cut it off. ``advance`` is told
    of every batch that is done, as a number of texts. Raises ValueError for prompts or a file that make no sense.
    """
    tokenizer = load_tokenizer(settings.model)
    path = Path(settings.output)
    done = _whole_lines(path)
    if done < settings.samples and done % settings.batch_size:
        raise ValueError(f"batch_size: {settings.output!r} holds {done} lines, no multiple of {settings.batch_size}")
    advance(min(done, settings.samples))
    if done >= settings.samples:
        return done
    prompts = list(islice(_prompts(settings, tokenizer), done, settings.samples))
    if done + len(prompts) < settings.samples:
        raise ValueError(
            f"prompts: {settings.prompts!r} holds {done + len(prompts)} prompts, fewer than samples {settings.samples}"
        )
    generator = generator or make_generator(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(settings.output), path.open("a", encoding="utf-8") as file:
        for start in range(0, len(prompts), settings.batch_size):
            batch = prompts[start : start + settings.batch_size]
            seed = (settings.seed * 1_000_003 + done + start) % 2**31
            for prompt, ids in zip(batch, generator([prompt.ids for prompt in batch], seed), strict=True):
                file.write(json.dumps(_record(tokenizer, prompt, ids), ensure_ascii=False) + "\n")
            file.flush()
            advance(len(batch))
    return done


def _record(tokenizer, prompt: Prompt, ids: list[int]) -> dict:
    complete = {"complete": bool(ids) and ids[-1] == tokenizer.eos_token_id}
    # Decoded together and cut: some tokenizers show the first token of a text without its space.
    given = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    completion = tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)[len(given) :]
    if "messages" in prompt.record:
        return {"messages": [*prompt.record["messages"], {"role": "assistant", "content": completion}], **complete}
    if "prompt" in prompt.record:
        return {"prompt": prompt.record["prompt"], "completion": completion, **complete}
    return {"text": given + completion, **complete}


def _prompts(settings: Distillation, tokenizer) -> Iterator[Prompt]:
    if settings.prompts is None:
        if tokenizer.bos_token_id is None:
            raise ValueError("prompts: the tokenizer has no BOS token to start from; name a file of prompts")
        while True:
            yield Prompt([tokenizer.bos_token_id], {})
    try:
        lines = Path(settings.prompts).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"prompts: the file {settings.prompts!r} does not exist") from None
    for number, line in enumerate(lines, 1):
        try:
            yield _prompt(json.loads(line), settings.prompt_tokens, tokenizer)
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(
                f"prompts: line {number} of {settings.prompts!r} has neither 'messages' nor 'prompt' nor 'text'"
            ) from None


def _prompt(record: dict, prompt_tokens: int, tokenizer) -> Prompt:
    """Raises KeyError if the record has none of the fields."""
    if "messages" in record:
        asked = max((i for i, message in enumerate(record["messages"], 1) if message["role"] == "user"), default=None)
        if asked is None:
            raise KeyError("user")
        messages = record["messages"][:asked]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Prompt(tokenizer(text, add_special_tokens=False)["input_ids"], {"messages": messages})
    if "prompt" in record:
        return Prompt(_without_eos(tokenizer(record["prompt"])["input_ids"], tokenizer), {"prompt": record["prompt"]})
    return Prompt(_without_eos(tokenizer(record["text"])["input_ids"], tokenizer)[:prompt_tokens], {})


def _without_eos(ids: list[int], tokenizer) -> list[int]:
    """Some tokenizers end every text with EOS, behind which there is nothing to say."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _whole_lines(path: Path) -> int:
    """The number of whole lines in ``path``; a last line that was cut off is taken away."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return data[:whole].count(b"\n")


def make_generator(settings: Distillation) -> Generator:
    """vLLM if it is installed, transformers if not."""
    return _vllm(settings) if importlib.util.find_spec("vllm") else _transformers(settings)


def _vllm(settings: Distillation) -> Generator:
    from vllm import LLM, SamplingParams

    engine = LLM(model=weights_of(settings.model))

    def generate(prompts: list[list[int]], seed: int) -> list[list[int]]:
        laws = [
            SamplingParams(temperature=settings.temperature, max_tokens=settings.max_new_tokens, seed=seed + i)
            for i in range(len(prompts))  # of one seed, equal prompts would get equal texts
        ]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], laws, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def _transformers(settings: Distillation) -> Generator:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_weights(settings.model, dtype="auto" if device == "cuda" else torch.float32).to(device)
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
        law = sampled if settings.temperature > 0 else {"do_sample": False}
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(stops),
            pad_token_id=pad,
            **law,
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
