#!/usr/bin/env python3
"""What each piece of EMPG does: empg.py with one of them replaced.

    python studies/ablations.py --smoothing none [the options of empg.py]     rewards as they are
    python studies/ablations.py --baseline none                               or group, or batch
    python studies/ablations.py --graded                                      a reward that is no yes or no
    python studies/ablations.py --measure                                     the variance of the gradient

With --measure nothing is trained. It takes the gradient of the base model on fresh batches of the task sums, with each
baseline, and prints its variance over the batches, as a share of the squared norm of its mean.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tables import cell

import empg

BASELINES = ("loo", "group", "batch", "none")

leave_one_out = empg.subtract_baseline


def baseline(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """`empg.subtract_baseline` with other baselines: (P, G) rewards, prompts × samples → (P, G) advantages.

    `loo` subtracts the mean of the prompt's other samples, `group` the mean of all of the prompt's samples, `batch` the
    mean of everything, `none` nothing. A mean that has τ itself in it shrinks the expected gradient: that of the prompt
    to (G-1)/G of it, that of the batch to (N-1)/N. Advantages of equal rewards of a prompt are exactly 0 with `loo` and
    `group`.

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


# ---- Gradients of the base model on the task sums, which importance.py and svrg.py measure, too


def load_sums(model_name: str):
    """Tokenizer, model and training problems of the task sums."""
    tokenizer, model = empg.load_model(model_name, torch.float32)
    problems = empg.TASKS["sums"].problems(None, "train")
    empg.add_prompts(problems, empg.TASKS["sums"], tokenizer)
    return tokenizer, model, problems


def sample_batch(tokenizer, model, problems, P: int, G: int, rng, seed: int) -> tuple[list[dict], torch.Tensor]:
    """The trajectories of P random problems, G for each, with EMPG's advantages; and their smoothed rewards, (P, G)."""
    chosen = [problems[i] for i in rng.choice(len(problems), P, replace=False)]
    config = empg.Config(num_samples=G, max_new_tokens=40, sample_batch=P * G)
    trajectories = empg.sample_trajectories(model, tokenizer, empg.TASKS["sums"], chosen, config, seed)
    rewards = torch.tensor([trajectory["reward"] for trajectory in trajectories])
    smoothed = empg.smooth_rewards(rewards).view(P, G)
    for trajectory, advantage in zip(trajectories, leave_one_out(smoothed).flatten().tolist()):
        trajectory["advantage"] = advantage
    return trajectories, smoothed


def log_probabilities(model, trajectories: list[dict]) -> torch.Tensor:
    """(N,) log P_θ(τ) of each trajectory, with gradient."""
    prompts = [trajectory["prompt"] for trajectory in trajectories]
    responses = [trajectory["response"] for trajectory in trajectories]
    logprobs, _mask = empg.log_probs(model, prompts, responses)
    return logprobs.sum(dim=1)


def gradient(model, log_p: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The gradient of -mean(advantages · log P_θ(τ)), all parameters in one vector."""
    loss = -(advantages.flatten() * log_p).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def variances(model_name: str, seed: int, batches: int, P: int, G: int) -> dict[str, float]:
    """For each baseline, the variance of the gradient over batches, relative to the squared norm of its mean."""
    tokenizer, model, problems = load_sums(model_name)
    rng = np.random.default_rng(seed)
    gradients: dict[str, list] = {kind: [] for kind in BASELINES}
    for number in range(batches):
        batch_seed = seed * 10**12 + number * 10**6
        trajectories, rewards = sample_batch(tokenizer, model, problems, P, G, rng, batch_seed)
        log_p = log_probabilities(model, trajectories)
        for kind in BASELINES:
            gradients[kind].append(gradient(model, log_p, baseline(rewards, kind)))

    found = {}
    for kind in BASELINES:
        rows = torch.stack(gradients[kind])  # (batches, parameters)
        found[kind] = (rows.var(dim=0).sum() / rows.mean(dim=0).square().sum()).item()
    return found


def measure(model: str = empg.LAPTOP["model"], seeds: int = 3, batches: int = 20, P: int = 32, G: int = 16) -> None:
    """Prints the variance with each baseline."""
    found = [variances(model, seed, batches, P, G) for seed in tqdm(range(seeds), "seeds", leave=False)]
    for kind in BASELINES:
        print(f"baseline {kind:6s} variance / |mean|² {cell([of_seed[kind] for of_seed in found])}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = empg.fail
    parser.add_argument("--smoothing", choices=("sigmoid", "none"), default="sigmoid")
    parser.add_argument("--baseline", choices=BASELINES, default="loo")
    parser.add_argument("--graded", action="store_true")
    parser.add_argument("--measure", action="store_true")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.measure:
        measure()
        return
    replace(chosen.smoothing, chosen.baseline, chosen.graded)
    empg.main(rest)


if __name__ == "__main__":
    main()
