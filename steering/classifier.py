"""Rewards by a transformers model: a reward model, or a classifier of which one label is wanted."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from decoding.forward.loading import one_sentence
from decoding.inputs.source import check_source, located


@dataclass(frozen=True)
class ClassifierReward:
    """The score that a sequence classifier gives to a prompt with its finished completion.

    source: folder or hub name of a model for sequence classification, with its tokenizer. label: of a classifier with
    several labels the one that is wanted, whose log-probability in nats is the reward; None for a reward model, which has
    one output: that is the reward. batch_size: texts at a time.

    A tokenizer with a chat template is shown the prompt as the user's turn and the completion as the answer, any other the
    text as it stands. A text longer than the model's context loses its beginning.
    """

    source: str
    label: str | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_source(self.source, named=f"reward {self.source!r}")

    @classmethod
    def named(cls, name: str) -> "ClassifierReward":
        """What ``SOURCE`` or ``SOURCE#LABEL`` stands for."""
        source, _, label = name.partition("#")
        return cls(source, label or None)

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        model, tokenizer = _load(self.source)
        label = self._label_index(model)
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            texts = [_text(tokenizer, *pair) for pair in zip(prompts[part], completions[part], strict=True)]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(model.device)
            with torch.no_grad():
                logits = model(**inputs).logits.float()
            scores += (logits[:, 0] if label is None else logits.log_softmax(-1)[:, label]).tolist()
        return scores

    def check(self) -> None:
        """Load the model; raise ValueError if there is none, or if it has no such label."""
        self._label_index(_load(self.source)[0])

    def _label_index(self, model: Any) -> int | None:
        labels = {str(name): index for index, name in model.config.id2label.items()}
        if self.label is None and len(labels) == 1:
            return None
        if self.label not in labels:
            raise ValueError(
                f"reward {self.source!r} has the labels {', '.join(labels)}: name one as {self.source}#{next(iter(labels))}, "
                f"got {self.label!r}"
            )
        return labels[self.label]


def _text(tokenizer: Any, prompt: str, completion: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return prompt + completion
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


@functools.lru_cache(maxsize=2)
def _load(source: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with one_sentence(f"reward {source!r}"):
        model, loaded = AutoModelForSequenceClassification.from_pretrained(located(source), output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(located(source), truncation_side="left")
    if loaded["missing_keys"]:  # transformers would go on with random weights
        raise ValueError(
            f"reward {source!r} is no sequence classifier: it lacks {', '.join(sorted(loaded['missing_keys']))}"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
