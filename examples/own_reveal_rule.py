"""A reveal rule of one's own: the half of the masked tokens with the least entropy."""

from dataclasses import dataclass

import setflow
from decoding import RevealRule
from sbd import SetBlockDecoder


@dataclass(frozen=True)
class BelowMedian(RevealRule):
    """scores: entropies in nats and confidences, each [B, k]; masked: [B, k] bool; returns [B, k] bool, one True at least."""

    def __call__(self, scores, masked, first=None):
        entropy = scores.entropy.masked_fill(~masked, float("nan"))
        return masked & (entropy <= entropy.nanmedian(dim=-1, keepdim=True).values)


model, tokenizer = setflow.load_embedded()
inputs = tokenizer("478 + 395 = ?\n", return_tensors="pt")
decoder = SetBlockDecoder(block_size=8, rule=BelowMedian(), anchor=True)
output = model.generate(**inputs, max_new_tokens=80, custom_generate=decoder, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(f"{float(output.tokens_per_forward[0]):.2f} tokens per forward")
