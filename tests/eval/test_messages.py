"""Messages that no honest process sends: each is a failed answer, and none ends an evaluation."""

import json
import signal

import pytest

from eval.code_eval import CodeEval
from eval.sandbox import Limits, run_untrusted
from eval.sandboxing.outside import Over, check_report, explain_end
from eval.sandboxing.values import Odd, decode, encode, parse

HONEST = "def add(a, b): return a + b\n"
TESTS = "assert add(2, 3) == 5\nassert add(1, 1) == 2"
DEEP = '["l",' * 20_000 + "1" + "]" * 20_000
# What the program writes where its replies go, a line each.
LINES = {
    "nothing but brackets": "[" * 200_000,
    "braces": '{"a":' * 100_000,
    "a value in too many lists": f'["value",{DEEP}]',
    "a value in 500 lists": f'["value",{"[" * 500}{"]" * 500}]',
    "no list": '"value"',
    "an object": '{"event": "verdict", "status": "passed"}',
    "an empty list": "[]",
    "an unknown word": '["verdict", "passed"]',
    "no word": "[[], []]",
    "too few": '["value"]',
    "too many": '["value", 5, 5, 5]',
    "a value without a tag": '["value", [5]]',
    "an unknown tag": '["value", ["z", 5]]',
    "an object as a value": '["value", {"a": 5}]',
    "half a dictionary": '["value", ["d", 5]]',
    "a set of lists": '["value", ["s", ["l"]]]',
    "no number": '["value", ["i", "five"]]',
    "a number of another kind": '["value", ["i", 5]]',
    "a number too long": '["value", ' + "9" * 10_000 + "]",
    "not a number": '["value", NaN]',
    "a call's value without its changes": '["value", 5]',
    "changes of what was not given": '["value", ["t", 5, ["d", 7, ["l"]]]]',
    "changes of what cannot change": '["value", ["t", 5, ["d", 0, 6]]]',
    "changes that are none": '["value", ["t", 5, 6]]',
    "a reference to nothing": '["value", ["r", 1000000]]',
    "a reference backwards": '["value", ["r", -1]]',
    "a reference without a number": '["value", ["o"]]',
    "a reference to a text": '["value", ["o", "x"]]',
    "an exception of no kind": '["raised", 5, ["t"], "text"]',
    "an exception that is none": '["raised", ["y", "int"], ["t"], "text"]',
    "an exception that is no type": '["raised", ["y", "print"], ["t"], "text"]',
    "an exception with odd arguments": '["raised", ["y", "UnicodeDecodeError"], 5, "text"]',
    "an exception without a text": '["raised", ["y", "ValueError"], ["t"], 5]',
    "an exception class of no base": '["raised", ["e", 1, "E", "int"], ["t"], "text"]',
    "an exception class of no name": '["raised", ["e", 1, 5, "ValueError"], ["t"], "text"]',
    "a kind of no library": '["value", ["v", "os.system", "true"]]',
    "a kind with odd parts": '["value", ["v", "fractions.Fraction", 1, 0]]',
    "a question for nothing": '["ask", "verdict", ["t"]]',
    "a question that is no text": '["ask", [], ["t"]]',
    "a question without arguments": '["ask", "getattr", 5]',
    "a question about a value": '["ask", "getattr", ["t", "{0.__class__}", "format"]]',
    "a call of a value": '["ask", "call", ["t", ["y", "exec"], ["l", "1"], ["d"]]]',
    "no text": "\udc80\udcff",
    "a name with a null": '["raised", ["e", 1, "\\u0000", "ValueError"], ["t"], "text"]',
}
WRITE = """
def add(a, b):
    import os
    for fd in range(3, 32):
        try:
            data = memoryview({line!r}.encode(errors="surrogateescape") + b"\\n")
            while data: data = data[os.write(fd, data):]
        except OSError: pass
    return 5
"""
ENDS = {
    **{
        f"signal {number}": f"import os\ndef add(a, b): os.kill(os.getpid(), {number})" for number in (1, 9, 35, 50, 64)
    },
    **{f"code {code}": f"import os\ndef add(a, b): os._exit({code})" for code in (-1, 255, 2**31)},
    "an exception with half a character": "def add(a, b): raise ValueError('\\ud800')",
    "an exception with an endless text": "def add(a, b): raise ValueError('x' * 10**7)",
    "an exception that raises": "class E(Exception):\n  def __str__(self): raise self\ndef add(a, b): raise E",
    "an exception whose arguments are odd": "class E(Exception): args = 5\ndef add(a, b): raise E",
    "a type with an odd name": "class M(type): __name__ = 5\nclass E(Exception, metaclass=M): pass\ndef add(a, b): raise E",
    "a value that contains itself": "x = []\nx.append(x)\ndef add(a, b): return x",
    "a value of many bytes": "def add(a, b): return 'x' * 10**8",
    "a number of many digits": "def add(a, b): return 10 ** 10 ** 6",
    "no names": "class D(dict): __contains__ = lambda s, k: 1/0\n" + HONEST + "globals().clear()",
}


def test_hostile_messages_fail_and_end_nothing(consent):
    """Side by side with an honest answer, which passes: the evaluation goes on."""
    hostile = {name: WRITE.format(line=line) for name, line in LINES.items()} | ENDS
    answers = [*hostile.values(), HONEST]
    _, results = CodeEval().compute(references=[TESTS], predictions=[answers], k=[1], num_workers=2)
    passed = [outcome["passed"] for _, outcome in results[0]]
    assert [name for name, passes in zip(hostile, passed, strict=False) if passes] == [] and passed[-1]
    for _, outcome in results[0]:
        json.dumps(outcome["result"], ensure_ascii=False).encode()  # can be written down


@pytest.mark.parametrize("line", [LINES["no list"], LINES["a value without a tag"], LINES["a question for nothing"]])
def test_a_test_cannot_overlook_an_odd_message(line):
    tests = "for i in range(3):\n  try: assert add(2, 3) == 5\n  except BaseException: pass"
    verdict = run_untrusted(WRITE.format(line=line), Limits(seconds=10), tests=tests)
    assert verdict.status == "failed" and "the program sent" in verdict.detail
    assert run_untrusted("def add(a, b): raise BaseException", tests=tests).passed


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"[" * 200_000,
        b'{"event": []}',
        b'{"event": "verdict"}',
        b'{"event": "verdict", "status": 1, "detail": ""}',
        b'{"event": "exited", "name": "judge", "code": "0", "cpu_seconds": 1}',
        b'{"event": "exited", "name": "judge", "code": true, "cpu_seconds": 1}',
        b'{"event": "refused"}',
        b'{"event": "started", "judge": 1}',
        b"\xff\xfe",
    ],
)
def test_a_report_is_checked(line):
    with pytest.raises(Over):
        check_report(line)


@pytest.mark.parametrize("number", [35, 50, 65, 999])
def test_a_signal_without_a_name_has_a_number(number):
    assert explain_end(-number, 0.1, 1) == ("died", f"signal {number}")
    assert explain_end(-signal.SIGTERM, 0.1, 1) == ("died", "signal SIGTERM")
    assert explain_end(number, 0.1, 1) == ("died", f"exit code {number}")


def no_reference(value):
    raise TypeError(value)


def test_values_come_back_as_they_were():
    values = [
        None,
        True,
        -(2**70),
        1.5,
        float("inf"),
        "ü\ud800",
        b"\xff",
        {1: {2}},
        frozenset("a"),
        1 - 2j,
        slice(1, 2),
    ]
    back = decode(parse(json.dumps(encode(values, no_reference))), no_reference)
    assert back == values and [type(x) for x in back] == [type(x) for x in values]
    with pytest.raises(TypeError):
        encode([object()], no_reference)
    with pytest.raises(Odd):
        decode({"a": 1}, no_reference)
