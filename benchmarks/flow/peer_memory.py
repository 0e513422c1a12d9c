"""Peak memory of the Euler sampler of flow_matching and of ours, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.flow.euler import Peer, fixed_network, make_source, run_ours, start_text
from eval.bench.memory import process_memory, start_counting


def compare_memory(folder: Path, name: str, vocab_size: int, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Peak bytes above the idle process, which holds libraries and logits; each in a process of its own."""
    settings = [str(folder), name, *map(str, (vocab_size, batch, length, steps))]
    peaks = {}
    for who in ("ours", "theirs"):
        command = [sys.executable, "-m", "benchmarks.flow.peer_memory", who, *settings]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[who] = json.loads(run.stdout.splitlines()[-1])
    return {
        "ours_peak_mib": round(peaks["ours"] / 2**20, 1),
        "theirs_peak_mib": round(peaks["theirs"] / 2**20, 1),
        "memory_ratio": round(peaks["ours"] / peaks["theirs"], 4),
    }


def peak_of_one_run(who: str, folder: str, name: str, vocab_size: int, batch: int, length: int, steps: int) -> int:
    """Bytes of one run above the idle process, after a short one that loads what is loaded late."""
    run = run_ours if who == "ours" else Peer(Path(folder)).run
    small = make_source(name, 64)
    run(fixed_network(64, batch, length, small), small, start_text(small, batch, length), steps)
    source = make_source(name, vocab_size)
    network, x = fixed_network(vocab_size, batch, length, source), start_text(source, batch, length)
    idle = start_counting("cpu")
    run(network, source, x, steps)
    return process_memory("VmHWM") - idle


if __name__ == "__main__":
    print(json.dumps(peak_of_one_run(*sys.argv[1:4], *map(int, sys.argv[4:]))))
