"""Sweeps on a tiny random model."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")

from eval import sweep
from eval.sandbox import find_isolation
from eval.sweep import Cell, Settings, make_cells, run_sweep
from eval.variations import vary

SETTINGS = Settings(limit=3, max_gen_toks=12, batch_size=2, device="cpu")
SPECS = ("ntp", "sbd-lossless:block_size=4")


@pytest.fixture(scope="module")
def folder(shared_model, tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    shared_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(cells, path, settings=SETTINGS) -> list[dict]:
    return list(run_sweep(cells, settings, path, "command"))


def steady(rows: list[dict]) -> list[dict]:
    """The rows without what a clock says."""
    timed = ("seconds", "tokens_per_second")
    return [{**row, "decoding": {k: v for k, v in row["decoding"].items() if k not in timed}} for row in rows]


def answers(path) -> dict[str, str]:
    lines = (path.parent / "finished" / path.name).read_text().splitlines()
    return {record["key"]: record["text"] for record in map(json.loads, lines)}


def test_every_cell_has_a_line(folder, tmp_path):
    cells = make_cells({"tiny": (folder, SPECS)}, ["additions", "next_statement"])
    path = tmp_path / "sweep.jsonl"
    rows = run(cells, path)
    assert [(row["decoder"], row["task"]) for row in rows] == [(c.decoder, c.task) for c in cells] and len(rows) == 4
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    for row in rows:
        assert row["decoding"]["samples"] == 3 and row["decoding"]["tokens"] > 0 and row["command"] == "command"
        assert "exact_match,none" in row["scores"] and row["conditions"]["dtype"] == "float32"
    ntp, lossless = (row for row in rows if row["task"] == "additions")
    assert ntp["decoding"]["tokens"] == lossless["decoding"]["tokens"] == ntp["decoding"]["forwards"]
    assert "acceptance_lengths" in lossless["decoding"] and "acceptance_lengths" not in ntp["decoding"]
    texts = list(answers(path).values())
    assert sorted(texts[:3]) == sorted(texts[3:6])  # of ntp and of the lossless decoder


def test_the_line_of_a_code_task_says_what_its_sandbox_was(folder, tmp_path, data_folder, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    cells = make_cells({"tiny": (folder, ["ntp"])}, ["humaneval", "additions"])
    settings = replace(SETTINGS, limit=1, max_gen_toks=4, data=data_folder, confirm_run_unsafe_code=True)
    code, plain = run(cells, tmp_path / "sweep.jsonl", settings)
    assert code["sandbox"] == str(find_isolation()) and "sandbox" not in plain
    # A second consent makes no other cell.
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "SetflowLM", None)
        assert run(cells, tmp_path / "sweep.jsonl", replace(settings, confirm_weak_sandbox=True)) == [code, plain]


def test_what_is_done_is_not_done_again(folder, tmp_path, monkeypatch):
    cells = make_cells({"tiny": (folder, SPECS)}, ["additions"])
    first = run(cells, tmp_path / "sweep.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "SetflowLM", None)  # no model is loaded
        assert run(cells, tmp_path / "sweep.jsonl") == first
        assert run(cells[1:], tmp_path / "sweep.jsonl") == first[1:]
    assert (tmp_path / "sweep.jsonl").read_text().count("\n") == 2, "fewer cells take nothing away"
    before = answers(tmp_path / "sweep.jsonl")
    larger = run(cells[1:], tmp_path / "sweep.jsonl", replace(SETTINGS, limit=4))
    assert larger[0]["decoding"]["samples"] == 4
    assert len(answers(tmp_path / "sweep.jsonl")) == len(before) + 1  # three were there already


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_sweep_gives_what_an_unbroken_one_gives(folder, tmp_path, monkeypatch, temperature):
    cells = make_cells({"tiny": (folder, SPECS)}, ["additions"], [temperature], seeds=[0, 1])
    settings = replace(SETTINGS, limit=4)
    whole = run(cells, tmp_path / "whole.jsonl", settings)
    generate, calls = sweep.SetflowLM._model_generate, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == len(cells) + 2:  # two batches in a cell: in the second half of one
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    path = tmp_path / "killed.jsonl"
    monkeypatch.setattr(sweep.SetflowLM, "_model_generate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(cells, path, settings)
    monkeypatch.undo()
    assert 0 < path.read_text().count("\n") < len(cells) and len(answers(path)) % 4 == 2
    assert steady(run(cells, path, settings)) == steady(whole)
    assert answers(path) == answers(tmp_path / "whole.jsonl")


def test_seeds_draw_differently(folder, tmp_path):
    cells = make_cells({"tiny": (folder, ["ntp"])}, ["additions"], [1.0], seeds=[0, 1])
    run(cells, tmp_path / "sweep.jsonl")
    texts = list(answers(tmp_path / "sweep.jsonl").values())
    assert len(texts) == 6 and set(texts[:3]).isdisjoint(texts[3:])


def test_greedy_cells_have_one_seed():
    cells = make_cells({"a": ("x", ["ntp", "sbd"]), "b": ("y", ["ntp"])}, ["t"], [0.0, 0.5], [3, 4])
    assert len(cells) == 3 * (1 + 2)
    assert {(c.temperature, c.seed) for c in cells} == {(0.0, 3), (0.5, 3), (0.5, 4)}
    assert cells[0] == Cell("a", "x", "ntp", 0.0, 3, "t")


def test_keys_are_varied_where_a_decoder_has_them():
    specs = ["ntp", "sbd", "sbd:entropy_bound=0.5", "sbd:top_k=2", "sbd-lossless:block_size=8"]
    assert vary(specs, "entropy_bound", ["0", "1"]) == [
        "ntp",
        "sbd:entropy_bound=0",
        "sbd:entropy_bound=1",
        "sbd:entropy_bound=0.5",
        "sbd:top_k=2",
        "sbd-lossless:block_size=8",
    ]
    blocks = vary(specs, "block_size", ["4", "8"])
    assert len(blocks) == 1 + 2 + 2 + 2 + 1 and "sbd:top_k=2,block_size=4" in blocks


@pytest.mark.parametrize(
    "specs, key, values, sentence",
    [
        (["ntp", "sbd"], "entropy_bund", ["0.1"], "did you mean 'entropy_bound'?"),
        (["ntp", "sbd"], "entropy_bund", [""], "vary must be KEY=VALUE,VALUE,..., got 'entropy_bund='"),
        (["sbd"], "entropy_bound", ["0.1", ""], "vary must be KEY=VALUE,VALUE,..., got 'entropy_bound=0.1,'"),
        (["ntp"], "entropy_bound", ["0.1"], "'entropy_bound' is no key of ntp; it has none"),
        (["sbd-lossless"], "colour", ["red"], "its keys are .*block_size.*look_ahead"),
        (["sbd:entropy_bound=0.5", "ntp"], "entropy_bound", ["1"], "sbd:entropy_bound=0.5 sets entropy_bound already"),
    ],
)
def test_what_cannot_be_varied_is_said(specs, key, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        vary(specs, key, values)


def test_no_line_is_lost(folder, tmp_path, monkeypatch):
    """Other settings, other decoders, other tasks: each command adds its lines and keeps those of the others."""
    path = tmp_path / "sweep.jsonl"

    def cells(spec="ntp", task="additions", **names):
        return make_cells({"tiny": (folder, [spec])}, [task], **names)

    runs = [(cells(), replace(SETTINGS, limit=4))]
    runs += [(cells(), replace(SETTINGS, **change)) for change in ({"limit": 3}, {"limit": 2}, {"max_gen_toks": 8})]
    runs += [(cells(), replace(SETTINGS, batch_size=1)), (cells("sbd:block_size=4"), SETTINGS)]
    runs += [(cells(task="next_statement"), SETTINGS), (cells(temperatures=[1.0], seeds=[5]), SETTINGS)]
    rows = [row for arguments in runs for row in run(arguments[0], path, arguments[1])]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows and len(rows) == len(runs)
    monkeypatch.setattr(sweep, "SetflowLM", None)  # no model is loaded
    assert [row for arguments in runs for row in run(arguments[0], path, arguments[1])] == rows


def test_a_model_trained_further_takes_its_line(shared_model, tokenizer, tmp_path):
    path = tmp_path / "sweep.jsonl"
    tokenizer.save_pretrained(tmp_path / "model")
    for seed in (0, 1):
        shared_model("llama", seed=seed).save_pretrained(tmp_path / "model")
        rows = run(make_cells({"m": (str(tmp_path / "model"), ["ntp"])}, ["additions"]), path)
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_half_a_line_is_measured_again(folder, tmp_path):
    path, cells = tmp_path / "sweep.jsonl", make_cells({"tiny": (folder, SPECS)}, ["additions"], [1.0])
    rows = run(cells, path)
    for content in (path.read_bytes()[:-30], path.read_bytes()[:-30] + bytes(64), path.read_bytes()[:-1]):
        path.write_bytes(content)
        assert steady(run(cells, path)) == steady(rows)
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def test_two_sweeps_on_one_file(folder, tmp_path):
    """The second is refused before it loads a model; the lines of the first are all there."""
    path, cells = tmp_path / "sweep.jsonl", make_cells({"tiny": (folder, SPECS)}, ["additions"])
    first = run_sweep(cells, SETTINGS, path, "command")
    next(first)
    with pytest.raises(ValueError, match="another run is writing .*sweep.jsonl"):
        run(make_cells({"m": ("no/model", ["ntp"])}, ["additions"]), path)
    assert len(list(first)) == 1 and len(path.read_text().splitlines()) == 2


def test_impossible_sweeps_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="block_sise"):
        vary(["sbd"], "block_sise", ["4"])
    assert vary(["dfm", "sbd"], "entropy_bound", ["4"]) == ["dfm", "sbd:entropy_bound=4"]  # dfm takes none by itself
    with pytest.raises(ValueError, match="block_size must be"):
        make_cells({"m": ("no/model", vary(["sbd"], "block_size", ["0"]))}, ["additions"])
    with pytest.raises(ValueError, match="temperature must be"):
        make_cells({"m": ("no/model", ["ntp"])}, ["additions"], [-1.0])
    with pytest.raises(ValueError, match="'no_such_task'"):
        run(make_cells({"m": ("no/model", ["ntp"])}, ["no_such_task"]), tmp_path / "sweep.jsonl")
