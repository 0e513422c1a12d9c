"""Resample-Previous-Tokens (arXiv 2506.06215): an objective to train with and a decoder that revises what it wrote.

decoder = ResampleDecoder(iterations=0.5)
model.generate(**inputs, max_new_tokens=256, custom_generate=decoder)
"""

from decoding import Decoder  # noqa: F401 - a file of this name that is not ours is named by the error
from rpt.config import ResampleConfig
from rpt.decoder import ResampleDecoder
from rpt.objective import ResampleObjective
from rpt.offset_code import OFFSET_CODE_FILE, OffsetCode, attach_offset_code, load_offset_code, save_offset_code
from rpt.permutation import WindowPermuter
from rpt.revision import Resample

__all__ = [
    "OFFSET_CODE_FILE",
    "OffsetCode",
    "Resample",
    "ResampleConfig",
    "ResampleDecoder",
    "ResampleObjective",
    "WindowPermuter",
    "attach_offset_code",
    "load_offset_code",
    "save_offset_code",
]
