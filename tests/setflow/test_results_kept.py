"""What a command has written, another one neither replaces without a word nor writes at the same time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.files import SoleWriter

pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")
pytest.importorskip("matplotlib", reason="needs matplotlib: install the extra [eval]")

TASK = ("--tasks", "additions", "--max-gen-toks", "4", "--batch-size", "2")


@pytest.fixture(scope="session")
def model(model_folder) -> str:
    return model_folder(max_position_embeddings=512)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to work in, with three prompts."""
    monkeypatch.chdir(tmp_path)
    texts = ["1 + 2 = 3, 4 + 5 = 9, " * 4, "37 + 45 = 82 " * 5, "8 + 9 = 17; " * 5]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def sentence(result: tuple[int, str, str]) -> str:
    """The one sentence of a command that was refused."""
    code, out, err = result
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: ") and "Traceback" not in err
    return last


def test_a_benchmark_replaces_what_another_command_wrote_only_if_told_to(setflow, model, work):
    def run(count: str, *more: str):
        given = ("--model", model, "--prompts", "prompts.jsonl", "--decoder", "ntp", "--count", count)
        return setflow("bench", "quality", *given, *more)

    assert run("2")[0] == 0
    file = work / "build/bench/quality.json"
    before = file.read_bytes()
    assert "quality.json' holds the results of `setflow bench quality" in sentence(run("1"))
    assert "--overwrite" in sentence(run("2", "--batch-size", "1")) and file.read_bytes() == before
    assert run("2")[0] == 0, "the same command measures again"
    assert run("1", "--name", "other")[0] == 0 and run("1", "--out", "elsewhere")[0] == 0
    assert file.exists() and json.loads(file.read_text())["rows"][0]["count"] == 2
    assert run("1", "--overwrite")[0] == 0 and json.loads(file.read_text())["rows"][0]["count"] == 1


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": []}', "\udc80".encode("utf-8", "surrogateescape").decode("latin1")]
)
def test_a_file_of_something_else_is_not_replaced(setflow, work, content):
    (work / "memory.json").write_text(content)
    assert "memory.json' holds something else; give" in sentence(setflow("bench", "memory", "--out", "."))
    assert (work / "memory.json").read_text() == content


def test_a_sweep_keeps_the_lines_of_others(setflow, model, work):
    def sweep(*arguments: str) -> int:
        assert setflow("eval", "sweep", "--model", model, *TASK, *arguments)[0] == 0
        return (work / "build/report/sweep.jsonl").read_text().count("\n")

    assert sweep("--limit", "4", "--decoder", "ntp") == 1
    assert sweep("--limit", "3", "--decoder", "ntp") == 2
    assert sweep("--limit", "3", "--decoder", "sbd:block_size=2") == 3
    assert sweep("--limit", "4", "--decoder", "ntp") == 3
    report = (work / "build/report/report.md").read_text()
    assert "| `ntp`, limit 4 | 0 |" in report and "| `sbd:block_size=2`, limit 3 | 0 |" in report


def test_a_report_of_somebody_else_is_not_replaced(setflow, model, work):
    (work / "report.md").write_text("# My own\n")
    arguments = ("eval", "sweep", "--model", model, *TASK, "--limit", "1", "--decoder", "ntp")
    assert "'report.md' is not a report of sweeps" in sentence(setflow(*arguments, "--out", "."))
    assert setflow(*arguments)[0] == 0 and setflow(*arguments)[0] == 0  # our own one is written anew
    (work / "build/report/report.md").write_text("notes")
    assert "is not a report of sweeps" in sentence(setflow("eval", "report"))
    assert (work / "report.md").read_text() == "# My own\n" and not (work / "sweep.jsonl").exists()


@pytest.mark.parametrize("name", ["../../x", "a/b", "/x", "", ".."])
@pytest.mark.parametrize("command", [("bench", "quality"), ("bench", "memory"), ("bench", "speed"), ("eval", "sweep")])
def test_a_name_leads_nowhere_else(setflow, work, command, name):
    assert "name must be" in sentence(setflow(*command, "--out", "results/here", "--name", name))
    assert [path.name for path in work.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("out/quality.json", ("bench", "quality", "--out", "out")),
        ("out/memory.json", ("bench", "memory", "--out", "out")),
        ("out/sweep.jsonl", ("eval", "sweep", "--out", "out", *TASK)),
        ("out/finished.jsonl", ("eval", "--out", "out", *TASK)),
    ],
)
def test_two_runs_on_one_output(setflow, work, file, command):
    """The second ends before it loads a model."""
    path = work / file
    with SoleWriter(path).writing():
        assert f"another run is writing '{path.relative_to(work)}'" in sentence(setflow(*command))
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "no.jsonl"), "prompts must be additions, python or a JSONL file that exists, got 'no.jsonl'"),
        (("--prompts", "."), "prompts must be"),
        (("--device", "gpu"), "device must be one of cpu, "),
        (("--device", "cuda:99"), "device must be one that this machine has, "),
        (("--dtype", "fp8"), "dtype must be one of"),
        (("--model", "./no/such/model"), "model './no/such/model' does not exist"),
        (("--decoder", "ntp", "--decoder", "sbdd"), "did you mean 'sbd'"),
        (("--decoder", "sbd:block_size=0"), "block_size must be"),
    ],
)
@pytest.mark.parametrize("command", ["quality", "speed", "lossless"])
def test_mistakes_are_said_before_a_model_is_loaded(setflow, work, monkeypatch, command, arguments, message):
    monkeypatch.setattr("setflow.loading.load_model", None)
    assert message in sentence(setflow("bench", command, *arguments))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "'bad.jsonl' cannot be read: line 2 is not JSON: "),
        (b'{"text": "a"}\n\n["text"]\n', "line 3 of 'bad.jsonl' must be a JSON object with a text in the field 'text'"),
        (b'{"prompt": "a"}\n', "line 1 of 'bad.jsonl' must be a JSON object with a text"),
        (b'{"text": 5}\n', "line 1 of 'bad.jsonl' must be a JSON object with a text"),
        (b'{"text": "caf\xe9"}\n', "'bad.jsonl' cannot be read: line 1 is not UTF-8"),
        (b'\xef\xbb\xbf{"text": "short"}\n', "no text in 'bad.jsonl' has more than 16 tokens"),
        (b"", "no text in 'bad.jsonl' has more than 16 tokens"),
    ],
)
def test_the_reason_why_prompts_cannot_be_read(setflow, model, work, lines, message):
    (work / "bad.jsonl").write_bytes(lines)
    assert message in sentence(setflow("bench", "quality", "--model", model, "--prompts", "bad.jsonl"))


@pytest.mark.parametrize("prompts", ["additions", "python", "prompts.jsonl"])
def test_prompts_that_do_not_fit_are_refused_by_name(setflow, tiny, work, prompts):
    message = sentence(setflow("bench", "quality", "--model", tiny, "--count", "2", "--prompts", prompts))
    assert f"prompts {prompts.removesuffix('.jsonl')!r} have up to" in message and "context of 96" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "gpu"), "device must be"),
        (("--new-tokens", "5000"), "new_tokens must be"),
        (("--decoder", "ntpp"), "did you mean 'ntp'"),
    ],
)
def test_what_memory_cannot_be_measured_of(setflow, work, arguments, message):
    assert message in sentence(setflow("bench", "memory", *arguments))


def test_why_memory_could_not_be_measured(setflow, work, monkeypatch):
    def fail(command, **settings):
        return subprocess.CompletedProcess(command, 1, "", "Traceback ...\nValueError: no offset code\n")

    monkeypatch.setattr("eval.bench.memory.subprocess.run", fail)
    message = sentence(setflow("bench", "memory", "--decoder", "ntp"))
    assert message == "error: generate cannot be measured: ValueError: no offset code"


@pytest.mark.parametrize("out", ["x.png", "x", "x.svgz", "."])
def test_a_trace_is_svg(setflow, work, out):
    assert "out must be a file that ends in .svg" in sentence(setflow("eval", "trace", "1 + 1", "--out", out))
    assert [path.name for path in work.iterdir()] == ["prompts.jsonl"]


def test_what_needs_the_options_alone_is_said_without_torch(work):
    options = (
        ["--name", "../x"],
        ["--decoder", "sbdd"],
        ["--prompts", "no"],
        ["--model", "./no"],
        ["--dtype", "fp8"],
        ["--device", "gpu"],
    )
    commands = [["bench", "quality", *given] for given in options] + [
        ["bench", "memory", "--decoder", "ntpp"],
        ["bench", "speed", "--assistant", "./no"],
    ]
    code = (
        f"import sys; from setflow.cli import main\nassert [main(c) for c in {commands}] == [2] * {len(commands)}\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
