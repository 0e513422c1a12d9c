"""No code that lies in a model's folder runs without --trust-remote-code, whatever stands on standard input."""

import builtins
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from decoding import load_model
from decoding.forward.adapter import GatedAdapter
from setflow.loading import default_spec

RAN = "from pathlib import Path\n(Path(__file__).parent / 'ran').touch(); open({marker!r}, 'w').close()\n"
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = {kind!r}
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
GENERATE = """
def generate(model, inputs=None, **kwargs):
    return model.generate(inputs, **kwargs)
"""
DECODER = """
from dataclasses import dataclass
from decoding import NextTokenDecoder
@dataclass(frozen=True)
class EvilDecoder(NextTokenDecoder):
    pass
"""
KINDS = ["model", "known model", "tokenizer", "custom_generate", "base of a gated adapter", "base of a peft adapter"]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def evil(tiny, tmp_path):
    """``evil(kind)``: a folder with code in it, and the file that this code makes when it runs."""

    def make(kind: str) -> tuple[str, Path]:
        folder, marker = tmp_path / "evil", tmp_path / "marker"
        shutil.copytree(tiny, folder)
        ran = RAN.format(marker=str(marker))
        if kind == "tokenizer":
            (folder / "code.py").write_text(ran + TOKENIZER)
            edit(
                folder / "tokenizer_config.json",
                auto_map={"AutoTokenizer": [None, "code.EvilTokenizer"]},
                tokenizer_class="EvilTokenizer",
            )
        elif kind == "custom_generate":
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(ran + GENERATE)
        else:
            known = "llama" if kind == "known model" else "evil"
            (folder / "code.py").write_text(ran + MODEL.format(kind=known))
            auto = {"AutoConfig": "code.EvilConfig", "AutoModelForCausalLM": "code.EvilModel"}
            edit(folder / "config.json", auto_map=auto, model_type=known)
        if kind.startswith("base"):
            adapter, model = tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tiny)
            if "gated" in kind:
                made = GatedAdapter(model, 2, 4)
                model.generation_config.mask_token_id = 3
                made.save(model, adapter)
                edit(adapter / "gated_adapter.json", base_model=str(folder))
            else:
                peft = pytest.importorskip("peft", reason="needs peft: install the extra [train]")
                peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
                edit(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
            for file in Path(tiny).glob("*token*"):
                shutil.copy(file, adapter)
            return str(adapter), marker
        return str(folder), marker

    return make


@pytest.fixture(autouse=True)
def no_consent(monkeypatch, tmp_path):
    """Standard input says yes to everything, and nobody may ask."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))

    def asked(prompt=""):
        raise AssertionError(f"standard input was asked: {prompt}")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *itertools.product(["generate", "load_model"], KINDS),
        *itertools.product(["eval", "finetune", "estimate", "distill-data"], ["model", "tokenizer"]),
    ],
)
def test_nothing_runs_without_consent(setflow, evil, tmp_path, command, kind):
    for extra in ("lm_eval", "peft"):
        pytest.importorskip(extra, reason=f"needs {extra}: install the extras [eval] and [train]")
    folder, marker = evil(kind)
    harmless = kind in ("known model", "custom_generate")  # transformers' own code is used, that of the folder is not
    if command == "load_model":
        try:
            load_model(folder)
        except ValueError as error:
            assert not harmless and "comes with code of its own, which runs only with your consent" in str(error)
        else:
            assert harmless or kind == "tokenizer"
        assert not marker.exists()
        return
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "1 + 1 = 2"}\n' * 30)
    recipe = {"output": str(tmp_path / "out"), "model": folder, "data": [str(data)], "objective": "ntp"}
    recipe |= {"sequence_length": 16, "training": {"max_steps": 1, "use_cpu": True}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = {
        "generate": ["generate", "-", "--model", folder, "--max-new-tokens", "2"],
        "eval": ["eval", "--model", folder, "--tasks", "additions", "--limit", "1", "--max-gen-toks", "2"],
        "finetune": ["finetune", str(tmp_path / "recipe.yaml")],
        "estimate": ["finetune", "--estimate", str(tmp_path / "recipe.yaml")],
        "distill-data": ["finetune", "distill-data", folder, str(tmp_path / "own.jsonl"), "--samples", "1"],
    }[command]
    code, out, err = setflow(*arguments)
    assert not marker.exists() and "Traceback" not in err
    if harmless:
        assert code == 0 or command == "eval", err  # the context is too short for the task's answers
    elif command == "estimate":
        assert code == 2 or kind == "tokenizer" or kind.startswith("base")
    else:
        assert code == 2 and err.count("error: ") == 1, (code, err)


@pytest.mark.parametrize("kind", ["model", "custom_generate", "base of a gated adapter"])
def test_with_consent_it_runs(setflow, evil, kind):
    folder, marker = evil(kind)
    code, _, err = setflow(
        "generate", "1 + 1", "--model", folder, "--trust-remote-code", "--max-new-tokens", "2", "--decoder", "ntp"
    )
    assert code == 0 and marker.exists(), err


@pytest.mark.parametrize(
    "spec", ["code:EvilDecoder", "sbd:rule=code:EvilDecoder", "sbd-lossless:draft=code:EvilDecoder"]
)
def test_a_default_decoder_names_no_code(setflow, tiny, tmp_path, monkeypatch, spec):
    """Also where the model's folder is the working folder, from which Python imports."""
    folder, marker = tmp_path / "evil", tmp_path / "marker"
    shutil.copytree(tiny, folder)
    (folder / "code.py").write_text(RAN.format(marker=str(marker)) + DECODER)
    edit(folder / "generation_config.json", decoder=spec, _from_model_config=False)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "code", raising=False)
    code, _, err = setflow("generate", "x", "--model", str(folder), "--max-new-tokens", "2")
    assert code == 2 and "names code by its default decoder" in err and not marker.exists()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert default_spec(model, trusted=True) == spec


def test_a_default_decoder_of_ours_is_taken(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for spec in ("ntp", "sbd:block_size=4,entropy_bound=0.1", "prompt-lookup"):
        model.generation_config.decoder = spec
        assert default_spec(model) == spec
