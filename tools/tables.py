"""Write the tables of README.md and docs/ from what they tell: result files, decoders, recipes, packages.

``python -m tools.tables`` (``make tables``) fills each part of a page between two comments ::

    <!-- table: results quality where=prompts:additions columns=decoder,tokens_per_forward -->
    <!-- end of table -->

and leaves all else alone. The first word names a function below, the others are its arguments.
"""

import ast
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from eval.tables import Row, markdown_of, markdown_table
from finetune.recipe_file import first_sentence, packaged_recipes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(?P<start><!-- table: (?P<call>.+?) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)
PACKAGES = (
    "decoding",
    "sbd",
    "rpt",
    "dfm",
    "steering",
    "finetune",
    "eval",
    "serving",
    "setflow",
    "benchmarks",
    "tools",
)  # by floor
AS_PERCENT = ("exact_match", "overhead_share", "share_of_copy")


def fill(text: str) -> str:
    """The page ``text`` with each of its tables made anew. Raises ValueError for a table of unknown kind or arguments."""

    def table(match: re.Match) -> str:
        kind, *arguments = shlex.split(match["call"])
        if kind not in KINDS:
            raise ValueError(f"a table is one of {', '.join(KINDS)}, got {kind!r}")
        names = [argument for argument in arguments if "=" not in argument]
        options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        return f"{match['start']}\n{KINDS[kind](*names, **options)}\n\n{match['end']}"

    return TABLE.sub(table, text)


def results(name: str, columns: str, where: str = "", pivot: str = "", limit: str = "") -> str:
    """Rows of ``benchmarks/results/NAME.json``, and under them how they were measured.

    columns: the fields to show. where: ``field:value;...``, the rows to show. pivot: ``field:value``, one column for each
    value of the first field, holding the second. limit: how many rows.
    """
    told = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    wanted = [condition.split(":", 1) for condition in where.split(";") if condition]
    rows = [row for row in told["rows"] if all(str(row.get(field)) == value for field, value in wanted)]
    if not rows:
        raise ValueError(f"{name}.json has no row where {where}")
    shown = columns.split(",")
    if unknown := [field for field in shown if not any(field in row for row in rows)]:
        raise ValueError(f"{name}.json has no field {unknown[0]!r}")
    if pivot:
        rows, shown = _pivoted(rows, shown, *pivot.split(":"))
    rows = rows[: int(limit)] if limit else rows
    body = [{field: _shown(field, row.get(field)) for field in shown} for row in rows]
    return f"{markdown_of(body, shown)}\n\n{_conditions(name, told)}"


def _pivoted(rows: Iterable[Row], columns: list[str], field: str, value: str) -> tuple[list[Row], list[str]]:
    merged: dict[tuple, dict[str, Any]] = {}
    heads: dict[str, None] = {}
    for row in rows:
        head = row[field] if isinstance(row[field], str) else f"{row[field]} {field}"
        heads[head] = None
        key = tuple(row.get(column) for column in columns)
        merged.setdefault(key, dict(zip(columns, key, strict=True)))[head] = _shown(value, row.get(value))
    return list(merged.values()), [*columns, *heads]


def _shown(field: str, value: Any) -> Any:
    if isinstance(value, float) and field in AS_PERCENT:
        return f"{100 * value:.3g} %"
    if field.endswith("bytes") and isinstance(value, int):
        return f"{value / 1e6:.0f} MB"
    if field in ("decoder", "what"):
        return f"`{value}`"
    return f"{value:.4g}" if isinstance(value, float) else value


def _conditions(name: str, told: dict[str, Any]) -> str:
    said = told.get("conditions", {"device": told.get("device")})
    parts = [said.get("device"), said.get("dtype"), *(f"{k} {said[k]}" for k in ("torch", "transformers") if k in said)]
    measured = ", ".join(str(part) for part in parts if part)
    return f"*{measured}; `{told['command']}`, `benchmarks/results/{name}.json`.*"


def decoders() -> str:
    """What a decoder spec may name, with the first sentence of each class."""
    from decoding.inputs.checks import named_object
    from decoding.inputs.spec import DECODERS

    said = {
        "prompt-lookup": "The same, drafting what followed the last tokens before: any model, no training.",
        "power": "The same without a reward: texts by the power `alpha` of the model's distribution.",
    }
    needed = {"smc": "decoder, reward"}  # what has no default that does anything
    body = []
    for name, (place, values) in DECODERS.items():
        arguments = needed.get(name) or ", ".join(f"{key}={value!r}" for key, value in values.items())
        made_by = f"{place[1]}({arguments})"
        docstring = named_object(name, ":".join(place)).__doc__
        sentence = said.get(name) or first_sentence(" ".join(docstring.split())).replace("``", "`")
        body.append([f"`{name}`", f"`{made_by}`", sentence])
    return markdown_table(["spec", "in Python", "what it does"], body)


def recipes() -> str:
    """The recipes that ``setflow finetune`` knows by name, with what the first sentence of each file says."""
    return markdown_table(
        ["recipe", "what it does"], ([f"`{name}`", text] for name, text in packaged_recipes().items())
    )


def packages() -> str:
    """The packages of this project by floor, with the first line of each one's docstring."""
    body = []
    for name in PACKAGES:
        docstring = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8"))) or ""
        body.append([f"`{name}/`", first_sentence(docstring.split("\n\n")[0].replace("\n", " "))])
    return markdown_table(["package", "what it holds"], body)


KINDS: dict[str, Callable[..., str]] = {f.__name__: f for f in (results, decoders, recipes, packages)}


def pages() -> list[Path]:
    """Every page that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            filled = fill(text)
        except (ValueError, TypeError, OSError) as error:
            print(f"{page.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 2
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
