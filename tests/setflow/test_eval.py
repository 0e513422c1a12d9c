"""``setflow eval`` and its commands."""

import json
import re
import shutil
from pathlib import Path
from xml.dom import minidom

import pytest
from rich.text import Text

from rpt import ResampleConfig, attach_offset_code, save_offset_code
from setflow.loading import load_model
from setflow.text import MASK
from setflow.trace import trace_lines, trace_svg

needs_lm_eval = pytest.mark.usefixtures("lm_eval")


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")


@pytest.fixture(scope="session")
def roomy(model_folder) -> str:
    """A model whose context holds the tasks' prompts."""
    return model_folder(max_position_embeddings=512)


@needs_lm_eval
def test_scores_and_costs(setflow, roomy, tmp_path):
    arguments = ["--model", roomy, "--tasks", "additions", "--limit", "3", "--max-gen-toks", "8", "--batch-size", "2"]
    code, out, err = setflow("eval", *arguments, "--decoder", "sbd-lossless:block_size=4", "--out", str(tmp_path))
    assert code == 0, err
    assert "exact_match" in out and "tokens per forward" in out and "Traceback" not in err
    (costs,) = tmp_path.rglob("decoding_2*.json")
    assert json.loads(costs.read_text())["total"]["samples"] == 3
    (results,) = tmp_path.rglob("results_*.json")
    arguments = json.loads(results.read_text())["config"]["model_args"]
    assert arguments["pretrained"] == roomy and arguments["decoder"] == "sbd-lossless:block_size=4"
    assert len((tmp_path / "finished.jsonl").read_text().splitlines()) == 3


@needs_lm_eval
def test_no_word_of_git_outside_a_repository(setflow, roomy, tmp_path, monkeypatch):
    from eval import run

    run._commit.cache_clear()
    monkeypatch.chdir(tmp_path)
    code, _, err = setflow("eval", "--model", roomy, "--tasks", "additions", "--limit", "1", "--max-gen-toks", "4")
    assert code == 0 and "fatal" not in err and "git" not in err
    run._commit.cache_clear()


@needs_lm_eval
def test_by_default_the_decoder_is_the_models_own(setflow, roomy):
    code, out, err = setflow("eval", "--model", roomy, "--tasks", "additions", "--limit", "1", "--max-gen-toks", "4")
    assert code == 0, err
    tokens, forwards = map(int, re.search(r"(\d+) tokens, (\d+) forwards", out).groups())
    assert tokens == 4 and forwards != tokens  # ntp would need as many


@needs_lm_eval
def test_a_model_with_an_offset_code_is_evaluated_by_its_own_decoder(setflow, roomy, tmp_path):
    model, tokenizer = load_model(roomy)
    attach_offset_code(model, ResampleConfig())
    save_offset_code(model, tmp_path)
    model.generation_config.decoder, model.generation_config._from_model_config = "rpt:iterations=1", False
    plain = {name: weight for name, weight in model.state_dict().items() if "offset" not in name}
    model.save_pretrained(tmp_path, state_dict=plain)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--tasks", "additions", "--limit", "1", "--max-gen-toks", "4"]
    code, out, err = setflow("eval", *arguments, "--out", str(tmp_path / "out"))
    assert code == 0, err
    (costs,) = (tmp_path / "out").rglob("decoding_2*.json")
    assert json.loads(costs.read_text())["decoder"].startswith("ResampleDecoder(window=2, iterations=1")


@needs_lm_eval
@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--tasks", "no_such_task"], "'no_such_task'"),
        (["--tasks", "humaneval"], "--confirm-run-unsafe-code"),
        (["--decoder", "sbdd"], "did you mean 'sbd'"),
        (["--batch-size", "many"], "batch_size must be"),
        (["--model", "./no/such/model"], "does not exist"),
        (["--data", "./no/such/data"], "data must be a folder"),
        (["--dtype", "fp8"], "dtype must be one of"),
        (["--limit", "0"], "limit must be"),
        (["sweep", "--vary", "block_size"], "KEY=VALUE"),
        (["sweep", "--vary", "block_sise=4"], "block_sise"),
        (["sweep", "--control", "./no/such/model"], "does not exist"),
        (["sweep", "--decoder", "sbd:block_size=0"], "block_size must be"),
        (["--limit", "3", "sweep"], "--limit must stand behind 'sweep'"),
        (["report", "./no/such/folder"], "has no sweep"),
        (["trace", ""], "prompt is empty"),
    ],
)
def test_mistakes_are_one_sentence(setflow, roomy, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    if arguments[0].startswith("--") and "--model" not in arguments and "sweep" not in arguments:
        arguments = ["--model", roomy, "--limit", "1", *arguments]
    code, out, err = setflow("eval", *arguments)
    assert code == 2 and out == "", err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and "Traceback" not in err


@needs_lm_eval
@pytest.mark.parametrize("same_name", [False, True])
def test_a_sweep_ends_in_a_report(setflow, roomy, model_folder, tmp_path, monkeypatch, same_name):
    pytest.importorskip("matplotlib", reason="needs matplotlib: install the extra [eval]")
    monkeypatch.chdir(tmp_path)
    control = tmp_path / "control" / (Path(roomy).name if same_name else "other")
    shutil.copytree(model_folder(max_position_embeddings=512, num_hidden_layers=1), control)
    arguments = ["--model", roomy, "--control", str(control), "--decoder", "ntp", "--decoder", "sbd"]
    arguments += ["--vary", "block_size=2,4"]
    arguments += ["--tasks", "additions", "--limit", "2", "--max-gen-toks", "4", "--name", "small"]
    code, out, err = setflow("eval", "sweep", *arguments)
    assert code == 0, err
    assert out == "build/report/report.md\n" and "[4/4]" in err
    rows = [json.loads(line) for line in (tmp_path / "build/report/small.jsonl").read_text().splitlines()]
    assert [row["decoder"] for row in rows] == ["ntp", "ntp", "sbd:block_size=2", "sbd:block_size=4"]
    assert rows[0]["model"] != rows[1]["model"]
    text = (tmp_path / "build/report/report.md").read_text()
    assert "## small" in text and "sbd:block_size=4" in text and "(small-speed-quality.svg)" in text
    (tmp_path / "build/report/report.md").unlink()
    assert setflow("eval", "report")[0] == 0
    assert (tmp_path / "build/report/report.md").read_text() == text


PIECES, DECIDED = ["one", " ", "two", "\n", "three"], [1, 2, 1, 3, 2]


def test_a_line_of_the_trace_shows_what_is_decided_so_far():
    lines = list(trace_lines(PIECES, DECIDED, width=40))
    assert [line.plain for line in lines] == [
        f"1  one{MASK}two{MASK * 6}",
        f"2  one two{MASK}three",
        "3  one two\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}three",
        "",
    ]


def test_a_long_trace_is_cut_into_parts_that_fit():
    pieces, decided = ["abc"] * 40 + ["x" * 30], [i // 3 + 1 for i in range(40)] + [20]
    lines = list(trace_lines(pieces, decided, width=20))
    assert max(line.cell_len for line in lines) <= 20
    ends = [a.plain[4:] for a, b in zip(lines, lines[1:], strict=False) if not b.plain]
    assert "".join(ends) == "abc" * 40 + "x" * 16 and not any(MASK in end for end in ends)
    assert len(lines) < 40  # each part has only its own forwards


def test_tokens_of_one_forward_have_one_colour_in_every_line():
    first, second, _, _ = trace_lines(PIECES, DECIDED, width=40)

    def colour(line: Text, place: int) -> str:
        return next(str(span.style).split()[-1] for span in line.spans if span.start <= place < span.end)

    assert colour(first, 3) == colour(second, 3) == colour(second, 7) != colour(second, 12)


def test_the_trace_of_an_answer(setflow, tiny, tmp_path):
    arguments = [
        "--model",
        tiny,
        "--max-new-tokens",
        "12",
        "--decoder",
        "sbd:block_size=4",
        "--out",
        f"{tmp_path}/t.svg",
    ]
    code, out, err = setflow("eval", "trace", "1 + 2 = ?", *arguments)
    assert code == 0, err
    tokens, forwards = map(int, re.search(r"(\d+) tokens in (\d+) forwards", err).groups())
    assert tokens == 12 and len(out.strip().splitlines()) <= forwards + 1
    picture = (tmp_path / "t.svg").read_text()
    minidom.parseString(picture)
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")


def test_a_picture_holds_the_text_of_its_lines():
    picture = minidom.parseString(trace_svg("a <title>", trace_lines(PIECES, DECIDED, 40), 40))
    texts = "".join(node.firstChild.data for node in picture.getElementsByTagName("text"))
    assert "three" in texts and "a\xa0<title>" in texts
