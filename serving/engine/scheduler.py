"""The scheduler: vLLM's own, told how wide each request's canvas is and how much of it counts as computed.

Between forwards a request has its text, of which the newest tokens may have no keys and values yet. vLLM schedules all of
these together with ``spec_token_ids``, of which only the number matters here: the tokens themselves stay on the device.
"""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from serving.canvas import Canvas, Progress
from serving.engine.settings import settings_of

PLACEHOLDER = -1


class BlockScheduler(Scheduler):
    """One forward at a time: how a request goes on depends on how many tokens it has just emitted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_sampled_tokens_per_step = 0  # a forward may emit none, and no slot is kept free for one
        self._settings = settings_of(self.vllm_config)
        self._progress: dict[str, Progress] = {}
        self._planned: dict[str, Canvas] = {}
        self._decoded = SpecDecodingStats.new(self._settings.canvas_length)

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        assert request.sampling_params is not None
        options = self._settings.options(request.sampling_params.extra_args)
        self._progress.setdefault(request.request_id, Progress(options))

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """A canvas runs whole or not at all: where the budget of tokens ends, only text runs."""
        budget = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        self._planned.clear()
        for request in self.running:
            text = request.num_tokens - request.num_computed_tokens
            if not request.is_prefill_chunk:
                room = request.max_tokens - request.num_output_tokens
                canvas = self._progress[request.request_id].plan(room, self.max_model_len - request.num_tokens)
                canvas = canvas if text + canvas.size <= budget else Canvas()
                request.spec_token_ids = [PLACEHOLDER] * canvas.size
                self._planned[request.request_id] = canvas
                text += canvas.size
            budget -= min(text, budget)
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        sampled = model_runner_output.sampled_token_ids
        for request_id in scheduler_output.num_scheduled_tokens:
            request, canvas = self.requests.get(request_id), self._planned.get(request_id)
            if request is None or request.is_finished():
                continue
            progress = self._progress[request_id]
            emitted = len(sampled[model_runner_output.req_id_to_index[request_id]])
            if canvas is None:  # a prompt, of which the end may give a token
                if emitted:
                    self._count(Canvas(), emitted, progress)
                continue
            if canvas.size:
                # vLLM will take off what was not emitted, as if all that was emitted had its keys and values. The last
                # token has none, and of a block none has.
                request.num_computed_tokens -= emitted if progress.options.kind == "sbd" else 1
            progress.advance(canvas, emitted)
            self._count(canvas, emitted, progress)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(self, stats: Any, *args: Any, **kwargs: Any) -> Any:
        """Counted by this class: vLLM would count masks as rejected drafts."""
        return stats

    def make_stats(self, spec_decoding_stats: Any = None, *args: Any, **kwargs: Any) -> Any:
        done, self._decoded = self._decoded, SpecDecodingStats.new(self._settings.canvas_length)
        return super().make_stats(done if done.num_drafts else None, *args, **kwargs)

    def _count(self, canvas: Canvas, emitted: int, progress: Progress) -> None:
        """Into vLLM's numbers: a draft is a forward of a request that could emit tokens, a draft token is one that was verified
        or a mask that was open, and accepted are all emitted tokens but the one of each forward that needs no draft."""
        drafted = canvas.masks if progress.options.kind == "sbd" else canvas.drafts
        self._decoded.observe_draft(drafted, max(0, emitted - 1))

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._progress[request.request_id].restart()
        self._planned.pop(request.request_id, None)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._progress.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)
