"""Set Block Decoding (arXiv 2509.04185): an objective to train with and decoders to generate with.

decoder = SetBlockDecoder(block_size=16, rule=EntropyBound(0.1))
model.generate(**inputs, max_new_tokens=256, custom_generate=decoder)
"""

from decoding import ConfidenceFactor, ConfidenceThreshold, EntropyBound, TopK
from sbd.decoder import SetBlockDecoder
from sbd.lossless.decoder import SelfSpeculativeDecoder
from sbd.lossless.drafts import Draft, DraftSource
from sbd.objective import SetBlockObjective
from sbd.revision import Remask

__all__ = [
    "ConfidenceFactor",
    "ConfidenceThreshold",
    "Draft",
    "DraftSource",
    "EntropyBound",
    "Remask",
    "SelfSpeculativeDecoder",
    "SetBlockDecoder",
    "SetBlockObjective",
    "TopK",
]
