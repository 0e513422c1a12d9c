"""lm-eval's own task definitions, on local data where there is some, with the sandbox as their code_eval."""

import ast
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from decoding.forward.loading import one_sentence
from decoding.inputs.hub import hub_or_cache
from eval.code_eval import require_consent, sandboxed_code_eval
from eval.known_tasks import find_definition
from eval.tasks import data

# Data set on the hub: how to read the local copy. Every task of lm-eval that stands on one of them can run offline.
LOCAL = {
    "openai/openai_humaneval": data.humaneval,
    "evalplus/humanevalplus": data.humaneval_plus,
    "google-research-datasets/mbpp": data.mbpp,
    "evalplus/mbppplus": data.mbpp_plus,
    "openai/gsm8k": data.gsm8k,
}
HUMANEVAL = ("openai/openai_humaneval", "evalplus/humanevalplus")


def humaneval_tests(doc: dict[str, Any]) -> str:
    """The tests of a problem, behind the functions of its prompt that they use: the completion may define them anew."""
    used = {node.id for node in ast.walk(ast.parse(doc["test"])) if isinstance(node, ast.Name)} - {doc["entry_point"]}
    given = ast.parse(doc["prompt"]).body
    helpers = [node for node in given if isinstance(node, ast.FunctionDef) and node.name in used]
    imports = [node for node in given if isinstance(node, ast.Import | ast.ImportFrom)] if helpers else []
    return "\n".join([*map(ast.unparse, imports + helpers), doc["test"], f"check({doc['entry_point']})"])


def stock_config(name: str) -> dict[str, Any]:
    """The configuration of lm-eval's task ``name``, its functions resolved.

    Raises ValueError for an unknown task, and for one that runs code if the user has not agreed to that.
    """
    path = find_definition(name)
    if load_yaml(path, resolve_func=False).get("unsafe_code"):
        require_consent()
    with sandboxed_code_eval():  # lm-eval's helper modules load and try the metric when they are imported
        config = load_yaml(path)
    if config.get("dataset_path") in HUMANEVAL:
        config["doc_to_target"] = humaneval_tests
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}


def with_local_data(config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """``config`` on the copy of its data set in ``folder``; unchanged, that is on the hub, if there is no such copy."""
    read = LOCAL.get(config.get("dataset_path"))
    if folder is None or read is None:
        return config
    return on_records(config, read, folder)


def on_records(config: dict[str, Any], read, folder: Path) -> dict[str, Any]:
    """``config`` on the records that ``read(folder)`` gives."""
    try:
        splits = read(folder)
    except FileNotFoundError as error:
        name = config["task"]
        raise ValueError(f"data folder {str(folder)!r} lacks {error.filename}, which task {name!r} needs") from None
    name = f"{folder.resolve()}:{read.__name__}"
    tables = {split: Dataset.from_list(records) for split, records in splits.items()}
    return {**config, "dataset_path": name, "dataset_name": None, "custom_dataset": lambda **_: tables}


def stock_task(name: str, folder: Path | None) -> ConfigurableTask:
    """lm-eval's task ``name`` as an object that ``lm_eval.simple_evaluate`` takes.

    Raises ValueError if its data set can be had neither from the hub nor from what was downloaded before.
    """
    config = with_local_data(stock_config(name), folder)
    if "custom_dataset" in config:
        return ConfigurableTask(config=config)
    with hub_or_cache(), one_sentence(f"the data set of task {name!r}", keep=(ValueError,)):
        return ConfigurableTask(config=config)
