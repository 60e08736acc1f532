"""Peak memory of one training step, in this process alone: two MiB figures as JSON.

`before`: model and batch stand, nothing has run; `peak`: after forward and backward.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peers import make_model, our_step, peer_step, without_spans
from workload import choose_setting, make_batch_of


def status_mib(name: str) -> float:
    """A field of this process: VmRSS is resident now, VmHWM was at most.

    `getrusage` would not do: its maximum is inherited from the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Runs one step of ours, or of the peer of this kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", help="ours, or a peer of peers.py")
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    parser.add_argument("--base", action="store_true")
    options = parser.parse_args()
    setting = choose_setting()
    setting = setting.base() if options.base else setting
    batch = without_spans(make_batch_of(setting, options.lengths))
    model = make_model(setting, 0.1)
    if options.kind == "ours":
        step = our_step(setting, model, batch)
    else:
        step = peer_step(setting, model, batch, options.kind)
        del model
    before = status_mib("VmRSS")
    assert bool(torch.isfinite(step()))
    print(json.dumps({"before": before, "peak": status_mib("VmHWM")}))


if __name__ == "__main__":
    main()
