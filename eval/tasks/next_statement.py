"""The next statement of a function from Python's standard library, from files that no training set holds.

The prompt is a function up to one of its statements; the answer is that statement. The problems depend on the Python
version, as its library does.
"""

import ast
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from decoding.inputs.checks import check_count
from eval.python_source import library_pieces

PROMPT_CHARACTERS = 900  # about 350 tokens of a small vocabulary
SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Raise, ast.Expr, ast.Assert, ast.Delete)
SURROUNDINGS = ("def f():\n while True:\n", "async def f():\n while True:\n")


@dataclass(frozen=True)
class NextStatement:
    """``prompt`` ends with a line end; ``answer`` is the statement as it stands in the file, with its indent.

    >>> problem = NextStatement("def double(x):\\n", "    return 2 * x\\n")
    >>> problem.is_answered_by("    return 2  * x\\n\\n\\ndef triple(x):\\n")
    True
    """

    prompt: str
    answer: str

    def is_answered_by(self, completion: str) -> bool:
        """True if the first statement of ``completion`` is the answer, up to white space."""
        return first_statement(completion).split() == self.answer.split()


def first_statement(completion: str) -> str:
    """The shortest run of lines at the start of ``completion`` that is a statement, or its first line if none is."""
    lines = completion.strip("\n").splitlines(keepends=True)
    for end in range(1, len(lines) + 1):
        text = "".join(lines[:end])
        if text.strip() and compiles(text):
            return text
    return "".join(lines[:1])


def compiles(statement: str) -> bool:
    """True if ``statement`` is valid inside a function, a coroutine or a loop."""
    inner = textwrap.indent(textwrap.dedent(statement), "  ")
    for start in SURROUNDINGS:
        try:
            compile(start + inner, "<statement>", "exec")
            return bool(statement.strip())
        except (SyntaxError, ValueError):
            continue
    return False


def next_statements(count: int, held_out: bool = True, seed: int = 0) -> list[NextStatement]:
    """``count`` problems, or as many as there are, at most one of each function, in a random but reproducible order."""
    check_count("count", count)
    draw = random.Random(seed)
    problems = []
    for piece in library_pieces(held_out):
        lines = piece.splitlines(keepends=True)
        for function in _functions(ast.parse(piece)):
            choices = [s for s in _statements(function) if _fits(function, s, lines)]
            if choices:
                chosen = draw.choice(choices)
                prompt = "".join(lines[_first_line(function) : chosen.lineno - 1])
                answer = "".join(lines[chosen.lineno - 1 : chosen.end_lineno])
                problems.append(NextStatement(prompt, answer))
    draw.shuffle(problems)
    return problems[:count]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _statements(function: ast.AST) -> Iterator[ast.stmt]:
    """Simple statements of ``function``, without docstrings and those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, SIMPLE):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            yield from _statements(node)


def _first_line(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min(node.lineno for node in [function, *function.decorator_list]) - 1


def _fits(function: ast.AST, statement: ast.stmt, lines: list[str]) -> bool:
    """True for a statement with lines of its own and a prompt of bearable length."""
    alone = not lines[statement.lineno - 1][: statement.col_offset].strip()
    first, last = lines[statement.lineno - 1 : statement.end_lineno][0], lines[statement.end_lineno - 1]
    alone = alone and ";" not in last[statement.end_col_offset :] and "#" not in last[statement.end_col_offset :]
    prompt = "".join(lines[_first_line(function) : statement.lineno - 1])
    return alone and bool(first.strip()) and 0 < len(prompt) <= PROMPT_CHARACTERS
