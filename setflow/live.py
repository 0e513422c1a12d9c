"""A live view of decoding: tokens appear where and when they are decided, in the colour of the forward that did it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from setflow.text import MASK, Detokenizer, coloured, split_text

REFRESH_PER_SECOND = 12  # drawn by another thread, so that decoding waits little for the terminal


class LiveView(BaseStreamer):
    """A streamer that keeps what is decided so far, and by which forward, and shows the end of it.

    Forwards are counted by a hook, because a forward that decides nothing in sight makes no call here. The count takes
    in the prefill, which the trace of a finished run does not.
    """

    def __init__(self, tokenizer, prompt: str, mask_token_id: int | None):
        self.tokenizer, self.prompt, self.mask_token_id = tokenizer, prompt, mask_token_id
        self.tokens: list[int] = []
        self.forwards = 0
        self._pieces: list[tuple[str, int | None]] = []
        self._draft: list[tuple[int, int]] = []  # token and forward, for the places behind the committed ones
        self._detokenizer = Detokenizer(tokenizer)
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Committed tokens, after a first call with the prompt."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        tokens = value.flatten().tolist()
        for token, forward in self._dated(tokens):
            self._pieces.append((self._detokenizer.push(token), forward))
        self.tokens += tokens
        self._draft = self._draft[len(tokens) :]

    def put_draft(self, value: Tensor) -> None:
        """The undecided rest: the mask token where nothing is decided."""
        self._draft = self._dated(value.flatten().tolist())

    def end(self) -> None:
        """Nothing more comes: what is committed stands as the tokenizer makes it of all tokens together."""
        self._draft = []
        forwards = [forward for _, forward in self._pieces]
        self._pieces = list(zip(split_text(self.tokenizer, self.tokens), forwards, strict=True))

    def _dated(self, tokens: list[int]) -> list[tuple[int, int]]:
        """A token that was in sight before keeps the forward that brought it."""
        known = dict(enumerate(self._draft))
        return [
            known[i] if known.get(i, (None, 0))[0] == token else (token, self.forwards)
            for i, token in enumerate(tokens)
        ]

    @property
    def committed_text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def text(self) -> Text:
        """Prompt, committed text and draft."""
        draft = [
            (MASK, None)
            if token == self.mask_token_id
            else (self.tokenizer.decode([token], skip_special_tokens=True), forward)
            for token, forward in self._draft
        ]
        return coloured(self.prompt, [*self._pieces, *draft])

    @contextmanager
    def shown(self, console: Console, model: PreTrainedModel) -> Iterator[None]:
        """Show the view while ``model`` runs; it leaves no trace on the terminal."""

        def tail() -> Text:
            # A taller text would leave its upper lines behind at every refresh.
            return Text("\n", end="").join(self.text().wrap(console, console.width)[-max(1, console.height - 1) :])

        with (
            self._counting(model),
            Live(console=console, get_renderable=tail, refresh_per_second=REFRESH_PER_SECOND, transient=True),
        ):
            yield

    @contextmanager
    def _counting(self, model: PreTrainedModel) -> Iterator[None]:
        def count(*_):
            self.forwards += 1

        hook = model.get_decoder().register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()
