"""The data folder that some tests read, answers instead of a model, and a look for what a sandbox leaves behind."""

import gc
import glob
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUR_MARK = f"SETFLOW_SANDBOX_TEST_{os.getpid()}"


def pytest_configure(config):
    # Before anything imports the libraries, which read them once.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """SETFLOW_DATA, or the folder ``shared/data`` beside the repository."""
    folder = Path(os.environ.get("SETFLOW_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets: {folder} does not exist and SETFLOW_DATA is not set")
    return folder


@pytest.fixture(autouse=True)
def weak_consent(monkeypatch):
    """Machines that refuse namespaces run these tests in the weaker form; those that need the stronger one skip."""
    monkeypatch.setenv("SETFLOW_ALLOW_WEAK_SANDBOX", "1")


@pytest.fixture
def consent(monkeypatch):
    """The user has agreed to run code."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


@pytest.fixture
def score():
    """``score(task, answer, limit=None)``: lm-eval's results of a task if the model says ``answer(doc)``."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")
    from lm_eval.api.model import LM

    class Canned(LM):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def generate_until(self, requests, disable_tqdm=False):
            return [self.answer(request.doc) for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise AssertionError("a task that generates asks for no likelihood")

        loglikelihood_rolling = loglikelihood

    def run(task, answer, limit=None):
        name = task.config.task
        task.set_fewshot_seed(1234)
        # Without what simple_evaluate adds: it asks pip for all versions, for many seconds.
        results = lm_eval.evaluate(
            Canned(answer), {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=True
        )
        return results["results"][name]

    return run


@pytest.fixture
def weak(monkeypatch):
    """The weaker form of isolation, for kernels and containers that refuse namespaces."""
    from eval.sandbox import Isolation, run_untrusted

    isolation = Isolation(False, "switched off in this test")
    # Root becomes nobody, who may be unable to read an interpreter in root's home; the system's own will do.
    for interpreter in (sys.executable, "/usr/bin/python3"):
        monkeypatch.setattr(sys, "executable", interpreter)
        try:
            run_untrusted("pass", isolation=isolation)
            return isolation
        except (RuntimeError, OSError) as error:
            reason = str(error)
    pytest.skip(reason)


@pytest.fixture
def nothing_remains(monkeypatch, tmp_path_factory):
    """After the test no process, file or descriptor of a sandbox is left. Gives a function that lists the processes."""
    from eval import sandbox

    folder = tmp_path_factory.mktemp("sandboxes")
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    monkeypatch.setattr(sandbox, "MARK", OUR_MARK)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    pipes = _pipes()
    yield _marked
    assert _marked() == []
    assert os.listdir(folder) == []
    assert _pipes() <= pipes


def _pipes() -> set[str]:
    """This process's open pipes, which are all that a sandbox opens in it; other files come and go with other code."""
    gc.collect()  # pipes of others that nobody holds any more
    found = set()
    for descriptor in os.listdir("/dev/fd"):
        try:
            found.add(os.readlink(f"/dev/fd/{descriptor}"))
        except OSError:
            continue
    return {name for name in found if name.startswith("pipe:")}


def _marked() -> list[str]:
    """Running processes that carry the mark of this test run in their environment."""
    found = []
    for environ in glob.glob("/proc/[0-9]*/environ"):
        try:
            if f"{OUR_MARK}=".encode() in Path(environ).read_bytes():
                found.append(Path(environ).with_name("cmdline").read_text())
        except OSError:
            continue
    return found
