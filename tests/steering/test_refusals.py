"""Rewards that fail, particles that are all ruled out, and decoders that cannot give what is asked: one sentence each."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, LogitsProcessor

from decoding import NextTokenDecoder
from dfm import FlowDecoder
from sbd import EntropyBound, SelfSpeculativeDecoder, SetBlockDecoder
from steering import ClassifierReward, RewardError, SteeredDecoder
from steering.rewards import find_reward
from tests.conftest import VOCAB

BLOCKS = SetBlockDecoder(block_size=4, rule=EntropyBound(1.0))


def zero(completion_ids):
    return [0.0] * len(completion_ids)


def zero_on_the_way(completion_ids, finished):
    return [0.0] * len(completion_ids)


def after_tokens(count: int, answer):
    """A reward that is 0 for texts of up to ``count`` tokens, and then what ``answer(number of texts)`` says."""

    def reward(completion_ids, finished):
        if max(map(len, completion_ids)) <= count:
            return np.zeros(len(completion_ids))
        return answer(len(completion_ids))

    return reward


def generate(model, inputs, decoder, **settings):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 14, "do_sample": True, "top_k": 0, "return_dict_in_generate": True, **settings}
    return model.generate(**inputs, custom_generate=decoder, **settings)


def fail(count):
    raise KeyError("no such word")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (fail, "reward 'reward' raised KeyError: 'no such word'"),
        (lambda n: [math.nan] * n, "reward 'reward' must return numbers below inf, or -inf, got nan"),
        (lambda n: [0.0] * (n - 1) + [math.inf], "reward 'reward' must return numbers below inf, or -inf, got inf"),
        (lambda n: [0.0] * (n - 1), r"reward 'reward' must return 6 numbers, got the shape \[5\]"),
        (lambda n: torch.zeros(n, 1), r"reward 'reward' must return 6 numbers, got the shape \[6, 1\]"),
        (lambda n: 1.0, r"reward 'reward' must return 6 numbers, got the shape \[\]"),
        (lambda n: None, "reward 'reward' must return 6 numbers, got"),
        (lambda n: ["good"] * n, "reward 'reward' must return 6 numbers, got"),
    ],
)
@pytest.mark.parametrize("decoder", [NextTokenDecoder(), BLOCKS], ids=["ntp", "sbd"])
def test_a_reward_that_fails_ends_the_run_and_what_was_written_stays(shared_model, prompts, answer, sentence, decoder):
    model, inputs = shared_model("llama"), prompts(9, 5)
    steered = SteeredDecoder(decoder, after_tokens(4, answer), particles=3, every=4)
    with pytest.raises(RewardError, match=sentence) as error:
        generate(model, inputs, steered)
    output = error.value.output
    assert output.particles.shape == (2, 3, 9 + 8) and (output.particle_tokens == 8).all()
    whole = generate(model, inputs, SteeredDecoder(decoder, zero_on_the_way, particles=3, every=4))
    assert output.particles.tolist() == whole.particles[:, :, : 9 + 8].tolist()


@pytest.mark.parametrize("decoder", [NextTokenDecoder(), SelfSpeculativeDecoder(block_size=4), BLOCKS])
def test_where_all_are_ruled_out_the_last_that_were_not_are_returned(shared_model, prompts, decoder):
    """One prompt loses all its particles on the way, the other goes on."""
    model, inputs = shared_model("llama"), prompts(9, 5)

    def reward(prompt_ids, completion_ids, finished):
        pairs = zip(prompt_ids, completion_ids, strict=True)
        return [-0.1 * len(ids) - (math.inf if len(prompt) == 5 and len(ids) > 8 else 0) for prompt, ids in pairs]

    steered = SteeredDecoder(decoder, reward, particles=3, every=4)
    with pytest.warns(
        UserWarning, match=r"rules out all 3 particles of prompt 1 \(-inf\): they are cut back to the 8 tok"
    ):
        output = generate(model, inputs, steered)
    assert output.exhausted.tolist() == [False, True]
    assert output.particle_tokens.tolist() == [[14] * 3, [8] * 3] and output.new_tokens.tolist() == [14, 8]
    assert output.log_normaliser[1] == -math.inf and output.log_normaliser[0].isfinite()
    assert output.log_weights.isfinite().all() and output.rewards[1].tolist() == pytest.approx([-0.8] * 3)
    alone = generate(model, inputs, SteeredDecoder(decoder, zero_on_the_way, particles=3, every=4))
    assert output.particles[1, :, : 9 + 8].tolist() == alone.particles[1, :, : 9 + 8].tolist()
    assert output.particles[0].tolist() == alone.particles[0].tolist()


def test_where_all_finished_texts_are_ruled_out_they_are_kept(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(9)
    impossible = SteeredDecoder(reward=lambda completion_ids: [-math.inf] * len(completion_ids), particles=3)
    with pytest.warns(UserWarning, match="rules out all 3 particles of prompt 0.*kept with the weights before that"):
        output = generate(model, inputs, impossible)
    assert output.particle_tokens.tolist() == [[14] * 3] and output.exhausted.tolist() == [True]
    assert output.log_weights.exp().tolist() == [pytest.approx([1 / 3] * 3)] and (output.rewards == -math.inf).all()


def test_who_is_ruled_out_is_not_judged_again_and_stays_out(shared_model, prompts):
    """Where nobody is resampled, the weight of 0 is carried to the end, even if the reward were to change its mind."""
    model, inputs, asked = shared_model("llama"), prompts(9), []

    def reward(completion_ids, finished):
        asked.append(len(completion_ids))
        return [-math.inf] + [0.0] * (len(completion_ids) - 1) if len(asked) == 1 else [0.0] * len(completion_ids)

    output = generate(model, inputs, SteeredDecoder(reward=reward, particles=4, every=4, ess_threshold=0.0))
    assert asked == [4, 3, 3, 3] and output.log_weights[0].exp().tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert output.log_normaliser[0].exp() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"particles": 0}, "particles must be a whole number of at least 1, got 0"),
        ({"particles": 2.5}, "particles must be a whole number"),
        ({"scale": 0}, r"scale must be a number in \(0, inf\), got 0"),
        ({"scale": math.inf}, "scale must be a number in"),
        ({"ess_threshold": 1.5}, r"ess_threshold must be a number in \[0, 1\], got 1.5"),
        ({"every": 0}, "every must be a whole number"),
        ({"ramp": -1}, "ramp must be a whole number"),
        ({"select": "first"}, "select must be one of 'weight', 'best'"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"alpha": 0}, r"alpha must be a number in \(0, inf\)"),
        ({"reward": None}, "reward must be given, or alpha, else there is nothing to steer by"),
        ({"reward": 3}, "reward must be a function, 'module:function' or the name of a classifier, got 3"),
        (
            {"reward": lambda texts: texts},
            "has a parameter 'texts'; what it can be given is prompts, completions, prompt_ids",
        ),
        (
            {"reward": lambda finished: finished},
            "must take completions or completion_ids, else it has nothing to judge",
        ),
        ({"reward": "no.such:function"}, "reward 'no.such:function' cannot be imported"),
        ({"reward": "./no-such-folder"}, "reward './no-such-folder' does not exist"),
        ({"decoder": "ntp"}, "decoder must be a Decoder that is not steered itself, got 'ntp'"),
        ({"decoder": SteeredDecoder(reward=zero)}, "decoder must be a Decoder that is not steered itself"),
        (
            {"decoder": BLOCKS, "alpha": 2},
            "alpha needs a decoder that samples the next-token distribution, .*SetBlockDecoder",
        ),
        (
            {"decoder": FlowDecoder(), "reward": zero_on_the_way},
            "reward judges unfinished texts, but FlowDecoder with these settings finishes a text all at once: give it a block",
        ),
    ],
)
def test_impossible_values_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SteeredDecoder(**{"reward": zero, **fields})


class Counting(LogitsProcessor):
    """Keeps a state from token to token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


def test_what_a_run_cannot_honour_is_said_before_the_model_runs(shared_model, prompts, count_rows):
    model, inputs, steered = shared_model("llama"), prompts(9, 5), SteeredDecoder(reward=zero, particles=2)
    with pytest.raises(
        ValueError, match="particles must be 1 where nothing is sampled.*temperature above 0, got particles=2"
    ):
        generate(model, inputs, steered, do_sample=False, top_k=None)
    with pytest.raises(ValueError, match="Counting, which keeps a state from token to token"):
        generate(model, inputs, steered, logits_processor=[Counting()])
    by_text = SteeredDecoder(reward=lambda prompts, completions: [0.0] * len(prompts), particles=2)
    with pytest.raises(ValueError, match="takes prompts and completions, which are texts: pass tokenizer= to generate"):
        generate(model, inputs, by_text)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        mask = inputs["attention_mask"].clone()
        mask[1] = 0
        generate(model, {**inputs, "attention_mask": mask}, steered)
    with pytest.raises(ValueError, match="SetBlockDecoder cannot honour NoRepeatNGram"):
        generate(model, inputs, SteeredDecoder(BLOCKS, zero), no_repeat_ngram_size=2)
    assert count_rows == []


def test_what_functions_may_look_like():
    class Callable:
        def __call__(self, completions, finished, weight=2.0, **others):
            return [weight] * len(completions)

    assert find_reward(Callable()).judges_prefixes and find_reward(Callable()).arguments == ("completions", "finished")
    assert find_reward("benchmarks.steering.toys:likes_zeros").arguments == ("completion_ids", "finished")
    reward = find_reward(lambda completion_ids, *, prompt_ids: np.arange(len(prompt_ids), dtype=np.int32))
    assert reward([[1], [2]], [[3], [4]], [True, True], None) == [0.0, 1.0] and not reward.judges_prefixes


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tokenizer):
    """``classifier(labels)``: a folder with a random sequence classifier of so many labels."""

    def save(labels: int) -> str:
        folder = tmp_path_factory.mktemp("classifier")
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=VOCAB, num_labels=labels, pad_token_id=0, max_position_embeddings=32, **shape)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForSequenceClassification(config)
            torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def test_a_reward_model_by_its_name_gives_its_score(classifier, shared_model, prompts, tokenizer):
    model, folder = shared_model("llama"), classifier(1)
    inputs = prompts(9, 5)
    output = generate(model, inputs, SteeredDecoder(reward=folder, particles=3), tokenizer=tokenizer)
    judge = LlamaForSequenceClassification.from_pretrained(folder)
    for b, i in [(0, 0), (1, 2)]:
        prompt = tokenizer.decode(inputs["input_ids"][b], skip_special_tokens=True)
        new = tokenizer.decode(output.particles[b, i, 9:], skip_special_tokens=True)
        with torch.no_grad():
            score = judge(**tokenizer(prompt + new, return_tensors="pt")).logits[0, 0]
        assert output.rewards[b, i] == pytest.approx(float(score), abs=1e-4)


def test_of_a_classifier_a_label_is_wanted(classifier):
    folder = classifier(3)
    rewards = [ClassifierReward(folder, f"LABEL_{i}")(["a", "xyz"], ["bc", "d"]) for i in range(3)]
    assert torch.tensor(rewards).exp().sum(0).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert ClassifierReward.named(f"{folder}#LABEL_1") == ClassifierReward(folder, "LABEL_1")
    long = ["a" * 50], ["b" * 31]  # what does not fit is cut off at its beginning
    assert ClassifierReward(folder, "LABEL_0")(*long) == ClassifierReward(folder, "LABEL_0")([""], ["a" + "b" * 31])
    for label in (None, "good"):
        with pytest.raises(
            ValueError, match=f"has the labels LABEL_0, LABEL_1, LABEL_2: name one as .*#LABEL_0, got {label!r}"
        ):
            ClassifierReward(folder, label).check()


def test_a_model_that_is_no_classifier_is_refused(shared_model, prompts, tokenizer, tmp_path):
    model = shared_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no sequence classifier: it lacks score.weight"):
        generate(model, prompts(9), SteeredDecoder(reward=str(tmp_path), particles=2), tokenizer=tokenizer)
