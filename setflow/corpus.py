"""The corpus and the tokenizer of the embedded model, made from what any machine has.

Python source of the standard library and generated worked additions; held-out files and problems are written apart.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from decoding.inputs.jsonl import read_jsonl
from eval.additions import additions
from eval.python_source import library_pieces

VOCABULARY = 2048
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
# A turn of the user is the prompt as it stands; the model goes on from there.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


def write_corpus(folder: Path, num_additions: int = 30_000, num_held_out: int = 1_000) -> None:
    """Write ``{python,additions,additions-brief}-{train,heldout}.jsonl`` and ``tokenizer/`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for held_out, split in ((False, "train"), (True, "heldout")):
        count = num_held_out if held_out else num_additions
        problems = list(itertools.islice(additions(seed=0, held_out=held_out), count))
        _write(folder / f"python-{split}.jsonl", library_pieces(held_out))
        _write(folder / f"additions-{split}.jsonl", (p.prompt + p.solution for p in problems))
        _write(folder / f"additions-brief-{split}.jsonl", (p.prompt + p.brief_solution for p in problems))
    texts = [
        record["text"]
        for name in ("python", "additions-brief")
        for _, record in read_jsonl("folder", folder / f"{name}-train.jsonl")
    ]
    train_tokenizer(texts).save_pretrained(folder / "tokenizer")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens in which every digit stands alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **SPECIAL,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _write(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
