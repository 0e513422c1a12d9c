"""The static path gives what the model's own modules give, under every decoder, and steps aside where it cannot."""

import weakref

import pytest
import torch

from decoding import Engine, NextTokenDecoder
from decoding.forward.adapter import remove_adapter
from decoding.forward.rows import RowList, Rows
from decoding.forward.static import path as static_path
from decoding.forward.static.attention import TILE, grouped_attention, make_tiles
from decoding.forward.static.linear import Linear, PackedLinear, can_pack
from decoding.forward.static.path import StaticPath
from decoding.forward.visibility import Visibility
from dfm import FlowDecoder
from sbd import EntropyBound, SelfSpeculativeDecoder, SetBlockDecoder
from tests.decoding.forward.test_adapter import adapted

FAMILIES = ["llama", "llama-tied", "llama-ungrouped", "llama-3.1", "qwen2", "qwen2-window", "qwen3", "mistral"]
DECODERS = {
    "ntp": NextTokenDecoder(),
    "sbd": SetBlockDecoder(4, EntropyBound(2.0)),
    "anchored": SetBlockDecoder(4, EntropyBound(2.0), anchor=True, commit="prefix"),
    "lossless": SelfSpeculativeDecoder(block_size=4),
    "lookup": SelfSpeculativeDecoder(block_size=4, draft="prompt_lookup"),
    "flow": FlowDecoder(block_size=4, steps=3),
}
can_be_packed = pytest.mark.skipif(
    not can_pack(torch.zeros(1, dtype=torch.float32)), reason="this build of PyTorch cannot pack weights"
)


@pytest.fixture(params=["plain", pytest.param("packed", marks=can_be_packed)])
def linear(request, monkeypatch):
    """Which linear layers run: PyTorch's own, or packed from the first forward on."""
    monkeypatch.setattr(static_path, "PACK_AFTER", 0 if request.param == "packed" else 10**9)
    monkeypatch.setattr(static_path, "_kept", weakref.WeakKeyDictionary())  # what other tests have packed
    return request.param


def texts(model, decoder, arguments, **settings):
    torch.manual_seed(0)
    engine = Engine(model, cache_chunk=8, **settings)  # so that the cache grows several times
    output = model.generate(
        **arguments,
        max_new_tokens=14,
        do_sample=False,
        custom_generate=decoder,
        engine=engine,
        return_dict_in_generate=True,
    )
    return output.sequences.tolist(), output.forwards.tolist(), engine


def random_rows(seed: int = 0) -> list[RowList]:
    """Ragged: text and two blocks behind it, and text alone."""
    first, second = RowList(), RowList()
    first.add_causal([5, 6, 7], 9)
    first.add_block([9, 9, 9, 9], 12, 12)
    first.add_block([8, 8], 11, 16)
    second.add_causal([3, 4], 5)
    return [first, second]


def both(model, dtype=torch.float32):
    """Hidden states by the model's modules and by the static path, of ragged rows behind a prefill."""
    found = []
    for static in (False, True):
        engine = Engine(model, static=static)
        cache = engine.new_cache(2)
        prefill = [RowList(), RowList()]
        prefill[0].add_causal([5, 6, 7, 8, 9, 10, 11, 12, 13], 0)
        prefill[1].add_causal([7, 8, 9, 10, 11], 0)
        first = engine.step(prefill, cache).hidden_states
        second = engine.step(random_rows(), cache).hidden_states
        real = [first[0, :9], first[1, :5], second[0, :9], second[1, :2]]
        found.append((torch.cat(real), [(layer.keys[:, :, :5], layer.values[:, :, :5]) for layer in cache.layers]))
        assert engine.runs_static == static
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_keys_are_those_of_the_modules(shared_model, family, linear):
    (stock, stock_keys), (static, static_keys) = both(shared_model(family))
    torch.testing.assert_close(static, stock, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(static_keys, stock_keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bf16_rounds_as_much_as_the_modules_do(shared_model, family, linear):
    """Both are as far from float32: neither order of rounding is the right one."""
    exact = both(shared_model(family).float())[0][0]
    model = shared_model(family, torch.bfloat16)
    (stock, _), (static, _) = both(model)
    own, ours = (stock.float() - exact).abs().mean(), (static.float() - exact).abs().mean()
    assert ours < 1.3 * own


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 6)], ids=["one", "ragged"])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_every_decoder_writes_the_same_text(shared_model, prompts, decoder, lengths, linear):
    model, arguments = shared_model("llama"), prompts(*lengths)
    *stock, _ = texts(model, decoder, arguments, static=False)
    *static, engine = texts(model, decoder, arguments, static=True)
    assert static == stock and engine.runs_static
    assert StaticPath.of(model).is_packed == (linear == "packed")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gated_adapter_acts_on_block_rows_alone(fresh_model, prompts, family, linear):
    model, arguments = fresh_model(family), prompts(9, 4)
    plain, *_ = texts(model, DECODERS["lossless"], arguments, static=True)
    adapted(model)
    (stock, _), (static, _) = both(model)
    torch.testing.assert_close(static, stock, rtol=1e-4, atol=1e-4)
    *stock, _ = texts(model, DECODERS["sbd"], arguments, static=False)
    *static, engine = texts(model, DECODERS["sbd"], arguments, static=True)
    assert static == stock and engine.runs_static
    assert texts(model, DECODERS["lossless"], arguments, static=True)[0] == plain
    remove_adapter(model)
    assert texts(model, DECODERS["lossless"], arguments, static=True)[0] == plain


@pytest.mark.parametrize("write", ["in place", "through data", "another parameter"])
def test_weights_that_change_are_seen(fresh_model, prompts, write, linear):
    """The control of what is packed: a model that is trained between two texts."""
    model, arguments = fresh_model("llama"), prompts(9)
    before, *_ = texts(model, DECODERS["ntp"], arguments, static=True)
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        if write == "in place":
            layer.weight.add_(1)
        elif write == "through data":
            layer.weight.data.add_(1)
        else:
            layer.weight = torch.nn.Parameter(layer.weight + 1)
    after, *_ = texts(model, DECODERS["ntp"], arguments, static=True)
    assert after == texts(model, DECODERS["ntp"], arguments, static=False)[0] != before


def test_weights_are_packed_after_some_forwards_and_shared(fresh_model, prompts, monkeypatch):
    model = fresh_model("llama")
    if not can_pack(model.lm_head.weight):
        pytest.skip("this build of PyTorch cannot pack weights")
    path, ours = StaticPath.of(model), {"custom_generate": NextTokenDecoder(), "engine": Engine(model, static=True)}
    monkeypatch.setattr(static_path, "PACK_AFTER", 12)
    model.generate(**prompts(9), max_new_tokens=8, do_sample=False, **ours)
    assert not path.is_packed
    model.generate(**prompts(9), max_new_tokens=8, do_sample=False, **ours)
    assert path.is_packed
    monkeypatch.setattr(static_path, "free_memory", lambda: 0.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1)
    model.generate(**prompts(9), max_new_tokens=20, do_sample=False, **ours)
    assert not path.is_packed


def test_what_the_static_path_does_not_know_runs_as_before(fresh_model, prompts):
    def runs(model, **settings):
        return texts(model, NextTokenDecoder(), prompts(5), **{"static": True} | settings)[2].runs_static

    assert runs(fresh_model("llama")) and not runs(fresh_model("llama"), static=False)
    assert not runs(fresh_model("llama", hidden_act="gelu"))
    model = fresh_model("llama")
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not runs(model)
    hook.remove()
    assert runs(model)
    model.config._attn_implementation = "eager"
    assert not runs(model)


@pytest.mark.parametrize("rows", [1, 3, TILE + 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_grouped_attention_is_attention(rows, heads):
    """Against softmax over all keys, repeated for every head, on random intervals."""
    torch.manual_seed(rows)
    (many, shared), slots, width = heads, rows + 20, 8
    query = torch.randn(2, rows, many, width)
    keys, values = torch.randn(2, 2, shared, slots + 9, width)
    own_start = torch.randint(10, slots, (2, rows))
    visibility = Visibility(
        torch.zeros(2, rows, dtype=torch.long),
        torch.randint(1, slots, (2, rows)),
        own_start,
        own_start + torch.randint(0, 5, (2, rows)).clamp_max(slots - own_start),
        own_start,
    )
    mask = visibility.as_bool(slots)
    last = torch.maximum(visibility.prefix_end, visibility.own_end).amax(0)
    ends = [int(last[start : start + TILE].max()) for start in range(0, rows, TILE)]
    tiles = make_tiles(visibility, slots, ends, torch.float32, many // shared, False)
    found = grouped_attention(query, keys, values, tiles, 0.3)
    repeated = [x[:, :, :slots].repeat_interleave(many // shared, dim=1) for x in (keys, values)]
    scores = 0.3 * query.transpose(1, 2) @ repeated[0].transpose(2, 3)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ repeated[1]
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


def test_rows_say_what_they_see():
    packed = Rows.pack(random_rows(), torch.device("cpu"))
    mask = packed.visibility.as_bool(packed.num_slots)
    assert not packed.sees_all and packed.num_slots == 19
    assert packed.last_seen == tuple(int(mask[:, 0, r].any(0).nonzero().max()) + 1 for r in range(9))
    alone = RowList()
    alone.add_block([9, 9, 9], 12, 12)
    assert Rows.pack([alone], torch.device("cpu")).sees_all
    alone.add_causal([1], 15)
    assert not Rows.pack([alone], torch.device("cpu")).sees_all


@can_be_packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_compute_what_plain_ones_do(dtype, bias):
    layers = [torch.nn.Linear(24, width, bias).to(dtype) for width in (16, 8)]
    if not can_pack(layers[0].weight):
        pytest.skip(f"this processor has no units for {dtype}")
    x, other = torch.randn(2, 3, 24).to(dtype), torch.randn(2, 3, 24).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        plain, packed = Linear(layers), PackedLinear(layers)
        for name, arguments in (("__call__", ()), ("silu", ()), ("plus", (other,)), ("times", (other,))):
            expected, found = getattr(plain, name)(x, *arguments), getattr(packed, name)(x, *arguments)
            torch.testing.assert_close(found, expected, **tolerance)
