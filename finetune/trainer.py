"""transformers' Trainer, with the loss taken from an objective."""

import shutil
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from decoding.training.packed import Packing, find_loss_mask
from finetune.checkpoints import rotate, write_manifest

TRAINED_FILE = "trained.safetensors"  # of a checkpoint of which most weights are frozen


class _AlreadyTrained(Exception):
    """All steps were taken before this run started."""


class _TakeNoStepTooMany(TrainerCallback):
    """Else a Trainer that goes on from the last step of a run takes one more."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise _AlreadyTrained


class ObjectiveTrainer(Trainer):
    """A Trainer whose loss is that of an Objective; its metrics are averaged into the logs.

    The loss of a step is the mean over the targets of all its micro-batches on all processes, whatever their number. For
    that an objective says in ``metrics["num_targets"]`` over how many its loss is the mean. Random masks depend on the
    seed, the step, the micro-batch and the process alone, so neither resuming nor evaluating changes them.

    Evaluation always measures the next-token loss (``evaluation_objective``), so that every method is judged alike, and
    logs what ``measure(model)`` returns.

    Checkpoints hold only what is trained, in finite numbers; each gets a manifest, and older ones are deleted after that.
    A run that goes on takes the hyperparameters of its arguments, not those that a checkpoint remembers.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args, objective, evaluation_objective, measure=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.evaluation_objective = evaluation_objective
        self.measure = measure
        self._kept_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None  # see _save_checkpoint
        self.add_callback(_TakeNoStepTooMany)
        self._sums = defaultdict(float)
        self._calls = defaultdict(int)
        self._start_step()

    def train(self, *args, **kwargs) -> None:
        """As Trainer.train does; after a checkpoint of the last step, only the weights are loaded."""
        try:
            super().train(*args, **kwargs)
        except _AlreadyTrained:
            self.is_in_train = False
            self._rotate()
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._check_finite()

    def _start_step(self) -> None:
        self._micro_batch = 0
        self._num_targets = torch.zeros((), device=self.args.device)
        self._loss = torch.zeros((), device=self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """The tokens to be learned in one optimizer step, on all processes."""
        count = sum(_count_learned(batch) for batch in batch_samples)
        count = self.accelerator.reduce(torch.as_tensor(count, device=device, dtype=torch.float32), "sum")
        return count.clamp_min(1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        entropy = [self.args.seed, self.state.global_step, self._micro_batch, self.accelerator.process_index]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        self._micro_batch += 1
        super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(self._loss)
        return self._finish_step(num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        objective = self.objective.at(self.state.global_step / max(1, self.state.max_steps))
        loss, metrics = self._run(objective, model, inputs)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        num_targets = metrics.pop("num_targets")
        if not self._can_rescale:
            num_targets = _count_learned(inputs)
        for name, value in metrics.items():
            if torch.isfinite(torch.as_tensor(value)):  # the mean over no target is not
                self._sums[name] += float(value)
                self._calls[name] += 1
        self._num_targets += num_targets
        self._loss += loss.detach() * num_targets
        # Backward hooks average over processes, so the factor makes it a sum; _finish_step divides by the true number.
        return loss * (num_targets * self.accelerator.num_processes / num_items_in_batch)

    def _finish_step(self, num_items_in_batch: Tensor) -> Tensor:
        """Divide the summed gradient by the number of targets; returns the loss in such a form that logs average it right."""
        num_targets = self.accelerator.reduce(self._num_targets, "sum").clamp_min(1)
        loss = self._loss * self.accelerator.num_processes / num_targets
        if self._can_rescale:
            factor = num_items_in_batch / num_targets
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self._start_step()
        return loss

    @property
    def _can_rescale(self) -> bool:
        """DeepSpeed takes its step inside backward, so there each micro-batch counts as its tokens to be learned."""
        return self.accelerator.distributed_type != DistributedType.DEEPSPEED

    def _run(self, objective, model, inputs) -> tuple[Tensor, dict[str, Tensor]]:
        inner = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast(), _forward_runs(objective, inner):
            return model(**inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, _ = self._run(self.evaluation_objective, model, self._prepare_inputs(inputs))
        return loss, None, None

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        figures = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None and self.measure is not None:
            measured = {f"eval_{name}": value for name, value in self.measured().items()}
            self.log(measured)
            figures |= measured
        return figures

    def measured(self) -> dict[str, float]:
        """What ``measure`` finds; nothing where the weights are cut up over processes."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return {}
        return self.measure(self.accelerator.unwrap_model(self.model))

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        trained = self._trained_names()
        if len(trained) == len(list(self.model.parameters())):
            # With a state a checkpoint holds all of it in one file, as it is loaded.
            super()._save(output_dir, self.model.state_dict() if state_dict is None else state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.model.state_dict() if state_dict is None else state_dict
        save_file({name: weights[name].contiguous() for name in trained}, folder / TRAINED_FILE)

    def _save_checkpoint(self, model, trial) -> None:
        self._check_finite()
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what is left of a damaged one
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)  # deletes none, since it would do so before the new one is whole
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(checkpoint)
            self._rotate()

    def _rotate(self) -> None:
        if self.args.should_save and self._kept_checkpoints:
            rotate(self.args.output_dir, self._kept_checkpoints, [self.state.best_model_checkpoint])

    @torch.no_grad()
    def _check_finite(self) -> None:
        """Raise ValueError if training has left the numbers: what is saved then is lost, and so is what goes on from it."""
        tensors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.optimizer is not None and not self.is_deepspeed_enabled:
            tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        finite = torch.ones((), device=self.args.device)
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                finite *= local.isfinite().all().to(finite.device)
        if self.accelerator.reduce(finite, "sum") < self.accelerator.num_processes:
            raise self._diverged(f"weights or optimizer are no longer finite after step {self.state.global_step}")

    def _diverged(self, what: str) -> ValueError:
        return ValueError(
            f"{what}: lower training.learning_rate or set training.max_grad_norm; checkpoints of earlier steps are in "
            f"{self.args.output_dir}, the same command goes on from the last of them"
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        asked = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups  # others, since loading makes new ones
        for group, settings in zip(groups, asked, strict=True):
            group.update(settings)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]  # what logs show

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if (best / TRAINED_FILE).is_file():
            self._load_from_checkpoint(str(best))
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED_FILE
        if not path.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        (self.model if model is None else model).load_state_dict(load_file(path), strict=False)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= {name: round(total / self._calls[name], 4) for name, total in self._sums.items()}
            self._sums.clear()
            self._calls.clear()
        super().log(logs, *args, **kwargs)


@contextmanager
def _forward_runs(objective, model):
    """Let ``model(**batch)`` be ``objective(model, batch)``.

    DDP, FSDP and DeepSpeed gather parameters and synchronise gradients around the forward of the model they wrap, so
    the whole loss has to be computed inside it.
    """
    stock = vars(model).get("forward")
    model.forward = lambda **batch: objective(model, batch)
    try:
        yield
    finally:
        if stock is None:
            del model.forward
        else:
            model.forward = stock


def _count_learned(batch: dict[str, Tensor]) -> Tensor:
    return find_loss_mask(batch, Packing.from_document_ids(batch["document_ids"])).sum()
