"""Damage: every file of a checkpoint truncated, empty, missing or changed, and a kill at every moment of a run."""

import itertools
import pkgutil
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import TrainingReport, finetune
from finetune.checkpoints import MANIFEST_FILE, damage, last_checkpoint, read_json, rotate, write_json, write_manifest

DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "changed": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
}
SMALL = {"rank": 2}
TUNINGS = {"full": {}, "lora": {"kind": "lora", **SMALL}, "gated": {"kind": "gated", **SMALL}}
FILES = {
    "full": "config.json model.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json manifest.json",
    "lora": "trained.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json manifest.json",
    "gated": "trained.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json manifest.json",
}


class Killed(BaseException):
    """Nothing catches it, like a kill."""


@pytest.fixture
def start(recipe, fresh_model, tokenizer, tmp_path):
    """``start(kind, output)``: a run of four steps with a checkpoint each second one; its report."""
    fresh_model("llama", initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = {"new_model": None, "tokenizer": None, "model": str(tmp_path / "base"), "save_dtype": "float32"}

    def run(kind: str = "full", output: str = "out", **changes):
        return finetune(recipe(output, tuning=TUNINGS[kind], **base, **changes))

    return run


def losses(report: TrainingReport) -> list[float]:
    return [entry["loss"] for entry in report.log]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All weights there, copied, since what is loaded stays a view of a file that is going to be damaged."""
    found = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {f"{file} {name}": weight.clone() for file, weights in found.items() for name, weight in weights.items()}


def interrupted(finished: Path, to: Path) -> Path:
    """A copy of a run as it was right after its last checkpoint; returns that."""
    shutil.copytree(finished, to)
    for name in ("training.json", MANIFEST_FILE):
        (to / name).unlink()
    return to / "checkpoint-4"


@pytest.mark.parametrize("kind", TUNINGS)
def test_every_damage_to_every_file_is_seen(start, tmp_path, kind):
    start(kind)
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoint-4").iterdir())
    assert set(FILES[kind].split()) <= set(names)
    for name in names:
        for how, do in DAMAGES.items():
            last = interrupted(tmp_path / "out", tmp_path / "copy")
            do(last / name)
            told = []
            assert last_checkpoint(tmp_path / "copy", told.append).endswith("checkpoint-2"), (name, how)
            assert len(told) == 1 and "checkpoint-4" in told[0] and (name in told[0] or name == MANIFEST_FILE)
            assert told[0].count(". ") == 0
            shutil.rmtree(tmp_path / "copy")


def test_a_run_goes_on_from_the_checkpoint_before(start, tmp_path, capsys):
    whole = start()
    for name, how in zip(FILES["full"].split(), itertools.cycle(DAMAGES)):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        DAMAGES[how](interrupted(tmp_path / "out", tmp_path / "damaged") / name)
        capsys.readouterr()
        report = start(output="damaged")
        assert capsys.readouterr().err.count("checkpoint-4 is damaged and not used: ") == 1
        assert losses(report) == pytest.approx(losses(whole), rel=1e-6)
        assert damage(tmp_path / "damaged" / "checkpoint-4") is None, "it was written anew"
        torch.testing.assert_close(saved(tmp_path / "damaged"), saved(tmp_path / "out"))


def test_without_any_whole_checkpoint_a_run_starts_anew(start, tmp_path, capsys):
    whole = start()
    interrupted(tmp_path / "out", tmp_path / "damaged")
    for path in (tmp_path / "damaged").glob("checkpoint-*"):
        (path / "optimizer.pt").unlink()
    report = start(output="damaged")
    assert losses(report) == pytest.approx(losses(whole), rel=1e-6) and report.steps == 4
    assert capsys.readouterr().err.count("optimizer.pt is missing") == 2


MOMENTS = [  # what is not done any more, and at which call
    ("finetune.trainer.ObjectiveTrainer._save", 2),
    ("transformers.Trainer._save_optimizer_and_scheduler", 2),
    ("transformers.Trainer._save_rng_state", 1),
    ("transformers.trainer.TrainerState.save_to_json", 2),
    ("finetune.trainer.write_manifest", 2),
    ("finetune.trainer.rotate", 2),
    ("finetune.run.write_json", 1),
    ("finetune.run.Run._save_weights", 1),
    ("finetune.run.write_card", 1),
    ("finetune.run.finish", 1),
    ("finetune.resume.write_json", 1),
    ("finetune.report.write_json", 1),
    ("finetune.resume.write_manifest", 1),
]


@pytest.fixture
def killed_at(monkeypatch):
    """``with killed_at(where, call): ...`` expects to be killed when that function is called for that time."""

    @contextmanager
    def expect(where: str, call: int):
        original, calls = pkgutil.resolve_name(where), []

        def killed(*arguments, **named):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return original(*arguments, **named)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(where, killed)
            yield

    return expect


def test_a_kill_at_any_moment(start, tmp_path, killed_at):
    """With one checkpoint kept; the same command then gives the same model and the same figures."""
    settings = {"training": {"save_total_limit": 1}, "measure": {"rows": 1, "block_size": 2}}
    whole = start(output="whole", **settings)
    for i, (where, call) in enumerate(MOMENTS):
        with killed_at(where, call):
            start(output=f"killed-{i}", **settings)
        report, folder = start(output=f"killed-{i}", **settings), tmp_path / f"killed-{i}"
        assert losses(report) == pytest.approx(losses(whole), rel=1e-6) and report.steps == 4, where
        for key in ("held_out_before", "measured_before", "measured", "held_out_next_token_loss_nats"):
            assert getattr(report, key) == getattr(whole, key), where
        torch.testing.assert_close(saved(folder), saved(tmp_path / "whole"))
        assert damage(folder) is None and damage(folder / "checkpoint-4") is None
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, killed_at):
    path = tmp_path / "figures.json"
    write_json(path, {"figure": 1})
    with killed_at("os.fsync", 1):
        write_json(path, {"figure": 2})
    assert read_json(path) == {"figure": 1}
    write_json(path, {"figure": 3})
    assert read_json(path) == {"figure": 3}


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damage_beside_the_checkpoints_is_mended(start, tmp_path, capsys, how):
    settings = {"measure": {"rows": 1, "block_size": 2}}
    whole = start(**settings)
    weights = saved(tmp_path / "out")
    for name in ("recipe.json", "before.json", "training.json", "model.safetensors", MANIFEST_FILE):
        DAMAGES[how](tmp_path / "out" / name)
        capsys.readouterr()
        report = start(**settings)
        said = capsys.readouterr().err
        assert report.log == whole.log and report.held_out_before == whole.held_out_before
        torch.testing.assert_close(saved(tmp_path / "out"), weights)
        assert damage(tmp_path / "out") is None
        silent = name == "before.json" or (name == MANIFEST_FILE and how == "missing")  # measured and saved again
        assert said.count(name) == (not silent)


def test_what_is_not_whole_does_not_count(tmp_path):
    """Neither for going on nor as one of those that are kept."""
    assert last_checkpoint(tmp_path / "none") is None
    for step, text in ((2, "{}"), (10, "{}"), (12, '{"half'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if text is not None:
            write_manifest(folder)
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path).endswith("checkpoint-10")
    rotate(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path).endswith("checkpoint-10")
