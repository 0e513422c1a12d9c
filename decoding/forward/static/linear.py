"""Linear layers on a CPU in the order in which its vector units read weights: packed once, not in every call.

PyTorch's own linear brings the weights into that order each time, which for few rows takes as long again as the product.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

INT8_DTYPES = (torch.float32, torch.bfloat16)  # of activations
ROWS = 8  # that the order of the weights is chosen for; it makes no difference from 1 to 32


class Linear:
    """x W^T + b of one layer or of several that read the same x, their outputs side by side."""

    def __init__(self, layers: list[nn.Linear]):
        self.weights = [layer.weight for layer in layers]
        self.biases = [layer.bias for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [linear(x, weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The output and ``other`` added."""
        return other + self(x)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the output."""
        return silu(self(x), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The output times ``other``."""
        return self(x) * other


class PackedLinear(Linear):
    """The same in one kernel each, from a second copy of the weights."""

    def __init__(self, layers: list[nn.Linear]):
        weights = [layer.weight.detach() for layer in layers]
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(joined.contiguous(), ROWS)
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")


class Int8Linear(Linear):
    """The same for torchao's weights of eight bits, which are read as they are and never turned back into full ones."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__(layers)
        codes = [weight.qdata for weight in self.weights]  # type: ignore[attr-defined]
        scales = [weight.scale.flatten() for weight in self.weights]  # type: ignore[attr-defined]
        self.codes = codes[0] if len(codes) == 1 else torch.cat(codes)
        self.scales = torch.cat(scales).to(self.weights[0].dtype)
        self.bias = None if self.biases[0] is None else torch.cat([bias.detach() for bias in self.biases])

    def __call__(self, x: Tensor) -> Tensor:
        output = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.codes, self.scales)
        if self.bias is not None:
            output += self.bias
        return output.view(*x.shape[:-1], -1)


def linear_of(layers: list[nn.Linear]) -> Linear:
    """What runs ``layers`` from the weights that they hold."""
    return Int8Linear(layers) if all(is_int8(layer.weight) for layer in layers) else Linear(layers)


def is_int8(weight: Tensor) -> bool:
    """Whether ``weight`` is of torchao's weight-only kind on a CPU: one scale for each output, no zero point.

    Its class is known by name, since torchao need not be installed.
    """
    if type(weight).__name__ != "Int8Tensor" or weight.device.type != "cpu" or weight.dtype not in INT8_DTYPES:
        return False
    own: Any = weight
    per_output = tuple(own.block_size) == (1, weight.shape[1]) and own.act_quant_kwargs is None
    return per_output and (own.zero_point is None or not bool(own.zero_point.any()))


def can_pack(weight: Tensor) -> bool:
    """Whether this processor can take ``weight`` packed: float32, or bf16 where oneDNN computes in it."""
    if weight.device.type != "cpu" or type(weight.data) is not Tensor or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
