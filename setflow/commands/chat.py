"""``setflow chat``: a conversation that keeps keys and values between its turns."""

import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from setflow.adapters import AUTO
from setflow.commands.settings import (
    NO_TEXT,
    Adapter,
    DecoderSpec,
    Dtype,
    MaxNewTokens,
    Model,
    NoLive,
    Opened,
    Seed,
    Temperature,
    TrustRemoteCode,
    check_text,
    make_settings,
    note,
    open_model,
    screen,
    show_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from setflow.live import LiveView
    from setflow.run import Run, Settings

HELP = "/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    model: Model = None,
    decoder: DecoderSpec = None,
    adapter: Adapter = AUTO,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    dtype: Dtype = None,
    no_live: NoLive = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model that has a chat template.

    Type /reset to begin anew and /exit or Ctrl-D to end; Ctrl-C stops an answer. Where standard input is not a terminal,
    each of its lines is a turn.
    """
    settings = make_settings(max_new_tokens, temperature, seed)
    console = screen()
    opened = open_model(model, decoder, dtype, console, trust_remote_code, adapter)
    if opened.tokenizer.chat_template is None:
        raise ValueError(f"model {opened.name!r} has no chat template; use setflow generate")
    session = Session(opened, settings, console, live=console.is_terminal and not no_live)
    if sys.stdin.isatty():
        with suppress(ImportError):  # gives input() line editing and a history, where there is one
            import readline  # noqa: F401
        note(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            note("\n" + HELP)
            continue
        except UnicodeDecodeError:
            line = NO_TEXT
        except EOFError:
            if sys.stdin.isatty():
                note("")  # the shell's prompt gets a line of its own
            break
        if line == "/exit":
            break
        if line == "/reset":
            session.reset()
            note("new conversation")
        elif line.startswith("/"):
            note(f"unknown command {line!r}: {HELP}")
        elif line:
            session.take_turn(line)


class Session:
    """The messages so far, and the cache that holds their keys and values."""

    def __init__(self, opened: Opened, settings: "Settings", console: "Console", live: bool):
        self.opened, self.settings, self.console, self.live = opened, settings, console, live
        self.reset()

    def reset(self) -> None:
        from decoding import SlotCache

        self.messages: list[dict[str, str]] = []
        self.cache = SlotCache(self.opened.model.config.num_hidden_layers)

    def take_turn(self, text: str) -> None:
        """Answer ``text``. A turn without an answer is forgotten; of one that is stopped, what was said stays."""
        from setflow.live import LiveView

        asked = [*self.messages, {"role": "user", "content": text}]
        view = LiveView(self.opened.tokenizer, "", self.opened.mask_token_id)
        try:
            check_text(text)
            run = self._answer(asked, view)
        except ValueError as error:
            note(f"error: {error}; /reset begins a new conversation")
            return
        except KeyboardInterrupt:
            view.end()
            answer, shown, remark = view.committed_text, view.text(), "stopped"
        else:
            answer, shown = run.text, run.coloured(self.opened.tokenizer, "")
            remark = (
                f"{len(run.tokens)} tokens, {run.tokens_per_forward:.2f} tokens per forward, "
                f"{run.tokens_per_second:.0f} tok/s"
            )
        show_text(shown if self.console.is_terminal else answer, self.console)
        note(f"[{remark}]")
        if answer:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[dict[str, str]], view: "LiveView") -> "Run":
        from setflow.run import run

        opened = self.opened
        prompt = opened.encode_chat(messages)
        # Another seed for each turn, or all would be drawn with the same numbers.
        room = self.settings.room(opened.model, len(prompt), opened.decoder, at_most=True)
        settings = replace(self.settings, max_new_tokens=room, seed=self.settings.seed + len(messages))
        with view.shown(self.console, opened.model) if self.live else nullcontext():
            return run(opened.model, opened.tokenizer, prompt, opened.decoder, settings, view, self.cache)
