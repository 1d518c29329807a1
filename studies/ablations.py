#!/usr/bin/env python3
"""What each piece of EMPG does: empg.py with one of them replaced.

python studies/ablations.py --smoothing none [the options of empg.py]     rewards as they are
python studies/ablations.py --baseline none                               or group, or batch
python studies/ablations.py --updates 4                                   several updates on each batch
python studies/ablations.py --graded                                      a reward that is no yes or no
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg


def graded(response: str, answer: str) -> float:
    """Minus how far off the answer is; without a number, as far as the largest answer, 36."""
    given = response.rpartition("#")[2]
    return -abs(float(given) - float(answer)) if given.isdigit() else -36.0


def replace(smoothing: str, baseline: str, updates: int, is_graded: bool) -> None:
    """Puts the pieces in place of empg.py's own."""
    one_update = empg.update
    if smoothing == "none":
        empg.smooth_rewards = lambda rewards: rewards
    empg.subtract_baseline = partial(empg.subtract_baseline, kind=baseline)
    empg.update = lambda *args: [one_update(*args) for _ in range(updates)][-1]
    if is_graded:
        empg.TASKS["sums"] = dataclasses.replace(empg.TASKS["sums"], reward=graded)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--smoothing", choices=("sigmoid", "none"), default="sigmoid")
    parser.add_argument("--baseline", choices=("loo", "group", "batch", "none"), default="loo")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--graded", action="store_true")
    chosen, rest = parser.parse_known_args()
    replace(chosen.smoothing, chosen.baseline, chosen.updates, chosen.graded)
    empg.main(rest)
