"""Every dotted name of ours that a message or a docstring gives can be imported."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("decoding", "sbd", "rpt", "dfm", "steering", "finetune", "eval", "setflow")
# ``sbd.TopK`` or "sbd:TopK", but neither a path such as rules/sbd.py nor a file such as eval.json.
DOTTED = re.compile(rf"(?<![\w./-])({'|'.join(PACKAGES)})((?:[.:][A-Za-z_]\w*)+)(?![\w/-])")
FILES = {"py", "yaml", "json", "jsonl", "md", "svg", "txt"}


def texts(path: Path) -> list[tuple[int, str]]:
    """The strings of a file, docstrings and pieces of f-strings among them, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, node.value) for node in nodes]


def names(text: str) -> list[str]:
    found = []
    for match in DOTTED.finditer(text):
        name = match[0]
        if name.rpartition(".")[2] in FILES:
            continue
        if ":" in name and text[match.end() :].startswith("="):  # a decoder's spec, such as sbd:block_size=8
            continue
        found.append(name.replace(":", "."))
    return found


def resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            fields = getattr(value, "__dataclass_fields__", {})
            if not hasattr(value, attribute) and attribute not in fields:
                return False
            value = getattr(value, attribute, None)
        return True
    return False


@pytest.mark.parametrize("package", PACKAGES)
def test_names_in_messages_and_docstrings_resolve(package):
    for extra in ("lm_eval", "datasets", "peft", "accelerate", "matplotlib"):
        pytest.importorskip(extra, reason=f"needs {extra}: install the extras [eval] and [train]")
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for line, text in texts(path):
            wrong += [f"{path.relative_to(ROOT)}:{line}: {name}" for name in names(text) if not resolves(name)]
    assert not wrong


def test_the_search_finds_what_it_should():
    text = (
        "decoding.load_model, :func:`rpt.load_offset_code`, 'rpt:load_offset_code', sbd:SetBlockObjective, dfm.nothing"
    )
    found = ["decoding.load_model", *["rpt.load_offset_code"] * 2, "sbd.SetBlockObjective", "dfm.nothing"]
    assert names(text) == found
    assert [resolves(name) for name in found] == [True, True, True, True, False]
    assert names("eval/tasks/own.py, eval.json, sbd:block_size=4, a.sbd.b, finetune. Then") == []
    assert resolves("decoding.batch.Sequence.tokens") and not resolves("setflow.no_such_function")
