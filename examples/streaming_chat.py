"""A conversation of two turns whose text streams as it is committed; the cache is kept between turns."""

from transformers import TextStreamer

import setflow
from decoding import SlotCache
from sbd import SelfSpeculativeDecoder

model, tokenizer = setflow.load_embedded()
decoder, cache, messages = SelfSpeculativeDecoder(block_size=8), SlotCache(model.config.num_hidden_layers), []
for question in ("12 + 34 = ?", "56 + 78 = ?"):
    print(f"\n> {question}")
    messages.append({"role": "user", "content": question})
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        **inputs,
        max_new_tokens=80,
        custom_generate=decoder,
        past_key_values=cache,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
