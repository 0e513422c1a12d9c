"""What lies in ``benchmarks/results`` is what ``make bench``, ``bench-trained``, ``gpu-check`` and ``report`` write."""

import importlib
import json
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import typer

from setflow.cli import app

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Where the commands have been since their files were written.
MOVED = {
    "setflow bench flow likelihood": "python -m benchmarks.flow.likelihood",
    "setflow bench flow samplers": "python -m benchmarks.flow.sweep",
    "setflow bench flow blocks": "python -m benchmarks.flow.blocks",
    "setflow bench flow peer": "python -m benchmarks.flow.peer",
    "setflow bench resample": "python -m benchmarks.resample.samples",
    "setflow bench training": "python -m benchmarks.training.step_cost",
    "setflow bench options": "python -m benchmarks.training.ablation",
}
PLACES = (
    "--out",
    "--overwrite",
    "--folder",
)  # where to write, and where another project was installed: not what was measured


def parts(command: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """A command line as its program and its options."""
    start = next((i for i, word in enumerate(command) if word.startswith("--")), len(command))
    options, words = [], command[start:]
    for i, word in enumerate(words):
        if word.startswith("--"):
            following = words[i + 1] if i + 1 < len(words) else "--"
            options.append((word, "" if following.startswith("--") else following))
    return " ".join(command[:start]), options


def measured(options: list[tuple[str, str]]) -> Counter:
    return Counter(option for option in options if option[0] not in PLACES)


def parameters(program: str):
    """The command behind ``program``, as click has it."""
    if program.startswith("python -m "):
        module = importlib.import_module(program.removeprefix("python -m "))
        names = {"resample.samples": "resample"}
        name = program.removeprefix("python -m benchmarks.")
        single = typer.Typer()
        single.command()(getattr(module, names.get(name, name.rpartition(".")[2])))
        return typer.main.get_command(single)
    found = typer.main.get_command(app)
    for word in program.split()[1:]:
        found = found.commands[word]
    return found


@pytest.fixture(scope="module")
def written() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """What the Makefile's lines write, by name, and how."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    settings = ("BIN=bin", "CONTROL=--control build/embedded-control")
    command = ("make", "-n", "bench", "bench-trained", "gpu-check", "report", *settings)
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        if "--out benchmarks/results" in line and "eval trace" not in line:
            program, options = parts(shlex.split(line.removeprefix("bin/")))
            default = next(p.default for p in parameters(program).params if p.name == "name")
            name = dict(options).get("--name", default)
            assert name not in found, f"two lines write {name}"
            found[name] = program, options
    return found


def recorded() -> dict[str, str]:
    """The command in each committed file."""
    files = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    sweeps = {path.stem: json.loads(path.read_text().splitlines()[0]) for path in (RESULTS / "report").glob("*.jsonl")}
    return {name: content["command"] for name, content in (files | sweeps).items() if "command" in content}


def test_every_file_is_written_by_one_line_and_every_line_writes_a_file(written):
    assert written.keys() == recorded().keys()


@pytest.mark.parametrize("name", sorted(recorded()))
def test_a_line_is_the_command_in_its_file(written, name):
    program, options = written[name]
    then, expected = parts(shlex.split(recorded()[name]))
    assert program == MOVED.get(then, then)
    assert measured(options) == measured(expected)
    known = {option for parameter in parameters(program).params for option in parameter.opts}
    assert {option for option, _ in options} <= known
