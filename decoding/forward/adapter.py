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
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import GenerationConfig, PreTrainedModel

from decoding.forward.base_check import same_weights, sample_weights
from decoding.forward.beside import SavedBeside, read_settings_beside
from decoding.forward.gating import block_rows
from decoding.inputs.checks import check_count, check_range
from decoding.inputs.source import ADAPTER_FILE

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

    def after_layer(self, layer: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        """Forward hook of a linear layer."""
        rows = block_rows()
        return None if rows is None else self(output, arguments[0], rows)

    def forward(self, output: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """``rows`` is [...] bool. Three kernels: decoding waits for their number more than for their size."""
        low = linear(x, self.down).flatten(0, -2)
        added = torch.addmm(output.flatten(0, -2), low, self.up.T, alpha=self.scale).view_as(output)
        return torch.where(rows[..., None], added, output)


class GatedAdapter(nn.Module, SavedBeside):
    """The trained part: a LowRank for each linear layer, and the vector that embeds the mask token.

    rank: of the terms; alpha: they are multiplied by alpha / rank; targets: last parts of the names of linear layers.
    """

    def __init__(self, model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str] = LINEAR_LAYERS):
        super().__init__()
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        self.mask_token_id: int | None = None
        self.base_sample = sample_weights(model)  # by which the base model is known again
        self.replaced: dict[str, Any] = {}  # what the model's generation config said before
        embeddings = next(model.get_input_embeddings().parameters())
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
            term = self.terms[name.replace(".", "-")]
            assert isinstance(term, LowRank)
            self._hooks.append(layer.register_forward_hook(term.after_layer))

    def _embed(self, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        rows, (tokens, *_) = block_rows(), arguments
        if rows is None:
            return None
        return torch.where((rows & (tokens == self.mask_token_id))[..., None], self.mask_embedding.to(output), output)

    def save(self, model: PreTrainedModel, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the adapter, the name of its base model, and what decoders must know, into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.to(dtype) for name, weight in self.state_dict().items()}
        for name, content in self._files(model, weights, located_base(model)).items():
            (folder / name).write_bytes(content)

    def extra_files(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """The adapter's files, to lie beside those of ``model``; its weights are taken out of ``weights``."""
        own = {name: weights.pop(f"{NAME}.{name}") for name in self.state_dict()}
        return self._files(model, own, ".")

    def _files(self, model: PreTrainedModel, weights: dict[str, Tensor], base: str) -> dict[str, bytes]:
        settings = {"base_model": base, "rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        if self.base_sample is not None:
            settings["base_sample"] = self.base_sample
        settings["generation"] = {name: getattr(model.generation_config, name, None) for name in REMEMBERED}
        return {
            WEIGHTS_FILE: save({name: weight.contiguous() for name, weight in weights.items()}),
            ADAPTER_FILE: (json.dumps(settings, indent=1) + "\n").encode(),
        }


def load_adapter(model: PreTrainedModel, folder: str | Path) -> GatedAdapter:
    """Attach the adapter in ``folder`` to ``model``, which decodes blocks from then on; next-token text is unchanged.

    Of what the file says about generation only the fields in ``REMEMBERED`` are taken, and ``remove_adapter`` undoes them.
    Raises ValueError if there is none, if it is damaged or if it was made for another model.
    """
    settings = read_settings(folder)
    adapter = GatedAdapter(model, settings["rank"], settings["alpha"], settings["targets"])
    try:
        weights = load_file(Path(folder) / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{WEIGHTS_FILE} in {str(folder)!r} cannot be read: {error}") from error
    expected = {name: tuple(weight.shape) for name, weight in adapter.state_dict().items()}
    if expected != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise ValueError(
            f"the adapter in {str(folder)!r} does not fit this model: it was made for {settings['base_model']!r}"
        )
    if not fits_base(settings, model):
        raise ValueError(
            f"the adapter in {str(folder)!r} was made for {settings['base_model']!r}, and this model's weights are others"
        )
    taken = {name: settings["generation"].get(name) for name in REMEMBERED}
    check_count(f"mask_token_id in {ADAPTER_FILE}", taken["mask_token_id"], 0, model.config.vocab_size - 1)
    adapter.load_state_dict(weights)
    adapter.to(device=model.device, dtype=model.dtype).requires_grad_(False).eval()
    adapter.mask_token_id = taken["mask_token_id"]
    adapter.attach(model)
    own = model.generation_config
    adapter.replaced = {name: getattr(own, name, None) for name in (*REMEMBERED, "_from_model_config")}
    for name, value in taken.items():
        if value is not None:
            setattr(own, name, value)
    own._from_model_config = False  # else transformers drops these fields when it saves and loads
    return adapter


def fits_base(settings: dict[str, Any], model: PreTrainedModel) -> bool:
    """Whether an adapter of these ``settings`` can have been made for ``model``; True if one of them does not say."""
    wanted, found = settings.get("base_sample"), sample_weights(model)
    return wanted is None or found is None or same_weights(wanted, found)


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
    name = model.name_or_path or ""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def base_of(folder: str | Path, file: str = ADAPTER_FILE) -> str:
    """Folder or hub name of the model that what lies in ``folder`` belongs to; "." is one in the same folder."""
    name = read_settings_beside(folder, file, {"base_model": str}, "trained part")["base_model"]
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


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What ``gated_adapter.json`` in ``folder`` says; ``base_model`` is the model that the adapter belongs to.

    Raises ValueError if there is none, or if it cannot be one.
    """
    kinds = {"base_model": str, "rank": int, "alpha": float | int, "targets": list, "generation": dict}
    settings = read_settings_beside(folder, ADAPTER_FILE, kinds, "gated adapter")
    if not all(isinstance(target, str) for target in settings["targets"]):
        raise ValueError(f"targets in {ADAPTER_FILE} must be names of layers, got {settings['targets']!r}")
    sample = settings.get("base_sample", [])
    if not isinstance(sample, list) or not all(isinstance(value, float | int) for value in sample):
        raise ValueError(f"base_sample in {ADAPTER_FILE} must be a list of numbers, got {sample!r}")
    check_count(f"rank in {ADAPTER_FILE}", settings["rank"])
    check_range(f"alpha in {ADAPTER_FILE}", settings["alpha"], 0, include_low=False, include_high=False)
    return settings


def _linear_layers(model: PreTrainedModel, targets: Sequence[str]) -> list[tuple[str, Any]]:
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    layers = decoder.named_modules()
    return [(name, layer) for name, layer in layers if name.rpartition(".")[2] in targets]
