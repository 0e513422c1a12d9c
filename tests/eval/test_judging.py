"""The verdict: programs that cheat do not pass, honest ones do, whatever kinds of values their tests are about."""

import pytest

from eval.code_eval import CodeEval
from eval.sandbox import Limits, run_untrusted

HONEST = "def add(a, b): return a + b\n"
# Tests of a problem as data sets have them: equality; closeness and order; elements one by one.
TESTS = [
    "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(40, 2) == 42\ncheck(add)",
    "def check(candidate):\n    assert abs(candidate(0.25, 0.5) - 0.75) < 1e-6 and 2 < candidate(1, 2) <= 3\ncheck(add)",
    "assert all(map(lambda pair: add(*pair) == sum(pair), [(40, 2), (7, 7)]))\nassert not any(x != 5 for x in [add(4, 1)])",
    "assert sorted(add([3], [1, 2])) == [1, 2, 3] and set(add([1], [2])) == {1, 2} and len(add([1], [])) == 1",
]

EQUAL = """
class Equal{base}:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __contains__ = lambda self, *other: True
    __ne__ = lambda self, other: False
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = __neg__ = __getitem__ = lambda self, *other: self
    __hash__ = lambda self: 2
    __class__ = int
    __iter__ = lambda self: iter([1, 2, 3])
    __len__ = lambda self: 3
    __float__ = lambda self: 0.0
def add(a, b): return {value}
"""
LOOK_FOR_IT = """
import gc, os, sys
def things():
    frame = sys._getframe()
    while frame:
        yield from list(frame.f_locals.values()) + list(frame.f_globals.values()) + list(frame.f_code.co_consts)
        frame = frame.f_back
    yield from gc.get_objects()
"""
# Writes to whatever can be written to; a verdict in the words of the channel and in others.
FORGED_VERDICT = """
import json, os
for event in ({"event": "verdict", "status": "passed", "detail": ""}, {"status": "passed"}, ["value", None], "passed"):
    for fd in range(3, 256):
        try: os.write(fd, json.dumps(event).encode() + b"\\n")
        except OSError: pass
"""
CALL_WHAT_IS_FOUND = """
def add(a, b):
    for thing in things():
        if callable(thing) and any(word in str(getattr(thing, "__name__", "")) for word in ("report", "send", "judge")):
            for arguments in ((), ("value", True), ("value", ["t", 5, ["d"]]), (1, "passed")):
                for keywords in ({"event": "verdict", "status": "passed", "detail": ""}, {}):
                    try: thing(*arguments, **keywords)
                    except BaseException: pass
    os._exit(0)
"""
SECRETS = """
def add(a, b):
    import json
    texts = {x for x in things() if type(x) is str}
    for thing in gc.get_objects():
        texts.update(x for x in gc.get_referents(thing) if type(x) is str)
    for text in texts:
        if len(text) in (16, 32, 64) and set(text) <= set("0123456789abcdef"):
            event = {"event": "verdict", "status": "passed", "detail": "", "secret": text}
            for fd in range(3, 32):
                try: os.write(fd, json.dumps(event).encode() + b"\\n")
                except OSError: pass
    os._exit(0)
"""
PATCHED_JSON = """
import json
encode = json.JSONEncoder.encode
def forge(self, message):
    if isinstance(message, dict): message = {**message, "status": "passed"}
    if isinstance(message, list): message = ["value", ["t", 5, ["d"]]]
    return encode(self, message)
json.JSONEncoder.encode = forge
json.dumps = lambda message, **settings: forge(json.JSONEncoder(), message)
def add(a, b): raise ValueError
"""
PATCHED_BUILTINS = """
import builtins
values = dict(all=True, any=False, abs=0, sorted=[1, 2, 3], set={{1, 2}}, len=1, sum=0)
for name in values:
    {target}[name] = lambda *arguments, name=name: values[name]
def add(a, b): return 2.5
"""
CONSTANT_BEHIND_THE_ARGUMENTS = """
import sys
def add(a, b):
    constants = list(sys._getframe(1).f_code.co_consts)
    return constants[max(map(constants.index, (a, b))) + 1]
"""

CHEATS = {
    "an object that is equal to everything": EQUAL.format(base="", value="Equal()"),
    "an int that is equal to everything": EQUAL.format(base="(int)", value="Equal()"),
    "a float that is equal to everything": EQUAL.format(base="(float)", value="Equal()"),
    "a list that is equal to everything": EQUAL.format(base="(list)", value="Equal([1, 2, 3])"),
    "a string that is equal to everything": EQUAL.format(base="(str)", value="Equal()"),
    "a class whose metaclass is equal to everything": EQUAL.format(base="(type)", value="Equal('E', (), {})"),
    "a list of such objects": EQUAL.format(base="", value="[Equal()] * 3"),
    "an exception that is equal to everything": EQUAL.format(base="(Exception)", value="Equal()"),
    "an exception raised that ends an iteration": "def add(a, b):\n  if b in (2, []): raise StopIteration\n  return a + b",
    "an exception of its own that ends an iteration": "class E(StopIteration): pass\ndef add(a, b):\n"
    "  if a == 40: raise E\n  return 5",
    "the expected value from the frames": CONSTANT_BEHIND_THE_ARGUMENTS,
    "the expected value from the source of the tests": LOOK_FOR_IT + "def add(a, b):\n  import re\n"
    "  [text] = {x for x in things() if type(x) is str and 'assert candidate' in x and 'things' not in x}\n"
    "  return eval(re.search(rf'candidate.{a}, {b}. == (.*)', text)[1])",
    "the code of the tests, replaced": LOOK_FOR_IT + "def add(a, b):\n  for x in things():\n"
    "    if callable(x) and getattr(x, '__name__', '') == 'check': x.__code__ = (lambda c: None).__code__",
    "patched builtins": PATCHED_BUILTINS.format(target="vars(builtins)"),
    "globals that hide builtins": PATCHED_BUILTINS.format(target="globals()"),
    "patched json": PATCHED_JSON,
    "patched os": "import os\nwrite = os.write\nos.write = lambda fd, data: write(fd, data.replace(b'raised', b'value'))\n"
    "def add(a, b): raise ValueError",
    "a verdict written everywhere": FORGED_VERDICT + "def add(a, b): return None",
    "a verdict written everywhere, and out": FORGED_VERDICT + "os._exit(0)",
    "a verdict written in the first call": "def add(a, b):\n  " + FORGED_VERDICT.strip().replace("\n", "\n  "),
    "replies ahead of time": "import os\nfor fd in range(3, 64):\n"
    '  try: os.write(fd, b\'["value",["t",true,["d"]]]\\n\' * 50)\n  except OSError: pass\n' + HONEST,
    "everything called that looks like a report": LOOK_FOR_IT + CALL_WHAT_IS_FOUND,
    "a verdict with every secret that is found": LOOK_FOR_IT + SECRETS,
    "leaving with 0": "import os\nos._exit(0)",
    "leaving with 0 in the first call": "import os\ndef add(a, b): os._exit(0)",
    "SystemExit(0)": "def add(a, b): raise SystemExit(0)",
    "SystemExit(0) at once": "raise SystemExit(0)",
    "a hook at the exit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise SystemExit(0)",
    "the end of the file": HONEST.replace("a + b", "a") + 'text = """',
    "a branch not taken": HONEST.replace("a + b", "a") + "if False:\n  ",
    "a trace that mends": "import sys\ndef add(a, b): return a\ndef trace(frame, event, arg):\n"
    "  if event == 'exception': frame.f_lineno += 1\n  return trace\nsys.settrace(trace)",
    "a child that says it again": "import os\nif os.fork() == 0:\n  def add(a, b): return 5\nelse:\n  def add(a, b): return 0",
}


# Which of the tests a cheat is made for, if not the first.
AIMED_AT = {
    "a float that is equal to everything": 1,
    "a class whose metaclass is equal to everything": 2,
    "an exception raised that ends an iteration": 3,
    "an exception of its own that ends an iteration": 2,
    "patched builtins": 1,
    "globals that hide builtins": 2,
}


def test_cheats_do_not_pass(consent):
    """By the metric, next to honest answers that do pass."""
    tests = [*[TESTS[AIMED_AT.get(name, 0)] for name in CHEATS], *TESTS]
    answers = [[answer] for answer in [*CHEATS.values(), *[HONEST] * len(TESTS)]]
    _, results = CodeEval().compute(references=tests, predictions=answers, k=[1], num_workers=2)
    passed = [outcome["passed"] for [(_, outcome)] in results.values()]
    assert [name for name, passes in zip(CHEATS, passed, strict=False) if passes] == []
    assert passed[len(CHEATS) :] == [True] * len(TESTS)


NUMPY_CHEAT = """
class Array:
    __array_priority__ = 1000
    __array_interface__ = {"data": (0x10000, False), "shape": (1,), "typestr": "<f8", "version": 3}
    __array__ = __array_ufunc__ = __array_function__ = lambda self, *a, **k: True
    __array_struct__ = None
    __len__ = lambda self: 1
    __iter__ = lambda self: iter([0.0])
    __float__ = lambda self: 0.0
def add(a, b): return Array()
"""


def test_arrays_that_agree_with_everything_do_not_pass():
    pytest.importorskip("numpy")
    tests = "import numpy as np\nassert np.allclose(add(1.0, 2.0), 3.0) and (np.array([3.0]) == add(1.0, 2.0)).all()"
    limits = Limits(seconds=30, cpu_seconds=30, memory_mb=4096)
    assert run_untrusted(HONEST, limits, tests=tests).passed
    assert not run_untrusted(NUMPY_CHEAT, limits, tests=tests).passed


MODULE_CHEAT = "class math:\n  isclose = lambda *a, **k: True\ndef root(x): return 0"


def test_modules_of_the_standard_library_are_the_judges_own():
    tests = "assert math.isclose(root(2), 2 ** 0.5)"
    assert run_untrusted("import math\ndef root(x): return math.sqrt(x)", tests=tests).passed
    assert not run_untrusted(MODULE_CHEAT, tests=tests).passed
    assert not run_untrusted(
        "import math\n" + MODULE_CHEAT + "\nmath.isclose = lambda *a, **k: True", tests=tests
    ).passed


# What the judge shows of itself: objects of the tests, and no way from them to anything else.
CLIMB = """
def climb(thing):
    for path in ("__globals__", "__init__.__globals__", "__class__", "__self__", "gi_frame.f_globals", "_secret",
                 "__func__.__globals__", "__call__.__globals__", "__code__.co_consts", "f_back", "__dict__"):
        found = thing
        try:
            for name in path.split("."):
                found = thing._Remote__place[0].ask("getattr", found, name)
        except BaseException:
            continue
        return found
    for words in (("getattr", "{0.__class__}", "format"), ("getattr", [], "append"), ("call", print, [1], {}),
                  ("getitem", {}, 1), ("setattr", thing, "_secret", 3)):
        try: return thing._Remote__place[0].ask(*words)
        except Exception: continue
    return "nothing"
"""


@pytest.mark.parametrize(
    "given",
    ["lambda x: expected", "(x for x in [expected])", "Box()", "Box().get", "Box", "sorted", "iter([expected])"],
)
def test_objects_of_the_tests_are_no_way_to_the_judge(given):
    tests = f"""
expected = 12345
class Box:
    _secret = expected
    def get(self): return 1
found = climb({given})
assert found == "nothing", found
"""
    assert run_untrusted(CLIMB, tests=tests).status == "passed"


HONEST_AND_WRONG = [
    # Values: of each kind, and nested.
    ("def f(): return None, True, 1, 2.5, 'x', b'y', 1j", "assert f() == (None, True, 1, 2.5, 'x', b'y', 1j)", "1j", "2j"),
    ("def f(): return {1: [(2, {3}), frozenset([4])]}", "assert f() == {1: [(2, {3}), frozenset({4})]}", "{3}", "[3]"),
    ("def f(): return [float('nan'), float('inf')]", "a, b = f()\nassert a != a and b > 1e300", "inf", "1"),
    ("def f(n): return 7 ** n", "assert f(9999) == 7 ** 9999 and f(-1) == 1 / 7", "7", "8"),
    ("def f(s): return s[::-1]", "assert f('a\\ud800\\n') == '\\n\\ud800a'", "-1", "1"),
    ("def f(): return [[[[[]]]]]", "assert f() == [[[[[]]]]]", "[[[[[]", "[[[[()"),
    ("def f(): return int, ValueError", "assert f() == (int, ValueError)", "int", "str"),
    ("def f(x): return type(x)", "assert f([]) is list and f(1) is int", "type(x)", "type(str)"),
    (
        "def f(x): return x",
        "for n in (1023, 1024, 1025, 5000):\n  for kind in (list, tuple, set, frozenset, dict.fromkeys):\n"
        "    x = kind(map(str, range(n)))\n    assert f(x) == x and f([x, 1]) == [x, 1]",
        "return x",
        "return x if len(x) < 1025 else x and None",
    ),
    ("def f(): return ['a~b', 'c'], [1, 'a'], ['a', 1], ['', '']", "assert f() == (['a~b', 'c'], [1, 'a'], ['a', 1], ['', ''])",
     "['', '']", "['~']"),
    # Values of subclasses are plain.
    ("import collections\ndef f(x): return collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", "(x)", "('ab')"),
    ("from collections import namedtuple\ndef f(): return namedtuple('P', 'x')(3)", "assert f() == (3,)", "3", "4"),
    ("import enum\nclass E(enum.IntEnum): A = 3\ndef f(): return E.A", "assert f() == 3", "A = 3", "A = 4"),
    ("def f(): return True", "assert f() is True", "True", "1"),
    # The standard library's.
    ("from decimal import Decimal\ndef f(): return Decimal('0.1')", "assert f() * 10 == 1", "0.1", "0.2"),
    ("from fractions import Fraction\ndef f(): return Fraction(1, 3)", "assert f() * 3 == 1", "1, 3", "1, 2"),
    ("import datetime\ndef f(): return datetime.date(2024, 2, 29)", "assert f().month == 2", "2, 29", "1, 29"),
    ("from collections import deque\ndef f(): return deque([1])", "assert list(f()) == [1]", "[1]", "[2]"),
    ("def f(): return {1: 2}.keys()", "assert f() == {1}", "1: 2", "2: 1"),
    ("def f(): return range(3)", "assert f() == range(3) and list(f()) == [0, 1, 2]", "3", "4"),
    # Objects of the answer.
    ("def f(n):\n  while n: yield n; n -= 1", "assert list(f(3)) == [3, 2, 1] and next(f(5)) == 5", "yield n", "yield 1"),
    ("def f(x): return map(abs, x)", "assert sum(f([-1, 2])) == 3", "abs", "float"),
    ("def f(x): return lambda y: x - y", "assert f(5)(3) == 2 and f(y := 1)(y) == 0", "x - y", "y - x"),
    ("class P:\n  def __init__(s, x): s.x = x\n  def twice(s): return 2 * s.x", "p = P(2)\np.x += 1\nassert p.twice() == 6",
     "2 *", "3 *"),
    ("class P:\n  def __init__(s, x): s.x = x\n  def __eq__(s, o): return s.x == o.x\n  def __add__(s, o): return P(s.x + o.x)",
     "assert P(1) + P(2) == P(3) and P(1) != P(2) and isinstance(P(1), P)", "s.x +", "s.x -"),
    ("class N:\n  def __init__(s, v): s.v, s.next = v, None\ndef f(n):\n  return n.v + f(n.next) if n else 0",
     "a = N(1)\na.next = N(2)\na.next.next = N(3)\nassert f(a) == 6", "n.v +", "1 +"),
    ("class S:\n  def __init__(s): s.x = []\n  def __len__(s): return len(s.x)\n  def push(s, v): s.x.append(v)",
     "s = S()\ns.push(1)\ns.push(2)\nassert len(s) == 2 and s and s.x == [1, 2]", "append(v)", "append(1)"),
    ("class G:\n  def __getitem__(s, k): return k * 2\n  def __str__(s): return 'G'", "assert G()[4] == 8 and str(G()) == 'G'",
     "* 2", "* 3"),
    # Objects of the tests.
    ("def f(g, x): return g(g(x))", "assert f(lambda x: x + 1, 1) == 3 and f(str, 1) == '1'", "g(g(x))", "g(x)"),
    ("def f(x, *kinds): return [isinstance(x, kind) for kind in kinds]", "assert f(1, int, str) == [True, False]",
     "(x, kind)", "(kind, type)"),
    ("def depth(t): return 1 + max(depth(t.left), depth(t.right)) if t else 0",
     "class T:\n  def __init__(s, l=None, r=None): s.left, s.right = l, r\nassert depth(T(T(T()), T())) == 3", "max", "min"),
    ("def total(xs): return sum(xs)", "assert total(x * x for x in [1, 2, 3]) == 14", "sum(", "len("),
    ("def run(f):\n  try: return f()\n  except KeyError as e: return e.args[0]",
     "def f(): raise KeyError('k')\nassert run(f) == 'k'", "args[0]", "args[1:]"),
    ("def order(xs, key): return sorted(xs, key=key)", "assert order([1, -2, 3], key=lambda x: x * x) == [1, -2, 3]",
     "key=key", "key=str"),
    # Changes of arguments.
    ("def f(x): x.append(4)", "a = [3]\nf(a)\nassert a == [3, 4]", "4", "5"),
    ("def f(x, y): x.pop('a'); y.add(1)", "a, b = {'a': 1}, set()\nf(a, b)\nassert (a, b) == ({}, {1})", "add(1)", "add(2)"),
    ("def f(x): x.sort(); return x", "a = [3, 1]\nassert f(a) == [1, 3] and a == [1, 3]", "x.sort()", "x = sorted(x)"),
    # Exceptions.
    ("def f(x): raise ValueError('bad')", "try: f(1)\nexcept ValueError as e: assert str(e) == 'bad'\nelse: assert 0",
     "bad", "worse"),
    ("class Bad(KeyError): pass\ndef f(x): raise Bad(x)",
     "try: f(1)\nexcept Bad as e: assert e.args == (1,)\nelse: assert 0", "Bad(x)", "KeyError(x)"),
    ("def f(x): raise IndexError", "try: f(1)\nexcept LookupError: pass", "IndexError", "TypeError"),
    ("def f(x): return x[5]", "import contextlib\nwith contextlib.suppress(IndexError): f([]); assert 0", "x[5]", "5"),
    # Names.
    ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", "a + b", "a - b"),
    ("def f(x): return math.floor(x)", "import math\nassert f(2.5) == 2", "floor", "ceil"),
    ("LIMIT = 3\ndef f(x): return min(x, LIMIT)", "assert f(9) == LIMIT", "min(x, LIMIT)", "x"),
    ("x = 1\ndef f():\n  global x\n  x += 1\n  return x", "assert [f(), f()] == [2, 3]", "+= 1", "+= 2"),
    ("def f(): return __name__", "assert f() != '__main__'", "__name__", "'__main__'"),
    ("import numpy as np\ndef f(): return np.float32(0.5), np.int64(3), np.bool_(True)", "assert f() == (0.5, 3, True)",
     "int64(3)", "int64(4)"),
]  # fmt: skip


@pytest.mark.parametrize("answer, tests, part, wrong", HONEST_AND_WRONG)
def test_honest_answers_pass_and_wrong_ones_fail(answer, tests, part, wrong):
    limits = Limits(seconds=20, cpu_seconds=20, memory_mb=4096)
    if "numpy" in answer:
        pytest.importorskip("numpy")
    verdict = run_untrusted(answer, limits, tests=tests)
    assert verdict.passed, verdict
    assert part in answer
    verdict = run_untrusted(answer.replace(part, wrong), limits, tests=tests)
    assert verdict.status == "failed", verdict


def test_objects_that_have_to_stay_with_the_tests_are_named():
    verdict = run_untrusted("def f(x): return 1", tests="import re\nassert f(re) == 1")
    assert verdict.status == "failed" and "module objects cannot be given" in verdict.detail
