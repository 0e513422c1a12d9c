"""SetBlockObjective: equation 14 of the paper, and every option does what it says."""

import dataclasses
import math

import pytest
import torch

from decoding import NextTokenObjective
from decoding.training.blocks import BlockGrid
from decoding.training.packed import Packing
from sbd import SetBlockObjective
from tests.conftest import MASK


def batch_of(*lengths: int, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = torch.randint(3, MASK, (len(ids),), generator=generator)
    tail = torch.full((padding,), -1)
    return {"input_ids": torch.cat([tokens, tail.clamp_min(0)])[None], "document_ids": torch.cat([ids, tail])[None]}


@pytest.fixture
def seen(monkeypatch):
    """What the objective hands to the trunk in one call and to the loss: token rows, and (hidden, labels) of each loss."""
    from decoding.training import copies, packed
    from sbd import objective

    calls = {"rows": [], "losses": [], "hidden": []}
    trunk, losses = copies.run_trunk, packed.row_losses

    def run_trunk(model, tokens, *arguments):
        calls["rows"].append(tokens)
        calls["hidden"].append(trunk(model, tokens, *arguments))
        return calls["hidden"][-1]

    def row_losses(model, hidden, labels):
        calls["losses"].append((hidden, labels))
        return losses(model, hidden, labels)

    monkeypatch.setattr(copies, "run_trunk", run_trunk)
    monkeypatch.setattr(copies, "_gains_by_two_forwards", lambda model: False)
    monkeypatch.setattr(packed, "row_losses", row_losses)
    monkeypatch.setattr(objective, "row_losses", row_losses)
    return calls


def fix_masks(monkeypatch, masks: torch.Tensor) -> None:
    monkeypatch.setattr(SetBlockObjective, "draw_masks", lambda self, blocks: masks)


def grid_of(batch_size: int, length: int, size: int) -> BlockGrid:
    packing = Packing.from_document_ids(torch.zeros(batch_size, length, dtype=torch.long))
    return BlockGrid.from_packing(packing, ~packing.is_padding, size)


# The loss


def test_loss_is_equation_14(shared_model, monkeypatch, seen):
    """Next-token labels shifted, masked labels aligned, both divided by the number of all labels."""
    model, batch = shared_model("llama", torch.float64), batch_of(9, 6, padding=2)
    masks = torch.rand(1, 17, generator=torch.Generator().manual_seed(1)) < 0.5
    fix_masks(monkeypatch, masks)
    loss, metrics = SetBlockObjective(block_sizes=(4,))(model, batch)
    logits = model.lm_head(seen["hidden"][0])[0].log_softmax(-1)
    tokens = batch["input_ids"][0].tolist()
    ntp = [-logits[i, tokens[i + 1]] for i in range(14) if i != 8]
    matp = [-logits[17 + i, tokens[i]] for i in range(15) if masks[0, i]]
    torch.testing.assert_close(loss.double(), (sum(ntp) + sum(matp)) / (len(ntp) + len(matp)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["ntp_loss"].double(), sum(ntp) / len(ntp), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["matp_loss"].double(), sum(matp) / len(matp), rtol=1e-6, atol=1e-6)
    clean, noisy = seen["rows"][0].split(17, 1)
    assert torch.equal(clean, batch["input_ids"])
    assert torch.equal(noisy == MASK, masks & (batch["document_ids"] >= 0))
    assert torch.equal(noisy[noisy != MASK], clean[noisy != MASK])


def test_only_wanted_tokens_are_masked_and_learned(shared_model, monkeypatch, seen):
    model, batch = shared_model("llama"), batch_of(12, padding=3)
    batch["loss_mask"] = (torch.arange(15) >= 7)[None]
    fix_masks(monkeypatch, torch.ones(1, 15, dtype=torch.bool))
    SetBlockObjective(block_sizes=(4,))(model, batch)
    tokens = batch["input_ids"][0]
    assert seen["rows"][0][0, 15:].eq(MASK).nonzero().flatten().tolist() == list(range(7, 12))
    (_, shifted), (_, aligned) = seen["losses"]
    assert shifted.tolist() == tokens[7:12].tolist() == aligned.tolist()


def test_a_text_token_with_the_masks_id_is_no_target(shared_model, monkeypatch, seen):
    model, batch = shared_model("llama"), batch_of(8)
    batch["input_ids"][0, 2] = MASK
    fix_masks(monkeypatch, (torch.arange(8) == 5)[None])
    SetBlockObjective(block_sizes=(4,))(model, batch)
    assert seen["losses"][1][1].tolist() == [batch["input_ids"][0, 5]]


def test_without_masks_it_is_the_next_token_objective(shared_model, monkeypatch):
    model, batch = shared_model("qwen3"), batch_of(11, 7, padding=2)
    fix_masks(monkeypatch, torch.zeros(1, 20, dtype=torch.bool))
    for size in (1, 3, 16):
        loss, _ = SetBlockObjective(block_sizes=(size,))(model, batch)
        torch.testing.assert_close(loss, NextTokenObjective()(model, batch)[0])


@pytest.mark.parametrize(("ntp", "matp"), [(1, 0), (0, 1), (0.3, 1), (2.0, 0.5)])
def test_weights_of_the_two_parts(shared_model, monkeypatch, ntp, matp):
    model, batch = shared_model("llama"), batch_of(16)
    fix_masks(monkeypatch, (torch.arange(16) % 3 == 0)[None])
    loss, metrics = SetBlockObjective(block_sizes=(4,), ntp_weight=ntp, matp_weight=matp)(model, batch)
    expected = (ntp * 15 * metrics["ntp_loss"] + matp * 6 * metrics["matp_loss"]) / 21
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("options", [{}, {"complement": True}, {"distill": 1.0}, {"phase": "random", "mask_ramp": 0.5}])
def test_gradients_are_finite_and_reach_the_mask_embedding(fresh_model, options):
    model = fresh_model("llama").requires_grad_(True)
    torch.manual_seed(0)
    loss, metrics = SetBlockObjective(block_sizes=(4,), **options)(model, batch_of(13, 6, 1, padding=4))
    loss.backward()
    metrics = {name: torch.as_tensor(value) for name, value in metrics.items()}
    assert loss.isfinite() and all(value.isfinite() and not value.requires_grad for value in metrics.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.model.embed_tokens.weight.grad[MASK].abs().max() > 0


def test_the_loss_falls_when_trained(fresh_model):
    model, batch = fresh_model("llama").requires_grad_(True), batch_of(16)
    objective = SetBlockObjective(block_sizes=(4,), all_mask_share=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, metrics = objective(model, batch)
        loss.backward()
        optimizer.step()
        losses.append((metrics["ntp_loss"].item(), metrics["matp_loss"].item()))
    assert losses[-1][0] < 0.2 * losses[0][0] and losses[-1][1] < 0.2 * losses[0][1]


# Options of masking


def test_block_sizes_are_drawn_once_a_call_and_uniformly(shared_model, monkeypatch):
    sizes = []

    def draw_masks(self, blocks):
        sizes.append(blocks.size)
        return torch.zeros_like(blocks.start, dtype=torch.bool)

    monkeypatch.setattr(SetBlockObjective, "draw_masks", draw_masks)
    model, batch = shared_model("llama", num_hidden_layers=1), batch_of(3)
    torch.manual_seed(0)
    objective = SetBlockObjective(block_sizes=(2, 5, 9))
    for _ in range(300):
        objective(model, batch)
    counts = [sizes.count(size) for size in (2, 5, 9)]
    assert sum(counts) == len(sizes) == 300 and min(counts) > 70
    assert SetBlockObjective().block_sizes == tuple(range(2, 17))


def masked_shares(objective: SetBlockObjective, rows: int, length: int, size: int) -> torch.Tensor:
    """Masks [rows, blocks, size] drawn by the objective."""
    torch.manual_seed(0)
    return objective.draw_masks(grid_of(rows, length, size)).reshape(rows, length // size, size).float()


def test_rate_per_sequence(monkeypatch):
    """One eta for a sequence: its blocks agree; over sequences a block is masked whole with probability 1 / (k + 1)."""
    masks = masked_shares(SetBlockObjective(eta_scope="sequence"), rows=4000, length=64, size=4)
    assert masks.mean().item() == pytest.approx(0.5, abs=0.02)
    assert masks.amin(-1).mean().item() == pytest.approx(1 / 5, abs=0.015)
    rates = masks.mean((1, 2))
    assert rates.var().item() == pytest.approx(1 / 12 + 1 / 6 / 64, abs=0.006)  # of eta, and of 64 draws given eta
    left, right = masks[:, :8].mean((1, 2)), masks[:, 8:].mean((1, 2))
    assert torch.corrcoef(torch.stack([left, right]))[0, 1] > 0.9


def test_rate_per_block():
    """One eta for a block: the same marginals, and blocks of one sequence know nothing of each other."""
    masks = masked_shares(SetBlockObjective(eta_scope="block"), rows=4000, length=64, size=4)
    assert masks.mean().item() == pytest.approx(0.5, abs=0.02)
    assert masks.amin(-1).mean().item() == pytest.approx(1 / 5, abs=0.015)
    left, right = masks[:, :8].mean((1, 2)), masks[:, 8:].mean((1, 2))
    assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 0.06
    pairs = masks[..., 0] * masks[..., 1]
    assert pairs.mean().item() == pytest.approx(1 / 3, abs=0.015)  # E[eta^2]: one rate inside a block


@pytest.mark.parametrize("scope", ["sequence", "block"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_blocks_masked_whole(scope, share):
    objective = SetBlockObjective(eta_scope=scope, all_mask_share=share)
    masks = masked_shares(objective, rows=4000, length=32, size=4)
    assert masks.amin(-1).mean().item() == pytest.approx(share + (1 - share) / 5, abs=0.02)
    assert share < 1 or masks.all()


@pytest.mark.parametrize("ramp", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["sequence", "block"])
def test_ramp_masks_later_tokens_of_a_block_more(ramp, scope):
    """E[eta^a] = 1 / (1 + a) with a = 1 - r j / (k - 1)."""
    size = 5
    masks = masked_shares(SetBlockObjective(eta_scope=scope, mask_ramp=ramp), rows=6000, length=40, size=size)
    shares = masks.mean((0, 1))
    expected = [1 / (2 - ramp * j / (size - 1)) for j in range(size)]
    torch.testing.assert_close(shares, torch.tensor(expected), atol=0.02, rtol=0)
    assert shares[0].item() == pytest.approx(0.5, abs=0.02)


def test_ramp_of_blocks_of_one_token():
    masks = masked_shares(SetBlockObjective(mask_ramp=0.9), rows=3000, length=4, size=1)
    assert masks.mean().item() == pytest.approx(0.5, abs=0.03)


def test_complement_makes_each_wanted_token_a_target_once(shared_model, seen):
    model, batch = shared_model("llama"), batch_of(11, 6, padding=3)
    batch["loss_mask"] = (torch.arange(20) % 5 != 1)[None]
    loss_mask = (batch["loss_mask"] & (batch["document_ids"] >= 0))[0]
    torch.manual_seed(0)
    loss, metrics = SetBlockObjective(block_sizes=(4,), complement=True)(model, batch)
    first, second = seen["rows"][0][0, 20:].eq(MASK).split(20)
    assert torch.equal(first ^ second, loss_mask) and not (first & second).any()
    assert 0 < first.sum() < loss_mask.sum()
    (_, shifted), (_, aligned) = seen["losses"]
    tokens = batch["input_ids"][0]
    assert aligned.tolist() == tokens[first].tolist() + tokens[second].tolist()
    count = len(shifted) + int(loss_mask.sum())
    expected = (metrics["ntp_loss"] * len(shifted) + metrics["matp_loss"] * len(aligned)) / count
    torch.testing.assert_close(loss, expected)


def test_response_phase_masks_no_prompt_and_opens_a_block_at_its_end(shared_model, monkeypatch, seen):
    grids = []

    def draw_masks(self, blocks):
        grids.append(blocks)
        return torch.ones_like(blocks.start, dtype=torch.bool)

    monkeypatch.setattr(SetBlockObjective, "draw_masks", draw_masks)
    batch = batch_of(14)
    batch["loss_mask"] = (torch.arange(14) >= 5)[None]
    SetBlockObjective(block_sizes=(4,), phase="response")(shared_model("llama"), batch)
    assert grids[0].start[0, 5:].tolist() == [5, 5, 5, 5, 9, 9, 9, 9, 13]
    assert seen["rows"][0][0, 14:].eq(MASK).nonzero().flatten().tolist() == list(range(5, 14))


# Distillation


def test_distillation_is_the_divergence_of_the_models_two_distributions(shared_model, monkeypatch, seen):
    """KL(p || q): p the causal distribution of the token, q its masked distribution; the first token of a document has no p."""
    model, batch = shared_model("llama", torch.float64), batch_of(9, 6)
    masks = (torch.arange(15) % 3 != 1)[None]
    assert masks[0, 0] and masks[0, 9]
    fix_masks(monkeypatch, masks)
    loss, metrics = SetBlockObjective(block_sizes=(4,), distill=0.7)(model, batch)
    base, _ = SetBlockObjective(block_sizes=(4,))(model, batch)
    distribution = torch.distributions.Categorical(logits=model.lm_head(seen["hidden"][0])[0])
    parts = []
    for i in range(15):
        if masks[0, i] and i not in (0, 9):
            p, q = (torch.distributions.Categorical(logits=distribution.logits[row]) for row in (i - 1, 15 + i))
            parts.append(torch.distributions.kl_divergence(p, q))
    labels = 8 + 5 + int(masks.sum())
    torch.testing.assert_close(metrics["distill_loss"].double(), sum(parts) / len(parts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((loss - base).double(), 0.7 * sum(parts) / labels, rtol=1e-4, atol=1e-5)


def test_distillation_vanishes_where_both_distributions_agree(fresh_model):
    model, batch = fresh_model("llama"), batch_of(12)
    torch.manual_seed(0)
    _, metrics = SetBlockObjective(block_sizes=(4,), distill=1.0)(model, batch)
    assert metrics["distill_loss"] > 0.1
    model.lm_head.weight.zero_()
    torch.manual_seed(0)
    loss, metrics = SetBlockObjective(block_sizes=(4,), distill=1.0)(model, batch)
    assert metrics["distill_loss"].abs() < 1e-6
    torch.testing.assert_close(loss, torch.tensor(math.log(97)))


def test_distillation_does_not_move_the_teacher(fresh_model, monkeypatch, seen):
    """The gradient reaches the hidden states of masked rows only."""
    model, batch = fresh_model("llama").requires_grad_(True), batch_of(12)
    fix_masks(monkeypatch, (torch.arange(12) % 2 == 1)[None])
    objective = SetBlockObjective(block_sizes=(4,), distill=1.0, ntp_weight=0, matp_weight=0)
    loss, _ = objective(model, batch)
    (gradient,) = torch.autograd.grad(loss, seen["hidden"][0])
    reached = gradient[0].abs().amax(-1) > 0
    assert reached.nonzero().flatten().tolist() == [12 + i for i in range(1, 12, 2)]


def test_weights_fall_along_the_block_and_have_mean_one(shared_model, monkeypatch, seen):
    """The first mask of a block drafts nothing, so it is no target where positions are weighed."""
    model, batch = shared_model("llama", torch.float64), batch_of(12)
    fix_masks(monkeypatch, torch.ones(1, 12, dtype=torch.bool))
    objective = SetBlockObjective(block_sizes=(4,), position_weights="exponential", gamma=2.0, ntp_weight=0)
    loss, metrics = objective(model, batch)
    log_q = model.lm_head(seen["hidden"][0])[0].log_softmax(-1)
    targets = [i for i in range(12) if i % 4]
    weights = torch.tensor([math.exp(-(i % 4 - 1) / 2) for i in targets], dtype=torch.float64)
    losses = torch.stack([-log_q[12 + i, int(batch["input_ids"][0, i])] for i in targets])
    expected = (weights / weights.mean() * losses).sum() / metrics["num_targets"]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert metrics["num_targets"] == 11 + len(targets)


def test_dpace_weighs_by_the_acceptance_that_is_found(shared_model, monkeypatch):
    model, batch = shared_model("llama", torch.float64), batch_of(12)
    fix_masks(monkeypatch, torch.ones(1, 12, dtype=torch.bool))
    given = {}

    def dpace(blocks, alpha):
        given["alpha"] = alpha
        return torch.ones_like(alpha)

    monkeypatch.setattr("sbd.objective.dpace_weights", dpace)
    options = {"block_sizes": (4,), "distill": 1.0, "divergence": "tv", "matp_weight": 0.0, "ntp_weight": 0.0}
    loss, metrics = SetBlockObjective(position_weights="dpace", **options)(model, batch)
    alpha, drafts = given["alpha"][0], torch.arange(12) % 4 > 0
    assert (alpha[~drafts] == 1).all() and ((alpha[drafts] > 0) & (alpha[drafts] < 1)).all()
    assert metrics["acceptance"] == pytest.approx(float(alpha[drafts].mean()))
    torch.testing.assert_close(loss, (1 - alpha[drafts]).sum() / metrics["num_targets"])
    taus = 1 + alpha.view(3, 4)[:, 1:].cumprod(-1).sum(-1)
    assert metrics["expected_tau"] == pytest.approx(float(taus.mean()))


def test_copies_share_the_clean_rows_and_have_phases_of_their_own(shared_model, monkeypatch, seen):
    grids = []

    def draw_masks(self, blocks):
        grids.append(blocks)
        return torch.ones_like(blocks.start, dtype=torch.bool)

    monkeypatch.setattr(SetBlockObjective, "draw_masks", draw_masks)
    batch = batch_of(40)
    torch.manual_seed(0)
    objective = SetBlockObjective(block_sizes=(8,), copies=4, phase="random", distill=1.0)
    _, metrics = objective(shared_model("llama"), batch)
    assert len({int(grid.start[0, 20]) for grid in grids}) > 1
    assert seen["rows"][0].shape == (1, 200) and metrics["num_targets"] == 39 + 160
    assert objective.rows_per_token().trained == 5 and objective.rows_per_token().labelled > 2


def test_each_copy_is_as_if_it_were_alone(shared_model, monkeypatch):
    model, batch, alone = shared_model("llama", torch.float64), batch_of(23, 9, padding=3), []
    options = {"block_sizes": (4,), "all_mask_share": 1.0, "phase": "random", "ntp_weight": 0.0}
    torch.manual_seed(5)
    together, metrics = SetBlockObjective(copies=2, **options)(model, batch)
    torch.manual_seed(5)
    for _ in range(2):
        alone.append(float(SetBlockObjective(**options)(model, batch)[1]["matp_loss"]))
    assert alone[0] != alone[1] and float(metrics["matp_loss"]) == pytest.approx(sum(alone) / 2)


def test_block_sizes_grow_over_the_curriculum():
    objective = SetBlockObjective(block_sizes=(16, 2, 4, 8), curriculum=0.8)
    sizes = [objective.at(progress).block_sizes for progress in (0.0, 0.19, 0.21, 0.41, 0.61, 0.8, 1.0)]
    assert sizes == [(2,), (2,), (4,), (8,), (16,), (16,), (16,)]
    assert SetBlockObjective(block_sizes=(2, 4)).at(0.5).block_sizes == (2, 4)


def test_a_selector_alone_learns_from_frozen_rows(fresh_model, monkeypatch, seen):
    """It is given the token before each target, and nothing else of the model has a gradient."""
    model, batch = fresh_model("llama"), batch_of(12)
    model.generation_config.trained_block_sizes = [4]  # so that its mask token is left as it is
    objective = SetBlockObjective(block_sizes=(4,), selector=4, distill=1.0, matp_weight=0.0).for_tuning("selector")
    objective.prepare(model, None)
    selector, given = model.draft_selector, []
    assert objective.added_parameters(model) == list(selector.parameters())
    selector.register_forward_pre_hook(lambda module, arguments: given.append(arguments[1]))
    fix_masks(monkeypatch, (torch.arange(12) % 4 > 1)[None])
    first, _ = objective(model, batch)
    first.backward()
    embedded = model.get_input_embeddings()(batch["input_ids"][0])
    assert torch.equal(given[0], embedded[[i - 1 for i in range(12) if i % 4 > 1]])
    assert selector.correction.weight.grad.any()
    assert all(p.grad is None for name, p in model.named_parameters() if "draft_selector" not in name)
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        loss, _ = objective(model, batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "js"}, "divergence must be one of 'kl', 'tv', 'hybrid', 'nla', got 'js'"),
        ({"divergence": "tv"}, "divergence 'tv' needs distill above 0"),
        ({"position_weights": "dpace"}, "position_weights 'dpace' needs distill above 0"),
        ({"copies": 0}, "copies.*got 0"),
        ({"curriculum": 2}, "curriculum.*got 2"),
        ({"block_sizes": ()}, "block_sizes must be one or more sizes of at least 1"),
        ({"block_sizes": (4, 0)}, r"block_sizes must be .*got \(4, 0\)"),
        ({"eta_scope": "token"}, "eta_scope must be one of 'sequence', 'block', got 'token'"),
        ({"phase": "prompt"}, "phase must be one of 'document', 'random', 'response', got 'prompt'"),
        ({"all_mask_share": 1.1}, "all_mask_share.*got 1.1"),
        ({"mask_ramp": 1.0}, r"mask_ramp must be a number in \[0, 1\), got 1.0"),
        ({"ntp_weight": -1}, "ntp_weight.*got -1"),
        ({"matp_weight": math.nan}, "matp_weight.*got nan"),
        ({"distill": "yes"}, "distill.*got 'yes'"),
    ],
)
def test_impossible_settings_name_field_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        SetBlockObjective(**settings)


def test_an_objective_is_a_value():
    one, other = SetBlockObjective(block_sizes=[2, 3]), SetBlockObjective(block_sizes=(2, 3))
    assert one == other and hash(one) == hash(other)
    assert dataclasses.replace(one, distill=1.0) != one


def test_a_model_without_a_mask_token_is_refused(fresh_model):
    model = fresh_model("llama")
    del model.generation_config.mask_token_id
    with pytest.raises(ValueError, match="mask_token_id: this model has no mask token"):
        SetBlockObjective()(model, batch_of(5))
    loss, _ = SetBlockObjective(mask_token_id=90)(model, batch_of(5))
    assert loss.isfinite()


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("complement", [False, True])
def test_two_forwards_are_one(fresh_model, monkeypatch, family, complement):
    """The clean copy first and the masked ones behind its cache: the same losses and gradients, in fewer key pairs."""
    model = fresh_model(family).requires_grad_(True)
    objective = SetBlockObjective(block_sizes=(4,), distill=0.5, complement=complement)
    found = []
    for two in (True, False):
        monkeypatch.setattr("decoding.training.copies._gains_by_two_forwards", lambda model, two=two: two)
        forwards = []
        hook = model.get_decoder().register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        torch.manual_seed(0)
        loss, metrics = objective(model, batch_of(13, 6, 1, padding=4))
        hook.remove()
        assert len(forwards) == 1 + two
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss, metrics["matp_loss"], metrics["ntp_loss"], metrics["distill_loss"], *gradients])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
