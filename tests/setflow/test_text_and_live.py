"""Text token by token, and the live view: the same tokens, in the colours that the trace gives them at the end."""

import io

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding import decoder_from_spec
from setflow.live import LiveView
from setflow.run import Settings, run
from setflow.text import COLOURS, MASK, coloured, split_text, visible


@pytest.fixture(scope="module")
def loaded(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


def test_pieces_add_up_and_a_character_comes_whole(loaded):
    _, tokenizer = loaded
    text = "1 + 1 = 2 é \N{SNOWMAN} \N{GRINNING FACE}\nwrite\N{SNOWMAN}"
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    pieces = split_text(tokenizer, ids)
    assert "".join(pieces) == text and len(pieces) == len(ids)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_colours_follow_the_forwards():
    text = coloured("p", [("a", 1), ("b", 2), ("c", 1 + len(COLOURS)), (MASK, None)])
    styles = [str(span.style) for span in text.spans]
    assert text.plain == "pabc" + MASK and str(text.style) == "dim"
    assert styles == [COLOURS[1], COLOURS[2], COLOURS[1], "dim"]


class Recorder(LiveView):
    """Keeps the text of every moment."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.moments = []

    def put(self, value):
        super().put(value)
        self.moments.append(self.text())

    def put_draft(self, value):
        super().put_draft(value)
        self.moments.append(self.text())


@pytest.mark.parametrize("spec", ["ntp", "sbd:block_size=8,entropy_bound=1", "sbd-lossless:block_size=4"])
@pytest.mark.parametrize("prompt_length", [5, 600])
def test_live_view_ends_with_the_text(loaded, spec, prompt_length):
    model, tokenizer = loaded
    model.config.max_position_embeddings = 1024
    prompt = torch.randint(4, 200, (prompt_length,), generator=torch.Generator().manual_seed(0)).tolist()
    view = Recorder(tokenizer, "", model.config.mask_token_id)
    screen = Console(file=io.StringIO(), force_terminal=True, width=60, height=10)
    with view.shown(screen, model):
        result = run(model, tokenizer, prompt, decoder_from_spec(spec), Settings(40), view)
    assert view.tokens == result.tokens and view.committed_text == result.text
    assert not model.get_decoder()._forward_pre_hooks  # the count left no trace on the model
    final = result.coloured(tokenizer, "")
    pieces = split_text(tokenizer, result.tokens)
    assert view.text().plain == final.plain == "".join(map(visible, pieces)).replace("\r", "")
    assert "".join(pieces) == result.text
    if not spec.startswith("sbd-lossless"):  # where a draft is in sight before the forward that accepts it
        assert view.text().spans == final.spans
    if spec.startswith("sbd:"):
        assert any(MASK in moment.plain for moment in view.moments)


def test_a_view_larger_than_the_screen_shows_its_end(loaded):
    model, tokenizer = loaded
    screen = Console(file=io.StringIO(), force_terminal=True, width=20, height=5)
    view = LiveView(tokenizer, "\n".join(str(n) for n in range(100)), None)
    with view.shown(screen, model):
        pass
    shown = screen.file.getvalue()
    assert "99" in shown and "50" not in shown
