"""The static path of a model: whether it has one, when its weights are packed, and rows run through it."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoding.forward.cache import SlotCache
from decoding.forward.gating import marked_block_rows, marked_offsets
from decoding.forward.noise_level import with_noise_level
from decoding.forward.rows import Rows
from decoding.forward.static.attention import TILE, Tile, make_tiles
from decoding.forward.static.compiled import CompiledTrunk
from decoding.forward.static.linear import Int8Linear, Linear, PackedLinear, can_pack, is_int8
from decoding.forward.static.trunk import Trunk, make_trunk, rotation, why_not

PACK_AFTER = 16  # forwards; packing takes as long as about ten of them, so a short text never waits for it
FREE_SHARE = 0.5  # of the memory that is free, which a second copy of the weights may take


class StaticPath:
    """Runs rows through the trunk of one model, as long as nobody changes the model.

    On a CPU the weights are packed after PACK_AFTER forwards (:mod:`decoding.forward.static.linear`), if there is memory for a
    second copy of them. Packed weights are those of the moment: ``refresh`` looks whether the model has
    changed since, and every run begins with it.
    """

    def __init__(self, model: PreTrainedModel):
        self._compiled: dict[bool | str, CompiledTrunk] = {}
        self._model = weakref.ref(model)
        self._plain: Trunk | None = None
        self._packed: Trunk | None = None
        self._packed_head: Linear | None = None
        self._int8_head: Linear | None = None
        self._forwards = 0
        self._seen: Any = None
        self.reason: str | None = "not looked at yet"

    @classmethod
    def of(cls, model: PreTrainedModel) -> "StaticPath":
        """The one that is kept as long as ``model`` lives; engines share it."""
        path = _kept.get(model)
        if path is None:
            path = _kept[model] = cls(model)
        return path

    @property
    def model(self) -> Any:
        model = self._model()
        assert model is not None
        return model

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    @torch.no_grad()
    def refresh(self) -> None:
        """Look at the model anew: whether it can be run so, and whether its weights are those that were packed."""
        self.reason = why_not(self.model)
        if self.reason is not None:
            self._plain = self._packed = self._packed_head = self._int8_head = None
            self._compiled = {}
            return
        plain = make_trunk(self.model)
        if self._plain is None or not self._plain.same_as(plain):
            self._plain, self._compiled = plain, {}
        head = self.model.get_output_embeddings()
        self._int8_head = Int8Linear([head]) if type(head) is nn.Linear and is_int8(head.weight) else None
        seen = self._fingerprint()
        if self._seen is None or not _same(self._seen, seen):
            self._packed, self._packed_head, self._forwards, self._seen = None, None, 0, seen
        elif self._packed is not None:  # an adapter may have come or gone
            terms = [layer.terms for layer in self._plain.layers]
            self._packed = self._packed.with_terms(terms)

    @torch.no_grad()
    def run(self, rows: Rows, cache: SlotCache, compile: bool | str = False) -> Tensor:
        """Hidden states [B, R, D], as those of :func:`decoding.forward.model.run_rows`.

        compile: False, or the mode of :class:`decoding.forward.static.compiled.CompiledTrunk`.
        """
        model = self.model
        is_block = rows.is_block if rows.has_blocks else None
        cache.plan(rows.slots, rows.num_slots)
        with marked_block_rows(is_block), marked_offsets(rows.offset):
            hidden = with_noise_level(model, rows.tokens, rows.level)
            if hidden is None:
                hidden = model.get_input_embeddings()(rows.tokens)
        cos, sin = rotation(model, hidden, rows.positions)
        if compile:
            output = self._compiled_trunk(compile).run(hidden, cos, sin, rows, cache)
            if output is not None:
                return output
        trunk = self._trunk(packs=not compile and hidden.shape[1] <= TILE)  # a long prompt gains nothing by it
        tiles = {kind: self._tiles(rows, kind, hidden.dtype) for kind in {layer.kind for layer in trunk.layers}}
        return trunk(hidden, cos, sin, tiles, cache.write, is_block)

    def head(self, hidden: Tensor) -> Tensor | None:
        """Logits [N, V] of hidden states [N, D] by packed weights, or those of eight bits; None where it has neither."""
        head = self._packed_head or self._int8_head
        return None if head is None else head(hidden)

    def _compiled_trunk(self, mode: bool | str) -> CompiledTrunk:
        assert self._plain is not None
        if mode not in self._compiled:
            windows = {layer.kind: self._window(layer.kind) for layer in self._plain.layers}
            self._compiled[mode] = CompiledTrunk(self._plain, windows, mode)
        return self._compiled[mode]

    def _trunk(self, packs: bool) -> Trunk:
        assert self._plain is not None
        self._forwards += packs
        if packs and self._packed is None and self._forwards > PACK_AFTER and self._may_pack():
            with torch.inference_mode(False), torch.no_grad():
                head = self.model.get_output_embeddings()
                self._packed = make_trunk(self.model, PackedLinear)
                self._packed_head = PackedLinear([head]) if type(head) is nn.Linear else None
        return self._packed or self._plain

    def _may_pack(self) -> bool:
        weights = self._weights()
        return all(map(can_pack, weights)) and sum(w.nbytes for w in weights) < FREE_SHARE * free_memory()

    def _weights(self) -> list[Tensor]:
        assert self._plain is not None
        layers = [(layer.qkv, layer.out, layer.gate, layer.up, layer.down) for layer in self._plain.layers]
        return [weight for layer in layers for linear in layer for weight in linear.weights]

    def _fingerprint(self) -> list[Any]:
        """What tells that weights were replaced or written to: where they lie, their versions, and their first rows.

        The rows are for writes that PyTorch does not count, through ``.data``.
        """
        weights = [*self._weights(), self.model.get_output_embeddings().weight]
        places = [(w.data_ptr(), w.dtype, w.device, 0 if w.is_inference() else w._version) for w in weights]
        rows = torch.cat([w[0] for w in weights]) if can_pack(weights[0]) else None
        return [places, rows]

    def _window(self, kind: str) -> int | None:
        return getattr(self.model.config, "sliding_window", None) if kind == "sliding_attention" else None

    def _tiles(self, rows: Rows, kind: str, dtype: torch.dtype) -> list[Tile]:
        config, window = self.model.config, self._window(kind)
        visibility = rows.visibility.within_window(window)
        sees_all = rows.sees_all and (window is None or rows.num_slots <= window)
        groups = config.num_attention_heads // config.num_key_value_heads
        return make_tiles(visibility, rows.num_slots, rows.tile_slots(TILE), dtype, groups, sees_all)


def free_memory() -> float:
    """Bytes that a process may still take; infinite where that is not known."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")


def _same(a: list[Any], b: list[Any]) -> bool:
    return a[0] == b[0] and (a[1] is None) == (b[1] is None) and (a[1] is None or torch.equal(a[1], b[1]))


_kept: "weakref.WeakKeyDictionary[PreTrainedModel, StaticPath]" = weakref.WeakKeyDictionary()
