"""Decoding that repeats: what ``look_ahead="auto"`` does follows from a recorded cost curve, not from the load of a machine."""

from transformers import PreTrainedModel

from decoding import Engine
from decoding.forward.costs import RowCosts

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# The embedded model in float32 on one CPU thread, least of 400 runs.
CPU_MILLISECONDS = (4.70, 4.70, 4.92, 5.54, 5.85, 6.25, 6.97, 7.39, 9.26, 10.99, 14.16, 17.75, 25.52, 33.67)
# Where reading the weights takes the time, which is the same for all rows, up to the number of rows whose arithmetic takes
# as long: about 300 in bf16 on GPUs that read 3 to 5 TB/s and do 1,000 TFLOP/s.
GPU_ROWS, GPU_TIMES = (1, 128, 256), (1.0, 1.1, 1.4)


def repeatable_engine(model: PreTrainedModel) -> Engine:
    """An engine of its own for ``model``, with the recorded cost curve of the kind of device that it is on.

    Texts, forwards and, for a seed, draws are then the same in every run, however busy the machine is.
    """
    if model.device.type == "cpu":
        return Engine(model, row_costs=RowCosts(ROWS, [milliseconds / 1e3 for milliseconds in CPU_MILLISECONDS]))
    return Engine(model, row_costs=RowCosts(GPU_ROWS, GPU_TIMES))
