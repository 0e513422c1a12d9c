"""``setflow estimate decode``: a table of bounds, one JSON object, and one sentence for what cannot be computed."""

import json

import pytest


def test_a_table_and_one_json_object_say_the_same(setflow):
    arguments = (
        "estimate",
        "decode",
        "--device",
        "h200",
        "--batch-size",
        "1",
        "--context",
        "1024",
        "--block-size",
        "8",
    )
    code, out, err = setflow(*arguments)
    assert (code, err) == (0, "") and "prompt-lookup" in out and "317.0" in out
    code, out, _ = setflow(*arguments, "--json")
    report = json.loads(out)
    assert code == 0 and report["computed"] is True
    assert report["rows"][0]["tokens_per_second"] == 317.0 and len(report["rows"]) == 5


def test_a_machine_of_ones_own(setflow):
    code, out, _ = setflow(
        "estimate", "decode", "--shape", "smollm2-135m", "--bandwidth", "16", "--teraflops", "0.1", "--json"
    )
    rows = json.loads(out)["rows"]
    assert code == 0 and rows[0]["milliseconds"] == pytest.approx(269 / 16, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either --device, or --bandwidth and --teraflops"),
        (["--device", "h100", "--bandwidth", "3"], "give either --device, or --bandwidth and --teraflops"),
        (["--device", "abacus"], "device must be one of 'h100', 'h200', 'b200', got 'abacus'"),
        (["--device", "h100", "--weight-bits", "3"], "weight_bits must be one of 16, 8, 4, got 3"),
        (["--bandwidth", "0", "--teraflops", "1"], "bandwidth must be"),
    ],
)
def test_mistakes_are_one_sentence(setflow, arguments, said):
    code, out, err = setflow("estimate", "decode", *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
