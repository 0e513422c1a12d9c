"""What an output folder holds already: the checkpoint to go on from, and whether it is one of this recipe."""

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune.recipe import Recipe

RECIPE_FILE = "recipe.json"
# A run may go on for more steps, in smaller batches or with other measurements, but not as another training.
FIXED = (
    "model",
    "new_model",
    "tokenizer",
    "data",
    "objective",
    "objective_options",
    "tuning",
    "mask_init",
    "sequence_length",
)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in ``folder`` that was written to its end, if any.

    The trainer's state is written last, so one without it was cut off by a full disk or a kill.
    """
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        found.append((int(path.name.rpartition("-")[2]), str(path)))
    return max(found)[1] if found else None


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Write what makes the run of ``folder`` what it is, for :func:`check_same_run`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(json.dumps(_fixed(recipe), indent=1) + "\n")


def check_same_run(recipe: Recipe, folder: Path) -> None:
    """Raise ValueError if the checkpoints in ``folder`` are of a recipe that trained something else."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    kept, wanted = json.loads(path.read_text()), _fixed(recipe)
    changed = [f"{key} was {kept.get(key)!r} and is {wanted[key]!r}" for key in FIXED if kept.get(key) != wanted[key]]
    if changed:
        raise ValueError(
            f"output folder {recipe.output!r} holds checkpoints of another run: {'; '.join(changed)}. Give another output, "
            f"or remove the folder to start anew"
        )


def _fixed(recipe: Recipe) -> dict:
    return json.loads(json.dumps({key: getattr(recipe, key) for key in FIXED}))
