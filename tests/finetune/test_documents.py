"""What a record may look like, what it becomes, and how a record that is wrong is told."""

import json

import pytest
from datasets import Dataset

from finetune.chat import template_variables
from finetune.data import load_documents, stream_documents
from finetune.sources import Source
from tests.finetune.test_data import learned

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "r"}
TURNS = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
# What the template takes besides the messages, as the templates of Qwen3, Llama 3.1 and Command R do.
ASKING = (
    "{% if not mood is defined %}{% set mood = 'm' %}{% endif %}{{ mood }}"
    "{% if tools %}t{% for t in tools %}{{ t['name'] }}{% endfor %}{% endif %}"
    "{% if documents %}d{% for d in documents %}{{ d.title }}{% endfor %}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}n{% endif %}" + TURNS
)


@pytest.fixture
def template(tokenizer, monkeypatch):
    """``template(text)``: the tokenizer with this chat template."""

    def use(text):
        monkeypatch.setattr(tokenizer, "chat_template", text, raising=False)
        return tokenizer

    return use


@pytest.fixture
def source(tmp_path):
    """``source(*records, suffix=".jsonl")``: a file of these records."""

    def write(*records, suffix: str = ".jsonl") -> Source:
        path = tmp_path / f"data{suffix}"
        if suffix == ".parquet":
            columns = {name: None for record in records for name in record}
            Dataset.from_list([columns | record for record in records]).to_parquet(str(path))
        elif suffix == ".json":
            path.write_text(json.dumps(records))
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return Source(str(path))

    return write


def texts(source: Source, tokenizer, streaming: bool = False) -> list[str]:
    documents = stream_documents([source], tokenizer, 0) if streaming else load_documents([source], tokenizer)
    return [tokenizer.decode(document["input_ids"]) for document in documents]


# Arguments of the template


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"tools": [{"name": "f"}, {"name": "g"}]}, "mtfg"),
        ({"tools": '[{"name": "f"}]'}, "mtf"),
        ({"documents": [{"title": "x"}]}, "mdx"),
        ({"enable_thinking": False}, "mn"),
        ({"chat_template_kwargs": {"enable_thinking": False, "mood": "k"}}, "kn"),
        ({"chat_template_kwargs": {"tools": [{"name": "f"}]}}, "mtf"),
        ({"mood": "h", "tools": [{"name": "f"}], "documents": [{"title": "x"}]}, "htfdx"),
        ({"source": "web", "role": "r", "m": "x"}, "m"),  # names that the template uses inside only
        ({"tools": None, "documents": None}, "m"),
        ({"tools": ""}, "m"),
    ],
)
def test_what_the_template_asks_for_reaches_it(template, source, suffix, streaming, fields, shown):
    record = {"messages": [QUESTION, ANSWER], **fields}
    assert texts(source(record, suffix=suffix), template(ASKING), streaming) == [f"{shown}u:qa:r<eos>"]


def test_a_template_for_tools_is_taken_where_there_are_some(template, source):
    tokenizer = template({"default": TURNS, "tool_use": ASKING})
    records = {"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]}, {"messages": [QUESTION, ANSWER]}
    assert texts(source(*records), tokenizer) == ["mtfu:qa:r<eos>", "u:qa:r<eos>"]


def test_fields_of_other_messages_do_not_reach_the_template(template, source):
    """Tables fill the fields that only some messages have with null."""
    shows = "{% for m in messages %}{{ m.content }}{% if m.name is defined %}N{{ m.name }}{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "q", "name": "b"}, ANSWER]
    for suffix in (".jsonl", ".parquet"):
        assert texts(source({"messages": messages}, suffix=suffix), template(shows)) == ["qNbr"]


def test_the_names_that_a_template_takes_from_outside():
    assert template_variables("{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{{ a }}") == {
        "tools",
        "a",
    }
    assert template_variables("{% for m in messages %}{% if m.x %}{% break %}{% endif %}{% endfor %}") == {"messages"}
    assert template_variables("{%- generation -%}{{ a }}{% endgeneration %}{% macro f(b) %}{{ b }}{% endmacro %}") == {
        "a"
    }


# Common columns


def test_sharegpt(template, source):
    turns = [("human", "q"), ("gpt", "r"), ("observation", "o"), ("gpt", "s")]
    records = [
        {"conversations": [{"from": who, "value": text} for who, text in turns], "system": "k"},
        {"conversations": [QUESTION, ANSWER]},
        {
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "r"}],
            "tools": '[{"name": "f"}]',
        },
    ]
    documents = load_documents([source(*records)], template(ASKING))
    shown = [template(ASKING).decode(ids) for ids in documents["input_ids"]]
    assert shown == ["ms:ku:qa:r<eos>t:oa:s<eos>", "mu:qa:r<eos>", "mtfu:qa:r<eos>"]
    assert learned(documents[0], template(ASKING)) == "r<eos>s<eos>"


ALPACA = [
    {"instruction": "i", "input": "j", "output": "o", "text": "all of it"},
    {"instruction": "i", "input": "", "output": "o"},
    {"instruction": "i", "output": "o", "system": "k"},
]


def test_alpaca_with_a_chat_template(template, source):
    documents = load_documents([source(*ALPACA)], template(TURNS))
    shown = [template(TURNS).decode(ids) for ids in documents["input_ids"]]
    assert shown == ["u:i\n\nja:o<eos>", "u:ia:o<eos>", "s:ku:ia:o<eos>"]
    assert [learned(document, template(TURNS)) for document in documents] == ["o<eos>"] * 3


def test_alpaca_without_a_chat_template(tokenizer, source):
    documents = load_documents([source(*ALPACA)], tokenizer)
    shown = [tokenizer.decode(ids) for ids in documents["input_ids"]]
    assert shown == ["i\n\nj\n\no<eos>", "i\n\no<eos>", "k\n\ni\n\no<eos>"]
    assert [learned(document, tokenizer) for document in documents] == ["o<eos>"] * 3


def test_kinds_may_be_mixed(template, source):
    records = {"text": "a"}, {"prompt": "b", "completion": "c"}, {"messages": [QUESTION, ANSWER]}
    for suffix in (".jsonl", ".json", ".parquet"):
        assert texts(source(*records, suffix=suffix), template(TURNS)) == ["a<eos>", "bc<eos>", "u:qa:r<eos>"]


# Mistakes

ALTERNATING = (
    "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.role[0] }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1, 2], "is '.1, 2.', but must be an object"),
        ("text", "is 'text', but must be an object"),
        (None, "is 'None', but must be an object"),
        ({"messages": None}, "has no 'messages'"),
        ({"messages": []}, r"has \[\] in 'messages', which must be a list of turns"),
        ({"messages": {"role": "user"}}, "has .* in 'messages', which must be a list of turns"),
        ({"messages": ["q", "r"]}, r"has 'q' in 'messages\[0\]', which must be an object"),
        ({"messages": [QUESTION, None]}, r"has nothing in 'messages\[1\]'"),
        ({"messages": [{"content": "q"}, ANSWER]}, r"has no 'messages\[0\].role'"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, r"has no 'messages\[1\].content'"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, r"has no 'messages\[1\].content'"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 5}]}, r"has 5 in 'messages\[1\].content'"),
        ({"messages": [{"role": 3, "content": "q"}, ANSWER]}, r"has 3 in 'messages\[0\].role'"),
        ({"messages": [QUESTION]}, "has no turn of the role 'assistant' in 'messages'"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]},
            r"has half a character \('.ud800'\) in 'messages'",
        ),
        ({"messages": [ANSWER, QUESTION]}, "has a turn of the role 'assistant' at the start of 'messages'"),
        (
            {"messages": [QUESTION, QUESTION, ANSWER]},
            "has 'messages' that the chat template refuses: Roles must alternate",
        ),
        (
            {"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]},
            "has 'tools', which the chat template does not ask for",
        ),
        (
            {"messages": [QUESTION, ANSWER], "tools": {"name": "f"}},
            "has .* in 'tools', which must be a list of objects",
        ),
        ({"messages": [QUESTION, ANSWER], "tools": "[{"}, "has a text in 'tools' that is not JSON"),
        (
            {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"tokenize": True}},
            "has 'tokenize', which the chat",
        ),
        ({"messages": [QUESTION, ANSWER], "chat_template_kwargs": 3}, "has 3 in 'chat_template_kwargs'"),
        ({"conversations": "hi"}, "has 'hi' in 'conversations', which must be a list"),
        ({"conversations": [{"from": "human"}]}, r"has nothing in 'conversations\[0\].value'"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            r"has 'bot' in 'conversations\[0\].from', .* one of human, gpt",
        ),
        ({"conversations": ["x"]}, r"has 'x' in 'conversations\[0\]'"),
        ({"prompt": "a", "completion": None}, "has no 'completion'"),
        ({"prompt": ["a"], "completion": "b"}, r"has .*\(list\) in 'prompt', which must be a text"),
        ({"instruction": 4, "output": "b"}, r"has '4' \(int\) in 'instruction'"),
        ({"instruction": "a", "output": None}, "has no 'output'"),
        ({"text": 1.5}, r"has '1.5' \(float\) in 'text'"),
        ({"text": "a\udc00"}, "has half a character .* in 'text'"),
        ({"txt": "a"}, "has no 'text'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_record_is_named_by_file_line_and_field(template, tmp_path, record, message, streaming):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n\n' + json.dumps(record) + "\n")
    documents = stream_documents if streaming else load_documents
    with pytest.raises(ValueError, match=f"^data: line 3, record 2 of '.*bad.jsonl' {message}"):
        list(documents([Source(str(path))], template(ALTERNATING), 0))


def test_broken_templates_are_named(template, source):
    record = source({"messages": [QUESTION, ANSWER]})
    for text, message in (
        ("{% if %}", "the chat template is broken"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses: can only concatenate str"),
        ("{{ messages[9].content }}", "the chat template refuses: .*has no element 9"),
        ("x{{ messages | length }}", r"has 'messages\[1\]', which the chat template does not put right behind"),
    ):
        with pytest.raises(ValueError, match=f"^data: line 1, record 1 of .*{message}"):
            load_documents([record], template(text))


def test_a_conversation_cut_off_in_a_call_of_tools_keeps_its_end(template, source):
    """There is no text behind which it could be cut."""
    call = {"role": "assistant", "tool_calls": [{"name": "f"}], "content": None}
    shows = "{% for m in messages %}{{ m.content or 'c' }}{% endfor %}"
    record = {"messages": [QUESTION, call], "complete": False}
    assert texts(source(record), template(shows)) == ["qc"]
