"""A server as users start it, asked by the official client over this machine's own address."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

PROMPT = "478 + 395 = ?\n"
START = 600  # seconds; a busy machine takes long to import vLLM


@pytest.fixture(scope="module")
def server(vllm, tmp_path_factory):
    """The address of a server of the embedded model, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "setflow", "serve", "--port", str(port), "--max-num-seqs", "16"]
    mine = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"}
    environment = {name: value for name, value in os.environ.items() if name not in mine}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"no server after {START} s: {log.read_text()[-3000:]}")
        yield address, process
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=300, max_retries=0)


def complete(client, prompt=PROMPT, xargs=None, **settings):
    body = {"vllm_xargs": xargs} if xargs else {}
    return client.completions.create(
        **{"model": "embedded", "prompt": prompt, "max_tokens": 40, "temperature": 0, "extra_body": body} | settings
    )


def test_completions_and_their_usage(client):
    answer = complete(client)
    assert answer.choices[0].text.startswith("478 + 395: 8 + 5 = 13, write 3, carry 1\n")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 40 and answer.usage.total_tokens == 40 + answer.usage.prompt_tokens


def test_all_decoders_that_are_lossless_say_the_same(client):
    texts = {complete(client, xargs=xargs).choices[0].text for xargs in (None, {"decoder": "ntp"}, {"block_size": 4})}
    assert len(texts) == 1
    lossy = complete(client, xargs={"decoder": "sbd", "block_size": 16, "entropy_bound": 5.0}).choices[0].text
    assert lossy not in texts


def test_chat(client):
    messages = [{"role": "user", "content": "12 + 7 = ?"}]
    whole = client.chat.completions.create(model="embedded", messages=messages, max_tokens=30, temperature=0)
    pieces = client.chat.completions.create(
        model="embedded",
        messages=messages,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for piece in pieces:
        text += (piece.choices[0].delta.content or "") if piece.choices else ""
        usage = piece.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("xargs", (None, {"decoder": "sbd"}, {"decoder": "sbd:anchor=true,commit=prefix"}), ids=str)
def test_streams_add_up_and_stop_strings_cut(client, xargs):
    whole = complete(client, xargs=xargs).choices[0].text
    assert "".join(piece.choices[0].text for piece in complete(client, xargs=xargs, stream=True)) == whole
    stop = whole[11:14]
    cut = complete(client, xargs=xargs, stop=[stop])
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_the_end_of_a_text_inside_a_block(client):
    """After the model's own end token nothing is emitted, wherever in a block it stands."""
    for xargs in (None, {"decoder": "ntp"}, {"decoder": "sbd"}):
        answer = complete(client, "12 + 7 = ?\n", xargs, max_tokens=200)
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 200


def test_logprobs_of_emitted_tokens(client):
    ours = complete(client, logprobs=2).choices[0].logprobs
    plain = complete(client, logprobs=2, xargs={"decoder": "ntp"}).choices[0].logprobs
    assert ours.tokens == plain.tokens and len(ours.tokens) == 40
    assert ours.token_logprobs == pytest.approx(plain.token_logprobs, abs=1e-3)


def test_penalties_are_those_of_next_token_decoding(client):
    """They look at the drafts before a row, too."""
    prompt, settings = 'def read_lines(path):\n    """Return', {"frequency_penalty": 1.5, "presence_penalty": 0.5}
    texts = [complete(client, prompt, xargs, **settings).choices[0].text for xargs in (None, {"decoder": "ntp"})]
    assert texts[0] == texts[1] != complete(client, prompt).choices[0].text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"xargs": {"block_size": 99}}, r"block_size \(of a request\) must be a whole number from 1 to 16, got 99"),
        ({"xargs": {"decoder": "magic"}}, r"decoder must be one of 'ntp', 'sbd', 'sbd-lossless', got 'magic'"),
        ({"xargs": {"blok_size": 2}}, r"did you mean 'block_size'"),
        (
            {"xargs": {"decoder": "sbd"}, "frequency_penalty": 1.0},
            r"frequency_penalty cannot be honoured with decoder sbd",
        ),
        ({"xargs": {"decoder": "sbd"}, "logprobs": 1}, r"logprobs cannot be had with decoder sbd"),
    ],
    ids=str,
)
def test_mistakes_are_answered_in_one_sentence(client, settings, message):
    import openai

    with pytest.raises(openai.BadRequestError) as error:
        complete(client, **settings)
    assert re.search(message, error.value.message)


def test_structured_outputs_are_refused(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="structured outputs"):
        client.chat.completions.create(
            model="embedded",
            messages=[{"role": "user", "content": "12 + 7 = ?"}],
            response_format={"type": "json_object"},
            max_tokens=5,
        )


def test_metrics_tell_tokens_per_forward(server, client):
    complete(client)
    text = urllib.request.urlopen(f"{server[0]}/metrics").read().decode()
    values = {
        name: float(value) for name, value in re.findall(r"^(setflow:\w+)\{.*\} (\S+)$", text, flags=re.MULTILINE)
    }
    assert values["setflow:tokens_per_forward"] > 1 and 0 < values["setflow:acceptance_rate"] < 1
    assert values["setflow:forwards_total"] > 10


def test_soak(server):
    """A short one, with aborts; the long one is a command: python -m serving.soak."""
    address, process = server
    command = [sys.executable, "-m", "serving.soak", "--url", address, "--requests", "40", "--max-tokens", "8"]
    done = subprocess.run([*command, "--process", str(process.pid)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["lost"] == summary["wrong"] == summary["still_running"] == 0
    assert summary["aborted"] > 0 and summary["right"] + summary["aborted"] == 40


def test_a_killed_server_leaves_nothing_behind(server):
    """The last test of this file: its engine ends by itself, so that another server can start at once."""
    _, process = server
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(path) as children:
        started = children.read().split()
    assert started
    process.kill()
    process.wait()
    for _ in range(60):
        if not any(os.path.exists(f"/proc/{child}/exe") and _is_engine(child) for child in started):
            return
        time.sleep(1)
    pytest.fail("the engine of a killed server still runs")


def _is_engine(process: str) -> bool:
    try:
        with open(f"/proc/{process}/cmdline") as command:
            return "EngineCore" in command.read()
    except OSError:
        return False
