"""What models, wrappers and callers of the world outside bring along: the text of ``generate``, or a refusal by name."""

import copy
import functools
import io
import warnings

import peft
import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    DynamicCache,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
)

from decoding import Engine, NextTokenDecoder, SlotCache, install, uninstall
from decoding.batch import UndecidableToken
from dfm import FlowDecoder
from sbd import EntropyBound, SelfSpeculativeDecoder, SetBlockDecoder
from tests.conftest import MASK, VOCAB

NTP = NextTokenDecoder()
LOSSLESS = SelfSpeculativeDecoder(block_size=4)
LOOKUP = SelfSpeculativeDecoder(block_size=6, draft="prompt_lookup")
EXACT = pytest.mark.parametrize("decoder", [NTP, LOSSLESS, LOOKUP], ids=["ntp", "lossless", "lookup"])
SHAPE = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
SHAPE |= {"bos_token_id": 1, "eos_token_id": None}


def made(kind, config, **changes):
    torch.manual_seed(0)
    model = kind(config(**{**SHAPE, **changes})).eval().requires_grad_(False)
    model.generation_config.mask_token_id = MASK
    return model


def greedy(model, inputs, decoder=None, **settings):
    settings = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [MASK], **settings}
    return model.generate(**inputs, custom_generate=decoder, **settings)


# --- what is added around the trunk


def adapted(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_of_a_soft_prompt_are_refused_by_name(fresh_model, prompts, config):
    model = adapted(fresh_model("llama"), config)
    with pytest.raises(ValueError, match=f"{config.peft_type.value} puts virtual tokens before the prompt"):
        greedy(model, prompts(7), NTP)


@EXACT
def test_lora_of_peft_is_run(fresh_model, prompts, decoder):
    base = fresh_model("llama")
    model = adapted(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"]))
    stock = greedy(model, prompts(7, 4))
    assert torch.equal(greedy(model, prompts(7, 4), decoder), stock)
    with model.disable_adapter():
        assert not torch.equal(greedy(model, prompts(7, 4)), stock)


def test_a_replaced_preparation_of_inputs_is_refused(fresh_model, prompts):
    model = fresh_model("llama")
    original = model.prepare_inputs_for_generation

    @functools.wraps(original)
    def prepare(*arguments, **named):
        return original(*arguments, **named)

    model.prepare_inputs_for_generation = prepare
    with pytest.raises(ValueError, match="prepare_inputs_for_generation"):
        greedy(model, prompts(7), NTP)


@pytest.mark.parametrize("positions", [torch.arange(7) * 3 + 40, torch.arange(7) + 1, torch.zeros(7, dtype=torch.long)])
def test_positions_of_ones_own_are_refused(shared_model, prompts, positions):
    with pytest.raises(ValueError, match="position_ids"):
        greedy(shared_model("llama"), prompts(7), NTP, position_ids=positions[None])


def test_the_positions_that_rows_have_anyway_are_taken(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(7, 4)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    stock = greedy(model, inputs)
    assert torch.equal(greedy(model, inputs, NTP, position_ids=positions), stock)


@EXACT
def test_adapter_names_of_a_batch_whose_rows_end_early(fresh_model, prompts, decoder):
    base = fresh_model("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = adapted(base, config)
    model.add_adapter("other", config)
    model.eval()
    inputs = prompts(6, 6, 6)
    names = ["default", "other", "__base__"]
    free = greedy(model, inputs, adapter_names=names)
    assert len({tuple(row.tolist()) for row in free[:, 6:]}) == 3
    ends = [int(free[0, 9]), int(free[1, 14])]
    stock = greedy(model, inputs, adapter_names=names, eos_token_id=ends)
    assert torch.equal(greedy(model, inputs, decoder, adapter_names=names, eos_token_id=ends), stock)


# --- models that other tests do not know

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES = {
    "qwen3_moe": lambda: made(Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=16, **MOE),
    "mixtral": lambda: made(MixtralForCausalLM, MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: made(OlmoeForCausalLM, OlmoeConfig, num_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts_are_decoded(prompts, kind):
    model, inputs = MIXTURES[kind](), prompts(6, 9)
    stock = greedy(model, inputs)
    for decoder in (NTP, LOSSLESS):
        assert torch.equal(greedy(model, inputs, decoder), stock)


def test_the_verdict_on_a_model_is_not_that_on_another_of_its_type(prompts):
    """Granite scales its logits outside the head: by 1 it is a Llama, by 8 our logits would be wrong."""
    right, wrong = (made(GraniteForCausalLM, GraniteConfig, logits_scaling=scale) for scale in (1.0, 8.0))
    assert torch.equal(greedy(right, prompts(6), NTP), greedy(right, prompts(6)))
    with pytest.raises(ValueError, match="model_type='granite' cannot be decoded: its logits"):
        greedy(wrong, prompts(6), NTP)
    greedy(right, prompts(6), NTP)


def llama(rope, longest=64):
    return made(LlamaForCausalLM, LlamaConfig, max_position_embeddings=longest, rope_parameters=rope)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("decoder", [NTP, LOSSLESS, LOOKUP, SetBlockDecoder(4)], ids=repr)
def test_ropes_that_depend_on_the_length_are_refused_where_a_run_may_cross(prompts, decoder):
    longest = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    phi = made(Phi3ForCausalLM, Phi3Config, rope_parameters=LONGROPE, **longest)
    for model, name in ((llama(DYNAMIC), "dynamic"), (phi, "longrope")):
        with pytest.raises(ValueError, match=f"rope_type='{name}' computes with other frequencies from position 64 on"):
            greedy(model, prompts(52), decoder, max_new_tokens=40)


@EXACT
def test_ropes_that_depend_on_the_length_are_exact_before_that(prompts, decoder):
    model = llama(DYNAMIC)
    stock = greedy(model, prompts(20), max_new_tokens=30)
    assert torch.equal(greedy(model, prompts(20), decoder, max_new_tokens=30), stock)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope", [YARN, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}], ids=["yarn", "linear"]
)
def test_the_context_is_that_of_the_scaled_rope(prompts, rope):
    for model in (llama(rope), made(Qwen2ForCausalLM, Qwen2Config, max_position_embeddings=64, rope_parameters=rope)):
        inputs = prompts(64, 90)
        assert torch.equal(greedy(model, inputs, LOSSLESS), greedy(model, inputs))
        with pytest.raises(ValueError, match="prompt 0 has 256 tokens.* is 256"):
            greedy(model, prompts(256), NTP)


@EXACT
def test_offloaded_weights(fresh_model, prompts, decoder):
    model, inputs = fresh_model("llama"), prompts(6, 9)
    stock = greedy(model, inputs)
    cpu_offload(model, execution_device="cpu")
    assert model.get_input_embeddings().weight.is_meta
    assert torch.equal(greedy(model, inputs, decoder), stock)


def test_offloaded_weights_of_a_type_that_is_tried_out(prompts):
    model, inputs = MIXTURES["mixtral"](), prompts(6, 9)
    stock = greedy(model, inputs)
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(greedy(model, inputs, LOSSLESS), stock)


def test_gradient_checkpointing_in_training_mode_is_refused(fresh_model, prompts):
    model = fresh_model("llama")
    model.gradient_checkpointing_enable()
    stock = greedy(model, prompts(6))
    assert torch.equal(greedy(model, prompts(6), NTP), stock)  # in evaluation mode it does nothing
    model.train()
    with pytest.raises(ValueError, match="training mode with gradient checkpointing"):
        greedy(model, prompts(6), NTP)


# --- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: through_a_file(model)], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_model_with_an_installed_decoder_runs_itself(fresh_model, prompts, copied):
    model, inputs = fresh_model("llama"), prompts(6)
    install(model, LOSSLESS, Engine(model))
    other = copied(model)
    other.lm_head.weight.data.neg_()
    plain = other.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert hasattr(plain, "tokens_per_forward"), "the copy has the decoder, too"
    assert not torch.equal(plain.sequences, model.generate(**inputs, max_new_tokens=8, do_sample=False))
    uninstall(other)
    stock = other.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[MASK])
    assert torch.equal(plain.sequences, stock)
    assert hasattr(model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True), "tokens_per_forward")


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# --- caches and settings


def test_a_cache_may_be_filled_in_inference_mode_and_used_outside(shared_model, prompts):
    model, cache = shared_model("llama"), SlotCache(2)
    with torch.inference_mode():
        first = greedy(model, prompts(9), LOSSLESS, past_key_values=cache)
    longer = {"input_ids": torch.cat([first.clone(), torch.tensor([[7, 8]])], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    assert torch.equal(greedy(model, longer, LOSSLESS, past_key_values=cache), greedy(model, longer))
    with torch.inference_mode():  # and back again
        again = greedy(model, longer, NTP, past_key_values=cache)
    assert torch.equal(again, greedy(model, longer))


def test_the_cache_that_was_passed_is_in_the_output(shared_model, prompts):
    model, cache = shared_model("llama"), SlotCache(2)
    output = greedy(model, prompts(9), LOSSLESS, past_key_values=cache, return_dict_in_generate=True)
    assert output.past_key_values is cache and cache.lengths == [28]
    assert "past_key_values" not in greedy(model, prompts(9), LOSSLESS, return_dict_in_generate=True)


def test_settings_that_would_do_nothing_are_refused_by_name(shared_model, prompts):
    model = shared_model("llama")
    for name, value in (("cache_implementation", "static"), ("prefill_chunk_size", 4), ("assistant_early_exit", 1)):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            greedy(model, prompts(5), NTP, **{name: value})
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        with pytest.raises(ValueError, match=f"past_key_values of type {type(cache).__name__}"):
            greedy(model, prompts(5), NTP, past_key_values=cache)


# --- nothing to choose from


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "decoder", [NTP, LOSSLESS, LOOKUP, SetBlockDecoder(4), SetBlockDecoder(4, EntropyBound(9.0))], ids=repr
)
def test_logits_that_choose_nothing_are_an_error(fresh_model, prompts, value, do_sample, decoder):
    model = fresh_model("llama")
    model.get_output_embeddings().register_forward_hook(
        lambda module, arguments, output: torch.full_like(output, value)
    )
    with pytest.raises(UndecidableToken, match="no token can be chosen for position [67] of prompt 0"):
        greedy(model, prompts(6), decoder, do_sample=do_sample)


def test_flow_says_so_too(fresh_model, prompts):
    """Every sampler, in blocks and in whole texts, and where texts are filled in."""
    for family, value in (("llama", float("nan")), ("qwen2", float("-inf"))):
        model = fresh_model(family)
        model.model.layers[0].mlp.down_proj.weight.data[0, 0] = value
        for flow in (
            FlowDecoder(block_size=4),
            FlowDecoder(block_size=4, sampler="rule", rule=EntropyBound(0.5)),
            FlowDecoder(steps=3),
        ):
            for do_sample in (False, True):
                with pytest.raises(UndecidableToken, match="no token can be chosen"):
                    greedy(model, prompts(6, 4), flow, do_sample=do_sample)
        with pytest.raises(UndecidableToken, match="position 6 of prompt 0"):
            FlowDecoder(steps=3).infill(model, prompts(9)["input_ids"], torch.arange(9)[None] < 6)


@pytest.mark.parametrize("decoder", [NTP, LOSSLESS], ids=["ntp", "lossless"])
def test_what_was_decided_before_is_kept(shared_model, prompts, decoder):
    """A processor that allows nothing from the fifth new token of the second prompt on."""
    model, inputs = shared_model("llama"), prompts(6, 6)
    stock = greedy(model, inputs)
    second = inputs["input_ids"][1].tolist()

    def nothing_left(ids, scores):
        ended = torch.tensor([row.tolist()[:6] == second and len(row) >= 10 for row in ids])
        return scores.masked_fill(ended[:, None], -torch.inf)

    ends = int(stock[0, 8])
    with pytest.raises(UndecidableToken, match="position 10 of prompt 1") as raised:
        greedy(model, inputs, decoder, logits_processor=[nothing_left], eos_token_id=ends)
    output = raised.value.output
    assert output.new_tokens.tolist() == [3, 4]
    assert output.sequences[0, 6:9].tolist() == stock[0, 6:9].tolist()
    assert output.sequences[1, 6:10].tolist() == stock[1, 6:10].tolist()


# --- quantised activations


def test_quantised_activations_are_warned_of_and_quantised_weights_are_not(fresh_model, prompts):
    model = fresh_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy(model, prompts(6), LOSSLESS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rounded = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.warns(UserWarning, match="SelfSpeculativeDecoder: layer .*quantises activations"):
        greedy(rounded, prompts(6), LOSSLESS)
