"""``setflow prompts``: four domains, and nothing that is held out is trained on."""

import gzip
import json

import pytest


@pytest.fixture
def data(tmp_path):
    """A folder of data sets with few records, in the form of the real ones."""
    folder = tmp_path / "data"
    for name in ("gsm8k", "mbpp", "python-functions", "humaneval", "tinystories"):
        (folder / name).mkdir(parents=True)

    def write(name: str, records) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("gsm8k/train.jsonl", [{"question": f"train {i}?"} for i in range(5)])
    write("gsm8k/test.jsonl", [{"question": f"test {i}?"} for i in range(3)])
    problem = {"text": "Write a function.", "test_list": ["assert f(1) == 2"]}
    write("mbpp/mbpp.jsonl", [{**problem, "task_id": i} for i in (3, 11, 510, 700)])
    described = {"name": "double", "docstring": "Twice of the number that is given.\n\n>>> double(1)\n2"}
    write("python-functions/functions.jsonl", [described, {"name": "bare", "docstring": None}])
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "def half(x):\n    pass\n"}) + "\n")
    stories = [f"One day, child number {i} went out into the garden.\n\nThe end." for i in range(103)]
    (folder / "tinystories" / "tiny_stories.txt").write_text("\n".join(stories))
    return folder


def test_four_domains_are_written(setflow, data, tmp_path):
    code, out, err = setflow("prompts", str(tmp_path / "prompts"), "--data", str(data))
    assert code == 0 and out == "" and "maths-train.jsonl: 5 prompts" in err, err

    def read(name: str) -> list[tuple[str, str]]:
        records = [json.loads(line) for line in (tmp_path / "prompts" / f"{name}.jsonl").read_text().splitlines()]
        assert all([turn["role"] for turn in record["messages"]] == ["user"] for record in records)
        return [(record["domain"], record["messages"][0]["content"]) for record in records]

    train = read("train")
    assert [domain for domain, _ in train[:8]] == ["chat", "maths", "code", "stories"] * 2
    domains = ("chat", "maths", "code", "stories")
    held_out = {prompt for domain in domains for _, prompt in read(f"{domain}-heldout")}
    assert not held_out & {prompt for _, prompt in train}
    assert len(train) == sum(len(read(f"{domain}-train")) for domain in domains)
    assert len(read("code-train")) == 3, "two problems that are not for judging, and one described function"
    assert len(read("stories-heldout")) == 100 and len(read("stories-train")) == 3
    assert read("code-heldout")[0][1].startswith("Complete this Python function:\n```python\ndef half")
    assert len(read("chat-heldout")) >= 100


def test_data_must_be_there(setflow, data, tmp_path, monkeypatch):
    (data / "gsm8k" / "test.jsonl").unlink()
    code, _, err = setflow("prompts", str(tmp_path / "out"), "--data", str(data))
    assert code == 2 and "gsm8k/test.jsonl' does not exist" in err and not (tmp_path / "out").exists()
    monkeypatch.delenv("SETFLOW_DATA", raising=False)
    code, _, err = setflow("prompts", str(tmp_path / "out"))
    assert code == 2 and "give --data FOLDER, or set SETFLOW_DATA" in err
