"""Records of HumanEval+ and MBPP+ (EvalPlus, arXiv 2305.01210) as test programs.

A record holds inputs and a reference solution, no expected outputs. The test program runs the reference and the
candidate on each input and compares, with the tolerance and the few exceptions that EvalPlus makes.
"""

import ast
import re
from contextlib import suppress
from typing import Any

# MBPP+ answers whose order is free, and answers of which only "is not None" counts.
UNORDERED = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}
NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}
COMPLEX = re.compile(r"\(?[-+.\de]+j\)?")

PROGRAM = """
import copy, math
inf, nan = math.inf, math.nan
REFERENCE = {reference!r}
INPUTS = {inputs}
ATOL = {atol!r}

def all_floats(value):
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and all(isinstance(x, float) for x in value))

def near(out, expected, atol):
    if isinstance(expected, (list, tuple)):
        return isinstance(out, (list, tuple)) and len(out) == len(expected) and all(
            near(a, b, atol) for a, b in zip(out, expected))
    return abs(out - expected) <= atol + 1e-7 * abs(expected) or (out != out and expected != expected)

def agree(arguments, out, expected):
{rule}

def check_against_reference(candidate):
    scope = {{}}
    exec(REFERENCE, scope)
    for arguments in INPUTS:
        expected = scope[{entry_point!r}](*copy.deepcopy(arguments))
        assert agree(arguments, candidate(*copy.deepcopy(arguments)), expected)
"""
EQUAL = """
    if out == expected:
        return True
    atol = 1e-6 if ATOL == 0 and all_floats(expected) else ATOL
    return atol != 0 and near(out, expected, atol)
"""
SAME_SET = "    return set(out) == set(expected)"
SAME_NONE = "    return (out is not None) == (expected is not None)"
# The root of a polynomial is not unique; HumanEval/32.
IS_ROOT = "    return abs(sum(c * math.pow(out, i) for i, c in enumerate(arguments[0]))) <= ATOL"


def differential_test(reference: str, entry_point: str, inputs: list[list[Any]], atol: float) -> str:
    """Source of ``check_against_reference(candidate)``, which raises AssertionError where the two differ.

    reference: source that defines the function ``entry_point``. inputs: the arguments of each call. atol: absolute
    tolerance for numbers.
    """
    rule = SAME_SET if entry_point in UNORDERED else SAME_NONE if entry_point in NOT_NONE else EQUAL
    if entry_point == "find_zero":
        rule = IS_ROOT
    return PROGRAM.format(reference=reference, inputs=inputs, atol=atol, entry_point=entry_point, rule=rule.strip("\n"))


def restore_types(inputs: list[list[Any]], assertion: str, entry_point: str) -> list[list[Any]]:
    """Give MBPP+ inputs the tuples, sets and complex numbers that JSON took from them.

    The types are those that the calls of ``entry_point`` in ``assertion`` show, argument by argument; where a call has
    a list of things of one kind, so has the input.

    >>> restore_types([[[1, 2], [[3]]]], "assert f((4, 5), [(6, 7)]) == 8", "f")
    [[(1, 2), [(3,)]]]
    """
    kinds: list[_Kind] = []
    for call in ast.walk(ast.parse(assertion)):
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == entry_point:
            kinds = kinds or [_Kind() for _ in call.args]
            for kind, argument in zip(kinds, call.args, strict=True):
                with suppress(ValueError):  # an expression, such as 14*14
                    kind.see(ast.literal_eval(argument))
    # Complex numbers are strings in the file, and so are the other numbers of such a problem.
    numbers = any(
        isinstance(x, str) and str not in kind.types and COMPLEX.fullmatch(x)
        for row in inputs
        for kind, x in zip(kinds, row, strict=False)
    )
    if numbers:
        return [[complex(x) if "j" in str(x) else float(x) for x in row] for row in inputs]
    return [[kind.cast(x) for kind, x in zip(kinds, row, strict=False)] for row in inputs]


class _Kind:
    """The types seen at one place of the arguments and, one level down, of its elements, all taken together."""

    def __init__(self):
        self.types: set[type] = set()
        self.inner: _Kind | None = None

    def see(self, value: Any) -> None:
        self.types.add(type(value))
        if isinstance(value, (list, tuple, set, dict)):
            self.inner = self.inner or _Kind()
            for element in value.values() if isinstance(value, dict) else value:
                self.inner.see(element)

    def cast(self, value: Any, container: type = list) -> Any:
        """``value`` with these types; what nests deeper than any example gets the ``container`` it lies in."""
        if isinstance(value, list):
            container = next((kind for kind in (list, tuple, set) if kind in self.types), container)
        elif not isinstance(value, dict):
            return value
        inner = self.inner or _Kind()
        if isinstance(value, dict):
            return {key: inner.cast(element, container) for key, element in value.items()}
        return container(inner.cast(element, container) for element in value)
