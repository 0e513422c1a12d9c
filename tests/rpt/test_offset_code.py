"""The offset code: a base model where all offsets are 1, bit for bit; saved, loaded, copied."""

import copy

import pytest
import torch

from decoding import NextTokenObjective
from decoding.training.packed import Packing
from rpt import (
    OffsetCode,
    ResampleConfig,
    ResampleObjective,
    attach_offset_code,
    load_offset_code,
    save_offset_code,
)
from rpt.permutation import reordered
from tests.conftest import MASK


def batch_of(rows: int = 2, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "document_ids": (torch.arange(length) >= length // 3).long().expand(rows, -1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code_at", ["input", "layers"])
def test_offsets_of_one_are_the_base_model_bit_for_bit(resample_model, dtype, code_at):
    model = resample_model("llama-tied", dtype, code_at=code_at).requires_grad_(True)
    base = copy.deepcopy(model)
    base.get_input_embeddings()._forward_hooks.clear()
    for layer in base.get_decoder().layers:
        layer._forward_pre_hooks.clear()
    batch = batch_of()
    loss, metrics = ResampleObjective(code_at=code_at, sequence_share=0.0)(model, batch)
    reference, _ = NextTokenObjective()(base, batch)
    assert torch.equal(loss, reference) and set(metrics) == {"ntp_loss", "num_targets"}
    loss.backward(), reference.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        if "offset_code" in name:
            assert not ours.grad.any()
        else:
            assert torch.equal(ours.grad, theirs.grad), name
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"]).logits, base(batch["input_ids"]).logits)


@pytest.mark.parametrize("code_at", ["input", "layers"])
def test_other_offsets_are_not(resample_model, code_at):
    model = resample_model(code_at=code_at)
    objective, batch = ResampleObjective(code_at=code_at, sequence_share=1.0, window_share=0.3), batch_of()
    torch.manual_seed(0)
    with_code, metrics = objective(model, batch)
    model.offset_code.table.data.zero_()
    torch.manual_seed(0)
    assert abs(with_code - objective(model, batch)[0]) > 1e-3
    assert set(metrics) == {"ntp_loss", "ptp_loss", "skip_loss", "num_targets"}


def test_every_used_row_of_the_table_gets_a_gradient_and_no_other(resample_model):
    model = resample_model("llama", window=3, perm="uniform").requires_grad_(True)
    torch.manual_seed(1)
    ResampleObjective(window=3, perm="uniform", sequence_share=1.0, window_share=0.25)(model, batch_of(8, 60))[
        0
    ].backward()
    learned = model.offset_code.table.grad[0].abs().sum(-1) > 0
    assert learned.tolist() == [True, True, False, False, True, True]  # offsets -2, -1, (0, 1), 2, 3


def test_codes_are_added_where_they_should():
    code = OffsetCode(3, 4)
    with torch.no_grad():
        code.table.copy_(torch.arange(6.0)[None, :, None].expand(1, 6, 4) / code.GAIN)
    offset = torch.tensor([[-2, -1, 1, 2, 3]])
    assert code(torch.zeros(1, 5, 4), offset)[0, :, 0].tolist() == [0, 1, 0, 4, 5]


def test_no_slot_sees_a_later_one_or_its_target(resample_model):
    """Changing the token in slot j' leaves all slots before it as they were; a target is never among its row's inputs."""
    model = resample_model()
    batch = batch_of(1, 30)
    packing = Packing.from_document_ids(batch["document_ids"])
    sigma = packing.index.clone()
    sigma[0, 14:16], sigma[0, 20:22] = torch.tensor([15, 14]), torch.tensor([21, 20])
    order, objective = reordered(packing, sigma), ResampleObjective()
    before = objective.trunk(model, batch["input_ids"], packing, order)
    for slot in range(10, 30):
        changed = batch["input_ids"].clone()
        token = int(sigma[0, slot])
        changed[0, token] = 3 + (changed[0, token] - 2) % 90
        after = objective.trunk(model, changed, packing, order)
        assert torch.equal(after[0, :slot], before[0, :slot]) and not torch.equal(after[0, slot], before[0, slot])
    for slot in order.has_target[0].nonzero().flatten().tolist():
        assert order.tau[0, slot] not in sigma[0, : slot + 1]


@pytest.mark.parametrize("rope_index", ["slot", "token"])
def test_reordered_rows_are_what_stock_transformers_makes_of_them(resample_model, rope_index):
    """The loss of a hand-made order equals that of the model's own forward with embeddings and positions given."""
    model = resample_model(rope_index=rope_index)
    tokens = batch_of(1, 12)["input_ids"]
    packing = Packing.from_document_ids(torch.zeros(1, 12, dtype=torch.long))
    sigma = torch.tensor([[0, 1, 2, 4, 3, 5, 6, 8, 7, 9, 10, 11]])
    order, objective = reordered(packing, sigma), ResampleObjective(rope_index=rope_index)
    losses, _ = objective.losses(model, tokens, packing, torch.ones(1, 12, dtype=torch.bool), order)
    embeddings = model.get_input_embeddings().weight[tokens[0, sigma[0]]]
    offset = sigma[0].roll(-1) - sigma[0]
    offset[-1] = 1
    codes = model.offset_code.codes[0]
    embeddings = torch.stack([e if o == 1 else e + codes[o + 1] for e, o in zip(embeddings, offset, strict=True)])
    positions = sigma if rope_index == "token" else torch.arange(12)[None]
    # No cache: positions that do not rise would be taken for the starts of packed documents.
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    logits = model(inputs_embeds=embeddings[None], position_ids=positions, attention_mask=mask, use_cache=False).logits[
        0
    ]
    expected = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, sigma[0]][1:], reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)


def test_saved_and_loaded_next_to_a_model(resample_model, fresh_model, tmp_path):
    model = resample_model(window=3, rope_index="token", code_at="layers")
    save_offset_code(model, tmp_path)
    other = fresh_model("llama")
    load_offset_code(other, tmp_path)
    assert torch.equal(other.offset_code.table, model.offset_code.table)
    assert other.config.resample == ResampleConfig(window=3, rope_index="token", code_at="layers").as_dict()


def test_mistakes_are_named(resample_model, fresh_model, tmp_path):
    model = resample_model()
    with pytest.raises(ValueError, match="already has one"):
        attach_offset_code(model, ResampleConfig())
    with pytest.raises(ValueError, match="has none"):
        save_offset_code(fresh_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="no offset_code.safetensors"):
        load_offset_code(fresh_model("llama"), tmp_path)
    save_offset_code(model, tmp_path)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 64\), this model needs \(1, 4, 32\)"):
        load_offset_code(fresh_model("llama", hidden_size=32), tmp_path)
    other = fresh_model("llama")
    other.config.resample = ResampleConfig(rope_index="token").as_dict()
    with pytest.raises(ValueError, match="config.resample.*token"):
        load_offset_code(other, tmp_path)


def test_an_objective_goes_on_with_what_it_trained_and_nothing_else(fresh_model):
    model = fresh_model("llama")
    ResampleObjective().prepare(model)
    table = model.offset_code.table
    ResampleObjective(window_share=0.1).prepare(model)
    assert model.offset_code.table is table and model.config.resample["window_share"] == 0.1
    with pytest.raises(ValueError, match="trained with.*cannot go on"):
        ResampleObjective(rope_index="token").prepare(model)


def test_a_copy_has_a_code_of_its_own(resample_model):
    model = resample_model()
    twin = copy.deepcopy(model)
    model.offset_code.table.data.zero_()
    torch.manual_seed(0)
    objective, batch = ResampleObjective(sequence_share=1.0, window_share=0.3), batch_of()
    mine = objective(model, batch)[0]
    torch.manual_seed(0)
    assert abs(mine - objective(twin, batch)[0]) > 1e-3


def test_a_compiled_trunk_reads_the_offsets_of_each_call(resample_model):
    """A graph must not keep the offsets of the call that compiled it."""
    model = resample_model()
    objective, batch = ResampleObjective(sequence_share=1.0, window_share=0.3), batch_of()
    seeds = (0, 1, 0)
    losses = [objective(model, batch)[0] for seed in seeds if torch.manual_seed(seed)]
    model.get_decoder().compile(backend="eager")
    compiled = [objective(model, batch)[0] for seed in seeds if torch.manual_seed(seed)]
    assert torch.allclose(torch.stack(losses), torch.stack(compiled), atol=1e-5)


def test_lora_off_is_the_base_model_and_the_adapter_carries_the_code(fresh_model, tmp_path):
    peft = pytest.importorskip("peft")
    base = fresh_model("llama")
    ids = torch.arange(3, 20)[None]
    reference = base(ids).logits
    model = peft.get_peft_model(fresh_model("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    ResampleObjective().prepare(model)
    assert model.offset_code.table.requires_grad
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "offset_code" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(model(ids).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, reference)
    model.save_pretrained(tmp_path)
    save_offset_code(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh_model("llama"), tmp_path)
    load_offset_code(loaded, tmp_path)
    objective, batch = ResampleObjective(sequence_share=1.0, window_share=0.3), batch_of()
    losses = [objective(m, batch)[0] for m in (model, loaded) if torch.manual_seed(4)]
    assert torch.allclose(*losses, atol=1e-6)
