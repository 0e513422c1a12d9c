"""The tiny models and recipes of other packages' tests."""

from tests.finetune.conftest import data, recipe, recipe_path
from tests.setflow.conftest import model_folder

__all__ = ["data", "model_folder", "recipe", "recipe_path"]
