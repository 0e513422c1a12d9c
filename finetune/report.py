"""What came of a run: the content of ``training.json``."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.checkpoints import read_json, write_json

REPORT_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What was trained and what came of it.

    objective, tuning: as Python shows them. steps: of the optimizer, on tokens_per_step tokens each. train_tokens: in an
    epoch, None for a stream. minutes_of_last_run: without what is measured before and after. command: what was typed.
    held_out_next_token_loss_nats: by the names of the held-out texts; held_out_before is that of the model that training
    started from. measured, measured_before: likewise what the recipe's ``measure`` found, empty or None without it.
    log: what the trainer noted with the loss of steps. best_checkpoint: the one whose weights were saved, where that was
    asked for. changed_files: names of the files that were not what they had been, by the checkpoint from which on.
    """

    objective: str
    tuning: str
    steps: int
    tokens_per_step: int
    train_tokens: int | None
    minutes_of_last_run: float
    machine: str
    dtype: str
    command: str
    held_out_before: dict[str, float] | None = None
    measured_before: dict[str, float] | None = None
    held_out_next_token_loss_nats: dict[str, float]
    measured: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, Any]]
    best_checkpoint: str | None = None
    changed_files: dict[str, list[str]] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> "TrainingReport | None":
        """That of the run in ``folder``; None if there is none, or one that is damaged or of another form."""
        values = read_json(Path(folder) / REPORT_FILE)
        try:
            return None if values is None else cls(**values)
        except TypeError:
            return None

    def write(self, folder: str | Path) -> None:
        """Into ``folder``, without what there is nothing to say of."""
        left_out = {f.name for f in dataclasses.fields(self) if f.default is None and getattr(self, f.name) is None}
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
        write_json(Path(folder) / REPORT_FILE, values)
