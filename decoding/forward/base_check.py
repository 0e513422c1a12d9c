"""Tell base models of one shape apart by a few of their weights, so that an adapter meets the model it was made for."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from decoding.forward.beside import saved_beside

COUNT = 64  # weights that are looked at
RELATIVE, ABSOLUTE = 1e-2, 1e-5  # what another dtype may change: bfloat16 keeps 8 bits, float16 loses small numbers


def sample_weights(model: PreTrainedModel) -> list[float] | None:
    """One weight from the middle of each of up to 64 matrices and vectors of the base model, spread over all of it.

    What was added to the model does not count. None if nothing can be said: its weights are quantised, wrapped by peft, on
    the meta device, or cut up over processes.
    """
    added = {id(weight) for module in _added(model) for weight in module.parameters()}
    weights = [weight for _, weight in sorted(model.named_parameters()) if id(weight) not in added]
    chosen = [weights[i * len(weights) // COUNT] for i in range(min(COUNT, len(weights)))]
    changed = getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False)
    if changed or not all(map(_is_plain, chosen)):
        return None
    return [float(f"{weight.detach().flatten()[weight.numel() // 2].item():.4g}") for weight in chosen]


def same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two samples can be of one model, each in a dtype of its own.

    >>> same_weights([0.5, -0.1], [0.501, -0.1]), same_weights([0.5, -0.1], [0.5, -0.09])
    (True, False)
    """
    close = (abs(a - b) <= ABSOLUTE + RELATIVE * abs(a) for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and all(close)


def _added(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in saved_beside(model).values() if isinstance(module, nn.Module)]


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.numel() > 0 and not weight.is_meta and not hasattr(weight, "to_local")
