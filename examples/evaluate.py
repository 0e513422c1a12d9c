"""Evaluate two decoders on a task that needs no data: exact matches, and what an answer costs."""

from eval.run import evaluate
from setflow.loading import EMBEDDED

for decoder in ("ntp", "sbd-lossless:block_size=8"):
    evaluation = evaluate(["additions"], {"pretrained": str(EMBEDDED), "decoder": decoder, "batch_size": 4}, limit=4)
    print(decoder)
    print(evaluation.table())
