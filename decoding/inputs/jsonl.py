"""JSON lines, read in one way wherever the project reads them: a record ends at a newline and nowhere else."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"  # some editors write it, and `cat` carries it into the middle of a file


def read_jsonl(field: str, path: str | Path, skip_broken: bool = False) -> Iterator[tuple[int, Any]]:
    """The number of each line of a .jsonl or .jsonl.gz file, from 1 on, and the JSON value in it.

    Lines end at "\\n" alone: the other characters that Unicode counts as line ends may stand in a text. Blank lines and
    byte-order marks are passed over. Raises ValueError, which begins with ``field``, for a file that cannot be read and
    for a line that is not UTF-8 or not JSON; ``skip_broken`` passes over such lines, as a kill leaves them.
    """
    shown = f"{field}: {str(path)!r} cannot be read"
    try:
        with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(BOM).rstrip(b"\r\n")
                if not line.strip():
                    continue
                try:
                    value = parse(line)
                except ValueError as error:
                    if skip_broken:
                        continue
                    raise ValueError(f"{shown}: line {number} {error}") from None
                yield number, value
    except FileNotFoundError:
        raise ValueError(f"{field}: the file {str(path)!r} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{shown}: {getattr(error, 'strerror', None) or error}") from None


def parse(text: bytes) -> Any:
    """The JSON value in UTF-8 ``text``; raises ValueError with the rest of a sentence: "is not JSON: ..."."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte 0x{text[error.start]:02x} at place {error.start + 1})") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"is not JSON: {error.msg} at {line}column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"is not JSON that can be read: {error}") from None
