"""Every file of JSON lines that is read here ends a record at a newline alone, and may begin with a byte-order mark."""

import gzip
import json

import pytest

from eval.bench.prompts import prompt_set
from eval.finished import Finished
from eval.tasks.data import read

TEXT = "one\u2028two\u2029three\x85four"


def lines(*records: dict) -> bytes:
    return "".join("\ufeff" + json.dumps(record, ensure_ascii=False) + "\n\n" for record in records).encode()


def test_prompts(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(lines({"text": TEXT}, {"text": "a b c"}))
    assert prompt_set(str(path), tokenizer, 5).ids == [tokenizer(TEXT)["input_ids"][:16]]
    for broken, reason in ((b'{"text": 5}', "a text in the field 'text'"), (b"[1]", "JSON object"), (b"{", "not JSON")):
        path.write_bytes(lines({"text": TEXT}) + broken)
        with pytest.raises(ValueError, match=f"prompts: .*line 3 .*{reason}"):
            prompt_set(str(path), tokenizer, 5)


def test_finished_answers(tmp_path):
    path = tmp_path / "finished.jsonl"
    path.write_bytes(lines({"key": "a", "text": TEXT}, {"key": "b"}) + b'[]\n{"key": "c')
    assert Finished(path).records == {"a": {"key": "a", "text": TEXT}, "b": {"key": "b"}}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_task_data(tmp_path, suffix):
    path = tmp_path / f"test.{suffix}"
    data = lines({"question": TEXT}, {"question": "b"})
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert read(path) == [{"question": TEXT}, {"question": "b"}]
