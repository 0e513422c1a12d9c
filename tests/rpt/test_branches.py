"""Branches: the losses are those of the rows that decoding runs, one by one, and the text beside them is left alone."""

import pytest
import torch

from decoding import NextTokenObjective
from decoding.training.packed import Packing
from rpt import ResampleConfig, ResampleObjective
from rpt.branches import Branches
from tests.rpt.test_decoder import uncached_previous

LENGTHS = (9, 1, 6)


def batch_of(*lengths: int, padding: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    tokens = torch.randint(3, 90, (2, len(ids)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "document_ids": ids.expand(2, -1)}


def branches_of_all(window: int, **options) -> dict:
    return {
        "window": window,
        "sequence_share": 1.0,
        "window_share": 1.0,
        "layout": "branches",
        "prev_target": "ntp",
    } | options


@pytest.mark.parametrize("rope_index", ["slot", "token"])
@pytest.mark.parametrize(("family", "window"), [("llama", 2), ("qwen3", 2), ("llama", 3)])
def test_losses_are_those_of_uncached_runs(resample_model, family, window, rope_index):
    options = branches_of_all(window, rope_index=rope_index)
    model, batch = resample_model(family, **options), batch_of(*LENGTHS)
    packing = Packing.from_document_ids(batch["document_ids"])
    losses, offset = ResampleObjective(**options).branch_losses(model, batch["input_ids"], packing, ~packing.is_padding)
    expected = []
    for row, ids in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for document in range(len(LENGTHS)):
            text = row[ids == document].tolist()
            for i in range(1, len(text) - window + 1):
                distribution = uncached_previous(model, ResampleConfig(**options), text, i, window).log_softmax(-1)
                expected.append(-distribution[text[i]])
    assert set(offset.tolist()) == {1, 1 - window}
    torch.testing.assert_close(losses[offset < 0], torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[offset == 1].mean(), NextTokenObjective()(model, batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "share", "sequences"), [(2, 0.25, 0.5), (3, 0.1, 1.0)])
def test_shares_and_places(window, share, sequences):
    packing = Packing.from_document_ids(torch.cat([torch.zeros(40), torch.ones(24)]).long().expand(400, -1))
    loss_mask = torch.ones_like(packing.is_padding)
    loss_mask[:, :20] = False
    config = ResampleConfig(**branches_of_all(window, window_share=share, sequence_share=sequences))
    branches = Branches.draw(config, packing, loss_mask, torch.Generator().manual_seed(0))
    taken = branches.is_real.any(dim=1)
    assert abs(taken.float().mean() - sequences) < 0.08
    assert (branches.is_real.sum(dim=1)[taken] == -(-share * 64 // 1)).all()
    index = branches.index[branches.is_real]
    assert index.unique().tolist() == [*range(20, 41 - window), *range(41, 65 - window)]
    assert all(len(set(row.tolist())) == row.numel() for row in branches.index)


def test_the_branches_of_an_objective_do_not_touch_its_text(resample_model):
    options = branches_of_all(2)
    model, batch = resample_model(**options), batch_of(12)
    packing = Packing.from_document_ids(batch["document_ids"])
    changed = batch["input_ids"].clone()
    changed[:, 6] += 1

    def previous(tokens: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        losses, offset = ResampleObjective(**options).branch_losses(model, tokens, packing, loss_mask)
        return losses[offset < 0].view(2, -1)

    loss_mask = ~packing.is_padding
    before, after = previous(batch["input_ids"], loss_mask), previous(changed, loss_mask)
    # Losses 0 .. are of tokens 1 ..: the changed token is the target of one, stands after another, and before later ones.
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).all()


def test_metrics_and_gradients(resample_model):
    options = branches_of_all(2, window_share=0.5)
    model = resample_model(**options)
    model.requires_grad_(True)
    loss, metrics = ResampleObjective(**options)(model, batch_of(*LENGTHS))
    assert metrics.keys() == {"num_targets", "ntp_loss", "ptp_loss"}
    loss.backward()
    moved = model.offset_code.table.grad[0].abs().sum(dim=1) > 0
    assert moved.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prev_target": "follow"}, "prev_target must be 'ntp' with layout 'branches', got 'follow'"),
        ({"perm": "uniform"}, "perm must be 'rotate' with layout 'branches', got 'uniform'"),
        ({"window_share": 1.5}, "window_share must be a number in"),
        ({"layout": "rows"}, "layout must be.*'branches'.*got 'rows'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ResampleObjective(**branches_of_all(2, **options))


def test_a_model_of_windows_goes_on_with_branches(fresh_model):
    model = fresh_model("llama")
    ResampleObjective(prev_target="ntp").prepare(model)
    ResampleObjective(**branches_of_all(2)).prepare(model)
    assert model.config.resample["layout"] == "branches"
