"""Local copies of public data sets, in the form in which the hub has them.

A data folder looks like this; each file is the authors' own:

    humaneval/HumanEval.jsonl.gz            humaneval-plus/HumanEvalPlus-Mini.jsonl.gz
    mbpp/mbpp.jsonl, sanitized-mbpp.json    mbpp-plus/MbppPlus.jsonl.gz
    gsm8k/train.jsonl, test.jsonl
"""

import json
from pathlib import Path

from decoding.inputs.jsonl import read_jsonl
from eval.tasks.plus import differential_test, restore_types

Splits = dict[str, list[dict]]  # split name: records

# The hub's splits of MBPP: task ids from, to.
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}


def read(path: Path) -> list[dict]:
    """The records of a .json, .jsonl or .jsonl.gz file; raises FileNotFoundError if there is none."""
    path.stat()
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    return [record for _, record in read_jsonl("data", path)]


def humaneval(folder: Path) -> Splits:
    return {"test": read(folder / "humaneval" / "HumanEval.jsonl.gz")}


def humaneval_plus(folder: Path) -> Splits:
    """HumanEval with the small set of additional tests; ``test`` compares with the reference solution."""
    records = read(folder / "humaneval-plus" / "HumanEvalPlus-Mini.jsonl.gz")
    for record in records:
        reference = record["prompt"] + record["canonical_solution"]
        inputs = record["base_input"] + record["plus_input"]
        program = differential_test(reference, record["entry_point"], inputs, record["atol"])
        record["test"] = program + "check = check_against_reference\n"
    kept = ("task_id", "prompt", "canonical_solution", "entry_point", "test")
    return {"test": [{key: record[key] for key in kept} for record in records]}


def mbpp(folder: Path) -> Splits:
    return _split(read(folder / "mbpp" / "mbpp.jsonl"))


def mbpp_all(folder: Path) -> Splits:
    """All 974 problems as one split."""
    return {"test": read(folder / "mbpp" / "mbpp.jsonl")}


def mbpp_sanitized(folder: Path) -> Splits:
    return _split(read(folder / "mbpp" / "sanitized-mbpp.json"))


def mbpp_sanitized_all(folder: Path) -> Splits:
    """All 427 problems of the sanitized set as one split."""
    return {"test": read(folder / "mbpp" / "sanitized-mbpp.json")}


def mbpp_plus(folder: Path) -> Splits:
    """MBPP+ as the hub has it: statement and base tests of the sanitized set; ``test`` compares with the reference."""
    sanitized = {record["task_id"]: record for record in read(folder / "mbpp" / "sanitized-mbpp.json")}
    records = []
    for plus in read(folder / "mbpp-plus" / "MbppPlus.jsonl.gz"):
        base = sanitized[int(plus["task_id"].split("/")[1])]
        name = plus["entry_point"]
        inputs = [*plus["base_input"], *plus["plus_input"]]  # no additional input is an empty dict in the file
        inputs = restore_types(inputs, plus["assertion"], name)
        program = differential_test(plus["canonical_solution"], name, inputs, plus["atol"])
        test = f"{program}check_against_reference({name})\n"
        records.append({**base, "code": plus["canonical_solution"], "test": test})
    return {"test": records}


def gsm8k(folder: Path) -> Splits:
    return {split: read(folder / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}


def _split(records: list[dict]) -> Splits:
    return {
        name: [record for record in records if first <= record["task_id"] <= last]
        for name, (first, last) in MBPP_SPLITS.items()
    }
