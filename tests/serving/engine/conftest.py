"""Engines for the tests: vLLM in this process, one engine for each model, each kept for the whole run.

All tests of this folder need vLLM, which lives in an environment of its own: ``make test-vllm`` runs them. Elsewhere they are
skipped, and say so.
"""

import functools
import importlib.util
import os
import tempfile

import pytest
import torch

from serving.launch import prepare_process
from tests.conftest import build

MISSING = "vLLM is not installed in this environment; `make test-vllm` sets one up and runs these tests there"
CONTEXT = 256
# vLLM's attention on CPUs has no heads narrower than 32.
SHAPE = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}


@pytest.fixture(scope="session", autouse=True)
def vllm():
    """vLLM, ready to be used in this process."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(MISSING)
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.update(quiet | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    prepare_process()
    import vllm

    return vllm


@functools.cache
def saved(family: str, **overrides) -> tuple[torch.nn.Module, str]:
    """A random model in transformers, and a folder with the same."""
    shape = dict(SHAPE)
    if family.startswith("qwen2"):  # whose configuration has no head_dim
        del shape["head_dim"]
    model = build(family, max_position_embeddings=CONTEXT, **{**shape, **overrides})
    model.generation_config.decoder = "sbd-lossless:block_size=8"
    folder = tempfile.mkdtemp(prefix="setflow-test-")
    model.save_pretrained(folder)
    return model, folder


@functools.cache
def engine(folder: str, decoder: str | None = None, **settings):
    """A vllm.LLM of the model in ``folder``, without a tokenizer unless ``settings`` say otherwise."""
    from serving import load

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 26,
        "max_num_seqs": 32,
        "max_model_len": CONTEXT,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    return load(folder, decoder, **(defaults | settings))


def run(llm, prompts: list[list[int]], max_tokens: int = 24, options=None, **settings) -> list[list[int]]:
    """The new tokens of each prompt. options: extra_args, one for all or a list; settings: of SamplingParams."""
    from vllm import SamplingParams

    several = options if isinstance(options, list) else [options] * len(prompts)
    params = [
        SamplingParams(
            **{"max_tokens": max_tokens, "temperature": 0, "detokenize": False, "extra_args": extra} | settings
        )
        for extra in several
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def count_forwards(monkeypatch, vllm):
    """A list of the tokens that each forward of each request emitted, the prompts' forwards left out."""
    from serving.canvas import Progress

    counts, original = [], Progress.advance

    def advance(self, ran, emitted):
        counts.append(emitted)
        original(self, ran, emitted)

    monkeypatch.setattr(Progress, "advance", advance)
    return counts


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]
