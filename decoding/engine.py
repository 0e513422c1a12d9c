"""The engine: a model ready to decode, what is known of it from one run to the next, and the steps that it takes."""

import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoding.batch import Sequence
from decoding.forward.cache import GROWTH, SlotCache
from decoding.forward.costs import CONTEXT, RowCosts, measure_row_costs
from decoding.forward.model import (
    autocast_of,
    check_attention,
    check_runnable,
    forward_identity,
    is_tested,
    probe,
    run_rows,
)
from decoding.forward.rows import RowList, Rows
from decoding.forward.static.path import StaticPath
from decoding.forward.transfer import to_device
from decoding.inputs.checks import check_choice, check_count


@dataclass(frozen=True)
class Step:
    """One forward pass, as ``absorb`` sees it. Shapes: B sequences, R rows, D width, V vocabulary.

    sequences: those that ``plan`` gave rows for, in its order; the list does not change while tokens are committed.
    rows: what ``plan`` returned. hidden_states: [B, R, D], padded. head: from hidden states [N, D] of this or an earlier
    step to float32 logits [N, V]; nothing of that size is kept.

    ``spans`` are pairs of a sequence's index in the step and rows of it, such as the ranges that ``add_*`` returned:

        step.logits((i, sequence.state.rows) for i, sequence in enumerate(step.sequences))
    """

    sequences: list[Sequence]
    rows: list[RowList]
    hidden_states: Tensor
    head: Callable[[Tensor], Tensor]

    def logits(self, spans: Iterable[tuple[int, SequenceOf[int]]]) -> Tensor:
        """Float32 logits [N, V] of all rows of ``spans``, one span after the other."""
        return self.head(self.hidden(spans))

    def hidden(self, spans: Iterable[tuple[int, SequenceOf[int]]]) -> Tensor:
        """Hidden states [N, D] of the same rows, small enough to be kept until a later step."""
        asked = list(spans)
        index, span = asked[0] if len(asked) == 1 else (0, None)
        if isinstance(span, range) and span.step == 1:
            return self.hidden_states[index, span.start : span.stop]  # a view: neither indices nor a copy
        places = [[index for index, rows in asked for _ in rows], [row for _, rows in asked for row in rows]]
        return self.hidden_states[to_device(places, self.hidden_states.device, torch.long).unbind()]


class Engine:
    """Runs rows through ``model``; remembers that it can be decoded, what its rows cost and what planners have learned.

    ``model.generate`` keeps one for each model; servers, tests and benchmarks make their own and pass it as ``engine=``,
    or install it. It holds nothing of a single run, whose keys and values are in a cache of its own: threads may share it.

    cache_chunk: slots that a cache allocates at a time.
    row_costs: a recorded cost curve, taken as it is instead of one that is measured here: planning then does not depend on
        the load of the machine, so that runs repeat.
    compile: True or "cudagraphs" makes graphs of the static path in the background (torch.compile, kept on disk between runs;
        CUDA graphs): text goes on without until a shape has been met often enough and its graph is there. "auto" and False
        do without: packed weights were faster than what torch.compile made, on the CPUs that were measured.
    static: whether Llama-type models run through :mod:`decoding.forward.static` instead of their own modules: faster on a
        CPU, for a packed copy of the weights in memory. A graph of ``compile`` is always of this path.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        cache_chunk: int = GROWTH,
        row_costs: RowCosts | None = None,
        compile: bool | Literal["auto", "cudagraphs"] = "auto",
        static: bool = False,
    ):
        check_count("cache_chunk", cache_chunk)
        check_choice("compile", compile, ("auto", True, False, "cudagraphs"))
        check_choice("static", static, (True, False))
        self._model: Callable[[], PreTrainedModel | None] = lambda: model
        self.cache_chunk = cache_chunk
        self.recorded_costs = row_costs
        self.planner_memory: dict[Any, Any] = {}  # what planners remember from text to text, by keys of their own
        self._costs: dict[tuple, RowCosts] = {}
        self._probed: tuple | None = None  # the forward that passed
        self.compile = compile
        self.static = static
        self._path: StaticPath | None = None
        self._looked = False  # at the model, since the last forward
        # What takes long to find and does not change during a run.
        self._device: torch.device | None = None
        self._trunk: nn.Module | None = None
        self._head: nn.Module | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> "Engine":
        """The engine that is kept as long as ``model`` lives."""
        engine = _kept.get(model)
        if engine is None:
            engine = _kept[model] = cls(model)
            engine._model = weakref.ref(model)  # else the model would be kept by what is kept for it
        return engine

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "the model of this engine is gone"
        return model

    @property
    def device(self) -> torch.device:
        """Where rows go in: where the embedding runs, also while its weights are offloaded."""
        embedding = self.model.get_input_embeddings()
        for module in (embedding, self.model):
            device = getattr(vars(module).get("_hf_hook"), "execution_device", None)  # of accelerate
            if device is not None:
                return torch.device(device)
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def runs_static(self) -> bool:
        """Whether the last run went through the static path."""
        return self._path is not None and self._path.reason is None

    @property
    def keeps_whole_batch(self) -> bool:
        """Whether finished sequences stay in the batch, because something is attached that holds a value for each row of it."""
        if not hasattr(self.model, "peft_config"):
            return False
        hooks = (hook for module in self.model.modules() for hook in module._forward_pre_hooks.values())
        return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)

    def check(self) -> None:
        """Raise ValueError for a model that would be decoded wrongly; what no test covers is tried out once."""
        check_attention(self.model)
        check_runnable(self.model)
        if not is_tested(self.model) and self._probed != (forward := forward_identity(self.model)):
            probe(self.model, self.device)
            self._probed = forward
        self._look()

    def new_cache(self, batch_size: int) -> SlotCache:
        """An empty cache for ``batch_size`` sequences."""
        if not self._looked:
            self._look()
        return SlotCache(self.model.config.num_hidden_layers, batch_size, self.cache_chunk)

    def step(
        self,
        rows: list[RowList],
        cache: SlotCache,
        sequences: SequenceOf[Sequence] = (),
        in_cache: SequenceOf[Sequence] = (),
    ) -> Step:
        """One forward pass over a RowList for each of ``sequences``; those that ``in_cache`` holds besides run no rows.

        ``sequences`` are those of ``in_cache`` that are running.
        """
        device = self._device or self.device
        if len(in_cache) == len(sequences):
            return Step(list(sequences), rows, self.forward(Rows.pack(rows, device), cache), self.head)
        places = [place for place, sequence in enumerate(in_cache) if sequence.is_running]
        every = [RowList() for _ in in_cache]
        for place, own in zip(places, rows, strict=True):
            every[place] = own
        return Step(list(sequences), rows, self.forward(Rows.pack(every, device), cache)[places], self.head)

    def forward(self, rows: Rows, cache: SlotCache) -> Tensor:
        """Hidden states [B, R, D] of one forward pass; keys and values are written to the rows' slots of ``cache``."""
        self._looked = False
        path = self._path
        if path is None or path.reason is not None:
            return run_rows(self.model, rows, cache, self._trunk)
        return path.run(rows, cache, self.compile if self.compile != "auto" else False)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits [N, V] of hidden states [N, D]."""
        logits = None if self._path is None else self._path.head(hidden)
        if logits is None:
            with autocast_of(self.model):
                logits = (self._head or self.model.get_output_embeddings())(hidden)
        return logits.float()

    def _look(self) -> None:
        """Find out how the model can be run, which may have changed since the last run."""
        self._looked = True
        self._device = device = self.device
        self._trunk, self._head = self.model.get_decoder(), self.model.get_output_embeddings()
        if self.compile == "cudagraphs" and device.type != "cuda":
            raise ValueError(f"compile='cudagraphs' needs a model on CUDA, and this one is on {device.type!r}")
        compiles = self.compile in (True, "cudagraphs")
        if self.static or compiles:
            self._path = StaticPath.of(self.model)
            self._path.refresh()
            if compiles and self._path.reason is not None:
                warnings.warn(f"compile: not compiled, since {self._path.reason}", stacklevel=4)

    def row_costs(self, batch_size: int, most_rows: int) -> RowCosts:
        """Seconds of a step by its rows per sequence, up to ``most_rows``: as recorded, else measured once on this device."""
        if self.recorded_costs is not None:
            return self.recorded_costs
        key = (self.model.dtype, str(self.device), batch_size, torch.get_num_threads())
        if key not in self._costs or self._costs[key].rows[-1] < most_rows:
            cache = self.new_cache(batch_size)
            self._step_seconds(cache, batch_size, 0, CONTEXT)
            self._costs[key] = measure_row_costs(
                lambda rows: self._step_seconds(cache, batch_size, CONTEXT, rows), most_rows
            )
        return self._costs[key]

    def _step_seconds(self, cache: SlotCache, batch_size: int, start: int, count: int) -> float:
        """Of a forward of ``count`` causal rows per sequence, the head on one of them and the choice of a token."""
        started = time.perf_counter()
        lists = [RowList() for _ in range(batch_size)]
        for rows in lists:
            rows.add_causal([0] * count, start)
        step = self.step(lists, cache)
        self.head(step.hidden_states[:, -1]).argmax(-1).tolist()
        return time.perf_counter() - started


_kept: "weakref.WeakKeyDictionary[PreTrainedModel, Engine]" = weakref.WeakKeyDictionary()
