"""JSON lines: one record per newline, and each fault with its file and line in one sentence."""

import gzip
import json

import pytest

from decoding.inputs.jsonl import read_jsonl

# What str.splitlines takes for line ends besides "\n"; JSON lets all of them but the last four stand in a text as they are.
ENDS = ["\u2028", "\u2029", "\x85", "\r", "\x0b", "\x0c", "\x1c"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_record_ends_at_a_newline_and_nowhere_else(tmp_path, end, suffix):
    records = [{"text": f"a{end}b"}, {"text": "c"}]
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert list(read_jsonl("data", path)) == [(1, records[0]), (2, records[1])]


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (b'\xef\xbb\xbf{"a": 1}\n{"a": 1}\n', [1, 2]),
        (b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 1}\n', [1, 2]),  # of two files by cat
        (b'\n{"a": 1}\n \t\n\n{"a": 1}', [2, 5]),
        (b'{"a": 1}\r\n\r\n{"a":\r1}\r\n', [1, 3]),
        (b"\xef\xbb\xbf\n", []),
        (b"", []),
    ],
)
def test_marks_and_blank_lines_are_passed_over(tmp_path, data, numbers):
    (tmp_path / "data.jsonl").write_bytes(data)
    assert list(read_jsonl("data", tmp_path / "data.jsonl")) == [(number, {"a": 1}) for number in numbers]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "line 3 is not JSON: Expecting value at column"),
        (b'{"a": 1} {"a": 2}', "line 3 is not JSON: Extra data"),
        (b'{"a": "caf\xe9"}', "line 3 is not UTF-8 .byte 0xe9 at place 11"),
        ('{"a": 1}'.encode("utf-16"), "line 3 is not UTF-8"),
        (b"\0\0\0\0", "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON .*nested"),
        (b"9" * 5000, "line 3 is not JSON .*digits"),
    ],
)
def test_a_broken_line_is_named_or_passed_over(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1\n\n" + line + b"\n2\n")
    with pytest.raises(ValueError, match=f"^prompts: '.*data.jsonl' cannot be read: {reason}"):
        list(read_jsonl("prompts", path))
    assert [value for _, value in read_jsonl("prompts", path, skip_broken=True)] == [1, 2]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="prompts: the file '.*none.jsonl' does not exist"):
        list(read_jsonl("prompts", tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="prompts: .* cannot be read: Is a directory"):
        list(read_jsonl("prompts", tmp_path))
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for name, data in (("cut", whole[:-20]), ("plain", b'{"a": 1}\n'), ("bad", whole[:12] + b"\xff" * 9 + whole[21:])):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"data: '.*{name}.jsonl.gz' cannot be read: "):
            list(read_jsonl("data", path))
