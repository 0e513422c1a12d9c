"""Decoders as short texts, and the checks of what users type."""

import dataclasses
import importlib
import math
import sys

import pytest

from decoding import NextTokenDecoder, decoder_from_spec
from decoding.forward.mask_token import find_mask_token
from decoding.inputs.checks import check_choice, check_count, check_range
from decoding.inputs.signatures import signature_of
from decoding.inputs.spec import DECODERS, REVISIONS, RULES, check_spec, names_code
from sbd import ConfidenceFactor, ConfidenceThreshold, EntropyBound, SelfSpeculativeDecoder, SetBlockDecoder, TopK
from steering import SteeredDecoder


@pytest.mark.parametrize(
    ("spec", "decoder"),
    [
        ("ntp", NextTokenDecoder()),
        ("ntp:", NextTokenDecoder()),
        ("sbd", SetBlockDecoder()),
        ("sbd:block_size=8", SetBlockDecoder(block_size=8)),
        ("sbd:block_size=16,entropy_bound=0.35", SetBlockDecoder(rule=EntropyBound(0.35))),
        (
            "sbd:entropy_bound=inf, order=margin, max_reveal=2",
            SetBlockDecoder(rule=EntropyBound(math.inf, "margin", 2)),
        ),
        ("sbd:max_reveal=3", SetBlockDecoder(rule=EntropyBound(max_reveal=3))),
        ("sbd:confidence_threshold=0.8", SetBlockDecoder(rule=ConfidenceThreshold(0.8))),
        ("sbd:confidence_factor=2,max_reveal=none", SetBlockDecoder(rule=ConfidenceFactor(2))),
        ("sbd:top_k=2,order=entropy", SetBlockDecoder(rule=TopK(2, "entropy"))),
        ("sbd:anchor=true,entropy_from=raw", SetBlockDecoder(anchor=True, entropy_from="raw")),
        ("sbd:commit=prefix", SetBlockDecoder(commit="prefix")),
        ("sbd:mask_token_id=5", SetBlockDecoder(mask_token_id=5)),
        ("power", SteeredDecoder(alpha=4)),
        ("power:alpha=2,particles=3", SteeredDecoder(alpha=2, particles=3)),
        (
            "smc:alpha=2, particles=3,decoder=sbd-lossless:block_size=4,draft=both",
            SteeredDecoder(SelfSpeculativeDecoder(4, draft="both"), alpha=2, particles=3),
        ),
        (
            "smc:reward=benchmarks.steering.checkers:right_lines,decoder=sbd:entropy_bound=0.5,anchor=true",
            SteeredDecoder(
                SetBlockDecoder(rule=EntropyBound(0.5), anchor=True), "benchmarks.steering.checkers:right_lines"
            ),
        ),
    ],
)
def test_specs_name_fields_of_decoder_and_rule(spec, decoder):
    assert decoder_from_spec(spec) == decoder
    assert hash(decoder_from_spec(spec)) == hash(decoder)


IMPOSSIBLE = pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sdb", "unknown decoder 'sdb', did you mean 'sbd'?.*known are ntp, sbd"),
        ("zzz", "unknown decoder 'zzz'; known are"),
        ("sbd:blok_size=4", "unknown key 'blok_size', did you mean 'block_size'?.*sbd takes anchor, block_size"),
        ("sbd:gamma=1", "unknown key 'gamma'"),
        ("sbd:rule=1", "rule must be one of 'module:Class', got 1"),
        ("ntp:block_size=4", "unknown key 'block_size'; ntp takes none"),
        ("sbd:block_size", "'block_size' has no value, write key=value"),
        ("sbd:entropy_bound=1,top_k=2", "entropy_bound and top_k are different rules"),
        ("sbd:top_k=2,max_reveal=2", "key of TopK must be one of 'top_k', 'order', got 'max_reveal'"),
        ("sbd:confidence_threshold=0.5,order=margin", "key of ConfidenceThreshold.*got 'order'"),
        ("sbd:block_size=0", "block_size must be a whole number of at least 1, got 0"),
        ("sbd:block_size=2.5", "block_size.*got 2.5"),
        ("sbd:block_size=many", "block_size.*got 'many'"),
        ("sbd:entropy_bound=-1", "entropy_bound.*got -1"),
        ("sbd:entropy_bound=nan", "entropy_bound.*got nan"),
        ("sbd:anchor=maybe", "anchor must be one of True, False, got 'maybe'"),
        ("sbd:commit=token", "commit must be one of 'block', 'prefix', got 'token'"),
        ("ntp:decoder=sbd", "ntp goes around no other decoder, so it has no key 'decoder'"),
        ("smc:alpha=2,decoder=sdb", "unknown decoder 'sdb', did you mean 'sbd'"),
        ("smc:alpha=2,decoder=", "unknown decoder ''"),
        ("smc:alpha=2,partcles=4", "unknown key 'partcles', did you mean 'particles'"),
        (
            "smc:alpha=2,decoder=sbd-lossless:particles=4",
            "'particles' must stand before decoder=, since all that follows",
        ),
        (
            "smc:alpha=2,decoder=sbd-lossless:blok_size=4",
            "'sbd-lossless:blok_size=4': unknown key 'blok_size', did you",
        ),
        ("smc:alpha=2,decoder=sbd-lossless:block_size=1", "block_size must be a whole number of at least 2, got 1"),
        ("smc:particles=0,alpha=2", "particles must be a whole number of at least 1, got 0"),
        ("power:select=first", "select must be one of 'weight', 'best', got 'first'"),
        ("sbd:entropy_from=logits", "entropy_from must be one of 'sampled', 'raw', got 'logits'"),
    ],
)


@IMPOSSIBLE
def test_impossible_specs_say_what_is_wrong_and_what_is_near(spec, message):
    with pytest.raises(ValueError, match=message):
        decoder_from_spec(spec)


@IMPOSSIBLE
def test_the_same_is_said_before_anything_is_imported(spec, message):
    with pytest.raises(ValueError) as late:
        decoder_from_spec(spec)
    with pytest.raises(ValueError) as early:
        check_spec(spec)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "spec",
    [
        "ntp",
        "sbd:confidence_factor=2,max_reveal=none",
        "sbd:block_size=4,revise=resample,accept=gibbs,threshold=0.5",
        "sbd:revise=remask,rounds=2",
        "sbd-lossless:look_ahead=auto,draft=both",
        "prompt-lookup:block_size=4,look_ahead=2",
        "rpt:iterations=0.5,schedule=plain",
        "dfm:sampler=rule,entropy_bound=0.1,block_size=8",
    ],
)
def test_what_is_possible_passes_the_early_check(spec):
    check_spec(spec)
    decoder_from_spec(spec)


@pytest.mark.parametrize(
    "place", [*(place for place, _ in DECODERS.values()), *RULES.values(), *REVISIONS.values()], ids=lambda p: p[1]
)
def test_fields_read_from_the_source_are_those_of_the_class(place):
    module, name = place
    kind = getattr(importlib.import_module(module), name)
    assert signature_of(module, name).fields == tuple(field.name for field in dataclasses.fields(kind))


def test_sources_are_read_as_far_as_they_can_be(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text(
        "from decoding.inputs.checks import check_choice, check_count\n"
        "KINDS = ('a', 'b')\n"
        "@dataclass\nclass Base:\n    size: int = 1\n    tag: ClassVar[str] = 'x'\n"
        "@dataclass\nclass Thing(Base):\n    kind: str = 'a'\n    most: int = 3\n"
        "    def __post_init__(self):\n"
        "        check_choice('kind', self.kind, KINDS)\n"
        "        check_count('most', self.most, self.least())\n"
        "        if self.size:\n            check_count('size', self.size, 5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    signature = signature_of("made_up", "Thing")
    assert signature.fields == ("size", "kind", "most")
    signature.check({"size": 1, "most": 0, "kind": "b"})  # what stands under a condition, or is computed, is left
    with pytest.raises(ValueError, match="kind must be one of 'a', 'b', got 'c'"):
        signature.check({"kind": "c"})
    assert signature_of("made_up", "Nothing") is None and signature_of("no_such_module_anywhere", "X") is None
    assert "made_up" not in sys.modules


@pytest.mark.parametrize("decoder", [NextTokenDecoder(), SetBlockDecoder(block_size=4, rule=TopK(2))])
def test_decoders_are_values(decoder):
    assert decoder == dataclasses.replace(decoder) and hash(decoder) == hash(dataclasses.replace(decoder))
    assert eval(repr(decoder)) == decoder
    for field in dataclasses.fields(decoder):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(decoder, field.name, None)


@pytest.mark.parametrize("rule", [None, "entropy", 0.1, EntropyBound])
def test_rule_must_be_a_rule(rule):
    with pytest.raises(ValueError, match="rule must be EntropyBound, .*got"):
        SetBlockDecoder(rule=rule)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_counts(value):
    check_count("size", 3)
    check_count("size", 3, 0, 3)
    with pytest.raises(ValueError, match=r"size must be a whole number of at least 1, got"):
        check_count("size", value)
    with pytest.raises(ValueError, match="size must be a whole number from 0 to 3, got 4"):
        check_count("size", 4, 0, 3)


def test_ranges():
    check_range("share", 0, 0, 1)
    check_range("share", 1.0, 0, 1)
    for value in (-0.1, 1.1, math.nan, "0", True, None):
        with pytest.raises(ValueError, match=r"share must be a number in \[0, 1\], got"):
            check_range("share", value, 0, 1)
    with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\), got 0"):
        check_range("share", 0, 0, 1, include_low=False, include_high=False)
    with pytest.raises(ValueError, match=r"share must be a number in \[0, 1\), got 1"):
        check_range("share", 1, 0, 1, include_high=False)


def test_choices():
    check_choice("order", "up", ("up", "down"))
    with pytest.raises(ValueError, match="order must be one of 'up', 'down', got 'left'"):
        check_choice("order", "left", ("up", "down"))


def test_mask_token_comes_from_the_call_then_the_generation_config_then_the_config(fresh_model):
    model = fresh_model("llama")
    model.config.mask_token_id = 7
    assert find_mask_token(model, 5) == 5
    assert find_mask_token(model) == 96
    model.generation_config.mask_token_id = None
    assert find_mask_token(model) == 7
    assert find_mask_token(model, 0) == 0
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id: this model has no mask token"):
        find_mask_token(model)
    for value in (97, -1, "<mask>"):
        with pytest.raises(ValueError, match=f"mask_token_id must be a whole number from 0 to 96, got {value!r}"):
            find_mask_token(model, value)


def test_a_decoder_within_another_may_name_code_as_well():
    assert not names_code("smc:alpha=2,decoder=sbd-lossless:block_size=4,draft=both")
    assert names_code("smc:reward=module:function,decoder=ntp") and names_code("smc:alpha=2,decoder=module:Class:a=1")
    assert names_code("smc:alpha=2,decoder=sbd:rule=module:Class")
