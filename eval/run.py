"""Evaluate a model with a decoder on tasks: lm-eval's result files, and the costs of decoding next to them."""

import functools
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import lm_eval.evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from torch.utils import collect_env

from eval.counts import total
from eval.model import SetflowLM
from eval.sandbox import find_isolation
from eval.tasks import load_tasks

# lm-eval writes it into every result; it takes seconds and does not change.
_environment = functools.cache(collect_env.get_pretty_env_info)


@functools.cache
def _commit() -> str | None:
    """The commit of the working folder, which lm-eval writes into every result; None, and no word of git, outside one."""
    try:
        return subprocess.check_output(["git", "describe", "--always"], stderr=subprocess.DEVNULL, text=True).strip()
    except (subprocess.CalledProcessError, OSError):
        return None


@dataclass(frozen=True)
class Evaluation:
    """results: lm-eval's results, whose ``config`` names the decoder. samples: the costs of each generated text.

    decoding: the costs of all together and of each task. folder: where the files are, None if nothing was written.
    """

    results: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    decoding: Mapping[str, Any]
    folder: Path | None = None

    def table(self) -> str:
        """Scores and costs, for people."""
        costs = self.decoding["total"]
        text = make_table(self.results) + (
            f"{costs['tokens']} tokens, {costs['forwards']} forwards, "
            f"{costs['tokens_per_forward']:.2f} tokens per forward, {costs['tokens_per_second']:.1f} tokens per second"
        )
        if cut := costs["cut_prompts"]:
            text += f"\n{cut} of {costs['samples']} prompts did not fit into the context and lost their beginning"
        if "sandbox" in self.decoding:
            text += f"\ngenerated code ran in a sandbox: {self.decoding['sandbox']}"
        return text


def evaluate(
    tasks: Sequence[str],
    model: Mapping[str, Any] | SetflowLM,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    max_gen_toks: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    confirm_run_unsafe_code: bool = False,
    confirm_weak_sandbox: bool = False,
) -> Evaluation:
    """Evaluate on ``tasks`` a model, or the one that SetflowLM makes of these arguments, ``pretrained`` among them.

    data: folder of local data sets, see eval/tasks/data.py. output: folder for the results; a run that is started again
    with the same output goes on where it was killed. limit: samples of each task, a share if below 1. num_fewshot,
    apply_chat_template, gen_kwargs: as in lm_eval.simple_evaluate. max_gen_toks: most new tokens of an answer; tasks that
    ask for fewer keep their own number. confirm_run_unsafe_code: the user's consent to run
    what the model writes, in a sandbox; confirm_weak_sandbox: also where the sandbox lacks what sandbox.py names.

    Raises ValueError for what is unknown or missing, before the model is loaded.
    """
    loaded = load_tasks(tasks, data, confirm_run_unsafe_code, confirm_weak_sandbox)
    output = Path(output) if output else None
    if not isinstance(model, SetflowLM):
        model = SetflowLM(**{"finished": output / "finished.jsonl" if output else None, **model})
    for task in loaded if max_gen_toks else ():
        _cap(task, max_gen_toks, model.max_gen_toks)
    tracker = EvaluationTracker(output_path=str(output)) if output else None
    with (
        model.finished.writing(),
        mock.patch.object(collect_env, "get_pretty_env_info", _environment),
        mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", _commit),
    ):
        results = lm_eval.simple_evaluate(
            model,
            model_args={key: str(value) for key, value in model.arguments.items()},
            tasks=loaded,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            evaluation_tracker=tracker,
            task_manager=TaskManager(include_defaults=False),  # the tasks are here already
        )
    names = dict.fromkeys(sample["task"] for sample in model.samples)
    decoding = {
        "decoder": repr(model.decoder),
        "total": total(model.samples),
        "tasks": {name: total(s for s in model.samples if s["task"] == name) for name in names},
    }
    if any(task.get_config("unsafe_code") for task in loaded):
        decoding["sandbox"] = str(find_isolation())
    folder = _write(tracker, results, decoding, model.samples) if tracker else None
    return Evaluation(results, model.samples, decoding, folder)


def sampling(temperature: float) -> dict[str, Any]:
    """Generation settings for sampling from the plain distribution, without cuts of a generation config; 0 leaves a
    task's own.
    """
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}


def _cap(task: ConfigurableTask, max_gen_toks: int, default: int) -> None:
    """Let answers of ``task`` have at most so many tokens; where it asks for fewer, that stays."""
    if task.OUTPUT_TYPE == "generate_until":
        own = normalize_gen_kwargs(task.config.generation_kwargs, default)["max_gen_toks"]
        task.set_config("generation_kwargs", {"max_gen_toks": min(own, max_gen_toks)}, update=True)


def _write(tracker: EvaluationTracker, results: dict, decoding: dict, samples: list[dict]) -> Path:
    """lm-eval's files, and beside them decoding_DATE.json and decoding_samples_DATE.jsonl."""
    texts = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=texts)
    for name, of_task in texts.items():
        tracker.save_results_samples(task_name=name, samples=of_task)
    folder = Path(tracker.output_path) / str(tracker.general_config_tracker.model_name_sanitized)
    (folder / f"decoding_{tracker.date_id}.json").write_text(json.dumps(decoding, indent=2) + "\n", encoding="utf-8")
    lines = "".join(json.dumps({k: v for k, v in sample.items() if k != "text"}) + "\n" for sample in samples)
    (folder / f"decoding_samples_{tracker.date_id}.jsonl").write_text(lines, encoding="utf-8")
    return folder
