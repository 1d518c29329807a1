#!/usr/bin/env python3
"""EMA Policy Gradient (arXiv 2602.04417) on empg.py: estimators of the KL, and a reference that follows the policy.

    python studies/ema_pg.py --beta 0.1 --kl k3                                      Schulman's k3, sampled
    python studies/ema_pg.py --beta 0.1 --kl topk --k 32 --ema-decay 0.9             exact over the 32 likeliest tokens
    python studies/ema_pg.py --beta 0.1 --ema-decay 0.9 [the options of empg.py]     exact, as in empg.py

With --ema-decay below 1 the reference is an exponential moving average of the policy: every --ema-every iterations,
θ_ref ← decay · θ_ref + (1 - decay) · θ. Such a run cannot be resumed, since a checkpoint does not have the reference.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) estimated at each sampled token: r - 1 - log r with r = π_ref / π_θ ("k3", Schulman 2020).

    (N, T) log-probabilities → (N, T) in nats, never negative, on average over tokens of π_θ the KL. As a loss it has the
    gradient of KL(π_ref ‖ π_θ): it pulls to the same point, with another strength.

    >>> kl_k3(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.1065]])
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def kl_topk(logits: Tensor, ref_logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """KL(π_θ ‖ π_ref) at each position: exact over the k likeliest tokens S, sampled over the rest.

        Σ_{v∈S} π(v) log(π(v)/ref(v)) + [x ∉ S] ρ log(π(x)/ref(x)),   ρ = π(x) / stopgrad(π(x)) = 1

    (..., V) logits, (...) tokens x sampled from π_θ, k from 0 to V → (...) in nats. On average over x both value and
    gradient are exact at every k: the last logarithm's gradient is that of Σ_{v∉S} π(v).

    >>> kl_topk(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]), k=2)
    tensor([0.1109])
    """
    log_pi = logits.log_softmax(dim=-1)
    log_ratio = log_pi - ref_logits.log_softmax(dim=-1)
    likeliest = log_pi.detach().topk(min(k, logits.shape[-1]), dim=-1).indices
    exact = (log_pi.gather(-1, likeliest).exp() * log_ratio.gather(-1, likeliest)).sum(dim=-1)

    log_pi_x = log_pi.gather(-1, tokens[..., None]).squeeze(-1)
    log_ratio_x = log_ratio.gather(-1, tokens[..., None]).squeeze(-1)
    rho = (log_pi_x - log_pi_x.detach()).exp()
    is_likely = (likeliest == tokens[..., None]).any(dim=-1)
    return exact + (rho * log_ratio_x).masked_fill(is_likely, 0)


def k3(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
    """`kl_k3` of logits, to be called as `kl_topk` is."""
    both = [x.log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1) for x in (logits, ref_logits)]
    return kl_k3(*both)


def micro_batch_loss(policy, micro_batch, config, reference=None, *, estimate: Callable):
    """As `empg.micro_batch_loss`, with an estimate of the KL by the sampled tokens, such as `k3`."""
    prompts = [trajectory["prompt"] for trajectory in micro_batch]
    responses = [trajectory["response"] for trajectory in micro_batch]
    logits, tokens, mask = empg.response_logits(policy, prompts, responses, config.temperature)
    logprobs = empg.token_logprobs(logits, tokens, mask)
    advantages = torch.tensor([trajectory["advantage"] for trajectory in micro_batch], device=logprobs.device)
    loss = empg.empg_loss(logprobs, mask, advantages)
    if reference is None:
        return loss, math.nan
    with torch.no_grad():
        ref_logits, _, _ = empg.response_logits(reference, prompts, responses, config.temperature)
    kl = estimate(logits, ref_logits, tokens).sum() / len(micro_batch)
    return loss + config.beta * kl, kl.item()


def updates_done(policy, optimizer) -> int:
    """The number of updates so far. AdamW counts them, and a checkpoint keeps the number. (At first there is no state.)"""
    state = optimizer.state.get(next(policy.parameters()), {})
    return int(state.get("step", 0))


def moving_update(update, decay: float, every: int, policy, optimizer, trajectories, config, reference=None) -> dict:
    """As `empg.update`; and after every `every` iterations the reference moves towards the policy."""
    statistics = update(policy, optimizer, trajectories, config, reference)
    if reference is not None and updates_done(policy, optimizer) % (every * config.updates) == 0:
        with torch.no_grad():
            for new, old in zip(policy.parameters(), reference.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
    return statistics


def replace(kl: str = "exact", k: int = 32, decay: float = 1.0, every: int = 10) -> None:
    """Puts the pieces in place of empg.py's own."""
    if kl != "exact":
        empg.micro_batch_loss = partial(micro_batch_loss, estimate=k3 if kl == "k3" else partial(kl_topk, k=k))
        empg.METHOD += f" with the KL by {kl}" + (f", k = {k}" if kl == "topk" else "")
    if decay < 1:
        empg.update = partial(moving_update, empg.update, decay, every)
        empg.METHOD += f" with the reference moving by {decay} every {every} iterations"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kl", choices=("exact", "topk", "k3"), default="exact")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--ema-decay", type=float, default=1.0)
    parser.add_argument("--ema-every", type=int, default=10)
    chosen, rest = parser.parse_known_args(argv)
    if chosen.ema_decay < 1 and "--resume" in rest:
        empg.fail(f"--ema-decay {chosen.ema_decay}: such a run cannot go on, or restart, so leave out --resume")
    replace(chosen.kl, chosen.k, chosen.ema_decay, chosen.ema_every)
    empg.main(rest)


if __name__ == "__main__":
    main()
