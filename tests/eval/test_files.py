"""Files of results: no name leads out of a folder, and of two runs on one file one is refused."""

import subprocess
import sys

import pytest

from eval.files import SoleWriter, in_folder, write_whole


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "a\\b", "", ".", "..", ".hidden", "-x", "a\n", "a\0b"])
def test_a_name_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="name must be"):
        in_folder(tmp_path, name, "json")


@pytest.mark.parametrize("name", ["speed-bf16", "run_2", "7", "a.b", "größe"])
def test_plain_names(tmp_path, name):
    assert in_folder(tmp_path, name, "json") == tmp_path / f"{name}.json"


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_whole(path, "old")
    with pytest.raises(TypeError):
        write_whole(path, None)
    assert path.read_text() == "old"


def test_one_run_writes_at_a_time(tmp_path):
    path = tmp_path / "folder" / "a.jsonl"
    code = (
        f"from eval.files import SoleWriter as S; from pathlib import Path\nwith S(Path({str(path)!r})).writing(): pass"
    )
    sole = SoleWriter(path)
    with sole.writing():
        with sole.writing():
            pass
        with pytest.raises(ValueError, match="another run is writing .*a.jsonl"):
            with SoleWriter(path).writing():
                pass
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1 and "another run is writing" in other.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_killed_run_leaves_no_lock(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import os, signal; from eval.files import SoleWriter as S; from pathlib import Path\n"
        f"with S(Path({str(path)!r})).writing(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode < 0
    with SoleWriter(path).writing():
        pass
