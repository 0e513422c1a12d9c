"""lm-eval's own command line, with the model ``setflow`` and the sandbox added.

    python -m eval run --model setflow --model_args "pretrained=PATH,decoder=sbd:block_size=16;entropy_bound=0.1" \
        --tasks humaneval --confirm_run_unsafe_code

From its first release after 0.4.13 on, ``lm_eval`` itself finds the model by our entry point; the sandbox is only here.

``setflow eval`` is shorter, knows our own tasks and local data, and goes on where it was killed.
"""

from lm_eval.__main__ import cli_evaluate

import eval.model  # noqa: F401 - registers the model
from eval.code_eval import sandboxed_code_eval

if __name__ == "__main__":
    with sandboxed_code_eval():
        cli_evaluate()
