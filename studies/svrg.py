#!/usr/bin/env python3
"""Variance-reduced policy gradient: several updates on a batch, each along the gradient of a part of it.

    python studies/svrg.py --parts 4 [the options of empg.py]                      with the control variate
    python studies/svrg.py --parts 4 --no-control-variate [...]                    without
    python studies/svrg.py --measure PICTURE.png                                   variance and cosine of the gradients

The gradient g_B(θ) of a part B of the batch D is a noisy estimate of that of the whole, g_D(θ). SVRG (Johnson and Zhang
2013; for policy gradients Xu, Liu and Peng 2017) corrects it by how far the same part was off at θ*, where both are
known:

    g_B(θ) - g_B(θ*) + g_D(θ*).

Its mean over the parts is g_D(θ), too. It has little variance while θ is near θ*, since g_B(θ) is then near g_B(θ*).
"""

import argparse
import math
import sys
from dataclasses import replace as changed
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ablations
from ema_pg import updates_done

import empg
import eval as scoring

empg_update = empg.update


def gradient(policy, trajectories, config, reference=None) -> tuple[list[Tensor], dict]:
    """The gradient that `empg.update` would follow, before it is clipped, and its statistics. θ stays as it is."""
    found: list[Tensor] = []
    # An optimizer with a learning rate of 0 leaves θ as it is. Before its step it shows us the gradient.
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.extend(each.grad.clone() for each in policy.parameters()))
    statistics = empg_update(policy, optimizer, trajectories, changed(config, max_grad_norm=math.inf), reference)
    # It makes no step if all advantages are 0.
    return found or [torch.zeros_like(each) for each in policy.parameters()], statistics


def random_parts(trajectories: list, parts: int, seed) -> list[list]:
    """Splits trajectories at random into so many parts of equal size, up to one."""
    order = np.random.default_rng(seed).permutation(len(trajectories))
    return [[trajectories[i] for i in order[part::parts]] for part in range(parts)]


def update(policy, optimizer, trajectories, config, reference=None, *, parts: int, control_variate: bool) -> dict:
    """In place of `empg.update`: one update of θ for each part of the batch.

    With the control variate it keeps a gradient of the size of θ for each part, and for the whole.
    """
    # With the number of updates as a seed, every batch is split in another way, and in a resumed run, too.
    split = random_parts(trajectories, parts, [config.seed, updates_done(policy, optimizer)])

    # 1) Take every part's gradient at θ*, which is where θ is now. Their mean is the gradient of the whole batch.
    if control_variate:
        at_old = [gradient(policy, part, config, reference)[0] for part in split]
        shares = [len(part) / len(trajectories) for part in split]
        whole = [sum(share * g for share, g in zip(shares, tensors)) for tensors in zip(*at_old)]

    # 2) Make one update for each part. (At the first one θ has not moved, so its gradient is computed a second time.)
    for number, part in enumerate(split):
        direction, statistics = gradient(policy, part, config, reference)
        if control_variate:
            triples = zip(direction, at_old[number], whole)
            direction = [g - g_old + g_whole for g, g_old, g_whole in triples]
        for parameter, g in zip(policy.parameters(), direction):
            parameter.grad = g
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if math.isfinite(statistics["grad_norm"]):
            optimizer.step()
        optimizer.zero_grad()

    return statistics


# ---- What the control variate does to the gradient, measured on the task sums

DISTANCES = (1, 3, 7, 15)  # updates since θ*
SIZES = (8, 16, 32, 64, 128, 256)  # trajectories in a part


def trajectory_gradients(model, trajectories: list[dict]) -> Tensor:
    """(N, parameters): minus the term of each trajectory in Eq. 12, whose mean over a part is the part's gradient."""
    rows = []
    for trajectory in trajectories:
        log_p = ablations.log_probabilities(model, [trajectory])
        rows.append(ablations.gradient(model, log_p, torch.tensor([trajectory["advantage"]])))
    return torch.stack(rows)


def noise_of_parts(gradients: Tensor, size: int, draws: int, rng) -> list[float]:
    """[variance / |g_D|², cosine to g_D] of the means of random parts of so many of (N, parameters) gradients."""
    parts = np.stack([rng.choice(len(gradients), size, replace=False) for _ in range(draws)])  # (draws, size)
    # (draws, N): a row has 1/size for each member of its part, so that its product with the gradients is their mean.
    averaging = torch.zeros(draws, len(gradients)).scatter_(1, torch.tensor(parts), 1 / size)
    estimates = averaging @ gradients  # (draws, parameters)
    whole = gradients.mean(dim=0)
    variance = (estimates - whole).square().sum(dim=1).mean() / whole.square().sum()
    cosine = torch.cosine_similarity(estimates, whole[None]).mean()
    return [variance.item(), cosine.item()]


def study(model_name: str, seed: int, draws: int, prompts: int, sizes) -> dict:
    """{(updates since θ*, with or without): what `noise_of_parts` finds, one row for each size of a part}."""
    tokenizer, model, problems = ablations.load_sums(model_name)
    rng = np.random.default_rng(seed)
    trajectories, _ = ablations.sample_batch(tokenizer, model, problems, prompts, 16, rng, seed * 10**12)
    at_old = trajectory_gradients(model, trajectories)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    config = empg.Config(device="cpu", dtype="float32")
    found = {}
    for updates in range(1, max(DISTANCES) + 1):
        empg_update(model, optimizer, trajectories, config)
        if updates in DISTANCES:
            now = trajectory_gradients(model, trajectories)
            found[updates, False] = [noise_of_parts(now, size, draws, rng) for size in sizes]
            # The mean of these over a part is g_B(θ) - g_B(θ*) + g_D(θ*).
            corrected = now - at_old + at_old.mean(dim=0)
            found[updates, True] = [noise_of_parts(corrected, size, draws, rng) for size in sizes]
    return found


def measure(picture: str, model=empg.LAPTOP["model"], seeds=3, draws=100, prompts=32, sizes=SIZES) -> None:
    """Prints the table and draws the picture."""
    from matplotlib.figure import Figure

    studies = [study(model, seed, draws, prompts, sizes) for seed in tqdm(range(seeds), "seeds", leave=False)]
    found = {key: np.mean([each[key] for each in studies], axis=0) for key in studies[0]}
    print("updates since θ*, gradient            | variance / |g_D|² (cosine to g_D) by trajectories in a part")
    print(" " * 38 + "|" + "".join(f"{size:>16}" for size in sizes))
    for (updates, corrected), rows in found.items():
        name = f"{updates:2}, {'with' if corrected else 'without'} the control variate"
        print(f"{name:38}|" + "".join(f"{variance:8.3f} ({cosine:.3f})" for variance, cosine in rows))

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (updates, corrected), rows in found.items():
        colour = scoring.COLOURS[DISTANCES.index(updates)]
        style = {"color": colour, "linestyle": "-" if corrected else ":", "marker": "o", "markersize": 3}
        name = f"{'SVRG' if corrected else 'plain'}, {updates} {'updates' if updates > 1 else 'update'} from θ*"
        left.plot(sizes, rows[:, 0], label=name, **style)
        right.plot(sizes, rows[:, 1], **style)
    left.set(xscale="log", yscale="log", ylabel="variance / |gradient of the batch|²")
    right.set(xscale="log", ylabel="cosine to the gradient of the batch", ylim=(0, 1.02))
    for axis in (left, right):
        axis.set(xlabel="trajectories in a part", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize="small")
    figure.savefig(picture, dpi=200)


def replace(parts: int, control_variate: bool) -> None:
    """Makes empg.py learn from a batch in parts."""
    empg.update = partial(update, parts=parts, control_variate=control_variate)
    empg.METHOD = f"EMPG in {parts} parts, {'with' if control_variate else 'without'} control variate"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = empg.fail
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--no-control-variate", action="store_true")
    parser.add_argument("--measure", metavar="PICTURE.png")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.parts < 1:
        empg.fail(f"--parts {chosen.parts}: must be at least 1")
    if chosen.measure:
        measure(chosen.measure)
        return
    replace(chosen.parts, control_variate=not chosen.no_control_variate)
    empg.main(rest)


if __name__ == "__main__":
    main()
