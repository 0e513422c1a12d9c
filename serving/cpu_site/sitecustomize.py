"""Lets vLLM's Model Runner V2 start on a machine without a GPU: its Triton kernels run in Triton's interpreter.

vLLM for CPUs asks Triton for a "cpu" backend, which the package on the index does not have; with TRITON_INTERPRET=1 none is
needed, so one that does nothing is named. Python reads this file in every process whose PYTHONPATH holds its folder.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        import types

        from triton.backends import backends
    except ImportError:
        pass
    else:

        class _NoDriver:
            @staticmethod
            def is_active() -> bool:
                return False

        backends.setdefault("cpu", types.SimpleNamespace(driver=_NoDriver, compiler=None))
