"""Streaming: only what is final is put, nothing is taken back, and drafts are shown apart."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import TextDiffusionStreamer

from decoding import NextTokenDecoder
from sbd import EntropyBound, SetBlockDecoder, TopK

NTP, SBD = NextTokenDecoder(), SetBlockDecoder(block_size=6, rule=TopK(2))
DECODERS = pytest.mark.parametrize("decoder", [NTP, SBD], ids=["ntp", "sbd"])


@DECODERS
def test_what_was_put_joins_to_the_text(shared_model, prompts, decoder, recording_streamer):
    model, inputs = shared_model("llama"), prompts(7)
    arguments = {"max_new_tokens": 15, "do_sample": False, "custom_generate": decoder}
    expected = model.generate(**inputs, **arguments)[0].tolist()
    output = model.generate(**inputs, **arguments, streamer=recording_streamer)
    assert output[0].tolist() == expected
    put = recording_streamer.texts("put")
    assert put[0] == expected[:7]
    assert sum(put, []) == expected
    assert all(put) and len(put) > 3
    assert recording_streamer.calls[-1] == ("end", []) and len(recording_streamer.texts("end")) == 1


def test_a_forward_that_leaves_a_hole_at_the_front_puts_nothing(run_scripted, recording_streamer):
    def script(sequence: int, position: int) -> torch.Tensor:
        logits = torch.zeros(97)
        logits[10 + position] = position  # the later, the surer: a block is filled from its end
        return logits

    (sequence,), _ = run_scripted(SetBlockDecoder(4, TopK(1)), script, [3], 8, streamer=recording_streamer)
    text = [13, 14, 15, 16, 17, 18, 19, 20]
    assert sequence.new_tokens == text
    assert recording_streamer.texts("put") == [text[:4], text[4:]]
    m = 96
    assert recording_streamer.texts("draft") == [
        [m, m, m, 16],
        [m, m, 15, 16],
        [m, 14, 15, 16],
        [m, m, m, 20],
        [m, m, 19, 20],
        [m, 18, 19, 20],
    ]


def test_a_draft_is_the_rest_of_the_block_behind_what_is_final(run_scripted, recording_streamer):
    def script(sequence: int, position: int) -> torch.Tensor:
        logits = torch.zeros(97)
        logits[10 + position] = {3: 8.0, 4: 2.0, 5: 6.0, 6: 4.0}[position]
        return logits

    run_scripted(SetBlockDecoder(4, TopK(1)), script, [3], 4, streamer=recording_streamer)
    m = 96
    assert recording_streamer.calls == [
        ("put", [13]),
        ("draft", [m, m, m]),
        ("draft", [m, 15, m]),
        ("draft", [m, 15, 16]),
        ("put", [14, 15, 16]),
        ("end", []),
    ]


@DECODERS
def test_text_streamer_prints_the_text(shared_model, prompts, tokenizer, capsys, decoder):
    model, inputs = shared_model("llama"), prompts(7)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = model.generate(**inputs, max_new_tokens=15, do_sample=False, custom_generate=decoder, streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(output[0, 7:]) + "\n"


@DECODERS
def test_text_iterator_streamer_in_a_thread(shared_model, prompts, tokenizer, decoder):
    model, inputs = shared_model("llama"), prompts(7)
    arguments = {"max_new_tokens": 15, "do_sample": False, "custom_generate": decoder}
    expected = tokenizer.decode(model.generate(**inputs, **arguments)[0, 7:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **arguments, "streamer": streamer})
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == expected and len([part for part in parts if part]) > 0


def test_diffusion_streamer_shows_drafts_and_then_the_text(shared_model, prompts, tokenizer, capsys):
    model, inputs = shared_model("llama"), prompts(7)
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True)
    decoder = SetBlockDecoder(block_size=6, rule=EntropyBound(0.0))
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=decoder, streamer=streamer)
    shown = capsys.readouterr().out
    assert "\033[33m" in shown and "<mask>" in shown
    drafts_removed = "".join(part.split("\0338\033[J")[-1] for part in shown.split("\0337"))
    assert drafts_removed == tokenizer.decode(output[0, 7:]) + "\n"


def test_a_stop_inside_a_block_is_the_end_of_the_stream(shared_model, prompts, recording_streamer):
    model, inputs = shared_model("llama"), prompts(7)
    free = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=SBD)[0, 7:].tolist()
    stop = free[3]
    output = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        custom_generate=SBD,
        eos_token_id=stop,
        streamer=recording_streamer,
    )
    cut = free[: free.index(stop) + 1]
    assert output[0, 7:].tolist() == cut
    assert sum(recording_streamer.texts("put")[1:], []) == cut
    assert recording_streamer.calls[-2][0] == "put" and recording_streamer.calls[-1][0] == "end"
