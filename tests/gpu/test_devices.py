"""A GPU decides what a CPU decides: same tokens, forwards and trace, sampled ones with the same seed."""

import pytest
import torch

from decoding import decoder_from_spec
from dfm import FlowDecoder
from rpt import ResampleConfig, attach_offset_code
from tests.conftest import MASK, build

SPECS = (
    "ntp",
    "sbd:block_size=5,entropy_bound=1.5",
    "sbd:block_size=5,confidence_threshold=0.5",
    "sbd:block_size=5,confidence_factor=3",
    "sbd:block_size=5,top_k=2,order=margin",
    "sbd:block_size=5,entropy_bound=2.5,anchor=true,commit=prefix",
    "sbd:block_size=5,top_k=2,revise=remask",
    "sbd:block_size=5,top_k=2,revise=resample",
    "sbd-lossless:block_size=4",
    "sbd-lossless:block_size=4,look_ahead=2,draft=both",
    "prompt-lookup:block_size=4",
    "rpt:iterations=1",
    "rpt:accept=argmax_threshold,threshold=0.5",
    "dfm:block_size=5",
    "dfm:block_size=5,sampler=remdm",
    "dfm:sampler=topk",
    "dfm:sampler=first_hitting",
)


@pytest.fixture(scope="module")
def pair():
    """``pair(family)``: a model on the CPU and one on the GPU, both with an offset code.

    In float64: what is float32 in it, norms and positions, is rounded as on the CPU up to one unit in the last place.
    """
    found = {}

    def make(family: str):
        if family not in found:
            model = build(family, torch.float64)
            code = attach_offset_code(model, ResampleConfig()).requires_grad_(False)
            code.table.copy_(torch.randn(code.table.shape, generator=torch.Generator().manual_seed(7)) / code.GAIN)
            other = build(family, torch.float64)
            attach_offset_code(other, ResampleConfig()).load_state_dict(code.state_dict())
            found[family] = model, other.requires_grad_(False).to("cuda")
        return found[family]

    return make


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True, "temperature": 1.2, "top_k": 0}], ids=str
)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["qwen2-window", "qwen3"])
def test_a_gpu_decides_what_a_cpu_decides(pair, prompts, family, spec, settings):
    inputs, found = prompts(4, 13, 8), []
    for model in pair(family):
        torch.manual_seed(5)
        output = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=15,
            eos_token_id=[20, 30, 40],
            custom_generate=decoder_from_spec(spec),
            return_dict_in_generate=True,
            **settings,
        )
        found.append((output.sequences.tolist(), output.forwards.tolist(), output.trace, output.revisions))
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gpu_fills_in_what_a_cpu_fills_in(pair, prompts, temperature):
    inputs, found = prompts(9, 12), []
    fixed = torch.arange(12).expand(2, -1) % 3 == 0
    for model in pair("qwen3"):
        ids, mask, kept = (t.to(model.device) for t in (inputs["input_ids"], inputs["attention_mask"], fixed))
        filled = FlowDecoder(sampler="topk").infill(
            model, ids, kept, attention_mask=mask, temperature=temperature, seed=3
        )
        found.append((filled.tokens.tolist(), filled.evaluations.tolist()))
    assert found[0] == found[1]
    tokens = torch.tensor(found[0][0])
    assert torch.equal(tokens[fixed], inputs["input_ids"][fixed]) and not (tokens == MASK).any()
