"""What real chat models need of the command line: their chat template, GGUF files, and the adapter made for their weights."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding.forward.adapter import GatedAdapter, gated_adapter, load_adapter
from decoding.inputs.source import ADAPTER_FILE
from eval.additions import additions
from finetune import finetune, load_recipe
from setflow import adapters
from setflow.corpus import train_tokenizer
from tests.conftest import build
from tools import embed

MARKED = (
    "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(model_folder) -> str:
    """A model whose template marks turns and ends them with the token that ends its texts."""
    folder = model_folder(mask_token=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(chat_model, tmp_path_factory) -> str:
    """An adapter for it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    trained = GatedAdapter(model, 2, 4, ["o_proj"])
    trained.attach(model)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.mask_token_id, model.generation_config.decoder = 5, "sbd-lossless:block_size=4"
    trained.save(model, folder)
    return str(folder)


def test_a_prompt_goes_through_the_template_of_a_chat_model(setflow, chat_model):
    def generate(*more: str) -> tuple[dict, str]:
        arguments = ("--model", chat_model, "--decoder", "ntp", "--max-new-tokens", "5")
        code, out, err = setflow("generate", "1 + 2", *arguments, *more)
        assert code == 0, err
        return out, err

    asked = json.loads(generate("--json")[0])
    plain = json.loads(generate("--json", "--no-chat")[0])
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    assert asked["chat"] is True and plain["chat"] is False
    turns = [{"role": "user", "content": "1 + 2"}]
    assert asked["prompt_tokens"] == len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
    assert plain["prompt_tokens"] == len(tokenizer("1 + 2")["input_ids"]) < asked["prompt_tokens"]
    out, err = generate()
    assert "the prompt went through the model's chat template; --no-chat continues it" in err
    assert out.rstrip("\n") == asked["text"].rstrip("\n"), "of an answer the question is no part"
    out, err = generate("--no-chat")
    assert "template" not in err and out.startswith("1 + 2")


def test_a_template_alone_makes_no_chat_model(setflow, tiny, chat_model, tmp_path):
    """The tiny model's template marks no turns; and base models have templates that end turns otherwise than texts."""
    base = tmp_path / "base"
    shutil.copytree(chat_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = MARKED.replace("eos_token", "pad_token")
    tokenizer.save_pretrained(base)
    for folder in (tiny, str(base)):
        arguments = ("--model", folder, "--decoder", "ntp", "--max-new-tokens", "2", "--json")
        assert json.loads(setflow("generate", "1 + 2", *arguments)[1])["chat"] is False
        assert json.loads(setflow("generate", "1 + 2", *arguments, "--chat")[1])["chat"] is True


def test_chat_needs_a_template(setflow, model_folder):
    folder = model_folder(mask_token=False)
    Path(folder, "chat_template.jinja").unlink()
    code, out, err = setflow("generate", "1", "--model", folder, "--chat")
    assert code == 2 and "has no chat template; leave --chat out" in err


def test_an_adapter_in_the_box_is_found_by_the_weights(setflow, chat_model, adapter, monkeypatch):
    monkeypatch.setattr(adapters, "PACKAGED", {"tiny": Path(adapter)})
    shown = ("1 + 2", "--model", chat_model, "--max-new-tokens", "12", "--dtype", "fp32")
    code, out, err = setflow("generate", *shown, "--compare")
    assert code == 0 and "drafts by the adapter 'tiny'" in err and "sbd-lossless:block_size=4" in err
    assert "the same as next-token decoding's" in err
    for name in ("none", "tiny", adapter):
        code, other, err = setflow("generate", *shown, "--adapter", name)
        assert code == 0 and other == out and ("drafts by" in err) == (name != "none"), err


def test_an_adapter_meets_the_model_that_it_was_made_for(setflow, chat_model, adapter, model_folder, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=dtype)
        load_adapter(model, adapter)
    other = model_folder(mask_token=False, initializer_range=0.39)
    monkeypatch.setattr(adapters, "PACKAGED", {"tiny": Path(adapter)})
    model = AutoModelForCausalLM.from_pretrained(other)
    assert adapters.add_adapter(model) is None and gated_adapter(model) is None
    code, out, err = setflow("generate", "1 + 2", "--model", other, "--adapter", "tiny")
    assert code == 2 and out == "" and "and this model's weights are others" in err
    assert err.count("error:") == 1 and "Traceback" not in err
    wider = model_folder(mask_token=False, hidden_size=64)
    code, out, err = setflow("generate", "1 + 2", "--model", wider, "--adapter", adapter)
    assert code == 2 and "does not fit this model" in err
    code, out, err = setflow("generate", "1 + 2", "--model", other, "--adapter", "smol")
    assert code == 2 and "adapter must be auto, none, tiny, or a folder with gated_adapter.json, got 'smol'" in err


def test_a_gguf_file_is_generated_from_and_trained_on(setflow, tmp_path):
    pytest.importorskip("gguf", reason="GGUF files need the package gguf: pip install 'setflow[gguf]'")
    from tests.gguf_files import write_gguf

    tokenizer = train_tokenizer(p.prompt + p.solution for p in itertools.islice(additions(0, False), 20))
    model = build("llama-tied", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer)
    code, out, err = setflow("generate", "1 + 2", "--model", file, "--max-new-tokens", "4", "--decoder", "ntp")
    assert code == 0 and out.startswith("1 + 2"), err
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} + {i} = {2 * i}"}) + "\n" for i in range(40)))
    changes = [
        "training.max_steps=1",
        f"model={file}",
        f"data={data}",
        f"output={tmp_path / 'out'}",
        "sequence_length=32",
    ]
    changes += ["held_out=0.2", "measure=null", "training.warmup_steps=0", "training.bf16=false", "tuning.rank=2"]
    finetune(load_recipe("smollm2-gated", [*changes, "training.disable_tqdm=true"]))
    settings = json.loads((tmp_path / "out" / ADAPTER_FILE).read_text())
    assert settings["base_model"] == file and len(settings["base_sample"]) > 10
    arguments = ("--model", str(tmp_path / "out"), "--max-new-tokens", "4", "--compare")
    code, out, err = setflow("generate", "1 + 2", *arguments)
    assert code == 0 and "the same as next-token decoding's" in err, err


def test_an_adapter_is_put_into_the_box_with_its_card(chat_model, adapter, tmp_path, monkeypatch):
    """Small enough, with every figure of its card from the result file, and found there by the weights."""
    build_folder, target, results = tmp_path / "build", tmp_path / "box", tmp_path / "quality.json"
    shutil.copytree(adapter, build_folder / "smollm2-gated")
    (build_folder / "smollm2-gated" / "README.md").write_text("# smollm2-gated\n")
    (build_folder / "smollm2-gated" / "training.json").write_text("{}\n")
    monkeypatch.setattr(adapters, "PACKAGED", {"smollm2": target})
    monkeypatch.setattr(embed, "PACKAGED", adapters.PACKAGED)
    with pytest.raises(ValueError, match="quality.json does not exist; run make smollm2"):
        embed.ship_smollm2(build_folder, results)
    row = {"prompts": "maths-heldout", "decoder": "sbd-lossless", "count": 50, "tokens_per_forward": 1.714}
    found = {"command": "setflow bench quality", "settings": {"batch_size": 8}, "rows": [row]}
    row["acceptance_histogram"] = [1, 2, 1]
    found["conditions"] = {"dtype": "float32", "device": "CPU, 2 threads of 2"}
    results.write_text(json.dumps(found))
    embed.ship_smollm2(build_folder, results)
    card = (target / "README.md").read_text()
    assert card.startswith("# smollm2-gated\n") and "setflow fetch smollm2" in card and "distill-data" in card
    assert "| maths-heldout | `sbd-lossless` | 50 | 1.71 | 1.00 |" in card
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    assert adapters.add_adapter(model) == "smollm2" and gated_adapter(model) is not None
    assert json.loads((target / ADAPTER_FILE).read_text())["base_model"] == "build/smollm2-135m"
    monkeypatch.setattr(embed, "SMOLLM2_BYTES", 100)
    with pytest.raises(ValueError, match="bytes, and the package has room for 100"):
        embed.ship_smollm2(build_folder, results)
