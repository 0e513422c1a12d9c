"""transformers' Trainer, with the loss taken from an objective."""

from collections import defaultdict

import torch
from transformers import Trainer


class ObjectiveTrainer(Trainer):
    """A Trainer whose loss is ``objective(model, batch) -> (loss, metrics)``; metrics are averaged into its logs.

    Evaluation always measures the next-token loss (``evaluation_objective``), so that every method is judged alike.
    """

    def __init__(self, *args, objective, evaluation_objective, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.evaluation_objective = evaluation_objective
        self._sums = defaultdict(float)
        self._steps = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():
            loss, metrics = self.objective(self.accelerator.unwrap_model(model), inputs)
        for name, value in metrics.items():
            self._sums[name] += float(value)
        self._steps += 1
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.accelerator.autocast():
            loss, _ = self.evaluation_objective(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs))
        return loss, None, None

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._steps:
            logs |= {name: round(total / self._steps, 4) for name, total in self._sums.items()}
            self._sums.clear()
            self._steps = 0
        super().log(logs, *args, **kwargs)
