"""Training on a GPU: FlexAttention gives the losses and gradients of sdpa, and recipes train in bf16."""

import json

import pytest
import torch

from decoding import decoder_from_spec
from decoding.forward.loading import load_weights
from sbd import SetBlockObjective
from tests.conftest import build

FIXED = {"block_sizes": [4], "all_mask_share": 1.0}  # no random masks, so that two runs see the same


def losses_and_gradients(family: str, form: str):
    model = build(family, attn_implementation=form).to("cuda").requires_grad_(True).train()
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(0, 20, (2, 150), generator=generator),
        "document_ids": torch.tensor([[0] * 70 + [1] * 80, [2] * 130 + [-1] * 20]),
    }
    torch.manual_seed(3)
    objective = SetBlockObjective(block_sizes=(4,), mask_token_id=21)
    loss, _ = objective(model, {name: tensor.to("cuda") for name, tensor in batch.items()})
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_flex_attention_trains_like_sdpa(gpu):
    """One test for all families, because a process compiles a kernel once."""
    for family in ("llama", "qwen2-window", "qwen3"):
        (loss, expected), (other_loss, found) = (losses_and_gradients(family, f) for f in ("sdpa", "flex_attention"))
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        for name, gradient in expected.items():
            # float32 sums in another order, through two layers and 300 rows.
            torch.testing.assert_close(
                found[name],
                gradient,
                rtol=1e-3,
                atol=1e-3 * float(gradient.abs().max()),
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.fixture
def recipe(tmp_path, tokenizer):
    """``recipe(name, bf16, ...)``: two steps of a one-layer Llama on a page of text."""
    for package in ("datasets", "peft", "yaml"):
        pytest.importorskip(package)
    from finetune import load_recipe

    data = tmp_path / "texts.jsonl"
    texts = [f"the {word} ate the {other}." for word in ("cat", "dog", "hen") for other in ("bread", "corn")] * 12
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "seed": 3, "disable_tqdm": True}

    def make(name: str, bf16: bool, **changes):
        values = {
            "output": str(tmp_path / name),
            "data": [str(data)],
            "held_out": [str(data)],
            "new_model": shape,
            "tokenizer": str(tmp_path / "tokenizer"),
            "sequence_length": 32,
            "training": training | {"bf16": bf16, "learning_rate": 1e-2, "save_steps": 2},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(values | changes))
        return load_recipe(path)

    return make


@pytest.mark.parametrize(
    ("attention", "changes"),
    [
        (None, {"objective": "sbd", "objective_options": FIXED}),
        ("sdpa", {"objective": "sbd", "objective_options": FIXED, "tuning": {"kind": "gated", "rank": 2}}),
        ("sdpa", {"objective": "ntp", "tuning": {"kind": "lora", "rank": 2}}),
        ("sdpa", {"objective": "rpt"}),
        ("sdpa", {"objective": "dfm"}),
    ],
    ids=["sbd-full", "sbd-gated", "ntp-lora", "rpt-full", "dfm-full"],
)
def test_recipes_train_in_bf16(recipe, attention, changes):
    """The losses are those of float32 within the digits of bf16, and a model that is saved decodes.

    attention: None is what a GPU gets by itself, which has to be compiled first; float32 always runs with sdpa.
    """
    from finetune import finetune

    found = {}
    for name, form in (("bf16", attention), ("float32", "sdpa")):
        report = finetune(recipe(name, name == "bf16", attention=form, **changes))
        assert report.dtype == {"bf16": "bfloat16"}.get(name, name) and report.steps == 2
        found[name] = [entry["loss"] for entry in report.log]
    assert found["bf16"] != found["float32"] and found["bf16"] == pytest.approx(found["float32"], rel=2**-6)
    if changes["objective"] == "sbd" and "tuning" not in changes:
        model = load_weights(recipe("bf16", True, **changes).output).to("cuda")
        decoder = decoder_from_spec("sbd:block_size=4")
        text = model.generate(torch.tensor([[5, 6, 7]], device="cuda"), max_new_tokens=8, custom_generate=decoder)
        assert text.device.type == "cuda" and 3 < text.shape[1] <= 11
