"""Sweeps: models x decoders x temperatures x seeds x tasks, one line of JSON for each, resumable."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoding import decoder_from_spec
from decoding.inputs.checks import check_range
from eval.bench.results import conditions
from eval.files import SoleWriter, write_whole
from eval.finished import read_records, request_key
from eval.model import SetflowLM, identify
from eval.run import evaluate, sampling
from eval.tasks import load_tasks


@dataclass(frozen=True)
class Cell:
    """One measurement: ``pretrained`` decoding ``task`` with the decoder of this spec. model: its name in tables."""

    model: str
    pretrained: str
    decoder: str
    temperature: float
    seed: int
    task: str

    def __post_init__(self):
        decoder_from_spec(self.decoder)
        check_range("temperature", self.temperature, 0)


def make_cells(
    models: Mapping[str, tuple[str, Sequence[str]]],
    tasks: Sequence[str],
    temperatures: Sequence[float] = (0.0,),
    seeds: Sequence[int] = (0,),
) -> list[Cell]:
    """All combinations; ``models``: name to path and decoders. Greedy decoding draws nothing: it gets one seed."""
    return [
        Cell(name, pretrained, decoder, temperature, seed, task)
        for name, (pretrained, decoders) in models.items()
        for task in tasks
        for decoder in decoders
        for temperature in temperatures
        for seed in (seeds if temperature else seeds[:1])
    ]


@dataclass(frozen=True)
class Settings:
    """What all cells have in common; None leaves a task's own setting. dtype, batch_size: as SetflowLM takes them."""

    data: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    max_gen_toks: int | None = None
    batch_size: int | str = 8
    dtype: str = "auto"
    device: str | None = None
    confirm_run_unsafe_code: bool = False
    confirm_weak_sandbox: bool = False


def run_sweep(cells: Sequence[Cell], settings: Settings, path: Path, command: str) -> Iterator[dict[str, Any]]:
    """Yield the line of every cell, in order; those that ``path`` holds already are not run again.

    Lines of other cells and of other settings stay in the file; the line of a model that has been trained further takes
    the place of the one before. Answers are kept in a folder ``finished`` beside the file as they come, so a sweep that was
    killed goes on in the middle of a cell, and a larger one takes over what a smaller one has answered. A model is loaded
    when its first cell needs it. Raises ValueError, before any model is loaded, for what a task lacks and while another run
    writes the file.
    """
    consent = settings.confirm_run_unsafe_code, settings.confirm_weak_sandbox
    load_tasks(sorted({cell.task for cell in cells}), settings.data, *consent)
    model, loaded = None, None
    with SoleWriter(path).writing():
        rows = {row["key"]: row for row in read_records(path)}
        for cell in cells:
            key = request_key(dataclasses.astuple(cell), identify(cell.pretrained), _text_of(settings))
            if key not in rows:
                if loaded != cell.pretrained:
                    model, loaded = _load(cell.pretrained, settings, path), cell.pretrained
                row = {"key": key, **_measure(model, cell, settings), "command": command}
                rows = {old["key"]: old for old in rows.values() if not _measures_the_same(old, row)} | {key: row}
                write_whole(path, "".join(json.dumps(row) + "\n" for row in rows.values()))
            yield rows[key]


def _text_of(settings: Settings) -> dict[str, str]:
    """What makes a difference, in the form that keys have had from the beginning."""
    fields = dataclasses.asdict(settings)
    del fields["confirm_weak_sandbox"]
    return {name: str(value) for name, value in fields.items()}


def _measures_the_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two lines are of one cell and one setting, so that no table could tell them apart."""
    cell = all(old[field.name] == new[field.name] for field in dataclasses.fields(Cell))
    both = old["settings"].keys() & new["settings"].keys()
    return cell and all(old["settings"][name] == new["settings"][name] for name in both)


def _load(pretrained: str, settings: Settings, path: Path) -> SetflowLM:
    return SetflowLM(
        pretrained,
        finished=path.parent / "finished" / path.name,
        device=settings.device,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
    )


def _measure(model: SetflowLM, cell: Cell, settings: Settings) -> dict[str, Any]:
    """The line of one cell, without its key."""
    model.use(cell.decoder, cell.seed)
    evaluation = evaluate(
        [cell.task],
        model,
        data=settings.data,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        max_gen_toks=settings.max_gen_toks,
        gen_kwargs=sampling(cell.temperature),
        confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        confirm_weak_sandbox=settings.confirm_weak_sandbox,
    )
    (scores,) = evaluation.results["results"].values()
    return {
        **dataclasses.asdict(cell),
        "scores": {name: value for name, value in scores.items() if "," in name and isinstance(value, float)},
        "decoding": evaluation.decoding["total"],
        **({"sandbox": evaluation.decoding["sandbox"]} if "sandbox" in evaluation.decoding else {}),
        "settings": {
            "batch_size": model.batch_size,
            "limit": settings.limit,
            "max_gen_toks": settings.max_gen_toks,
            "num_fewshot": settings.num_fewshot,
            "data": settings.data and str(settings.data),
            "dtype": settings.dtype,
            "device": settings.device,
        },
        "conditions": conditions(model.model),
    }
