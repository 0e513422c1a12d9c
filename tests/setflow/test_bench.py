"""``setflow bench``: each command measures what it says, prints it, and keeps it in a file as it goes."""

import json

import pytest

from eval.bench.contenders import Contender

LOSSLESS = "sbd-lossless:block_size=2"


@pytest.fixture(scope="module")
def folder(model_folder) -> str:
    return model_folder(max_position_embeddings=256)


@pytest.fixture
def bench(setflow, folder, tmp_path):
    """``bench("speed", ...)`` runs a command on three short texts; gives the outputs and the file."""
    prompts = tmp_path / "prompts.jsonl"
    texts = ["1 + 2 = 3, 4 + 5 = 9, " * 4, "37 + 45 = 82 " * 5, "8 + 9 = 17; " * 5]
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(command: str, *arguments: str, expected: int = 0):
        shown = (command, "--model", folder, "--out", str(tmp_path), "--name", "found")
        code, out, err = setflow("bench", *shown, *(a.format(prompts=prompts) for a in arguments))
        assert code == expected, err
        return out, err, json.loads((tmp_path / "found.json").read_text())

    return run


def test_quality(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # nobody's window, nothing is folded
    out, err, file = bench("quality", "--prompts", "{prompts}", "--decoder", "ntp", "--decoder", LOSSLESS)
    assert [row["decoder"] for row in file["rows"]] == ["ntp", LOSSLESS] and "unfinished" not in file
    assert file["rows"][0]["tokens_per_forward"] == 1 and file["rows"][0]["count"] == 3
    assert file["command"].startswith("setflow") and file["conditions"]["dtype"] == "float32"
    assert f"decoder={LOSSLESS}" in err and "written to" in err
    *table, line = out.splitlines()
    assert json.loads(line) == file, "the last line is for programs"
    assert "tokens per forward" in table[0] and LOSSLESS in table[2] and len(table) == 3


def test_what_was_measured_before_ctrl_c_is_kept(bench, monkeypatch):
    run = Contender.run

    def interrupted(self, *arguments, **settings):
        if self.name == LOSSLESS:
            raise KeyboardInterrupt
        return run(self, *arguments, **settings)

    monkeypatch.setattr(Contender, "run", interrupted)
    specs = ("--decoder", "ntp", "--decoder", LOSSLESS)
    out, err, file = bench("quality", "--prompts", "{prompts}", *specs, expected=130)
    assert [row["decoder"] for row in file["rows"]] == ["ntp"] and file["unfinished"] is True
    assert "written to" not in err and out == ""


def test_lossless(bench):
    _, _, file = bench("lossless", "--prompts", "{prompts}", "--decoder", LOSSLESS)
    assert [(row["batch_size"], row["different"]) for row in file["rows"]] == [(1, 0), (8, 0)]


def test_speed(bench):
    _, _, file = bench("speed", "--prompts", "{prompts}", "--count", "1", "--rounds", "1", "--decoder", LOSSLESS)
    stock, ours, lookup = file["rows"]
    assert (stock["decoder"], ours["decoder"]) == ("model.generate", LOSSLESS) and "lookup" in lookup["decoder"]
    assert stock["speed_up"] == 1 and stock["tokens_per_forward"] == 1
    assert ours["tokens_per_second"] > 0 and ours["speed_up"] > 0 and ours["overhead_milliseconds_per_forward"] > 0


def test_memory(setflow, tmp_path):
    code, _, err = setflow("bench", "memory", "--decoder", "ntp", "--new-tokens", "4", "--out", str(tmp_path))
    assert code == 0, err
    stock, ours = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert (stock["decoder"], ours["decoder"]) == ("generate", "ntp") and stock["relative_to_generate"] == 1
    assert 0.5 < ours["relative_to_generate"] < 2


def test_engine(setflow, folder, tmp_path):
    shown = ("--shape", folder, "--out", str(tmp_path), "--batch-size", "2", "--context", "9", "--rows", "3")
    code, out, err = setflow("bench", "engine", *shown, "--repeats", "1", "--rounds", "1", "--new-tokens", "4")
    assert code == 0, err
    file = json.loads((tmp_path / "engine.json").read_text())
    assert [row["what"] for row in file["rows"]] == [
        "model.generate",
        "ntp",
        "ntp, static path",
        "forward",
        "forward",
    ]
    assert [(row["batch_size"], row["context"], row["rows"]) for row in file["rows"][3:]] == [(2, 9, 1), (2, 9, 3)]
    assert file["settings"]["shape"] == folder and file["settings"]["copy_gigabytes_per_second"] > 0
    assert json.loads(out.splitlines()[-1]) == file and "slowdown" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "gpt"), "shape 'gpt' is none of"),
        (("--replay", "0.5"), "replay: tokens per forward must be from 1 to 16"),
        (("--context", "600", "--rows", "4"), "context must be at most 508"),
        (("--context", "500", "--rows", "4"), "context must be at most 448"),
        (("--dtype", "fp8"), "dtype must be one of"),
    ],
)
def test_what_engine_cannot_measure_is_named(setflow, tmp_path, arguments, said):
    code, out, err = setflow("bench", "engine", "--out", str(tmp_path), *arguments)
    assert code == 2 and said in err and out == ""
    assert not list(tmp_path.iterdir())


def test_lossless_goes_on_where_it_was_stopped(bench, tmp_path, monkeypatch):
    """What is finished is not run again; other prompts, decoders and lengths are."""
    runs, run = [], Contender.run

    def counted(self, prompts, *arguments, **settings):
        if len(runs) == 5:
            raise KeyboardInterrupt
        runs.append((self.name, len(prompts)))
        return run(self, prompts, *arguments, **settings)

    monkeypatch.setattr(Contender, "run", counted)
    shown = ("--prompts", "{prompts}", "--decoder", LOSSLESS, "--batch-size", "1", "--batch-size", "2")
    shown += ("--max-new-tokens", "9", "--finished", str(tmp_path / "done.jsonl"))
    with pytest.raises(FileNotFoundError):  # a run without a row has written no results
        bench("lossless", *shown, expected=130)
    assert runs == [("generate", 1)] * 3 + [(LOSSLESS, 1)] * 2
    runs.clear()
    _, _, file = bench("lossless", *shown)
    assert runs == [(LOSSLESS, 1), (LOSSLESS, 2)], "the third prompt by itself has been a batch before"
    assert [(row["batch_size"], row["different"], row["new_tokens"]) for row in file["rows"]] == [(1, 0, 9), (2, 0, 9)]
    runs.clear()
    bench("lossless", *shown)
    assert runs == []


def test_prompts_may_be_turns_of_a_conversation(folder, tmp_path):
    from transformers import AutoTokenizer

    from eval.bench.prompts import prompt_set

    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "1 + 2"}]
    path = tmp_path / "some.jsonl"
    records = [{"messages": turns}, {"text": "1 + 2"}, {"text": "1 + 2 = 3 " * 9}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    plain = prompt_set(str(path), tokenizer, 9, max_new_tokens=7)
    assert plain.ids == [asked, tokenizer("1 + 2 = 3 " * 9)["input_ids"][:16]] and plain.max_new_tokens == 7
    chat = prompt_set(str(path), tokenizer, 2, chat=True)
    assert chat.ids == [asked, asked] and chat.name == "some" and chat.max_new_tokens == 96
    path.write_text('{"messages": "Hi"}\n')
    with pytest.raises(ValueError, match="line 1 of .*some.jsonl' has 'messages' that the chat template cannot show"):
        prompt_set(str(path), tokenizer, 1)
    path.write_text('{"story": "Hi"}\n')
    with pytest.raises(ValueError, match="line 1 .* a text in the field 'text', or turns in 'messages'"):
        prompt_set(str(path), tokenizer, 1)
