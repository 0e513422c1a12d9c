"""What each kind of tuning leaves is opened by all that open models, also where the vocabulary has no row to spare."""

import copy
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from decoding import decoder_from_spec, load_model
from decoding.forward.mask_token import find_mask_token
from finetune import finetune
from finetune.run import Run
from setflow.cli import main
from tests.conftest import EOS, PAD

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
RESAMPLE = {"sequence_share": 1.0, "window_share": 0.2}
OBJECTIVES = {
    "ntp": ({}, "ntp"),
    "sbd": ({"block_sizes": [4]}, "sbd-lossless:block_size=4"),
    "rpt": (RESAMPLE, "rpt:iterations=1"),
    "sbd+rpt": ({"resample": RESAMPLE, "set_block": {"block_sizes": [4]}}, "sbd:block_size=4,revise=resample"),
}
KINDS = [(kind, objective) for kind in ("full", "lora", "merge") for objective in OBJECTIVES] + [("gated", "sbd")]


@pytest.fixture
def byte_tokenizer():
    """A vocabulary of all bytes, with an end of text and no other special token."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture
def train(recipe, fresh_model, tokenizer, tmp_path, monkeypatch):
    """``train(kind, objective)``: two steps from a model without mask token; the folder, and the trained model itself."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def go(kind, objective, family="llama", tokens=None, spare=0, model=str(tmp_path / "base"), **options):
        if tokens is None:
            tokens = copy.deepcopy(tokenizer)
            tokens.mask_token = None
        base = fresh_model(family, vocab_size=len(tokens) + spare, initializer_range=0.1, eos_token_id=EOS)
        del base.generation_config.mask_token_id
        base.save_pretrained(tmp_path / "base")
        tokens.save_pretrained(tmp_path / "base")
        tuning = {"kind": "lora" if kind == "merge" else kind, "merge": kind == "merge"}
        save, trained = Run._save_weights, []

        def keep(self, *arguments):
            trained.append(copy.deepcopy(self.model).eval() if kind != "gated" else self.model)
            save(self, *arguments)

        monkeypatch.setattr(Run, "_save_weights", keep)
        finetune(
            recipe(
                new_model=None,
                tokenizer=None,
                model=model,
                objective=objective,
                objective_options=OBJECTIVES[objective][0] | options,
                tuning=tuning | ({} if kind == "full" else {"rank": 4}),
                save_dtype="float32",
                decoder=OBJECTIVES[objective][1],
                training={"max_steps": 2, "learning_rate": 0.05},
            )
        )
        return tmp_path / "out" / ("merged" if kind == "merge" else ""), trained[0].eval()

    return go


def generated(model, spec: str):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(PROMPT, pad_token_id=PAD, custom_generate=decoder_from_spec(spec), **settings)


def assert_opens(folder, trained, kind: str, spec: str, capsys) -> None:
    """In Python, on the command line and in an evaluation, with the tokens and the forwards of the model in memory."""
    expected = generated(trained.eval(), spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokens = load_model(str(folder), dtype=torch.float32)
    assert not [str(warning.message) for warning in caught if "are random" in str(warning.message)]
    found = generated(model, model.generation_config.decoder)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.forwards, expected.forwards)
    capsys.readouterr()
    assert main(["generate", tokens.decode(PROMPT[0]), "--model", str(folder), "--max-new-tokens", "4"]) == 0
    from eval.model import SetflowLM

    opened = generated(SetflowLM(str(folder), device="cpu", dtype="float32").model, spec)
    assert torch.equal(opened.sequences, expected.sequences) and torch.equal(opened.forwards, expected.forwards)
    if kind != "gated":  # its base model is one for itself
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(plain(PROMPT).logits, model(PROMPT).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "objective"), KINDS)
def test_every_result_opens(train, capsys, kind, objective):
    folder, trained = train(kind, objective)
    assert_opens(folder, trained, kind, OBJECTIVES[objective][1], capsys)


@pytest.mark.parametrize(
    ("kind", "family"), [("lora", "llama-tied"), ("lora", "qwen3"), ("lora", "mistral"), ("gated", "qwen2")]
)
def test_other_families_do_too(train, capsys, kind, family):
    folder, trained = train(kind, "sbd", family)
    assert_opens(folder, trained, kind, OBJECTIVES["sbd"][1], capsys)


def test_a_row_to_spare_is_found_again(train, capsys):
    """The tokenizer's own new token takes the row behind its last; stock files of the base model do not know of it."""
    folder, trained = train("lora", "sbd", spare=31)
    assert find_mask_token(trained) == 97
    assert_opens(folder, trained, "lora", OBJECTIVES["sbd"][1], capsys)


@pytest.mark.parametrize("kind", ["full", "lora", "merge", "gated"])
def test_bytes_that_no_text_has_stand_for_masks(train, byte_tokenizer, capsys, kind):
    folder, trained = train(kind, "sbd", tokens=byte_tokenizer)
    mask_id = find_mask_token(trained)
    if kind == "full":  # its table is saved, so it may grow
        assert mask_id == len(byte_tokenizer)
    else:
        assert byte_tokenizer.decode([mask_id]) == "\ufffd" and trained.config.vocab_size == len(byte_tokenizer)
        assert all(mask_id not in byte_tokenizer(chr(i))["input_ids"] for i in range(0, 0x3000))
    assert_opens(folder, trained, kind, OBJECTIVES["sbd"][1], capsys)


@pytest.mark.parametrize("kind", ["lora", "gated"])
def test_an_adapter_opens_from_any_directory(train, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    folder, trained = train(kind, "sbd", model="base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_opens(folder, trained, kind, OBJECTIVES["sbd"][1], capsys)


def test_the_mask_token_of_an_adapter_may_be_named(train, capsys):
    folder, trained = train("lora", "sbd", mask_token_id=50)
    assert find_mask_token(load_model(str(folder))[0]) == 50
    assert_opens(folder, trained, "lora", OBJECTIVES["sbd"][1], capsys)
