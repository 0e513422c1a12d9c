"""Python source that every machine has: the standard library, cut into pieces at top-level definitions.

Files are split by a hash of their path inside the library, so a file that is held out here is held out under every
Python version.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

HELD_OUT_SHARE = 0.05
# Tests repeat themselves, encodings are tables, and the rest is generated or old.
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "__pycache__"}


def library_files(held_out: bool) -> Iterator[Path]:
    """Yield the library's source files of one side of the split, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        if (int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32) == held_out:
            yield path


def pieces(source: str, characters: int = 1500) -> Iterator[str]:
    """Cut ``source`` at top-level statements into pieces of about ``characters``; a longer statement stays whole.

    >>> list(pieces("import os\\n\\ndef f():\\n    pass\\n", characters=10))
    ['import os\\n', 'def f():\\n    pass\\n']
    """
    lines = source.splitlines(keepends=True)
    starts = [_first_line(statement) for statement in ast.parse(source).body]
    piece = ""
    for start, end in pairwise([*starts, len(lines)]):
        statement = "".join(lines[start:end])
        if piece and len(piece) + len(statement) > characters:
            yield piece.strip("\n") + "\n"
            piece = ""
        piece += statement
    if piece.strip():
        yield piece.strip("\n") + "\n"


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min(node.lineno for node in [statement, *decorators]) - 1


def library_pieces(held_out: bool) -> Iterator[str]:
    """Yield the pieces of every readable file of one side of the split."""
    for path in library_files(held_out):
        try:
            source = path.read_text(encoding="utf-8")
            yield from pieces(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
