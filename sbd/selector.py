"""The selector: drafts that agree with each other, from the rows of one masked block and without another forward.

Mask rows do not know what their neighbours will say, so what they draft together need not fit together. The selector
corrects the distribution of a mask row by the token before it, once that is known: for the first draft the token that
verification has just given, for each later one the draft before it. With h_j the state of mask row j and e the embedding,

    q_j(v | x_{j-1}) = softmax(head(h_j + B silu(A e(x_{j-1}) + H h_j)))(v)

A, H: [r, D], B: [D, r], zero to begin with, which is the distribution of the mask row alone. Head and embedding are the
model's, so 3 D r parameters are all there is. While decoding only the likeliest candidates of each row are corrected.

Sources: DSpark (arXiv 2607.05147), which has tables [V, r] in place of projected embeddings; the candidates of DFlash2.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from decoding.forward.beside import SavedBeside, read_settings_beside
from decoding.forward.fingerprint import fingerprint
from decoding.inputs.checks import check_count
from decoding.inputs.source import SELECTOR_FILE, located

WEIGHTS_FILE = "draft_selector.safetensors"
NAME = "draft_selector"  # of the submodule, so that it moves with the model and its parameters are found
SETTINGS = {"base_model": str, "rank": int, "vocab_size": int, "hidden_size": int, "head": str}


class DraftSelector(nn.Module, SavedBeside):
    """Corrects states of mask rows by the token before them; the head then gives the corrected distribution."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.rank = rank
        self.before = nn.Linear(hidden_size, rank, bias=False)
        self.state = nn.Linear(hidden_size, rank, bias=False)
        self.correction = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.correction.weight)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """``hidden`` [..., D], corrected by the embeddings ``before`` [..., D] of the tokens before them."""
        return hidden + self.correction(self.features(hidden, before))

    def features(self, hidden: Tensor, before: Tensor) -> Tensor:
        """[..., r] of states and embeddings that broadcast against each other."""
        size = hidden.shape[-1:]
        return silu(self.before(rms_norm(before, size)) + self.state(rms_norm(hidden, size)))

    def between(self, hidden: Tensor, before: Tensor, rows_of_head: Tensor) -> Tensor:
        """What is added to the logits of C candidates of N rows for each of P tokens before them: [N, P, C].

        hidden: [N, D]. before: [N, P, D]. rows_of_head: [N, C, D], the candidates' rows of the head.
        """
        features = self.features(hidden[:, None], before)
        return features @ (rows_of_head @ self.correction.weight).mT

    def extra_files(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """The selector's files; its weights are taken out of ``weights``, the state of ``model``."""
        own = {name: weights.pop(f"{NAME}.{name}") for name in self.state_dict()}
        head = model.get_output_embeddings().weight
        names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is head]
        gathered = next((weights[name] for name in names if name in weights), head)  # it may be cut up over processes
        return self._files(own, gathered, ".")

    def save(self, model: PreTrainedModel, folder: str | Path, base: str) -> None:
        """Write the selector into ``folder``; ``base`` is the folder or hub name of ``model``, "." for the same folder."""
        if base != "." and Path(located(base)).is_dir():
            base = str(Path(located(base)).resolve())  # holds in other working directories
        for name, content in self._files(self.state_dict(), model.get_output_embeddings().weight, base).items():
            (Path(folder) / name).write_bytes(content)

    def _files(self, weights: dict[str, Tensor], head: Tensor, base: str) -> dict[str, bytes]:
        shape = {"vocab_size": head.shape[0], "hidden_size": head.shape[1]}
        settings = {"base_model": base, "rank": self.rank, **shape, "head": fingerprint(head)}
        return {
            WEIGHTS_FILE: save({name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}),
            SELECTOR_FILE: (json.dumps(settings, indent=1) + "\n").encode(),
        }


def draft_selector(model: PreTrainedModel) -> DraftSelector | None:
    """The selector of ``model``, if it has one."""
    return getattr(model, NAME, None)


def attach_selector(model: PreTrainedModel, rank: int) -> DraftSelector:
    """Give ``model`` a selector that changes nothing yet; raises ValueError if it has one, or a head without a matrix."""
    if draft_selector(model) is not None:
        raise ValueError("the model has a selector already")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(f"a selector needs a head that is one matrix, and this model's is {type(head).__name__}")
    selector = DraftSelector(head.weight.shape[1], rank).to(head.weight.device)
    setattr(model, NAME, selector)
    return selector


def load_selector(model: PreTrainedModel, folder: str | Path) -> DraftSelector:
    """Attach the selector in ``folder`` to ``model``, in place of one that it has.

    Raises ValueError if there is none, if it is damaged, or if it was made for another vocabulary or another model.
    """
    settings = read_settings(folder)
    made, own = (settings["vocab_size"], settings["hidden_size"]), tuple(model.get_output_embeddings().weight.shape)
    if made != own:
        raise ValueError(
            f"the selector in {str(folder)!r} was made for {made[0]} tokens of width {made[1]}, and this model has "
            f"{own[0]} of width {own[1]}"
        )
    if settings["head"] != fingerprint(model.get_output_embeddings().weight):
        raise ValueError(f"the selector in {str(folder)!r} was made for another model: the weights of the head differ")
    try:
        weights = load_file(Path(folder) / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{WEIGHTS_FILE} in {str(folder)!r} cannot be read: {error}") from error
    selector = DraftSelector(own[1], settings["rank"])
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in selector.state_dict().items()}:
        raise ValueError(f"{WEIGHTS_FILE} in {str(folder)!r} does not hold the weights that {SELECTOR_FILE} names")
    selector.load_state_dict(weights)
    selector.to(device=model.device, dtype=model.dtype).requires_grad_(False).eval()
    setattr(model, NAME, selector)
    return selector


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What ``draft_selector.json`` in ``folder`` says; ValueError if there is none, or if it cannot be one."""
    settings = read_settings_beside(folder, SELECTOR_FILE, SETTINGS, "selector")
    check_count(f"rank in {SELECTOR_FILE}", settings["rank"])
    return settings
