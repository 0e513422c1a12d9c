"""``setflow chat``: turns, commands, and a cache that is kept between turns."""

import builtins
from pathlib import Path

import pytest

import setflow.run
from decoding import SlotCache


@pytest.fixture
def talk(setflow, tiny, monkeypatch):
    """``talk("a", KeyboardInterrupt, "/exit")`` types these lines, or raises; gives what ``setflow`` gives."""

    def type_lines(*lines, arguments=("--decoder", "ntp", "--max-new-tokens", "5")):
        script = iter(lines)

        def read(prompt=""):
            line = next(script, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", read)
        return setflow("chat", "--model", tiny, *arguments)

    return type_lines


@pytest.fixture
def calls(monkeypatch):
    """Every call of ``run``: number of prompt tokens, cache, tokens that were in it before."""
    seen = []
    original = setflow.run.run

    def run(model, tokenizer, prompt, decoder, settings, view=None, cache=None):
        seen.append((len(prompt), cache, cache.get_seq_length()))
        return original(model, tokenizer, prompt, decoder, settings, view, cache)

    monkeypatch.setattr(setflow.run, "run", run)
    return seen


def test_turns_share_a_cache_and_reset_drops_it(talk, calls):
    code, out, err = talk("1 + 1 = ?", "2 + 2 = ?", "/reset", "1 + 1 = ?")
    assert code == 0 and len(calls) == 3
    (first, cache, empty), (second, again, held), (third, new, none) = calls
    assert isinstance(cache, SlotCache) and cache is again and new is not cache
    assert empty == none == 0 and held >= first and second > first and third == first
    assert err.count("tokens per forward") == 3 and "new conversation" in err


def test_commands_and_empty_lines(talk, calls):
    code, out, err = talk("", "  ", "/what", "/exit", "1 + 1 = ?")
    assert code == 0 and not calls and out == ""
    assert "unknown command '/what'" in err


def test_ctrl_c_at_the_prompt_and_in_an_answer_does_not_end_the_session(talk, monkeypatch):
    answers = []
    original = setflow.run.run

    def run(*arguments):
        if not answers:
            answers.append("stopped")
            arguments[5].put(arguments[5].tokenizer("", return_tensors="pt")["input_ids"])  # the prompt
            arguments[5].put(arguments[5].tokenizer("12", return_tensors="pt")["input_ids"])
            raise KeyboardInterrupt
        answers.append(arguments[1].decode(arguments[2]))
        return original(*arguments)

    monkeypatch.setattr(setflow.run, "run", run)
    code, out, err = talk(KeyboardInterrupt, "1 + 1 = ?", "2 + 2 = ?")
    assert code == 0 and "[stopped]" in err and out.startswith("12\n")
    assert "12<|eos|>2 + 2 = ?" in answers[1]  # what was said before the stop belongs to the conversation


def test_a_conversation_that_outgrows_the_context_says_so_and_goes_on(talk):
    code, out, err = talk("1 " * 60, "1 + 1 = ?", arguments=("--decoder", "ntp"))
    assert code == 0 and "error: the prompt is too long" in err and "/reset" in err
    assert err.count("tokens per forward") == 1


def test_a_tokenizer_without_template_is_refused(setflow, model_folder):
    folder = Path(model_folder())
    (folder / "chat_template.jinja").unlink()
    code, _, err = setflow("chat", "--model", str(folder))
    assert code == 2 and "has no chat template; use setflow generate" in err
