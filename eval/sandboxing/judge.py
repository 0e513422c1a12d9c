"""The judging process: it runs the tests and asks the process of the answer for the values that they need.

Tests see plain values and compare them here with what they expect. Values of the tests go to the answer as arguments of
calls, never as the other side of a comparison; of the tests' own objects it gets at those that it is given.
"""

import builtins
import importlib
import io
import re
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from eval.sandboxing.remote import OPERATIONS
from eval.sandboxing.wire import GONE, UNPRINTABLE, Wire

FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
IMPORT = re.compile(r"^(?:import|from)[ \t]+[\w., \t]+$", re.MULTILINE)


class Judge(Wire):
    """The judge's end of the wire."""

    def __init__(self, source: int, target: int):
        super().__init__(source, target, {name: self._guarded(name) for name in OPERATIONS})

    def allow(self, value: Any) -> None:
        if not (isinstance(value, FUNCTIONS) or is_of_tests(value) or hasattr(type(value), "__next__")):
            raise TypeError(f"{type(value).__name__} objects cannot be given to the answer's process")

    def _guarded(self, name: str):
        """OPERATIONS[name] for objects that the tests gave to the answer, without a way from them to anything else."""

        def operate(value: Any, *arguments: Any) -> Any:
            if not self.exports(value):
                raise TypeError("not an object of the tests")
            if name in ("getattr", "setattr") and (not is_of_tests(value) or str(arguments[0]).startswith("_")):
                raise AttributeError(arguments[0])
            return OPERATIONS[name](value, *arguments)

        return operate

    def _called(self, function: Any, arguments: list, keywords: dict) -> tuple[Any, dict[int, Any]]:
        if not self.exports(function):
            raise TypeError("not a function of the tests")
        return super()._called(function, arguments, keywords)


def is_of_tests(value: Any) -> bool:
    """Whether ``value`` is a class that no module holds, so one that the tests define, or an object of such a class."""
    kind = value if isinstance(value, type) else type(value)
    module = sys.modules.get(kind.__module__)
    return getattr(module, kind.__name__, None) is not kind and bool(kind.__flags__ & HEAP_TYPE)


HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def names_in(code: CodeType) -> Iterator[str]:
    """All names in ``code`` and in the functions inside it, attributes too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def find_names(judge: Judge, code: CodeType) -> dict[str, Any]:
    """What the tests use of the answer's names.

    Builtins, and modules of the standard library that the answer has imported, are the judge's own; unless the answer
    has nothing else that the tests use: MBPP asks for a function called ``sum``.
    """
    names = sorted(set(names_in(code)))
    known = judge.ask("names", names)
    known = {name: known[name] for name in names if name in known}
    modules = {}
    for name in known.keys() & sys.stdlib_module_names:
        try:
            modules[name] = importlib.import_module(name)
        except ImportError:  # of another system
            continue
    answered = {name: x for name, x in known.items() if name not in modules and not hasattr(builtins, name)}
    answered = answered or {name: x for name, x in known.items() if name not in modules} or known
    return {**modules, **answered}


def run_tests(judge: Judge, tests: str) -> None:
    code = compile(tests, "<tests>", "exec")
    for line in IMPORT.findall(tests):  # in one piece with them, the program could use what they import
        try:
            judge.ask("execute", line)
        except Exception:
            continue
    exec(code, find_names(judge, code))


def judge(source: int, target: int, request: dict[str, str]) -> tuple[str, str]:
    """Have the program run and run the tests: ("passed" or "failed", detail).

    The first is "gone" if the program's process has ended before, "odd" if it sent what is no message. request: the
    sources ``before``, ``program`` and ``tests``.
    """
    sys.stdin = None  # reading from it is an error
    sys.stdout = sys.stderr = io.StringIO()
    judge = Judge(source, target)
    status, detail = "passed", ""
    try:
        if request["before"]:
            judge.ask("prepare", request["before"])
        judge.ask("execute", request["program"])
        if request["tests"]:
            run_tests(judge, request["tests"])
    except BaseException as error:
        status = "failed"
        try:
            detail = f"{type(error).__name__}: {error}"[:500]
        except BaseException:
            detail = UNPRINTABLE
    if judge.ended:  # even if a test has caught that
        status, detail = "gone" if judge.ended == GONE else "odd", f"the program sent {judge.ended}"
    return status, detail
