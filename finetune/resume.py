"""What an output folder holds already: nothing, a run to go on with, or a finished one; and whether it is this recipe's."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from finetune.checkpoints import (
    MANIFEST_FILE,
    damage,
    fingerprint,
    last_checkpoint,
    read_json,
    write_json,
    write_manifest,
)
from finetune.processes import note
from finetune.recipe import Recipe
from finetune.report import REPORT_FILE, TrainingReport

RECIPE_FILE = "recipe.json"
# Settings by which a run is what it is; the parts of a mapping follow behind a dot. What is held out is not trained on.
FIXED = (
    "model",
    "new_model",
    "tokenizer",
    "data",
    "held_out",
    "objective",
    "objective_options",
    "tuning",
    "mask_init",
    "sequence_length",
    "streaming",
    "training.seed",
    "training.data_seed",
    "training.optim",
    "training.optim_args",
    "training.lr_scheduler_type",
)
# What these change comes after the last step.
MEASURED_OR_SAVED = ("measure", "decoder", "save_dtype", "tuning.merge")
IGNORED = ("output", "accept_changed_files")
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Progress:
    """How far the run of an output folder is.

    checkpoint: folder to go on from. report: of a run in which nothing is left to do. files: fingerprints of the local
    files that the recipe reads. changed_files: names of those that changed, by the checkpoint from which on they were read.
    """

    checkpoint: str | None = None
    report: TrainingReport | None = None
    files: dict[str, dict] = field(default_factory=dict)
    changed_files: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, recipe: Recipe) -> None:
        """Write what makes this run what it is, before it goes on; from now on it is not finished."""
        folder = Path(recipe.output)
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        values = {"settings": _settings(recipe), "files": self.files, "changed_files": self.changed_files}
        write_json(folder / RECIPE_FILE, values)


def find_progress(recipe: Recipe, max_steps: int) -> Progress:
    """Look into the output folder of ``recipe``, which asks for ``max_steps`` steps (or some epochs, then it is negative).

    Says what of it is damaged and which settings changed since the run started. Raises ValueError for a change that would
    make it another run, or that comes too late.
    """
    folder, files = Path(recipe.output), _fingerprints(recipe)
    checkpoint, report = last_checkpoint(folder, note), _report(folder)
    if checkpoint is None and report is None:
        return Progress(files=files)
    kept = read_json(folder / RECIPE_FILE)
    if kept is None or kept.keys() != {"settings", "files", "changed_files"}:
        note(f"{folder / RECIPE_FILE} is missing or damaged: whether this recipe made the checkpoints is not known")
        kept = {"settings": _settings(recipe), "files": files, "changed_files": {}}
    changes = _changes(kept["settings"], _settings(recipe))
    _refuse_other_run(recipe, changes)
    changed_files = dict(kept["changed_files"])
    others = [name for name, found in files.items() if kept["files"].get(name, found) != found]
    if others:
        _refuse_files(recipe, others, kept["files"], files)
        changed_files[Path(checkpoint or folder).name] = others
    if report is not None and not changes and not others:
        note(
            f"{folder}: the run is finished after {report.steps} steps, nothing is left to do; a larger "
            f"training.max_steps goes on, another output starts anew"
        )
        return Progress(checkpoint, report, files, changed_files)
    if report is not None:
        late = any(not _matches(key, MEASURED_OR_SAVED) for key in changes) and 0 < max_steps <= report.steps
        if late or checkpoint is None:
            _refuse_late(recipe, report, checkpoint, [*changes.values(), *(f"{name} changed" for name in others)])
    for text in changes.values():
        note(f"{folder}: {text}; the run goes on with that")
    return Progress(checkpoint, None, files, changed_files)


def finish(folder: Path, report: TrainingReport) -> None:
    """Write the report, and then that all which was saved in ``folder`` is whole."""
    report.write(folder)
    write_manifest(folder, [folder / REPORT_FILE, *folder.glob("*.safetensors"), *folder.glob("merged/*.safetensors")])


def _report(folder: Path) -> TrainingReport | None:
    """Of a finished run whose weights are as they were written."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    found = damage(folder)
    if found is not None:
        note(f"what was saved in {folder} is damaged and counts as missing: {found}")
        return None
    return TrainingReport.read(folder)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All settings as JSON has them, each part of a mapping under a name of its own."""
    flat = {}
    for name, value in json.loads(json.dumps(dataclasses.asdict(recipe), default=str)).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in IGNORED}


def _changes(kept: dict[str, Any], wanted: dict[str, Any]) -> dict[str, str]:
    """By the setting, what was changed, for a sentence."""
    shown = [{key: repr(value) for key, value in settings.items()} for settings in (kept, wanted)]
    before, after = ({**dict.fromkeys(wanted | kept, "not given"), **settings} for settings in shown)
    parted = {key.rpartition(".")[0] for key in before}  # such as measure, which was None and has now parts
    changed = (key for key in before if before[key] != after[key] and key not in parted)
    return {key: f"{key} was {before[key]} and is {after[key]}" for key in changed}


def _matches(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _refuse_other_run(recipe: Recipe, changes: dict[str, str]) -> None:
    fixed = [text for key, text in changes.items() if _matches(key, FIXED) and not _matches(key, MEASURED_OR_SAVED)]
    if fixed:
        raise ValueError(
            f"output folder {recipe.output!r} holds checkpoints of another run: {'; '.join(fixed)}. Give another output, or "
            f"remove the folder to start anew"
        )


def _refuse_late(recipe: Recipe, report: TrainingReport, checkpoint: str | None, changes: list[str]) -> NoReturn:
    lost, way = " and its checkpoints are gone", ""
    if checkpoint is not None:
        lost, way = "", ", or a larger training.max_steps to go on"
    raise ValueError(
        f"output folder {recipe.output!r}: the run is finished after {report.steps} steps{lost}, so this comes too late: "
        f"{'; '.join(changes)}. Give another output, or remove the folder to start anew{way}"
    )


def _refuse_files(recipe: Recipe, names: list[str], before: dict, after: dict) -> None:
    sources = recipe.data if isinstance(recipe.held_out, float) else recipe.held_out_sources
    mixed = {source.path for source in sources} & set(names)
    if recipe.accept_changed_files and not mixed:
        note(f"{recipe.output}: the run goes on with changed files: {', '.join(names)}")
        return
    sizes = [f"{name!r} ({before[name]['bytes']:,} bytes then, {after[name]['bytes']:,} now)" for name in names]
    raise ValueError(
        f"files changed since the run in {recipe.output!r} started: {', '.join(sizes)}. Put them back, give another output "
        + (
            "to start anew; to go on is impossible, since what is held out now may have been trained on"
            if mixed
            else "to start anew, or accept_changed_files=true to go on with what they hold now"
        )
    )


def _fingerprints(recipe: Recipe) -> dict[str, dict]:
    """By their names, of data files and of the files of a local model and tokenizer; what lies on the hub is not followed."""
    found = {}
    for source in (*recipe.data, *recipe.held_out_sources):
        path = Path(source.path).expanduser()
        if path.is_file():
            found[source.path] = fingerprint(path)
    for folder in (recipe.model, recipe.tokenizer):
        path = Path(folder or "").expanduser()
        if folder is not None and path.is_file():
            found[folder] = fingerprint(path)
        elif folder is not None and path.is_dir():
            files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
            found |= {str(Path(folder) / file.name): fingerprint(file) for file in files}
    return found
