"""Steered runs over worked additions, in batches, with what they cost."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from eval.bench.contenders import pad_left
from eval.bench.prompts import PromptSet
from eval.repeatable import repeatable_engine
from steering import SteeredDecoder

ROWS = 96  # sequences in a batch


@dataclass
class Runs:
    """The outcome for every prompt: whether the chosen text is right, and which particles are; answers of each particle."""

    right: list[bool] = field(default_factory=list)
    particles: list[list[bool]] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    sequence_forwards: int = 0
    forwards: int = 0
    resampled: int = 0
    ess: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        count = len(self.right)
        return {
            "exact_match": sum(self.right) / count,
            "sequence_forwards": self.sequence_forwards / count,
            "forwards": self.forwards / count,
            "resampled": self.resampled / count,
            "last_ess": sum(self.ess) / count,
            "seconds": self.seconds / count,
        }

    def best_of(self, particles: int) -> float:
        """Share of prompts of which any of the first ``particles`` independent texts is right."""
        return sum(any(row[:particles]) for row in self.particles) / len(self.particles)

    def plain(self, particles: int) -> float:
        """Share of the first ``particles`` texts that are right."""
        return sum(sum(row[:particles]) for row in self.particles) / (particles * len(self.particles))

    def majority(self, particles: int) -> float:
        """Share of prompts whose commonest last line among the first ``particles`` is right; the first of equals counts."""
        right = 0
        for answers, rights in zip(self.answers, self.particles, strict=True):
            (answer, _), *_ = Counter(answers[:particles]).most_common(1)
            right += rights[answers.index(answer)]
        return right / len(self.answers)


def run(model, tokenizer, prompts: PromptSet, decoder: SteeredDecoder, temperature: float, seed: int) -> Runs:
    """One steered text for each prompt."""
    engine, runs = repeatable_engine(model), Runs()
    torch.manual_seed(seed)
    size = max(1, ROWS // decoder.particles)
    starts = range(0, len(prompts.ids), size)
    for start in tqdm(starts, desc=f"{type(decoder.decoder).__name__}, {decoder.particles} particles", leave=False):
        ids, mask = pad_left(prompts.ids[start : start + size], model.generation_config.pad_token_id)
        started = time.perf_counter()
        output: Any = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=prompts.max_new_tokens,
            custom_generate=decoder,
            engine=engine,
            tokenizer=tokenizer,
            return_dict_in_generate=True,
        )
        runs.seconds += time.perf_counter() - started
        for b, rows in enumerate(output.particles[:, :, ids.shape[1] :].tolist()):
            counts = output.particle_tokens[b].tolist()
            new = [row[:count] for row, count in zip(rows, counts, strict=True)]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            rights = [bool(prompts.correct(start + b, text)) for text in texts]
            runs.right.append(rights[int(output.chosen[b])])
            runs.particles.append(rights)
            runs.answers.append([text.strip().rpartition("\n")[2] for text in texts])
            judgements = output.judgements[b]
            runs.resampled += sum(judgement.ancestors is not None for judgement in judgements)
            runs.ess.append(judgements[-1].ess)
        runs.sequence_forwards += int(output.particle_forwards.sum())
        runs.forwards += int(output.forwards.sum())
    return runs
