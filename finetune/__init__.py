"""Fine-tuning: recipes, packed data, and a Trainer whose loss is an objective."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.recipe import Recipe, load_recipe
    from finetune.report import TrainingReport
    from finetune.run import finetune

__all__ = ["Recipe", "TrainingReport", "finetune", "load_recipe"]
# Where a name comes from; imported with it, so that the path of a packaged file can be had without torch.
_HOMES = {
    "Recipe": "finetune.recipe",
    "TrainingReport": "finetune.report",
    "finetune": "finetune.run",
    "load_recipe": "finetune.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
