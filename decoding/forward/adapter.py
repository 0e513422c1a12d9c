"""Row-gated LoRA: low-rank terms on mask rows only, so that the base model's own text stays as it was, bit for bit.

A clean row, its keys and values and its logits never meet the adapter; a mask row does, in every linear layer and in
the embedding of the mask token. So SelfSpeculativeDecoder drafts with the adapter and verifies with the base model:

    model, tokenizer = load_model(FOLDER)    # base model and adapter; load_adapter(model, FOLDER) if it is loaded already
    model.generate(**inputs, custom_generate=SelfSpeculativeDecoder(block_size=8))    # BASE's text, only faster

Since the terms depend on the row, they cannot be merged into the weights. Precedents: Apple's multi-token prediction
(arXiv 2507.11851), I-DLM (arXiv 2604.11035).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import GenerationConfig, PreTrainedModel

from decoding.forward.gating import block_rows
from decoding.source import ADAPTER_FILE

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS_FILE = "gated_adapter.safetensors"
NAME = "gated_adapter"  # of the submodule, so that it moves with the model and its parameters are found
REMEMBERED = ("mask_token_id", "trained_block_sizes", "decoder")  # fields of the generation config


class LowRank(nn.Module):
    """output [..., out] + scale * x down^T up^T of x [..., in], on some rows; ``up`` starts at zero."""

    def __init__(self, size_in: int, size_out: int, rank: int, scale: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, size_in))
        self.up = nn.Parameter(torch.zeros(size_out, rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, output: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """``rows`` is [...] bool. Three kernels: decoding waits for their number more than for their size."""
        low = linear(x, self.down).flatten(0, -2)
        added = torch.addmm(output.flatten(0, -2), low, self.up.T, alpha=self.scale).view_as(output)
        return torch.where(rows[..., None], added, output)


class GatedAdapter(nn.Module):
    """The trained part: a LowRank for each linear layer, and the vector that embeds the mask token.

    rank: of the terms; alpha: they are multiplied by alpha / rank; targets: last parts of the names of linear layers.
    """

    def __init__(self, model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str] = LINEAR_LAYERS):
        super().__init__()
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        self.mask_token_id: int | None = None
        self.replaced: dict[str, Any] = {}  # what the model's generation config said before
        embeddings = model.get_input_embeddings().weight
        self.mask_embedding = nn.Parameter(embeddings.detach().mean(0).float())
        self.terms = nn.ModuleDict()
        for name, layer in _linear_layers(model, self.targets):
            term = LowRank(layer.in_features, layer.out_features, rank, alpha / rank)
            self.terms[name.replace(".", "-")] = term.to(embeddings.device)
        if not self.terms:
            raise ValueError(f"targets: the model has no linear layer whose name ends in one of {', '.join(targets)}")

    def attach(self, model: PreTrainedModel) -> None:
        """Let the layers of ``model`` add the terms to their output on block rows. Its own weights stay as they are."""
        if hasattr(model, NAME):
            raise ValueError("the model has a gated adapter already; call remove_adapter(model) first")
        setattr(model, NAME, self)
        self._hooks = [model.get_input_embeddings().register_forward_hook(self._embed)]
        for name, layer in _linear_layers(model, self.targets):
            self._hooks.append(layer.register_forward_hook(_hook_of(self.terms[name.replace(".", "-")])))

    def _embed(self, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        rows, (tokens, *_) = block_rows(), arguments
        if rows is None:
            return None
        return torch.where((rows & (tokens == self.mask_token_id))[..., None], self.mask_embedding.to(output), output)

    def save(self, model: PreTrainedModel, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the adapter, the name of its base model, and what decoders must know, into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.to(dtype).contiguous() for name, weight in self.state_dict().items()}, folder / WEIGHTS_FILE
        )
        settings = {"base_model": located_base(model), "rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        settings["generation"] = {name: getattr(model.generation_config, name, None) for name in REMEMBERED}
        (folder / ADAPTER_FILE).write_text(json.dumps(settings, indent=1) + "\n")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> GatedAdapter:
    """Attach the adapter in ``folder`` to ``model``, which decodes blocks from then on; next-token text is unchanged.

    Raises ValueError if there is none or if it was made for a model of another shape.
    """
    settings = read_settings(folder)
    adapter = GatedAdapter(model, settings["rank"], settings["alpha"], settings["targets"])
    weights = load_file(Path(folder) / WEIGHTS_FILE)
    expected = {name: tuple(weight.shape) for name, weight in adapter.state_dict().items()}
    if expected != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise ValueError(
            f"the adapter in {str(folder)!r} does not fit this model: it was made for {settings['base_model']!r}"
        )
    adapter.load_state_dict(weights)
    adapter.to(device=model.device, dtype=model.dtype).requires_grad_(False).eval()
    adapter.mask_token_id = settings["generation"]["mask_token_id"]
    adapter.attach(model)
    own = model.generation_config
    adapter.replaced = {name: getattr(own, name, None) for name in (*REMEMBERED, "_from_model_config")}
    for name, value in settings["generation"].items():
        if value is not None:
            setattr(own, name, value)
    own._from_model_config = False  # else transformers drops these fields when it saves and loads
    return adapter


def load_low_rank(model: PreTrainedModel, folder: str | Path) -> None:
    """Attach peft's adapter in ``folder`` unless it is there already, and take over what decoders must know beside it."""
    if not model._hf_peft_config_loaded:
        model.load_adapter(str(folder))
    if not (Path(folder) / "generation_config.json").is_file():
        return
    saved, own = GenerationConfig.from_pretrained(folder), model.generation_config
    for name in REMEMBERED:
        if getattr(saved, name, None) is not None:
            setattr(own, name, getattr(saved, name))
    own._from_model_config = False


def located_base(model: PreTrainedModel) -> str:
    """Where ``model`` was loaded from, in a form that holds in other working directories: a whole path, or a hub name."""
    base = Path(model.name_or_path)
    return str(base.resolve()) if base.is_dir() else model.name_or_path


def base_of(folder: str | Path) -> str:
    """Folder or hub name of the model that the adapter in ``folder`` belongs to; "." is one in the same folder."""
    name = read_settings(folder)["base_model"]
    return str(folder) if name == "." else name


def holds_adapter(folder: str | Path) -> bool:
    """Whether ``folder`` is one and holds a gated adapter."""
    return (Path(folder) / ADAPTER_FILE).is_file()


def remove_adapter(model: PreTrainedModel) -> None:
    """Take the adapter off again; the model is the base model."""
    adapter = gated_adapter(model)
    if adapter is None:
        raise ValueError("the model has no gated adapter")
    for hook in adapter._hooks:
        hook.remove()
    for name, value in adapter.replaced.items():
        setattr(model.generation_config, name, value)
    delattr(model, NAME)


def gated_adapter(model: PreTrainedModel) -> GatedAdapter | None:
    """The gated adapter of ``model``, if it has one."""
    return getattr(model, NAME, None)


def read_settings(folder: str | Path) -> dict:
    """What ``gated_adapter.json`` in ``folder`` says; ``base_model`` is the model that the adapter belongs to."""
    try:
        return json.loads((Path(folder) / ADAPTER_FILE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} holds no gated adapter: {ADAPTER_FILE} is missing") from None


def _linear_layers(model: PreTrainedModel, targets: Sequence[str]) -> list[tuple[str, nn.Module]]:
    layers = model.get_decoder().named_modules()
    return [(name, layer) for name, layer in layers if name.rpartition(".")[2] in targets]


def _hook_of(term: LowRank):
    def add(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        rows = block_rows()
        return None if rows is None else term(output, arguments[0], rows)

    return add
