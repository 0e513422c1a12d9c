"""What ends a run early: Ctrl-C and SIGTERM save a checkpoint, a full disk is told in one sentence."""

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FULL_DISK = ("No space left on device", "file write failed", "failed writing file", "unexpected pos")


class SaveOnInterrupt(TrainerCallback):
    """The first SIGINT or SIGTERM ends the running step, saves a checkpoint and stops; a second one kills as usual.

    Under several processes all of them stop at the same step, whichever got the signal.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside; raises KeyboardInterrupt, which says so, at the end if one was obeyed."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may catch signals
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._before = before
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.interrupted:
            raise KeyboardInterrupt("stopped: a checkpoint is saved, the same command goes on from it")

    def _note(self, number, frame) -> None:
        self.interrupted = True
        signal.signal(number, self._before[number])

    def on_step_end(self, args, state, control, **kwargs):
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self.interrupted), device=self.accelerator.device)
            self.interrupted = bool(self.accelerator.reduce(flag, "sum") > 0)
        if self.interrupted:
            control.should_save = control.should_training_stop = True


@contextmanager
def full_disk_named(output: str, whole: str = "checkpoint") -> Iterator[None]:
    """Turn the many forms in which a full disk shows into one ValueError that names ``output``."""
    try:
        yield
    except Exception as error:  # safetensors and torch.save have exceptions of their own for it
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or any(sign in str(error) for sign in FULL_DISK):
            raise ValueError(
                f"the disk of output {output!r} is full: free some space and give the same command again, the run goes on "
                f"from its last whole {whole}"
            ) from error
        raise
