"""Constrained output: only digits may follow. Drafts that break the constraint are never kept, and the text is that of
plain decoding under the same constraint. Grammars of xgrammar, outlines or lm-format-enforcer are passed the same way.
"""

import setflow
from sbd import SelfSpeculativeDecoder

model, tokenizer = setflow.load_embedded()
digits = [i for i in range(len(tokenizer)) if tokenizer.decode(i).strip("\n").isdigit()]
newline = tokenizer("\n", add_special_tokens=False)["input_ids"]


def allowed(batch_id, ids):
    """The ids that may follow ``ids``."""
    return digits + newline


inputs = tokenizer("478 + 395 = ?\n", return_tensors="pt")
settings = {"max_new_tokens": 24, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
decoder = SelfSpeculativeDecoder(block_size=8, draft="both")
output = model.generate(**inputs, **settings, custom_generate=decoder, return_dict_in_generate=True)
assert output.sequences.equal(model.generate(**inputs, **settings))
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(f"{float(output.tokens_per_forward[0]):.2f} tokens per forward")
