"""Peak memory of one long generation, ours and stock, each in a process of its own."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoding import decoder_from_spec
from decoding.inputs.checks import check_count
from eval.devices import check_device

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 4096}
PROMPT = list(range(5, 37))


def measure_memory(specs: tuple[str, ...], new_tokens: int = 2048, device: str = "cpu") -> list[dict[str, Any]]:
    """Rows of peak bytes for "generate" and each decoder spec, on random weights: in all, and above the idle process.

    The idle process holds Python, the libraries and the weights. Speed and text do not matter here. Raises ValueError for
    what cannot be run.
    """
    check_device(device)
    check_count("new_tokens", new_tokens, 1, SHAPE["max_position_embeddings"] - len(PROMPT))
    for spec in specs:
        decoder_from_spec(spec)
    rows = []
    for spec in ("generate", *specs):
        command = [sys.executable, "-m", "eval.bench.memory", spec, str(new_tokens), device]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            raise ValueError(f"{spec} cannot be measured: {reason}")
        rows.append({"decoder": spec, "new_tokens": new_tokens, **json.loads(run.stdout.splitlines()[-1])})
    for row in rows:
        row["relative_to_generate"] = round(row["peak_bytes"] / rows[0]["peak_bytes"], 3)
        if rows[0]["above_idle_bytes"]:  # a few tokens find room in what the process holds already
            row["above_idle_relative_to_generate"] = round(row["above_idle_bytes"] / rows[0]["above_idle_bytes"], 3)
    return rows


def peak_of_one_run(spec: str, new_tokens: int, device: str) -> dict[str, int]:
    """Bytes at the peak of one generation, after a short one that loads what is loaded late."""
    from eval.bench.contenders import Contender

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device).eval()
    model.generation_config.mask_token_id = SHAPE["vocab_size"] - 1
    model.generation_config.eos_token_id = None
    contender, prompt = Contender(model, spec), [PROMPT]
    contender.run(prompt, 8)
    idle = start_counting(device)
    sample = contender.run(prompt, new_tokens)
    assert sample.tokens == new_tokens
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")
    return {"peak_bytes": peak, "above_idle_bytes": peak - idle}


def start_counting(device: str) -> int:
    """Forget earlier peaks; the bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew
    return process_memory("VmRSS")


def process_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    print(json.dumps(peak_of_one_run(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
