"""Training rows and held-out rows of a recipe, which have no text in common."""

import warnings
from collections.abc import Collection

from datasets import Dataset

from finetune.data import ALL_HELD_OUT, load_documents, stream_documents
from finetune.packing import PackedDataset, StreamedRows
from finetune.recipe import Recipe
from finetune.sources import reported_names


def read_data(recipe: Recipe, tokenizer, seed: int) -> tuple[PackedDataset | StreamedRows, dict[str, PackedDataset]]:
    """Training rows, and held-out rows by the name under which they are reported.

    What is held out is not trained on, wherever else in the data the same text stands, unless ``held_out`` names the very
    sources of ``data``: then it is measured on what is trained on, and a warning says so. Raises ValueError for data that
    cannot be read or is too little.
    """
    length = recipe.sequence_length
    named = {
        name: load_documents([source], tokenizer) for name, source in reported_names(recipe.held_out_sources).items()
    }
    apart = frozenset().union(*(documents["digest"] for documents in named.values()))
    if named and {s.place for s in recipe.data} == {s.place for s in recipe.held_out_sources}:
        warnings.warn(
            "held_out: these are the sources of data, so losses are those of what is trained on", stacklevel=2
        )
        apart = frozenset()
    held_out = {name: PackedDataset(documents, length, f"held_out {name!r}") for name, documents in named.items()}
    if recipe.streaming:
        return StreamedRows(stream_documents(recipe.data, tokenizer, seed, apart), length), held_out
    documents = load_documents(recipe.data, tokenizer, seed)
    if isinstance(recipe.held_out, float):
        documents, kept = hold_out(documents, recipe.held_out)
        held_out = {"held_out": PackedDataset(kept, length, f"held_out, a share of {recipe.held_out},")}
    elif apart:
        count = len(documents)
        documents = leave_out(documents, apart)
        if not len(documents):
            raise ValueError(ALL_HELD_OUT)
        if len(documents) < count:
            what = f"{count - len(documents)} of {count} documents of data are in held_out, too"
            warnings.warn(f"{what}, and are not trained on", stacklevel=2)
    return PackedDataset(documents, length), held_out


def hold_out(documents: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """``documents``, in the order in which they are, as those to train on and those to measure on.

    The second have ``share`` of the different texts, each once; of these the first have none, however often it came. A
    record that gives several documents is in one of the two as a whole. Raises ValueError if nothing is left to train on.
    """
    digests, records = list(documents["digest"]), list(documents["record"])
    found: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        found.setdefault(record, []).append(index)
    texts = {record: frozenset(digests[index] for index in indices) for record, indices in found.items()}
    different = list(dict.fromkeys(texts[record] for record in found))
    held = different[: max(1, round(share * len(different)))]
    apart = frozenset().union(*held)
    first = {digests[index]: index for index in reversed(range(len(documents))) if digests[index] in apart}
    train = leave_out(documents, apart)
    if not len(train):
        raise ValueError(
            f"held_out: a share of {share} leaves nothing to train on, since the number of different texts in data is "
            f"{len(different)}; give more data, or name files in held_out"
        )
    return train, documents.select(sorted(first.values()))


def leave_out(documents: Dataset, digests: Collection[str]) -> Dataset:
    """``documents`` without the records of which a document has one of ``digests``."""
    pairs = list(zip(documents["record"], documents["digest"], strict=True))
    apart = {record for record, digest in pairs if digest in digests}
    return documents.select([index for index, (record, _) in enumerate(pairs) if record not in apart])
