"""Grammars of other libraries under every decoder that is exact: the text of ``generate``, in fewer forwards.

What is not installed is skipped; `pip install lm-format-enforcer xgrammar outlines llguidance` brings them all.
"""

import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch

from decoding import NextTokenDecoder
from decoding.processors import copied
from rpt import ResampleDecoder
from sbd import SelfSpeculativeDecoder
from tests.conftest import BOS, EOS, MASK, PAD, VOCAB

CHARACTERS = [chr(code) for code in range(32, 127) if chr(code) not in "~`"]
PIECES = ["<pad>", "<bos>", "<eos>", *CHARACTERS, "<mask>"]
FIRST = 3
RECORDS = r'\[(\{"name":"[a-z]{2}","size":[0-9]\},)+\]'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "sizes": {"type": "array", "items": {"enum": [1, 2, 3]}}},
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
LOSSLESS = SelfSpeculativeDecoder(block_size=4)
LOOKUP = SelfSpeculativeDecoder(block_size=8, draft="prompt_lookup")
DRAFTING = [LOSSLESS, SelfSpeculativeDecoder(block_size=4, look_ahead=1, draft="both"), LOOKUP]
EXACT = pytest.mark.parametrize(
    "decoder", [NextTokenDecoder(), LOSSLESS, LOOKUP], ids=["ntp", "sbd-lossless", "prompt-lookup"]
)
BATCH = pytest.mark.parametrize("batch_size", [1, 4])


def test_the_pieces_are_those_of_the_model():
    assert len(PIECES) == VOCAB and PIECES[MASK] == "<mask>" and PIECES[EOS] == "<eos>"


def ids_of(text: str) -> list[int]:
    return [FIRST + CHARACTERS.index(character) for character in text]


def text_of(ids) -> str:
    return "".join(PIECES[i] for i in ids if i not in (PAD, EOS))


def needed(name: str):
    return pytest.importorskip(name, reason=f"{name} is not installed: its grammars are NOT tested here")


# --- how each library is put into generate: arguments of generate for a regular expression, or for a JSON schema


def lm_format_enforcer(regex=None, schema=None):
    library = needed("lmformatenforcer")
    letters = [(i, PIECES[i], False) for i in range(FIRST, MASK)]
    tokens = library.TokenEnforcerTokenizerData(letters, text_of, EOS, False, VOCAB)
    parser = library.RegexParser(regex) if regex else library.JsonSchemaParser(schema)
    enforcer = library.TokenEnforcer(tokens, parser)
    return {"prefix_allowed_tokens_fn": lambda _, text: enforcer.get_allowed_tokens(text.tolist()).allowed_tokens}


def xgrammar_compiled(regex=None, schema=None):
    library = needed("xgrammar")
    tokens = library.TokenizerInfo(PIECES, vocab_size=VOCAB, stop_token_ids=[EOS])
    compiler = library.GrammarCompiler(tokens)
    if regex:
        return compiler.compile_regex(regex)
    return compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)


def xgrammar(regex=None, schema=None):
    compiled = xgrammar_compiled(regex, schema)
    return {"logits_processor": [importlib.import_module("xgrammar.contrib.hf").LogitsProcessor(compiled)]}


def outlines_of_xgrammar(regex=None, schema=None):
    needed("outlines")
    compiled = xgrammar_compiled(regex, schema)
    backend = importlib.import_module("outlines.backends.xgrammar")
    return {"logits_processor": [backend.XGrammarLogitsProcessor(compiled, "torch")]}


def outlines_of_outlines_core(regex=None, schema=None):
    needed("outlines")
    core = needed("outlines_core")
    if schema:
        regex = core.json_schema.build_regex_from_schema(json.dumps(schema))
    vocabulary = core.Vocabulary(EOS, {PIECES[i]: [i] for i in range(FIRST, MASK)})
    backend = importlib.import_module("outlines.backends.outlines_core")
    return {"logits_processor": [backend.OutlinesCoreLogitsProcessor(core.Index(regex, vocabulary), "torch")]}


def outlines_of_llguidance(regex=None, schema=None):
    needed("outlines")
    library = needed("llguidance")

    class Pieces:
        eos_token_id, bos_token_id, special_token_ids = EOS, BOS, [PAD, BOS, EOS, MASK]
        tokens = [piece.encode() for piece in PIECES]

        def __call__(self, text: str) -> list[int]:
            return ids_of(text)

    tokens = library.LLTokenizer(library.TokenizerWrapper(Pieces()))
    grammar = library.grammar_from("regex", regex) if regex else library.grammar_from("json_schema", json.dumps(schema))
    backend = importlib.import_module("outlines.backends.llguidance")
    return {"logits_processor": [backend.LLGuidanceLogitsProcessor(grammar, tokens, "torch")]}


LIBRARIES = [lm_format_enforcer, xgrammar, outlines_of_xgrammar, outlines_of_outlines_core, outlines_of_llguidance]
EVERY = pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)


def greedy(model, inputs, decoder=None, **settings):
    settings = {"max_new_tokens": 60, "do_sample": False, "suppress_tokens": [PAD, BOS, MASK], **settings}
    return model.generate(**inputs, custom_generate=decoder, eos_token_id=EOS, pad_token_id=PAD, **settings)


@EVERY
@EXACT
@BATCH
def test_a_grammar_under_every_exact_decoder(shared_model, prompts, library, decoder, batch_size):
    model, inputs = shared_model("llama"), prompts(*(7, 4, 9, 7)[:batch_size])
    width = inputs["input_ids"].shape[1]
    for language in ({"regex": RECORDS}, {"schema": SCHEMA}):
        stock = greedy(model, inputs, **library(**language))
        assert torch.equal(greedy(model, inputs, decoder, **library(**language)), stock)
        for row in stock[:, width:].tolist():
            text = text_of(row)
            if EOS not in row and "regex" in language:
                text += '{"name":"aa","size":0},]'[(len(text) - 1) % 23 :]
            if EOS in row and "schema" in language:
                json.loads(text)
            elif "regex" in language:
                assert re.fullmatch(RECORDS, text)


@EVERY
def test_speculation_speeds_up_json(shared_model, library):
    example = '[{"name":"ab","size":1},{"name":"cd","size":2},{"name":"ef","size":3},]'
    inputs = {"input_ids": torch.tensor([ids_of(example)])}
    model = shared_model("llama")
    stock = greedy(model, inputs, **library(regex=RECORDS))
    output = greedy(model, inputs, LOOKUP, return_dict_in_generate=True, **library(regex=RECORDS))
    assert torch.equal(output.sequences, stock)
    assert output.tokens_per_forward.item() > 2


@EVERY
def test_drafts_of_forced_tokens_are_accepted(shared_model, prompts, library):
    """A grammar that leaves no choice: whatever the model would say, what repeats itself is drafted right."""
    output = greedy(
        shared_model("llama"), prompts(7), LOOKUP, return_dict_in_generate=True, **library(regex="(abcde){20}")
    )
    assert text_of(output.sequences[0, 7:].tolist()) == "abcde" * 12
    assert output.tokens_per_forward.item() > 4


@EVERY
@pytest.mark.parametrize("decoder", DRAFTING, ids=["mask", "both", "lookup"])
def test_sampled_text_stays_in_the_grammar(shared_model, prompts, library, decoder):
    model, inputs = shared_model("llama"), prompts(7, 4)
    torch.manual_seed(1)
    output = greedy(model, inputs, decoder, do_sample=True, max_new_tokens=47, top_k=20, **library(regex=RECORDS))
    for row in output[:, 7:].tolist():
        assert re.fullmatch(RECORDS, text_of(row) + ("" if EOS in row else "]"))


def test_a_grammar_for_each_place_of_the_batch(shared_model, prompts):
    make = needed("xgrammar") and importlib.import_module("xgrammar.contrib.hf").LogitsProcessor
    compiled = [xgrammar_compiled(f"({word})+") for word in ("abc", "defg", "hi", RECORDS)]
    model, inputs = shared_model("llama"), prompts(7, 4, 9, 7)
    stock = greedy(model, inputs, logits_processor=[make(compiled)])
    for decoder in (NextTokenDecoder(), *DRAFTING):
        assert torch.equal(greedy(model, inputs, decoder, logits_processor=[make(compiled)]), stock)


def test_the_users_own_grammar_stays_at_its_start(shared_model, prompts):
    processor = xgrammar(regex=RECORDS)["logits_processor"][0]
    model, inputs = shared_model("llama"), prompts(7)
    first = greedy(model, inputs, LOOKUP, logits_processor=[processor])
    assert not processor.matchers
    assert torch.equal(greedy(model, inputs, LOOKUP, logits_processor=[processor]), first)


@pytest.mark.parametrize("library", LIBRARIES[1:], ids=lambda library: library.__name__)
def test_a_decoder_that_changes_its_mind_refuses_a_matcher(shared_model, prompts, count_rows, library):
    with pytest.raises(ValueError, match="ResampleDecoder cannot honour .*LogitsProcessor.*NextTokenDecoder can"):
        greedy(shared_model("llama"), prompts(7), ResampleDecoder(iterations=1), **library(regex=RECORDS))
    assert not count_rows


# --- the same without a library: grammars that do not bear what they have ruled out


class Trie:
    """Word ``words[place]`` again and again; raises for a text that has left it, as real ones do."""

    def __init__(self, words, start):
        self.words, self.start = [ids_of(word) for word in words], start

    def __call__(self, place, text):
        word, said = self.words[place], text.tolist()[self.start :]
        if any(token != word[i % len(word)] for i, token in enumerate(said)):
            raise AssertionError(f"place {place} never said {text_of(said)}")
        return [word[len(said) % len(word)]]


@EXACT
def test_a_prefix_function_is_asked_about_its_own_row_and_what_it_allowed(shared_model, prompts, decoder):
    model, inputs = shared_model("llama"), prompts(9, 7, 4)
    trie = Trie(["abc", "defgh", "ij"], 9)
    stock = greedy(model, inputs, max_new_tokens=24, prefix_allowed_tokens_fn=trie)
    assert [text_of(row[:8]) for row in stock[:, 9:].tolist()] == ["abcabcab", "defghdef", "ijijijij"]
    assert torch.equal(greedy(model, inputs, decoder, max_new_tokens=24, prefix_allowed_tokens_fn=trie), stock)
    torch.manual_seed(0)
    sampled = greedy(model, inputs, decoder, max_new_tokens=24, do_sample=True, prefix_allowed_tokens_fn=trie)
    assert torch.equal(sampled, stock)


@EXACT
def test_no_grammar_is_asked_about_what_follows_the_end(shared_model, decoder):
    """The prompt repeats the answer, its EOS and something more, so drafts run beyond the end."""
    answer = ids_of("abcab")
    inputs = {"input_ids": torch.tensor([(answer + [EOS, *ids_of("xyz")]) * 3])}

    def allowed(place, text):
        said = text.tolist()[inputs["input_ids"].shape[1] :]
        assert said == answer[: len(said)]
        return [answer[len(said)] if len(said) < len(answer) else EOS]

    model = shared_model("llama")
    output = greedy(model, inputs, decoder, prefix_allowed_tokens_fn=allowed)
    assert output[0, 27:].tolist() == [*answer, EOS]


class Recorder:
    """Keeps the texts that it is asked about, as no part of its state."""

    seen: set[tuple[int, ...]] = set()

    def __call__(self, ids, scores):
        self.seen.update(map(tuple, ids.tolist()))
        return scores.index_fill(1, ids[0, -2:], 0.0)


@EXACT
def test_nothing_is_asked_about_a_text_that_does_not_come_about(shared_model, prompts, decoder):
    """Every text that a processor is asked about in greedy decoding is one that ``generate`` asks about."""
    model, inputs = shared_model("llama"), prompts(7)
    asked = []
    for runs in (None, decoder):
        Recorder.seen.clear()
        greedy(model, inputs, runs, logits_processor=[Recorder()])
        asked.append({text for text in Recorder.seen if len(text) > 1})  # the trial beforehand is of one token
    assert asked[0] == asked[1]


class Matcher:
    """As one of another language: cannot be deep-copied, forks, refuses what it did not allow."""

    def __init__(self, place=0):
        self.place = place

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle 'Matcher' object")

    def fork(self):
        return Matcher(self.place)

    def accept(self, token):
        assert token == ids_of("xyz")[self.place % 3]
        self.place += 1


class Following:
    """Makes its matchers when it is first asked."""

    kind = Matcher

    def __init__(self):
        self.held = SimpleNamespace(matchers=None)

    def __call__(self, ids, scores):
        if self.held.matchers is None:
            self.held.matchers = [self.kind() for _ in ids]
        else:
            for matcher, row in zip(self.held.matchers, ids.tolist(), strict=True):
                matcher.accept(row[-1])
        allowed = torch.tensor([ids_of("xyz")[matcher.place % 3] for matcher in self.held.matchers])
        return torch.full_like(scores, -torch.inf).scatter(1, allowed[:, None], 0.0)


class Unforkable(Matcher):
    fork = None


class FollowingUnforkable(Following):
    kind = Unforkable


@EXACT
def test_matchers_inside_a_processor_are_forked(shared_model, prompts, decoder):
    model, inputs = shared_model("llama"), prompts(7, 4)
    stock = greedy(model, inputs, logits_processor=[Following()])
    assert torch.equal(greedy(model, inputs, decoder, logits_processor=[Following()]), stock)


def test_a_state_that_cannot_be_copied_is_refused_though_it_is_made_later(shared_model, prompts, count_rows):
    copied(FollowingUnforkable())  # nothing is amiss before it is asked
    with pytest.raises(ValueError, match="cannot honour FollowingUnforkable: it keeps a state.*cannot be copied"):
        greedy(shared_model("llama"), prompts(7, 4), LOOKUP, logits_processor=[FollowingUnforkable()])
    assert not count_rows
