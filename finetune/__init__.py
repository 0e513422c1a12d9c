"""Fine-tuning: recipes, packed data, and a Trainer whose loss is an objective."""

from finetune.recipe import Recipe, load_recipe
from finetune.run import finetune

__all__ = ["Recipe", "finetune", "load_recipe"]
