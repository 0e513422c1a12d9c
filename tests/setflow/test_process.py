"""The command as a process of its own: what a shell sees."""

import json
import os
import subprocess
import sys

import setflow


def start(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment, text=True, **{**pipes, **options})


def run(*arguments: str, given: str = "") -> tuple[int, str, str]:
    process = start("-m", "setflow", *arguments)
    out, err = process.communicate(given, timeout=300)
    return process.returncode, out, err


def test_import_and_help_are_light():
    code = "import sys, setflow.cli; setflow.cli.main(['--help']); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    process = start("-c", code)
    out, _ = process.communicate(timeout=120)
    assert out.endswith("[]\n")
    for command in ("generate", "chat", "corpus", "finetune", "bench"):
        assert f"\n  {command}" in out


def test_version():
    assert run("--version") == (0, f"setflow {setflow.__version__}\n", "")


def test_generate_and_a_mistake(tiny):
    code, out, err = run("generate", "-", "--model", tiny, "--max-new-tokens", "8", "--json", given="1 + 1 = ?\n")
    assert code == 0 and err == "" and json.loads(out)["tokens"] == 8
    code, out, err = run("generate", "x", "--model", "no-such-folder")
    assert (code, out) == (2, "") and err.startswith("error: model 'no-such-folder'") and err.count("\n") == 1


def test_chat_reads_turns_from_a_pipe(tiny):
    code, out, err = run(
        "chat", "--model", tiny, "--decoder", "ntp", "--max-new-tokens", "5", given="1 + 1 = ?\n/reset\n1 + 1 = ?"
    )
    assert code == 0 and err.count("[5 tokens, ") == 2
    first, second = out[: len(out) // 2], out[len(out) // 2 :]
    assert first == second != ""
