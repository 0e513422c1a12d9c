"""Small runs of the real trainer: packing, both objectives, resuming, what is saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune import finetune, load_recipe
from finetune.data import PackedDataset, read_texts
from finetune.mask_token import initialise_mask_token
from sbd import SetBlockDecoder

TEXTS = [
    f"the {word} ate the {other}." for word in ("cat", "dog", "hen", "fox") for other in ("bread", "corn", "fish")
] * 6


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def recipe(tmp_path, data, tokenizer):
    """``recipe(**changes)``: a run of four steps on a tiny Llama."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    new_model = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

    def make(output: str = "out", **changes):
        values = {
            "output": str(tmp_path / output),
            "data": [str(data)],
            "held_out": [str(data)],
            "new_model": new_model,
            "tokenizer": str(tmp_path / "tokenizer"),
            "objective": "sbd",
            "sequence_length": 32,
            "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1}
            | {"use_cpu": True, "seed": 3, "learning_rate": 1e-2, "disable_tqdm": True},
        } | changes
        path = tmp_path / f"{output}.yaml"
        path.write_text(json.dumps(values))
        return load_recipe(path)

    return make


def test_rows_are_cut_from_whole_documents(tokenizer):
    packed = PackedDataset(TEXTS, tokenizer, 32)
    first = packed[0]
    assert first["input_ids"].shape == (32,) and first["input_ids"].dtype == torch.int64
    text = tokenizer(TEXTS[0])["input_ids"] + [tokenizer.eos_token_id]
    assert first["input_ids"][: len(text)].tolist() == text
    assert first["document_ids"][: len(text)].unique().tolist() == [0]
    assert first["document_ids"][len(text)] == 1


def test_order_depends_on_the_seed_alone(tokenizer):
    rows = [PackedDataset(TEXTS, tokenizer, 32, seed=seed).tokens for seed in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_data_mistakes_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_texts([tmp_path / "none.jsonl"])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:2.*'text'"):
        read_texts([tmp_path / "bad.jsonl"])
    with pytest.raises(ValueError, match="sequence_length"):
        PackedDataset(["a"], tokenizer, 32)


def test_a_set_block_run_saves_a_model_that_decodes(recipe, tmp_path):
    report = finetune(recipe(decoder="sbd:block_size=4"))
    assert report["steps"] == 4 and set(report["held_out_next_token_loss_nats"]) == {"texts"}
    assert {"ntp_loss", "matp_loss", "loss"} <= set(report["log"][0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    config = model.generation_config
    assert config.trained_block_sizes == list(range(2, 17)) and config.decoder == "sbd:block_size=4"
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, custom_generate=SetBlockDecoder(block_size=4))
    assert out.shape[1] <= 11 and config.mask_token_id not in out[0].tolist()


def test_training_lowers_the_loss(recipe):
    training = dict(recipe().training) | {"max_steps": 40, "save_steps": 100}
    log = finetune(recipe(output="long", training=training))["log"]
    assert log[-1]["ntp_loss"] < 0.7 * log[0]["ntp_loss"]
    assert log[-1]["matp_loss"] < 0.8 * log[0]["matp_loss"]


def test_a_killed_run_resumes_with_the_same_losses(recipe, monkeypatch):
    from finetune.trainer import ObjectiveTrainer

    whole = finetune(recipe(output="whole"))["log"]

    class Killed(Exception):
        pass

    original = ObjectiveTrainer.training_step

    def dies(self, *arguments, **settings):
        if self.state.global_step == 2:
            raise Killed
        return original(self, *arguments, **settings)

    monkeypatch.setattr(ObjectiveTrainer, "training_step", dies)
    with pytest.raises(Killed):
        finetune(recipe(output="killed"))
    monkeypatch.setattr(ObjectiveTrainer, "training_step", original)
    resumed = finetune(recipe(output="killed"))["log"]
    assert [entry["loss"] for entry in resumed] == pytest.approx([entry["loss"] for entry in whole], rel=1e-5)


def test_a_mask_token_is_initialised_once(fresh_model):
    model = fresh_model("llama").requires_grad_(True)
    before = model.get_input_embeddings().weight[96].clone()
    initialise_mask_token(model, 96)
    middle = model.get_input_embeddings().weight[96].clone()
    assert not torch.equal(before, middle)
    model.generation_config.trained_block_sizes = [2, 3]
    initialise_mask_token(model, 96)
    assert torch.equal(model.get_input_embeddings().weight[96], middle)


def test_a_tokenizer_without_mask_token_is_refused(recipe, tmp_path, tokenizer):
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="mask_token_id"):
        finetune(recipe(tokenizer=str(tmp_path / "bare")))
