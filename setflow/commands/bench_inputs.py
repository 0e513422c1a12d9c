"""What every command of ``setflow bench`` starts from: options that make sense, a model, prompts, and a file of results."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decoding.inputs.checks import check_choice
from setflow.adapters import AUTO, check_adapter
from setflow.commands.settings import DTYPES, check_device, parse_dtype, typed_command
from setflow.loading import find_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eval.bench.prompts import PromptSet
    from eval.bench.results import Results


def results_in(folder: Path, name: str, overwrite: bool) -> "Results":
    """Results of this command in ``folder``; raises ValueError if they may not be written there."""
    from eval.bench.results import Results
    from eval.files import in_folder

    return Results(in_folder(folder, name, "json"), typed_command(), overwrite)


def check_bench(
    model: str | None,
    dtype: str,
    device: str,
    decoder: Sequence[str] | None,
    prompts: Sequence[str] | None,
    adapter: str = AUTO,
) -> None:
    """Raise ValueError for what is wrong with these options, as far as that shows before a model is loaded."""
    from decoding.inputs.spec import check_spec
    from eval.bench.prompts import check_prompts

    find_source(model)
    check_adapter(adapter)
    check_choice("dtype", dtype, DTYPES)
    for spec in decoder or ():
        check_spec(spec)
    for name in prompts or ():
        check_prompts(name)
    check_device(device)
    if device != "cpu":
        from eval import devices

        devices.check_device(device)


def open_bench(
    model: str | None,
    dtype: str,
    device: str,
    prompts: Sequence[str] | None,
    count: int,
    chat: bool = False,
    max_new_tokens: int | None = None,
    adapter: str = AUTO,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[PromptSet]]":
    """What a benchmark runs: a model, its tokenizer and its prompts."""
    from eval.bench.prompts import PROMPT_SETS, prompt_set
    from setflow.loading import load_model

    loaded, tokenizer = load_model(model, parse_dtype(dtype), adapter)
    sets = [prompt_set(name, tokenizer, count, chat, max_new_tokens) for name in prompts or PROMPT_SETS]
    for chosen in sets:
        chosen.check(loaded)
    return loaded.to(device), tokenizer, sets
