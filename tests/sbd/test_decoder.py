"""SetBlockDecoder without a model: scripted logits, every reveal order, stops inside a block."""

import itertools

import pytest
import torch
from transformers.generation import logits_process as processors
from transformers.generation.stopping_criteria import StopStringCriteria

from decoding import Step
from decoding.batch import Batch, Sequence, Stopping
from decoding.sampling import LogitsPipeline
from sbd import ConfidenceThreshold, EntropyBound, SetBlockDecoder, TopK
from tests.conftest import MASK, VOCAB, RecordingStreamer

PROMPT = 3


def in_order(text: list[int], order, start: int = PROMPT):
    """Logits under which the token of each position is certain, and ``order[offset]`` says when it is revealed."""

    def script(sequence: int, position: int) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        offset = position - start
        rank = order[offset % len(order)]
        logits[text[offset] if offset < len(text) else 90] = 9.0 - rank
        return logits

    return script


ORDERS = list(itertools.permutations(range(4)))


def revealed_in(order, i: int) -> int:
    """The forward that reveals new token i when each forward reveals one."""
    return 4 * (i // 4) + order[i % 4] + 1


@pytest.mark.parametrize("commit", ["block", "prefix"])
@pytest.mark.parametrize("stop_at", range(8))
def test_eos_inside_a_block_in_every_reveal_order(run_scripted, commit, stop_at):
    text = [40 + i for i in range(8)]
    for order in ORDERS:
        streamer = RecordingStreamer()
        decoder = SetBlockDecoder(4, TopK(1), commit=commit)
        (sequence,), engine = run_scripted(
            decoder, in_order(text, order), [PROMPT], 8, eos=[text[stop_at]], streamer=streamer
        )
        assert sequence.new_tokens == text[: stop_at + 1]
        assert sequence.finished
        # the end is there as soon as nothing masked is left of the EOS
        expected = [revealed_in(order, i) for i in range(stop_at + 1)]
        assert sequence.decided_at == expected
        assert sequence.forwards == max(expected) == len(engine.forwards)
        assert sum(streamer.texts("put"), []) == text[: stop_at + 1]
        # keys and values: whole blocks, or what was without a gap before the last forward; the rest is still to be run
        known = next(i for i in range(stop_at + 1) if revealed_in(order, i) >= sequence.forwards)
        assert sequence.cached == PROMPT + (4 * (stop_at // 4) if commit == "block" else known)
        assert len(sequence.tokens) == PROMPT + stop_at + 1


@pytest.mark.parametrize(("stop", "kept"), [("c", 3), ("ab", 2), ("de", 5), ("cdefg", 7), ("h", 8), ("zz", 8)])
def test_stop_strings_inside_and_across_blocks_in_every_reveal_order(run_scripted, tokenizer, stop, kept):
    text = [tokenizer.convert_tokens_to_ids(character) for character in "abcdefgh"]
    for order in ORDERS:
        streamer = RecordingStreamer()
        criteria = [StopStringCriteria(tokenizer, [stop])]
        decoder = SetBlockDecoder(4, TopK(1))
        (sequence,), _ = run_scripted(decoder, in_order(text, order), [PROMPT], 8, criteria=criteria, streamer=streamer)
        assert tokenizer.decode(sequence.new_tokens) == "abcdefgh"[:kept]
        assert sequence.forwards == max(sequence.decided_at)
        assert sequence.forwards == max(revealed_in(order, i) for i in range(kept))
        assert sum(streamer.texts("put"), []) == text[:kept]


@pytest.mark.parametrize("limit", range(1, 10))
def test_the_limit_cuts_inside_a_block(run_scripted, limit):
    text = list(range(40, 52))
    (sequence,), engine = run_scripted(SetBlockDecoder(4, TopK(1)), in_order(text, [3, 0, 2, 1]), [PROMPT], limit)
    assert sequence.new_tokens == text[:limit]
    assert sequence.forwards == max(sequence.decided_at) == len(engine.forwards)


def rows_of(engine) -> list[tuple[list[int], list[int], list[int]]]:
    """For each forward of a single sequence: tokens, positions and which rows are block rows."""
    return [(r.tokens[0].tolist(), r.positions[0].tolist(), r.is_block[0].int().tolist()) for r in engine.forwards]


def test_rows_of_every_forward(run_scripted):
    text = [40, 41, 42, 43, 44, 45]
    (sequence,), engine = run_scripted(SetBlockDecoder(3, TopK(1)), in_order(text, [1, 0, 2]), [PROMPT], 6)
    m = MASK
    assert rows_of(engine) == [
        ([3, 4, 5, m, m, m], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1]),
        ([m, 41, m], [3, 4, 5], [1, 1, 1]),
        ([40, 41, m], [3, 4, 5], [1, 1, 1]),
        # the finished block runs as text in the forward that opens the next one
        ([40, 41, 42, m, m, m], [3, 4, 5, 6, 7, 8], [0, 0, 0, 1, 1, 1]),
        ([m, 44, m], [6, 7, 8], [1, 1, 1]),
        ([43, 44, m], [6, 7, 8], [1, 1, 1]),
    ]
    (sequence,), engine_of_prefixes = run_scripted(
        SetBlockDecoder(3, TopK(1), commit="prefix"), in_order(text, [1, 0, 2]), [PROMPT], 6
    )
    assert rows_of(engine_of_prefixes) == [
        ([3, 4, 5, m, m, m], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1]),
        ([m, 41, m], [3, 4, 5], [1, 1, 1]),
        # what is decided without a gap runs as text at once, and the block is what is left
        ([40, 41, m], [3, 4, 5], [0, 0, 1]),
        ([42, m, m, m], [5, 6, 7, 8], [0, 1, 1, 1]),
        ([m, 44, m], [6, 7, 8], [1, 1, 1]),
        ([43, 44, m], [6, 7, 8], [0, 0, 1]),
    ]
    for rows in engine.forwards + engine_of_prefixes.forwards:
        block = rows.is_block[0]
        seen = rows.visibility.as_bool(rows.num_slots)[0, 0]
        assert seen[block].all()
        assert torch.equal(seen[~block].sum(-1), rows.positions[0][~block] + 1)
        assert rows.positions[0].tolist() == list(range(rows.slots.start, rows.slots.stop))


def test_a_revealed_token_is_never_masked_or_changed_again(run_scripted):
    calls = itertools.count()

    def script(sequence: int, position: int) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        logits[(7 * position + 13 * next(calls)) % 90] = 3.0  # another favourite each time it is asked
        return logits

    (sequence,), engine = run_scripted(SetBlockDecoder(5, TopK(1)), script, [PROMPT], 10)
    seen: dict[int, int] = {}
    for rows in engine.forwards:
        for token, position in zip(rows.tokens[0].tolist(), rows.positions[0].tolist(), strict=True):
            if token != MASK or position in seen:
                assert seen.setdefault(position, token) == token
    assert [seen[p] for p in range(PROMPT, PROMPT + 5)] == sequence.new_tokens[:5]


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_bound_zero_is_one_token_and_infinity_one_block_per_forward(run_scripted, k):
    order = [(3 * i + 1) % k for i in range(k)] if k % 3 else list(range(k))
    text = list(range(20, 20 + 6 * k))
    script = in_order(text, order)
    if k == 1:  # a block of one reads the causal row before it

        def script(sequence: int, position: int) -> torch.Tensor:
            return in_order(text, order)(sequence, position + 1)

    (slow,), _ = run_scripted(SetBlockDecoder(k, EntropyBound(0.0)), script, [PROMPT], 6 * k)
    (fast,), _ = run_scripted(SetBlockDecoder(k, EntropyBound(float("inf"))), script, [PROMPT], 6 * k)
    assert slow.new_tokens == fast.new_tokens == text
    assert slow.forwards == 6 * k and fast.forwards == 6
    assert fast.decided_at == [1 + i // k for i in range(6 * k)]


def test_the_mask_is_never_emitted_and_never_counted(run_scripted):
    def script(sequence: int, position: int) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        logits[20 + position] = 4.0
        logits[MASK] = 1e4
        return logits

    for rule in (EntropyBound(0.0), EntropyBound(0.5), ConfidenceThreshold(0.9), TopK(2)):
        (sequence,), _ = run_scripted(SetBlockDecoder(4, rule), script, [PROMPT], 8)
        assert sequence.new_tokens == [20 + p for p in range(PROMPT, PROMPT + 8)]
    # with the mask's logit counted every row would be certain and a bound of 0 would reveal whole blocks
    (sequence,), _ = run_scripted(SetBlockDecoder(4, EntropyBound(0.0)), script, [PROMPT], 8)
    assert sequence.forwards == 8


def test_a_token_whose_id_is_the_masks_stays_text(run_scripted):
    """A prompt full of the literal mask token, and a decoder that must not take it for a hole."""
    text = [40, 41, 42, 43]

    class Prompted(Sequence):
        def __post_init__(self):
            self.tokens[:] = [MASK] * len(self.tokens)
            super().__post_init__()

    decoder = SetBlockDecoder(4, TopK(1))
    sequence = Prompted(0, [0] * PROMPT, PROMPT + 4, torch.Generator())
    batch = Batch([sequence], LogitsPipeline([], False, MASK), Stopping(), MASK)
    rows = decoder.plan(batch)[0]
    assert rows.tokens == [MASK] * (PROMPT + 4)
    assert rows.is_block == [0] * PROMPT + [1] * 4
    assert sequence.state.masked == [True] * 4
    (reference,), _ = run_scripted(decoder, in_order(text, [0, 1, 2, 3]), [PROMPT], 4)
    assert reference.new_tokens == text


def test_ragged_sequences_fill_their_blocks_at_their_own_pace(run_scripted):
    """One sequence reveals a token a forward, one two, one whole blocks; each ends as if it were alone."""
    texts = [[20 + i for i in range(9)], [40 + i for i in range(9)], [60 + i for i in range(9)]]
    lengths = [2, 5, 3]

    def script(sequence: int, position: int) -> torch.Tensor:
        offset = position - lengths[sequence]
        logits = torch.zeros(VOCAB)
        logits[texts[sequence][offset] if offset < 9 else 90] = (2.0, 8.0, 40.0)[sequence] + 0.01 * (offset % 4)
        return logits

    decoder, streams = SetBlockDecoder(4, EntropyBound(0.08)), []
    together, engine = run_scripted(decoder, script, lengths, 9, eos=[46])
    for i in range(3):
        (alone,), single = run_scripted(decoder, lambda s, p, i=i: script(i, p), lengths[i : i + 1], 9, eos=[46])
        streams.append(len(single.forwards))
        for name in ("new_tokens", "decided_at", "forwards", "cached"):
            assert getattr(together[i], name) == getattr(alone, name)
    assert streams == sorted(streams, reverse=True) and streams[0] > streams[1] > streams[2]
    assert together[1].new_tokens == texts[1][:7]
    assert len(engine.forwards) == max(streams)
    widths = [len(rows.counts) for rows in engine.forwards]
    assert widths[0] == 3 and widths[-1] == 1  # finished sequences leave the batch


def anchored_script(sequence: int, position: int) -> torch.Tensor:
    """The row of position p says 20 + p, so a causal row and a block row disagree about the same token."""
    logits = torch.zeros(VOCAB)
    logits[20 + position] = 3.0
    return logits


def test_the_anchor_decides_the_first_token_of_a_block_by_the_causal_row(run_scripted):
    text = list(range(20 + PROMPT, 20 + PROMPT + 8))
    (plain,), _ = run_scripted(SetBlockDecoder(4, EntropyBound(0.0)), anchored_script, [PROMPT], 8)
    (anchored,), _ = run_scripted(SetBlockDecoder(4, EntropyBound(0.0), anchor=True), anchored_script, [PROMPT], 8)
    assert plain.new_tokens == text
    assert anchored.new_tokens == [text[0] - 1, *text[1:4], text[4] - 1, *text[5:]]
    # the opening forward of a block reveals the anchored token, whatever the others
    assert anchored.decided_at[0] == 1 and anchored.decided_at[4] == 5


def test_the_anchor_comes_first_whatever_its_rank(run_scripted):
    def script(sequence: int, position: int) -> torch.Tensor:
        return anchored_script(sequence, position) * (0.1 if position == PROMPT - 1 else 2.0)

    (sequence,), _ = run_scripted(SetBlockDecoder(4, TopK(1), anchor=True), script, [PROMPT], 4)
    assert sequence.decided_at == [1, 2, 3, 4] and sequence.new_tokens[0] == 20 + PROMPT - 1


@pytest.mark.parametrize("anchor", [False, True])
def test_a_block_of_one_only_reads_causal_rows(run_scripted, anchor):
    (sequence,), engine = run_scripted(SetBlockDecoder(1, anchor=anchor), anchored_script, [PROMPT], 5)
    assert sequence.new_tokens == [20 + PROMPT - 1 + i for i in range(5)]
    assert sequence.decided_at == [1, 2, 3, 4, 5]


def test_every_forward_has_an_anchor_when_prefixes_are_committed(run_scripted):
    """Certainty falls to the left, so block rows fill from the right and the anchor from the left."""

    def script(sequence: int, position: int) -> torch.Tensor:
        logits = anchored_script(sequence, position)
        return logits * (0.5 + position / 10)

    decoder = SetBlockDecoder(6, TopK(2), anchor=True, commit="prefix")
    (sequence,), engine = run_scripted(decoder, script, [PROMPT], 6)
    assert sequence.decided_at == [1, 2, 3, 3, 2, 1]
    row = [PROMPT + i - 1 for i in range(3)] + [PROMPT + 3, PROMPT + 4, PROMPT + 5]  # causal rows, then block rows
    assert sequence.new_tokens == [20 + r for r in row]


@pytest.mark.parametrize("padding", [[], [9, 9]])
def test_processors_see_what_is_decided_to_the_left(padding):
    """A processor that keeps a diary, on a block whose second token is decided: holes show the mask."""
    diary = []

    class Diary(processors.RepetitionPenaltyLogitsProcessor):
        def __call__(self, input_ids, scores):
            diary.append(input_ids[0].tolist())
            return scores

    distribution = LogitsPipeline([Diary(1.5)], False, MASK)
    sequence = Sequence(0, [3, 4], 6, torch.Generator(), padding)
    batch, decoder = Batch([sequence], distribution, Stopping(), MASK), SetBlockDecoder(4, TopK(1))
    distribution.check_holes("SetBlockDecoder")

    def head(positions) -> torch.Tensor:
        certain = torch.zeros(len(positions), VOCAB)
        for i, offset in enumerate((positions[:, 0] - 2).tolist()):
            certain[i, 50 + offset] = {0: 1.0, 1: 9.0, 2: 5.0, 3: 3.0}[offset]
        return certain

    for _ in range(2):
        (rows,) = decoder.plan(batch)
        sequence.forwards += 1
        decoder.absorb(batch, Step([sequence], [rows], torch.tensor(rows.positions)[None, :, None], head))
    m = MASK
    assert diary[:4] == [padding + [3, 4], padding + [3, 4, m], padding + [3, 4, m, m], padding + [3, 4, m, m, m]]
    assert diary[4:] == [padding + [3, 4], padding + [3, 4, m, 51], padding + [3, 4, m, 51, m]]


def test_scores_are_measured_on_the_sampled_or_the_raw_distribution(run_scripted):
    """Cut to one token every row is certain: measured after the cut a bound of 0 reveals whole blocks."""
    script = in_order(list(range(40, 48)), [0, 1, 2, 3])
    forwards = {}
    for source in ("sampled", "raw"):
        decoder = SetBlockDecoder(4, EntropyBound(0.0), entropy_from=source)
        (sequence,), _ = run_scripted(
            decoder, script, [PROMPT], 8, do_sample=True, steps=[processors.TopKLogitsWarper(1)]
        )
        assert sequence.new_tokens == list(range(40, 48))
        forwards[source] = sequence.forwards
    assert forwards == {"sampled": 2, "raw": 8}
