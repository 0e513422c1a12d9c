"""What the benchmarks of steering count, and that each runs on the smallest case."""

import json

import pytest

from benchmarks.command import main
from benchmarks.steering import cost, power
from benchmarks.steering.additions import additions
from benchmarks.steering.checkers import WRONG, right_answer, right_lines
from benchmarks.steering.exact import exact
from benchmarks.steering.runs import Runs
from benchmarks.steering.toys import LENGTH, toy
from eval.additions import Addition


def rows(folder, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())["rows"]


def test_checkers_judge_answers_and_lines():
    problem = Addition(47, 5)
    right, first = problem.solution, problem.solution.splitlines(keepends=True)[0]
    prompts = [problem.prompt] * 2
    assert right_answer(prompts, [right, right.replace("= 52", "= 62")]) == [0.0, WRONG]
    assert right_lines(prompts, [first + "4 + 9: no line yet", first.replace("12", "13")], [False, False]) == [
        0.0,
        WRONG,
    ]
    assert right_lines(prompts, [right, first], [True, True]) == [0.0, WRONG]


def test_plain_samples_are_counted():
    runs = Runs(particles=[[True, False, True], [False, False, True]], answers=[["a", "b", "a"], ["x", "x", "y"]])
    assert [runs.plain(n) for n in (1, 3)] == [0.5, 0.5] and [runs.best_of(n) for n in (1, 3)] == [0.5, 1.0]
    assert [runs.majority(n) for n in (1, 2, 3)] == [0.5, 0.5, 0.5]


def test_the_texts_of_the_toy_are_all_there_are():
    small = toy()
    assert sum(small.texts().values()) == pytest.approx(1) and max(map(len, small.texts())) == LENGTH
    assert sum(small.texts(with_mask=True).values()) < 0.95


def test_the_exact_command(tmp_path):
    code = main(
        exact, "steering.exact", ["--decoder", "ntp", "--particles", "2", "--runs", "30", "--out", str(tmp_path)]
    )
    found = rows(tmp_path, "steering-exact")
    assert code == 0 and [row["target"] for row in found] == ["exp(reward) q", "p^2", "no weights"]
    assert all(0 < row["total_variation"] < 1 for row in found) and found[2]["mean_estimate"] == 1


def test_the_command_of_worked_additions(tmp_path):
    sizes = ["--particles", "1", "--particles", "2"]
    code = main(additions, "steering.additions", ["--count", "1", "--seeds", "1", *sizes, "--out", str(tmp_path)])
    found = rows(tmp_path, "steering-additions")
    assert code == 0 and len(found) == 8 and (tmp_path / "steering-additions.png").is_file()
    plain, lines = [[row for row in found if row["method"] == method] for method in ("plain", "checker of lines")]
    assert plain[1]["sequence_forwards"] == 2 * plain[0]["sequence_forwards"] and lines[0]["resampled"] == 0


def test_the_command_of_power_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "ALPHAS", (2.0,))
    arguments = ["--count", "1", "--seeds", "1", "--particles", "2", "--base", "1.5", "--out", str(tmp_path)]
    assert main(power.power, "steering.power", arguments) == 0
    assert [row["method"] for row in rows(tmp_path, "steering-power")] == ["p^2, particles", "temperature 0.5"]


def test_the_command_of_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(cost, "_memory", lambda *_: {})
    arguments = ["--decoder", "sbd:block_size=8", "--particles", "3", "--new-tokens", "16", "--out", str(tmp_path)]
    assert main(cost.cost, "steering.cost", arguments) == 0
    (row,) = rows(tmp_path, "steering-cost")
    assert row["resamplings"] >= 1 and 0 < row["share"] < 1 and row["weights_milliseconds_per_resampling"] > 0
