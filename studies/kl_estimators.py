#!/usr/bin/env python3
"""Bias and variance of estimators of KL(π_θ ‖ π_ref), as values and as losses, by enumeration.

    python studies/kl_estimators.py [PICTURE.png]       half a minute

There is one position and a vocabulary of 12 tokens. The logits of policy and reference are standard normal. A token x is
drawn from the policy, and each estimator gives a value and a gradient for it. Summing over all 12 tokens, with their
probabilities, gives the exact mean and variance. The figures are means over 200 such pairs of distributions.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ema_pg import k3, kl_topk
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg
import eval as scoring

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
    logits = logits.detach().requires_grad_()
    kl = empg.kl_divergence(logits, ref_logits)
    kl_gradient = torch.autograd.grad(kl, logits)[0]

    pi = logits.detach().softmax(dim=-1)
    values, gradients = [], []
    for token in range(len(logits)):
        value = estimator(logits, ref_logits, torch.tensor(token))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, logits)[0])
    values, gradients = torch.stack(values), torch.stack(gradients)  # (V,) and (V, V)

    mean = (pi * values).sum()
    deviation = (pi * (values - mean).square()).sum().sqrt()
    mean_gradient = pi @ gradients
    gradient_deviation = (pi * (gradients - mean_gradient).square().sum(dim=1)).sum().sqrt()
    of_value = [(mean - kl).abs() / kl, deviation / kl]
    of_gradient = [(mean_gradient - kl_gradient).norm(), gradient_deviation]
    return [x.item() for x in of_value] + [(x / kl_gradient.norm()).item() for x in of_gradient]


def study(estimator: Callable, pairs: int) -> np.ndarray:
    """The mean of `errors` over pairs of distributions."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, VOCABULARY, dtype=torch.float64, generator=generator)
    return np.mean([errors(estimator, draw(), draw()) for _ in range(pairs)], axis=0)


def main(picture: str = "kl_estimators.png", pairs: int = 200) -> None:
    from matplotlib.figure import Figure

    ks = range(VOCABULARY + 1)
    found = {
        "top-k": [study(partial(kl_topk, k=k), pairs) for k in tqdm(ks, "top-k", leave=False)],
        "top-k, logarithm detached": [study(partial(kl_topk_detached, k=k), pairs) for k in ks],
        "k3": [study(k3, pairs)] * len(ks),
    }
    print("                               k   value: bias  deviation   gradient: bias  deviation")
    for name, rows in found.items():
        for k in (0, 1, 2, 4, 8, 11, 12) if name != "k3" else (0,):
            shown = "-" if name == "k3" else k
            print("{:28s} {:>3}         {:7.4f}    {:7.3f}          {:7.4f}    {:7.3f}".format(name, shown, *rows[k]))

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = ((1, "value: standard deviation / KL"), (2, "gradient: bias"), (3, "gradient: standard deviation"))
    for (name, rows), colour, line in zip(found.items(), scoring.COLOURS, ("-", "--", ":")):
        for axis, (column, label) in zip(axes, panels):
            axis.plot(ks, [row[column] for row in rows], line, color=colour, label=name)
            axis.set(xlabel="k", ylabel=label)
    for axis in axes:
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=200)


if __name__ == "__main__":
    main(*sys.argv[1:])
