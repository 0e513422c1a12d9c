"""Tiny random models, a tokenizer made in memory and a model-free engine: what the tests of all packages stand on.

Everything is offline, on one thread, and small enough that a forward takes about a millisecond. Tests marked ``slow``
run only when a ``-m`` expression asks for them.
"""

import copy
import functools
import string
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from decoding import Engine
from decoding.batch import Batch, Sequence, Stopping
from decoding.decoder import decode
from decoding.forward.cache import SlotCache
from decoding.forward.rows import Rows
from decoding.output import StreamWriter
from decoding.sampling import LogitsPipeline

VOCAB = 97
PAD, BOS, EOS, MASK = 0, 1, 2, VOCAB - 1
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name: configuration class, model class, what differs from the shape in `build`
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-ungrouped": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: compiles a kernel or runs for many seconds; needs a -m expression to run")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws the same numbers, in whatever order tests run."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: select it with -m slow"))


def build(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """A random model of ``family`` whose logits are spread, without EOS, with a mask token."""
    config_class, model_class, differences = FAMILIES[family]
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**shape, **differences, **overrides}))
    model.generation_config.mask_token_id = overrides.get("vocab_size", VOCAB) - 1
    model.generation_config.pad_token_id = PAD
    model.generation_config._from_model_config = False  # else loading a saved model drops the mask token
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def shared_model():
    """``shared_model(family, dtype, ...)``: a model that is built once and must not be changed."""
    return functools.cache(build)


@pytest.fixture(scope="session")
def fresh_model():
    """``fresh_model(family, dtype, ...)``: a model of the test's own, free to be changed."""
    return build


@pytest.fixture
def prompts():
    """``prompts(7, 12)``: random prompts of these lengths, padded on the left, as arguments of generate."""

    def make(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(3, MASK, (length,), generator=generator) for length in lengths]
        width = max(lengths)
        input_ids = torch.full((len(rows), width), PAD)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, width - len(row) :], attention_mask[i, width - len(row) :] = row, 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    return make


@pytest.fixture
def new_tokens():
    """``new_tokens(output, i, prompt_width)``: the tokens that a DecodeOutput holds for sequence i, without padding."""

    def get(output, i: int, prompt_width: int) -> list[int]:
        return output.sequences[i, prompt_width : prompt_width + int(output.new_tokens[i])].tolist()

    return get


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of VOCAB pieces: four special ones, printable characters and a few longer pieces."""
    special = ["<pad>", "<bos>", "<eos>"]
    longer = ["end", "th", "he", "ing ", "a b", "\n\n"]
    characters = [*string.ascii_letters, *string.digits, " ", "\n", *string.punctuation]
    characters = characters[: VOCAB - len(special) - len(longer) - 1]
    vocabulary = {piece: i for i, piece in enumerate([*special, *characters, *longer, "<mask>"])}
    assert len(vocabulary) == VOCAB
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|[\\s\\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )


def causal_keys(model, tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [H, S, D] of every layer after stock transformers has run ``tokens`` in one causal forward."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without the configuration, so that no layer forgets what is outside its window
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.fixture
def cache_error():
    """``cache_error(model, cache, place, tokens)``: how far slots 0.. are from a fresh prefill of tokens."""

    def error(model, cache, place: int, tokens: list[int]) -> float:
        worst = 0.0
        for layer, (keys, values) in zip(cache.layers, causal_keys(model, tokens), strict=True):
            worst = max(worst, (layer.keys[place, :, : len(tokens)] - keys).abs().max().item())
            worst = max(worst, (layer.values[place, :, : len(tokens)] - values).abs().max().item())
        return worst

    return error


def chi_square_z(samples: torch.Tensor, distribution: torch.Tensor) -> float:
    """How many standard deviations ``samples`` [N, length] are from the exact distribution [V, V, ...] of texts.

    Pearson's test with rare texts pooled, in Wilson and Hilferty's normal approximation; a text that the distribution excludes
    is infinitely far.
    """
    vocab, count = distribution.shape[0], len(samples)
    index = sum(samples[:, i] * vocab ** (samples.shape[1] - 1 - i) for i in range(samples.shape[1]))
    seen, expected = (
        torch.bincount(index, minlength=distribution.numel()).double(),
        distribution.flatten().double() * count,
    )
    assert abs(expected.sum() / count - 1) < 1e-5
    if seen[expected == 0].any():
        return float("inf")
    common = expected >= 5
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    seen, expected = seen[expected > 1], expected[expected > 1]
    freedom = len(seen) - 1
    assert freedom >= 2
    mean = ((seen - expected) ** 2 / expected).sum() / freedom
    return float((mean ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5)


class ScriptedEngine(Engine):
    """The logits of a row come from ``script(sequence, position)`` [V] instead of a model; keeps the rows of every forward."""

    device = torch.device("cpu")

    def __init__(self, script):
        super().__init__(SimpleNamespace())
        self.script, self.forwards = script, []

    def new_cache(self, batch_size: int) -> SlotCache:
        cache = SlotCache(0, batch_size)
        cache.tokens = [[i] for i in range(batch_size)]  # so that reordering the cache tells which sequences are left
        return cache

    def forward(self, rows: Rows, cache: SlotCache) -> torch.Tensor:
        self.forwards.append(rows)
        sequence = torch.tensor([tokens[0] for tokens in cache.tokens])[:, None].expand_as(rows.positions)
        return torch.stack([sequence, rows.positions], dim=-1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.script(sequence, position).clone() for sequence, position in hidden.tolist()]).float()


@pytest.fixture
def run_scripted():
    """Run the real loop on scripted logits; gives (sequences, engine).

    ``script(sequence, position)`` are the logits [V] of the row at that position; ``lengths`` those of the prompts.
    """

    def run(decoder, script, lengths, max_new, eos=(), criteria=(), streamer=None, do_sample=False, steps=()):
        sequences = [
            Sequence(i, list(range(3, 3 + length)), length + max_new, torch.Generator().manual_seed(i))
            for i, length in enumerate(lengths)
        ]
        stopping = Stopping(frozenset(eos), tuple(criteria))
        distribution = LogitsPipeline(LogitsProcessorList(steps), do_sample, MASK, len(lengths))
        batch = Batch(sequences, distribution, stopping, MASK)
        engine = ScriptedEngine(script)
        writer = StreamWriter(streamer, len(lengths))
        decode(engine, decoder, batch, engine.new_cache(len(lengths)), writer)
        writer.end()
        return sequences, engine

    return run


class RecordingStreamer:
    """Keeps every call: ("put", ids), ("draft", ids), ("end", [])."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("put", value.flatten().tolist()))

    def put_draft(self, value):
        self.calls.append(("draft", value.flatten().tolist()))

    def end(self):
        self.calls.append(("end", []))

    def texts(self, kind: str) -> list[list[int]]:
        return [ids for name, ids in self.calls if name == kind]


@pytest.fixture
def recording_streamer():
    return RecordingStreamer()


@pytest.fixture
def count_rows(monkeypatch):
    """A list that gets, for every forward of the engine, the number of its rows without padding."""
    counts = []
    original = Engine.forward

    def forward(self, rows, cache):
        counts.append(sum(rows.counts))
        return original(self, rows, cache)

    monkeypatch.setattr(Engine, "forward", forward)
    return counts


@pytest.fixture
def unchanged():
    """``with unchanged(model): ...`` asserts that the model, its settings and its stock text are as they were."""

    def look(model) -> tuple:
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        text = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        settings = (copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.generation_config.to_dict()))
        return sorted(vars(model)), hooks, settings, logits.tolist(), text.tolist()

    @contextmanager
    def check(model):
        before = look(model)
        yield
        assert look(model) == before

    return check
