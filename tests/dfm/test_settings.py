"""FlowDecoder's names, schedules and samplers of one's own, and what is refused."""

from dataclasses import dataclass

import pytest
import torch

from decoding import decoder_from_spec
from decoding.rules import EntropyBound, TopK
from dfm import FlowDecoder, Query, Sampler
from dfm.draws import LikeliestDraws
from dfm.flow_config import FlowTraits
from dfm.paths.fit import FittedSchedule
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PiecewiseLinearScheduler, named_scheduler
from dfm.samplers.kernels import ExactX1, FrozenPass
from dfm.sampling.grid import time_grid
from tests.conftest import MASK
from tests.dfm.networks import uniform_model
from tests.dfm.runs import generate

DOUBLE = torch.float64


def test_a_scheduler_of_ones_own(shared_model, prompts):
    """A fitted schedule's quotas are what is revealed in each forward."""
    scheduler = PiecewiseLinearScheduler((0.0, 0.1, 0.5, 1.0))
    decoder = FlowDecoder(scheduler=scheduler, sampler="topk", steps=3, block_size=10)
    output = generate(shared_model("llama"), prompts(5), decoder, 10, False)
    assert [output.trace[0].count(i) for i in (1, 2, 3)] == [1, 4, 5]


def test_a_fitted_schedule_from_a_file(shared_model, prompts, tmp_path):
    """As many steps as it has rounds, and its quotas are scaled to the block."""
    file = tmp_path / "schedule.json"
    FittedSchedule((0, 1, 4, 10)).save(file)
    decoder = decoder_from_spec(f"dfm:scheduler={file},sampler=topk,block_size=20")
    assert decoder == FlowDecoder(scheduler=FittedSchedule((0, 1, 4, 10)), sampler="topk", block_size=20)
    output = generate(shared_model("llama"), prompts(5), decoder, 20, False)
    assert [output.trace[0].count(i) for i in (1, 2, 3)] == [2, 6, 12]
    with pytest.raises(ValueError, match="nowhere.json' does not exist"):
        decoder_from_spec("dfm:scheduler=nowhere.json")


def test_a_sampler_of_ones_own(shared_model, prompts):
    def late(path: MixturePath, grid):
        return ExactX1(path, (0.0, 0.9, 1.0))

    output = generate(shared_model("llama"), prompts(5), FlowDecoder(sampler=late, block_size=8), 8, True)
    assert output.forwards.item() == 2


@dataclass(frozen=True)
class LeftToRight(Sampler):
    """Two tokens an evaluation, from the left."""

    path: MixturePath

    sources = ("mask",)
    on_grid = False
    keeps = True

    def step(self, state, draws):
        left = state.masked & state.free
        first = left & (left.cumsum(-1) <= 2)
        p1 = yield Query(state.x, state.t, state.masked, only=first)
        state.write(draws.rows(p1, first), first)
        state.done = state.done | ~(state.masked & state.free).any(-1)


def test_a_sampler_class_of_ones_own(shared_model, prompts):
    """From Python and as module:Class in a spec, without an edit anywhere; its traits count as those of the named ones."""
    named = decoder_from_spec(f"dfm:block_size=8,sampler={__name__}:LeftToRight")
    assert named == FlowDecoder(sampler=f"{__name__}:LeftToRight", block_size=8) and hash(named)
    for decoder in (named, FlowDecoder(sampler=LeftToRight, block_size=8)):
        output = generate(shared_model("llama"), prompts(5), decoder, 8, True)
        assert output.trace[0] == [1, 1, 2, 2, 3, 3, 4, 4] and output.forwards.tolist() == [4]
    with pytest.raises(ValueError, match="steps must be None for sampler '.*:LeftToRight', which counts its own"):
        decoder_from_spec(f"dfm:steps=4,sampler={__name__}:LeftToRight")


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("no_such_module:Sampler", "sampler 'no_such_module:Sampler' cannot be imported: No module named"),
        (
            "dfm.samplers.kernels:Exact",
            "sampler 'dfm.samplers.kernels:Exact' cannot be imported: .* no attribute 'Exact'",
        ),
        ("dfm.samplers.kernels:", "sampler must be written module:Name, got 'dfm.samplers.kernels:'"),
        ("dfm.sampling.grid:time_grid", "sampler must be a subclass of dfm.Sampler, got 'dfm.sampling.grid:time_grid'"),
        ("dfm.samplers.ranked:LooGibbs", "sampler must be one for path 'mask'; LooGibbs is for 'uniform'"),
        (FrozenPass, "sampler must be one for path 'mask'; FrozenPass is for no path by itself"),
        (int, "sampler must be a subclass of dfm.Sampler, got <class 'int'>"),
    ],
)
def test_a_sampler_class_that_does_not_fit(sampler, message):
    with pytest.raises(ValueError, match=message):
        FlowDecoder(sampler=sampler)


@pytest.mark.parametrize(
    ("spec", "decoder"),
    [
        ("dfm", FlowDecoder()),
        ("dfm:block_size=16,steps=8,sampler=euler", FlowDecoder(sampler="euler", steps=8, block_size=16)),
        (
            "dfm:block_size=8,sampler=rule,entropy_bound=0.1",
            FlowDecoder(block_size=8, sampler="rule", rule=EntropyBound(0.1)),
        ),
        ("dfm:path=uniform,scheduler=kinetic", FlowDecoder(path="uniform", scheduler="kinetic")),
    ],
)
def test_specs(spec, decoder):
    assert decoder_from_spec(spec) == decoder and hash(decoder) == hash(decoder_from_spec(spec))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "metric"}, "path must be one of 'mask', 'uniform', got 'metric'"),
        ({"scheduler": "lineal"}, "scheduler must be one of 'linear',.*got 'lineal'"),
        ({"sampler": "eular"}, r"sampler \(for path 'mask'\) must be one of 'exact', 'euler',.*got 'eular'"),
        ({"sampler": "gibbs"}, r"sampler \(for path 'mask'\).*got 'gibbs'"),
        ({"sampler": 3}, "sampler must be a name or a function"),
        ({"sampler": "rule"}, "rule must be a rule such as EntropyBound.*got None"),
        ({"rule": TopK(1)}, "rule must be .* None for others"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"block_size": 0}, "block_size must be a whole number"),
        ({"sampler": "first_hitting", "steps": 4}, "steps must be None for sampler 'first_hitting'"),
        ({"sampler": "rule", "rule": TopK(1), "steps": 4}, "steps must be None for sampler 'rule'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowDecoder(**settings)


def test_what_a_model_was_not_trained_for(shared_model, fresh_model, prompts):
    model, inputs = shared_model("llama"), prompts(5)
    with pytest.raises(ValueError, match="path must be 'mask' for this model.*got 'uniform'"):
        model.generate(**inputs, custom_generate=FlowDecoder(path="uniform"), max_new_tokens=4)
    with pytest.raises(ValueError, match="path must be 'uniform' for this model"):
        uniform_model().generate(**inputs, custom_generate=FlowDecoder(), max_new_tokens=4)
    with pytest.warns(UserWarning, match="block_size=4: this model was trained on whole texts"):
        decoder = FlowDecoder(path="uniform", steps=1, block_size=4)
        uniform_model(block_sizes=None).generate(**inputs, custom_generate=decoder, max_new_tokens=4)
    trained = fresh_model("llama")
    trained.generation_config.trained_block_sizes = [4, 5]
    with pytest.warns(UserWarning, match="block_size=None: this model was trained with blocks"):
        trained.generate(**inputs, custom_generate=FlowDecoder(steps=1), max_new_tokens=4)
    with pytest.warns(UserWarning, match="block_size=8: this model was trained with block sizes 4 to 5"):
        trained.generate(**inputs, custom_generate=FlowDecoder(steps=1, block_size=8), max_new_tokens=4)


def test_likeliest_draws_take_the_likeliest_and_still_pick_places():
    draws = LikeliestDraws([torch.Generator().manual_seed(0)])
    distribution = torch.tensor([[[0.4, 0.6], [0.9, 0.1]]])
    assert draws.categorical(distribution, torch.tensor([[True, True]])).tolist() == [[1, 0]]
    picks = {draws.pick(torch.ones(1, 4, dtype=torch.bool)).float().argmax().item() for _ in range(40)}
    assert picks == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["linear", "quadratic", "cubic", "cosine", "kinetic"])
def test_named_schedulers_rise_from_zero_to_one(name):
    for traits in (FlowTraits(), FlowTraits("uniform", excluded=(0,))):
        kappa = named_scheduler(name, traits.make_source(6, 5)).kappa(torch.linspace(0, 1, 9, dtype=DOUBLE))
        assert (kappa.diff() > 0).all() and abs(kappa[0]) < 1e-12 and abs(kappa[-1] - 1) < 1e-12


def test_time_grid_of_the_decoder_is_even(shared_model):
    run = FlowDecoder(steps=4, block_size=8).run(shared_model("llama").config, MASK)
    assert run.make_sampler(8).grid == time_grid(4)
