"""What an import costs, and that laziness takes no name away. Nothing here looks at a clock."""

import json
import subprocess
import sys

import pytest

import decoding
import setflow
from setflow.shadows import PACKAGES, check_shadows

HEAVY = ("torch", "transformers", "datasets", "lm_eval", "peft")


def loaded_by(code: str) -> list[str]:
    """The heavy libraries that are in ``sys.modules`` after ``code`` ran in an interpreter of its own."""
    look = f"{code}\nimport json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_face_and_the_checks_need_no_torch():
    assert loaded_by("import setflow, setflow.cli, eval, decoding.inputs.checks; setflow.__version__") == []


@pytest.mark.parametrize("module", ["checks", "jsonl", "signatures", "source", "spec"])
def test_such_a_module_may_be_the_first_that_is_imported(module):
    assert loaded_by(f"import decoding.inputs.{module}") == []


def test_a_recipe_is_read_before_torch_is_imported():
    assert loaded_by("import finetune.recipe_file, finetune.__main__") == []


def test_every_public_name_of_decoding_is_there():
    names: dict = {}
    exec("from decoding import *", names)
    assert set(decoding.__all__) <= names.keys() and set(decoding.__all__) <= set(dir(decoding))
    assert not hasattr(decoding, "exports_of_another_package")


def test_every_public_name_of_setflow_is_that_of_its_package():
    import dfm
    import rpt
    import sbd
    import steering
    from setflow import loading

    homes = (decoding, dfm, rpt, sbd, steering, loading)
    for name in set(setflow.__all__) - {"load_embedded"}:
        assert getattr(setflow, name) in [getattr(home, name, None) for home in homes] and name in dir(setflow)
    assert not hasattr(setflow, "load_nothing")


def test_a_decoder_keeps_its_arguments_however_it_was_imported():
    """What generate drops for a callable reaches every kind of decoder, also where a single module was imported."""
    wrapped = "assert transformers.GenerationMixin._extract_generation_mode_kwargs.__wrapped__"
    assert "torch" in loaded_by(f"import transformers, decoding.decoder\n{wrapped}")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_file_of_the_users_that_has_the_name_of_a_package_is_named(tmp_path, name):
    place = tmp_path / name / "__init__.py" if name in ("eval", "dfm") else tmp_path / f"{name}.py"
    place.parent.mkdir(exist_ok=True)
    place.touch()
    sentence = f"{place} has the name of a package that setflow needs; rename it, or start Python in another folder"
    command = [sys.executable, "-m", "setflow", "generate", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {sentence}\n")
    script = tmp_path / "script.py"
    for code in ("import setflow; setflow.load_embedded()", "from setflow import SetBlockDecoder"):
        script.write_text(code)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and done.stderr.endswith(f"ImportError: {sentence}\n")


def test_other_packages_name_the_file_as_well(tmp_path):
    """Python does, where a name is asked of a package."""
    (tmp_path / "decoding.py").touch()
    for code in ("import sbd", "import rpt", "import dfm", "from decoding import NextTokenDecoder"):
        (tmp_path / "script.py").write_text(code)
        done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and str(tmp_path / "decoding.py") in done.stderr.splitlines()[-1]


def test_our_own_packages_shadow_nothing():
    check_shadows()
