"""The engine and its model: logits on demand, and model types that would decode wrongly refused."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from decoding import Engine, NextTokenDecoder, Step
from decoding.forward import model as engine_model
from decoding.forward.gating import block_rows, marked_block_rows
from decoding.forward.rows import RowList, Rows

SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}


def seeded(make):
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


def text_and_block(prompt: int, block: int) -> RowList:
    rows = RowList()
    rows.add_causal(range(3, 3 + prompt), 0)
    rows.add_block([96] * block, prompt, prompt)
    return rows


def test_logits_are_float32_and_only_of_the_rows_asked_for():
    seen = []

    def head(hidden):
        seen.append(tuple(hidden.shape))
        return hidden @ torch.ones(4, 7, dtype=hidden.dtype)

    hidden = torch.arange(2 * 5 * 4, dtype=torch.bfloat16).reshape(2, 5, 4)
    step = Step([], [], hidden, lambda rows: head(rows).float())
    logits = step.logits([(1, range(4, 5)), (0, [0]), (1, range(2, 3))])
    assert seen == [(3, 4)] and logits.dtype == torch.float32
    assert torch.equal(logits[:, 0], torch.stack([hidden[1, 4].sum(), hidden[0, 0].sum(), hidden[1, 2].sum()]).float())


@pytest.mark.parametrize("rows", [[2], [1, 2, 3], [0, 2, 3], [0, 4], [0, 1, 2, 3, 4]])
def test_rows_of_one_sequence_may_have_gaps(rows):
    hidden = torch.randn(1, 5, 4)
    step = Step([], [], hidden, lambda h: h)
    assert torch.equal(step.logits([(0, rows)]), hidden[0, rows])


@pytest.mark.parametrize("spans", [[(0, range(1, 4))], [(1, range(0))], [(1, range(2, 5)), (0, range(1))], []])
def test_spans_are_answered_one_after_the_other(spans):
    hidden = torch.randn(2, 5, 4)
    expected = [hidden[index, row] for index, rows in spans for row in rows]
    answer = Step([], [], hidden, lambda h: h).hidden(iter(spans))
    assert answer.shape == (len(expected), 4) and all(map(torch.equal, answer, expected))


def test_a_forward_writes_the_cache_and_marks_the_block_rows(fresh_model):
    model = fresh_model("llama")
    marked = []
    model.model.embed_tokens.register_forward_hook(lambda *_: marked.append(block_rows()))
    engine = Engine(model)
    cache = engine.new_cache(2)
    rows = Rows.pack([text_and_block(3, 2), text_and_block(6, 0)], engine.device)
    hidden = engine.forward(rows, cache)
    assert hidden.shape == (2, 6, 64)
    assert torch.equal(marked[0], rows.is_block) and rows.is_block.int().tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6]
    assert block_rows() is None
    assert all(layer.keys[0, :, :5].ne(0).any(-1).all() for layer in cache.layers)


def test_marks_end_with_the_forward_also_after_an_error():
    with pytest.raises(RuntimeError), marked_block_rows(torch.ones(1, 1, dtype=torch.bool)):
        assert block_rows().all()
        raise RuntimeError
    assert block_rows() is None


@pytest.mark.parametrize("form", ["flash_attention_2", "paged|sdpa", "mine"])
def test_attention_that_cannot_be_masked_is_refused(fresh_model, prompts, unchanged, form):
    model = fresh_model("llama")
    original = model.config._attn_implementation
    with unchanged(model):
        model.config._attn_implementation = form
        with pytest.raises(
            ValueError, match=f"attn_implementation='{form.replace('|', '.')}'.*'sdpa', 'sdpa_tiles', 'eager'"
        ):
            NextTokenDecoder()(
                model,
                prompts(5)["input_ids"],
                logits_processor=[],
                stopping_criteria=[],
                generation_config=model.generation_config,
            )
        model.config._attn_implementation = original


def test_an_unknown_type_that_keeps_to_masks_and_slots_is_decoded(prompts):
    model = seeded(
        lambda: OlmoForCausalLM(OlmoConfig(**SMALL, num_attention_heads=4, eos_token_id=None, pad_token_id=0))
    )
    inputs = prompts(5, 9)
    stock = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    ours = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=NextTokenDecoder())
    assert torch.equal(ours, stock)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("bloom", lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4))),
        ("mamba", lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_types_that_would_decode_wrongly_are_refused_by_name(prompts, kind, make):
    model = seeded(make)
    with pytest.raises(ValueError, match=f"model_type='{kind}' cannot be decoded"):
        Engine(model).check()


def test_the_probe_sees_a_model_that_ignores_our_mask(fresh_model, monkeypatch):
    model = fresh_model("llama")
    monkeypatch.setattr(engine_model, "TESTED", ())
    Engine(model).check()
    monkeypatch.setattr("decoding.forward.attention.attention_masks", lambda model, visibility, slots: None)
    with pytest.raises(ValueError, match="model_type='llama' cannot be decoded: its logits"):
        Engine(model).check()


def test_a_tested_type_is_not_probed(fresh_model, monkeypatch):
    monkeypatch.setattr(engine_model, "_passes", lambda *_: 1 / 0)
    Engine(fresh_model("qwen3")).check()
    with pytest.raises(ValueError, match="model_type='gpt2'.*ZeroDivisionError"):
        Engine(seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4)))).check()
