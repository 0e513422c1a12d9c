"""The public names of ``decoding``."""

from decoding.batch import Batch, Sequence
from decoding.decoder import Decoder
from decoding.engine import Engine, Step
from decoding.forward.adapter import load_adapter, remove_adapter
from decoding.forward.cache import SlotCache
from decoding.forward.loading import load_model
from decoding.forward.mask_token import find_mask_token
from decoding.forward.rows import RowList
from decoding.forward.visibility import Visibility
from decoding.integration import decoder_from_spec, install, uninstall
from decoding.next_token import NextTokenDecoder
from decoding.output import DecodeOutput
from decoding.revision import Revision
from decoding.rules import ConfidenceFactor, ConfidenceThreshold, EntropyBound, RevealRule, RowScores, TopK
from decoding.sampling import LogitsPipeline
from decoding.training.next_token import NextTokenObjective
from decoding.training.objective import Objective

__all__ = [
    "Batch",
    "ConfidenceFactor",
    "ConfidenceThreshold",
    "DecodeOutput",
    "Decoder",
    "Engine",
    "EntropyBound",
    "NextTokenDecoder",
    "NextTokenObjective",
    "Objective",
    "RevealRule",
    "Revision",
    "RowList",
    "RowScores",
    "Sequence",
    "SlotCache",
    "Step",
    "LogitsPipeline",
    "TopK",
    "Visibility",
    "decoder_from_spec",
    "find_mask_token",
    "install",
    "load_adapter",
    "load_model",
    "remove_adapter",
    "uninstall",
]
