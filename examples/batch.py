"""A batch of prompts of different lengths: padded on the left, each answer as if it had been alone."""

import setflow
from sbd import SelfSpeculativeDecoder

model, tokenizer = setflow.load_embedded()
tokenizer.padding_side = "left"
prompts = ["12 + 34 = ?\n", "478 + 395 = ?\n", "56 + 7 = ?\n"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
decoder = SelfSpeculativeDecoder(block_size=8)
output = model.generate(**inputs, max_new_tokens=100, custom_generate=decoder, return_dict_in_generate=True)
texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
for text, speed in zip(texts, output.tokens_per_forward, strict=True):
    print(f"--- {float(speed):.2f} tokens per forward\n{text}")
