"""Tasks for lm-eval by name: its own ones, on local data where we have them, and ours.

    tasks = load_tasks(["humaneval", "additions"], data="data")
    lm_eval.simple_evaluate(model, tasks=tasks, confirm_run_unsafe_code=True)

Tasks that run code need the user's consent, HF_ALLOW_CODE_EVAL=1, when they are loaded, and a second one where the
sandbox is weak, SETFLOW_ALLOW_WEAK_SANDBOX=1.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from lm_eval.api.task import ConfigurableTask

from eval.code_eval import CONSENT
from eval.known_tasks import OWN, expand_tasks, find_data
from eval.sandbox import WEAK_CONSENT
from eval.tasks.own import MBPP_VARIANTS, additions_config, mbpp_config, next_statement_config
from eval.tasks.stock import stock_task

__all__ = ["OWN", "find_data", "load_task", "load_tasks"]


def load_task(name: str, data: str | Path | None = None) -> ConfigurableTask:
    """The task ``name``. ``data``: a folder as in data.py; None means SETFLOW_DATA or, without that, the hub.

    Raises ValueError for an unknown name, missing data, or a task that runs a model's code without consent.
    """
    folder = find_data(data)
    if name == "additions":
        return ConfigurableTask(config=additions_config())
    if name == "next_statement":
        return ConfigurableTask(config=next_statement_config())
    if name in MBPP_VARIANTS:
        return ConfigurableTask(config=mbpp_config(name, folder))
    return stock_task(name, folder)


def load_tasks(
    names: Sequence[str],
    data: str | Path | None = None,
    confirm_run_unsafe_code: bool = False,
    confirm_weak_sandbox: bool = False,
) -> list[ConfigurableTask]:
    """``load_task`` for each name, also of the tasks in a group of lm-eval.

    confirm_run_unsafe_code, confirm_weak_sandbox: the user's consent, for the rest of this process.
    """
    if confirm_run_unsafe_code:
        os.environ[CONSENT] = "1"
    if confirm_weak_sandbox:
        os.environ[WEAK_CONSENT] = "1"
    return [load_task(name, data) for name in expand_tasks(names)]
