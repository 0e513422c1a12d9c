"""Options that several commands share, and what they mean."""

import ctypes
import importlib.util
import secrets
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from decoding.inputs.checks import check_choice
from decoding.inputs.spec import check_spec, is_around
from setflow.adapters import AUTO, NONE, add_adapter, check_adapter
from setflow.loading import default_spec, find_source, load_model
from setflow.text import visible

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from decoding import Decoder
    from setflow.run import Settings

_typed: ContextVar[str] = ContextVar("typed")  # the command that runs
NO_TEXT = "\udcff"  # how Python shows a byte that is no UTF-8
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
DEVICES = ("cpu", "cuda", "mps", "xpu")  # each, or one of several as in cuda:1

Prompt = Annotated[str, typer.Argument(help='The text to continue; "-" reads standard input.')]
Model = Annotated[
    str | None, typer.Option("--model", help="Folder or hub name; the embedded tiny model by default.", metavar="PATH")
]
DecoderSpec = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        metavar="SPEC",
        help="name:key=value,..., such as sbd:block_size=16,entropy_bound=0.1, sbd-lossless:block_size=8 or ntp. By "
        "default the one that the model's generation config names; else sbd if the model has a mask token, ntp if not.",
    ),
]
RewardName = Annotated[
    str | None,
    typer.Option(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="Steer by a function, or by a reward model PATH or a classifier PATH#LABEL: see steering/rewards.py. Needs a "
        "temperature above 0.",
    ),
]
Particles = Annotated[
    int | None,
    typer.Option("--particles", min=1, help="Texts that are steered by --reward; 8 by default.", metavar="N"),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, help="By default 256, or fewer where the model's context ends.", metavar="N"
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 decodes greedily.", metavar="T")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="For sampling; drawn by default.", metavar="S")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="bf16|fp32", help="By default that of the model's files; fp32 for the embedded model."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Agree to run code that lies with the model; nothing else is consent."),
]
Adapter = Annotated[
    str,
    typer.Option(
        "--adapter",
        metavar="NAME|FOLDER",
        help="A gated adapter to draft with: a folder, smollm2, none, or auto: the one in the box that was made for the "
        "model's weights.",
    ),
]
Quantize = Annotated[str | None, typer.Option("--quantize", metavar="int8", help="Round the weights; needs torchao.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile forwards in the background, for texts that are long enough.")
]
Static = Annotated[
    bool,
    typer.Option("--static", help="Run Llama-type models on a path of our own, faster on a CPU for more memory."),
]
NoLive = Annotated[bool, typer.Option("--no-live", help="Print text when it is finished, not as it is decided.")]


def check_dtype(name: str | None) -> None:
    """Raise ValueError for a dtype that :func:`parse_dtype` does not know."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype called bf16 or fp32; None stays None."""
    check_dtype(name)
    if name is None:
        return None
    import torch

    return getattr(torch, DTYPES[name])


def check_device(name: str | None) -> None:
    """Raise ValueError for a device that PyTorch has no word for, or that needs a driver which is not there."""
    kind, _, number = (name or "cpu").partition(":")
    if kind not in DEVICES or not (number or "0").isdigit():
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, or one of several such as cuda:1, got {name!r}")
    if kind == "cuda" and not has_gpu_driver():
        raise ValueError(f"device must be one that this machine has, and it has no driver of a GPU, got {name!r}")


def has_gpu_driver() -> bool:
    """Whether there may be a device that PyTorch calls cuda, an AMD one among them; it takes seconds to ask PyTorch."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def read_prompt(prompt: str) -> str:
    """What the argument ``prompt`` stands for; raises ValueError if that is nothing, or no text."""
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError:
        prompt = NO_TEXT
    if not prompt:
        raise ValueError("the prompt is empty: give some text to continue")
    check_text(prompt)
    return prompt


def check_text(prompt: str) -> None:
    """Raise ValueError for bytes that are no UTF-8, which Python passes on as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not UTF-8 text; convert it, for instance with iconv") from None


def make_settings(max_new_tokens: int | None, temperature: float, seed: int | None) -> "Settings":
    """Settings with a seed in any case, so that a run can be repeated."""
    from setflow.run import Settings

    return Settings(max_new_tokens, temperature, secrets.randbelow(2**31) if seed is None else seed)


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run: its name, the model, its tokenizer, and the decoder with the spec it came from.

    adapter: the one in the box that was put on the model, if any.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    decoder: "Decoder"
    spec: str
    adapter: str | None = None

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a text; raises ValueError where the tokenizer is at fault."""
        from decoding.forward.loading import one_sentence

        with one_sentence(f"the tokenizer of {self.name!r}", "used"):
            return self.tokenizer(prompt)["input_ids"]

    @property
    def is_chat_model(self) -> bool:
        """Whether the model answers turns that its chat template marks: it then ends an answer as the template does.

        A template alone does not say so, since tokenizers of base models have one, too.
        """
        template = self.tokenizer.chat_template
        if template is None:
            return False
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
        try:
            asked = self.tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
            answered = self.tokenizer.apply_chat_template(turns, tokenize=False)
            behind = self.tokenizer(answered.rpartition("Yes")[2], add_special_tokens=False)["input_ids"]
        except Exception:  # what is wrong with template or tokenizer is said where the prompt is encoded
            return False
        marked = asked.removeprefix(self.tokenizer.bos_token or "").strip() != "Hi"
        ends = self.model.generation_config.eos_token_id
        return marked and not {*(ends if isinstance(ends, list) else [ends])}.isdisjoint(behind)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of a conversation up to the next answer; raises ValueError where the chat template is at fault."""
        from decoding.forward.loading import one_sentence

        with one_sentence(f"the chat template of {self.name!r}", "used"):
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def mask_token_id(self) -> int | None:
        """What stands for an undecided token in a draft; None for a decoder whose drafts have none."""
        from decoding import find_mask_token

        return find_mask_token(self.model, self.decoder.mask_token_id) if self.decoder.needs_mask_token else None


def check_names(model: str | None, spec: str | None, dtype: str | None) -> None:
    """Raise ValueError for a model, a decoder or a dtype that cannot be, before anything that takes long is imported."""
    find_source(model)
    check_dtype(dtype)
    if spec is not None:
        check_spec(spec)


def steered_spec(spec: str, reward: str | None, particles: int | None) -> str:
    """The spec of a decoder that steers the one of ``spec``; ``spec`` itself without a reward.

    >>> steered_spec("sbd:block_size=8", "checks:right", None)
    'smc:reward=checks:right,decoder=sbd:block_size=8'
    """
    if reward is None:
        if particles is not None:
            raise ValueError(
                "particles need a --reward, or a decoder that says what to steer by, such as power:alpha=4"
            )
        return spec
    if is_around(spec):
        raise ValueError(f"reward goes around a decoder, and {spec!r} is steered itself: write reward= into it")
    count = "" if particles is None else f"particles={particles},"
    return f"smc:{count}reward={reward},decoder={spec}"


def open_model(
    model: str | None,
    spec: str | None,
    dtype: str | None,
    console: Console,
    trust: bool,
    adapter: str = AUTO,
    reward: str | None = None,
    particles: int | None = None,
    quantized: str | None = None,
) -> Opened:
    """Load what the options name, on the GPU if there is one, and say so on ``console`` if somebody watches."""
    check_names(model, spec and steered_spec(spec, reward, particles), dtype)
    check_spec(steered_spec("ntp", reward, particles))
    check_adapter(adapter)
    if quantized is not None:
        check_choice("quantize", quantized, ("int8",))
    with console.status("loading the model") if console.is_terminal else nullcontext():
        import torch
        import transformers

        from decoding import decoder_from_spec
        from decoding.forward.quantize import quantize

        # What matters of the log is said here in other words: a wrong setting raises, absent weights give a warning.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if spec is not None:
            decoder_from_spec(steered_spec(spec, reward, particles))  # before the model, which may take long
        loaded, tokenizer = load_model(model, parse_dtype(dtype), NONE, trust_remote_code=trust)
        added = add_adapter(loaded, adapter)
        if quantized is not None:
            quantize(loaded, quantized)
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        spec = steered_spec(spec or default_spec(loaded, trust), reward, particles)
        return Opened(model or "embedded", loaded, tokenizer, decoder_from_spec(spec), spec, added)


def screen() -> Console:
    """Standard output for people; it knows whether it is a terminal."""
    return Console(highlight=False, soft_wrap=True)


def show_text(text: str | Text, console: Console) -> None:
    """Print text that may or may not end its last line, coloured text on ``console`` and plain text just as it is."""
    if isinstance(text, str):
        print(text, end="" if text.endswith("\n") else "\n", flush=True)
    else:
        console.print(text, end="" if text.plain.endswith("\n") else "\n")


def note(text: str) -> None:
    """A line about the run, on standard error, so that standard output holds the text alone."""
    print(visible(text), file=sys.stderr)


def typed_command() -> str:
    """What the user typed, for files that say how they were made."""
    return _typed.get()


@contextmanager
def typed(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """The command that runs meanwhile."""
    token = _typed.set(f"{program} {shlex.join(arguments)}".rstrip())
    try:
        yield
    finally:
        _typed.reset(token)


def need_extra(extra: str, modules: Sequence[str]) -> None:
    """Raise ValueError that names the extra if one of its modules is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f"this needs {' and '.join(missing)}, which this installation lacks: pip install 'setflow[{extra}]'"
        )
