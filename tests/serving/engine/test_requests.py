"""Requests among others: whatever runs beside it, is aborted or preempted, a request's text is what it is alone."""

import random

import pytest

from tests.serving.engine.conftest import CONTEXT, engine, random_prompts, run, saved

OPTIONS = (
    {"decoder": "sbd-lossless:block_size=8"},
    {"decoder": "sbd:block_size=8,entropy_bound=0.5"},
    {"decoder": "ntp"},
    {"decoder": "sbd:block_size=3,confidence_threshold=0.2"},
    {"block_size": 4},
    {"decoder": "sbd:block_size=5,entropy_bound=1,anchor=true,commit=prefix"},
    {"decoder": "sbd", "top_k": 2},
)
COUNT, TOKENS = 32, 14


def requests(count: int = COUNT) -> tuple[list[list[int]], list[dict]]:
    """Ragged prompts, some with a long common beginning, some longer than a step's budget of tokens; all kinds of options."""
    draw = random.Random(0)
    shared = random_prompts(150, seed=1)[0]
    own = random_prompts(*(draw.randint(1, 60) for _ in range(count)), seed=2)
    prompts = [shared + prompt[:20] if i % 5 == 4 else prompt for i, prompt in enumerate(own)]
    return prompts, [OPTIONS[i % len(OPTIONS)] for i in range(count)]


@pytest.fixture(scope="module")
def alone(vllm) -> list[list[int]]:
    """What each of the requests gives when nothing else runs."""
    prompts, options = requests()
    llm = engine(saved("llama")[1])
    return [run(llm, [prompt], TOKENS, [option])[0] for prompt, option in zip(prompts, options, strict=True)]


def test_together_as_alone(alone):
    prompts, options = requests()
    assert run(engine(saved("llama")[1]), prompts, TOKENS, options) == alone


def test_long_prompts_in_chunks_and_a_budget_that_is_too_small(alone):
    """A step holds 48 tokens: prompts come in parts, and not every request gets its canvas in every step."""
    prompts, options = requests()
    llm = engine(saved("llama")[1], max_num_batched_tokens=48, enable_prefix_caching=False)
    assert run(llm, prompts, TOKENS, options) == alone


def test_preempted_requests_go_on(monkeypatch, vllm):
    """Each text outgrows its block of 128 tokens where there is none left: requests lose their keys and values, and go on.

    Anchored decoders are left out: of an open block nothing is kept, and theirs begins anew at another place.
    """
    from serving.engine.scheduler import BlockScheduler

    preempted, original = [], BlockScheduler._preempt_request

    def preempt(self, request, *arguments, **settings):
        preempted.append(request.request_id)
        original(self, request, *arguments, **settings)

    monkeypatch.setattr(BlockScheduler, "_preempt_request", preempt)
    prompts = random_prompts(*range(114, 126), seed=4)
    kept = [option for option in OPTIONS if "anchor" not in option.get("decoder", "")]
    options = [kept[i % len(kept)] for i in range(len(prompts))]
    roomy = run(engine(saved("llama")[1]), prompts, 20, options)
    assert not preempted
    tight = engine(saved("llama")[1], num_gpu_blocks_override=6, block_size=128, enable_prefix_caching=False)
    assert run(tight, prompts, 20, options) == roomy
    assert preempted


def test_aborts_leave_the_others_alone(alone):
    """A third of the requests is aborted in the middle; their slots go to others."""
    from vllm import SamplingParams

    prompts, options = requests()
    core = engine(saved("llama")[1]).llm_engine
    for i, (prompt, extra) in enumerate(zip(prompts, options, strict=True)):
        params = SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, extra_args=extra)
        core.add_request(f"request-{i}", {"prompt_token_ids": prompt}, params)
    texts: dict[str, list[int]] = {}
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 3:
            core.abort_request([f"request-{i}" for i in range(0, COUNT, 3)])
    kept = [i for i in range(COUNT) if i % 3]
    assert [texts[f"request-{i}"] for i in kept] == [alone[i] for i in kept]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_the_end_of_the_context(option):
    """Texts that fill the context to its last position are those of a model with more room."""
    folder = saved("llama")[1]
    prompts = random_prompts(CONTEXT - 9, CONTEXT - 1, CONTEXT - 20)
    texts = run(engine(folder), prompts, 64, [option] * 3)
    assert [len(text) for text in texts] == [9, 1, 20]


def test_repeated_prompts_come_from_the_prefix_cache(vllm):
    """What a cached block holds is what the prompt's rows would compute: the same text, with and without it."""
    folder = saved("llama")[1]
    prompts = random_prompts(200, 140, seed=3)
    cached = engine(folder)
    once = run(cached, prompts, options=[OPTIONS[1], OPTIONS[0]])
    begun = [
        prompt + text for prompt, text in zip(prompts, once, strict=True)
    ]  # of which generated blocks are cached, too
    again = run(cached, begun, options=[OPTIONS[0], OPTIONS[2]])
    assert run(engine(folder, max_num_batched_tokens=48, enable_prefix_caching=False), begun) == again
