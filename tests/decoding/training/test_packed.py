"""Packed training rows: several documents in one row, none seeing another."""

import itertools

import pytest
import torch

from decoding.forward.attention import run_trunk
from decoding.forward.visibility import Visibility
from decoding.training.next_token import NextTokenObjective
from decoding.training.packed import Packing, find_loss_mask, next_token_rows, row_losses
from tests.conftest import VOCAB

DOCUMENTS = torch.tensor([[4, 4, 4, 9, 9, 2, -1, -1], [-1, 0, 0, 0, 0, 0, 0, 0]])


def test_bounds_and_positions_of_documents():
    packing = Packing.from_document_ids(DOCUMENTS)
    assert packing.start.tolist() == [[0, 0, 0, 3, 3, 5, 6, 7], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert packing.end.tolist() == [[3, 3, 3, 5, 5, 6, 7, 8], [1, 8, 8, 8, 8, 8, 8, 8]]
    assert packing.position.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert torch.equal(packing.is_padding, DOCUMENTS < 0)


def test_a_document_id_may_come_again():
    packing = Packing.from_document_ids(torch.tensor([[1, 1, 0, 1]]))
    assert packing.start.tolist() == [[0, 0, 2, 3]] and packing.end.tolist() == [[2, 2, 3, 4]]


@pytest.mark.parametrize("lengths", list(itertools.product((1, 2, 5), repeat=3)))
def test_packed_mask_is_block_diagonal(lengths):
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packing = Packing.from_document_ids(ids)
    seen = Visibility.causal(packing.index, packing.start).as_bool(ids.shape[1])[0, 0]
    assert torch.equal(seen, torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool())


def test_targets_are_all_tokens_but_padding_unless_given():
    packing = Packing.from_document_ids(DOCUMENTS)
    assert torch.equal(find_loss_mask({}, packing), DOCUMENTS >= 0)
    loss_mask = torch.zeros_like(DOCUMENTS)
    loss_mask[0, 4:7] = 1
    assert find_loss_mask({"loss_mask": loss_mask}, packing).nonzero().tolist() == [[0, 4], [0, 5]]


def test_rows_that_predict_have_a_wanted_successor_in_their_document():
    packing = Packing.from_document_ids(DOCUMENTS)
    assert next_token_rows(packing, DOCUMENTS >= 0).int().tolist() == [
        [1, 1, 0, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 0],
    ]
    loss_mask = torch.zeros_like(packing.is_padding)
    loss_mask[0, [0, 2, 3]] = True  # 0 and 3 open their documents: nothing predicts them
    assert next_token_rows(packing, loss_mask).nonzero().tolist() == [[0, 1]]


def test_row_losses_are_cross_entropies_in_float32(shared_model):
    model = shared_model("llama", torch.bfloat16)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([3, 9, 96, 0, 5])
    losses = row_losses(model, hidden, labels)
    expected = -model.lm_head(hidden).float().log_softmax(-1)[torch.arange(5), labels]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)


def random_documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (length,), generator=generator) for length in lengths]


def pack(documents: list[torch.Tensor], padding: int = 0) -> dict[str, torch.Tensor]:
    ids = [torch.full_like(document, i) for i, document in enumerate(documents)]
    tail = torch.full((padding,), -1)
    return {
        "input_ids": torch.cat([*documents, tail.clamp_min(0)])[None],
        "document_ids": torch.cat([*ids, tail])[None],
    }


@pytest.mark.parametrize("family", ["llama", "llama-3.1", "qwen2-window", "qwen3", "mistral-window"])
def test_packed_hidden_states_are_those_of_separate_documents(shared_model, family):
    """Windows of 8 start anew at each document: the longest has 21 tokens."""
    model = shared_model(family, torch.float64)
    documents = random_documents(5, 21, 1, 12)
    batch = pack(documents, padding=3)
    packing = Packing.from_document_ids(batch["document_ids"])
    visibility = Visibility.causal(packing.index, packing.start)
    with torch.no_grad():
        hidden = run_trunk(model, batch["input_ids"], packing.position, visibility, 42)[0]
        apart = torch.cat([model.model(input_ids=document[None]).last_hidden_state[0] for document in documents])
    assert (hidden[:39] - apart).abs().max() < 1e-10
    assert hidden.isfinite().all()


def test_next_token_objective_is_the_models_own_loss(shared_model):
    model = shared_model("llama")
    (document,) = random_documents(19)
    loss, metrics = NextTokenObjective()(model, pack([document]))
    expected = model(input_ids=document[None], labels=document[None]).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["ntp_loss"], expected)


def test_packed_next_token_loss_is_the_mean_over_all_labels(shared_model):
    model = shared_model("qwen3", torch.float64)
    documents = random_documents(5, 9, 1, 12)
    loss, _ = NextTokenObjective()(model, pack(documents, padding=4))
    apart = [NextTokenObjective()(model, pack([d]))[0] * (len(d) - 1) for d in documents if len(d) > 1]
    torch.testing.assert_close(loss, sum(apart) / (4 + 8 + 11))


def test_next_token_loss_counts_wanted_tokens_only(shared_model):
    model = shared_model("llama")
    (document,) = random_documents(10)
    batch = pack([document]) | {"loss_mask": (torch.arange(10) >= 6)[None]}
    loss, _ = NextTokenObjective()(model, batch)
    logits = model(input_ids=document[None]).logits[0].log_softmax(-1)
    expected = -torch.stack([logits[i - 1, document[i]] for i in range(6, 10)]).mean()
    torch.testing.assert_close(loss, expected)


def test_next_token_loss_has_finite_gradients(fresh_model):
    model = fresh_model("llama").requires_grad_(True)
    loss, _ = NextTokenObjective()(model, pack(random_documents(6, 3), padding=2))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.lm_head.weight.grad.abs().max() > 0


def test_the_head_in_chunks_is_the_head_in_one(fresh_model, monkeypatch):
    """Losses and gradients; at no time more logits than allowed."""
    # In float64, since the sums of the pieces round in another order, by the instructions of the CPU.
    model = fresh_model("llama", torch.float64).requires_grad_(True)
    hidden, labels = torch.randn(23, 64, dtype=torch.float64, requires_grad=True), torch.arange(23)
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    found = []
    for chunk in (2**27, 5 * VOCAB):
        monkeypatch.setattr("decoding.training.packed.HEAD_CHUNK", chunk)
        losses = row_losses(model, hidden, labels)
        gradients = torch.autograd.grad((losses * labels).sum(), [hidden, model.lm_head.weight])
        found.append([losses, *gradients])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)
    assert max(sizes[1:]) == 5 * VOCAB and len(sizes) == 1 + 2 * 5
