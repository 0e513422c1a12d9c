"""What requests may ask for, in words and numbers, and what they are told where they may not."""

import pytest

from decoding.rules import ConfidenceThreshold, EntropyBound, TopK
from serving.options import KEYS, DecoderOptions, options_from_spec, request_options, request_spec, served_spec

DEFAULT = "sbd:block_size=16,entropy_bound=0.1"


def test_specs_become_options():
    assert options_from_spec("ntp") == DecoderOptions("ntp")
    assert options_from_spec("sbd-lossless:block_size=4") == DecoderOptions("sbd-lossless", 4)
    options = options_from_spec("sbd:block_size=4,confidence_threshold=0.5,anchor=true,commit=prefix")
    assert options == DecoderOptions("sbd", 4, ConfidenceThreshold(0.5), True, "prefix")
    assert options_from_spec("sbd:block_size=1").anchor, "a block of one is next-token decoding"


@pytest.mark.parametrize(
    ("wishes", "spec"),
    [
        (None, DEFAULT),
        ({"entropy_bound": 0.5}, "sbd:block_size=16,entropy_bound=0.5"),
        ({"block_size": 4.0}, "sbd:block_size=4,entropy_bound=0.1"),
        ({"confidence_threshold": 0.5}, "sbd:block_size=16,confidence_threshold=0.5"),
        ({"anchor": True}, "sbd:block_size=16,entropy_bound=0.1,anchor=True"),
        ({"decoder": "sbd-lossless"}, "sbd-lossless:block_size=16"),
        ({"decoder": "ntp"}, "ntp"),
        ({"decoder": "sbd:block_size=4"}, "sbd:block_size=4,entropy_bound=0.1"),
        ({"decoder": "sbd:top_k=2", "block_size": 8}, "sbd:block_size=8,top_k=2"),
        ({"kv_transfer_params": {}}, DEFAULT),
    ],
)
def test_wishes_over_a_default(wishes, spec):
    assert request_spec(DEFAULT, wishes) == spec
    request_options(DEFAULT, 16, wishes)


def test_rules_of_wishes():
    assert request_options(DEFAULT, 16, {"top_k": 3}).rule == TopK(3)
    assert request_options(DEFAULT, 16, {"entropy_bound": 1, "order": "confidence"}).rule == EntropyBound(
        1, "confidence"
    )


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"decoder": "rpt"}, "decoder must be one of 'ntp', 'sbd', 'sbd-lossless', got 'rpt'"),
        ({"decoder": 3}, "decoder must be one of ntp, sbd, sbd-lossless, or a spec, got 3"),
        ({"blok_size": 3}, "'blok_size' is no option of decoder sbd, did you mean 'block_size'"),
        ({"decoder": "ntp", "block_size": 3}, "'block_size' is no option of decoder ntp"),
        ({"decoder": "sbd-lossless", "entropy_bound": 1}, "'entropy_bound' is no option of decoder sbd-lossless"),
        ({"entropy_bound": -1}, "entropy_bound must be a number in [0, inf], got -1"),
        ({"entropy_bound": "much"}, "entropy_bound must be a number in [0, inf], got 'much'"),
        ({"entropy_bound": [1]}, "entropy_bound must be a number or a word, got [1]"),
        ({"block_size": 17}, "block_size (of a request) must be a whole number from 1 to 16, got 17"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
        ({"decoder": "sbd-lossless:block_size=4,draft=prompt_lookup"}, "draft (of a server) must be one of 'mask'"),
        ({"decoder": "sbd:revise=remask"}, "revise: a server has no revisions"),
        ({"confidence_threshold": 0.5, "top_k": 2}, "confidence_threshold and top_k are different rules, give one"),
        ({"entropy_bound": "1,top_k=2"}, "entropy_bound must be a number or a word"),
    ],
)
def test_refusals_name_field_value_and_range(wishes, message):
    with pytest.raises(ValueError) as error:
        request_options(DEFAULT, 16, wishes)
    assert message in str(error.value)


def test_a_models_own_spec_loses_what_servers_lack():
    assert served_spec("sbd-lossless:block_size=8,draft=both,look_ahead=auto") == "sbd-lossless:block_size=8"
    assert served_spec(DEFAULT) == DEFAULT
    assert set(KEYS) == {"ntp", "sbd", "sbd-lossless"}
