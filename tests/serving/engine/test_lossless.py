"""Self-speculation in one forward against vLLM without us: the same text, the same distribution, the same cached keys."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import setflow.loading
from decoding import decoder_from_spec, load_model
from eval.bench.prompts import held_out_python, worked_additions
from tests.conftest import chi_square_z
from tests.serving.engine.conftest import engine, run, saved

PROMPTS = int(os.environ.get("SERVING_PROMPTS", "8"))  # of each kind


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The base model of the embedded gated one, alone."""
    folder = tmp_path_factory.mktemp("base")
    for path in Path(setflow.loading.EMBEDDED_GATED).iterdir():
        if not path.name.startswith("gated_adapter"):
            shutil.copy(path, folder)
    return str(folder)


def texts(tokenizer) -> list[list[int]]:
    return worked_additions(tokenizer, PROMPTS).ids + held_out_python(tokenizer, PROMPTS, prompt_tokens=24).ids


@pytest.mark.parametrize("weights", ("full", "gated"))
def test_text_is_that_of_plain_vllm(weights, base, count_forwards):
    folder = str(setflow.loading.EMBEDDED if weights == "full" else setflow.loading.EMBEDDED_GATED)
    _, tokenizer = load_model(folder, dtype=torch.float32)
    prompts = texts(tokenizer)
    served = run(engine(folder, max_model_len=512), prompts, 32, {"block_size": 4})
    forwards = len(count_forwards)
    assert run(engine(folder if weights == "full" else base, "none", max_model_len=512), prompts, 32) == served
    new = sum(map(len, served))
    assert forwards < 0.75 * new, "drafts should be accepted"
    assert sum(count_forwards) == new - len(prompts), "the prompts' last rows give a token each"


def test_gated_rows_are_those_of_transformers():
    """Set blocks are decoded by the adapter's rows alone: the same text as in transformers, and another than without them."""
    folder = str(setflow.loading.EMBEDDED_GATED)
    model, tokenizer = load_model(folder, dtype=torch.float32)
    prompts, spec = texts(tokenizer)[::4], "sbd:block_size=8,entropy_bound=0.3"
    served = run(engine(folder, max_model_len=512), prompts, 24, {"decoder": spec})
    for prompt, text in zip(prompts, served, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            custom_generate=decoder_from_spec(spec),
        )
        assert output[0, len(prompt) :].tolist() == text


def cached_keys(llm) -> torch.Tensor:
    """All that the paged cache of an engine holds."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return torch.stack([cache.clone() for cache in runner.kv_caches])


def test_cached_keys_are_the_plain_models(base):
    """Bit for bit: what an adapter's engine leaves in the cache of a prompt is what the plain model's engine leaves there."""
    folder = str(setflow.loading.EMBEDDED_GATED)
    _, tokenizer = load_model(folder, dtype=torch.float32)
    prompt = (tokenizer("def read_lines(path):\n")["input_ids"] * 40)[:256]
    small = {"max_model_len": 512, "num_gpu_blocks_override": 24, "block_size": 32, "max_num_seqs": 1}
    held = []
    for place, decoder in ((folder, None), (base, "none")):
        llm = engine(place, decoder, **small)
        run(llm, [prompt], 1)
        held.append(cached_keys(llm))
    used = held[1].flatten(2).abs().sum((0, 2)) > 0
    assert used.sum() >= 2  # the prompt's blocks
    assert torch.equal(held[0][:, used], held[1][:, used])


def test_terms_act_on_mask_rows_only(vllm):
    """A causal row is chosen from the plain result, whatever else is in the batch."""
    from serving.engine.adapter import GatedLinearMethod

    class Plain:
        def apply(self, layer, x, bias=None):
            return x @ layer.weight.T

    layer = torch.nn.Linear(6, 10, bias=False)
    layer.quant_method = Plain()
    down, up = torch.randn(2, 6), torch.randn(5, 2)
    rows = torch.tensor([False, True, False, True, False])
    x = torch.randn(4, 6)
    with torch.no_grad():
        method = GatedLinearMethod(layer, [(down, up), (-down, up)], 0.5, rows)
        plain, gated = layer.quant_method.apply(layer, x), method.apply(layer, x)
    assert torch.equal(plain[~rows[:4]], gated[~rows[:4]])
    term = 0.5 * x @ down.T @ up.T
    torch.testing.assert_close(gated[rows[:4]], (plain + torch.cat([term, -term], dim=1))[rows[:4]])


SAMPLES, TEMPERATURE, LENGTH, WORDS = int(os.environ.get("SERVING_SAMPLES", "512")), 0.8, 5, 5


@pytest.mark.parametrize("cut", ({}, {"top_k": 3, "min_p": 0.05, "top_p": 1 - 1e-6}), ids=("whole", "cut"))
def test_sampled_text_has_the_next_token_distribution(cut, count_forwards):
    """The last two of five tokens from a model of five words, against all its texts, by enumeration.

    The decisions themselves are tested with more samples, and without vLLM, in tests/serving/test_decisions.py.
    """
    model, folder = saved("llama", vocab_size=WORDS + 1, initializer_range=0.2)
    prompt = [1, 3, 2]
    texts = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], dim=1)).logits
    logits = logits[:, len(prompt) - 1 : -1, :WORDS].double()  # the last one is the mask token, which is never emitted

    def distribution(temperature: float) -> torch.Tensor:
        scores = logits / temperature
        if cut:
            p = scores.softmax(-1)
            scores = scores.masked_fill(p < cut["min_p"] * p.amax(-1, keepdim=True), -torch.inf)
            scores = scores.masked_fill(scores < scores.topk(cut["top_k"]).values[..., -1:], -torch.inf)
        each = scores.softmax(-1).gather(-1, texts[..., None])[..., 0].prod(-1)
        return each.view(-1, WORDS, WORDS).sum(0)

    llm = engine(folder, max_num_seqs=128)
    options = {"decoder": "sbd-lossless:block_size=4"}
    samples = torch.tensor(run(llm, [prompt] * SAMPLES, LENGTH, options, temperature=TEMPERATURE, **cut))[:, -2:]
    assert chi_square_z(samples, distribution(TEMPERATURE)) < 3.8
    assert chi_square_z(samples, distribution(2 * TEMPERATURE)) > 6, "the test must tell distributions apart"
    assert len(count_forwards) < (LENGTH - 1) * SAMPLES, "some drafts should be accepted"


def test_a_seed_gives_one_text_in_any_batch(vllm):
    model, folder = saved("llama")
    prompts = [[5, 9, 30 + i] for i in range(12)]
    for options in ({"decoder": "sbd-lossless"}, {"decoder": "sbd:block_size=4,entropy_bound=1"}, {"decoder": "ntp"}):
        together = run(engine(folder), prompts, 12, options, temperature=0.9, seed=7)
        assert run(engine(folder), prompts[3:4], 12, options, temperature=0.9, seed=7) == together[3:4]
        assert run(engine(folder), prompts[:4], 12, options, temperature=0.9, seed=8) != together[:4]
