#!/usr/bin/env python3
"""What the baseline and the missing importance weights do to the gradient, on the task sums.

    python studies/gradients.py [PICTURE.png]       five minutes on two cores

First the policy stays as it is, and fresh batches give the gradient's variance with each baseline, relative to the squared
norm of its mean. Then it learns from one batch again and again, and EMPG's gradient is compared with the one that has the
importance weights w = P_θ(τ)/P_θ*(τ) of the same trajectories.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from ablations import baseline
from ema_pg import kl_k3
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg
import eval as scoring

BASELINES = ("loo", "group", "batch", "none")


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """(Σw)² / (N Σw²) of importance weights: 1 while they are equal, 1/N when one is all. (N,) log w → a share in (0, 1].

    >>> round(effective_sample_size(torch.tensor([0.0, 1.0])), 3)
    0.824
    """
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item() / len(log_weights)


def gradient(model, log_p: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The gradient of -mean(advantages · log P_θ(τ)), all parameters in one vector."""
    loss = empg.empg_loss(log_p[:, None], torch.ones_like(log_p)[:, None], advantages.flatten().to(log_p))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def log_probabilities(model, trajectories: list[dict]) -> torch.Tensor:
    """(N,) log P_θ(τ) of each trajectory, with gradient."""
    prompts = [trajectory["prompt"] for trajectory in trajectories]
    responses = [trajectory["response"] for trajectory in trajectories]
    logprobs, _mask = empg.log_probs(model, prompts, responses)
    return logprobs.sum(dim=1)


def load_sums(model_name: str):
    """Tokenizer, model and training problems of the task sums."""
    tokenizer, model = empg.load_model(model_name, torch.float32)
    problems = empg.TASKS["sums"].problems(None, "train")
    empg.add_prompts(problems, empg.TASKS["sums"], tokenizer)
    return tokenizer, model, problems


def sample_batch(tokenizer, model, problems, P: int, G: int, rng, seed: int) -> tuple[list[dict], torch.Tensor]:
    """The trajectories of P random problems, G for each, and their smoothed rewards, (P, G)."""
    chosen = [problems[i] for i in rng.choice(len(problems), P, replace=False)]
    config = empg.Config(num_samples=G, max_new_tokens=40, sample_batch=P * G)
    rows = empg.sample_trajectories(model, tokenizer, empg.TASKS["sums"], chosen, config, seed)
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    return rows, empg.smooth_rewards(rewards).view(P, G)


def variances(model, batches) -> dict[str, float]:
    """The variance of the gradient over batches, relative to the squared norm of its mean, for each baseline."""
    found: dict[str, list] = {kind: [] for kind in BASELINES}
    for trajectories, rewards in batches:
        log_p = log_probabilities(model, trajectories)
        for kind in BASELINES:
            found[kind].append(gradient(model, log_p, baseline(rewards, kind)))
    relative = {}
    for kind, gradients in found.items():
        stacked = torch.stack(gradients)  # (batches, parameters)
        relative[kind] = (stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum()).item()
    return relative


def distances(model, trajectories: list[dict], rewards: torch.Tensor, updates: int) -> list[list[float]]:
    """Learns from one batch again and again. A row after 0, 1, ... updates: KL(θ* ‖ θ) in nats per response, effective sample
    size, and the cosine and the ratio of norms of the gradient without importance weights to the one with them."""
    advantages = empg.subtract_baseline(rewards).flatten()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0)
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
        # The step that EMPG would take.
        sizes = [parameter.numel() for parameter in model.parameters()]
        for parameter, g in zip(model.parameters(), without.split(sizes)):
            parameter.grad = g.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return rows


def study(model_name: str, seed: int, batches: int, updates: int, P: int = 32, G: int = 16) -> tuple[dict, list]:
    """What `variances` and `distances` find with one seed."""
    tokenizer, model, problems = load_sums(model_name)
    rng = np.random.default_rng(seed)

    def draw(number: int) -> tuple[list[dict], torch.Tensor]:
        return sample_batch(tokenizer, model, problems, P, G, rng, seed * 10**12 + number * 10**6)

    variance = variances(model, (draw(number) for number in range(batches)))
    return variance, distances(model, *draw(batches), updates)


def main(picture: str = "gradients.png", model: str = empg.LAPTOP["model"], seeds=3, batches=20, updates=40) -> None:
    from matplotlib.figure import Figure

    found = [study(model, seed, batches, updates) for seed in tqdm(range(seeds), "seeds", leave=False)]
    by_kind = {kind: [variance[kind] for variance, _ in found] for kind in BASELINES}
    for kind, values in by_kind.items():
        deviation = np.std(values, ddof=1) if seeds > 1 else 0.0
        print(f"baseline {kind:6s} variance / |mean|² {np.mean(values):.3f} ± {deviation:.3f}")
    rows = np.mean([distance for _, distance in found], axis=0)  # (updates + 1, 4)
    line = "after {:2d} updates: KL {:.3f}  ESS {:.3f}  cosine {:.3f}  norm ratio {:.3f}"
    for update in (0, 1, 2, 5, 10, 20, 40):
        if update <= updates:
            print(line.format(update, *rows[update]))

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(BASELINES, [np.mean(by_kind[kind]) for kind in BASELINES], color=scoring.COLOURS[0])
    left.set(ylabel="variance / |mean gradient|²", xlabel="baseline")
    for column, label in enumerate(("effective sample size", "cosine", "norm ratio"), 1):
        right.plot(rows[:, 0], rows[:, column], label=label, linestyle=scoring.LINES[column - 1])
    right.set(xlabel="KL(θ* ‖ θ), nats per response", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(picture, dpi=200)


if __name__ == "__main__":
    main(*sys.argv[1:])
