"""Row-gated LoRA on a GPU: causal rows, their keys and values are the base model's bit for bit."""

import pytest
import torch

from decoding import Engine, decoder_from_spec
from decoding.forward.adapter import GatedAdapter
from decoding.forward.rows import RowList
from tests.conftest import MASK, build


def adapted(model) -> None:
    """Put a random adapter on ``model``, strong enough to change every logit."""
    adapter = GatedAdapter(model, 4, 8)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    adapter.to(model.dtype).requires_grad_(False)
    adapter.mask_token_id = MASK
    adapter.attach(model)


def causal_and_masks(model) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What one forward of ragged sequences, each with a block of masks, leaves of causal rows and of block rows."""
    engine, lists, texts, size = Engine(model), [], (range(5, 40), range(9, 20), range(30, 47)), 6
    for text in texts:
        rows = RowList()
        rows.add_causal(text, 0)
        rows.add_block([MASK] * size, len(text), len(text))
        lists.append(rows)
    cache = engine.new_cache(len(texts))
    hidden = engine.step(lists, cache).hidden_states
    kept = [
        hidden.transpose(1, 2)[:, None],
        *(states for layer in cache.layers for states in (layer.keys, layer.values)),
    ]
    kept[0] = kept[0].transpose(2, 3)  # [B, H, S, D] as the keys and values; the rows lie in the order of their slots
    parts = []
    for start, stop in ((0, 0), (0, size)):
        spans = [slice(0, len(t)) if stop == 0 else slice(len(t) + start, len(t) + stop) for t in texts]
        parts.append([states[b, :, span] for states in kept for b, span in enumerate(spans)])
    return parts[0], parts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "mistral"])
def test_causal_rows_are_bit_identical(gpu, family, dtype):
    model = build(family, dtype).to("cuda")
    causal, masks = causal_and_masks(model)
    adapted(model)
    same_causal, other_masks = causal_and_masks(model)
    for before, after in zip(causal, same_causal, strict=True):
        assert torch.equal(before, after)
    for before, after in zip(masks, other_masks, strict=True):
        assert not torch.allclose(before, after)


def test_verified_text_is_the_base_models(gpu_prompts):
    model, inputs = build("qwen3").to("cuda"), gpu_prompts(7, 12, 9)
    settings = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [MASK]}
    stock = model.generate(**inputs, **settings)
    adapted(model)
    for spec in ("ntp", "sbd-lossless:block_size=4"):
        assert torch.equal(model.generate(**inputs, custom_generate=decoder_from_spec(spec), **settings), stock)
