"""Fine-tune end to end: a row-gated adapter for the tiny model, on worked additions, then the same text in fewer forwards.

python examples/finetune_tiny.py FOLDER        a minute on a CPU
"""

import itertools
import json
import sys
from pathlib import Path

import setflow
from eval.additions import additions
from finetune import finetune, load_recipe
from setflow.loading import EMBEDDED

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
problems = itertools.islice(additions(seed=0, held_out=False), 300)
lines = (json.dumps({"text": problem.prompt + problem.brief_solution}) for problem in problems)
(folder / "train.jsonl").write_text("\n".join(lines))

overrides = [f"data={folder / 'train.jsonl'}", "held_out=0.1", "measure=null", f"output={folder / 'adapter'}"]
finetune(load_recipe("embedded-gated", [*overrides, f"model={EMBEDDED}", "training.max_steps=20"]))

model, tokenizer = setflow.load_model(folder / "adapter")
inputs = tokenizer("478 + 395 = ?\n", return_tensors="pt")
decoder = setflow.decoder_from_spec("sbd-lossless:block_size=8")
output = model.generate(**inputs, max_new_tokens=60, custom_generate=decoder, return_dict_in_generate=True)
assert output.sequences.equal(model.generate(**inputs, max_new_tokens=60, do_sample=False))
print(f"{float(output.tokens_per_forward[0]):.2f} tokens per forward after 20 steps")
