"""EvalPlus records as test programs."""

import ast

import pytest

from eval.code_eval import CodeEval
from eval.sandbox import Limits, run_untrusted
from eval.tasks import data
from eval.tasks.plus import differential_test, restore_types


def verdict(reference: str, candidate: str, inputs, name: str = "f", atol: float = 0) -> bool:
    program = f"{candidate}\n{differential_test(reference, name, inputs, atol)}\ncheck_against_reference({name})"
    return run_untrusted(program).passed


@pytest.mark.parametrize(
    "reference, candidate, inputs, atol, passed",
    [
        ("def f(x): return x + 1", "def f(x): return 1 + x", [[1], [2]], 0, True),
        ("def f(x): return x + 1", "def f(x): return 2", [[1], [2]], 0, False),
        ("def f(x): return x / 3", "def f(x): return x * (1 / 3)", [[1.0], [7.0]], 0, True),
        ("def f(x): return x / 3", "def f(x): return x / 3 + 1e-4", [[1.0]], 0, False),
        ("def f(x): return x / 3", "def f(x): return x / 3 + 1e-5", [[1.0]], 1e-4, True),
        ("def f(x): return [x, 0.5]", "def f(x): return (x, 0.5 + 1e-9)", [[1.0]], 0, True),
        ("def f(x): return [x]", "def f(x): return []", [[1.0]], 0, False),
        ("def f(x): return x", "def f(x): return x", [[float("nan")], [float("inf")]], 0, True),
        ("def f(x): x.append(1); return x", "def f(x): return x + [1]", [[[]]], 0, True),
        ("def f(x): return 1", "def f(x): return '1'", [[0]], 0, False),
        ("def f(x): return 0.5", "def f(x): return None", [[0]], 0, False),
    ],
)
def test_comparison(reference, candidate, inputs, atol, passed):
    assert verdict(reference, candidate, inputs, atol=atol) == passed


def test_exceptions_of_evalplus():
    assert verdict("def Diff(a): return [1, 2]", "def Diff(a): return [2, 1]", [[0]], "Diff")
    assert verdict("def check_str(s): return None", "def check_str(s): return None", [["x"]], "check_str")
    assert verdict("def check_str(s): return 'm'", "def check_str(s): return True", [["x"]], "check_str")
    assert not verdict("def check_str(s): return None", "def check_str(s): return False", [["x"]], "check_str")
    # x^2 - 1 has two roots.
    roots = "def find_zero(xs): return {}.0"
    assert verdict(roots.format(1), roots.format(-1), [[[-1, 0, 1]]], "find_zero", 1e-4)
    assert not verdict(roots.format(1), roots.format(2), [[[-1, 0, 1]]], "find_zero", 1e-4)


@pytest.mark.parametrize(
    "inputs, assertion, expected",
    [
        ([[[1, 2], [3]]], "assert f((4,), [5]) == 1", [[(1, 2), [3]]]),
        ([[[[1], [2]]]], "assert f([(4,), (5, 6)]) == 1", [[[(1,), (2,)]]]),
        ([[[[1], [2]]]], "assert f(((4,), (5, 6))) == 1", [[((1,), (2,))]]),
        ([[[1, 2]]], "assert set(f({3, 4})) == {1}", [[{1, 2}]]),
        ([[{"a": [1, 2]}]], "assert f({'b': (3, 4)}) == 1", [[{"a": (1, 2)}]]),
        ([[[1, [2, [3, [4]]]]]], "assert f((1, (2, 3))) == 1", [[(1, (2, (3, (4,))))]]),
        ([["0", "1j"], ["(1+2j)", "2"]], "assert f(1, 2j) == 1", [[0.0, 1j], [1 + 2j, 2.0]]),
        ([["kj"]], "assert f('x') == 1", [["kj"]]),
        ([[196]], "assert f(14*14)", [[196]]),
    ],
)
def test_types_lost_in_json_come_back(inputs, assertion, expected):
    restored = restore_types(inputs, assertion, "f")
    assert restored == expected and repr(restored) == repr(expected)


def test_the_first_inputs_are_those_of_the_assertions(data_folder):
    """EvalPlus's own copies of four problems differ from its assertions: dictionaries that JSON or a run changed."""
    records = data.read(data_folder / "mbpp-plus" / "MbppPlus.jsonl.gz")
    assert len(records) == 378
    different = set()
    for record in records:
        name = record["entry_point"]
        calls = [
            [eval(ast.unparse(argument)) for argument in call.args]
            for call in ast.walk(ast.parse(record["assertion"]))
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == name
        ]
        base = restore_types(list(record["base_input"]), record["assertion"], name)
        if sorted(map(repr, calls)) != sorted(map(repr, base)):
            different.add(record["task_id"])
    assert different <= {"Mbpp/87", "Mbpp/124", "Mbpp/301", "Mbpp/803"}


@pytest.mark.slow
def test_contracts_hold(data_folder):
    """Every input fulfils what the record demands of it, but for three records whose inputs EvalPlus itself spoilt."""
    broken = set()
    for record in data.read(data_folder / "mbpp-plus" / "MbppPlus.jsonl.gz"):
        name, lines = record["entry_point"], record["canonical_solution"].split("\n")
        start = next(i for i, line in enumerate(lines) if line.startswith((f"def {name}(", f"def {name} (")))
        contract = record["contract"].rstrip()
        indent = contract.lstrip("\n")[: len(contract.lstrip("\n")) - len(contract.lstrip())]
        # Only the contract runs: some references are slow.
        source = f"from math import inf, nan\n{lines[start]}\n{contract}\n{indent}return\n" + "\n".join(lines[:start])
        inputs = restore_types([*record["base_input"], *record["plus_input"]], record["assertion"], name)
        if not run_untrusted(f"{source}\nfor arguments in {inputs!r}: {name}(*arguments)", Limits(seconds=20)).passed:
            broken.add(record["task_id"])
    assert broken <= {"Mbpp/252", "Mbpp/267", "Mbpp/734"}


@pytest.mark.slow
def test_mbpp_plus_references_pass(consent, data_folder):
    docs = data.mbpp_plus(data_folder)["test"]
    scores, _ = CodeEval().compute(
        references=[d["test"] for d in docs], predictions=[[d["code"]] for d in docs], k=[1], timeout=60, num_workers=2
    )
    assert scores == {"pass@1": 1.0}
