"""Decoders as short texts for command lines: ``name:key=value,key=value``."""

import dataclasses
import difflib
import importlib
from typing import Any

from decoding.checks import check_choice
from decoding.decoder import Decoder
from decoding.rules import ConfidenceFactor, ConfidenceThreshold, EntropyBound, RevealRule, TopK

# name: module, class, fields that the name itself sets. Imported when asked for, because methods stand on this package.
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ntp": ("decoding", "NextTokenDecoder", {}),
    "sbd": ("sbd", "SetBlockDecoder", {}),
    "sbd-lossless": ("sbd", "SelfSpeculativeDecoder", {}),
    "prompt-lookup": ("sbd", "SelfSpeculativeDecoder", {"draft": "prompt_lookup"}),
    "rpt": ("rpt", "ResampleDecoder", {}),
    "dfm": ("dfm", "FlowDecoder", {}),
}
# What `revise=` names, with the fields of its class as further keys.
REVISIONS: dict[str, tuple[str, str]] = {"resample": ("sbd", "Resample"), "remask": ("sbd", "Remask")}
RULES: dict[str, type[RevealRule]] = {
    "entropy_bound": EntropyBound,
    "confidence_threshold": ConfidenceThreshold,
    "confidence_factor": ConfidenceFactor,
    "top_k": TopK,
}


def decoder_from_spec(spec: str) -> Decoder:
    """The decoder that ``spec`` describes; keys are the fields of the decoder and of its rule.

    >>> decoder_from_spec("sbd:block_size=16,entropy_bound=0.1")
    SetBlockDecoder(block_size=16, rule=EntropyBound(entropy_bound=0.1, order='entropy', max_reveal=None), \
anchor=False, commit='block', revision=None, entropy_from='sampled', mask_token_id=None)

    Raises ValueError for an unknown decoder or key, with the nearest known name.
    """
    name, _, text = spec.partition(":")
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}{_nearest(name, DECODERS)}; known are {', '.join(DECODERS)}")
    module, class_name, preset = DECODERS[name]
    kind = getattr(importlib.import_module(module), class_name)
    values = dict(preset)
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"decoder spec {spec!r}: {part!r} has no value, write key=value")
        values[key.strip()] = _parse(value.strip())

    revision = _revision(spec, kind, values)
    fields = {field.name for field in dataclasses.fields(kind) if field.name not in ("rule", "revision")}
    takes_rule = any(field.name == "rule" for field in dataclasses.fields(kind))
    rule_fields = {field.name for rule in RULES.values() for field in dataclasses.fields(rule)} if takes_rule else set()
    for key in values:
        if key not in fields | rule_fields:
            known = sorted(fields | rule_fields)
            raise ValueError(
                f"decoder spec {spec!r}: unknown key {key!r}{_nearest(key, known)}; {name} takes {', '.join(known) or 'none'}"
            )
    rule_values = {key: values.pop(key) for key in list(values) if key in rule_fields}
    if rule_values:
        values["rule"] = _rule(spec, rule_values)
    if revision is not None:
        values["revision"] = revision
    return kind(**values)


def _revision(spec: str, kind: type, values: dict[str, Any]) -> Any:
    """What ``revise=NAME`` and the keys of its fields ask for; takes them out of ``values``."""
    name = values.get("revise")
    if name is None or not any(field.name == "revision" for field in dataclasses.fields(kind)):
        return None
    check_choice(f"decoder spec {spec!r}: revise", name, tuple(REVISIONS))
    del values["revise"]
    module, class_name = REVISIONS[name]
    revision = getattr(importlib.import_module(module), class_name)
    known = [field.name for field in dataclasses.fields(revision)]
    return revision(**{key: values.pop(key) for key in known if key in values})


def _rule(spec: str, values: dict[str, Any]) -> RevealRule:
    named = [key for key in values if key in RULES]
    if len(named) > 1:
        raise ValueError(f"decoder spec {spec!r}: {' and '.join(named)} are different rules, give one")
    kind = RULES[named[0]] if named else EntropyBound
    for key in values:
        check_choice(
            f"decoder spec {spec!r}: key of {kind.__name__}", key, [field.name for field in dataclasses.fields(kind)]
        )
    return kind(**values)


def _parse(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
