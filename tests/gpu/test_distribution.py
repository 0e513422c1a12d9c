"""Sampled self-speculation follows the next-token distribution on a GPU."""

import itertools

import torch

from sbd import SelfSpeculativeDecoder
from tests.conftest import chi_square_z

VOCABULARY, PROMPT, LENGTH, TEMPERATURE = 6, [1, 2, 3], 3, 0.8


def next_token_distribution(model) -> torch.Tensor:
    """[V, V, V]: the probability of every text of three tokens behind the prompt, by plain forwards."""
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)), device=model.device)
    ids = torch.cat([torch.tensor(PROMPT, device=model.device).expand(len(texts), -1), texts], dim=1)
    logits = model(input_ids=ids).logits[:, len(PROMPT) - 1 : -1].double()
    logits[..., VOCABULARY - 1] = -torch.inf  # the mask token
    distribution = (logits / TEMPERATURE).softmax(-1).gather(-1, texts[..., None]).squeeze(-1).prod(-1)
    return distribution.cpu().view([VOCABULARY] * LENGTH)


def test_sampled_text_has_the_next_token_distribution(gpu_model):
    model = gpu_model("llama", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    torch.manual_seed(0)
    samples = model.generate(
        torch.tensor([PROMPT], device="cuda"),
        max_new_tokens=LENGTH,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        num_return_sequences=4000,
        custom_generate=SelfSpeculativeDecoder(block_size=3),
    )[:, len(PROMPT) :].cpu()
    distribution = next_token_distribution(model)
    assert chi_square_z(samples, distribution) < 3.8
    assert chi_square_z(samples, distribution.transpose(0, 1)) > 6, "the test must tell one distribution from another"
