"""Nothing that a model or a user writes is obeyed by a terminal or breaks a picture; what Ctrl-C stops is kept."""

import builtins
import json
import random
import re
from xml.dom import minidom

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import setflow.run as running
from setflow.run import Run
from setflow.text import OBEYED, coloured, split_text, visible
from setflow.trace import trace_lines, trace_svg

# An escape sequence, a title of the window, a bell, overwriting, right-to-left override and isolate, a C1 control.
EVIL = "a\x1b[31mb\x1b]0;t\x07c\rd\x08e\u202ef\u2066g\x9bh\x7fi\u200fj\u2028k"
GOOD = "tab\t, lines\nand\r\n, \N{FAMILY}\u200d\N{GIRL}, naïve, \N{HEBREW LETTER ALEF}"


def test_what_is_obeyed_is_written_and_what_is_shown_is_left():
    shown = visible(EVIL)
    assert not OBEYED.search(shown) and all(letter in shown for letter in "abcdefghijk")
    assert "\\x1b[31m" in shown and "\\u202e" in shown and "\\x9b" in shown and "c\\rd" in shown
    assert visible(GOOD) == GOOD
    assert coloured(EVIL, [(EVIL, 1), (GOOD, None)]).plain == visible(EVIL) * 2 + GOOD.replace(
        "\r", ""
    )  # as rich has it


@pytest.fixture
def says(monkeypatch, tiny):
    """``says(text)``: whatever runs gives the tokens of this text, one forward each."""

    def make(text: str) -> None:
        def run(model, tokenizer, prompt, decoder, settings, view=None, cache=None):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            return Run(tokens, text, len(tokens), 0, 1.0, list(range(1, len(tokens) + 1)))

        monkeypatch.setattr(running, "run", run)

    return make


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal


def without_styles(text: str) -> str:
    """What rich itself writes is colours and movements of the cursor, none of which a text brought."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.replace("\r", ""))


@pytest.mark.parametrize("command", [["generate", EVIL], ["generate", EVIL, "--no-live"], ["eval", "trace", EVIL]])
def test_generate_and_trace_on_a_terminal(setflow, says, terminal, tiny, command, tmp_path):
    says(EVIL)
    if command[0] == "eval":
        command = [*command, "--out", str(tmp_path / "t.svg"), "--width", "60"]
    code, out, err = setflow(*command, "--model", tiny)
    assert code == 0 and "\\u202e" in out and "\\x1b" in out
    assert not OBEYED.search(without_styles(out)) and not OBEYED.search(without_styles(err))
    if command[0] == "eval":
        minidom.parse(str(tmp_path / "t.svg"))


def test_json_on_a_terminal_and_plain_text_in_a_pipe(setflow, says, tiny, monkeypatch):
    says(EVIL)
    assert (
        setflow("generate", "x", "--model", tiny)[1] == "x" + EVIL + "\n"
    )  # whoever reads a pipe gets the text itself
    assert "\u202e" in setflow("generate", "x", "--model", tiny, "--json")[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, _ = setflow("generate", "x", "--model", tiny, "--json")
    assert code == 0 and json.loads(without_styles(out).splitlines()[-1])["text"] == EVIL
    assert not OBEYED.search(without_styles(out))


def test_chat_on_a_terminal(setflow, says, terminal, tiny, monkeypatch):
    says(EVIL)
    lines = iter(["hello", "/\x1b[31m"])

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    code, out, err = setflow("chat", "--model", tiny)
    assert code == 0 and "\\u202e" in out
    assert not OBEYED.search(without_styles(out)) and not OBEYED.search(without_styles(err))


def test_messages_show_control_characters(setflow):
    code, _, err = setflow("generate", "x", "--model", "no\u202e\x9b/such/folder")
    assert code == 2 and not OBEYED.search(err)


@pytest.mark.parametrize("text", [EVIL, "\x00\x01", "\ufffe\uffff", "]]>&<\x0c\"'", GOOD])
def test_pictures_are_xml(text):
    lines = list(trace_lines([text, "b", text], [1, 2, 1], 40))
    picture = minidom.parseString(trace_svg(text, lines, 40).encode())
    assert picture.documentElement.tagName == "svg"


@pytest.mark.parametrize("terminals", [False, True])
@pytest.mark.parametrize("more", [[], ["--no-live"], ["--json"]])
def test_what_was_said_before_ctrl_c_stays(setflow, tiny, monkeypatch, terminals, more):
    if terminals:
        monkeypatch.setenv("FORCE_COLOR", "1")
    told = AutoTokenizer.from_pretrained(tiny)("1 + 1 = 2", return_tensors="pt", add_special_tokens=False)["input_ids"]

    def run(model, tokenizer, prompt, decoder, settings, view=None, cache=None):
        view.put(told[:, :1])  # the prompt
        view.put(told)
        view.put_draft(told[:, :2])
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run", run)
    code, out, err = setflow("generate", "3 + ", "--model", tiny, *more)
    assert code == 130 and "[stopped]" in err and "Traceback" not in err
    if "--json" in more:
        assert "1" not in without_styles(out)
    else:
        last = without_styles(out).strip().splitlines()[-1].strip()
        assert last == "3 + 1 + 1 = 2"  # the draft was not said


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: what has no token of its own is written in bytes, and the space before a text is dropped."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "ab",
        "é",
    ]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["byte fallback", "byte level", "pieces"])
def test_pieces_add_up_to_the_tokenizers_own_text(kind, tiny, tokenizer):
    """For any tokens, also those of half a character at the end, of bytes that are none, and of special tokens."""
    tokenizers = {"byte fallback": byte_fallback_tokenizer, "byte level": lambda: AutoTokenizer.from_pretrained(tiny)}
    chosen = tokenizers[kind]() if kind in tokenizers else tokenizer
    draw = random.Random(0)
    cases = [[draw.randrange(len(chosen)) for _ in range(draw.randrange(1, 30))] for _ in range(400)]
    cases += [
        chosen(text, add_special_tokens=False)["input_ids"] for text in ("é", "\N{SNOWMAN}\N{GRINNING FACE}", " a")
    ]
    cases += [case[:-1] for case in cases if len(case) > 1] + [[]]
    for case in cases:
        pieces = split_text(chosen, case)
        assert "".join(pieces) == chosen.decode(case, skip_special_tokens=True) and len(pieces) == len(case)
