"""Prompts for chat models in four domains, some to train on and others held out: chat, maths, code, stories.

Chat is made from topics and ways to ask about them; the rest are questions of public data sets in a folder as
``setflow eval --data`` takes it, and beginnings of stories. What is held out shares no topic and no problem with what is
trained on.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from decoding.inputs.jsonl import read_jsonl

DOMAINS = ("chat", "maths", "code", "stories")
FILES = {
    "maths": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "code": ("mbpp/mbpp.jsonl", "python-functions/functions.jsonl", "humaneval/HumanEval.jsonl.gz"),
    "stories": ("tinystories/tiny_stories.txt",),
}
MBPP_TEST = range(11, 511)  # task ids on which models are judged; the others are trained on
HELD_OUT_STORIES = 100

TRAIN_TOPICS = (
    *(
        "the water cycle",
        "coffee",
        "chess",
        "the Roman Empire",
        "photosynthesis",
        "bicycles",
        "job interviews",
        "sleep",
    ),
    *("climate change", "the violin", "bread", "the stock market", "gravity", "dogs", "remote work", "electric cars"),
    *("volcanoes", "meditation", "the internet", "gardening", "the moon", "public speaking", "vaccines", "running"),
    *("time management", "the French Revolution", "batteries", "learning a language", "pasta", "whales", "budgeting"),
    *("the solar system", "team meetings", "swimming", "machine learning", "tea", "the heart", "city parks", "maps"),
    *("painting", "online shopping", "earthquakes", "reading", "the Olympic Games", "bees", "friendship", "airports"),
)
HELD_OUT_TOPICS = (
    *("glaciers", "the piano", "democracy", "cats", "solar panels", "hiking", "the printing press", "cheese", "tides"),
    *("e-mail", "the brain", "lighthouses", "recycling", "football", "dreams", "the Silk Road", "bridges", "honey"),
    *("smartphones", "thunderstorms", "museums", "yoga", "money", "antibiotics", "trains"),
)
ASKINGS = (
    "What is special about {}?",
    "Explain {} to a ten-year-old child.",
    "Give me five tips about {}.",
    "Write a short e-mail to a colleague about {}.",
    "What are the advantages and disadvantages of {}?",
    "Write a short poem about {}.",
    "Summarize what one should know about {} in three sentences.",
    "List seven facts about {}.",
    "How did {} change over the last hundred years?",
    "I have to give a talk about {}. Suggest an outline.",
    "What are common misunderstandings about {}?",
    "Why do people care about {}?",
)


def write_prompts(folder: Path, data: Path) -> None:
    """Write ``{chat,maths,code,stories}-{train,heldout}.jsonl`` and ``train.jsonl`` into ``folder``.

    data: the folder of the data sets. Each line is ``{"messages": [...], "domain": ...}`` with one turn of the user.
    ``train.jsonl`` has the domains in turn, so that the first lines of it are a fair mixture, and a domain whose prompts
    are at an end is left out from there on. Raises ValueError if a file is missing; then nothing is written.
    """
    for names in FILES.values():
        for name in names:
            if not (data / name).is_file():
                raise ValueError(f"data: {str(data / name)!r} does not exist")
    train = {"chat": list(chat(TRAIN_TOPICS)), "maths": list(maths(data / FILES["maths"][0])), "code": list(code(data))}
    stories = list(beginnings(data / FILES["stories"][0]))
    train["stories"] = stories[:-HELD_OUT_STORIES]
    held_out = {
        "chat": list(chat(HELD_OUT_TOPICS)),
        "maths": list(maths(data / FILES["maths"][1])),
        "code": list(human_eval(data / FILES["code"][2])),
        "stories": stories[-HELD_OUT_STORIES:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        _write(folder / f"{domain}-train.jsonl", ((domain, prompt) for prompt in train[domain]))
        _write(folder / f"{domain}-heldout.jsonl", ((domain, prompt) for prompt in held_out[domain]))
    _write(folder / "train.jsonl", in_turn(train))


def chat(topics: tuple[str, ...]) -> Iterator[str]:
    """Every way to ask about every topic, such that the first lines have many of both."""
    for shift in range(len(ASKINGS)):
        for i, topic in enumerate(topics):
            yield ASKINGS[(i + shift) % len(ASKINGS)].format(topic)


def maths(path: Path) -> Iterator[str]:
    """The questions of a file of GSM8K."""
    return (record["question"] for _, record in read_jsonl("data", path))


def code(data: Path) -> Iterator[str]:
    """Problems of MBPP that are not for judging, and functions with a docstring, in turn."""
    mbpp, functions, _ = FILES["code"]
    problems = (
        f"{record['text']} Your code should pass this test:\n{record['test_list'][0]}"
        for _, record in read_jsonl("data", data / mbpp)
        if record["task_id"] not in MBPP_TEST
    )
    described = (
        f"Write a Python function `{record['name']}`. {summary[0]}"
        for _, record in read_jsonl("data", data / functions)
        if not record["name"].startswith(("test", "_"))
        and (summary := re.match(r"[A-Z][^>:]{19,}?\.(?=\s|$)", (record["docstring"] or "").strip()))
    )
    yield from (prompt for _, prompt in in_turn({"mbpp": list(problems), "functions": list(described)}))


def human_eval(path: Path) -> Iterator[str]:
    """The problems of HumanEval, as one asks a chat model."""
    for _, record in read_jsonl("data", path):
        yield f"Complete this Python function:\n```python\n{record['prompt'].strip()}\n```"


def beginnings(path: Path) -> Iterator[str]:
    """First sentences of stories that are to be continued."""
    for story in re.split(r"(?<!\n)\n(?!\n)", path.read_text(encoding="utf-8")):  # an empty line parts paragraphs
        first = re.match(r"\s*([^.!?\n]{20,200}[.!?])", story)
        if first:
            yield f"Write a short story that begins like this: {first[1]}"


def in_turn(prompts: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """(name, prompt): one of each list after the other, while it has any.

    >>> list(in_turn({"a": ["1", "2"], "b": ["3"]}))
    [('a', '1'), ('b', '3'), ('a', '2')]
    """
    for i in range(max(map(len, prompts.values()))):
        for name, some in prompts.items():
            yield from ((name, prompt) for prompt in islice(some, i, i + 1))


def _write(path: Path, prompts: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for domain, prompt in prompts:
            record = {"messages": [{"role": "user", "content": prompt}], "domain": domain}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
