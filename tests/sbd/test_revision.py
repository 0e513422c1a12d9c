"""Revisions of a finished block: resampled or masked again, before it is committed."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LogitsProcessorList

from decoding import Engine, Revision, decoder_from_spec
from decoding.batch import Batch, Sequence, Stopping
from decoding.decoder import decode
from decoding.sampling import LogitsPipeline
from rpt import Resample, attach_offset_code
from rpt.config import ResampleConfig
from sbd import EntropyBound, Remask, SetBlockDecoder
from tests.conftest import MASK, build
from tests.rpt.test_decoder import uncached_previous

DICT = {"return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    code = attach_offset_code(model, ResampleConfig()).requires_grad_(False)
    code.table.copy_(torch.randn(code.table.shape, generator=torch.Generator().manual_seed(7)) / code.GAIN)
    return model


def run(model, decoder, prompt, count=30, ends=(), cache=None):
    sequence = Sequence(0, list(prompt), len(prompt) + count, torch.Generator().manual_seed(0))
    distribution = LogitsPipeline(LogitsProcessorList(), False, MASK)
    batch = Batch([sequence], distribution, Stopping(frozenset(ends)), MASK, config=model.config)
    engine = Engine(model)
    decode(engine, decoder, batch, cache or engine.new_cache(1))
    return sequence


REVISIONS = [
    Resample(accept="gibbs"),
    Resample("leftmost", "gibbs"),
    Resample(threshold=0.3),
    Resample("leftmost", threshold=0.3),
    Remask(0.01),
    Remask(0.2, rounds=3),
]


@pytest.mark.parametrize(
    "revision", [Resample(threshold=1.1), Resample("leftmost", threshold=1.1), Remask(0.0), Remask(0.0, 2)]
)
def test_a_revision_that_wants_nothing_changes_nothing(model, revision):
    """Nor does it cost forwards, but for the last block, which is run causally to be looked at."""
    for bound in (0.5, 6.0):
        plain = run(model, SetBlockDecoder(4, EntropyBound(bound)), [5, 6, 7])
        same = run(model, SetBlockDecoder(4, EntropyBound(bound), revision=revision), [5, 6, 7])
        assert same.new_tokens == plain.new_tokens and same.decided_at == plain.decided_at
        assert same.forwards == plain.forwards + 1 and not any(same.revisions)


@pytest.mark.parametrize("revision", REVISIONS)
def test_cache_after_a_run_is_a_fresh_prefill(model, cache_error, revision):
    cache = Engine(model).new_cache(1)
    sequence = run(model, SetBlockDecoder(5, EntropyBound(6.0), revision=revision), range(5, 20), cache=cache)
    assert len(sequence.new_tokens) == 30 and sum(sequence.revisions) > 2
    assert MASK not in sequence.new_tokens
    assert sequence.cached > 35
    assert cache_error(model, cache, 0, sequence.tokens[: sequence.cached]) < 1e-4


@pytest.mark.parametrize("revision", REVISIONS)
def test_batched_equals_single(model, prompts, new_tokens, revision):
    inputs = prompts(4, 17, 9)
    decoder = SetBlockDecoder(6, EntropyBound(6.0), revision=revision)
    together = model.generate(**inputs, max_new_tokens=30, custom_generate=decoder, **DICT)
    for i, mask in enumerate(inputs["attention_mask"]):
        ids = inputs["input_ids"][i][mask.bool()][None]
        alone = model.generate(ids, max_new_tokens=30, custom_generate=decoder, **DICT)
        assert new_tokens(together, i, 17) == new_tokens(alone, 0, int(mask.sum()))
        assert together.revisions[i] == alone.revisions[0] and together.trace[i] == alone.trace[0]


def test_leftmost_is_the_sequential_definition(model):
    """From left to right, each token given what stands before it then and the token after it, on uncached runs."""
    size, prompt = 6, list(range(40, 47))
    first = run(model, SetBlockDecoder(size, EntropyBound(6.0)), prompt, count=size).new_tokens
    text = prompt + first
    for i in range(len(prompt), len(text) - 1):
        text[i] = int(
            uncached_previous(model, ResampleConfig(), text, i, 2).index_fill(0, torch.tensor([MASK]), -1e9).argmax()
        )
    revised = run(model, SetBlockDecoder(size, EntropyBound(6.0), revision=Resample("leftmost", "gibbs")), prompt, size)
    assert revised.new_tokens == text[len(prompt) :] != first


def test_nonadjacent_judges_all_by_the_old_tokens(model):
    size, prompt = 6, list(range(40, 47))
    first = run(model, SetBlockDecoder(size, EntropyBound(6.0)), prompt, count=size).new_tokens
    text, expected, last = prompt + first, list(first), -2
    for offset in range(size - 1):
        distribution = uncached_previous(model, ResampleConfig(), text, len(prompt) + offset, 2)
        token = int(distribution.index_fill(0, torch.tensor([MASK]), -1e9).argmax())
        if token != first[offset] and offset > last + 1:
            expected[offset], last = token, offset
    revised = run(model, SetBlockDecoder(size, EntropyBound(6.0), revision=Resample(accept="gibbs")), prompt, size)
    assert revised.new_tokens == expected != first


@pytest.mark.parametrize("revision", REVISIONS)
def test_the_next_block_is_decided_on_the_revised_text(model, revision):
    """Two blocks in one run are those of two runs, the second from the revised text of the first."""
    decoder, prompt, size = SetBlockDecoder(6, EntropyBound(0.5), revision=revision), list(range(40, 47)), 6
    both = run(model, decoder, prompt, 2 * size).new_tokens
    first = run(model, decoder, prompt, size)
    assert any(first.revisions) or isinstance(revision, Remask)
    assert both == first.new_tokens + run(model, decoder, prompt + first.new_tokens, size).new_tokens


def test_remasking_refills_exactly_the_unlikely_tokens(model):
    size, prompt = 6, list(range(40, 47))
    first = run(model, SetBlockDecoder(size, EntropyBound(6.0)), prompt, count=size).new_tokens
    with torch.no_grad():
        logits = model(torch.tensor([prompt + first])).logits[0].index_fill(1, torch.tensor([MASK]), -torch.inf)
    likely = logits.softmax(-1)[range(len(prompt) - 1, len(prompt) + size - 1), first]
    below = likely.sort().values[size // 2].item()
    unlikely = (likely < below).tolist()
    revised = run(model, SetBlockDecoder(size, EntropyBound(6.0), revision=Remask(below)), prompt, size)
    changed = [a != b for a, b in zip(first, revised.new_tokens, strict=True)]
    assert all(u for u, c in zip(unlikely, changed, strict=True) if c) and any(changed)
    assert revised.revisions == [int(c) for c in changed]


@pytest.mark.parametrize("revision", REVISIONS)
def test_streaming_stops_and_ends_see_committed_tokens_only(model, recording_streamer, tokenizer, revision):
    decoder = SetBlockDecoder(5, EntropyBound(6.0), revision=revision)
    settings = {"max_new_tokens": 24, "custom_generate": decoder, "do_sample": False}
    ids = torch.tensor([[7, 8, 9]])
    out = model.generate(ids, streamer=recording_streamer, **settings)[0, 3:].tolist()
    assert sum(recording_streamer.texts("put")[1:], []) == out
    lengths = []
    for end in out[3:24:4]:  # a revision may take an EOS out of a block again: then the text goes on
        stopped = run(model, decoder, [7, 8, 9], 24, ends=(end,)).new_tokens
        assert end not in stopped[:-1] and (stopped[-1] == end or len(stopped) == 24)
        lengths.append(len(stopped))
    assert min(lengths) < 24
    stop = tokenizer.decode(out)[6:8]
    count = next(n for n in range(25) if stop in tokenizer.decode(out[:n]))
    stopped = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **settings)[0, 3:].tolist()
    assert stopped == out[:count]


@dataclass(frozen=True)
class Never(Revision):
    """Puts another token wherever one token stands, by a row that is in the forward anyway."""

    token: int
    other: int

    def check(self, model):
        if self.other >= model.config.vocab_size:
            raise ValueError("other is no token of this model")

    def is_done(self, block):
        return block.rounds > 0

    def add_rows(self, rows, causal, batch, sequence, block):
        assert [rows.positions[row] for row in causal] == [*range(block.start - 1, block.start + len(block.tokens))]
        assert rows.tokens[causal[0]] == sequence.tokens[-1] and rows.tokens[causal[-1]] == block.tokens[-1]
        return causal

    def revise(self, batch, step, index, block):
        assert step.logits([(index, block.rows)]).shape == (1 + len(block.tokens), step.head.__self__.model.vocab_size)
        block.rounds += 1
        found = [offset for offset, token in enumerate(block.tokens) if token == self.token]
        for offset in found:
            block.replace(offset, self.other, step.sequences[index].forwards)
        return bool(found)


def test_a_revision_of_ones_own(model):
    plain = run(model, SetBlockDecoder(4, EntropyBound(6.0)), [5, 6, 7])
    token = plain.new_tokens[1]
    revised = run(model, SetBlockDecoder(4, EntropyBound(6.0), revision=Never(token, 9)), [5, 6, 7])
    assert revised.new_tokens[:4] == [9 if found == token else found for found in plain.new_tokens[:4]]
    assert revised.revisions[1] == 1 and not {token, MASK} & set(revised.new_tokens)
    with pytest.raises(ValueError, match="other is no token of this model"):
        model.generate(torch.tensor([[5]]), custom_generate=SetBlockDecoder(4, revision=Never(0, 10_000)))


def test_specs_and_mistakes(model, fresh_model):
    assert decoder_from_spec("sbd:revise=resample,policy=leftmost,threshold=0.8") == SetBlockDecoder(
        revision=Resample("leftmost", threshold=0.8)
    )
    assert decoder_from_spec("sbd:block_size=8,revise=remask,remask_below=0.2,top_k=2").revision == Remask(0.2)
    for text, message in (
        ("sbd:revise=rewrite", "revise must be one of 'resample', 'remask', 'module:Class', got 'rewrite'"),
        ("sbd:revise=remask,policy=leftmost", "unknown key 'policy'"),
        ("sbd:revise=remask,remask_below=2", "remask_below"),
        ("sbd:revise=remask,rounds=0", "rounds"),
        ("sbd:revise=resample,policy=all", "policy"),
        ("sbd:revise=resample,commit=prefix", "commit must be 'block' with a revision"),
        ("ntp:revise=remask", "unknown key 'revise'"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder_from_spec(text)
    with pytest.raises(ValueError, match="revision must be None, Resample or Remask"):
        SetBlockDecoder(revision="remask")
    with pytest.raises(ValueError, match="not trained to predict previous tokens"):
        fresh_model("llama").generate(
            torch.tensor([[5]]), max_new_tokens=3, custom_generate=SetBlockDecoder(revision=Resample())
        )
