"""Whatever stands in a recipe or in an override, what is wrong is one sentence, nothing hangs and no code runs."""

import json
import os

import pytest

from finetune import load_recipe
from finetune.recipe_file import MOST_VALUES, read_recipe

PLAIN = {"output": "o", "model": "some/model", "data": ["a.jsonl"], "objective": "ntp", "training": {"max_steps": 1}}
TEN = "[x, x, x, x, x, x, x, x, x, x]"


def bomb(indent: str = "", item: str = "l{}: ") -> str:
    """Aliases of aliases: nine lines that stand for a thousand million values."""
    lines = [f"{indent}{item.format(0)}&l0 {TEN}\n"]
    lines += [f"{indent}{item.format(i)}&l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9)]
    return "".join(lines)


def merges(indent: str = "") -> str:
    """The same of mappings that are merged into each other."""
    lines = [f"{indent}m0: &m0 {{k: v}}\n"]
    lines += [f"{indent}m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 9)]
    return "".join(lines)


TEXTS = {
    "a tag that runs code": ("output: !!python/object/apply:os.putenv [SETFLOW_RECIPE_RAN, '1']\n", "is not YAML"),
    "a tag that names code": ("output: !!python/name:os.system\n", "is not YAML"),
    "a tag of a module": ("output: !!python/module:os\n", "is not YAML"),
    "aliases at the top": (bomb(), f"stands for more than {MOST_VALUES:,} values"),
    "aliases in data": (f"output: o\ndata:\n{bomb('', '- ')}", "stands for more than"),
    "aliases in options": (f"output: o\nobjective_options:\n{bomb('  ')}", "stands for more than"),
    "merges of merges": (merges(), "stands for more than"),
    "merges in options": (f"output: o\nobjective_options:\n{merges('  ')}", "stands for more than"),
    "a list in itself": ("output: &a [*a]\n", "stands for more than"),
    "a mapping in itself": ("&a\noutput: *a\n", "stands for more than"),
    "deep": ("data: " + "[" * 5000, "nested too deeply"),
    "deep and whole": ("data: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "no UTF-8": (b"output: \xe9", "is no UTF-8 text"),
    "bytes": (bytes(range(256)), "is no UTF-8 text"),
    "empty": ("", "must be a mapping of keys"),
    "a list": ("[1]", "must be a mapping of keys"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not YAML"),
    "a list as a key": ("[1]: 2\n", "is not YAML"),
    "a number as a key": ("5: 6\n", "unknown key 5"),
    "a number without end": ("sequence_length: " + "9" * 5000, "is not YAML"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_recipe(tmp_path, name):
    text, message = TEXTS[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(path)
    assert len(str(error.value)) < 1000 and os.environ.get("SETFLOW_RECIPE_RAN") is None


WRONG = [
    *(
        ({key: value}, f"{key} must be a text")
        for key in ("output", "model", "objective")
        for value in (5, ["x"], True)
    ),
    *(({key: value}, f"{key} must be a text") for key in ("tokenizer", "decoder") for value in (5, [], {}, 1.5)),
    *(
        ({key: value}, f"{key} must be true or false")
        for key in ("streaming", "compile")
        for value in ("x", 5, None, [])
    ),
    ({"sequence_length": "x"}, "sequence_length must be a whole number, got 'x'"),
    ({"sequence_length": 1.5}, "sequence_length must be a whole number, got 1.5"),
    ({"sequence_length": True}, "sequence_length must be a whole number, got True"),
    ({"objective_options": 5}, "objective_options must be a mapping"),
    ({"objective_options": []}, "objective_options must be a mapping"),
    ({"training": None}, "training must be a mapping"),
    ({"data": 5}, "data must name files or data sets, got 5"),
    ({"data": [5]}, "data.path must be a text, got 5"),
    ({"data": [{"path": "a.jsonl", "weight": "x"}]}, "data.weight must be a number, got 'x'"),
    ({"data": [{"path": "a.jsonl", "eos": "x"}]}, "data.eos must be true or false, got 'x'"),
    ({"data": [{"path": "a.jsonl", "split": 5}]}, "data.split must be a text, got 5"),
    ({"data": [{"path": "a.jsonl", "name": 5}]}, "data.name must be a text, got 5"),
    ({"tuning": {"kind": "lora", "targets": 5}}, "tuning.targets must be a list of texts, got 5"),
    ({"tuning": {"kind": "lora", "rank": "x"}}, "tuning.rank must be a whole number, got 'x'"),
    ({"tuning": {"kind": "lora", "merge": "x"}}, "tuning.merge must be true or false, got 'x'"),
    ({"measure": {"decoders": [5]}}, r"measure.decoders must be a list of texts, got \[5\]"),
    ({"measure": {"rows": "x"}}, "measure.rows must be a whole number, got 'x'"),
    ({"training": {"max_steps": -2}}, "training.max_steps must be a whole number of at least 1, or -1"),
    ({"training": {"learning_rate": "1e-4"}}, "training.learning_rate must be a number, got '1e-4'"),
    ({"training": {"num_train_epochs": "x"}}, "training.num_train_epochs must be a number, got 'x'"),
    ({"training": {"weight_decay": "x"}}, "training.weight_decay must be a number, got 'x'"),
    ({"training": {"max_grad_norm": "x"}}, "training.max_grad_norm must be a number, got 'x'"),
    ({"training": {"bf16": "x"}}, "training.bf16 must be true or false, got 'x'"),
    ({"training": {"save_steps": "x"}}, "training.save_steps must be a number, got 'x'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change)[:60] for change, _ in WRONG])
def test_values_of_the_wrong_type_are_named(tmp_path, change, message):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(PLAIN | change))
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_a_single_text_stands_for_a_list_of_one(tmp_path):
    path = tmp_path / "r.yaml"
    more = {"held_out": "b.jsonl", "measure": "sbd-lossless", "tuning": {"kind": "lora", "targets": "q_proj"}}
    path.write_text(json.dumps(PLAIN | {"data": "a.jsonl", "objective": "sbd"} | more))
    recipe = load_recipe(path)
    assert [source.path for source in recipe.data] == ["a.jsonl"] and recipe.measure.decoders == ("sbd-lossless",)
    assert recipe.tuning.targets == ("q_proj",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output.x=1", "override 'output.x=1': output is no mapping"),
        ("data.0=x", "override 'data.0=x': data is no mapping"),
        ("training.max_steps=[", r"override 'training.max_steps=\[' is not YAML"),
        ("output=!!python/name:os.system", "override 'output=.*' is not YAML"),
        ("data=" + "[" * 5000, "is nested too deeply"),
        ("data", "an override has the form key=value"),
    ],
)
def test_overrides_that_cannot_be(tmp_path, override, message):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(PLAIN))
    with pytest.raises(ValueError, match=message):
        read_recipe(path, [override])


def test_aliases_within_reason_are_taken(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("output: o\nmodel: some/model\nobjective: ntp\ndata: &files [a.jsonl]\nheld_out: *files\n")
    assert read_recipe(path)["held_out"] == ["a.jsonl"]
