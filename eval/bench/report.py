"""Where a benchmark ran, and how its result is written."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def conditions(model=None) -> dict[str, Any]:
    """What a reader must know to judge a number; None where no model runs."""
    on_gpu = model is not None and model.device.type == "cuda"
    of_model = {} if model is None else _of_model(model)
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "processor": platform.processor() or platform.machine(),
        **of_model,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _of_model(model) -> dict[str, Any]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write one JSON document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)
