"""The engine's benchmark: what is run is what the rows say, and figures follow from seconds as they should."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from decoding import Engine
from eval.bench import engine, texts
from eval.bench.engine import measure_forwards, weight_bytes
from eval.bench.replay import lay_down, recorded_lengths
from eval.bench.shapes import SHAPES, find_shape, random_model
from eval.bench.texts import measure_texts

EMBEDDED = Path(__file__).parents[2] / "setflow" / "embedded"


@pytest.fixture
def model(fresh_model):
    model = fresh_model("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(
    ("shape", "millions"),
    [("smollm2-135m", 134.5), ("qwen3-0.6b", 596.0), ("llama-3.1-8b", 8030.3), ("qwen3-8b", 8190.7)],
)
def test_shapes_have_the_parameters_of_their_models(shape, millions):
    model = random_model(find_shape(shape), torch.bfloat16, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert model.dtype == torch.bfloat16 and model.device.type == "meta"


def test_the_embedded_shape_is_that_of_the_model_in_the_box():
    config = json.loads((EMBEDDED / "config.json").read_text())
    assert {name: config[name] for name in SHAPES["embedded"]} == SHAPES["embedded"]
    found = find_shape(str(EMBEDDED))
    assert isinstance(found, type(AutoConfig.for_model("llama"))) and found.hidden_size == config["hidden_size"]


def test_an_unknown_shape_is_named(tmp_path):
    with pytest.raises(ValueError, match="shape 'gpt' is none of embedded, .*does not exist"):
        find_shape("gpt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        find_shape(str(tmp_path))


def test_a_random_model_runs_and_never_ends(model):
    model = random_model(model.config, torch.bfloat16, torch.device("cpu"))
    text = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)
    assert text.shape == (1, 12) and model.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_are_those_that_a_forward_reads(fresh_model, tied):
    model = fresh_model("llama", torch.bfloat16, tie_word_embeddings=tied)
    table = 97 * 64
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64
    assert weight_bytes(model) == 2 * (table + 2 * layer + 64)


def test_forwards_are_those_that_the_rows_name(model, monkeypatch):
    seen, original = [], Engine.forward

    def forward(self, rows, cache):
        hidden = original(self, rows, cache)
        keys = cache.layers[1].keys
        seen.append((len(keys), rows.num_slots, hidden.shape[1], keys.shape[2], bool(keys[:, :, :-1].all())))
        return hidden

    monkeypatch.setattr(Engine, "forward", forward)
    found = list(measure_forwards(model, [1, 3], [5, 20], [4, 2], 10.0, repeats=2))
    points = list(itertools.product([1, 3], [5, 20], [1, 2, 4]))
    assert [(row["batch_size"], row["context"], row["rows"]) for row in found] == points
    # One forward makes the cache, which is filled; then each number of rows warms up, then they take turns.
    assert seen == [
        (batch, context + count, count, context + 4, i > 0)
        for batch, context in itertools.product([1, 3], [5, 20])
        for i, count in enumerate((1, *(1, 2, 4) * 3))
    ]


def test_figures_follow_from_seconds(model, monkeypatch):
    takes = {1: iter([9.0, 1.0, 3.0, 2.0]), 4: iter([9.0, 5.0, 3.0, 4.0])}  # the first is the warm-up
    monkeypatch.setattr(engine, "_step", lambda *a: lambda: next(takes[a[-1]]))
    monkeypatch.setattr(engine, "_filled_cache", lambda *a: None)
    monkeypatch.setattr(engine, "weight_bytes", lambda model: 8 * 10**9)
    one, four = measure_forwards(model, [1], [5], [4], 16.0, repeats=3)
    assert (one["milliseconds"], one["slowdown"], one["weight_gigabytes_per_second"]) == (2000, 1, 4)
    assert (four["milliseconds"], four["slowdown"], four["share_of_copy"]) == (4000, 2, 0.125)


def test_what_does_not_fit_into_memory_is_said_and_the_rest_measured(model, monkeypatch):
    original = Engine.forward

    def forward(self, rows, cache):
        if sum(rows.counts) > 4:
            raise torch.OutOfMemoryError
        return original(self, rows, cache)

    monkeypatch.setattr(Engine, "forward", forward)
    found = list(measure_forwards(model, [1, 2], [5], [4], 10.0, repeats=1))
    assert [row.get("out_of_memory", False) for row in found] == [False, False, False, True]
    assert "milliseconds" in found[2] and "milliseconds" not in found[3]


def test_texts_take_turns(model, monkeypatch):
    asked, seconds = [], itertools.cycle([9.0, 9.0, 9.0, 2.0, 1.0, 1.0, 4.0, 1.0, 2.0])
    original = texts.text_seconds

    def timed(model, ids, new_tokens, settings):
        assert original(model, ids, new_tokens, settings) > 0
        engine = settings.get("engine")
        asked.append((ids.shape[1], new_tokens, engine and engine.runs_static))
        return next(seconds)

    monkeypatch.setattr(texts, "text_seconds", timed)
    stock, ours, fast, *more = measure_texts(model, [5, 9], 10.0, new_tokens=4, rounds=2)
    assert asked == [(context, 4, static) for context in (5, 9) for _ in range(3) for static in (None, False, True)]
    assert (stock["what"], stock["milliseconds"], stock["speed_up"]) == ("model.generate", 750, 1)
    assert (ours["what"], ours["tokens_per_second"], ours["speed_up"]) == ("ntp", 4, 3)
    assert ours["tokens_per_forward"] == 1 and 0.9 < ours["outside_model"] < 1
    assert [row["context"] for row in more] == [9, 9, 9]


@pytest.mark.parametrize("replay", ["2.2", "4.0"])
def test_replayed_acceptance_is_what_was_recorded(model, replay):
    """Each decoder does all of its work, and as many tokens come out of a forward as are laid down."""
    specs = ["prompt-lookup:block_size=8", "sbd-lossless:block_size=8", "sbd:block_size=16,entropy_bound=0.1"]
    lengths = recorded_lengths(replay)
    rows = list(measure_texts(model, [60], 10.0, 33, 1, lengths=lengths, specs=specs))[3:]
    for row, spec in zip(rows, specs, strict=True):
        assert row["what"].startswith(spec)
        assert row["tokens_per_forward"] == pytest.approx(float(replay), rel=0.2)


def test_a_text_is_laid_down_in_pieces_of_the_prompt():
    text, starts = lay_down([2, 3], 20, 9, 97)
    assert len(text) == 29 and starts == [20, 22, 25, 27] and 96 not in text
    for start, end in zip(starts, [*starts[1:], 29], strict=True):
        assert any(text[at : at + end - start] == text[start:end] for at in range(20))


@pytest.mark.parametrize(
    ("given", "said"), [("0.5", "from 1 to 16"), ("none.json", "neither a number nor a JSON file"), ("file", "list")]
)
def test_impossible_recordings_are_named(tmp_path, given, said):
    if given == "file":
        given = str(tmp_path / "recorded.json")
        Path(given).write_text("[1, -1]")
    with pytest.raises(ValueError, match=f"replay: .*{said}"):
        recorded_lengths(given)


def test_recorded_drafts_are_read(tmp_path):
    path = tmp_path / "recorded.json"
    path.write_text("[0, 3, 1]")
    assert recorded_lengths(str(path)) == [1, 4, 2] and sum(recorded_lengths("2.2")) == 11


def test_a_context_without_room_is_refused_before_anything_runs(model, monkeypatch):
    monkeypatch.setattr(Engine, "forward", lambda *a: pytest.fail("ran"))
    with pytest.raises(ValueError, match="context must be at most 252, .*less 4 rows, got 253"):
        next(measure_forwards(model, [1], [8, 253], [4], 1.0))
    with pytest.raises(ValueError, match="context must be at most 246, .*less 10 new tokens, got 250"):
        next(measure_texts(model, [8, 250], 1.0, new_tokens=10))
