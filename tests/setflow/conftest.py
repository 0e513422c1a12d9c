"""Model folders with random weights, as ``setflow --model`` takes them."""

import itertools

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from eval.additions import additions
from setflow.cli import main
from setflow.corpus import train_tokenizer

CONTEXT = 96


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """``model_folder(mask_token=True, ...)``: a folder with a tiny random Llama and the corpus's kind of tokenizer."""

    def save(mask_token: bool = True, **overrides) -> str:
        folder = tmp_path_factory.mktemp("model")
        tokenizer = train_tokenizer(p.prompt + p.solution for p in itertools.islice(additions(0, False), 50))
        names = ("bos", "eos", "pad", "mask") if mask_token else ("bos", "eos", "pad")
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.4,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names},
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**{**shape, **overrides}))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def tiny(model_folder) -> str:
    return model_folder()


@pytest.fixture
def setflow(capfd, monkeypatch):
    """``setflow("generate", ...)`` runs a command in this process; gives exit code, standard output, standard error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    level = transformers.logging.get_verbosity()

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    yield run
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()
