"""What is trained: all weights, LoRA on all rows, or LoRA that acts on mask rows only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer

from decoding import Objective
from decoding.forward.adapter import LINEAR_LAYERS, GatedAdapter, holds_adapter, located_base
from decoding.forward.loading import load_weights
from decoding.inputs.checks import check_choice, check_count, check_range


@dataclass(frozen=True)
class Tuning:
    """The ``tuning`` key of a recipe.

    kind: "full" trains every weight; "lora" trains low-rank terms on all rows (peft), which can be merged; "gated"
        trains low-rank terms on mask rows only, so that the base model's own text does not change; "selector" trains
        nothing but the draft selector of a model that drafts already, whatever it was trained by.
    rank, alpha: of the low-rank terms, which are multiplied by alpha / rank; alpha is 2 * rank by default.
    dropout: on the input of the terms, for "lora".
    targets: the linear layers that get terms, by the last part of their names.
    merge: save the merged model instead of the adapter, for "lora".
    """

    kind: Literal["full", "lora", "gated", "selector"] = "full"
    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR_LAYERS
    merge: bool = False

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        check_choice("tuning.kind", self.kind, ("full", "lora", "gated", "selector"))
        check_count("tuning.rank", self.rank)
        check_range("tuning.dropout", self.dropout, 0, 1, include_high=False)
        if self.alpha is not None:
            check_range("tuning.alpha", self.alpha, 0, include_low=False)
        for name in ("dropout", "merge"):
            if getattr(self, name) and self.kind != "lora":
                raise ValueError(f"tuning.{name} is for kind lora, got kind {self.kind!r}")

    @property
    def scaled_alpha(self) -> float:
        return 2 * self.rank if self.alpha is None else self.alpha

    def fit(self, objective: Objective) -> Objective:
        """The objective for what is trained; raises ValueError if it cannot train that."""
        try:
            return objective.for_tuning(self.kind)
        except ValueError as error:
            raise ValueError(f"tuning.kind: {error}") from None

    def freeze(self, model) -> None:
        """Before the objective prepares the model: weights that are not saved are not trained, and keep their shapes."""
        if self.kind != "full":
            model.requires_grad_(False)

    def add_gated_adapter(self, model) -> None:
        """After that: attach a gated adapter if one is wanted."""
        if self.kind == "gated":
            GatedAdapter(model, self.rank, self.scaled_alpha, self.targets).attach(model)

    def add_lora(self, model, objective: Objective) -> None:
        """After the objective has prepared the model: add peft's LoRA if it is wanted; what was added is trained too."""
        if self.kind != "lora":
            return
        from peft import LoraConfig

        model.add_adapter(
            LoraConfig(
                task_type="CAUSAL_LM",
                r=self.rank,
                lora_alpha=self.scaled_alpha,
                lora_dropout=self.dropout,
                target_modules=list(self.targets),
                trainable_token_indices=objective.added_token_ids(model) or None,
            )
        )
        for config in model.peft_config.values():
            config.base_model_name_or_path = located_base(model)
        for parameter in objective.added_parameters(model):
            parameter.requires_grad_(True)


def merge_adapter(folder: str | Path, output: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model that the LoRA adapter in ``folder`` and its base make together, and its tokenizer, to ``output``.

    Raises ValueError for a gated adapter, whose terms depend on the row.
    """
    from peft import PeftConfig, PeftModel

    if holds_adapter(folder):
        raise ValueError(f"{str(folder)!r} is a gated adapter: it acts on mask rows only, so it cannot be merged")
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds no LoRA adapter: adapter_config.json is missing")
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = load_weights(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    if (Path(folder) / "generation_config.json").is_file():
        merged.generation_config = type(merged.generation_config).from_pretrained(folder)
        merged.generation_config._from_model_config = False
    merged.to(dtype).save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(output)
