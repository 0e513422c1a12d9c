"""What a request may ask of the decoders, and what a server gives where it does not ask.

A request names its wishes in vLLM's ``SamplingParams.extra_args``, over HTTP in ``vllm_xargs``: ``decoder``, a name or a
whole spec such as "sbd:block_size=16,entropy_bound=0.1", and the decoder's own keys. This module knows no vLLM.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from decoding.inputs.checks import check_choice, check_count, did_you_mean
from decoding.inputs.spec import load_spec
from decoding.rules import EntropyBound, RevealRule

Kind = Literal["ntp", "sbd", "sbd-lossless"]
KINDS = ("ntp", "sbd", "sbd-lossless")
RULE_KEYS = ("entropy_bound", "confidence_threshold", "confidence_factor", "top_k", "order", "max_reveal")
KEYS = {
    "ntp": (),
    "sbd": ("block_size", *RULE_KEYS, "anchor", "commit", "entropy_from"),
    "sbd-lossless": ("block_size",),
}
# Keys of extra_args that are vLLM's own.
OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
LARGEST_BLOCK = 64  # the width of a canvas costs memory for every request that runs


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """A decoder of the server. Each field means what it does in sbd.SetBlockDecoder.

    kind: "ntp" is next-token decoding, "sbd" Set Block Decoding, "sbd-lossless" self-speculation in one forward.
    """

    kind: Kind
    block_size: int = 1
    rule: RevealRule = dataclasses.field(default_factory=EntropyBound)
    anchor: bool = False
    commit: Literal["block", "prefix"] = "block"
    entropy_from: Literal["sampled", "raw"] = "sampled"

    @property
    def first_token_from_prompt(self) -> bool:
        """Whether the prompt's last row gives the first token, because it is exact."""
        return self.kind != "sbd" or self.anchor

    @property
    def most_drafts(self) -> int:
        """How many drafts one forward verifies at most."""
        return self.block_size - 1 if self.kind == "sbd-lossless" else 0

    @property
    def widest(self) -> int:
        """Rows of a forward behind the text, at most: drafts and masks."""
        return 0 if self.kind == "ntp" else self.most_drafts + self.block_size


def options_from_spec(spec: str) -> DecoderOptions:
    """The server's form of a decoder spec.

    Raises ValueError for what is no spec, and for a decoder or a value that the server does not have.

    >>> options_from_spec("sbd-lossless:block_size=4").widest
    7
    """
    name, _, _ = spec.partition(":")
    check_choice("decoder", name, KINDS)
    decoder: Any = load_spec(spec)
    if getattr(decoder, "mask_token_id", None) is not None:
        raise ValueError("mask_token_id: a server takes the mask token from the model's files; leave it out")
    if name == "ntp":
        return DecoderOptions("ntp")
    check_count("block_size", decoder.block_size, 1, LARGEST_BLOCK)
    if name == "sbd-lossless":
        check_choice("draft (of a server)", decoder.draft, ("mask",))
        return DecoderOptions("sbd-lossless", decoder.block_size)
    if decoder.revision is not None:
        raise ValueError(f"revise: a server has no revisions, got {decoder.revision!r}; leave it out")
    anchor = decoder.anchor or decoder.block_size == 1  # a block of one is next-token decoding
    return DecoderOptions("sbd", decoder.block_size, decoder.rule, anchor, decoder.commit, decoder.entropy_from)


def served_spec(spec: str) -> str:
    """``spec``, which a model names for itself, without what only one process can have: drafts from the text, measured costs.

    >>> served_spec("sbd-lossless:block_size=8,draft=both,look_ahead=auto")
    'sbd-lossless:block_size=8'
    """
    name, values = _parts(spec)
    return _joined(name, {key: value for key, value in values.items() if key in KEYS.get(name, ())})


def request_spec(default: str, wishes: Mapping[str, Any] | None) -> str:
    """The spec of a request that has these ``extra_args``; the ``default`` decoder's settings hold where it has none.

    Raises ValueError for a key that there is not.

    >>> request_spec("sbd:block_size=16,entropy_bound=0.1", {"entropy_bound": 0.3})
    'sbd:block_size=16,entropy_bound=0.3'
    >>> request_spec("sbd:block_size=16,entropy_bound=0.1", {"decoder": "sbd-lossless", "block_size": 4})
    'sbd-lossless:block_size=4'
    """
    wishes = {key: value for key, value in (wishes or {}).items() if key not in OF_VLLM}
    name, values = _parts(default)
    if (asked := wishes.pop("decoder", None)) is not None:
        if not isinstance(asked, str):
            raise ValueError(f"decoder must be one of {', '.join(KINDS)}, or a spec, got {asked!r}")
        asked_name, asked_values = _parts(asked)
        check_choice("decoder", asked_name, KINDS)
        size = {"block_size": values["block_size"]} if "block_size" in values and asked_name != "ntp" else {}
        values = ({**values} if asked_name == name else size) | asked_values
        if any(key in RULE_KEYS for key in asked_values):
            values = {key: value for key, value in values.items() if key not in RULE_KEYS or key in asked_values}
        name = asked_name
    for key in wishes:
        if key not in KEYS[name]:
            known = sorted({*KEYS[name], "decoder"})
            raise ValueError(
                f"{key!r} is no option of decoder {name}{did_you_mean(key, known)}; it takes {', '.join(known)}"
            )
    own = {key: _as_text(key, value) for key, value in wishes.items()}
    if any(key in RULE_KEYS[:4] for key in own):  # another rule, or the same one with another bound
        values = {key: value for key, value in values.items() if key not in RULE_KEYS[:4]}
    return _joined(name, values | own)


@functools.lru_cache(maxsize=4096)
def cached_options(spec: str) -> DecoderOptions:
    """:func:`options_from_spec`, remembered: requests repeat themselves."""
    return options_from_spec(spec)


def request_options(default: str, largest_block: int, wishes: Mapping[str, Any] | None) -> DecoderOptions:
    """What a request with these ``extra_args`` runs with; ValueError if that is wider than the server's canvas."""
    spec = request_spec(default, wishes)
    size = _parts(spec)[1].get("block_size", "")
    if size.isdigit() and int(size) > largest_block:
        check_count("block_size (of a request)", int(size), 1, largest_block)
    options = cached_options(spec)
    check_count("block_size (of a request)", options.block_size, 1, largest_block)  # by default, where it names none
    return options


def _parts(spec: str) -> tuple[str, dict[str, str]]:
    name, _, text = spec.partition(":")
    pairs = (part.partition("=") for part in text.split(",") if part)
    return name, {key.strip(): value.strip() for key, _, value in pairs}


def _joined(name: str, values: Mapping[str, str]) -> str:
    return name + (":" + ",".join(f"{key}={value}" for key, value in values.items()) if values else "")


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and key in ("block_size", "top_k", "max_reveal"):
        value = int(value)  # JSON of some clients knows no whole numbers
    if not isinstance(value, str | int | float) or "," in str(value) or "=" in str(value):
        raise ValueError(f"{key} must be a number or a word, got {value!r}")
    return str(value)
