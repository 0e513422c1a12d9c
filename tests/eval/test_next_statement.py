from itertools import islice

import pytest

from eval.python_source import library_files
from eval.tasks.next_statement import NextStatement, compiles, first_statement, next_statements


@pytest.fixture(scope="module")
def problems():
    return next_statements(60)


def test_problems_are_held_out_and_reproducible(problems):
    assert next_statements(60) == problems
    held_out = "".join(path.read_text(encoding="utf-8", errors="replace") for path in library_files(held_out=True))
    assert all(problem.prompt + problem.answer in held_out for problem in problems)
    trained = "".join(path.read_text(encoding="utf-8", errors="replace") for path in islice(library_files(False), 200))
    # Short functions may be written alike in two files.
    assert not any(len(p.prompt) > 300 and p.prompt + p.answer in trained for p in problems)


def test_prompts_begin_with_a_function(problems):
    starts = ("def ", "async def ", "@")
    assert all(problem.prompt.lstrip().startswith(starts) for problem in problems)


def test_every_answer_is_one_statement_and_answers_itself(problems):
    for problem in problems:
        assert problem.prompt.endswith("\n") and problem.answer.strip()
        assert compiles(problem.answer) and first_statement(problem.answer) == problem.answer.strip("\n")
        assert problem.is_answered_by(problem.answer)
        assert problem.is_answered_by(problem.answer + "    another = statement\n")
        assert not problem.is_answered_by("") and not problem.is_answered_by("    wrong = statement\n" + problem.answer)


@pytest.mark.parametrize(
    "completion, answered",
    [
        ("    return x\n", True),
        ("    return  x", True),
        ("\treturn x\n\n\ndef g():\n", True),
        ("\n    return x\n", True),
        ("    return x + 1\n", False),
        ("    return (x)\n", False),
        ("    pass\n    return x\n", False),
    ],
)
def test_white_space_does_not_matter(completion, answered):
    assert NextStatement("def f(x):\n", "    return x\n").is_answered_by(completion) == answered


@pytest.mark.parametrize(
    "completion, statement",
    [
        ("    f(\n        1,\n    )\n    g()\n", "    f(\n        1,\n    )\n"),
        ("    if x:\n        y()\n    z()\n", "    if x:\n        y()\n"),
        ("    x = )\n    y = 1\n", "    x = )\n"),
        ("\n\n    return\n", "    return"),
        ("", ""),
    ],
)
def test_first_statement(completion, statement):
    assert first_statement(completion) == statement


@pytest.mark.parametrize(
    "statement, valid",
    [
        ("    return 1\n", True),
        ("    yield x", True),
        ("  await f()", True),
        ("    break", True),
        ("x = ", False),
        ("", False),
        ("# only words", False),
        ("x = '\0'", False),
    ],
)
def test_compiles(statement, valid):
    assert compiles(statement) == valid


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="count"):
        next_statements(0)
