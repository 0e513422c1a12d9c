"""The offset code: a small table that tells a row which token it has to predict, and its file.

Source: arXiv 2506.06215. A row whose offset (position of its target minus that of its token) is 1 is a plain
next-token row and is left exactly as it is, so a model whose offsets are all 1 is the base model bit for bit.
"""

import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from decoding.forward.beside import SavedBeside
from decoding.forward.gating import offsets
from rpt.config import ResampleConfig

OFFSET_CODE_FILE = "offset_code.safetensors"


class OffsetCode(nn.Module, SavedBeside):
    """Codes [N, 2 w, D], zeros to start with: one set of them for the input, or N for as many layers.

    Code ``offset + w - 1`` is added to a token of that offset; those of offsets 0 and 1 are never used.
    """

    # The codes are this times what is trained. Adam moves a weight by about the learning rate a step, and embeddings are
    # hundreds of such steps long; without it a short run ends before the codes are heard. A power of two: no rounding.
    GAIN = 8.0

    def __init__(self, window: int, d_model: int, sets: int = 1):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros(sets, 2 * window, d_model))

    @property
    def codes(self) -> Tensor:
        return self.GAIN * self.table

    def forward(self, hidden: Tensor, offset: Tensor, index: int = 0) -> Tensor:
        """``hidden`` [B, R, D] with the codes of ``offset`` [B, R] added where it is not 1; ``index`` is the set."""
        code = self.codes[index][(offset + self.window - 1).clamp(0, 2 * self.window - 1)]
        return torch.where((offset == 1)[..., None], hidden, hidden + code.to(hidden.dtype))

    def extra_files(self, model, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """OFFSET_CODE_FILE: the codes, taken out of the state ``weights`` of ``model``, and how they were trained."""
        codes = self.GAIN * weights.pop("offset_code.table").detach().float()
        return {
            OFFSET_CODE_FILE: save({"table": codes.cpu().contiguous()}, {"resample": json.dumps(model.config.resample)})
        }

    # What the hooks read from outside must not be frozen into a compiled graph.
    @torch.compiler.disable
    def after_embedding(self, module, arguments, hidden: Tensor) -> Tensor:
        """Forward hook of the token embedding."""
        offset = offsets()
        return hidden if offset is None else self(hidden, offset)

    @torch.compiler.disable
    def before_layer(self, index: int, layer, arguments, named):
        """Forward pre-hook of ``layer``, number ``index``."""
        offset = offsets()
        if offset is None:
            return None
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise ValueError("code_at='layers' cannot be trained with gradient checkpointing; use code_at='input'")
        if arguments:
            return (self(arguments[0], offset, index), *arguments[1:]), named
        return arguments, named | {"hidden_states": self(named["hidden_states"], offset, index)}


def attach_offset_code(model, config: ResampleConfig) -> OffsetCode:
    """Give ``model`` (adapters may be around it) an offset code of zeros and write ``config`` into its configuration.

    Raises ValueError if it already has one.
    """
    model = _innermost(model)
    if getattr(model, "offset_code", None) is not None:
        raise ValueError("offset_code: this model already has one")
    table = model.get_input_embeddings().weight
    code = OffsetCode(config.window, table.shape[1], _num_sets(model, config)).to(table.device)
    if config.code_at == "input":
        model.get_input_embeddings().register_forward_hook(code.after_embedding)
    else:
        for index, layer in enumerate(model.get_decoder().layers):
            layer.register_forward_pre_hook(partial(code.before_layer, index), with_kwargs=True)
    model.offset_code = code
    model.config.resample = config.as_dict()
    return code


def save_offset_code(model, folder: str | Path) -> None:
    """Write the model's offset code and how it was trained into ``folder``, beside the model's or an adapter's files."""
    model = _innermost(model)
    if getattr(model, "offset_code", None) is None:
        raise ValueError("offset_code: this model has none; train it with ResampleObjective first")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in model.offset_code.extra_files(model, model.state_dict()).items():
        (Path(folder) / name).write_bytes(content)


def load_offset_code(model, folder: str | Path) -> OffsetCode:
    """Attach the offset code that lies in ``folder`` to ``model``, whose ``config.resample`` is set from it.

    Raises ValueError if there is none, if its shape does not fit, or if the model's own configuration says otherwise.
    """
    path = Path(folder) / OFFSET_CODE_FILE
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {OFFSET_CODE_FILE}, so there is no offset code in it")
    with safe_open(path, "pt") as file:
        codes = file.get_tensor("table")
        config = ResampleConfig(**json.loads(file.metadata()["resample"]))
    own = getattr(_innermost(model).config, "resample", None)
    if own is not None and ResampleConfig(**own) != config:
        raise ValueError(
            f"config.resample of the model is {own}, but the offset code was trained with {config.as_dict()}"
        )
    width = _innermost(model).get_input_embeddings().weight.shape[1]
    shape = (_num_sets(_innermost(model), config), 2 * config.window, width)
    if codes.shape != shape:
        raise ValueError(f"the offset code in {str(folder)!r} has shape {tuple(codes.shape)}, this model needs {shape}")
    code = attach_offset_code(model, config)
    with torch.no_grad():
        code.table.copy_(codes / code.GAIN)
    return code.requires_grad_(False)  # until an objective trains it


def _innermost(model):
    """The transformers model inside an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _num_sets(model, config: ResampleConfig) -> int:
    return 1 if config.code_at == "input" else len(model.get_decoder().layers)
