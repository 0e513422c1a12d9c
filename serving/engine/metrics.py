"""Counters of ours beside vLLM's on ``GET /metrics``: forwards, drafts, and what follows from them.

A forward is counted for each request in it whose rows could emit tokens, so ``vllm:generation_tokens_total`` divided by
``setflow:forwards_total`` is what the decoders save; next-token decoding has 1.
"""

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from serving.engine.settings import KEY

LABELS = ("model_name", "engine")


class _Metrics:
    """The metrics of this process: made once, because Prometheus knows each name once."""

    made: "_Metrics | None" = None

    def __init__(self) -> None:
        self.forwards = Counter(
            "setflow:forwards", "Forwards that could emit tokens, counted for each request.", LABELS
        )
        self.drafts = Counter("setflow:draft_tokens", "Draft tokens verified, and masks that were open.", LABELS)
        self.accepted = Counter("setflow:accepted_tokens", "Tokens emitted beyond the first of each forward.", LABELS)
        self.per_forward = Gauge("setflow:tokens_per_forward", "Since the server started.", LABELS)
        self.acceptance = Gauge(
            "setflow:acceptance_rate", "Accepted by verified draft tokens, since the start.", LABELS
        )

    @classmethod
    def get(cls) -> "_Metrics":
        if cls.made is None or "setflow:forwards" not in REGISTRY._names_to_collectors:  # vLLM empties it at times
            cls.made = cls()
        return cls.made


class BlockMetrics(StatLoggerBase):
    """vLLM's plugin for statistics; says nothing for models that are not ours."""

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        settings = vllm_config.additional_config.get(KEY)
        self.is_on = isinstance(settings, dict) and "mask_token_id" in settings  # as the config hook leaves it
        self.labels = (str(vllm_config.model_config.served_model_name), str(engine_index))
        self.tokens = self.forwards = self.drafts = self.accepted = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if not self.is_on:
            return
        metrics = _Metrics.get()
        if iteration_stats is not None:
            self.tokens += iteration_stats.num_generation_tokens
        stats = None if scheduler_stats is None else scheduler_stats.spec_decoding_stats
        if stats is not None:
            self.forwards += stats.num_drafts
            self.drafts += stats.num_draft_tokens
            self.accepted += stats.num_accepted_tokens
            metrics.forwards.labels(*self.labels).inc(stats.num_drafts)
            metrics.drafts.labels(*self.labels).inc(stats.num_draft_tokens)
            metrics.accepted.labels(*self.labels).inc(stats.num_accepted_tokens)
        metrics.per_forward.labels(*self.labels).set(self.tokens / max(1, self.forwards))
        metrics.acceptance.labels(*self.labels).set(self.accepted / max(1, self.drafts))

    def log_engine_initialized(self) -> None:
        pass
