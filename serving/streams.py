"""``python -m serving.streams``: tokens per second of one engine for several numbers of streams; a process for each contender.

An engine takes the whole memory of a GPU, so whoever compares engines starts this once for each and reads its lines of JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from serving.launch import environment

NGRAM = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CONTENDERS = ("vllm", "vllm-ngram", "setflow")


def open_engine(contender: str, model: str, decoder: str | None, streams: int, settings: dict[str, Any]) -> Any:
    """The engine that ``contender`` names: vLLM alone, vLLM with drafts from the text, or ours."""
    settings = {"max_num_seqs": streams, "disable_log_stats": True, "enable_prefix_caching": False} | settings
    if contender == "setflow":
        from serving import load

        return load(model, decoder, **settings)
    from vllm import LLM  # as it is without us

    speculation = {"speculative_config": NGRAM} if contender == "vllm-ngram" else {}
    return LLM(model, additional_config={"setflow": {"decoder": "none"}}, **settings | speculation)


def measure(llm: Any, prompts: list[list[int]], streams: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """The median of ``rounds`` runs of ``streams`` texts at once, each of ``new_tokens``; and the texts, to be compared."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    asked: list[Any] = [{"prompt_token_ids": prompts[i % len(prompts)]} for i in range(streams)]
    seconds, texts = [], []
    for number in range(rounds + 1):  # the first one warms up
        begun = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        if number:
            seconds.append(time.perf_counter() - begun)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
    tokens = sum(map(len, texts))
    return {"streams": streams, "tokens_per_second": round(tokens / statistics.median(seconds), 1), "texts": texts}


def compare(
    model: str,
    decoder: str | None,
    prompts: list[list[int]],
    streams: list[int],
    new_tokens: int,
    rounds: int,
    engine: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """A row for each contender and number of streams: tokens per second, and in how many texts it differs from vLLM alone.

    Raises ValueError if a contender fails; what it said is on standard error.
    """
    plain: dict[int, tuple[float, list[list[int]]]] = {}
    shared = {"model": model, "decoder": decoder, "prompts": prompts, "streams": streams, "new_tokens": new_tokens}
    for contender in CONTENDERS:
        settings = json.dumps(shared | {"contender": contender, "rounds": rounds, "engine": engine})
        command = [sys.executable, "-m", "serving.streams", settings]
        variables = environment(os.environ) if contender == "setflow" else None  # vLLM chooses its own model runner
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):
                    continue  # of vLLM's own
                row = json.loads(line)
                speed, texts = row["tokens_per_second"], row.pop("texts")
                alone, expected = plain.setdefault(row["streams"], (speed, texts))
                other = sum(a != b for a, b in zip(texts, expected, strict=True))
                yield {"contender": contender, **row, "times_vllm": round(speed / alone, 2), "texts_that_differ": other}
        if process.returncode:
            raise ValueError(
                f"contender {contender} ended with exit code {process.returncode}; what it said stands above"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.streams", description=__doc__.split("\n")[0])
    parser.add_argument(
        "settings", help="one JSON object: contender, model, decoder, prompts, streams, new_tokens, rounds, engine"
    )
    given = json.loads(parser.parse_args().settings)
    llm = open_engine(given["contender"], given["model"], given["decoder"], max(given["streams"]), given["engine"])
    for streams in given["streams"]:
        print(json.dumps(measure(llm, given["prompts"], streams, given["new_tokens"], given["rounds"])), flush=True)


if __name__ == "__main__":
    main()
