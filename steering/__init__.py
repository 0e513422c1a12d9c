"""Steering by a reward: several particles for each prompt, weighted, and resampled between blocks (sequential Monte Carlo).

decoder = SteeredDecoder(SelfSpeculativeDecoder(block_size=8), reward, particles=8)
model.generate(**inputs, do_sample=True, max_new_tokens=256, custom_generate=decoder, tokenizer=tokenizer)
"""

from steering.classifier import ClassifierReward
from steering.decoder import SteeredDecoder
from steering.output import Judgement, SteeredOutput
from steering.rewards import RewardError

__all__ = ["ClassifierReward", "Judgement", "RewardError", "SteeredDecoder", "SteeredOutput"]
