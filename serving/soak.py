"""``python -m serving.soak``: many requests at once against a running server, some broken off, and every answer judged.

First each prompt is asked alone, greedily; then all answers must be the same texts, whatever runs beside them. Exit code 1 if
an answer is lost or wrong. It needs nothing but httpx, which comes with vLLM.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"decoder": "sbd", "entropy_bound": 0.5},
    {"decoder": "ntp"},
    {"block_size": 4},
)
WORDS = ("def", "return", "12 + 7 = ?\n", "478 + 395 = ?\n", "import os\n", "class Reader:\n", "for line in", "print(")


@dataclass
class Soak:
    """One run. ``expected``: the answers by prompt and options. ``memory``: megabytes of the server's processes, in time."""

    url: str
    model: str
    max_tokens: int
    process: int | None
    expected: dict[tuple[str, int], str] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("right", "wrong", "lost", "aborted"), 0))
    memory: list[float] = field(default_factory=list)

    async def run(self, count: int, concurrency: int, abort_share: float, prompts: list[str]) -> dict[str, Any]:
        """Ask ``count`` times; returns the summary."""
        import httpx

        async with httpx.AsyncClient(timeout=600) as client:
            for prompt in prompts:
                for kind in range(len(OPTIONS)):
                    self.expected[prompt, kind] = await self._ask(client, prompt, kind)
            begun, draw, gate = time.perf_counter(), random.Random(0), asyncio.Semaphore(concurrency)
            plans = [
                (draw.choice(prompts), draw.randrange(len(OPTIONS)), draw.random() < abort_share) for _ in range(count)
            ]
            await asyncio.gather(*(self._judge(client, gate, *plan) for plan in plans))
            seconds = time.perf_counter() - begun
            left = await self._running(client)
        share = [self.memory[i] for i in (len(self.memory) // 4, -1)] if self.memory else [None, None]
        return self.outcomes | {
            "requests": count,
            "concurrency": concurrency,
            "seconds": round(seconds, 1),
            "still_running": left,
            "megabytes_after_a_quarter": share[0],
            "megabytes_at_the_end": share[1],
        }

    async def _judge(self, client: Any, gate: asyncio.Semaphore, prompt: str, kind: int, abort: bool) -> None:
        async with gate:
            try:
                text = await self._ask(client, prompt, kind, abort)
            except Exception as error:
                print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
                self.outcomes["lost"] += 1
                return
            if abort:
                self.outcomes["aborted"] += 1
                right = self.expected[prompt, kind].startswith(text)
            else:
                right = text == self.expected[prompt, kind]
                self.outcomes["right"] += right
            if not right:
                self.outcomes["wrong"] += 1
                print(f"wrong: {prompt!r} {OPTIONS[kind]}: {text!r}", file=sys.stderr)
            done = sum(self.outcomes.values())
            if self.process is not None and done % 10 == 0:
                self.memory.append(resident(self.process))

    async def _ask(self, client: Any, prompt: str, kind: int, abort: bool = False) -> str:
        """The streamed answer; with ``abort`` the connection is closed at the first piece of it."""
        length = self.max_tokens * (8 if abort else 1)  # so that there is something to break off
        body = {"model": self.model, "prompt": prompt, "max_tokens": length, "temperature": 0, "stream": True}
        text = ""
        async with client.stream(
            "POST", f"{self.url}/v1/completions", json=body | {"vllm_xargs": OPTIONS[kind]}
        ) as answer:
            if answer.status_code != 200:
                raise ValueError((await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if abort and text:
                        break
        return text

    async def _running(self, client: Any) -> float:
        """Requests that the server still holds a moment after the last answer."""
        await asyncio.sleep(3)
        lines = (await client.get(f"{self.url}/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def resident(process: int) -> float:
    """Megabytes that ``process`` and all that it started hold in memory."""
    total, open_ = 0.0, [process]
    while open_:
        current = open_.pop()
        status = Path(f"/proc/{current}/status")
        try:
            total += next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
            open_ += map(int, Path(f"/proc/{current}/task/{current}/children").read_text().split())
        except (OSError, StopIteration):
            pass
    return round(total / 1024, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="embedded", help="as the server calls it")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--abort-share", type=float, default=0.1)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--process", type=int, help="the server's process id, whose memory is watched")
    given = parser.parse_args(arguments)
    soak = Soak(given.url.rstrip("/"), given.model, given.max_tokens, given.process)
    summary = asyncio.run(soak.run(given.requests, given.concurrency, given.abort_share, list(WORDS)))
    print(json.dumps(summary))
    return int(summary["wrong"] > 0 or summary["lost"] > 0 or summary["still_running"] > 0)


if __name__ == "__main__":
    sys.exit(main())
