"""Prompts: every kind of record that training takes, read as training reads it, and each mistake with line and field."""

import json

import pytest

from finetune.data import load_documents
from finetune.distill import distill
from finetune.sources import Source
from tests.finetune.conftest import lines, saying
from tests.finetune.test_documents import ASKING

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "s"}]


@pytest.fixture
def ask(settings, tmp_path):
    """``ask(*records, template=...)``: the records that come back, and the prompts' texts."""

    def run(*records, template: str | None = ASKING) -> tuple[list[dict], list[str]]:
        if template is not None:
            (tmp_path / "model" / "chat_template.jinja").write_text(template)
        chosen, given = settings(*records, samples=len(records), batch_size=len(records)), []

        def generator(prompts, seed):
            given.extend(prompts)
            return saying(5)(prompts, seed)

        distill(chosen, generator)
        return lines(chosen), given

    return run


def test_tools_reach_the_template_and_stay_with_the_record(ask, tokenizer, tmp_path, monkeypatch):
    fields = [
        {"tools": [{"name": "f"}]},
        {"tools": '[{"name": "g"}]', "documents": [{"title": "x"}]},
        {"chat_template_kwargs": {"enable_thinking": False}, "id": 7},
    ]
    back, prompts = ask(*({"messages": TURNS, **more} for more in fields))
    shown = [tokenizer.decode(ids) for ids in prompts]
    assert shown == ["mtfu:qa:r<eos>u:sa:", "mtgdxu:qa:r<eos>u:sa:", "mnu:qa:r<eos>u:sa:"]
    said = {"role": "assistant", "content": tokenizer.decode([5])}
    kept = [
        {"tools": [{"name": "f"}]},
        {"tools": [{"name": "g"}], "documents": [{"title": "x"}]},
        {"enable_thinking": False},
    ]
    assert back == [{"messages": [*TURNS, said], **more, "complete": False} for more in kept]
    monkeypatch.setattr(tokenizer, "chat_template", ASKING, raising=False)
    documents = load_documents([Source(str(tmp_path / "own.jsonl"))], tokenizer)["input_ids"]
    assert [ids[: len(prompt)] for ids, prompt in zip(documents, prompts, strict=True)] == prompts


def test_the_columns_of_alpaca_and_sharegpt(ask, tokenizer):
    records = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "k"},
        {"instruction": "i", "input": "j", "output": "o"},
        {"instruction": "i"},
    ]
    back, prompts = ask(*records)
    assert [tokenizer.decode(ids) for ids in prompts] == ["ms:ku:qa:", "mu:i\n\nja:", "mu:ia:"]
    assert [len(record["messages"]) for record in back] == [3, 2, 2]


def test_alpaca_for_a_model_without_a_chat_template(ask, tokenizer):
    back, prompts = ask({"instruction": "i", "input": "j", "output": "o"}, template=None)
    assert tokenizer.decode(prompts[0]) == "i\n\nj\n\n"
    assert back == [{"prompt": "i\n\nj\n\n", "completion": tokenizer.decode([5]), "complete": False}]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_a_prompt_may_hold_what_looks_like_the_end_of_a_line(ask, settings, tmp_path, end):
    path = tmp_path / "ends.jsonl"
    path.write_text(
        "\ufeff\n" + json.dumps({"prompt": f"once{end}upon"}, ensure_ascii=False) + "\n\n", encoding="utf-8"
    )
    chosen = settings(prompts=str(path), samples=1)
    distill(chosen, saying(5))
    (line,) = (json.loads(line) for line in open(chosen.output, encoding="utf-8", newline="\n"))
    assert line["prompt"] == f"once{end}upon"
    assert distill(chosen, saying(5)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', r"cannot be read: line 3 is not JSON: .*column"),
        (b'{"prompt": "caf\xe9"}', r"cannot be read: line 3 is not UTF-8 \(byte 0xe9"),
        (b'"a"', "line 3 of .* is 'a', but must be an object"),
        (b"{}", "line 3 of .* has neither 'messages' nor 'prompt' nor 'text'"),
        (b'{"prompt": null}', "line 3 of .* has neither"),
        (b'{"prompt": ["a"]}', r"line 3 of .* has .*\(list\) in 'prompt', which must be a text"),
        (b'{"text": 5}', r"line 3 of .* has '5' \(int\) in 'text'"),
        (b'{"text": ""}', "line 3 of .* has a prompt without a token"),
        (b'{"text": "\\ud800"}', "line 3 of .* has half a character"),
        (b'{"messages": 5}', "line 3 of .* has 5 in 'messages', which must be a list"),
        (b'{"messages": [{"content": "q"}]}', r"line 3 of .* has no 'messages\[0\].role'"),
        (b'{"messages": [{"role": "system", "content": "q"}]}', "line 3 of .* has no turn of the role 'user'"),
        (b'{"messages": [{"role": "user", "content": "q"}], "tools": 4}', "line 3 of .* has 4 in 'tools'"),
        (b'{"conversations": [{"from": "me", "value": "q"}]}', r"line 3 of .* has 'me' in 'conversations\[0\].from'"),
    ],
)
def test_a_bad_prompt_is_named_by_file_line_and_field(settings, tmp_path, line, message):
    (tmp_path / "model" / "chat_template.jinja").write_text(ASKING)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"^prompts: .*{message}"):
        distill(settings(prompts=str(path), samples=2), saying(5))


def test_messages_without_a_chat_template_are_named(settings):
    with pytest.raises(ValueError, match="line 1 of .* has 'messages', which need a tokenizer with a chat template"):
        distill(settings({"messages": TURNS}, samples=1), saying(5))
