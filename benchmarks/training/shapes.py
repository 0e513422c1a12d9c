"""The 8B recipes on models of an 8B's width and vocabulary, cut to two layers of random weights: do they run, and in what
memory, against what ``setflow finetune --estimate`` says of that shape?

python -m benchmarks.training.shapes

Each recipe takes two steps in a process of its own, then what it has trained decodes 32 tokens in another one, by the
recipe's decoder and by all others that it can run. Only rows, batches and the optimizer's kind are made smaller.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from decoding import decoder_from_spec, load_model
from decoding.forward.static.path import free_memory
from eval.bench.memory import process_memory, start_counting
from eval.bench.shapes import find_shape, random_model
from finetune import finetune, load_recipe
from finetune.estimate import Estimate
from finetune.recipe import Recipe
from finetune.recipe_file import RECIPES
from setflow.loading import EMBEDDED

MODELS = {"meta-llama/Llama-3.1-8B": "llama-3.1-8b", "Qwen/Qwen3-8B": "qwen3-8b"}
OTHERS = ("ntp", "prompt-lookup:block_size=8")  # what every model can run
WITH_MASKS = ("sbd:block_size=8,entropy_bound=0.1", "sbd-lossless:block_size=8", "sbd-lossless:look_ahead=auto")
LAYERS, NEW_TOKENS, STEPS = 2, 32, 2
Row = dict[str, Any]


def shapes(
    recipe: Annotated[
        list[str] | None, typer.Option(help="May be given several times; all 8B recipes by default.")
    ] = None,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a packed row.")] = 128,
    optimizer: Annotated[
        str, typer.Option(help="Where all weights are trained; AdamW needs 12 bytes for each.")
    ] = "adafactor",
    shape: Annotated[str | None, typer.Option(help="A smaller one, to try this out.")] = None,
    folder: Annotated[Path, typer.Option(help="For models, which are removed; needs some 10 GB.")] = Path(
        "build/shapes"
    ),
    out: Out = OUT,
    name: Name = "shapes-8b",
    overwrite: Overwrite = False,
) -> None:
    """Two steps of each 8B recipe and 32 tokens by each decoder, on two layers of full width and vocabulary."""
    settings = {"layers": LAYERS, "length": length, "steps": STEPS, "new_tokens": NEW_TOKENS, "optimizer": optimizer}
    with results_in(out, name, overwrite) as results:
        results.describe(**settings, bytes_of="the process, above what it holds before it loads the model")
        for chosen in recipe or eight_billion():
            for row in measure(chosen, length, optimizer, shape, folder):
                results.take(row)


def eight_billion() -> list[str]:
    """Names of the packaged recipes for models of :data:`MODELS`."""
    found = {path.stem: load_recipe(path.stem).model for path in sorted(RECIPES.glob("*-8b*.yaml"))}
    return [name for name, model in found.items() if model in MODELS]


def measure(name: str, length: int, optimizer: str, shape: str | None, folder: Path) -> Iterator[Row]:
    """Rows for one recipe: its training, and each decoder on what it has trained."""
    base = write_model(shape or MODELS[load_recipe(name).model], folder)
    trained = folder / name
    changes = [f"model={base}", f"data=[{base}/texts.jsonl]", f"held_out=[{base}/heldout.jsonl]", f"output={trained}"]
    changes += [f"sequence_length={length}", "measure=null", f"training.max_steps={STEPS}", "training.use_cpu=true"]
    changes += ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"]
    changes += ["training.eval_strategy=no", "training.save_strategy=no", "training.logging_steps=1"]
    recipe = load_recipe(name, changes)
    whole = recipe.tuning.kind == "full"
    if whole:
        changes.append(f"training.optim={optimizer}")
    estimate = estimated_bytes(recipe, optimizer)
    row: Row = {"recipe": name, "what": "training", "parameters": Estimate(recipe).parameters}
    free = free_memory()
    try:
        if estimate > 0.8 * free:
            yield row | {"estimated_bytes": estimate, "skipped": f"only {free / 1e9:.0f} GB of memory are free"}
            return
        found = in_process("train", name, *changes)
        yield row | found | {"estimated_bytes": estimate, "ratio": round(found["peak_bytes"] / estimate, 3)}
        specs = [spec for spec in (recipe.decoder, *OTHERS) if spec]
        specs += WITH_MASKS if recipe.objective == "sbd" else ()
        for spec in dict.fromkeys(specs):
            yield {"recipe": name, "what": "decoding", "decoder": spec} | in_process("decode", str(trained), spec)
    finally:
        shutil.rmtree(trained, ignore_errors=True)


def write_model(shape: str, folder: Path) -> Path:
    """A model of that shape with two layers of random weights in bf16, a tokenizer and texts; written once."""
    base = folder / shape
    if not (base / "texts.jsonl").is_file():
        shutil.rmtree(base, ignore_errors=True)
        torch.manual_seed(0)
        config = find_shape(shape)
        config.num_hidden_layers = LAYERS
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:LAYERS]
        random_model(config, torch.bfloat16, torch.device("cpu")).save_pretrained(base)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(EMBEDDED / file, base / file)
        for file, count in (("heldout.jsonl", 8), ("texts.jsonl", 200)):
            lines = (
                json.dumps({"text": f"{i} + {i} = {2 * i}. " * 40}) + "\n" for i in range(count * 1000, count * 1001)
            )
            (base / file).write_text("".join(lines))
    return base


def estimated_bytes(recipe: Recipe, optimizer: str) -> float:
    """What ``--estimate`` says of ``recipe``, less AdamW's two moments where another optimizer keeps none of each weight."""
    estimate = Estimate(recipe)
    fewer = 8 * estimate.trained if recipe.tuning.kind == "full" and not optimizer.startswith("adamw") else 0
    return estimate.memory - fewer


def in_process(*arguments: str) -> Row:
    """What another process of this file finds; raises ValueError if it fails."""
    command = [sys.executable, "-m", "benchmarks.training.shapes", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{' '.join(arguments[:2])} failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def train(name: str, *changes: str) -> Row:
    """The peak of a run of a recipe, in bytes, and the losses of its steps."""
    idle = start_counting("cpu")
    report = finetune(load_recipe(name, changes))
    losses = [round(entry["loss"], 3) for entry in report.log]
    return {"peak_bytes": process_memory("VmHWM") - idle, "losses": losses}


def decode(folder: str, spec: str) -> Row:
    """The peak of 32 tokens by a decoder, in bytes, and how many tokens a forward has decided."""
    idle = start_counting("cpu")
    model, tokenizer = load_model(folder)
    model.generation_config.eos_token_id = None
    inputs = tokenizer("12 + 12 = 24. 13 + 13 =", return_tensors="pt")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, **settings, custom_generate=decoder_from_spec(spec))
    count, forwards = int(output.new_tokens.sum()), int(output.forwards.sum())
    peak = process_memory("VmHWM") - idle
    return {"peak_bytes": peak, "new_tokens": count, "tokens_per_forward": round(count / forwards, 3)}


if __name__ == "__main__":
    if sys.argv[1:2] in (["train"], ["decode"]):
        print(json.dumps({"train": train, "decode": decode}[sys.argv[1]](*sys.argv[2:])))
    else:
        sys.exit(main(shapes, "training.shapes"))
