#!/usr/bin/env python3
"""Off-policy updates with the importance weights that EMPG leaves out.

    python studies/importance.py --weights trajectory --updates 4 [the options of empg.py]
    python studies/importance.py --weights clipped --updates 4
    python studies/importance.py --draw PICTURE.png RUN [RUN ...]       runs named KIND-UPDATES-SEED, on one axis
    python studies/importance.py --measure PICTURE.png                  how far EMPG's gradient is off without them

`trajectory` multiplies each term of Eq. 12 by P_θ(τ)/P_θ*(τ). Then an average over samples of θ* has the expectation of
one over samples of θ, at any distance. `clipped` takes the ratio of each token instead, and clips it, as PPO and GRPO
do. Smoothing and baseline stay EMPG's. At the first update on a batch every ratio is 1, and all three gradients are the
same.

With --measure, the base model learns from one and the same batch of the task sums again and again, and EMPG's gradient
is compared with the one that has the weights.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo
from ablations import gradient, load_sums, log_probabilities, sample_batch
from ema_pg import kl_k3
from tables import accuracies

import empg
import eval as scoring


def trajectory_loss(logprobs, old_logprobs, mask, advantages) -> torch.Tensor:
    """-(1/N) Σᵢ Aᵢ ρᵢ, with ρ = P_θ(τ)/P_θ*(τ). As ∇ρ = ρ ∇log P_θ(τ), it has Eq. 12's gradient, each term times ρ.

    (N, T) log-probabilities of the response tokens under π_θ, with gradient, and under π_θ*; (N, T) mask; (N,)
    advantages → a scalar.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(mask == 0, 0).sum(dim=1)
    return -(advantages * log_ratio.exp()).mean()


def clipped_loss(logprobs, old_logprobs, mask, advantages, clip: float = 0.2) -> torch.Tensor:
    """-(1/N) Σᵢ Σₜ min(ρₜ Aᵢ, clamp(ρₜ, 1 - clip, 1 + clip) Aᵢ), with ρₜ = π_θ/π_θ*: `grpo_loss`, summed over tokens.

    Takes and returns what `trajectory_loss` does.
    """
    return -grpo.clipped_gains(logprobs, old_logprobs, mask, advantages, clip).sum(dim=1).mean()


LOSSES = {"trajectory": trajectory_loss, "clipped": clipped_loss}


def replace(kind: str) -> None:
    """Puts the importance weights into empg.py's loss."""
    empg.METHOD = f"EMPG with importance weights {kind}"
    empg.micro_batch_loss = partial(grpo.micro_batch_loss, policy_loss=LOSSES[kind])


def draw(picture: str, runs: list[str]) -> None:
    """Draws accuracy against the number of updates, a line for each kind: after 10 iterations and at the end."""
    from matplotlib.figure import Figure

    # kind → number of updates → for each seed, iteration → accuracy
    found: dict[str, dict[int, list[dict[int, float]]]] = {}
    for run in runs:
        name = re.fullmatch(r"(.+)-(\d+)-(\d+)", Path(run).name)
        if name is None:
            empg.fail(f"--draw {run}: name the runs KIND-UPDATES-SEED")
        kind, updates, _seed = name.groups()
        [[rows]] = scoring.read_runs([run]).values()
        found.setdefault(kind, {}).setdefault(int(updates), []).append(accuracies(rows))
    all_seeds = [seed for by_updates in found.values() for seeds in by_updates.values() for seed in seeds]
    last = max(set.intersection(*map(set, all_seeds)))

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, step in zip(axes, (10, last)):
        for (kind, by_updates), colour, line in zip(found.items(), scoring.COLOURS, scoring.LINES):
            updates = sorted(by_updates)
            values = [[seed[step] for seed in by_updates[number]] for number in updates]  # for each number, its seeds
            means = [np.mean(seeds) for seeds in values]
            low = [min(seeds) for seeds in values]
            high = [max(seeds) for seeds in values]
            axis.plot(updates, means, line, color=colour, marker="o", markersize=3, label=kind)
            axis.fill_between(updates, low, high, color=colour, alpha=0.2)
        axis.set(title=f"after {step} iterations", xlabel="updates on a batch", xscale="log")
        ticks = sorted({number for by_updates in found.values() for number in by_updates})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    axes[0].set(ylabel="held-out accuracy")
    axes[0].legend(frameon=False)
    figure.savefig(picture, dpi=200)


# ---- What is missing without the weights, measured on the task sums


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """(Σw)² / (N Σw²) of importance weights: 1 while they are equal, 1/N when one is all. (N,) log w → in (0, 1].

    >>> round(effective_sample_size(torch.tensor([0.0, 1.0])), 3)
    0.824
    """
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item() / len(log_weights)


def distances(model_name: str, seed: int, updates: int, P: int, G: int) -> list[list[float]]:
    """Learns from one batch again and again. Returns a row after 0, 1, … updates.

    A row is [KL(θ* ‖ θ) in nats per response, effective sample size, and the cosine and the ratio of norms of the
    gradient without importance weights to the one with them].
    """
    tokenizer, model, problems = load_sums(model_name)
    trajectories, _ = sample_batch(tokenizer, model, problems, P, G, np.random.default_rng(seed), seed * 10**12)
    advantages = torch.tensor([trajectory["advantage"] for trajectory in trajectories])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    config = empg.Config(device="cpu", dtype="float32")
    old_log_p = log_probabilities(model, trajectories).detach()
    rows = []
    for _ in range(updates + 1):
        log_p = log_probabilities(model, trajectories)
        log_weights = (log_p - old_log_p).detach()
        without = gradient(model, log_p, advantages)
        weighted = gradient(model, log_p, advantages * log_weights.exp())
        row = [
            kl_k3(old_log_p, log_p.detach()).mean().item(),
            effective_sample_size(log_weights),
            torch.cosine_similarity(without, weighted, dim=0).item(),
            (without.norm() / weighted.norm()).item(),
        ]
        rows.append(row)
        empg.update(model, optimizer, trajectories, config)
    return rows


def measure(picture: str, model: str = empg.LAPTOP["model"], seeds=3, updates=40, P=32, G=16) -> None:
    """Prints the mean rows of the seeds, and draws them."""
    from matplotlib.figure import Figure

    found = [distances(model, seed, updates, P, G) for seed in tqdm(range(seeds), "seeds", leave=False)]
    rows = np.mean(found, axis=0)  # (updates + 1, 4)
    line = "after {:2d} updates: KL {:.3f}  ESS {:.3f}  cosine {:.3f}  norm ratio {:.3f}"
    for number in (0, 1, 2, 5, 10, 20, 40):
        if number <= updates:
            print(line.format(number, *rows[number]))

    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axis = figure.subplots()
    for column, label in enumerate(("effective sample size", "cosine", "norm ratio"), 1):
        axis.plot(rows[:, 0], rows[:, column], label=label, linestyle=scoring.LINES[column - 1])
    axis.set(xlabel="KL(θ* ‖ θ), nats per response")
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=200)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = empg.fail
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--weights", choices=LOSSES)
    choice.add_argument("--draw", nargs="+", metavar=("PICTURE.png", "RUN"))
    choice.add_argument("--measure", metavar="PICTURE.png")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.weights:
        replace(chosen.weights)
        empg.main(rest)
        return
    if chosen.measure:
        measure(chosen.measure)
        return
    try:
        draw(chosen.draw[0], chosen.draw[1:])
    except ValueError as error:
        empg.fail(error)


if __name__ == "__main__":
    main()
