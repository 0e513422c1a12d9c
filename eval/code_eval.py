"""The metric ``code_eval`` of lm-eval's code tasks, with every program in the sandbox.

It gives what the stock metric (huggingface/evaluate, after openai/human-eval) gives on honest completions, and like that
one it runs nothing before the user has said so: HF_ALLOW_CODE_EVAL=1 in the environment. A completion and its tests run
in two processes (sandbox.py), so that a completion passes by right values only. They have arguments, values, exceptions
and the imports of the tests in common, but not what is printed, the state of ``random`` and the like.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

from decoding.inputs.checks import check_count
from eval.sandbox import Limits, Verdict, require_isolation, run_untrusted

CONSENT = "HF_ALLOW_CODE_EVAL"
# The stock metric takes these away, so a completion that uses one fails. Here they do no harm, but scores must agree.
TAKEN_AWAY = {
    "os": "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate "
    "replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    "shutil": "rmtree move chown",
    "subprocess": "Popen",
    "builtins": "exit quit help",
}
# The stock metric runs programs in a copy of its own process, where numpy and others are loaded already; they could not
# be loaded later, without the functions above.
IMPORT = re.compile(r"^[ \t]*(?:import|from)[ \t]+([\w., \t]+)", re.MULTILINE)
NOT_IMPORTABLE = ("ipdb", "joblib", "resource", "psutil", "tkinter")
PRELUDE = """
import builtins, io, os, shutil, subprocess, sys
for name in {imports!r}:
    try:
        __import__(name)
    except Exception:
        pass
for module, names in {taken_away!r}.items():
    for name in names.split():
        setattr(sys.modules[module], name, None)
sys.modules.update(dict.fromkeys({not_importable!r}))
sys.stdout = sys.stderr = io.StringIO()
"""
MEMORY_MB = 4096  # the stock metric sets no limit, EvalPlus this one


def require_consent() -> None:
    """Raise ValueError unless the user has agreed to run code that a model wrote, in the sandbox that we have."""
    if os.environ.get(CONSENT) != "1":
        raise ValueError(
            "this task runs code that the model wrote, in a sandbox; agree with --confirm-run-unsafe-code "
            f"or {CONSENT}=1, got {CONSENT}={os.environ.get(CONSENT)!r}"
        )
    require_isolation()


def judge(program: str, tests: str, limits: Limits | None = None) -> Verdict:
    """Run ``program`` as the stock metric does, with some functions taken away, and ``tests`` where it cannot get."""
    parts = [part.split() for line in IMPORT.findall(program) for part in line.split(",")]
    imports = sorted({words[0] for words in parts if words})
    settings = {"imports": imports, "taken_away": TAKEN_AWAY, "not_importable": NOT_IMPORTABLE}
    return run_untrusted(program, limits, before=PRELUDE.format(**settings), tests=tests)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of ``k`` of the samples is correct, 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    check_count("k", k, high=num_samples)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


class CodeEval:
    """Stands in for ``evaluate.load("code_eval")``."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict]]]]:
        """Run each candidate of ``predictions[i]`` followed by the test ``references[i]``.

        num_workers: sandboxes at a time. timeout: seconds of wall clock for each on an idle machine; so that a busy one
        fails no program, the limits are twice that in processor time and four times in wall clock. Returns the mean
        pass@k of all problems for each k that no problem has fewer candidates than, and for each problem the outcome of
        its candidates, as the stock metric does.
        """
        require_consent()
        limits = Limits(seconds=4 * timeout, cpu_seconds=math.ceil(2 * timeout), memory_mb=MEMORY_MB)
        programs = [
            (task, place, candidate, reference)
            for task, (candidates, reference) in enumerate(zip(predictions, references, strict=True))
            for place, candidate in enumerate(candidates)
        ]
        with ThreadPoolExecutor(num_workers) as pool:
            verdicts = list(pool.map(lambda item: judge(*item[2:], limits), programs))
        results: dict[int, list[tuple[int, dict]]] = {}
        for (task, place, *_), verdict in zip(programs, verdicts, strict=True):
            outcome = {"task_id": task, "completion_id": place, "passed": verdict.passed, "result": _word(verdict)}
            results.setdefault(task, []).append((place, outcome))
        counts = [(len(r), sum(outcome["passed"] for _, outcome in r)) for r in results.values()]
        scores = {}
        for number in k:
            if all(total >= number for total, _ in counts):
                scores[f"pass@{number}"] = sum(pass_at_k(*count, number) for count in counts) / len(counts)
        return scores, results


def _word(verdict: Verdict) -> str:
    """The outcome in the stock metric's words."""
    if verdict.status == "passed":
        return "passed"
    return "timed out" if verdict.status == "timeout" else f"failed: {verdict.detail}"


@contextmanager
def sandboxed_code_eval() -> Iterator[None]:
    """While this is active, ``evaluate.load("code_eval")`` gives the sandboxed metric, without a look at the hub."""
    import evaluate

    stock = evaluate.load

    def load(path, *args, **kwargs):
        return CodeEval() if path == "code_eval" else stock(path, *args, **kwargs)

    with mock.patch.object(evaluate, "load", load):
        yield
