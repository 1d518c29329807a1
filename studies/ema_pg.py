#!/usr/bin/env python3
"""EMA Policy Gradient (arXiv 2602.04417) on empg.py: estimators of the KL, and a reference that follows the policy.

    python studies/ema_pg.py --beta 0.1 --kl k3                                      Schulman's k3, sampled
    python studies/ema_pg.py --beta 0.1 --kl topk --k 32 --ema-decay 0.9             exact over the 32 likeliest tokens
    python studies/ema_pg.py --beta 0.1 --ema-decay 0.9 [the options of empg.py]     exact, as in empg.py
    python studies/ema_pg.py --measure PICTURE.png                                   bias and variance of the estimators

With --ema-decay below 1 the reference is an exponential moving average of the policy: every --ema-every iterations,
θ_ref ← decay · θ_ref + (1 - decay) · θ. Such a run cannot be resumed, since a checkpoint does not have the reference.

With --measure nothing is trained. There is one position, with a vocabulary of 12 tokens and standard normal logits for
policy and reference. A token x is drawn from the policy, and each estimator gives a value and a gradient for it. To sum
over all 12 tokens, with their probabilities, gives the exact mean and variance. The figures are means over 200 such
pairs of distributions.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg
import eval as scoring


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) estimated at each sampled token: r - 1 - log r with r = π_ref / π_θ ("k3", Schulman 2020).

    (N, T) log-probabilities → (N, T) in nats, never negative, on average over tokens of π_θ the KL. As a loss it has
    the gradient of KL(π_ref ‖ π_θ): it pulls to the same point, with another strength.

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
    """The number of updates so far. AdamW counts them, and a checkpoint keeps the number. (At first none is there.)"""
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
    estimates = {"k3": k3, "topk": partial(kl_topk, k=k)}
    names = {"k3": "k3", "topk": f"topk, k = {k}"}
    if kl in estimates:
        empg.micro_batch_loss = partial(micro_batch_loss, estimate=estimates[kl])
        empg.METHOD += f" with the KL by {names[kl]}"
    if decay < 1:
        empg.update = partial(moving_update, empg.update, decay, every)
        empg.METHOD += f" with the reference moving by {decay} every {every} iterations"


# ---- Bias and variance of the estimators, by enumeration


VOCABULARY = 12


def kl_topk_detached(logits: Tensor, ref_logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """The mistake: `kl_topk` with the logarithm detached in the tail, as released code has it.

        Σ_{v∈S} π(v) log(π(v)/ref(v)) + [x ∉ S] ρ stopgrad(log(π(x)/ref(x))),   ρ = π(x) / stopgrad(π(x)) = 1

    Its values are those of `kl_topk`. Its expected gradient lacks the one of the detached logarithm, which is

        Σ_{v∉S} π(v) ∇log π(v) = Σ_{v∉S} ∇π(v) = -∇ Σ_{v∈S} π(v).

    It is 0 only if S is empty or the whole vocabulary.
    """
    log_pi = logits.log_softmax(dim=-1)
    log_pi_x = log_pi.gather(-1, tokens[..., None]).squeeze(-1)
    is_likely = (log_pi.topk(k, dim=-1).indices == tokens[..., None]).any(dim=-1)
    # The value of this is 0, its gradient that of the logarithm.
    lost = log_pi_x - log_pi_x.detach()
    return kl_topk(logits, ref_logits, tokens, k) - lost.masked_fill(is_likely, 0)


def errors(estimator: Callable, logits: Tensor, ref_logits: Tensor) -> list[float]:
    """[bias of the value, its standard deviation, bias of the gradient, its standard deviation] of one draw.

    Those of the value are shares of the KL, those of the gradient shares of the norm of its gradient. (V,) logits.
    """
    size = (len(logits), len(logits))  # a row for each token that may be drawn

    def estimates(logits: Tensor) -> Tensor:
        return estimator(logits.expand(size), ref_logits.expand(size), torch.arange(len(logits)))

    kl = empg.kl_divergence(logits, ref_logits)
    kl_gradient = jacobian(partial(empg.kl_divergence, ref_logits=ref_logits), logits)  # (V,)
    values = estimates(logits)  # (V,)
    gradients = jacobian(estimates, logits)  # (V, V)
    pi = logits.softmax(dim=-1)
    mean = (pi * values).sum()
    deviation = (pi * (values - mean).square()).sum().sqrt()
    mean_gradient = pi @ gradients
    gradient_deviation = (pi * (gradients - mean_gradient).square().sum(dim=1)).sum().sqrt()
    of_value = [(mean - kl).abs() / kl, deviation / kl]
    of_gradient = [(mean_gradient - kl_gradient).norm(), gradient_deviation]
    return [x.item() for x in of_value] + [(x / kl_gradient.norm()).item() for x in of_gradient]


def mean_errors(estimator: Callable, pairs: int) -> np.ndarray:
    """The mean of `errors` over pairs of distributions."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, VOCABULARY, dtype=torch.float64, generator=generator)
    return np.mean([errors(estimator, draw(), draw()) for _ in range(pairs)], axis=0)


def measure(picture: str, pairs: int = 200) -> None:
    """Prints the errors of the estimators, and draws them against k."""
    from matplotlib.figure import Figure

    ks = range(VOCABULARY + 1)
    found = {
        "top-k": [mean_errors(partial(kl_topk, k=k), pairs) for k in tqdm(ks, "top-k", leave=False)],
        "top-k, logarithm detached": [mean_errors(partial(kl_topk_detached, k=k), pairs) for k in ks],
        "k3": [mean_errors(k3, pairs)] * len(ks),  # it has no k
    }
    print("                               k   value: bias  deviation   gradient: bias  deviation")
    row = "{:28s} {:>3}         {:7.4f}    {:7.3f}          {:7.4f}    {:7.3f}"
    for name in ("top-k", "top-k, logarithm detached"):
        for k in (0, 1, 2, 4, 8, 11, 12):
            print(row.format(name, k, *found[name][k]))
    print(row.format("k3", "-", *found["k3"][0]))

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = ((1, "value: standard deviation / KL"), (2, "gradient: bias"), (3, "gradient: standard deviation"))
    for axis, (column, label) in zip(axes, panels):
        for (name, rows), colour, line in zip(found.items(), scoring.COLOURS, ("-", "--", ":")):
            axis.plot(ks, [row[column] for row in rows], line, color=colour, label=name)
        axis.set(xlabel="k", ylabel=label)
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=200)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = empg.fail
    parser.add_argument("--kl", choices=("exact", "topk", "k3"), default="exact")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--ema-decay", type=float, default=1.0)
    parser.add_argument("--ema-every", type=int, default=10)
    parser.add_argument("--measure", metavar="PICTURE.png")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.measure:
        measure(chosen.measure)
        return
    if chosen.ema_decay < 1 and "--resume" in rest:
        empg.fail(f"--ema-decay {chosen.ema_decay}: such a run cannot go on, or restart, so leave out --resume")
    replace(chosen.kl, chosen.k, chosen.ema_decay, chosen.ema_every)
    empg.main(rest)


if __name__ == "__main__":
    main()
