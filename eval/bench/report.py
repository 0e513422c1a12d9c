"""Where a benchmark ran, and how its result is written."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def conditions(model) -> dict[str, Any]:
    """What a reader must know to judge a number."""
    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "processor": platform.processor() or platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write one JSON document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)
