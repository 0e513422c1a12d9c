"""Decoders as short texts for command lines: ``name:key=value,key=value``.

What is one's own is named by where it is, ``module:Class``: a decoder (``module:Class:key=value``), a reveal rule
(``rule=module:Class``, its fields are further keys), a revision (``revise=module:Class``), a draft source
(``draft=module:Class``) or a flow sampler (``sampler=module:Class``).

A decoder around another names that one by its last key: all that follows ``decoder=`` is the other's spec, as in
``smc:particles=8,reward=module:function,decoder=sbd-lossless:block_size=8``.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from decoding.inputs.checks import check_choice, did_you_mean, named_object
from decoding.inputs.signatures import signature_of

# Names of classes, (module, class): they are imported when asked for, because methods stand on this package.
Place = tuple[str, str]
# name: class, fields that the name itself sets
DECODERS: dict[str, tuple[Place, dict[str, Any]]] = {
    "ntp": (("decoding", "NextTokenDecoder"), {}),
    "sbd": (("sbd", "SetBlockDecoder"), {}),
    "sbd-lossless": (("sbd", "SelfSpeculativeDecoder"), {}),
    "prompt-lookup": (("sbd", "SelfSpeculativeDecoder"), {"draft": "prompt_lookup"}),
    "rpt": (("rpt", "ResampleDecoder"), {}),
    "dfm": (("dfm", "FlowDecoder"), {}),
    "smc": (("steering", "SteeredDecoder"), {}),
    "power": (("steering", "SteeredDecoder"), {"alpha": 4}),
}
# What `revise=` names, with the fields of its class as further keys.
REVISIONS: dict[str, Place] = {"resample": ("rpt", "Resample"), "remask": ("sbd", "Remask")}
RULES: dict[str, Place] = {
    "entropy_bound": ("decoding.rules", "EntropyBound"),
    "confidence_threshold": ("decoding.rules", "ConfidenceThreshold"),
    "confidence_factor": ("decoding.rules", "ConfidenceFactor"),
    "top_k": ("decoding.rules", "TopK"),
}
MADE_OF = {"rule", "revision", "decoder"}  # fields that are no plain values
INNER = re.compile(r"[:,]\s*decoder\s*=\s*")


@dataclasses.dataclass
class Part:
    """A decoder, a rule or a revision that a spec asks for: its class, the values of its fields, and what those hold."""

    place: Place
    values: dict[str, Any]
    parts: dict[str, "Part"] = dataclasses.field(default_factory=dict)

    def load(self) -> Any:
        parts = {field: part.load() for field, part in self.parts.items()}
        return named_object("decoder spec", ":".join(self.place))(**self.values, **parts)

    def check(self) -> None:
        """Raise ValueError for a value of which that shows without an import."""
        for part in self.parts.values():
            part.check()
        if (signature := signature_of(*self.place)) is not None:
            signature.check(self.values)


def load_spec(spec: str) -> Any:
    """What ``spec`` describes, its classes imported: :func:`decoding.decoder_from_spec` for those who know decoders."""
    return parse_spec(spec, _fields).load()


def check_spec(spec: str) -> None:
    """Raise ValueError for what is wrong with ``spec``, as far as that shows before torch is imported.

    Decoders, keys and plain values of keys are known; :func:`decoding.decoder_from_spec` knows the rest.
    """
    parse_spec(spec, _unloaded_fields).check()


def names_code(spec: str) -> bool:
    """Whether ``spec`` names a class by its module, which would be imported."""
    own, inner = split_spec(spec)
    name, _, rest = own.partition(":")
    return ":" in rest or bool(rest) and name not in DECODERS or inner is not None and names_code(inner)


def is_around(spec: str) -> bool:
    """Whether the decoder of ``spec`` goes around another one; like :func:`check_spec` without torch."""
    return "decoder" in _unloaded_fields(parse_spec(spec, _unloaded_fields).place)


def split_spec(spec: str) -> tuple[str, str | None]:
    """A spec without the decoder that it is around, and the spec of that one, None if there is none.

    >>> split_spec("smc:particles=8,decoder=sbd:block_size=4,anchor=true")
    ('smc:particles=8', 'sbd:block_size=4,anchor=true')
    """
    found = INNER.search(spec)
    return (spec, None) if found is None else (spec[: found.start()], spec[found.end() :])


def keys_of(spec: str) -> set[str]:
    """The keys that the decoder of ``spec`` and its rule have; like :func:`check_spec` without torch."""
    decoder = parse_spec(spec, _unloaded_fields)
    keys = {*_unloaded_fields(decoder.place)} - MADE_OF
    if "rule" in decoder.parts:
        return keys | {*_unloaded_fields(decoder.parts["rule"].place)}
    return keys | {*_unloaded_fields(RULES["entropy_bound"])} if _has_rule(decoder.place) else keys


def parse_spec(spec: str, fields_of: Callable[[Place], tuple[str, ...]]) -> Part:
    """The decoder of ``spec``; fields_of: the fields of a dataclass."""
    outer, inner = split_spec(spec)
    name, _, text = outer.partition(":")
    own, _, rest = text.partition(":")
    if name in DECODERS:
        place, preset = DECODERS[name]
    elif own.isidentifier():  # module:Class, and then its keys
        place, preset, text, name = (name, own), {}, rest, f"{name}:{own}"
    else:
        names = ", ".join(DECODERS)
        raise ValueError(f"unknown decoder {name!r}{did_you_mean(name, DECODERS)}; known are {names}, or module:Class")
    values = dict(preset)
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"decoder spec {spec!r}: {part!r} has no value, write key=value")
        values[key.strip()] = _parse(value.strip())

    known, parts = fields_of(place), {}
    if inner is not None:
        if "decoder" not in known:
            raise ValueError(f"decoder spec {spec!r}: {name} goes around no other decoder, so it has no key 'decoder'")
        parts["decoder"] = _inner(spec, inner, known, fields_of)
    if "revision" in known and values.get("revise") is not None:
        parts["revision"] = _revision(spec, values, fields_of)
    plain = {field for field in known if field not in MADE_OF}
    of_rules = _rule_keys(spec, values, fields_of) if "rule" in known else set()
    for key in values:
        if key not in plain | of_rules:
            takes = sorted(plain | of_rules)
            raise ValueError(
                f"decoder spec {spec!r}: unknown key {key!r}{did_you_mean(key, takes)}; "
                f"{name} takes {', '.join(takes) or 'none'}"
            )
    of_rule = {key: values.pop(key) for key in list(values) if key in of_rules}
    if of_rule:
        parts["rule"] = _rule(spec, of_rule, fields_of)
    return Part(place, values, parts)


def _fields(place: Place) -> tuple[str, ...]:
    kind = named_object("decoder spec", ":".join(place))
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"decoder spec: {':'.join(place)} is no dataclass, so it has no keys")
    return tuple(field.name for field in dataclasses.fields(kind))


def _inner(spec: str, inner: str, outer_keys: tuple[str, ...], fields_of: Callable[[Place], tuple[str, ...]]) -> Part:
    """The decoder of the spec ``inner`` that ends ``spec``."""
    try:
        return parse_spec(inner, fields_of)
    except ValueError as error:
        place = DECODERS.get(inner.partition(":")[0], ((), {}))[0]
        own = fields_of(place) if place else ()
        for part in inner.partition(":")[2].split(","):
            key = part.partition("=")[0].strip()
            if key in outer_keys and key not in own:
                raise ValueError(
                    f"decoder spec {spec!r}: {key!r} must stand before decoder=, since all that follows that is the other's"
                ) from None
        raise error


def _own(spec: str, key: str, value: Any, known: Mapping[str, Place]) -> Place:
    """What ``key=value`` names: one of ``known``, or module:Class."""
    module, colon, name = str(value).partition(":")
    if colon:
        return module, name
    check_choice(f"decoder spec {spec!r}: {key}", value, (*known, "module:Class"))
    return known[value]


def _rule_keys(spec: str, values: dict[str, Any], fields_of: Callable[[Place], tuple[str, ...]]) -> set[str]:
    """The keys that rules take: those of one's own, if ``rule=`` names it, else of all that are known."""
    if "rule" in values:
        return {"rule", *fields_of(_own(spec, "rule", values["rule"], {}))}
    return {field for rule in RULES.values() for field in fields_of(rule)}


def _unloaded_fields(place: Place) -> tuple[str, ...]:
    """The same, from the source where there is one."""
    signature = signature_of(*place)
    return _fields(place) if signature is None else signature.fields


def _has_rule(place: Place) -> bool:
    """Whether a decoder reveals by a rule if none is named."""
    signature = signature_of(*place)
    default = None if signature is None else signature.defaults.get("rule")
    return default is not None and ast.unparse(default) != "None"


def _revision(spec: str, values: dict[str, Any], fields_of: Callable[[Place], tuple[str, ...]]) -> Part:
    """What ``revise=NAME`` and the keys of its fields ask for; takes them out of ``values``."""
    place = _own(spec, "revise", values.pop("revise"), REVISIONS)
    return Part(place, {key: values.pop(key) for key in fields_of(place) if key in values})


def _rule(spec: str, values: dict[str, Any], fields_of: Callable[[Place], tuple[str, ...]]) -> Part:
    if "rule" in values:
        return Part(_own(spec, "rule", values.pop("rule"), {}), values)
    named = [key for key in values if key in RULES]
    if len(named) > 1:
        raise ValueError(f"decoder spec {spec!r}: {' and '.join(named)} are different rules, give one")
    place = RULES[named[0] if named else "entropy_bound"]
    for key in values:
        check_choice(f"decoder spec {spec!r}: key of {place[1]}", key, fields_of(place))
    return Part(place, values)


def _parse(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
