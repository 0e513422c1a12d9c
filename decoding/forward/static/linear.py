"""Linear layers on a CPU in the order in which its vector units read weights: packed once, not in every call.

PyTorch's own linear brings the weights into that order each time, which for few rows takes as long again as the product.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

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


def can_pack(weight: Tensor) -> bool:
    """Whether this processor can take ``weight`` packed: float32, or bf16 where oneDNN computes in it."""
    if weight.device.type != "cpu" or type(weight.data) is not Tensor or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
