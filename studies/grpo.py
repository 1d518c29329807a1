#!/usr/bin/env python3
"""GRPO, the paper's baseline, built on empg.py: it has another advantage and another loss, and nothing else.

    python studies/grpo.py [--updates K] [the options of empg.py]

With --updates K a batch is learned from K times. At the first time θ = θ*: every ratio is 1, and nothing is clipped.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg


def grpo_advantages(rewards: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """(r - mean) / (standard deviation + ε) over each prompt's samples (DeepSeekMath, 4.1.2): (P, G) → (P, G).

    Exactly 0 for a prompt whose samples all have the same reward.

    >>> grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 1.0000, -1.0000, -1.0000,  1.0000]])
    """
    return empg.subtract_baseline(rewards, "group") / (rewards.std(1, correction=0, keepdim=True) + epsilon)


def grpo_loss(logprobs, old_logprobs, mask, advantages, clip: float = 0.2) -> torch.Tensor:
    """-(1/N) Σᵢ (1/|τᵢ|) Σₜ min(ρₜ Aᵢ, clamp(ρₜ, 1 - clip, 1 + clip) Aᵢ), with ρₜ = π_θ / π_θ* (DeepSeekMath, Eq. 3).

    (N, T) log-probabilities of the response tokens under π_θ, with gradient, and under π_θ*; (N, T) mask; (N,) advantages →
    a scalar. Where ρ = 1, what is left of the difference to `empg_loss` is the mean over tokens, and the advantage.
    """
    ratio = (logprobs - old_logprobs).masked_fill(mask == 0, 0).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])
    return -((gain * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def replace(updates: int = 1) -> None:
    """Makes empg.py do GRPO, with so many updates on a batch. A KL term stays empg.py's."""
    one_update, baseline, passes = empg.update, empg.subtract_baseline, []  # per pass of the first update: log π_θ*
    place = 0

    def update(*args) -> dict:
        nonlocal place
        passes.clear()
        for _ in range(updates):
            place = 0
            stats = one_update(*args)
        return stats

    def loss(logprobs, mask, advantages):
        nonlocal place
        if place == len(passes):
            passes.append(logprobs.detach())
        place += 1
        return grpo_loss(logprobs, passes[place - 1], mask, advantages)

    empg.update, empg.empg_loss = update, loss
    empg.smooth_rewards = lambda rewards: rewards
    empg.subtract_baseline = lambda rewards, kind=None: baseline(rewards, kind) if kind else grpo_advantages(rewards)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--updates", type=int, default=1)
    chosen, rest = parser.parse_known_args()
    replace(chosen.updates)
    empg.main(rest)
