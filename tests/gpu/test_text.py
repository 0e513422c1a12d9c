"""Greedy text is that of stock ``generate`` on the same GPU: in float32 word for word, in bfloat16 up to near-ties."""

import pytest
import torch

from decoding import decoder_from_spec
from decoding.decoder import PREFILL_CHUNK
from tests.conftest import FAMILIES, MASK

LOOK_AHEADS = ("all", "alternate", 0, 2, "auto")
SPECS = ["ntp", "prompt-lookup:block_size=4"]
SPECS += [f"sbd-lossless:block_size=4,look_ahead={n},draft={draft}" for n in LOOK_AHEADS for draft in ("mask", "both")]


def greedy(model, inputs, spec: str | None = None, count: int = 24) -> list[list[int]]:
    """New tokens of each sequence, by the decoder of that spec or by stock ``generate``."""
    decoder = spec and decoder_from_spec(spec)
    settings = {"max_new_tokens": count, "do_sample": False, "suppress_tokens": [MASK]}
    return model.generate(**inputs, custom_generate=decoder, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def where_it_parts(model, inputs, stock: list[list[int]], ours: list[list[int]]) -> list[tuple[int, int, float, float]]:
    """For each text of ours that is another: its place in the batch, the token where it parts, and by a plain forward how
    far apart the two best logits are there, and the largest of all."""
    found = []
    for place, (expected, got) in enumerate(zip(stock, ours, strict=True)):
        if expected == got:
            continue
        at = next(i for i, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1])
        prompt = inputs["input_ids"][place][inputs["attention_mask"][place].bool()].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + expected[:at]], device=model.device)).logits[0, -1].float()
        logits[MASK] = -torch.inf
        best = logits.topk(2).values
        found.append((place, at, float(best[0] - best[1]), float(logits[:MASK].abs().max())))
    return found


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_in_float32_is_that_of_generate(gpu_model, gpu_prompts, family, spec):
    model = gpu_model(family)
    for lengths in ((9,), (5, 20, 12)):
        inputs = gpu_prompts(*lengths)
        assert where_it_parts(model, inputs, greedy(model, inputs), greedy(model, inputs, spec)) == []


@pytest.mark.parametrize("form", ["eager", "sdpa_tiles"])
def test_other_attention_says_the_same(gpu_model, gpu_prompts, form):
    model, inputs = gpu_model("qwen2-window", attn_implementation=form), gpu_prompts(5, 20, 12)
    stock = greedy(gpu_model("qwen2-window"), inputs)
    for spec in ("ntp", "sbd-lossless:block_size=4"):
        assert where_it_parts(model, inputs, stock, greedy(model, inputs, spec)) == []


def test_a_prompt_that_is_run_in_pieces(gpu_model, gpu_prompts):
    model = gpu_model("llama", max_position_embeddings=2 * PREFILL_CHUNK)
    inputs = gpu_prompts(PREFILL_CHUNK + 70, 20)
    stock = greedy(model, inputs)
    for spec in ("ntp", "sbd-lossless:block_size=4"):
        assert where_it_parts(model, inputs, stock, greedy(model, inputs, spec)) == []


@pytest.mark.parametrize("spec", ["ntp", "sbd-lossless:block_size=4", "prompt-lookup:block_size=4"])
@pytest.mark.parametrize("family", ["llama-3.1", "qwen2-window", "qwen3"])
def test_text_in_bfloat16_parts_from_generate_at_near_ties_alone(gpu_model, gpu_prompts, family, spec):
    model, inputs = gpu_model(family, torch.bfloat16), gpu_prompts(5, 20, 12, 9, 14, 7, 3, 11)
    parted = where_it_parts(model, inputs, greedy(model, inputs), greedy(model, inputs, spec))
    # Eight bits of mantissa: both logits may be off by some units in the last place of the largest.
    assert all(gap <= 2**-5 * largest for _, _, gap, largest in parted), parted
    assert len(parted) <= 4, "half of the texts should meet no tie"


@pytest.mark.parametrize(
    "spec",
    ["sbd:block_size=5,entropy_bound=1", "sbd:block_size=5,top_k=2,anchor=true,commit=prefix", "dfm:block_size=5"],
)
def test_lossy_decoders_run_in_bfloat16(gpu_model, gpu_prompts, spec):
    texts = greedy(gpu_model("llama", torch.bfloat16), gpu_prompts(5, 20, 12), spec)
    assert [len(text) for text in texts] == [24] * 3 and not any(MASK in text for text in texts)
