#!/usr/bin/env python3
"""What each piece of EMPG does: empg.py with one of them replaced.

python studies/ablations.py --smoothing none [the options of empg.py]     rewards as they are
python studies/ablations.py --baseline none                               or group, or batch
python studies/ablations.py --graded                                      a reward that is no yes or no
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg

leave_one_out = empg.subtract_baseline


def baseline(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """`empg.subtract_baseline` with other baselines: (P, G) rewards, prompts × samples → (P, G) advantages.

    `loo` subtracts the mean of the prompt's other samples, `group` the mean of all of the prompt's samples, `batch` the mean
    of everything, `none` nothing. A mean that has τ itself in it shrinks the expected gradient: that of the prompt to
    (G-1)/G of it, that of the batch to (N-1)/N. Advantages of equal rewards of a prompt are exactly 0 with `loo` and `group`.

    >>> baseline(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), "group")
    tensor([[ 0.6667, -0.3333, -0.3333],
            [ 0.0000,  0.0000,  0.0000]])
    """
    if kind == "loo":
        return leave_one_out(rewards)
    if kind == "group":
        rewards = rewards - rewards[:, :1]  # equal rewards are exactly 0 here, and so is their mean
        return rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "batch":
        return rewards - rewards.mean()
    if kind == "none":
        return rewards
    raise ValueError(f"baseline {kind!r}: choose loo, group, batch or none")


def graded(response: str, answer: str) -> float:
    """Minus how far off the answer is; without a number, as far as the largest answer, 36."""
    given = response.rpartition("#")[2]
    return -abs(float(given) - float(answer)) if given.isdigit() else -36.0


def replace(smoothing: str, baseline_kind: str, is_graded: bool) -> None:
    """Puts the pieces in place of empg.py's own."""
    reward = "graded" if is_graded else "right or wrong"
    empg.METHOD = f"EMPG with smoothing {smoothing}, baseline {baseline_kind}, reward {reward}"
    if smoothing == "none":
        empg.smooth_rewards = lambda rewards: rewards
    empg.subtract_baseline = partial(baseline, kind=baseline_kind)
    if is_graded:
        empg.TASKS["sums"] = dataclasses.replace(empg.TASKS["sums"], reward=graded)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--smoothing", choices=("sigmoid", "none"), default="sigmoid")
    parser.add_argument("--baseline", choices=("loo", "group", "batch", "none"), default="loo")
    parser.add_argument("--graded", action="store_true")
    chosen, rest = parser.parse_known_args()
    replace(chosen.smoothing, chosen.baseline, chosen.graded)
    empg.main(rest)
