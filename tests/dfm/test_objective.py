"""FlowObjective: its layout is the decoders' forward, its losses are those of the spec, and it learns."""

import math

import pytest
import torch

from decoding.forward.noise_level import add_noise_level_rows
from decoding.training.packed import Packing, find_loss_mask
from dfm import FlowDecoder, FlowObjective
from dfm.draws import BatchDraws
from dfm.flow_config import FlowTraits, ids_without_text
from dfm.networks import Bidirectional
from dfm.rates.losses import generalised_kl
from sbd import SetBlockObjective
from tests.conftest import MASK, VOCAB, build
from tests.dfm.networks import BlockCausal, uniform_model

DOUBLE = torch.float64
LENGTH = 24


def batch_of(*documents: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of documents of these lengths; what is missing to LENGTH is padding."""
    tokens = torch.randint(3, MASK, (len(documents), LENGTH), generator=torch.Generator().manual_seed(seed))
    ids = torch.full((len(documents), LENGTH), -1)
    for row, lengths in zip(ids, documents, strict=True):
        place = 0
        for number, length in enumerate(lengths):
            row[place : place + length] = number
            place += length
    return {"input_ids": tokens, "document_ids": ids}


BATCH = batch_of((10, 14), (7, 9), (24,))


def parts(objective: FlowObjective, model, batch, seed: int = 1):
    """(packing, blocks, noisy, states, clean) as the objective computes them."""
    torch.manual_seed(seed)
    packing = Packing.from_document_ids(batch["document_ids"])
    loss_mask = find_loss_mask(batch, packing)
    blocks, path = objective._blocks(packing, loss_mask), objective.path(model)
    noisy = objective._noise(batch["input_ids"], packing, loss_mask, blocks, path)
    return packing, blocks, noisy, *objective._run(model, packing, blocks, noisy, path)


def trained(objective: FlowObjective):
    model = build("llama", DOUBLE) if objective.source == "mask" else uniform_model()
    model.config.flow = objective.traits(model).as_dict()
    return model


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_block_rows_give_the_logits_of_an_uncached_forward(source, shift):
    objective = FlowObjective(source, block_sizes=(4,), shift=shift)
    model = trained(objective)
    packing, blocks, noisy, states, _ = parts(objective, model, BATCH)
    logits = model.get_output_embeddings()(states).float()
    path, traits, seen = objective.path(model), FlowTraits.of(model.config), 0
    for b in range(3):
        for start in sorted(set(blocks.start[b].tolist())):
            end = int(blocks.end[b, start])
            text = BATCH["input_ids"][b, packing.start[b, start] : start].tolist()
            if packing.is_padding[b, start] or not text or not noisy.free[b, start:end].all():
                continue
            network = BlockCausal(model, text, traits, path.scheduler)
            expected = network(noisy.noisy[b : b + 1, start:end], noisy.time[b : b + 1, start], None)[0]
            ours = logits[b, start:end].masked_fill(expected == -torch.inf, -torch.inf)
            assert torch.allclose(ours, expected, atol=1e-4)
            seen += 1
    assert seen >= 8


@pytest.mark.parametrize("span", ["document", "row"])
@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_whole_texts_give_the_logits_of_the_decoders_network(source, span):
    objective = FlowObjective(source, span=span, given="share")
    model = trained(objective)
    packing, _, noisy, states, clean = parts(objective, model, BATCH)
    assert clean is None
    logits = model.get_output_embeddings()(states).float()
    count = (~packing.is_padding).sum(-1)
    for b in range(3):
        edges = (
            [(0, int(count[b]))]
            if span == "row"
            else sorted(
                {
                    (int(s), int(e))
                    for s, e in zip(packing.start[b, : count[b]], packing.end[b, : count[b]], strict=True)
                }
            )
        )
        for start, end in edges:
            x, frozen = noisy.noisy[b : b + 1, start:end], ~noisy.free[b : b + 1, start:end]
            network = Bidirectional(
                model, torch.ones_like(frozen), FlowTraits.of(model.config), objective.path(model).scheduler
            )
            expected = network(x, noisy.time[b : b + 1, start], frozen)[0]
            assert torch.allclose(
                logits[b, start:end].masked_fill(expected == -torch.inf, -torch.inf), expected, atol=1e-4
            )


@pytest.mark.parametrize(
    "settings", [{}, {"block_sizes": (3, 5)}, {"source": "uniform"}, {"given": "prefix"}, {"span": "row"}]
)
def test_what_is_noise(settings):
    objective = FlowObjective(**settings)
    model = trained(objective)
    packing, blocks, noisy, *_ = parts(objective, model, BATCH)
    clean = BATCH["input_ids"]
    assert torch.equal(noisy.noisy[~noisy.free], clean[~noisy.free])
    assert not noisy.free[packing.is_padding].any()
    starts = packing.index == (0 if objective.span == "row" and blocks is None else packing.start)
    assert not noisy.free[starts].any()
    if objective.source == "mask":
        assert torch.equal(noisy.asked, noisy.noisy == MASK) and noisy.asked.any()
    else:
        assert torch.equal(noisy.asked, noisy.free)
        assert not torch.isin(noisy.noisy[noisy.free], torch.tensor(ids_without_text(model))).any()
    assert ((noisy.time >= 0) & (noisy.time < 1)).all()
    unit = (
        blocks.start
        if blocks is not None
        else packing.start
        if objective.span == "document"
        else torch.zeros_like(clean)
    )
    assert torch.equal(noisy.time, noisy.time.gather(1, unit).where(~packing.is_padding, noisy.time))
    if objective.given == "prefix":
        assert (noisy.free.long().diff(dim=1)[packing.index[:, 1:] != packing.start[:, 1:]] >= 0).sum() > 0


@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_the_loss_is_the_mean_over_its_labels(source):
    for loss in ("cross_entropy", "generalised_kl"):
        objective = FlowObjective(source, loss=loss, block_sizes=(4,), ntp_weight=0.5)
        model = trained(objective)
        _, _, noisy, states, clean = parts(objective, model, BATCH)
        logits = model.get_output_embeddings()(states).float()
        logits[..., ids_without_text(model)] = -torch.inf
        logits[..., MASK] = -torch.inf
        log_p = logits.log_softmax(-1).gather(-1, noisy.clean[..., None])[..., 0]
        if loss == "cross_entropy":
            flow, count = -log_p[noisy.asked].sum(), int(noisy.asked.sum())
        else:
            each = generalised_kl(logits, noisy.noisy, noisy.clean, noisy.time, objective.path(model))
            shown = noisy.asked if source == "mask" else noisy.free  # at revealed tokens carry-over makes it zero
            flow, count = each[shown].sum(), int(noisy.free.sum())
        follows = BATCH["document_ids"][:, 1:].eq(BATCH["document_ids"][:, :-1]) & (BATCH["document_ids"][:, 1:] >= 0)
        ntp_logits = model.get_output_embeddings()(clean[:, :-1]).float()
        ntp = -ntp_logits.log_softmax(-1).gather(-1, noisy.clean[:, 1:, None])[..., 0][follows]
        torch.manual_seed(1)
        value, metrics = objective(model, BATCH)
        assert torch.allclose(value.double(), (flow + 0.5 * ntp.sum()).double() / (count + ntp.numel()), atol=1e-5)
        assert metrics["num_targets"] == count + ntp.numel()
        assert torch.allclose(metrics["flow_loss"].double(), flow.double() / count, atol=1e-5)
        assert torch.allclose(metrics["ntp_loss"].double(), ntp.double().mean(), atol=1e-5)


def test_the_bound_of_a_uniform_guess_is_the_entropy_of_a_guess():
    """With a mask source and any distribution that is the same at all times the bound integrates to its cross-entropy."""
    model = build("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    objective = FlowObjective(loss="generalised_kl")
    torch.manual_seed(0)
    batch = batch_of(*[(24,)] * 40)
    values = [objective(model, batch)[0].item() for _ in range(60)]
    mean, error = sum(values) / 60, torch.tensor(values).std().item() / math.sqrt(60)
    allowed = math.log(VOCAB - len(ids_without_text(model)))
    assert abs(mean - allowed) < 4 * error + 0.01 and error < 0.1


def test_blocks_with_the_mask_source_are_the_set_block_layout():
    """Same masks, same forward: the cross-entropies agree with SetBlockObjective's where both draw the same masks."""
    model, objective = build("llama", DOUBLE), FlowObjective(block_sizes=(4,), phase="document")
    packing, blocks, noisy, states, clean = parts(objective, model, BATCH)
    sbd = SetBlockObjective(block_sizes=(4,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SetBlockObjective, "draw_masks", lambda self, blocks: noisy.asked)
        _, metrics = sbd(model, BATCH)
    logits = model.get_output_embeddings()(states[noisy.asked]).float()
    matp = torch.nn.functional.cross_entropy(logits, noisy.clean[noisy.asked])
    assert torch.allclose(metrics["matp_loss"].double(), matp.double(), atol=1e-6)


@pytest.mark.parametrize("source", ["mask", "uniform"])
@pytest.mark.parametrize("options", [{}, {"shift": True, "loss": "generalised_kl"}])
def test_two_forwards_are_one(monkeypatch, source, options):
    """The clean copy first and the noisy one behind its cache: the same losses and gradients."""
    model = build("llama") if source == "mask" else uniform_model().float()
    model.requires_grad_(True)
    objective, found = FlowObjective(source, block_sizes=(4,), **options), []
    for two in (True, False):
        monkeypatch.setattr("decoding.training.copies._gains_by_two_forwards", lambda model, two=two: two)
        forwards = []
        hook = model.get_decoder().register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        torch.manual_seed(0)
        loss, metrics = objective(model, BATCH)
        hook.remove()
        assert len(forwards) == 1 + two
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss, metrics["flow_loss"], metrics["ntp_loss"], *gradients])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"block_sizes": (4,)}, {"source": "uniform", "loss": "generalised_kl"}])
def test_the_head_in_chunks_is_the_head_in_one(monkeypatch, settings):
    """Losses and gradients; at no time more logits than allowed, which the estimate of memory counts on."""
    objective = FlowObjective(**settings)
    model = build("llama") if objective.source == "mask" else uniform_model().float()
    model.requires_grad_(True)
    vocabulary, sizes, found = model.config.vocab_size, [], []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    for chunk in (2**27, 7 * vocabulary):
        monkeypatch.setattr("decoding.training.packed.HEAD_CHUNK", chunk)
        sizes.clear()
        torch.manual_seed(0)
        loss, _ = objective(model, BATCH)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert max(sizes) == 7 * vocabulary
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_times_are_spread_evenly_and_one_for_each_text():
    objective, model = FlowObjective(), build("llama")
    rows = batch_of(*[(24,)] * 8)
    times = torch.cat([parts(objective, model, rows, seed)[2].time[:, 1] for seed in range(50)])
    assert abs(times.mean() - 0.5) < 0.05 and abs(times.var() - 1 / 12) < 0.02
    by_row = FlowObjective(block_sizes=(4,), time_scope="row")
    time = parts(by_row, model, rows)[2].time
    assert (time == time[:, :1]).all()
    assert sorted((8 * time[:, 0] / (1 - 1e-3)).long().tolist()) == list(range(8))


@pytest.mark.parametrize(
    "settings", [{"source": "mask", "span": "row"}, {"source": "uniform"}, {"block_sizes": (4, 6)}]
)
def test_it_learns_a_text_by_heart(settings):
    """Then decoding from nothing but the first token gives the text back; a changed sign of the loss would not."""
    text = torch.tensor([[3, 17, 40, 5, 60, 21, 33, 8, 70, 11, 52, 29, 6, 44, 9, 80]])
    batch = {"input_ids": text.expand(8, -1), "document_ids": torch.zeros(8, 16, dtype=torch.long)}
    objective = FlowObjective(**settings)
    model = build("llama", initializer_range=0.05).requires_grad_(True)
    if objective.takes_level:
        add_noise_level_rows(model)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(150):
        loss, _ = objective(model, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3
    if objective.takes_level:
        assert model.get_input_embeddings().weight[VOCAB:].abs().max() > 0.01
    model.config.flow = objective.traits(model).as_dict()
    size = None if objective.block_sizes is None else 6
    decoder = FlowDecoder(objective.source, steps=12, block_size=size)
    torch.manual_seed(0)
    out = model.generate(text[:, :1], max_new_tokens=15, custom_generate=decoder, do_sample=False)
    assert (out == text).float().mean() >= 0.9


def test_traits_are_what_decoders_read():
    objective = FlowObjective("uniform", block_sizes=(2, 3), shift=True)
    model = build("llama")
    add_noise_level_rows(model)
    model.config.flow = objective.traits(model).as_dict()
    excluded = (0, MASK, *range(VOCAB, VOCAB + 9))
    assert FlowTraits.of(model.config) == FlowTraits("uniform", True, excluded, (2, 3))
    assert not torch.isin(
        objective.path(model).source.probabilities(torch.zeros(1)).nonzero(), torch.tensor(excluded)
    ).any()


def test_padding_and_levels_do_not_leak():
    """Other padding, the same loss."""
    objective = FlowObjective("uniform", block_sizes=(4,))
    model, batch = trained(objective), {name: value.clone() for name, value in BATCH.items()}
    torch.manual_seed(1)
    first = objective(model, batch)[0]
    batch["input_ids"][batch["document_ids"] < 0] = 50
    torch.manual_seed(1)
    assert torch.allclose(objective(model, batch)[0], first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "noise"}, "source must be one of 'mask', 'uniform', got 'noise'"),
        ({"loss": "mse"}, "loss must be one of 'cross_entropy', 'generalised_kl'"),
        ({"scheduler": "linaer"}, "scheduler must be one of"),
        ({"block_sizes": ()}, "block_sizes must be one or more sizes"),
        ({"block_sizes": (4,), "given": "prefix"}, "given must be 'none' with block_sizes"),
        ({"given": "half"}, "given must be one of 'none', 'prefix', 'share', 'span'"),
        ({"time_input": "adaln"}, "time_input must be one of"),
        ({"ntp_weight": -1}, "ntp_weight must be a number"),
        ({"shift": 2}, "shift must be one of True, False"),
        ({"gated": True}, "block_sizes must be given with gated=True"),
        (
            {"gated": True, "block_sizes": (4,), "source": "uniform"},
            "source must be 'mask' with gated=True, got 'uniform'",
        ),
        ({"gated": True, "block_sizes": (4,), "shift": True}, "shift must be False with gated=True, got True"),
        ({"gated": True, "block_sizes": (4,), "time_input": "additive"}, "time_input must be None with gated=True"),
        ({"gated": True, "block_sizes": (4,), "ntp_weight": 0.5}, "ntp_weight must be 1 with gated=True, got 0.5"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowObjective(**settings)


def test_batch_draws_have_the_distribution():
    draws = BatchDraws(torch.Generator().manual_seed(0))
    distribution, where = torch.tensor([0.2, 0.0, 0.8]).expand(40, 100, 3), torch.ones(40, 100, dtype=torch.bool)
    where[:, 50:] = False
    tokens = draws.categorical(distribution, where)
    assert abs((tokens[:, :50] == 2).float().mean() - 0.8) < 0.03 and not (tokens == 1).any()
    assert (tokens[:, 50:] == 0).all() and (draws.uniform(where)[~where] == 0).all()
