"""A stock model decodes faster at once: prompt lookup drafts, the model verifies, the text stays the same."""

import setflow
from sbd import SelfSpeculativeDecoder

model, tokenizer = setflow.load_embedded()  # or setflow.load_model("PATH"), or from_pretrained
inputs = tokenizer("478 + 395 = ?\n", return_tensors="pt")
settings = {"max_new_tokens": 100, "do_sample": False, "return_dict_in_generate": True}

stock = model.generate(**inputs, **settings)
ours = model.generate(**inputs, **settings, custom_generate=SelfSpeculativeDecoder(draft="prompt_lookup"))

assert ours.sequences.tolist() == stock.sequences.tolist()
print(tokenizer.decode(ours.sequences[0], skip_special_tokens=True))
print(f"{float(ours.tokens_per_forward[0]):.2f} tokens per forward")
