"""Self-distillation data: the model's own distribution, resumable, and in the form that recipes take."""

import pytest
import torch

from finetune.data import Source, load_documents
from finetune.distill import distill, make_generator
from tests.conftest import BOS, EOS, PAD
from tests.finetune.conftest import lines, saying


def test_whole_texts_are_sampled_from_bos_on(settings):
    whole = settings()
    assert distill(whole) == 0
    texts = lines(whole)
    assert len(texts) == 6 and all(set(line) == {"text", "complete"} for line in texts)
    assert len({line["text"] for line in texts}) > 1
    assert not any(line["text"].startswith("<bos>") for line in texts)


def test_samples_follow_the_models_own_distribution(folder, fresh_model, settings):
    """The first token of many samples against the softmax of the model, temperature included."""
    generator = make_generator(settings(temperature=0.7, max_new_tokens=1, dtype="fp32"))
    ids = torch.tensor([row[0] for row in generator([[BOS, 5]] * 4000, 1)])
    model = fresh_model("llama", eos_token_id=EOS, initializer_range=0.05)
    distribution = (model(torch.tensor([[BOS, 5]])).logits[0, -1] / 0.7).softmax(-1)
    seen = torch.bincount(ids, minlength=len(distribution)) / len(ids)
    assert (seen - distribution).abs().sum() < 0.25 and (seen - 1 / len(distribution)).abs().sum() > 0.25


def test_greedy_completions_are_those_of_generate_for_prompts_of_any_length(folder, fresh_model, settings, tokenizer):
    prompts = ["the cat", "a", "end of it all"]
    generator = make_generator(settings({"prompt": "x"}, temperature=0, dtype="fp32"))
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    model = fresh_model("llama", eos_token_id=EOS, initializer_range=0.05)
    for prompt, ids in zip(encoded, generator(encoded, 0), strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[EOS, BOS])
        assert ids == out[0, len(prompt) :].tolist()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(settings, tmp_path):
    whole, cut = settings(), settings(output=str(tmp_path / "cut.jsonl"))
    distill(whole)
    text = open(whole.output, encoding="utf-8").read().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(text[:2]) + text[2][:5], encoding="utf-8")
    told = []
    assert distill(cut, advance=told.append) == 2
    assert lines(cut) == lines(whole) and told == [2, 2, 2]
    assert distill(cut, saying(5)) == 6 and lines(cut) == lines(whole)


def test_records_come_back_in_the_form_of_their_prompts(settings, tokenizer, tmp_path):
    template = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}<a>"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}]
    records = {"prompt": "the "}, {"text": "the cat ate"}, {"messages": turns}
    chosen = settings(*records, samples=3, batch_size=3, prompt_tokens=2)
    given = []

    def generator(prompts, seed):
        given.extend(tokenizer.decode(ids) for ids in prompts)
        a, b = tokenizer("hat")["input_ids"][-2:]
        return [[a, b, EOS], [a, b], [b, EOS]]

    distill(chosen, generator)
    said = [tokenizer.decode(tokenizer("hat")["input_ids"][-2:]), tokenizer.decode(tokenizer("hat")["input_ids"][-1])]
    first = tokenizer.decode(tokenizer("the cat ate")["input_ids"][:2])
    assert lines(chosen) == [
        {"prompt": "the ", "completion": said[0], "complete": True},
        {"text": first + said[0], "complete": False},
        {"messages": [turns[0], {"role": "assistant", "content": said[1]}], "complete": True},
    ]
    assert given[0] == "the " and given[1] == first


def test_a_text_that_was_cut_off_teaches_no_end(settings, tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b", "complete": false}\n{"text": "a b", "complete": true}\n')
    cut, whole = load_documents([Source(str(path))], tokenizer)["input_ids"]
    assert whole == [*cut, EOS] and EOS not in cut
    assert load_documents([Source(str(path), eos=False)], tokenizer)["input_ids"] == [cut, cut]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 0.0}, "name a file of prompts"),
        ({"prompts": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
    ],
)
def test_mistakes_are_named(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        distill(settings(**changes), saying(5))


def test_mistakes_in_files_are_named(settings, tmp_path):
    with pytest.raises(ValueError, match="line 2 of .* has neither"):
        distill(settings({"prompt": "a"}, {"story": "b"}, samples=2), saying(5))
    with pytest.raises(ValueError, match="holds 1 prompts, fewer than samples 6"):
        distill(settings({"prompt": "a"}), saying(5))
    (tmp_path / "own.jsonl").write_text("{}\n{]\n{}\n")
    with pytest.raises(ValueError, match="output: '.*own.jsonl' cannot be continued: line 2 is not JSON"):
        distill(settings({"prompt": "a"}), saying(5))


def test_padding_is_no_part_of_a_text(settings):
    """Sequences of a batch that end early are padded behind their end."""
    generator = make_generator(settings(max_new_tokens=40))
    for ids in generator([[BOS]] * 40, 3):
        assert not {EOS, BOS} & set(ids[:-1])
    assert PAD != EOS


def test_texts_are_computed_in_what_the_machine_is_quick_at(cpu, settings):
    assert settings().torch_dtype == (torch.bfloat16 if cpu.has_bf16 or torch.cuda.is_available() else torch.float32)
    assert settings(dtype="fp32").torch_dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be one of None, 'bf16', 'fp32', got 'fp16'"):
        settings(dtype="fp16")
    distill(settings(dtype="fp32"), saying(5))
    with pytest.raises(ValueError, match="dtype was 'float32' and is 'bfloat16'"):
        distill(settings(dtype="bf16"), saying(5))
