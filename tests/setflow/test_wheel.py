"""The wheel, installed into another environment and run outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("decoding", "sbd", "rpt", "dfm", "steering", "finetune", "eval", "serving", "setflow")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no left-over of an earlier build gets in."""
    source, target = tmp_path_factory.mktemp("source") / "setflow", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", target, source], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The ``bin`` of a new environment with the wheel, which sees the libraries of this one but not its checkout."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    # A line in a .pth file makes that folder importable, but leaves its own .pth files, as that of the checkout, alone.
    place = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
    )
    (Path(place.strip()) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel], check=True)
    return home / "bin"


def call(*command, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.check_output(command, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"}, text=True)


def test_wheel_holds_code_data_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".yaml") or path.parent.name == "embedded":
                assert path.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    strangers = {name.partition("/")[0] for name in names} - set(PACKAGES)
    assert len(strangers) == 1 and strangers.pop().endswith(".dist-info")


def test_packages_come_from_the_wheel(installed, tmp_path):
    code = f"import importlib, json; print(json.dumps([importlib.import_module(n).__file__ for n in {PACKAGES}]))"
    files = json.loads(call(installed / "python", "-c", code, folder=tmp_path))
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def test_command_runs_outside_the_checkout(installed, tmp_path, tiny):
    arguments = ("generate", "1 + 1 = ?", "--max-new-tokens", "8", "--json")
    own = [] if (ROOT / "setflow/embedded/model.safetensors").is_file() else ["--model", tiny]
    for command in ([installed / "setflow"], [installed / "python", "-m", "setflow"]):
        assert json.loads(call(*command, *arguments, *own, folder=tmp_path))["tokens"] <= 8
