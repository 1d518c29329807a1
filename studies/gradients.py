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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg

BASELINES = ("loo", "group", "batch", "none")


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """(Σw)² / (N Σw²) of importance weights: 1 while they are equal, 1/N when one is all. (N,) log w → a share in (0, 1].

    >>> round(effective_sample_size(torch.tensor([0.0, 1.0])), 3)
    0.824
    """
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item() / len(log_weights)


def gradient(model, log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The gradient of -mean(weights · log P_θ(τ)), all parameters in one vector."""
    loss = empg.empg_loss(log_p[:, None], torch.ones_like(log_p)[:, None], weights.flatten().to(log_p))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def load_sums(model_name: str):
    """Tokenizer, model and training problems of the task sums."""
    tokenizer, model = empg.load_model(model_name, torch.float32)
    problems = empg.TASKS["sums"].problems(None, "train")
    empg.add_prompts(problems, empg.TASKS["sums"], tokenizer)
    return tokenizer, model, problems


def sample_batch(tokenizer, model, problems, P: int, G: int, rng, seed: int) -> tuple[list[dict], torch.Tensor]:
    """The trajectories of P random problems, G for each, and their smoothed rewards, (P, G)."""
    chosen = [problems[i] for i in rng.choice(len(problems), P, replace=False)]
    rows = empg.sample_trajectories(model, tokenizer, empg.TASKS["sums"], chosen, G, 40, P * G, 1.0, seed)
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    return rows, empg.smooth_rewards(rewards).view(P, G)


def study(model_name: str, seed: int, batches: int, updates: int, P: int = 32, G: int = 16) -> tuple[dict, list]:
    """One seed's variance for each baseline, and a row [KL(θ* ‖ θ) in nats per response, effective sample size, cosine and
    norm ratio of the gradient without weights to the one with them] after 0, 1, ... updates on one batch."""
    tokenizer, model, problems = load_sums(model_name)
    rng = np.random.default_rng(seed)

    def draw(batch: int) -> tuple:
        rows, rewards = sample_batch(tokenizer, model, problems, P, G, rng, seed * 10**12 + batch * 10**6)
        return [row["prompt"] for row in rows], [row["response"] for row in rows], rewards

    found: dict[str, list] = {kind: [] for kind in BASELINES}
    for batch in range(batches):
        prompts, responses, rewards = draw(batch)
        log_p = empg.log_probs(model, prompts, responses)[0].sum(1)
        for kind in BASELINES:
            found[kind].append(gradient(model, log_p, baseline(rewards, kind)))
    stacked = {kind: torch.stack(gradients) for kind, gradients in found.items()}
    variance = {kind: (g.var(0).sum() / g.mean(0).square().sum()).item() for kind, g in stacked.items()}

    prompts, responses, rewards = draw(batches)
    weights, distance, old = empg.subtract_baseline(rewards), [], None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(updates + 1):
        log_p = empg.log_probs(model, prompts, responses)[0].sum(1)
        old = log_p.detach() if old is None else old
        log_w = (log_p - old).detach()
        ours, theirs = gradient(model, log_p, weights), gradient(model, log_p, weights.flatten() * log_w.exp())
        kl, ess = kl_k3(old, log_p.detach()).mean().item(), effective_sample_size(log_w)
        cosine = torch.cosine_similarity(ours, theirs, dim=0).item()
        distance.append([kl, ess, cosine, (ours.norm() / theirs.norm()).item()])
        for parameter, g in zip(model.parameters(), ours.split([p.numel() for p in model.parameters()])):
            parameter.grad = g.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return variance, distance


def main(picture: str = "gradients.png", model: str = empg.LAPTOP["model"], seeds=3, batches=20, updates=40) -> None:
    from matplotlib.figure import Figure

    variances, distances = zip(*(study(model, seed, batches, updates) for seed in empg.progress(range(seeds), "seeds")))
    shares = {kind: [variance[kind] for variance in variances] for kind in BASELINES}
    for kind, values in shares.items():
        print(f"baseline {kind:6s} variance / |mean|² {np.mean(values):.3f} ± {np.std(values, ddof=seeds > 1):.3f}")
    rows = np.mean(distances, 0)
    for update in (i for i in (0, 1, 2, 5, 10, 20, 40) if i <= updates):
        print(
            "after {:2d} updates: KL {:.3f}  ESS {:.3f}  cosine {:.3f}  norm ratio {:.3f}".format(update, *rows[update])
        )
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(BASELINES, [np.mean(shares[kind]) for kind in BASELINES], color="#0072B2")
    left.set(ylabel="variance / |mean gradient|²", xlabel="baseline")
    for column, label in enumerate(("effective sample size", "cosine", "norm ratio"), 1):
        right.plot(rows[:, 0], rows[:, column], label=label, linestyle=("-", "--", "-.")[column - 1])
    right.set(xlabel="KL(θ* ‖ θ), nats per response", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(picture, dpi=200)


if __name__ == "__main__":
    main(*sys.argv[1:])
