"""The mask token of a model that had none: which id it gets, and the vector it starts from."""

import re
import warnings

import torch
from transformers import AddedToken

from decoding.forward.adapter import gated_adapter

MASK_INITS = ("mean", "random")
TOKEN = "<|mask|>"
RESERVED = re.compile(r"reserved_special_token|reserved_\d+|unused_?\d+", re.IGNORECASE)


def choose_mask_token(model, tokenizer, wanted: int | None = None) -> int:
    """The id of a token that no text uses, for ``model`` and ``tokenizer``, which both remember it.

    In order of preference: ``wanted``, or what the model or its tokenizer name already; a row of the embedding matrix
    behind the tokenizer's last id (Qwen3 has such rows); a reserved token (Llama-3.1 has some); a new token, for which
    the matrix is enlarged to a multiple of 64 rows. A matrix that is frozen, as under adapters, is not saved and so not
    enlarged: in place of a new token comes, with a warning, the unknown or the padding token, or that of a byte which no
    UTF-8 text has. Raises ValueError if there is none of them.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    known = [wanted, *(getattr(c, "mask_token_id", None) for c in (model.generation_config, model.config, tokenizer))]
    mask_id = next((i for i in known if i is not None), None)
    if mask_id is None:
        mask_id = _unused(model, tokenizer, rows)
    if not 0 <= mask_id < model.get_input_embeddings().weight.shape[0]:
        raise ValueError(f"mask_token_id must be a whole number from 0 to {rows - 1}, got {mask_id!r}")
    model.generation_config.mask_token_id = mask_id
    return mask_id


def _unused(model, tokenizer, rows: int) -> int:
    vocabulary = tokenizer.get_vocab()
    reserved = sorted((i, token) for token, i in vocabulary.items() if RESERVED.search(token) and i < rows)
    if len(tokenizer) >= rows and reserved:
        mask_id, token = reserved[0]
        tokenizer.mask_token = token
        return mask_id
    is_frozen = gated_adapter(model) is not None or not model.get_input_embeddings().weight.requires_grad
    if len(tokenizer) >= rows and is_frozen:
        return _spare(tokenizer, rows)
    tokenizer.add_special_tokens({"mask_token": AddedToken(TOKEN, special=True)})
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    return tokenizer.mask_token_id


def _spare(tokenizer, rows: int) -> int:
    """A token that texts hardly use or cannot use, in a vocabulary without a free row."""
    taken = (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    ids = [tokenizer.unk_token_id, tokenizer.pad_token_id]
    # What a byte-level vocabulary or one with byte fallback calls the byte 255, which decodes to no character.
    bytes_255 = tokenizer.convert_tokens_to_ids(["\u00ff", "<0xFF>"])
    ids += [i for i in bytes_255 if i is not None and tokenizer.decode([i]) == "\ufffd"]
    mask_id = next((i for i in ids if i not in taken and i < rows), None)
    if mask_id is None:
        raise ValueError(
            "mask_token_id: the tokenizer has no token to spare; set the objective's mask_token_id to one that the "
            "text never uses"
        )
    warnings.warn(
        f"the vocabulary has no free row for a mask token, so {tokenizer.convert_ids_to_tokens(mask_id)!r} is it; another "
        f"can be named by the objective's mask_token_id",
        stacklevel=2,
    )
    return mask_id


@torch.no_grad()
def initialise_mask_token(model, mask_token_id: int, init: str = "mean") -> None:
    """Set the mask token's embedding, unless the model was trained to read it.

    init: "mean" of all rows plus a little noise, or "random" with their mean and deviation. A gated adapter has a
    vector of its own for it, and the table of the base model stays as it is.
    """
    adapter = gated_adapter(model)
    is_new = adapter is not None and not adapter.replaced  # what was loaded has learned its vector
    if not is_new and _reads_masks(model):
        return
    table = model.get_input_embeddings().weight.float()
    noise = torch.randn_like(table[0]) * table.std(0)
    vector = table.mean(0) + (noise if init == "random" else 0.1 * noise)
    if adapter is None:
        model.get_input_embeddings().weight[mask_token_id] = vector.to(model.dtype)
    else:
        adapter.mask_token_id = mask_token_id
        adapter.mask_embedding.copy_(vector)


def _reads_masks(model) -> bool:
    flow = getattr(model.config, "flow", None)  # of a flow-matching model, which may read other noise instead
    if flow is not None:
        return flow["source"] == "mask"
    return getattr(model.generation_config, "trained_block_sizes", None) is not None
