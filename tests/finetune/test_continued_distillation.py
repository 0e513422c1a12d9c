"""Self-distillation that stops and goes on: at any byte, in any batch, by one run at a time, never of other settings."""

import errno
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.continued import locked, settings_file, whole_records
from finetune.distill import Distillation, distill
from tests.finetune.conftest import lines, saying

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing says with which settings")


def drawing(prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Texts that depend on the seed and the place in the batch, as sampled ones do."""
    return [[5 + seed % 40, 5 + place] for place in range(len(prompts))]


@pytest.fixture
def whole(settings):
    """Nine texts in batches of four."""
    chosen = settings(samples=9, batch_size=4)
    distill(chosen, drawing)
    return chosen


def cut(chosen: Distillation, data: bytes, name: str) -> Distillation:
    """The same run that left ``data`` in its file."""
    other = replace(chosen, output=str(Path(chosen.output).with_name(name)))
    Path(other.output).write_bytes(data)
    settings_file(Path(other.output)).write_bytes(settings_file(Path(chosen.output)).read_bytes())
    return other


def test_a_run_goes_on_from_every_number_of_lines(whole):
    data = Path(whole.output).read_bytes().splitlines(keepends=True)
    for count in range(10):
        other, told = cut(whole, b"".join(data[:count]), f"{count}.jsonl"), []
        assert distill(other, drawing, told.append) == count
        assert lines(other) == lines(whole) and sum(told) == 9


def test_a_run_goes_on_from_every_byte_of_a_line(whole):
    data = Path(whole.output).read_bytes()
    second, third = data.index(b"\n") + 1, data.index(b"\n", data.index(b"\n") + 1) + 1
    for size in range(second, third + 1):
        other = cut(whole, data[:size], f"{size}.jsonl")
        assert distill(other, drawing) == (2 if size >= third - 1 else 1)
        assert Path(other.output).read_bytes() == data


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\xff\xfe", b"5", b"\n \n", b"\xef\xbb\xbf"])
def test_what_a_crash_leaves_behind_the_last_record_is_no_record(whole, tail):
    data = Path(whole.output).read_bytes()
    other = cut(whole, b"".join(data.splitlines(keepends=True)[:3]) + tail, "crash.jsonl")
    assert distill(other, drawing) == 3 and lines_without_blanks(other) == lines(whole)


def lines_without_blanks(chosen: Distillation) -> list[dict]:
    return [
        json.loads(line) for line in Path(chosen.output).read_text(encoding="utf-8-sig").splitlines() if line.strip()
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 9, 20])
def test_another_batch_size_goes_on_too(whole, batch_size):
    data = Path(whole.output).read_bytes().splitlines(keepends=True)
    other = replace(cut(whole, b"".join(data[:5]), "five.jsonl"), batch_size=batch_size)
    assert distill(other, drawing) == 5
    assert len(lines(other)) == 9 and lines(other)[:5] == lines(whole)[:5]


@pytest.mark.parametrize("written", [0, 1, 40, 150])
def test_a_full_disk_is_told_and_gone_on_from(whole, monkeypatch, written):
    """A file that takes ``written`` more bytes of what is written to it, as write(2) does on a full disk."""
    other = cut(whole, Path(whole.output).read_bytes().splitlines(keepends=True)[0], "full.jsonl")
    original = Path.open

    class Full:
        def __init__(self, file):
            self.file, self.room = file, written

        def write(self, text):
            self.file.write(text[: self.room])
            self.room -= len(text)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            self.file.flush()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def opened(self, mode="r", *arguments, **settings):
        file = original(self, mode, *arguments, **settings)
        return Full(file) if mode == "a" else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(ValueError, match="the disk of output '.*full.jsonl' is full.* last whole text"):
        distill(other, drawing)
    monkeypatch.setattr(Path, "open", original)
    distill(other, drawing)
    assert lines(other) == lines(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "temperature was 1.0 and is 0.5"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"max_new_tokens": 3}, "max_new_tokens was 12 and is 3"),
        ({"max_new_tokens": 3, "seed": 1}, "max_new_tokens was 12 and is 3; seed was 0 and is 1"),
    ],
)
@pytest.mark.parametrize("samples", [4, 9, 12])
def test_texts_of_other_settings_are_neither_kept_in_silence_nor_mixed(whole, changes, message, samples):
    with pytest.raises(
        ValueError, match=f"output: '.*own.jsonl' holds texts of other settings: {message}. Give another"
    ):
        distill(replace(whole, samples=samples, **changes), drawing)
    assert distill(whole, drawing) == 9


def test_prompts_decide_too(settings, whole, tmp_path):
    prompts = [{"prompt": f"{i}"} for i in range(6)]
    chosen = settings(*prompts, output=str(tmp_path / "asked.jsonl"))
    with pytest.raises(ValueError, match="prompts was '.*prompts.jsonl' and is None"):
        distill(chosen, saying(5)), distill(replace(chosen, prompts=None), saying(5))
    with pytest.raises(ValueError, match="prompts was None and is '.*prompts.jsonl'"):
        distill(replace(whole, prompts=chosen.prompts), saying(5))
    first = lines(chosen)
    longer = settings(*prompts, {"prompt": "more"}, output=chosen.output, samples=7)
    assert distill(longer, saying(5)) == 6 and lines(longer) == [*first, {**first[0], "prompt": "more"}]
    moved = tmp_path / "moved.jsonl"
    Path(chosen.prompts).rename(moved)
    assert distill(replace(longer, prompts=str(moved)), saying(5)) == 7
    with pytest.raises(ValueError, match="the prompts in '.*' are not those that were in '.*'"):
        distill(settings({"prompt": "other"}, *prompts, output=chosen.output), saying(5))
    with pytest.raises(ValueError, match="prompt_tokens was 16 and is 4"):
        distill(replace(longer, prompts=str(moved), prompt_tokens=4), saying(5))


def test_texts_without_a_note_of_their_settings_are_told(settings, tmp_path):
    chosen = settings(samples=3)
    Path(chosen.output).write_text('{"text": "mine", "complete": true}\n')
    with pytest.warns(UserWarning, match="own.jsonl: nothing says with which settings its texts were made"):
        assert distill(chosen, saying(5)) == 1
    assert [line["text"] for line in lines(chosen)][0] == "mine" and len(lines(chosen)) == 3


# One run at a time


def test_two_runs_at_once_are_one(whole):
    """In one process: the second is refused while the first draws, and has nothing to do afterwards."""
    Path(whole.output).unlink()
    refused = []

    def meanwhile(prompts, seed):
        with pytest.raises(ValueError, match="output: '.*own.jsonl' is being written by another run"):
            distill(whole, drawing)
        thread = threading.Thread(target=lambda: refused.append(_refusal(whole)))
        thread.start()
        thread.join()
        return drawing(prompts, seed)

    assert distill(whole, meanwhile) == 0 and len(lines(whole)) == 9
    assert len(refused) == 3 and all("another run" in message for message in refused)
    assert distill(whole, drawing) == 9


def _refusal(chosen: Distillation) -> str:
    try:
        distill(chosen, drawing)
    except ValueError as error:
        return str(error)
    return ""


def test_a_lock_ends_with_its_process_even_if_that_is_killed(tmp_path):
    path = tmp_path / "own.jsonl"
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".own.jsonl.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="is being written by another run"):
        with locked("output", path):
            pass
    process.kill()
    process.wait()
    with locked("output", path):
        pass


def test_a_file_that_cannot_be_written_is_named(whole, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for output, reason in (
        (tmp_path / "folder.jsonl", "Is a directory"),
        (Path(whole.output) / "x.jsonl", "exists|directory"),
    ):
        with pytest.raises(ValueError, match=f"output: '.*' cannot be written: .*({reason})"):
            distill(replace(whole, output=str(output)), drawing)


def test_records_are_counted_whatever_lies_between_them(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": "\xe2\x80\xa8"}\r\n{"a": 3}')
    assert whole_records("output", path) == 3 and path.read_bytes().endswith(b'{"a": 3}\n')
    assert whole_records("output", tmp_path / "none.jsonl") == 0
    assert path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("content", [b"notes of mine\n", b"notes of mine", b"{\n", b"[1, 2]\n"])
def test_a_file_of_the_users_own_is_left_alone(settings, tmp_path, content):
    chosen = settings(output=str(tmp_path / "mine.txt"))
    Path(chosen.output).write_bytes(content)
    with pytest.raises(ValueError, match=r"output: .*mine\.txt' cannot be continued: line 1"):
        distill(chosen, drawing)
    assert Path(chosen.output).read_bytes() == content
