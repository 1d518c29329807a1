#!/usr/bin/env python3
"""GRPO, with which the paper compares EMPG, built on empg.py: another advantage and another loss, and nothing else.

    python studies/grpo.py [the options of empg.py]

With --updates K a batch is learned from K times. At the first time θ = θ*: every ratio is 1, and nothing is clipped.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg


def grpo_advantages(rewards: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """(r - mean) / (standard deviation + ε) over each prompt's samples (DeepSeekMath, 4.1.2): (P, G) → (P, G).

    Exactly 0 for a prompt whose samples all have the same reward.

    >>> grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 1.0000, -1.0000, -1.0000,  1.0000]])
    """
    rewards = rewards - rewards[:, :1]  # equal rewards are exactly 0 here, and so is their mean
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, correction=0, keepdim=True) + epsilon)


def clipped_gains(logprobs, old_logprobs, mask, advantages, clip: float = 0.2) -> torch.Tensor:
    """min(ρₜ Aᵢ, clamp(ρₜ, 1 - clip, 1 + clip) Aᵢ) of each token, with ρₜ = π_θ / π_θ*, and 0 on padding.

    (N, T) log-probabilities of the response tokens under π_θ, with gradient, and under π_θ*; (N, T) mask; (N,)
    advantages → (N, T).
    """
    ratio = (logprobs - old_logprobs).masked_fill(mask == 0, 0).exp()
    gain = ratio * advantages[:, None]
    clipped_gain = ratio.clamp(1 - clip, 1 + clip) * advantages[:, None]
    return torch.min(gain, clipped_gain) * mask


def grpo_loss(logprobs, old_logprobs, mask, advantages, clip: float = 0.2) -> torch.Tensor:
    """-(1/N) Σᵢ (1/|τᵢ|) Σₜ min(ρₜ Aᵢ, clamp(ρₜ, 1 - clip, 1 + clip) Aᵢ) (DeepSeekMath, Eq. 3).

    Takes what `clipped_gains` does, and returns a scalar. Where ρ = 1, what is left of the difference to `empg_loss` is
    the mean over tokens, and the advantage.
    """
    gains = clipped_gains(logprobs, old_logprobs, mask, advantages, clip)
    return -(gains.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def micro_batch_loss(policy, micro_batch, config, reference=None, *, policy_loss):
    """As `empg.micro_batch_loss`, with a loss that takes old log-probabilities, too. A KL term stays empg.py's."""
    prompts = [trajectory["prompt"] for trajectory in micro_batch]
    responses = [trajectory["response"] for trajectory in micro_batch]
    logits, tokens, mask = empg.response_logits(policy, prompts, responses, config.temperature)
    logprobs = empg.token_logprobs(logits, tokens, mask)

    # At the first update on a trajectory θ = θ*, so that these are its log-probabilities under θ*. It keeps them for
    # the updates after that.
    for trajectory, values, is_token in zip(micro_batch, logprobs.detach(), mask):
        trajectory.setdefault("old_logprobs", values[is_token])
    old_logprobs = pad_sequence([trajectory["old_logprobs"] for trajectory in micro_batch], batch_first=True)
    advantages = torch.tensor([trajectory["advantage"] for trajectory in micro_batch], device=logprobs.device)
    loss = policy_loss(logprobs, old_logprobs, mask, advantages)
    if reference is None:
        return loss, math.nan
    with torch.no_grad():
        ref_logits, _, _ = empg.response_logits(reference, prompts, responses, config.temperature)
    kl = empg.kl_divergence(logits, ref_logits).sum() / len(micro_batch)
    return loss + config.beta * kl, kl.item()


def replace() -> None:
    """Makes empg.py do GRPO."""
    empg.METHOD = "GRPO"
    empg.smooth_rewards = lambda rewards: rewards
    empg.subtract_baseline = grpo_advantages
    empg.micro_batch_loss = partial(micro_batch_loss, policy_loss=grpo_loss)


if __name__ == "__main__":
    replace()
    empg.main()
