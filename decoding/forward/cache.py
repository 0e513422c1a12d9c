"""A key/value cache with slots: keys and values are written where we say, and forgotten by moving a length."""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from decoding.forward.transfer import to_device

GROWTH = 256  # by default, slots are allocated in chunks of this many


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, S, D]. The owning cache says which slots the next update writes."""

    is_sliding = False
    is_compileable = False
    keys: Tensor
    values: Tensor

    def __init__(self, owner: "SlotCache"):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(_with_slots(key_states, 0))
        self.values = value_states.new_zeros(_with_slots(value_states, 0))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write [B, H, R, D] to the planned slots; return the slots that attention may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        visible = self.owner.num_slots
        if self.keys.shape[2] < visible:
            self.grow(-(-visible // self.owner.chunk) * self.owner.chunk)
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            # What was filled under inference_mode cannot be written outside of it; a copy can.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        slots = self.owner.slots
        if isinstance(slots, slice):
            self.keys[:, :, slots] = key_states
            self.values[:, :, slots] = value_states
        else:
            sequence = torch.arange(len(slots), device=slots.device)[:, None]
            self.keys.transpose(1, 2)[sequence, slots] = key_states.transpose(1, 2)
            self.values.transpose(1, 2)[sequence, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def grow(self, slots: int) -> None:
        """Take memory for ``slots`` slots; what is written stays."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(_with_slots(old, slots))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def select(self, sequences: Tensor) -> None:
        if self.is_initialized:
            self.keys = self.keys.index_select(0, to_device(sequences, self.keys.device))
            self.values = self.values.index_select(0, to_device(sequences, self.values.device))

    def copy(self, targets: Tensor, sources: Tensor, slots: slice) -> None:
        if self.is_initialized:
            targets, sources = to_device(targets, self.keys.device), to_device(sources, self.keys.device)
            self.keys[targets, :, slots] = self.keys[sources, :, slots]
            self.values[targets, :, slots] = self.values[sources, :, slots]

    def get_seq_length(self) -> int:
        return max(self.owner.lengths, default=0)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.num_slots, 0


class SlotCache(Cache):
    """Keys and values of a batch in which every sequence has its own length.

    Slots ``0 .. lengths[b] - 1`` of sequence b hold the keys and values of ``tokens[b]``, exactly as a causal prefill
    would have written them. Slots behind them are scratch: blocks and drafts are written there and overwritten by the
    next forward, so rolling back is nothing but not advancing a length.

    Pass one as ``past_key_values`` to ``model.generate(..., custom_generate=decoder)`` to keep it between calls, for
    instance between the turns of a chat; whatever part of the new prompt it already holds is not computed again.
    """

    def __init__(self, num_layers: int, batch_size: int = 1, chunk: int = GROWTH):
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.chunk = chunk  # slots that are allocated at a time
        self.slots: Tensor | slice = slice(0, 0)
        self.num_slots = 0

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def plan(self, slots: Tensor | slice, num_slots: int) -> None:
        """Say where the next forward writes (slots [B, R], or one slice for all) and how many slots it may look at."""
        self.slots, self.num_slots = slots, num_slots

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, R, D] of ``layer`` where the plan says; what attention may look at, [B, H, num_slots, D]."""
        own = self.layers[layer]
        assert isinstance(own, SlotLayer)
        return own.update(keys, values)

    @property
    def allocated(self) -> int:
        """How many slots there is memory for; 0 before the first forward."""
        first = self.layers[0]
        return first.keys.shape[2] if isinstance(first, SlotLayer) and first.is_initialized else 0

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots in every layer."""
        if self.allocated < slots:
            for layer in self.layers:
                assert isinstance(layer, SlotLayer)
                layer.grow(slots)

    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values [B, H, S, D] of every layer, all S slots for which there is memory."""
        layers = [layer for layer in self.layers if isinstance(layer, SlotLayer)]
        return [layer.keys for layer in layers], [layer.values for layer in layers]

    def rewind(self, sequence: int, tokens: list[int]) -> int:
        """Keep what the cache shares with ``tokens`` from the start; return how many tokens that is."""
        kept = self.tokens[sequence]
        pairs = zip(kept, tokens, strict=False)
        shared = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(kept), len(tokens)))
        self.tokens[sequence] = kept[:shared]
        return shared

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder, repeat or drop sequences: the new sequence b is the old ``beam_idx[b]``."""
        self.tokens = [list(self.tokens[i]) for i in beam_idx.tolist()]
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.select(beam_idx)

    def copy_sequences(self, copies: dict[int, int], shared: int = 0) -> None:
        """Let each sequence b become that of ``copies[b]``, in place; they have the first ``shared`` slots in common."""
        targets, sources = torch.tensor([*copies]), torch.tensor([*copies.values()])
        tokens = [list(self.tokens[i]) for i in copies.values()]
        for target, held in zip(copies, tokens, strict=True):
            self.tokens[target] = held
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.copy(targets, sources, slice(shared, self.num_slots))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


def _with_slots(states: Tensor, slots: int) -> tuple[int, int, int, int]:
    batch, heads, _, width = states.shape
    return batch, heads, slots, width
