"""Peak memory of one training step, in this process alone: two MiB figures as JSON.

`before`: model and batch stand, nothing has run; `peak`: after forward and backward.
"""

from __future__ import annotations

import argparse
import json

import torch
from peers import make_model, our_step, peer_step, without_spans
from process_memory import status_mib
from workload import Setting, choose_setting, make_batch_of


def peak_and_present(setting: Setting) -> tuple[float, float]:
    """MiB at most and now: of the GPU's memory where the step runs there, else of this process."""
    if setting.device.type == "cuda":
        peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return peak / 2**20, now / 2**20
    return status_mib("VmHWM"), status_mib("VmRSS")


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
    _, before = peak_and_present(setting)
    assert bool(torch.isfinite(step()))
    print(json.dumps({"before": before, "peak": peak_and_present(setting)[0]}))


if __name__ == "__main__":
    main()
