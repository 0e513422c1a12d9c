"""SetBlockDecoder on tiny models: cached = uncached, batched = single, exact cache, block size 1 = next token."""

import gc
import math

import pytest
import torch
from torch.distributions import Categorical

from decoding import Engine, NextTokenDecoder
from decoding.batch import Batch, Stopping
from decoding.decoder import decode
from decoding.forward.cache import SlotCache
from decoding.request import make_sequences
from decoding.sampling import LogitsPipeline
from sbd import ConfidenceThreshold, EntropyBound, SetBlockDecoder, TopK
from tests.conftest import FAMILIES, MASK, chi_square_z

FULL = {"return_dict_in_generate": True, "do_sample": False}
DOUBLE = torch.float64


def uncached_logits(model, text: list[int], block: list[int]) -> torch.Tensor:
    """Logits of the text's last row and of every block row, [1 + k, V], from one stock forward with a literal mask."""
    n, rows = len(text), len(text) + len(block)
    query, key = torch.arange(rows)[:, None], torch.arange(rows)[None]

    def mask(window: int | None) -> torch.Tensor:
        prefix = (key < n) & ((key <= query) | (query >= n))
        if window is not None:
            prefix &= query - key < window
        seen = prefix | ((query >= n) & (key >= n))
        return torch.zeros(1, 1, rows, rows, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)

    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None)
    masks = {"full_attention": mask(None), "sliding_attention": mask(window)} if kinds else mask(window)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text + block]), attention_mask=masks, use_cache=False).logits[0]
    return logits[n - 1 :].float()


def reference(model, text: list[int], count: int, k: int, bound: float, anchor=False, commit="block"):
    """Algorithms 2 and 3 of the paper in plain steps, everything computed anew in each forward: (tokens, trace)."""
    text, trace, forward, wanted = list(text), [], 0, len(text) + count
    while len(text) < wanted:
        block, masked, decided, anchored = [MASK] * k, [True] * k, [0] * k, anchor
        while any(masked):
            forward += 1
            causal, *rows = uncached_logits(model, text, block)
            if anchored:
                rows[0] = causal
            for row in rows:
                row[MASK] = -math.inf
            entropy = [Categorical(logits=row).entropy().item() for row in rows]
            order = sorted((i for i in range(len(block)) if masked[i]), key=lambda i: (entropy[i], i))
            if anchored:
                order = [0, *(i for i in order if i)]
            chosen, total = [], []
            for i in order:
                total.append(0.0 if anchored and i == 0 else entropy[i])
                if chosen and sum(total) - (0 if anchored else max(total)) > bound:
                    break
                chosen.append(i)
            for i in chosen:
                block[i], masked[i], decided[i] = rows[i].argmax().item(), False, forward
            anchored = False
            while commit == "prefix" and masked and not masked[0]:
                text, trace, anchored = text + block[:1], trace + decided[:1], anchor
                block, masked, decided = block[1:], masked[1:], decided[1:]
        text, trace = text + block, trace + decided
    return text[wanted - count : wanted], trace[:count]


FILLING = [(family, anchor, "block") for family in FAMILIES for anchor in (False, True)]
FILLING += [(family, anchor, "prefix") for family in ("llama-3.1", "qwen2-window", "qwen3") for anchor in (False, True)]


@pytest.mark.parametrize(("family", "anchor", "commit"), FILLING)
def test_cached_equals_uncached(shared_model, prompts, family, anchor, commit):
    model = shared_model(family, DOUBLE)
    forwards = []
    for bound in (0.0, 1.0, 2.5, 4.0, math.inf):
        inputs = prompts(11)
        decoder = SetBlockDecoder(block_size=6, rule=EntropyBound(bound), anchor=anchor, commit=commit)
        output = model.generate(**inputs, max_new_tokens=15, custom_generate=decoder, **FULL)
        tokens, trace = reference(model, inputs["input_ids"][0].tolist(), 15, 6, bound, anchor, commit)
        assert output.sequences[0, 11:].tolist() == tokens
        assert output.trace[0] == trace
        forwards.append(output.forwards.item())
    # the last block of six is cut at 15 tokens, so its forwards count up to the last of the three that are kept
    assert forwards[0] >= 15 and forwards[-1] == 3
    assert len(set(forwards)) > 2


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_eager_decodes_the_same_text(fresh_model, prompts, family):
    texts = []
    for form in ("sdpa", "eager"):
        model = fresh_model(family)
        model.set_attn_implementation(form)
        decoder = SetBlockDecoder(block_size=5, rule=EntropyBound(1.5))
        texts.append(model.generate(**prompts(4, 11), max_new_tokens=12, custom_generate=decoder, **FULL))
    assert torch.equal(texts[0].sequences, texts[1].sequences) and texts[0].trace == texts[1].trace


@pytest.mark.parametrize("family", FAMILIES)
def test_block_size_one_is_greedy_generate(shared_model, prompts, family):
    """The causal row before the block gives the next-token distribution; the mask is the only token ruled out."""
    model = shared_model(family)
    for lengths, commit in (((9,), "block"), ((7, 12, 3), "block"), ((7, 12, 3), "prefix")):
        decoder = SetBlockDecoder(block_size=1, commit=commit)
        inputs = prompts(*lengths)
        stock = model.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=[MASK])
        output = model.generate(**inputs, max_new_tokens=24, custom_generate=decoder, **FULL)
        assert torch.equal(output.sequences, stock)
        assert output.forwards.tolist() == [24] * len(lengths)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-window", "qwen3"])
def test_one_token_a_forward_from_the_anchor_is_greedy_generate(shared_model, prompts, family):
    """Whatever the size of the block: with the prefix committed at once, each forward has an anchor."""
    model, inputs = shared_model(family), prompts(7, 12, 3)
    decoder = SetBlockDecoder(block_size=5, rule=TopK(1), anchor=True, commit="prefix")
    stock = model.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=[MASK])
    output = model.generate(**inputs, max_new_tokens=24, custom_generate=decoder, **FULL)
    assert torch.equal(output.sequences, stock)
    assert output.trace == (list(range(1, 25)),) * 3


def test_block_size_one_samples_what_next_token_decoding_samples(shared_model, prompts):
    model, inputs, texts = shared_model("llama"), prompts(5, 9), []
    for decoder in (SetBlockDecoder(block_size=1), NextTokenDecoder()):
        torch.manual_seed(3)
        arguments = {"do_sample": True, "temperature": 1.3, "top_k": 30, "suppress_tokens": [MASK]}
        texts.append(model.generate(**inputs, max_new_tokens=15, custom_generate=decoder, **arguments))
    assert torch.equal(*texts)


@pytest.mark.parametrize("bound", [0.0, 0.5, math.inf])
def test_forwards_at_the_ends_of_the_bound(shared_model, prompts, bound):
    model = shared_model("llama")
    decoder = SetBlockDecoder(block_size=6, rule=EntropyBound(bound))
    output = model.generate(**prompts(4, 9, 7), max_new_tokens=24, custom_generate=decoder, **FULL)
    for trace, forwards in zip(output.trace, output.forwards.tolist(), strict=True):
        if bound == 0:
            assert sorted(trace) == list(range(1, 25)) and forwards == 24
        elif bound == math.inf:
            assert trace == [1 + i // 6 for i in range(24)] and forwards == 4
        else:
            assert 4 < forwards <= 24


RAGGED = (3, 14, 8, 5)


@pytest.mark.parametrize("family", ["llama-tied", "llama-3.1", "qwen2-window", "qwen3", "mistral-window"])
@pytest.mark.parametrize("commit", ["block", "prefix"])
def test_batched_equals_single(shared_model, prompts, new_tokens, family, commit):
    """Ragged prompts, blocks in different phases, ends at different times."""
    model = shared_model(family, DOUBLE)
    decoder = SetBlockDecoder(block_size=5, rule=EntropyBound(2.5), anchor=commit == "prefix", commit=commit)
    arguments = {"max_new_tokens": 17, "eos_token_id": [20, 30, 40, 50], "custom_generate": decoder, **FULL}
    inputs = prompts(*RAGGED)
    together = model.generate(**inputs, **arguments)
    for i, length in enumerate(RAGGED):
        prompt = inputs["input_ids"][i][inputs["attention_mask"][i].bool()]
        alone = model.generate(prompt[None], **arguments)
        assert new_tokens(together, i, 14) == alone.sequences[0, length:].tolist()
        assert together.trace[i] == alone.trace[0]
        assert together.forwards[i] == alone.forwards[0] == max(alone.trace[0])
    assert len(set(together.forwards.tolist())) > 1


def run_and_watch(model, inputs, decoder, max_new: int, watch, eos=()) -> list:
    """Decode and call ``watch(cache, batch, sequences)`` after each forward, sequences as they lie in the cache."""
    width = inputs["input_ids"].shape[1]
    sequences = make_sequences(model, inputs["input_ids"], inputs["attention_mask"], width + max_new)
    batch = Batch(sequences, LogitsPipeline([], False, MASK, len(sequences)), Stopping(frozenset(eos)), MASK)
    engine = Engine(model)
    cache = engine.new_cache(len(sequences))

    class Watched(type(decoder)):
        def absorb(self, batch, step):
            super().absorb(batch, step)
            watch(cache, batch, step.sequences)

    decode(engine, Watched(**vars(decoder)), batch, cache)
    return sequences


@pytest.mark.parametrize("commit", ["block", "prefix"])
@pytest.mark.parametrize("family", ["llama", "llama-3.1", "qwen2-window", "qwen3", "mistral-window"])
def test_keys_and_values_are_a_fresh_prefill_after_every_ragged_step(
    shared_model, prompts, cache_error, family, commit
):
    model = shared_model(family, DOUBLE)
    lengths_seen = set()

    def watch(cache, batch, in_cache):
        for place, sequence in enumerate(in_cache):
            assert cache_error(model, cache, place, sequence.tokens[: sequence.cached]) < 1e-10
        lengths_seen.add(tuple(sequence.cached for sequence in in_cache))

    decoder = SetBlockDecoder(block_size=4, rule=EntropyBound(1.5), commit=commit)
    sequences = run_and_watch(model, prompts(3, 9, 6), decoder, 17, watch, eos=[20, 30, 40])
    assert all(sequence.finished for sequence in sequences) and len(lengths_seen) > 3
    assert {len(lengths) for lengths in lengths_seen} != {3}  # some sequence ended early and left


@pytest.mark.parametrize("commit", ["block", "prefix"])
@pytest.mark.parametrize("where", range(9))
def test_a_stop_inside_a_block_cuts_ids_counts_and_cache_alike(shared_model, prompts, cache_error, where, commit):
    model, inputs = shared_model("qwen3", DOUBLE), prompts(7)
    decoder = SetBlockDecoder(block_size=5, rule=TopK(2), commit=commit)
    free = model.generate(**inputs, max_new_tokens=15, custom_generate=decoder, **FULL)
    text = free.sequences[0, 7:].tolist()
    end = text.index(text[where]) + 1
    cache = SlotCache(2)
    arguments = {"eos_token_id": text[where], "past_key_values": cache, "custom_generate": decoder, **FULL}
    output = model.generate(**inputs, max_new_tokens=15, **arguments)
    assert output.sequences[0, 7:].tolist() == text[:end] and output.new_tokens.item() == end
    assert output.trace[0] == free.trace[0][:end] and output.forwards.item() == max(free.trace[0][:end])
    assert cache.tokens[0] == output.sequences[0, :-1].tolist()
    assert cache_error(model, cache, 0, cache.tokens[0]) < 1e-10


@pytest.mark.parametrize("rule", [EntropyBound(1.0), ConfidenceThreshold(0.6), TopK(3)])
def test_the_mask_is_never_emitted_however_large_its_logit(fresh_model, prompts, rule):
    model = fresh_model("llama")
    inputs = prompts(6, 4)
    decoder = SetBlockDecoder(block_size=5, rule=rule)
    before = model.generate(**inputs, max_new_tokens=20, custom_generate=decoder, **FULL)
    head = model.lm_head
    biased = torch.nn.Linear(head.in_features, head.out_features).requires_grad_(False)
    biased.weight.copy_(head.weight)
    biased.bias.zero_()[MASK] = 1e4
    model.lm_head = biased
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -1] == MASK
    after = model.generate(**inputs, max_new_tokens=20, custom_generate=decoder, **FULL)
    assert torch.equal(after.sequences, before.sequences) and after.trace == before.trace
    torch.manual_seed(0)
    sampled = model.generate(**inputs, max_new_tokens=20, do_sample=True, temperature=2.0, custom_generate=decoder)
    assert not (sampled[:, 6:] == MASK).any()


def test_the_literal_mask_token_in_a_prompt_is_text(shared_model, prompts):
    model, inputs = shared_model("llama", DOUBLE), prompts(9)
    inputs["input_ids"][0, [0, 4, 8]] = MASK
    decoder = SetBlockDecoder(block_size=4, rule=EntropyBound(1.5))
    output = model.generate(**inputs, max_new_tokens=11, custom_generate=decoder, **FULL)
    tokens, trace = reference(model, inputs["input_ids"][0].tolist(), 11, 4, 1.5)
    assert output.sequences[0, 9:].tolist() == tokens and output.trace[0] == trace
    assert torch.equal(output.sequences[:, :9], inputs["input_ids"])


@pytest.mark.parametrize("top_k", [0, 3])
def test_tokens_revealed_together_are_independent_draws(shared_model, monkeypatch, top_k):
    monkeypatch.setattr("decoding.forward.cache.GROWTH", 4)  # thousands of sequences, each a few tokens long
    model = shared_model("llama", vocab_size=7, initializer_range=0.4)
    mask, prompt = 6, [3, 1]
    decoder = SetBlockDecoder(block_size=2, rule=EntropyBound(math.inf), anchor=True)
    torch.manual_seed(5)
    arguments = {"do_sample": True, "top_k": top_k, "temperature": 1.5, "num_return_sequences": 1500}
    samples = model.generate(torch.tensor([prompt]), max_new_tokens=2, custom_generate=decoder, **arguments)[:, 2:]
    rows = uncached_logits(model, prompt, [mask, mask])[[0, 2]]  # the anchor is the causal row before the block
    rows[:, mask] = -math.inf
    if top_k:
        rows = rows.masked_fill(rows < rows.topk(top_k).values[:, -1:], -math.inf)
    first, second = (rows / 1.5).double().softmax(-1)
    assert chi_square_z(samples, first[:, None] * second) < 3.8
    assert chi_square_z(samples, second[:, None] * first) > 6


@pytest.mark.parametrize("decoder", [SetBlockDecoder(block_size=5, rule=TopK(2)), NextTokenDecoder()])
def test_no_tensor_of_rows_by_vocabulary_outlives_a_step(shared_model, prompts, decoder):
    size = 1009  # no other tensor ends in this dimension
    model = shared_model("llama", vocab_size=size)
    found = []

    def watch(cache, batch, in_cache):
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.dim())
        found.extend(tuple(tensor.shape) for tensor in tensors if tensor.shape[-1] == size)

    gc.collect()
    gc.freeze()  # leaves what is there already, weights included, out of the search
    try:
        sequences = run_and_watch(model, prompts(4, 9), decoder, 8, watch)
        assert all(len(sequence.new_tokens) == 8 for sequence in sequences)
        assert found == []
        kept = torch.zeros(3, size)
        watch(None, None, None)
        assert found == [tuple(kept.shape)]
    finally:
        gc.unfreeze()
