"""Conversations as a tokenizer's chat template shows them, with what a record says to the template besides its turns."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta

# What the template gets from us or from the tokenizer, so that no field of a record may stand for it.
OURS = {"messages", "add_generation_prompt", "continue_final_message"}
# How the turns of a sharegpt record name who speaks.
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}
SPEAKERS |= {role: role for role in ("system", "user", "assistant", "tool")}


def check_messages(messages: Any) -> None:
    """Raise ValueError, with the rest of a sentence about a record, unless ``messages`` is a list of turns.

    A turn is an object with a ``role`` and a ``content``: a text, or a list of parts; one that calls tools needs no content.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"has {_shown(messages)} in 'messages', which must be a list of turns")
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"has {_shown(message)} in '{name}', which must be an object with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if role is None:
            raise ValueError(f"has no '{name}.role'")
        if not isinstance(role, str):
            raise ValueError(f"has {_shown(role)} in '{name}.role', which must be a text")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"has no '{name}.content'")
        if not isinstance(content, str | list | None):
            raise ValueError(f"has {_shown(content)} in '{name}.content', which must be a text")


def from_sharegpt(record: Mapping) -> list[dict]:
    """The turns of a sharegpt record as ``messages``; raises ValueError as :func:`check_messages`.

    >>> from_sharegpt({"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]})
    [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
    """
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"has {_shown(turns)} in 'conversations', which must be a list of turns")
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for i, turn in enumerate(turns):
        name = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"has {_shown(turn)} in '{name}', which must be an object with 'from' and 'value'")
        if "role" in turn:  # a conversation in the usual form under this name
            messages.append(dict(turn))
            continue
        for field in ("from", "value"):
            if not isinstance(turn.get(field), str):
                raise ValueError(f"has {_shown(turn.get(field))} in '{name}.{field}', which must be a text")
        if turn["from"] not in SPEAKERS:
            raise ValueError(f"has {turn['from']!r} in '{name}.from', which must be one of {', '.join(SPEAKERS)}")
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return messages


def template_arguments(record: Mapping, tokenizer) -> dict[str, Any]:
    """What ``record`` says to the tokenizer's chat template besides the messages.

    That is every field that the template asks for by its name, such as ``tools`` and ``documents``, and the entries of
    ``chat_template_kwargs``. ``tools`` may also be JSON text. Raises ValueError, with the rest of a sentence about the record,
    for tools or entries that the template does not ask for.
    """
    named = record.get("chat_template_kwargs") or {}
    if not isinstance(named, Mapping):
        raise ValueError(f"has {_shown(named)} in 'chat_template_kwargs', which must be an object")
    given = {**record, **named}
    tools = given.pop("tools", None)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            raise ValueError("has a text in 'tools' that is not JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(f"has {_shown(tools)} in 'tools', which must be a list of objects")
    tools = tools or None
    asked = template_variables(tokenizer.get_chat_template(tools=tools)) - OURS - tokenizer.special_tokens_map.keys()
    for name in ("tools", *named) if tools else named:
        if name not in asked:
            raise ValueError(f"has {name!r}, which the chat template does not ask for")
    given = {name: value for name, value in given.items() if name in asked and value is not None}
    return {**given, "tools": tools} if tools else given


@lru_cache
def template_variables(template: str) -> frozenset[str]:
    """The names that a chat template takes from outside.

    >>> sorted(template_variables("{% set a = tools %}{% generation %}{{ a }}{{ bos_token }}{% endgeneration %}"))
    ['bos_token', 'tools']
    """
    # transformers' own tag marks what the assistant says; it takes no names.
    template = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError as error:
        raise ValueError(f"cannot be shown, since the chat template is broken: {error}") from None


def render(tokenizer, messages: list[Mapping], arguments: Mapping[str, Any], add_generation_prompt: bool) -> str:
    """The text of ``messages``; raises ValueError, with the rest of a sentence about the record, if there is none."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
        )
    except Exception as error:  # templates are programs of their own
        raise ValueError(f"has 'messages' that the chat template refuses: {' '.join(str(error).split())}") from error


def _shown(value: Any) -> str:
    """``value`` in a sentence, not too long."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
