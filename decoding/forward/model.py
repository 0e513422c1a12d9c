"""A stock transformers model as the engine sees it: rows in, logits on demand out."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding.forward.attention import MASK_FORMS, run_trunk
from decoding.forward.cache import SlotCache
from decoding.forward.gating import marked_block_rows, marked_offsets
from decoding.forward.noise_level import with_noise_level
from decoding.forward.rows import Rows

TESTED = ("llama", "qwen2", "qwen3", "mistral")
_probed: set[str] = set()


class RowLogits:
    """Logits of the rows of one forward, computed only for those that are asked for.

    ``hidden`` is [B, R, D]. Nothing of the size rows x vocabulary is kept.
    """

    def __init__(self, hidden: Tensor, head):
        self.hidden = hidden
        self._head = head

    def __call__(self, sequences: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Float32 logits [N, V] of row ``rows[i]`` of sequence ``sequences[i]``."""
        return self.of(self.hidden_of(sequences, rows))

    def hidden_of(self, sequences: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Hidden states [N, D] of the same rows, small enough to be kept until the next forward."""
        if len(self.hidden) == 1 and len(rows) > 1 and rows[-1] - rows[0] == len(rows) - 1:
            return self.hidden[0, rows[0] : rows[-1] + 1]
        return self.hidden[list(sequences), list(rows)]

    def of(self, hidden: Tensor) -> Tensor:
        """Float32 logits [N, V] of hidden states [N, D] of this or an earlier forward."""
        return self._head(hidden).float()


class EngineModel:
    """Runs rows through a model and writes their keys and values to the slots of a cache."""

    def __init__(self, model: PreTrainedModel, batch_size: int, cache: SlotCache | None = None):
        check_model(model)
        self.model = model
        self.cache = cache if cache is not None else SlotCache(model.config.num_hidden_layers, batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def forward(self, rows: Rows) -> RowLogits:
        """One forward pass over ``rows``."""
        self.cache.plan(rows.slots, rows.num_slots)
        is_block = rows.is_block if rows.has_blocks else None  # without any, nothing gated by them need run
        with marked_block_rows(is_block), marked_offsets(rows.offset):
            embeddings = with_noise_level(self.model, rows.tokens, rows.level)
            hidden = run_trunk(
                self.model, rows.tokens, rows.positions, rows.visibility, rows.num_slots, self.cache, embeddings
            )
        return RowLogits(hidden, self.model.get_output_embeddings())


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that the engine would decode wrongly.

    Llama, Qwen2, Qwen3 and Mistral are covered by the tests. Any other type is tried once on a few tokens: its logits
    through our masks and cache must equal its own, and a hidden key must not change them.
    """
    form = model.config._attn_implementation
    if form not in MASK_FORMS:
        raise ValueError(
            f"attn_implementation={form!r} cannot take the masks of block decoding; load the model with "
            f"attn_implementation set to one of {', '.join(map(repr, MASK_FORMS))}"
        )
    kind = model.config.model_type
    if kind not in TESTED and kind not in _probed:
        try:
            passed = _probe(model)
        except Exception as error:
            raise ValueError(f"model_type={kind!r} cannot be decoded: {type(error).__name__}: {error}") from error
        if not passed:
            raise ValueError(
                f"model_type={kind!r} cannot be decoded: its logits through our masks and cache differ from its own; "
                f"tested types are {', '.join(TESTED)}"
            )
        _probed.add(kind)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> bool:
    """True if a chunked forward through the engine gives the model's own logits and obeys the masks."""
    from decoding.forward.rows import RowList

    count, split = 12, 7
    tokens = torch.arange(1, count + 1, device=model.device) % model.config.vocab_size
    reference = model(input_ids=tokens[None], use_cache=False).logits[0].float()

    def chunked(scratch_token: int) -> Tensor:
        cache = SlotCache(model.config.num_hidden_layers)
        logits = []
        for start, end in ((0, split), (split, count)):
            rows = RowList()
            rows.add_causal(tokens[start:end].tolist(), start)
            rows.add_block([scratch_token] * 3, end, end)  # keys that the causal rows must not see
            packed = Rows.pack([rows], model.device)
            cache.plan(packed.slots, packed.num_slots)
            hidden = run_trunk(model, packed.tokens, packed.positions, packed.visibility, packed.num_slots, cache)
            logits.append(model.get_output_embeddings()(hidden)[0, : end - start].float())
        return torch.cat(logits)

    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    scale = reference.abs().max()
    first, second = chunked(1), chunked(2)
    return bool((first - reference).abs().max() <= tolerance * scale and torch.equal(first, second))
