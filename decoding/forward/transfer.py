"""Numbers on their way from the host to the device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: Tensor | np.ndarray | Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``values``, numbers in lists or a tensor of the host, as a tensor on ``device``; the host does not wait for it.

    An ordinary copy waits until the device has done all that it was given before, so that it stands idle until it is given
    more. Memory of the host that is not pinned is read before the call returns, so ``values`` may be forgotten at once.
    """
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)
