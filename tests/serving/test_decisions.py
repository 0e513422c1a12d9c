"""The sampler's decisions on tables in place of a model: distributions, prefixes and what is left of blocks."""

import math

import torch

from decoding.rules import EntropyBound, TopK
from serving.decisions import OpenBlocks, emitted_prefix, reveal, verify, without_prefix
from serving.uniforms import DRAW, TEST, uniforms
from tests.conftest import chi_square_z

WORDS = 4


def test_uniforms_are_uniform_and_depend_on_seed_position_and_purpose():
    seeds, positions = torch.arange(-500, 500)[:, None], torch.arange(100)[None]
    u = torch.stack([uniforms(seeds, positions, purpose) for purpose in (TEST, DRAW)])
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    bins = torch.bincount((u.flatten() * 20).long(), minlength=20)
    assert ((bins - u.numel() / 20) ** 2 / (u.numel() / 20)).sum() < 19 + 4 * math.sqrt(2 * 19)
    for a, b in ((u[0], u[1]), (u[:, 1:], u[:, :-1]), (u[..., 1:], u[..., :-1]), (u[0, :, 1:], u[1, :, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015
    assert torch.equal(u[0, 3:4, 5:6], uniforms(seeds[3:4], positions[:, 5:6], TEST))


def test_speculation_in_one_forward_keeps_the_distribution():
    """20,000 texts of 6 words from a table of next words; drafts come from another table, and are all wrong at times.

    The loop is that of the sampler: verify what is held, then hold new drafts only where all were accepted.
    """
    torch.manual_seed(0)
    table = (1.5 * torch.randn(WORDS, WORDS, WORDS)).softmax(-1)  # by the last two words
    guesses = torch.randint(WORDS, (WORDS, 3))  # by the last word: three drafts
    count, length, drafts = 20000, 6, 3
    seeds = torch.arange(count)[:, None]
    text = torch.zeros(count, 2 + length + 2 * (drafts + 1), dtype=torch.long)
    end = torch.full((count,), 2)
    held = torch.zeros(count, dtype=torch.long)  # how many drafts
    canvas = torch.zeros(count, drafts, dtype=torch.long)
    while bool((end < 2 + length).any()):
        place = end[:, None] + torch.arange(drafts)
        tried = text.scatter(1, place, canvas)
        rows = torch.stack([tried.gather(1, place - back) for back in (2, 1)])
        rows = torch.cat([rows, torch.stack([tried.gather(1, end[:, None] + drafts - back) for back in (2, 1)])], dim=2)
        scores = table[rows[0], rows[1]].log().flatten(0, 1)
        index = torch.arange(count)[:, None] * (drafts + 1) + torch.minimum(torch.arange(drafts + 1), held[:, None])
        positions = end[:, None] - 1 + torch.minimum(torch.arange(drafts + 1), held[:, None])
        uniform = torch.cat([uniforms(seeds, positions[:, :-1], TEST), uniforms(seeds, positions[:, :1], DRAW)], dim=1)
        greedy = torch.zeros(count, dtype=torch.bool)
        accepted, emitted = verify(scores, index, canvas, held, greedy, uniform)
        running = end < 2 + length
        fits = (torch.arange(drafts + 1) <= accepted[:, None]) & running[:, None]
        where = end[:, None] + torch.arange(drafts + 1)
        text = torch.where(
            torch.zeros_like(text, dtype=torch.bool).scatter(1, where, fits), text.scatter(1, where, emitted), text
        )
        canvas = guesses[text.gather(1, (end + accepted)[:, None])[:, 0]]
        held = torch.where(accepted == held, drafts, 0)
        end = torch.where(running, end + accepted + 1, end)
    distribution = torch.zeros(WORDS, WORDS)
    distribution[0, 0] = 1
    for _ in range(length - 3):
        distribution = torch.einsum("ab,abc->bc", distribution, table)
    exact = torch.einsum("ab,abc,bcd,cde->cde", distribution, table, table, table)
    samples = text[:, 2 + length - 3 : 2 + length]
    assert chi_square_z(samples, exact) < 3.8
    assert chi_square_z(samples, exact.flip(0)) > 6


def test_greedy_and_sampled_requests_in_one_batch():
    scores = torch.tensor([[0.0, 5.0, 1.0], [4.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    rows, drafts = torch.tensor([[0, 1, 2], [0, 0, 0]]), torch.tensor([[1, 2], [0, 0]])
    uniform = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.999999]], dtype=torch.float64)
    accepted, emitted = verify(scores, rows, drafts, torch.tensor([2, 0]), torch.tensor([True, False]), uniform)
    assert accepted.tolist() == [1, 0]
    assert emitted[0, :2].tolist() == [1, 0] and emitted[1, 0] == 2


def blocks_of(tokens: list[list[int]], masked: list[list[int]], lengths: list[int]) -> OpenBlocks:
    return OpenBlocks(torch.tensor(tokens), torch.tensor(masked).bool(), torch.tensor(lengths))


def test_rules_of_several_requests_in_one_step():
    """One reveals a token, the other everything; what is decided stays, and padding is never touched."""
    logits = torch.eye(5)[:4] * torch.tensor([1.0, 3.0, 2.0, 1.0])[:, None]
    blocks = blocks_of([[9, 9, 9, 9], [9, 7, 9, 9]], [[1, 1, 1, 1], [1, 0, 1, 0]], [4, 3])
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 2]])
    rules = [(TopK(1), torch.tensor([True, False])), (EntropyBound(1e9), torch.tensor([False, True]))]
    after = reveal(blocks, logits, logits, rows, None, rules, None, None, None)
    assert after.tokens.tolist() == [[9, 1, 9, 9], [0, 7, 2, 9]]
    assert after.masked.tolist() == [[True, False, True, True], [False, False, False, False]]


def test_what_is_emitted_of_a_block():
    """Only full blocks, or prefixes where the decoder says so, or where the text ends: by a token or by its room."""
    blocks = blocks_of([[4, 5, 6, 9]] * 6, [[0, 0, 0, 1]] * 5 + [[0] * 4], [4, 4, 4, 3, 4, 4])
    by_prefix = torch.tensor([False, True, False, False, False, False])
    ends = torch.tensor([[-1], [-1], [5], [-1], [9], [-1]])
    room = torch.tensor([9, 9, 9, 9, 3, 9])
    assert emitted_prefix(blocks, by_prefix, ends, room).tolist() == [0, 3, 3, 3, 3, 4]


def test_what_is_left_of_a_block():
    mask = 8
    blocks = blocks_of([[1, 2, 8, 4], [1, 2, 8, 8], [1, 2, 3, 4]], [[0, 0, 1, 0], [0, 0, 1, 1], [0] * 4], [4, 3, 4])
    left = without_prefix(blocks, torch.tensor([2, 0, 4]), mask)
    assert left.tokens.tolist() == [[8, 4, 8, 8], [1, 2, 8, 8], [8, 8, 8, 8]]
    assert left.masked.tolist() == [[True, False, True, True], [False, False, True, True], [True] * 4]
