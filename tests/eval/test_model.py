"""The lm-eval model: texts and likelihoods are those of stock ``hf``, costs are counted, a killed run goes on."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from decoding.forward.adapter import GatedAdapter, gated_adapter
from eval.model import SetflowLM, StopText
from rpt import ResampleConfig, attach_offset_code, save_offset_code

# Word-like prompts of different lengths; two are equal.
PROMPTS = ["the he", "a b a b a b the end", "x", "he said: ing end th", "x", "1 + 2 = "]


@pytest.fixture(scope="module")
def model(shared_model):
    return shared_model("llama")


def requests(until=("zz",), max_gen_toks=12, prompts=PROMPTS, **settings) -> list[Instance]:
    kwargs = {"until": list(until), "max_gen_toks": max_gen_toks, "do_sample": False, **settings}
    return [
        Instance("generate_until", {"prompt": prompt}, (prompt, dict(kwargs)), 0, metadata=("tiny", i, 1))
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture
def make(model, tokenizer):
    def build(decoder="ntp", **kwargs) -> SetflowLM:
        return SetflowLM(pretrained=model, tokenizer=tokenizer, decoder=decoder, **{"device": "cpu"} | kwargs)

    return build


@pytest.fixture
def stock(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("decoder", ["ntp", "sbd-lossless:block_size=4"])
def test_texts_are_those_of_hf(make, stock, decoder, batch_size):
    expected = stock.generate_until(requests(), disable_tqdm=True)
    ours = make(decoder, batch_size=batch_size)
    assert ours.generate_until(requests(), disable_tqdm=True) == expected
    assert len(ours.samples) == len(PROMPTS)


def test_stop_strings_cut_each_text_where_hf_cuts_it(make, stock):
    whole = stock.generate_until(requests(max_gen_toks=24), disable_tqdm=True)
    stop = [text[4:6] for text in whole if len(text) > 6][:2]
    expected = stock.generate_until(requests(until=stop, max_gen_toks=24), disable_tqdm=True)
    ours = make("sbd-lossless:block_size=4", batch_size=4)
    assert ours.generate_until(requests(until=stop, max_gen_toks=24), disable_tqdm=True) == expected
    assert expected != whole
    assert min(sample["tokens"] for sample in ours.samples) < 24


def test_likelihoods_are_those_of_hf(make, stock):
    pairs = [Instance("loglikelihood", {}, (prompt, " end"), 0) for prompt in PROMPTS]
    expected = stock.loglikelihood(pairs, disable_tqdm=True)
    assert make("sbd:block_size=4").loglikelihood(pairs, disable_tqdm=True) == expected
    rolling = [Instance("loglikelihood_rolling", {}, (prompt,), 0) for prompt in PROMPTS]
    assert make().loglikelihood_rolling(rolling) == stock.loglikelihood_rolling(rolling)


def test_costs_of_next_token_decoding_are_one_forward_a_token(make):
    ours = make("ntp", batch_size=2)
    ours.generate_until(requests(), disable_tqdm=True)
    for sample in ours.samples:
        assert sample["tokens"] == sample["forwards"] > 0 and sample["tokens_per_forward"] == 1.0
        assert sample["seconds"] > 0 and sample["task"] == "tiny"
    assert [sample["doc_id"] for sample in ours.samples] == list(range(len(PROMPTS)))
    info = ours.get_model_info()
    assert info["decoder"] == "NextTokenDecoder()" and info["decoding"]["tokens_per_forward"] == 1.0
    assert info["decoding"]["tokens"] == sum(sample["tokens"] for sample in ours.samples)


def test_drafting_decoders_report_acceptance_lengths(make):
    ours = make("sbd-lossless:block_size=4")
    ours.generate_until(requests(), disable_tqdm=True)
    for sample in ours.samples:
        assert sample["forwards"] <= sample["tokens"] and all(0 <= n <= 4 for n in sample["acceptance_lengths"])
    assert "mean_acceptance_length" in ours.get_model_info()["decoding"]


def test_a_killed_run_goes_on(make, tmp_path, monkeypatch):
    path = tmp_path / "finished.jsonl"
    whole = make("ntp", batch_size=2)
    texts = whole.generate_until(requests(), disable_tqdm=True)

    killed = make("ntp", batch_size=2, finished=path)
    generate, calls = killed.model.generate, []

    def dies_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(killed.model, "generate", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        killed.generate_until(requests(), disable_tqdm=True)
    assert len(path.read_text().splitlines()) == 4
    monkeypatch.undo()

    again = make("ntp", batch_size=2, finished=path)
    ran = []
    monkeypatch.setattr(again, "_model_generate", lambda *a, f=again._model_generate, **k: ran.append(1) or f(*a, **k))
    assert again.generate_until(requests(), disable_tqdm=True) == texts
    assert len(ran) == 1 and len(path.read_text().splitlines()) == 6
    costs = [[s["tokens"], s["forwards"]] for s in whole.samples]
    assert [[s["tokens"], s["forwards"]] for s in again.samples] == costs


def half_a_line(lines: list[bytes]) -> bytes:
    return b"".join(lines[:-1]) + lines[-1][:30]


DAMAGE = {
    "the last line cut": half_a_line,
    "a line of the last batch missing": lambda lines: b"".join(lines[:-1]),
    "two lines of a batch missing": lambda lines: b"".join(lines[:-2]),
    "no end of the last line": lambda lines: b"".join(lines)[:-1],
    "the last block never written": lambda lines: half_a_line(lines) + bytes(200),
    "the last block overwritten": lambda lines: half_a_line(lines) + b"\xff\xfe\x00{[\n",
    "a line in the middle lost": lambda lines: b"".join([*lines[:1], lines[1][5:], *lines[2:]]),
    "another record": lambda lines: b"".join([b'["key"]\n', b'{"key": []}\n', *lines[:2]]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_sampled_is_the_same_after_any_damage_to_the_file(make, tmp_path, damage):
    """A text follows from its batch, so half of a batch is no use."""
    sampled = requests(do_sample=True, temperature=1.0)
    path = tmp_path / "finished.jsonl"
    texts = make("ntp", batch_size=3, finished=path).generate_until(sampled, disable_tqdm=True)
    path.write_bytes(DAMAGE[damage](path.read_bytes().splitlines(keepends=True)))
    again = make("ntp", batch_size=3, finished=path)
    assert again.generate_until(sampled, disable_tqdm=True) == texts
    assert make("ntp", batch_size=3, finished=path).generate_until(sampled, disable_tqdm=True) == texts


def test_two_runs_on_one_file(make, tmp_path, monkeypatch):
    """The second is refused with one sentence, at whatever moment it comes; the first is not disturbed."""
    path = tmp_path / "finished.jsonl"
    first, second = make("ntp", finished=path), make("ntp", finished=path)
    generate, refused = first._model_generate, []

    def meanwhile(*arguments, **settings):
        for other in (lambda: make("ntp", finished=path), lambda: second.generate_until(requests(), disable_tqdm=True)):
            with pytest.raises(ValueError, match="another run is writing .*finished.jsonl"):
                other()
            refused.append(1)
        return generate(*arguments, **settings)

    monkeypatch.setattr(first, "_model_generate", meanwhile)
    texts = first.generate_until(requests(), disable_tqdm=True)
    lines = path.read_text().splitlines()
    assert len(lines) == len(PROMPTS) and len(refused) == 2 * len(PROMPTS)
    assert second.generate_until(requests(), disable_tqdm=True) == texts and path.read_text().splitlines() == lines


def test_finished_requests_belong_to_a_decoder_and_to_settings(make, tmp_path, monkeypatch):
    path = tmp_path / "finished.jsonl"
    make("ntp", finished=path).generate_until(requests(prompts=PROMPTS[:2]), disable_tqdm=True)
    make("ntp", finished=path).generate_until(requests(prompts=PROMPTS[:2]), disable_tqdm=True)
    assert len(path.read_text().splitlines()) == 2
    make("sbd-lossless:block_size=4", finished=path).generate_until(requests(prompts=PROMPTS[:2]), disable_tqdm=True)
    assert len(path.read_text().splitlines()) == 4
    make("ntp", finished=path).generate_until(requests(prompts=PROMPTS[:2], max_gen_toks=3), disable_tqdm=True)
    assert len(path.read_text().splitlines()) == 6


def test_new_weights_in_the_same_folder_are_another_model(shared_model, tokenizer, tmp_path):
    from eval.model import identify

    shared_model("llama").save_pretrained(tmp_path)
    before = identify(str(tmp_path))
    assert identify(str(tmp_path)) == before and json.dumps(before)
    shared_model("llama", seed=1).save_pretrained(tmp_path)
    assert identify(str(tmp_path)) != before


def test_samples_drawn_several_times_are_kept_apart(make, tmp_path):
    repeated = requests(prompts=["x", "x", "x"], do_sample=True, temperature=1.0)
    torch.manual_seed(0)
    texts = make("ntp", finished=tmp_path / "f.jsonl").generate_until(repeated, disable_tqdm=True)
    assert len(set(texts)) > 1
    assert make("ntp", finished=tmp_path / "f.jsonl").generate_until(repeated, disable_tqdm=True) == texts


def test_semicolons_stand_for_commas_in_lm_evals_argument_string(shared_model, tokenizer, tmp_path):
    shared_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from lm_eval.api.registry import get_model

    arguments = f"pretrained={tmp_path},decoder=sbd:block_size=4;entropy_bound=0.5,dtype=float32"
    ours = get_model("setflow").create_from_arg_string(arguments, {"batch_size": 2, "device": "cpu"})
    assert type(ours) is SetflowLM and ours.decoder.block_size == 4 and ours.decoder.rule.entropy_bound == 0.5
    assert len(ours.generate_until(requests(), disable_tqdm=True)) == len(PROMPTS)


@pytest.mark.parametrize(
    "field, value",
    [("batch_size", "much"), ("batch_size", 0), ("decoder", "sbdd"), ("device", "gpu"), ("device", "meta")],
)
def test_impossible_arguments_are_refused(make, field, value):
    with pytest.raises(ValueError, match=value if field == "decoder" else field):
        make(**{field: value})


def test_stop_text_looks_behind_the_prompt_only(tokenizer):
    criterion = StopText(tokenizer, ["ab"], prompt_width=3)
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in ("xab" + "cde", "xxa" + "bcd", "xxx" + "cab")]
    assert criterion(torch.tensor(rows), None).tolist() == [False, False, True]


def test_auto_finds_a_batch_size_once(make, stock, monkeypatch):
    ours = make(batch_size="auto", max_batch_size=4)
    assert ours.generate_until(requests(), disable_tqdm=True) == stock.generate_until(requests(), disable_tqdm=True)
    assert ours.batch_size == 4 and {sample["batch_size"] for sample in ours.samples} == {4, 2}
    monkeypatch.setattr(ours, "_detect_batch_size", None)
    ours.generate_until(requests(prompts=["new"]), disable_tqdm=True)


def test_prompts_that_do_not_fit_lose_their_beginning_and_are_counted(make, stock, model):
    context = model.config.max_position_embeddings
    prompts = ["x", "ab" * context]
    ours = make("ntp")
    assert ours.generate_until(requests(prompts=prompts), disable_tqdm=True) == stock.generate_until(
        requests(prompts=prompts), disable_tqdm=True
    )
    assert [sample["cut_prompt_tokens"] for sample in ours.samples] == [0, 2 * context - (context - 12)]
    assert ours.get_model_info()["decoding"]["cut_prompts"] == 1
    with pytest.raises(ValueError, match=f"max_gen_toks must be from 1 to {context - 1}"):
        ours.generate_until(requests(max_gen_toks=context), disable_tqdm=True)


def test_another_decoder_in_the_same_model_counts_anew(make, stock):
    ours = make("ntp")
    ours.generate_until(requests(prompts=["x"]), disable_tqdm=True)
    ours.use("sbd-lossless:block_size=4", seed=3)
    assert ours.samples == [] and ours.seed == 3
    assert ours.generate_until(requests(), disable_tqdm=True) == stock.generate_until(requests(), disable_tqdm=True)
    assert len(ours.samples) == len(PROMPTS) and "acceptance_lengths" in ours.samples[0]


def test_what_is_sampled_follows_the_seed_and_not_what_ran_before(make):
    sampled = requests(prompts=["x", "ab"], do_sample=True, temperature=1.0)

    def draw(seed: int) -> list[str]:
        ours = make("ntp", seed=seed)
        torch.rand(seed + 5)
        return ours.generate_until(sampled, disable_tqdm=True)

    assert draw(0) == draw(0) != draw(1)


def test_a_gated_adapter_is_loaded_with_its_base_model(fresh_model, tokenizer, tmp_path):
    base = fresh_model("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model = type(base).from_pretrained(tmp_path / "base")
    adapter = GatedAdapter(model, 2, 4)
    adapter.mask_token_id = model.generation_config.mask_token_id
    torch.nn.init.ones_(adapter.terms["layers-0-self_attn-q_proj"].up)
    adapter.save(model, tmp_path / "adapter")
    ours = SetflowLM(pretrained=str(tmp_path / "adapter"), decoder="sbd-lossless:block_size=4", device="cpu")
    assert gated_adapter(ours.model).terms["layers-0-self_attn-q_proj"].up.all()
    stock = HFLM(pretrained=base, tokenizer=tokenizer, device="cpu", batch_size=1)
    expected = stock.generate_until(requests(prompts=PROMPTS[:2]), disable_tqdm=True)
    assert ours.generate_until(requests(prompts=PROMPTS[:2]), disable_tqdm=True) == expected


def test_an_offset_code_is_loaded_from_beside_its_model(fresh_model, tokenizer, tmp_path):
    model = fresh_model("llama")
    torch.nn.init.normal_(attach_offset_code(model, ResampleConfig()).table)
    save_offset_code(model, tmp_path)
    plain = {name: weight for name, weight in model.state_dict().items() if "offset" not in name}
    model.save_pretrained(tmp_path, state_dict=plain)
    tokenizer.save_pretrained(tmp_path)
    ours = SetflowLM(pretrained=str(tmp_path), decoder="rpt:iterations=1", device="cpu")
    decoder = ours.decoder
    assert torch.equal(ours.model.offset_code.table, model.offset_code.table)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, custom_generate=decoder)
    (text,) = ours.generate_until(requests(prompts=PROMPTS[:1]), disable_tqdm=True)
    assert text == tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)


def test_lm_eval_finds_the_model_by_its_entry_point():
    """In a process that has not imported our model, as ``lm_eval --model setflow`` is."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    value = project["project"]["entry-points"]["lm_eval.models"]["setflow"]
    code = f"""
from importlib.metadata import EntryPoint
from lm_eval.api import registry

entry = EntryPoint("setflow", {value!r}, "lm_eval.models")
if hasattr(registry, "load_plugins"):
    registry.md.entry_points = lambda *, group: [entry] if group == entry.group else []
else:  # up to 0.4.13, which knows such placeholders but looks for none
    registry.model_registry.register(entry.name, target=entry.value)
found = registry.get_model("setflow")
print(found.__module__, found.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["eval.model", "SetflowLM"], done.stderr


def test_a_gguf_file_is_evaluated_as_the_model_that_is_in_it(fresh_model, tmp_path, prompts):
    pytest.importorskip("gguf", reason="GGUF files need the package gguf: pip install 'setflow[gguf]'")
    from eval.additions import additions
    from setflow.corpus import train_tokenizer
    from tests.gguf_files import write_gguf

    tokenizer = train_tokenizer(problem.prompt for problem, _ in zip(additions(0, False), range(20), strict=False))
    model = fresh_model("llama-tied", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer)
    ours = SetflowLM(pretrained=file, decoder="prompt-lookup", dtype="float32", device="cpu")
    stock = HFLM(pretrained=model, tokenizer=ours.tokenizer, device="cpu", batch_size=1)
    expected = stock.generate_until(requests(), disable_tqdm=True)
    assert ours.generate_until(requests(), disable_tqdm=True) == expected
