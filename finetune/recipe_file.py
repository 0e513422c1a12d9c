"""The YAML file of a recipe: where it is, what is in it, and whether its keys are known; read without torch."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from decoding.inputs.checks import check_type, did_you_mean
from decoding.inputs.signatures import signature_of
from decoding.inputs.source import check_source
from decoding.inputs.spec import check_spec

RECIPES = Path(__file__).parent / "recipes"
MOST_VALUES = 10_000  # in a recipe


class TooManyValues(Exception):
    """A text stands for more values than a recipe can be meant to have."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everybody expects, and not a text, as YAML 1.1 has it."""

    def flatten_mapping(self, node: Any) -> None:
        """Merge the mappings behind ``<<``; merges of merges grow as aliases do, while the text is still being read."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise TooManyValues


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def packaged_recipes() -> dict[str, str]:
    """The name of each packaged recipe, with what the first sentence of its file says."""
    return {path.stem: first_sentence(_first_comment(path)) for path in sorted(RECIPES.glob("*.yaml"))}


def _first_comment(path: Path) -> str:
    comment = itertools.takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in comment)


def first_sentence(text: str) -> str:
    """
    >>> first_sentence("Llama-3.1 is a model. Not this.")
    'Llama-3.1 is a model.'
    """
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def find_recipe(name: str | Path) -> Path:
    """The file ``name``, or the packaged recipe of that name."""
    if Path(name).is_file():
        return Path(name)
    packaged = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if str(name) not in packaged:
        guess = did_you_mean(name, packaged) or f"; those are {', '.join(sorted(packaged))}"
        raise ValueError(f"recipe {str(name)!r} is no file and no packaged recipe{guess}")
    return packaged[str(name)]


def read_recipe(name: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The keys and values of a file or a packaged recipe, with ``key=value`` overrides.

    ``training.learning_rate=1e-4`` reaches into a mapping. Raises ValueError for a key that no recipe has.
    """
    path = find_recipe(name)
    values = _parsed(f"recipe {str(path)!r}", path.read_bytes())
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping of keys to values")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"an override has the form key=value, got {override!r}")
        *parents, last = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"override {override!r}: {parent} is no mapping of names to values")
        target[last] = _parsed(f"override {override!r}", text.encode())
    for name in values:
        check_known(name, name, signature_of("finetune.recipe", "Recipe").fields)
    if isinstance(values.get("decoder"), str):
        check_spec(values["decoder"])
    return values


def _parsed(named: str, text: bytes) -> Any:
    """What a text of YAML holds; raises ValueError if that is no YAML, or more than a recipe can be meant to be."""
    try:
        values = yaml.load(text.decode(), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} is no UTF-8 text: {error}") from None
    except TooManyValues:
        raise ValueError(f"{named} stands for more than {MOST_VALUES:,} values") from None
    except RecursionError:
        raise ValueError(f"{named} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{named} is not YAML: {error}") from None
    if _count(values, {}) > MOST_VALUES:  # aliases of aliases
        raise ValueError(f"{named} stands for more than {MOST_VALUES:,} values")
    return values


def _count(values: Any, known: dict[int, int]) -> int:
    """How many values there are, those behind an alias at each of its places; one that holds itself has no end."""
    if not isinstance(values, dict | list):
        return 1
    if id(values) not in known:
        known[id(values)] = MOST_VALUES + 1  # for one that it meets inside itself
        parts = [*values, *values.values()] if isinstance(values, dict) else values
        known[id(values)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(values)]


def check_sources(model: str | None, tokenizer: str | None, output: str) -> None:
    """Raise ValueError if there can be no such model or tokenizer; in ``output`` this run writes its own."""
    for key, source in (("tokenizer", tokenizer), ("model", model)):
        check_type(key, source, str | None)
        if source is not None:
            check_source(source, named=f"{key}: the folder {source!r}", made_in=output)


def check_known(shown: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest known name, unless ``name`` is known; ``shown`` is what the message calls it."""
    if name not in known:
        raise ValueError(f"unknown key {shown!r}{did_you_mean(name, known)}")
