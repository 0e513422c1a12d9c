"""Peak memory of one long generation, ours and stock, each in a process of its own."""

import json
import resource
import subprocess
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 4096}


def measure_memory(specs: tuple[str, ...], new_tokens: int = 2048, device: str = "cpu") -> list[dict[str, Any]]:
    """Rows of peak bytes above the loaded model, for "generate" and each decoder spec, on random weights.

    Speed and text do not matter here, so a model whose keys and values are larger than its weights is made up.
    """
    rows = []
    for spec in ("generate", *specs):
        command = [sys.executable, "-m", "eval.bench.memory", spec, str(new_tokens), device]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"decoder": spec, "new_tokens": new_tokens, **json.loads(run.stdout.splitlines()[-1])})
    for row in rows:
        row["relative_to_generate"] = round(row["peak_bytes"] / rows[0]["peak_bytes"], 3)
    return rows


def peak_of_one_run(spec: str, new_tokens: int, device: str) -> int:
    """Bytes at the peak of a generation, weights included."""
    from eval.bench.contenders import Contender

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device).eval()
    model.generation_config.mask_token_id = SHAPE["vocab_size"] - 1
    model.generation_config.eos_token_id = None
    sample = Contender(model, spec).run([list(range(5, 37))], new_tokens)
    assert sample.tokens == new_tokens
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": peak_of_one_run(sys.argv[1], int(sys.argv[2]), sys.argv[3])}))
