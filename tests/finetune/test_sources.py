"""Files that are missing, empty, in another encoding or of another format: read, or named at once and in one sentence."""

import pytest
from datasets import Dataset

from finetune import load_recipe
from finetune.data import load_documents, stream_documents
from finetune.recipe import Recipe
from finetune.sources import Source

READERS = {
    "whole": load_documents,
    "streamed": lambda sources, tokenizer: list(stream_documents(sources, tokenizer, 0)),
}


@pytest.fixture(params=READERS)
def texts(request, tokenizer, tmp_path, monkeypatch):
    """``texts(name)``: what the documents of a file in the present folder say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the hub"))

    def read(name: str) -> list[str]:
        documents = READERS[request.param]([Source(name)], tokenizer)
        return sorted(tokenizer.decode(document["input_ids"], skip_special_tokens=True) for document in documents)

    return read


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", BOM + b'{"text": "ab"}\n\n{"text": "c"}', ["ab", "c"]),
        ("a.jsonl", '{"text": "a", "note": "\u2028\u2029\x85"}\n{"text": "b"}\n'.encode(), ["a", "b"]),
        ("a.jsonl", b'{"text": "a", "n": 1}\r\n{"text": "b", "n": {"x": []}}\r\n', ["a", "b"]),  # no schema is guessed
        ("A.JSONL", b'{"text": "ab"}', ["ab"]),
        ("a.json", BOM + b'[{"text": "ab"},\n {"text": "c"}]', ["ab", "c"]),
        ("a.json", BOM + b'{"text": "ab"}\n\n{"text": "c"}\n', ["ab", "c"]),
        ("a.json", b'{\n "text": "ab"\n}', ["ab"]),
        ("a.txt", BOM + b"a\r\nb", ["a\nb"]),
    ],
)
def test_marks_blank_lines_and_both_forms_of_json_are_read(texts, tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert texts(name) == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "'a.jsonl' holds no record"),
        ("a.jsonl", BOM + b"\n \n", "'a.jsonl' holds no record"),
        ("a.json", b"", "'a.json' holds no record"),
        ("a.json", b"[]", "'a.json' holds no record"),
        ("a.txt", b"\n", "'a.txt' holds no record"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            "'a.jsonl' cannot be read: line 2 is not UTF-8 .byte 0xe9",
        ),
        ("a.json", b'[{"text": "caf\xe9"}]', "'a.json' cannot be read: it is not UTF-8 .byte 0xe9 at place 15"),
        ("a.txt", b"a\ncaf\xe9", "'a.txt' cannot be read: line 2 is not UTF-8 .byte 0xe9"),
        ("a.txt", "word".encode("utf-16"), "'a.txt' cannot be read: line 1 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "'a.jsonl' cannot be read: line 2 is not JSON: Expecting value"),
        ("a.json", b'[\n{"text": "a"},\n', "'a.json' cannot be read: it is not JSON: .* line 3, column 1"),
        ("a.json", b'{"text": "a"}\n{"text"\n', "'a.json' cannot be read: line 2 is not JSON"),
        ("a.parquet", b"PAR1 no parquet", "'a.parquet' cannot be read: "),
        ("a.parquet", b"", "'a.parquet' cannot be read: "),
        ("a.csv", b"text\na\n", "'a.csv' must end in one of .jsonl, .json, .parquet, .txt"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(texts, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^data: {message}"):
        texts(name)


@pytest.mark.parametrize(
    "name",
    [
        "no.jsonl",
        "no.txt",
        "no.csv",
        "folder/no",
        "./no",
        "~/no",
        "/no",
        "some/deep/name",
        "own/no.parquet",
        "no.tar.gz",
    ],
)
def test_a_missing_file_is_named_without_asking_the_hub(texts, tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"^data: the file '{name}' does not exist"):
        texts(name)


def test_a_folder_is_named(texts, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="^data: 'folder.jsonl' is a folder; name files that end in"):
        texts("folder.jsonl")


def test_a_whole_table_is_read(texts, tmp_path):
    rows = [{"text": str(i), "n": i} for i in range(2500)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert texts("a.parquet") == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("key", ["data", "held_out"])
@pytest.mark.parametrize(("value", "path"), [("texts.jsonl", "texts.jsonl"), ("{path: b.txt, weight: 2}", "b.txt")])
def test_one_source_needs_no_list(recipe_path, key, value, path):
    """``data=nofile.jsonl`` on a command line is not a list of letters."""
    chosen = load_recipe(recipe_path(), [f"{key}={value}"])
    (source,) = chosen.data if key == "data" else chosen.held_out_sources
    assert source.path == path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((), r"data must name files or data sets, got \(\)"),
        (5, "data must name files or data sets, got 5"),
        (None, "data must name files or data sets, got None"),
        ((3,), "data.path must be a text, got 3"),
        (("",), "data.path must be a file .*, got ''"),
        (({"weight": 2},), "data: .*'path'"),
        (({"path": "a.jsonl", "weight": float("inf")},), "data.weight must be a number in .*, got inf"),
        (({"path": "a.jsonl", "weigth": 2},), "'data.weigth', did you mean 'weight'"),
    ],
)
def test_sources_that_make_no_sense_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({"output": "out", "data": data, "objective": "ntp", "model": "m"})
