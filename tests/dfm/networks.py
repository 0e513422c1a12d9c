"""Networks for tests of decoders: a block behind a text without any cache, and a model told how noisy its input is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.forward.noise_level import LEVELS, NONE, add_noise_level_rows, level_features
from dfm.flow_config import FlowTraits, ids_without_text
from dfm.paths.schedulers import Scheduler
from tests.conftest import MASK, build


@dataclass
class BlockCausal:
    """A PosteriorModel of one block behind ``text``: one stock forward with a literal mask for every evaluation."""

    model: torch.nn.Module
    text: list[int]
    traits: FlowTraits
    scheduler: Scheduler

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, frozen: Tensor) -> Tensor:
        n, size = len(self.text), x.shape[1]
        rows = n + size
        query, key = torch.arange(rows)[:, None], torch.arange(rows)[None]
        ids = torch.cat([torch.tensor([self.text]), x], dim=1)
        embedded = self.model.get_input_embeddings()(ids)
        if count := getattr(self.model.config, "noise_level_rows", 0):
            level = int((LEVELS * self.scheduler.kappa(t)).round())
            levels = torch.tensor([[NONE] * n + [level] * size])
            table = self.model.get_input_embeddings().weight[-count:]
            embedded = embedded + level_features(levels).to(table.dtype) @ table

        def mask(window):
            seen = (key < n) & ((key <= query) | (query >= n))
            if window is not None:
                seen &= query - key < window
            seen = seen | ((query >= n) & (key >= n))
            floor = torch.finfo(self.model.dtype).min
            return torch.zeros(1, 1, rows, rows, dtype=self.model.dtype).masked_fill(~seen, floor)

        window = getattr(self.model.config, "sliding_window", None)
        kinds = getattr(self.model.config, "layer_types", None)
        masks = {"full_attention": mask(None), "sliding_attention": mask(window)} if kinds else mask(window)
        logits = self.model(inputs_embeds=embedded, attention_mask=masks, use_cache=False).logits.float()
        logits[..., list(self.traits.excluded)] = -torch.inf
        return logits[:, n - 1 : -1] if self.traits.shift else logits[:, n:]


def uniform_model(block_sizes=(4,)):
    """A random model that takes a noise level and says that it was trained with the uniform source."""
    model = build("llama", torch.float64)
    add_noise_level_rows(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        model.get_input_embeddings().weight[-model.config.noise_level_rows :].normal_(std=0.3)
    model.generation_config.mask_token_id = MASK
    traits = FlowTraits("uniform", False, tuple(ids_without_text(model)), block_sizes)
    model.config.flow = traits.as_dict()
    return model.requires_grad_(False)
