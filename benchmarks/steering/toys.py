"""Models so small that every text they can write is known, with its probability."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steering import SteeredDecoder

VOCAB, EOS, MASK = 4, 1, 3
LENGTH = 4  # new tokens at most
PROMPT = [2, 0]
Text = tuple[int, ...]


@dataclass(frozen=True)
class Toy:
    """A random model, and the probability of every text at ``temperature``: those that EOS ends, and those of LENGTH tokens."""

    model: torch.nn.Module
    temperature: float = 1.0

    def texts(self, temperature: float | None = None, with_mask: bool = False) -> dict[Text, float]:
        """What can be drawn. ``with_mask``: the mask token, which is never drawn, keeps its probability."""
        found, open_texts = {}, {(): 1.0}
        while open_texts:
            prefixes = [PROMPT + list(prefix) for prefix in open_texts]
            with torch.no_grad():
                logits = self.model(torch.tensor(prefixes)).logits[:, -1].double() / (temperature or self.temperature)
            if not with_mask:
                logits[:, MASK] = -torch.inf
            longer = {}
            for (prefix, weight), row in zip(open_texts.items(), logits.softmax(-1).tolist(), strict=True):
                longer |= {(*prefix, token): weight * row[token] for token in range(MASK)}
            is_over = {text: len(text) == LENGTH or text[-1] == EOS for text in longer}
            found |= {text: weight for text, weight in longer.items() if is_over[text]}
            open_texts = {text: weight for text, weight in longer.items() if not is_over[text]}
        return found

    def run(self, decoder: SteeredDecoder, count: int, seed: int = 0):
        """A steered run of ``count`` equal prompts, each on its own."""
        torch.manual_seed(seed)
        return self.model.generate(
            torch.tensor([PROMPT] * count),
            attention_mask=torch.ones(count, len(PROMPT), dtype=torch.long),
            do_sample=True,
            top_k=0,
            temperature=self.temperature,
            max_new_tokens=LENGTH,
            suppress_tokens=[MASK],
            custom_generate=decoder,
            return_dict_in_generate=True,
        )


def toy(dtype: torch.dtype = torch.float32, temperature: float = 1.0) -> Toy:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    model.generation_config.mask_token_id = MASK
    return Toy(model, temperature)


def normalised(weights: dict[Text, float]) -> tuple[dict[Text, float], float]:
    """The distribution in proportion to ``weights``, and their sum."""
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}, total


def measured(output, by_normaliser: bool = True) -> dict[Text, float]:
    """The mean over prompts of the weighted particles; by default prompts count by their estimates of the normaliser.

    Each prompt alone is biased by about 1 / N, as a ratio of two estimates; so counted, numerators and denominators are
    averaged apart, each without bias.
    """
    found: dict[Text, float] = {}
    rows = output.particles[:, :, len(PROMPT) :].flatten(0, 1).tolist()
    share = (output.log_normaliser if by_normaliser else torch.zeros_like(output.log_normaliser)).softmax(0)
    weights = (output.log_weights.exp() * share[:, None]).flatten().tolist()
    for row, count, weight in zip(rows, output.particle_tokens.flatten().tolist(), weights, strict=True):
        text = tuple(row[:count])
        found[text] = found.get(text, 0.0) + weight
    return found


def chosen(output) -> dict[Text, float]:
    """How often each text was the result."""
    found: dict[Text, float] = {}
    for row, count in zip(output.sequences[:, len(PROMPT) :].tolist(), output.new_tokens.tolist(), strict=True):
        text = tuple(row[:count])
        found[text] = found.get(text, 0.0) + 1 / len(output.chosen)
    return found


def total_variation(first: dict[Text, float], second: dict[Text, float]) -> float:
    return sum(abs(first.get(text, 0.0) - second.get(text, 0.0)) for text in first.keys() | second.keys()) / 2


def likes_zeros(completion_ids, finished):
    """Rewards zeros as they come, and texts that EOS ends a little."""
    ends = (0.7 * (ids[-1:] == [EOS]) * done for ids, done in zip(completion_ids, finished, strict=True))
    return [1.3 * ids.count(0) - 0.5 * len(ids) + end for ids, end in zip(completion_ids, ends, strict=True)]


def likes_zeros_at_the_end(completion_ids):
    """The same of finished texts."""
    return likes_zeros(completion_ids, [True] * len(completion_ids))
