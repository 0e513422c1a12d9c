"""Tables and figures of sweeps, from lines made by hand."""

import json
from pathlib import Path
from xml.dom import minidom

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: install the extra [eval]")

from eval.report import write_report

ROOT = Path(__file__).parents[2]
LARGEST = 300_000  # bytes of a picture that the README shows


def line(model, decoder, task, score, tokens_per_forward, **changes) -> dict:
    tokens = 1200
    decoding = {"samples": 10, "tokens": tokens, "forwards": round(tokens / tokens_per_forward), "seconds": 4.0}
    decoding |= {"tokens_per_forward": tokens_per_forward, "tokens_per_second": 300.0, "cut_prompts": 0}
    row = {
        "key": f"{model}{decoder}{task}{changes}",
        "model": model,
        "pretrained": f"build/{model}",
        "decoder": decoder,
        "temperature": 0.0,
        "seed": 0,
        "task": task,
        "scores": {"exact_match,none": score, "exact_match_stderr,none": 0.01, "compiles,none": 0.123},
        "decoding": decoding,
        "settings": {"batch_size": 8, "limit": 10, "max_gen_toks": None},
        "conditions": {
            "device": "CPU",
            "dtype": "float32",
            "parameters": 42,
            "attention": "sdpa",
            "torch": "2",
            "transformers": "5",
            "python": "3",
        },
        "command": "setflow eval sweep --limit 10",
    }
    return {**row, **changes}


def write(folder: Path, name: str, *rows: dict) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def table_one(tmp_path):
    """Next-token training against set-block training, two tasks."""
    drafts = {"acceptance_lengths": [10, 20, 30]}
    lossless = line("sbd", "sbd-lossless", "additions", 0.9, 3.0)
    lossless["decoding"] |= drafts
    write(
        tmp_path,
        "table1",
        line("ntp", "ntp", "additions", 0.8, 1.0),
        line("ntp", "ntp", "statements", 0.2, 1.0),
        line("sbd", "sbd:entropy_bound=0.1", "additions", 0.75, 4.0),
        line("sbd", "sbd:entropy_bound=0.1", "statements", 0.25, 2.0),
        lossless,
    )
    return tmp_path


def test_the_table_has_scores_and_speed_ups_and_their_mean_over_tasks(table_one):
    text = write_report(table_one).read_text()
    assert "## table1" in text and "setflow eval sweep --limit 10" in text
    assert "| model | decoder | temperature | additions, exact_match | statements, exact_match |" in text
    assert "| ntp | `ntp` | 0 | 80.0 ± 2.0 (1.00x) | 20.0 ± 2.0 (1.00x) | 1.00x |" in text
    assert "| sbd | `sbd:entropy_bound=0.1` | 0 | 75.0 ± 2.0 (4.00x) | 25.0 ± 2.0 (2.00x) | 3.00x |" in text
    assert "| sbd | `sbd-lossless` | 0 | 90.0 ± 2.0 (3.00x) |  | 3.00x |" in text
    assert "| additions | sbd | `sbd:entropy_bound=0.1` | 0 | 1 | 10 | 1,200 | 300 | 4.00 | 4.0 | 300 |  |" in text
    assert text.count("| 3.00 | 4.0 | 300 | 1.33 |") == 1  # (20 + 2 * 30) / 60 tokens of a draft
    assert "ntp = `build/ntp`, sbd = `build/sbd`" in text and "The first 10 problems" in text


def test_a_row_ends_at_a_newline_alone(tmp_path):
    row = line("ntp", "ntp", "additions", 0.8, 1.0, command="setflow eval --model a\u2028b")
    (tmp_path / "one.jsonl").write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert "setflow eval --model a\u2028b" in write_report(tmp_path).read_text(encoding="utf-8")


def test_every_sweep_has_a_section_and_other_pictures_are_shown(table_one):
    write(table_one, "again", line("m", "ntp", "additions", 1.0, 1.0, command="another"))
    (table_one / "trace.svg").write_text("<svg/>")
    text = write_report(table_one).read_text()
    assert text.index("## again") < text.index("## table1") < text.index("## trace")
    assert "![trace](trace.svg)" in text and text.count("trace.svg") == 1
    assert text.count(".svg)") == 4  # nothing was drafted in "again", so no figure of acceptance


def test_seeds_are_averaged(tmp_path):
    lines = [line("m", "ntp", "additions", s, 1.0, seed=i, temperature=0.5) for i, s in enumerate((0.4, 0.6))]
    write(tmp_path, "sweep", *lines)
    text = write_report(tmp_path).read_text()
    assert "| m | `ntp` | 0.5 | 50.0 ± 20.0 (1.00x) | 1.00x |" in text and "| 0.5 | 2 | 20 | 2,400 |" in text


def test_lines_of_different_settings_are_told_apart(tmp_path):
    """Neither averaged as if they were seeds nor shown under one name."""
    rows = [line("m", "ntp", "additions", score, 1.0) for score in (0.2, 0.8)]
    rows[1] = line("m", "ntp", "additions", 0.8, 1.0, settings=rows[0]["settings"] | {"limit": 20, "data": "folder"})
    elsewhere = line("m", "ntp", "additions", 0.6, 1.0, pretrained="old/m")
    write(tmp_path, "sweep", *rows, elsewhere | {"key": "another"})
    text = write_report(tmp_path).read_text()
    assert "| build/m | `ntp`, limit 10 | 0 | 20.0 ± 2.0 (1.00x) | 1.00x |" in text
    assert "| build/m | `ntp`, limit 20 | 0 | 80.0 ± 2.0 (1.00x) | 1.00x |" in text
    assert "| old/m | `ntp`, limit 10 | 0 | 60.0 ± 2.0 (1.00x) | 1.00x |" in text
    assert text.count("| additions | ") == 3 and "limit 20" in (tmp_path / "sweep-speed-quality.svg").read_text()


def test_half_a_line_and_other_files_do_not_spoil_a_report(tmp_path):
    write(tmp_path, "sweep", line("m", "ntp", "additions", 0.5, 1.0))
    whole = write_report(tmp_path).read_text()
    with (tmp_path / "sweep.jsonl").open("a") as file:
        file.write('{"key": "x", "model": "m", "deco')
    (tmp_path / "finished.jsonl").write_text('{"key": "a", "text": "answers of setflow eval --out"}\n')
    assert write_report(tmp_path).read_text() == whole


def test_cut_prompts_are_told(tmp_path):
    row = line("m", "ntp", "humaneval", 0.0, 1.0)
    row["decoding"]["cut_prompts"] = 7
    write(tmp_path, "sweep", row, line("m", "ntp", "additions", 0.0, 1.0))
    assert "lost their beginning: 7 of 10 (humaneval)." in write_report(tmp_path).read_text()


def test_pictures_are_small_and_do_not_change(table_one):
    write_report(table_one)
    pictures = {path: path.read_bytes() for path in table_one.glob("*.svg")}
    assert {path.name for path in pictures} == {"table1-speed-quality.svg", "table1-acceptance.svg"}
    write_report(table_one)
    for path, content in pictures.items():
        minidom.parseString(content)
        assert len(content) < LARGEST and path.read_bytes() == content


def test_the_report_in_the_repository_is_whole_and_small():
    folder = ROOT / "benchmarks/results/report"
    text = (folder / "report.md").read_text()
    for path in folder.glob("*.jsonl"):
        assert f"## {path.stem}\n" in text
    pictures = list(folder.glob("*.svg"))
    assert pictures
    for path in pictures:
        assert f"({path.name})" in text and path.stat().st_size < LARGEST, path
