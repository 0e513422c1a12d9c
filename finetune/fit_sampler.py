"""Fit a few-step sampler to a frozen flow model: prompts from held-out text, the model's own completions in many steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from decoding.forward.loading import load_tokenizer, load_weights
from decoding.forward.mask_token import find_mask_token
from decoding.inputs.checks import check_count, check_range
from dfm.fitting import Fit, Prompts, fit_sampler
from dfm.flow_config import FlowTraits
from dfm.networks import Bidirectional
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import named_scheduler
from dfm.samplers.fitted import StepSettings
from dfm.sampling.loop import Posterior
from finetune.prompts import read_prompts

MOST_STEPS = 66  # 3 K - 1 numbers, fewer than 200


@dataclass(frozen=True)
class SamplerFit:
    """What to fit. model: folder or hub name of a flow model of whole texts. texts: JSONL as for ``distill-data``, which
    the model was not trained on. output: the JSON file to write. steps: of the sampler.

    prompt_tokens: what is taken of a "text" as its prompt. new_tokens: how many follow it. count: prompts.
    share: with which all steps begin to correct (:class:`dfm.samplers.fitted.StepSettings`).
    """

    model: str
    texts: str
    output: str
    steps: int
    prompt_tokens: int = 16
    new_tokens: int = 64
    count: int = 32
    share: float = 0.0
    fit: Fit = field(default_factory=Fit)

    def __post_init__(self):
        check_count("steps", self.steps, 1, MOST_STEPS)
        for name in ("prompt_tokens", "new_tokens"):
            check_count(name, getattr(self, name))
        check_count("count", self.count, 2)
        check_range("share", self.share, 0, 1)

    @property
    def parts(self) -> int:
        """How often :func:`fit_to_model` tells that a part is done."""
        return self.fit.iterations + 3


def fit_to_model(settings: SamplerFit, advance: Callable[[str], None] = lambda what: None) -> StepSettings:
    """Fit, write ``output`` and return the numbers; raises ValueError for a model that is none of whole texts."""
    if not Path(settings.output).parent.is_dir():
        raise ValueError(f"output: the folder {str(Path(settings.output).parent)!r} does not exist")
    tokenizer = load_tokenizer(settings.model)
    model = load_weights(settings.model, dtype=torch.float32)
    traits = FlowTraits.of(model.config)
    if getattr(model.config, "flow", None) is None or traits.block_sizes is not None:
        raise ValueError(
            f"model {settings.model!r} must be a flow model of whole texts, not of blocks, to fit a sampler"
        )
    mask_id = find_mask_token(model) if traits.source == "mask" else None
    source = traits.make_source(model.config.vocab_size, mask_id)
    path = MixturePath(source, named_scheduler("linear", source))
    prompts = list(islice(read_prompts(settings.texts, settings.prompt_tokens, tokenizer), settings.count))
    if len(prompts) < settings.count:
        raise ValueError(f"texts: {settings.texts!r} holds {len(prompts)} prompts, fewer than count {settings.count}")
    canvases = make_canvases(model, [prompt.ids for prompt in prompts], settings.new_tokens, traits, path)
    start = StepSettings.even(traits.source, settings.steps, settings.share)
    found = fit_sampler(canvases, path, start, settings.fit, advance)
    found.save(settings.output)
    return found


def make_canvases(model, prompts: list[list[int]], new_tokens: int, traits: FlowTraits, path: MixturePath) -> Prompts:
    """Prompts, each with room for ``new_tokens`` behind it, padded on the right."""
    starts = torch.tensor([len(ids) for ids in prompts])[:, None]
    width = max(map(len, prompts)) + new_tokens
    index = torch.arange(width)
    x = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts])
    real = index < starts + new_tokens

    def posterior_of(rows: torch.Tensor) -> Posterior:
        return Posterior(Bidirectional(model, real[rows], traits, path.scheduler), path.source)

    return Prompts(x, (index < starts) | ~real, posterior_of)
