"""The weighted particles have the target's distribution, and the normaliser is estimated without bias: on models whose every
text is known. Negative controls leave the weights out."""

import math

import pytest
import torch

from benchmarks.steering.toys import (
    chosen,
    likes_zeros,
    likes_zeros_at_the_end,
    measured,
    normalised,
    total_variation,
    toy,
)
from decoding import NextTokenDecoder
from sbd import SelfSpeculativeDecoder, SetBlockDecoder
from steering import SteeredDecoder
from steering.population import Population, Target

LOSSLESS = {
    "ntp": NextTokenDecoder(),
    "sbd-lossless": SelfSpeculativeDecoder(block_size=3),
    "prompt-lookup": SelfSpeculativeDecoder(block_size=3, draft="prompt_lookup"),
}


def tilted(plain: dict) -> tuple[dict, float]:
    texts = list(plain)
    rewards = likes_zeros_at_the_end([list(text) for text in texts])
    return normalised({t: plain[t] * math.exp(r) for t, r in zip(texts, rewards, strict=True)})


def biased(output, normaliser: float) -> float:
    """How many standard errors the mean of exp(log_normaliser) is from the truth."""
    estimates = output.log_normaliser.exp()
    return abs(float(estimates.mean()) - normaliser) / (float(estimates.std()) / len(estimates) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distance_to_the_target_shrinks_with_particles(dtype):
    small = toy(dtype)
    target, normaliser = tilted(small.texts())
    distances = []
    for particles in (1, 4, 16):
        output = small.run(SteeredDecoder(reward=likes_zeros, particles=particles, every=1), 1600 // particles)
        distances.append(total_variation(measured(output, by_normaliser=False), target))
        assert biased(output, normaliser) < 4
    assert distances[0] > 0.2 and distances[0] > 1.5 * distances[1] > 1.5 * 1.5 * distances[2] and distances[2] < 0.12


@pytest.mark.parametrize("reward", [likes_zeros, likes_zeros_at_the_end])
@pytest.mark.parametrize("name", LOSSLESS)
def test_the_target_is_exact_around_lossless_decoders(name, reward):
    """With judgements every two tokens decoders that commit up to three at once have gone beyond them."""
    small = toy()
    target, normaliser = tilted(small.texts())
    output = small.run(SteeredDecoder(LOSSLESS[name], reward, particles=16, every=2, ess_threshold=0.9), 100)
    assert total_variation(measured(output), target) < 0.08
    assert total_variation(chosen(output), target) < 0.3  # 100 draws alone are about 0.14 off, and plain texts 0.46
    assert biased(output, normaliser) < 4
    resampled = [j.ancestors is not None for history in output.judgements for j in history]
    assert any(resampled) == (reward is likes_zeros)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_weights_are_carried_where_nobody_is_resampled(threshold):
    small = toy()
    target, normaliser = tilted(small.texts())
    output = small.run(SteeredDecoder(reward=likes_zeros, particles=16, every=1, ess_threshold=threshold), 100)
    assert total_variation(measured(output), target) < 0.08 and biased(output, normaliser) < 4
    resampled = [j.ancestors is not None for history in output.judgements for j in history]
    assert any(resampled) == (threshold > 0)


def test_the_ramp_changes_the_way_and_not_the_target():
    small = toy()
    target, normaliser = tilted(small.texts())
    output = small.run(SteeredDecoder(reward=likes_zeros, particles=16, every=1, ramp=3, ess_threshold=1.0), 100)
    assert total_variation(measured(output), target) < 0.08 and biased(output, normaliser) < 4


def test_without_weights_nothing_is_steered(monkeypatch):
    small = toy()
    target, normaliser = tilted(small.texts())
    nothing = lambda self, rewards, *_: torch.zeros(len(rewards), dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(Target, "potential", nothing)
    output = small.run(SteeredDecoder(reward=likes_zeros, particles=16, every=1), 100)
    assert total_variation(measured(output), target) > 0.2 and total_variation(measured(output), small.texts()) < 0.08
    assert (output.log_normaliser == 0).all() and abs(math.log(normaliser)) > 0.1


def test_weights_that_are_dropped_where_nobody_is_resampled_are_found_out(monkeypatch):
    """The reference of the next weights advances, and what they were is forgotten: steering is lost."""
    small = toy()
    target, _ = tilted(small.texts())
    weigh = Population.weigh

    def dropping(self, rewards):
        ancestors = weigh(self, rewards)
        self.log_weights = torch.zeros_like(self.log_weights)
        return ancestors

    monkeypatch.setattr(Population, "weigh", dropping)
    output = small.run(SteeredDecoder(reward=likes_zeros, particles=16, every=1, ess_threshold=0.2), 100)
    assert total_variation(measured(output), target) > 0.1


@pytest.mark.parametrize(
    ("name", "alpha", "temperature"),
    [("ntp", 2.0, 1.0), ("ntp", 1.0, 0.7), ("ntp", 2.0, 0.5), ("sbd-lossless", 2.0, 0.5), ("prompt-lookup", 2.0, 0.5)],
)
def test_power_sampling_has_the_power_of_the_model(name, alpha, temperature):
    """p^alpha of whole texts, which no temperature gives, whatever temperature proposes."""
    small = toy(temperature=temperature)
    plain = small.texts(temperature=1.0, with_mask=True)
    target, normaliser = normalised({text: p**alpha for text, p in plain.items()})
    output = small.run(SteeredDecoder(LOSSLESS[name], alpha=alpha, particles=16, every=1, ramp=2), 100)
    assert total_variation(measured(output), target) < 0.08 and biased(output, normaliser) < 4
    if alpha == 2 and temperature == 0.5:
        assert total_variation(small.texts(), target) > 0.03 and output.logprobs is None


def test_around_a_lossy_decoder_it_is_that_decoders_distribution():
    """What blocks give by themselves, estimated from many runs, tilted; the output says so."""
    small, blocks = toy(), SetBlockDecoder(block_size=2)
    plain = small.run(SteeredDecoder(blocks, likes_zeros, particles=1), 2000, seed=1)
    own = {text: weight for text, weight in chosen(plain).items()}
    target, normaliser = tilted(own)
    output = small.run(SteeredDecoder(blocks, likes_zeros, particles=16), 60)
    assert total_variation(measured(output), target) < 0.08
    assert total_variation(own, target) > 0.2 and total_variation(own, small.texts()) > 0.1
    assert "SetBlockDecoder's own texts" in output.target
    assert abs(float(output.log_normaliser.exp().mean()) / normaliser - 1) < 0.1
