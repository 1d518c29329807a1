"""The second half of the lesson: each test states the claim that it proves, on policies small enough to enumerate, on
tiny real models, and on whole runs of the commands. `pytest -q` takes two to three minutes on two cores and needs no network.

A name `test_mistake_X` is that of a mistake that is common in this field: a program that makes it fails this test.
"""

import dataclasses
import doctest
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose more than they gain by a second thread

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)

import empg
import eval as scoring

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared/data"
sys.path += [str(HERE / "studies"), str(HERE / "base")]

import ablations
import behaviours
import ema_pg
import gradients
import grpo
import importance
import kl_estimators
import make as base_recipe
import prompts_once
import svrg
import tables
import word_problems

# ---- Toy policies: every trajectory can be enumerated

# There are three tokens, of which token 0 ends a response, and responses have at most two. So there are seven
# trajectories, and a policy is a table: for each prefix, the logits of the next token.
V = 3
T = 2
TRAJECTORIES = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
PREFIXES = [(), (1,), (2,)]
MASK = torch.tensor([[1.0] * len(t) + [0.0] * (T - len(t)) for t in TRAJECTORIES], dtype=torch.float64)
RIGHT = torch.tensor([0.0, 1, 0, 0, 1, 0, 1], dtype=torch.float64)  # a 0/1 reward for each trajectory
SMOOTHED = 0.3 + 0.5 * RIGHT  # some smoothed reward R̃, which is held fixed


def toy_logits(seed: int, shape=(3, V)) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def toy_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """(prefixes, V) logits, or one (V,) vector shared by all prefixes → (trajectories, T) log-probabilities."""
    table = logits.expand(len(PREFIXES), V).log_softmax(-1)
    zero = torch.zeros((), dtype=logits.dtype)
    rows = []
    for trajectory in TRAJECTORIES:
        row = [table[PREFIXES.index(trajectory[:i]), token] for i, token in enumerate(trajectory)]
        padding = [zero] * (T - len(row))
        rows.append(torch.stack(row + padding))
    return torch.stack(rows)


def probabilities(logprobs: torch.Tensor) -> torch.Tensor:
    """(trajectories, T) log-probabilities of tokens → the probability of each trajectory."""
    return logprobs.sum(1).exp()


def summed_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-Σ_τ weight(τ) log P(τ). `empg_loss` is the mean over the trajectories, so multiply by their number."""
    return empg.empg_loss(logprobs, MASK, len(TRAJECTORIES) * weights)


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def groups_of(logits: torch.Tensor, weigh, group: int = 3):
    """Every group of `group` samples of the toy policy: its probability and its EMPG gradient, with the weights that `weigh`
    gives the numbers of its trajectories."""
    logprobs = toy_logprobs(logits)
    probability = probabilities(logprobs).detach()
    for numbers in itertools.product(range(len(TRAJECTORIES)), repeat=group):
        rows = list(numbers)
        loss = empg.empg_loss(logprobs[rows], MASK[rows], weigh(rows))
        yield probability[rows].prod(), -gradient(loss, logits)


# With one prompt, the batch is its group. So "batch" has the factor of "group" here.
@pytest.mark.parametrize(("kind", "factor"), [("none", 1), ("loo", 1), ("group", 2 / 3), ("batch", 2 / 3)])
def test_expected_gradient_is_the_policy_gradient(kind, factor):
    """At θ = θ* the expected gradient of `empg_loss` is -∇ Σ_τ P(τ) R̃(τ) (Eq. 4 with Eq. 12), for a fixed R̃, by summing over
    all groups of three samples: exactly with leave-one-out, which has less than half of the variance; (G-1)/G of it with
    a mean that has τ in it."""
    logits = toy_logits(3)
    probability = probabilities(toy_logprobs(logits))
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)

    def weigh(rows, kind):
        return ablations.baseline(SMOOTHED[rows][None], kind)[0]

    groups = list(groups_of(logits, functools.partial(weigh, kind=kind)))
    expected = sum(p * direction for p, direction in groups)
    policy_gradient = gradient((probability * SMOOTHED).sum(), logits)
    torch.testing.assert_close(expected, factor * policy_gradient, rtol=1e-10, atol=1e-12)

    def variance(groups):
        return sum(p * (direction - expected).square().sum() for p, direction in groups)

    if kind == "loo":
        assert variance(groups) < 0.5 * variance(groups_of(logits, functools.partial(weigh, kind="none")))


def lower_bound(logits: torch.Tensor, q: torch.Tensor) -> float:
    """Jensen's bound on log J: E_{τ~q}[log R(τ) + log P(τ) - log q(τ)], for q positive on the right trajectories only."""
    right = RIGHT == 1
    log_p = toy_logprobs(logits).sum(1)
    return (q[right] * (log_p[right] - q[right].log())).sum().item()


@pytest.mark.parametrize("shape", [(len(PREFIXES), V), (V,)])
def test_em_never_lowers_the_objective(shape):
    """After an exact E-step (Eq. 8) the bound is log J, and with another q it is not. An M-step on `empg_loss` (Eq. 10)
    raises the bound, and log J at least as far. So it never falls."""
    logits = toy_logits(4, shape)
    assert lower_bound(logits, RIGHT / 3) < (probabilities(toy_logprobs(logits)) * RIGHT).sum().log().item() - 1e-6
    history = []
    for _ in range(8):
        # E-step: the posterior of the trajectory, given that it is right.
        probability = probabilities(toy_logprobs(logits)).detach()
        objective = (probability * RIGHT).sum()
        history.append(objective.log().item())
        posterior = probability * RIGHT / objective
        assert lower_bound(logits, posterior) == pytest.approx(history[-1], abs=1e-12)
        # M-step: fit the policy to it.
        for _ in range(60):
            step = gradient(summed_loss(toy_logprobs(logits), posterior), logits)
            logits = (logits - step).detach().requires_grad_()
        new_objective = (probabilities(toy_logprobs(logits)) * RIGHT).sum().log().item()
        assert history[-1] - 1e-9 <= lower_bound(logits, posterior) <= new_objective + 1e-12
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(history))
    assert history[1] > history[0]
    assert history[-1] > history[0] + 0.1


def test_missing_importance_weights_vanish_with_the_step():
    """Away from θ* the EMPG gradient is not the policy gradient; the gap shrinks in proportion to the distance."""
    old_probability = probabilities(toy_logprobs(toy_logits(5))).detach()
    gaps = []
    for distance in (0.2, 0.1, 0.05, 0.0):
        logits = (toy_logits(5) + distance * toy_logits(6)).detach().requires_grad_()
        logprobs = toy_logprobs(logits)
        followed = -gradient(summed_loss(logprobs, old_probability * RIGHT), logits)
        policy_gradient = gradient((probabilities(logprobs) * RIGHT).sum(), logits)
        gaps.append((followed - policy_gradient).norm().item())
    far, middle, near, none = gaps
    assert far > 0.01
    assert far == pytest.approx(4 * near, rel=0.2)
    assert middle == pytest.approx(2 * near, rel=0.2)
    assert none == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "is_exact"), [(RIGHT, True), (torch.tensor([0.0, 1, 9, 2, 0, 3, 0]).double(), False)]
)
def test_smoothing_keeps_the_direction_for_rewards_of_0_and_1(rewards, is_exact):
    """With smoothing, too, the expected gradient points where ∇J does if rewards are 0 or 1, and not quite there if they are
    scores: by summing over all groups of three samples, each of which is a batch."""
    logits = toy_logits(3)

    def weigh(rows):
        return empg.subtract_baseline(empg.smooth_rewards(rewards[rows])[None])[0]

    expected = sum(p * direction for p, direction in groups_of(logits, weigh))
    probability = probabilities(toy_logprobs(logits))
    policy_gradient = gradient((probability * rewards).sum(), logits)
    cosine = torch.cosine_similarity(expected.flatten(), policy_gradient.flatten(), dim=0).item()
    assert cosine == pytest.approx(1, abs=1e-10) if is_exact else 0.5 < cosine < 0.999


def test_with_a_baseline_stale_samples_can_point_down():
    """Of three responses of one token: far from θ*, a small step along EMPG's expected gradient lowers J."""
    old_probability = torch.tensor([0.3, 0.69, 0.01], dtype=torch.float64)
    rewards = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    logits = torch.tensor([0.01, 0.6, 0.39], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(0)[:, None]
    # The mean over the three is then the expectation under θ*. The baseline is that of infinitely many samples.
    advantages = 3 * old_probability * (rewards - old_probability @ rewards)
    followed = -gradient(empg.empg_loss(logprobs, torch.ones(3, 1), advantages), logits)
    policy_gradient = gradient((logprobs[:, 0].exp() * rewards).sum(), logits)
    assert (followed @ policy_gradient).item() < -1e-3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("right", [1, 8, 13, 15])
def test_mistake_standard_deviation_of_a_sample(right):
    """σ is the population's standard deviation: smoothed 0/1 rewards are those of the formula, u for a wrong response and
    u + s for a right one. With the sample's σ the factor s would be smaller."""
    p = right / 16
    u = sigmoid(-math.sqrt(p / (1 - p)))
    s = sigmoid(math.sqrt((1 - p) / p)) - u
    assert 0.46 < s < 0.55  # as studies/README.md says of the formula
    rewards = torch.tensor([1.0] * right + [0.0] * (16 - right), dtype=torch.float64)
    torch.testing.assert_close(empg.smooth_rewards(rewards).double(), u + s * rewards, rtol=0, atol=1e-7)


def test_smoothing_keeps_the_order_for_any_finite_rewards():
    """Smoothed rewards are float32 from 0 to 1, in the order of the rewards, even where a square would overflow."""
    moderate = torch.linspace(-3, 3, 100)
    assert (empg.smooth_rewards(moderate).diff() > 0).all()
    cases = {
        "one right of 5,000": [0.0] * 5000 + [1.0],
        "one wrong of 5,000": [1.0] * 5000 + [0.0],
        "squares overflow": [3e38, -3e38, 1.0],
        "sums overflow": [3e38, 3e38, 0.0],
        "the smallest float": [1e-45, 0.0, 0.0],
        "integers": [1, 0, 7],
        "nearly equal": [1e30, 1e30 * (1 + 1e-6), 0.0],
    }
    for name, values in cases.items():
        rewards = torch.tensor(values)
        smoothed = empg.smooth_rewards(rewards)
        assert smoothed.dtype == torch.float32, name
        assert (smoothed >= 0).all(), name
        assert (smoothed <= 1).all(), name
        assert (smoothed[rewards.argsort()].diff() >= 0).all(), name
        assert smoothed.max() > smoothed.min(), name


def test_smoothing_of_equal_and_of_bad_rewards():
    """Equal rewards are smoothed to exactly 0.5; no rewards, nan and infinity are refused."""
    for value in (0, 1, 0.1, -3e38):
        assert (empg.smooth_rewards(torch.full((37,), value)) == 0.5).all()
    for rewards in ([], [1.0, math.nan], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="smooth_rewards needs"):
            empg.smooth_rewards(torch.tensor(rewards))


def test_mistake_baseline_with_the_wrong_sign():
    """loo subtracts the mean of the prompt's other samples, group the prompt's mean, batch the mean of everything."""
    rewards = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = torch.empty_like(rewards)
    for i in range(3):
        for j in range(4):
            others[i, j] = np.mean([rewards[i, k].item() for k in range(4) if k != j])
    torch.testing.assert_close(empg.subtract_baseline(rewards), rewards - others)
    torch.testing.assert_close(ablations.baseline(rewards, "loo"), rewards - others)
    torch.testing.assert_close(ablations.baseline(rewards, "group"), rewards - rewards.mean(1, keepdim=True))
    torch.testing.assert_close(ablations.baseline(rewards, "batch"), rewards - rewards.mean())
    assert torch.equal(ablations.baseline(rewards, "none"), rewards)

    with pytest.raises(ValueError, match="choose loo"):
        ablations.baseline(rewards, "mean")
    for shape in ((4,), (4, 1)):
        with pytest.raises(ValueError, match="subtract_baseline needs"):
            empg.subtract_baseline(torch.ones(shape))


@pytest.mark.parametrize(
    "weigh",
    [empg.subtract_baseline, functools.partial(ablations.baseline, kind="group"), grpo.grpo_advantages],
    ids=["loo", "group", "grpo"],
)
def test_equal_rewards_have_advantage_0_to_the_last_bit(weigh):
    """A prompt whose responses are all right or all wrong gets advantages of exactly 0, whatever its sums are rounded to."""
    for num_samples in range(2, 33):
        rewards = torch.full((2, num_samples), 0.6224593)
        rewards[1, 0] = 0.3775407
        advantages = weigh(rewards)
        assert (advantages[0] == 0).all()
        assert (advantages[1] != 0).all()


def test_mistake_mean_over_padding():
    """empg_loss is -(1/N) Σᵢ wᵢ Σₜ log π by hand: tokens are summed, and what stands on padding, even nan, does not count."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, -math.inf]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss = empg.empg_loss(logprobs, mask, torch.tensor([0.5, -1.0]))
    assert loss.item() == pytest.approx(-(0.5 * (-1 - 2 - 3) + -1 * -4) / 2)


def test_mistake_kl_of_the_wrong_direction():
    """kl_divergence is KL(π ‖ ref), by torch.distributions in value and gradient, and not KL(ref ‖ π)."""
    logits = toy_logits(7, (3, 5))
    ref_logits = toy_logits(8, (3, 5)).detach()
    kl = empg.kl_divergence(logits, ref_logits)
    policy = torch.distributions.Categorical(logits=logits)
    reference = torch.distributions.Categorical(logits=ref_logits)
    expected = torch.distributions.kl_divergence(policy, reference)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(gradient(kl.sum(), logits), gradient(expected.sum(), logits))
    assert not torch.allclose(kl, torch.distributions.kl_divergence(reference, policy), rtol=0.01)


def test_k3_has_the_value_of_the_reverse_kl_and_the_gradient_of_the_forward_kl():
    """The expectation of k3 under π is KL(π ‖ ref), but its gradient, as a plain loss, is that of KL(ref ‖ π)."""
    logits = toy_logits(7, (5,))
    log_ref = toy_logits(8, (5,)).detach().log_softmax(0)
    log_pi = logits.log_softmax(0)
    reverse_kl = (log_pi.exp() * (log_pi - log_ref)).sum()
    forward_kl = (log_ref.exp() * (log_ref - log_pi)).sum()
    k3 = ema_pg.kl_k3(log_pi, log_ref)
    assert (k3 >= 0).all()
    assert (ema_pg.kl_k3(log_ref, log_ref) == 0).all()
    assert (log_pi.exp() * k3).sum().item() == pytest.approx(reverse_kl.item(), abs=1e-12)
    gradient_as_loss = gradient((log_pi.exp().detach() * k3).sum(), logits)
    torch.testing.assert_close(gradient_as_loss, gradient(forward_kl, logits))


@pytest.mark.parametrize("k", [0, 1, 2, 4, 8])
def test_topk_kl_is_exact_in_value_and_gradient(k):
    """Enumerated over 8 tokens, kl_topk has on average the KL's value and gradient, at every k."""
    logits = toy_logits(0, (8,))
    ref_logits = toy_logits(9, (8,)).detach()
    pi = logits.softmax(-1)
    kl = (pi * (pi.log() - ref_logits.log_softmax(-1))).sum()
    each_token = torch.arange(8)
    estimates = ema_pg.kl_topk(logits.expand(8, 8), ref_logits.expand(8, 8), each_token, k)
    mean = (pi.detach() * estimates).sum()
    torch.testing.assert_close(mean, kl)
    torch.testing.assert_close(gradient(mean, logits), gradient(kl, logits), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("k", "missing"), [(0, 0), (1, 0.6), (4, 0.4), (11, 0.04), (12, 0)])
def test_mistake_logarithm_of_the_tail_detached(k, missing):
    """With the tail's logarithm detached, as in released code, the KL keeps its value, but its expected gradient loses that
    of the tail's probability: nothing at k = 0 and 12, more than half of the gradient at k = 1."""
    each_token = torch.arange(12)
    shares = []
    for seed in range(20):
        logits = toy_logits(seed, (12,))
        ref_logits = toy_logits(100 + seed, (12,)).detach()
        pi = logits.softmax(-1)
        arguments = logits.expand(12, 12), ref_logits.expand(12, 12), each_token, k
        right = ema_pg.kl_topk(*arguments)
        mistaken = kl_estimators.kl_topk_detached(*arguments)
        torch.testing.assert_close(right, mistaken)
        right_gradient = gradient((pi.detach() * right).sum(), logits)
        mistaken_gradient = gradient((pi.detach() * mistaken).sum(), logits)
        # At k = 0 the tail is everything, at k = 12 nothing. Then its probability is always 1, or 0.
        tail_probability = 1 - pi.topk(k).values.sum()
        is_constant = k in (0, 12)
        lost = torch.zeros(12, dtype=torch.float64) if is_constant else gradient(tail_probability, logits)
        torch.testing.assert_close(right_gradient - mistaken_gradient, lost, rtol=1e-9, atol=1e-12)
        shares.append((lost.norm() / right_gradient.norm()).item())
    assert np.mean(shares) == pytest.approx(missing, abs=0.03 if k == 11 else 0.1)


@pytest.mark.parametrize("module", [empg, scoring, grpo, gradients, ablations, ema_pg, prompts_once])
def test_examples_in_docstrings(module):
    """What the docstrings show is what the functions return."""
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# ---- Tiny real models: sampling and log-probabilities

SMALL = {"vocab_size": 18, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5,
         "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip


def make_model(seed=0, scale=0.5, dtype=torch.float64, kind=Qwen2ForCausalLM, **settings):
    """A two-layer Qwen2 with grouped-query attention, whose predictions are far from uniform; or another kind of model."""
    torch.manual_seed(seed)
    config = kind.config_class(**SMALL | {"initializer_range": scale} | settings)
    return kind(config).to(dtype).eval()


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10], [3, 3, 3, 3, 3, 3, 3, 4]]
RESPONSES = [[5, 6, 1], [1], [7, 7, 7, 7, 7, 7], [2, 9], [4, 1], [3, 4, 5, 6], [9], [1]]  # two for each prompt
PROMPT_OF = [prompt for prompt in PROMPTS for _ in range(2)]  # the prompt of each response
ADVANTAGES = torch.tensor([0.3, -0.2, 0.0, 0.0, 0.1, -0.5, 0.7, 0.2], dtype=torch.float64)
KEPT = [i for i, advantage in enumerate(ADVANTAGES) if advantage != 0]
LIMITS = {"eos_token_id": 1, "pad_token_id": 0}
MODELS = {
    "rotary": {},
    "window": {"kind": MistralForCausalLM, "sliding_window": 3},
    "absolute": {"kind": GPT2LMHeadModel},
}


def flat(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def flat_grad(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def plain_logits(model, prompt, response) -> torch.Tensor:
    """With nothing clever: one sequence, all logits, those that predict the response."""
    return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]


def plain_logprobs(model, prompt, response, temperature=1.0) -> torch.Tensor:
    logprobs = (plain_logits(model, prompt, response) / temperature).log_softmax(-1)
    return logprobs[range(len(response)), response]


def plain_loss(model, advantages, temperature=1.0) -> torch.Tensor:
    """-(1/N) Σ A log P of RESPONSES, each read with its prompt, by itself."""
    pairs = zip(PROMPT_OF, RESPONSES, strict=True)
    terms = [plain_logprobs(model, prompt, response, temperature).sum() for prompt, response in pairs]
    return -(advantages * torch.stack(terms)).mean()


def same_gradient(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (one - two).norm().item() < 1e-6 * two.norm().item()  # norms of layers are computed in float32


def config(**options) -> empg.Config:
    return empg.Config(**{"num_samples": 2, "max_grad_norm": 1e9, "device": "cpu", "dtype": "float32"} | options)


@pytest.mark.parametrize("log_probs", [empg.log_probs, prompts_once.log_probs], ids=["one-pass", "prompts-once"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mistakes_temperature_forgotten_and_wrong_tensor_detached(log_probs, kind, checkpointing):
    """log_probs equals the plain formula, values and gradients: prompts of unequal length, also read once for their
    responses, padding, layers computed again and a temperature change nothing, for any parameter."""
    model = make_model(**MODELS[kind])
    plain_loss(model, ADVANTAGES, 0.7).backward()
    expected_gradient = flat_grad(model)
    expected = [plain_logprobs(model, prompt, response, 0.7) for prompt, response in zip(PROMPT_OF, RESPONSES)]
    model.zero_grad()

    # `distribute` puts the model into float32, in which its weights were drawn. So nothing is lost.
    model = empg.distribute(model, config(gradient_checkpointing=checkpointing)).double()
    rows_read = []
    model.register_forward_pre_hook(lambda module, args: rows_read.append(len(args[0])))
    # Watch whether a layer is computed again. `distribute` wraps its forward, so that a hook on the layer itself would not
    # see the second time. Its first child does.
    layer = next(module for module in model.modules() if type(module).__name__ in model._no_split_modules)
    layer_computed = []
    next(layer.children()).register_forward_pre_hook(lambda module, args: layer_computed.append(True))

    values, mask = log_probs(model, PROMPTS, RESPONSES, 0.7)
    assert mask.sum(1).tolist() == [len(response) for response in RESPONSES]
    assert (values[~mask] == 0).all()
    torch.testing.assert_close(values[mask].double(), torch.cat(expected), rtol=1e-6, atol=2e-6)
    # Prompts are read with their responses in one pass, or once in a pass of their own.
    is_once = log_probs is prompts_once.log_probs
    assert rows_read == ([len(PROMPTS), len(RESPONSES)] if is_once else [len(RESPONSES)])

    passes = len(layer_computed)
    empg.empg_loss(values, mask, ADVANTAGES).backward()
    assert same_gradient(flat_grad(model), expected_gradient)
    assert len(layer_computed) == (2 * passes if checkpointing else passes)


def test_mistake_logits_of_a_neighbouring_column():
    """response_logits gives, response after response, the logits before each token of plain passes, the tokens themselves,
    and a mask in which each row has as many places as its response has tokens."""
    model = make_model()
    logits, tokens, mask = empg.response_logits(model, PROMPT_OF, RESPONSES, 0.7)
    expected = [plain_logits(model, prompt, response) / 0.7 for prompt, response in zip(PROMPT_OF, RESPONSES)]
    torch.testing.assert_close(logits.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert logits.dtype == torch.float32
    assert tokens.tolist() == [token for response in RESPONSES for token in response]
    assert mask.tolist() == [[column < len(response) for column in range(6)] for response in RESPONSES]


def test_logits_are_computed_from_the_first_response_on():
    """The model computes no logits for the columns in which all rows are within their prompts, and all others."""
    model = make_model()
    kept = []
    model.register_forward_hook(lambda module, args, output: kept.append(output.logits.shape[1]))
    empg.log_probs(model, [[3] * 5, [3] * 7], [[4, 4], [4], [4, 4, 4], [4]])
    # The longest row has 7 + 3 columns. The first response begins in column 5, and its logits are in column 4.
    assert kept == [10 - 4]


def test_autocast_changes_a_gradient_only_by_rounding():
    """Under autocast log_probs computes in bfloat16, and still returns float32 values and float32 gradients."""
    model = make_model(dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values, mask = empg.log_probs(model, PROMPTS, RESPONSES)
        empg.empg_loss(values, mask, torch.ones(8)).backward()
        gradients.append(flat_grad(model))
        assert values.dtype == torch.float32
        assert gradients[-1].dtype == torch.float32
    # Alike, but not the same: bfloat16 was at work.
    assert 0.99 < torch.cosine_similarity(*gradients, dim=0) < 1 - 1e-7
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.1)


def test_softmax_and_kl_are_float32_under_autocast():
    """Under autocast the model multiplies in bfloat16. What follows is in float32: log-probabilities are those of its
    logits to the last bits of float32, and so is the KL, a small difference of large numbers."""
    model = make_model(dtype=torch.float32)
    reference = make_model(seed=1, dtype=torch.float32).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        logits, tokens, mask = empg.response_logits(model, PROMPT_OF, RESPONSES)
        ref_logits, _, _ = empg.response_logits(reference, PROMPT_OF, RESPONSES)
        logprobs = empg.token_logprobs(logits, tokens, mask)
        _, kl = empg.micro_batch_loss(model, rows_with(ADVANTAGES), config(beta=0.1), reference)
    assert torch.equal(logits, logits.bfloat16().float())  # the model was in bfloat16
    exact = logits.double().log_softmax(-1)
    exact_logprobs = exact.gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs[mask].double(), exact_logprobs, rtol=1e-6, atol=1e-6)
    exact_kl = (exact.exp() * (exact - ref_logits.double().log_softmax(-1))).sum() / len(RESPONSES)
    assert kl == pytest.approx(exact_kl.item(), rel=1e-5)


def test_mistakes_labels_shifted_and_eos_left_out_of_the_loss():
    """The probabilities of all tokens after one prompt, EOS among them, sum to 1. They do not if each token has been seen
    when it is predicted, or if EOS does not count: then nobody would learn to stop."""
    values, mask = empg.log_probs(make_model(), [[3, 4]], [[token] for token in range(18)])
    assert mask.all()
    assert values.exp().sum().item() == pytest.approx(1)


def test_mistakes_dropout_on_and_bfloat16_master_weights(tmp_path):
    """A model with dropout that is stored in bfloat16 is loaded without dropout, and learns in float32, in which updates of
    1e-6 survive. Its frozen copy is in the dtype that was asked for, but for rotary frequencies, which stay in float32."""
    make_model(dtype=torch.bfloat16, attention_dropout=0.5).save_pretrained(tmp_path)
    base_recipe.character_tokenizer().save_pretrained(tmp_path)
    _, policy = empg.load_model(str(tmp_path))
    _, frozen = empg.load_model(str(tmp_path), torch.bfloat16)
    policy = empg.distribute(policy, config(dtype="bfloat16"))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in frozen.buffers()} == {torch.float32}
    for model in (policy, frozen):
        assert not any(module.training for module in model.modules())

    before = flat(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    empg.update(policy, optimizer, rows_with(ADVANTAGES), config(dtype="bfloat16"))
    # All weights have moved but the embeddings of tokens that do not occur. bfloat16 would round nearly all of it away.
    assert (flat(policy) != before).double().mean() > 0.8
    empg.copy_weights(policy, frozen)
    assert torch.equal(flat(policy).bfloat16(), flat(frozen))


def test_sample_does_not_depend_on_its_company():
    """A trajectory is the same alone, in another order, with more samples, with padding, or with a higher limit."""
    model = make_model(scale=0.3)
    seeds = [11, 12, 13, 14]
    together = empg.sample(model, PROMPTS, 6, 20, seeds=seeds, **LIMITS)
    assert len({len(response) for response in together}) > 4

    groups = [together[6 * i : 6 * i + 6] for i in range(4)]
    for prompt, seed, group in zip(PROMPTS, seeds, groups):
        for samples, limit in ((6, 20), (2, 20), (6, 4)):
            alone = empg.sample(model, [prompt], samples, limit, seeds=[seed], **LIMITS)
            assert alone == [response[:limit] for response in group[:samples]]
    backwards = empg.sample(model, PROMPTS[::-1], 6, 20, seeds=seeds[::-1], **LIMITS)
    assert [backwards[6 * i : 6 * i + 6] for i in range(4)] == groups[::-1]
    assert empg.sample(model, PROMPTS, 6, 20, seeds=[1, 2, 3, 4], **LIMITS) != together


@pytest.mark.parametrize("kind", MODELS)
def test_mistake_positions_missing_under_left_padding(kind):
    """Greedy responses to prompts of unequal length, which pad each other, are those that transformers' own generate gives
    each of them alone; 200 tokens are those of one plain pass."""
    model = make_model(max_position_embeddings=512, **MODELS[kind])
    for prompt, response in zip(PROMPTS, empg.sample(model, PROMPTS, 1, 12, temperature=0, seeds=[0] * 4, **LIMITS)):
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False)
        assert generated[0, len(prompt) :].tolist() == response
    never = {"eos_token_id": 99, "pad_token_id": 0}
    for prompt, response in zip(PROMPTS, empg.sample(model, PROMPTS, 1, 200, temperature=0, seeds=[0] * 4, **never)):
        assert plain_logits(model, prompt, response).argmax(-1).tolist() == response


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_frequencies_match_the_probabilities(temperature):
    """4,000 samples of the first two tokens are as frequent as the model says, within four standard deviations."""
    model = make_model(vocab_size=6, scale=0.3)
    counts = np.zeros((6, 6))
    how = {"temperature": temperature, "eos_token_id": 99, "pad_token_id": 0}
    for response in empg.sample(model, [[3, 4]], 4000, 2, seeds=[0], **how):
        counts[tuple(response)] += 1
    expected = np.zeros((6, 6))
    with torch.no_grad():
        for pair in itertools.product(range(6), repeat=2):
            expected[pair] = 4000 * plain_logprobs(model, [3, 4], list(pair), temperature).sum().exp().item()
    assert expected.max() > 5 * expected.min()
    assert (abs(counts - expected) < 4 * np.sqrt(expected) + 3).all()


def test_what_has_no_probability_is_not_drawn():
    """Neither 0 nor the largest float below 1 draws a token of probability 0, and broken logits end in the last token."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf]).expand(2, 5)
    assert empg.draw_tokens(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0).tolist() == [1, 3]
    assert empg.draw_tokens(logits * math.nan, torch.tensor([0.0, 0.5]), 1.0).tolist() == [4, 4]
    # By rounding, probabilities may add up to less than 1.
    many = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    many[:, 500:] = -math.inf
    assert (many.softmax(-1).cumsum(-1)[:, -1] < 1 - 2**-24).any()
    assert (empg.draw_tokens(many, torch.full((64,), 1 - 2**-24), 1.0) < 500).all()


def test_a_response_ends_with_its_only_eos():
    """A response holds an end token, EOS or any of several, only as its last token, else it has the full length."""
    responses = empg.sample(
        make_model(scale=0.2), PROMPTS, 50, 15, seeds=[0, 1, 2, 3], eos_token_id=[1, 5], pad_token_id=0
    )
    for response in responses:
        assert not {1, 5} & set(response[:-1])
        assert response[-1] in (1, 5) or len(response) == 15
    assert {response[-1] for response in responses} > {1, 5}


def test_no_step_of_sampling_is_in_vain():
    """The model reads a prompt once, is called no more often than the longest response needs, and rows that have ended
    leave the batch."""
    model = make_model(scale=0.3)
    rows = []

    def count_rows(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))

    model.model.register_forward_pre_hook(count_rows, with_kwargs=True)
    responses = empg.sample(model, PROMPTS[:1], 12, 50, seeds=[5], **LIMITS)
    assert rows[:2] == [1, 12]
    assert len(rows) == max(map(len, responses)) < 50
    assert sum(rows[1:]) < 0.9 * 12 * len(rows[1:])


PIECES_TO_COPY = (
    "smooth_rewards",
    "subtract_baseline",
    "empg_loss",
    "draw_tokens",
    "sample",
    "response_logits",
    "token_logprobs",
    "log_probs",
)


def test_the_pieces_can_be_copied(tmp_path, monkeypatch):
    """The mathematics, the sampler and log_probs, taken by their source into an empty module with nothing but imports of
    libraries, run there and give the same, gradient included."""
    imports = "import numpy as np, torch, torch.nn.functional as F\nfrom torch import Tensor\nfrom tqdm import tqdm\n"
    imports += "from torch.nn.utils.rnn import pad_sequence\nfrom transformers import DynamicCache\n"
    (tmp_path / "copied.py").write_text(
        imports + "\n".join(inspect.getsource(getattr(empg, name)) for name in PIECES_TO_COPY)
    )
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied")

    def gradient_of(module):
        model = make_model(scale=0.3)
        responses = module.sample(model, PROMPTS, 4, 12, seeds=[1, 2, 3, 4], **LIMITS)
        rewards = torch.tensor([float(len(response) % 3) for response in responses])
        advantages = module.subtract_baseline(module.smooth_rewards(rewards).view(4, 4)).flatten()
        module.empg_loss(*module.log_probs(model, PROMPTS, responses, 0.9), advantages).backward()
        return responses, flat_grad(model)

    responses, expected = gradient_of(empg)
    responses_of_copy, found = gradient_of(copied)
    assert responses_of_copy == responses
    assert expected.norm() > 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), ([[3], []], [0, 1]), ([[3]], []), ([[3]], [0, 1])], ids=str)
def test_sample_refuses(prompts, seeds):
    """No prompts, an empty prompt, and seeds of another number are errors."""
    with pytest.raises(ValueError, match="sample needs"):
        empg.sample(make_model(), prompts, 2, 3, seeds=seeds, **LIMITS)


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [([], []), ([[3]], []), ([[4], [5]], [[4]]), ([[], [4]], [[4], [5]])],
    ids=str,
)
def test_log_probs_refuses(prompts, responses):
    """No prompts, no responses, responses that do not divide among the prompts, and an empty prompt are errors."""
    with pytest.raises(ValueError, match="log_probs needs"):
        empg.log_probs(make_model(), prompts, responses)


RIGHT_KINDS = {
    "qwen2": {},  # grouped queries
    "qwen3": {},
    "llama": {"mlp_bias": True},
    "mistral": {"sliding_window": 3},
    "gemma3_text": {"sliding_window": 3, "query_pre_attn_scalar": 4},
    "gpt2": {"resid_pdrop": 0.5},  # learned positions
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 3, "num_heads": 4, "num_layers": 2},
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": 2},  # ALiBi
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2},
    "mixtral": {"num_local_experts": 4},  # mixture of experts
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "phi3": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},  # logits that are capped
    "cohere": {"logit_scale": 16.0},  # logits that are scaled
    "cohere2": {"logit_scale": 0.25, "sliding_window": 3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # an output layer with a bias
}
REFUSED_KINDS = {
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"lru_width": 16, "attention_window_size": 8},
    "jamba": {"num_experts": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "qwen3_next": {"num_experts": 0, "linear_num_value_heads": 2, "linear_num_key_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
# transformers does not accept these settings for these kinds.
WITHOUT = {"bloom": "max_position_embeddings", "mpt": "max_position_embeddings", "falcon": "head_dim"}


def save_kind(kind, settings, path) -> str:
    torch.manual_seed(0)
    settings = SMALL | {"head_dim": 4} | settings
    settings = {name: value for name, value in settings.items() if name != WITHOUT.get(kind)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(path)
    base_recipe.character_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", RIGHT_KINDS)
def test_families_of_models_that_are_right(kind, tmp_path):
    """Sampled token by token and read in one pass, responses are those of plain passes, in values and gradients."""
    name = save_kind(kind, RIGHT_KINDS[kind], tmp_path)
    _, model = empg.load_model(name, torch.float32)
    empg.check_model(name)
    how = {"temperature": 0, "seeds": [0] * 4, "eos_token_id": 99, "pad_token_id": 0}
    responses = empg.sample(model, PROMPTS, 1, 20, **how)
    for prompt, response in zip(PROMPTS, responses):
        assert plain_logits(model, prompt, response).argmax(-1).tolist() == response
    plain_loss(model, ADVANTAGES).backward()
    expected = flat_grad(model)
    model.zero_grad()
    empg.empg_loss(*empg.log_probs(model, PROMPTS, RESPONSES), ADVANTAGES).backward()
    assert (flat_grad(model) - expected).norm() < 1e-4 * expected.norm()
    has_no_limit = kind in ("bloom", "mpt")
    assert empg.room_for_responses([{"prompt": [1, 2, 3]}], model) == (math.inf if has_no_limit else 64 - 3)


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_families_of_models_that_are_refused(kind, tmp_path, capfd):
    """Recurrent layers, which padding on the left would change, end in one line before any work."""
    name = save_kind(kind, REFUSED_KINDS[kind], tmp_path / "model")
    refuses(capfd, empg.main, options(name, tmp_path / "out"), f"--model {name}", "models of its kind")
    assert not (tmp_path / "out").exists()


def peaked(path) -> str:
    """Saves a model that is sure of nearly every token: the likeliest ones have a probability of almost 1."""
    make_model(scale=2.0, dtype=torch.float32).save_pretrained(path)
    base_recipe.character_tokenizer().save_pretrained(path)
    return str(path)


def scaled_logits(monkeypatch):
    """log_probs takes other logits than the model gives, as it did for models that cap or scale them."""
    original = empg.response_logits

    def scaled(*args, **options):
        logits, tokens, mask = original(*args, **options)
        return 0.5 * logits, tokens, mask

    monkeypatch.setattr(empg, "response_logits", scaled)


def padding_in_sight(monkeypatch):
    """The sampler's mask does not hide the padding."""
    original = empg.pad_sequence

    def pad(rows, **options):
        return (
            original(rows, **options | {"padding_value": 1})
            if options.get("padding_value") == 0
            else original(rows, **options)
        )

    monkeypatch.setattr(empg, "pad_sequence", pad)


def prompts_in_turn(monkeypatch):
    """The cache is repeated as a whole, and not prompt by prompt."""

    def repeat(cache, num_samples):
        cache.reorder_cache(torch.arange(2).repeat(num_samples))

    monkeypatch.setattr(empg.DynamicCache, "batch_repeat_interleave", repeat)


def wrong_rows_dropped(monkeypatch):
    """The cache keeps as many rows as it should, but the first ones."""
    original = empg.DynamicCache.batch_select_indices
    first = lambda cache, rows: original(cache, list(range(len(rows))))
    monkeypatch.setattr(empg.DynamicCache, "batch_select_indices", first)


def labels_shifted(monkeypatch):
    """log_probs takes the logits of the tokens before."""
    original = empg.response_logits

    def shifted(*args, **options):
        logits, tokens, mask = original(*args, **options)
        return logits.roll(1, dims=0), tokens, mask

    monkeypatch.setattr(empg, "response_logits", shifted)


@pytest.mark.parametrize(
    "fault", [scaled_logits, padding_in_sight, prompts_in_turn, wrong_rows_dropped, labels_shifted]
)
@pytest.mark.parametrize("save", [lambda path: save_kind("qwen2", {}, path), peaked], ids=["usual", "peaked"])
def test_a_model_is_tried_on_unlikely_tokens_and_dropped_rows(save, fault, tmp_path, monkeypatch):
    """check_model passes a model, also one that is nearly sure of each token, and refuses it if sampling or
    log-probabilities were wrong for it."""
    name = save(tmp_path)
    empg.check_model(name)
    fault(monkeypatch)
    with pytest.raises(ValueError, match="models of its kind"):
        empg.check_model(name)


def test_long_rope_is_not_crossed():
    """For a model with long rope, room_for_responses counts up to the length that it was first trained on, less the prompt,
    so that no text reaches the length beyond which its keys would be rotated in another way."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0, 2.0],
        "long_factor": [1.0, 2.0],
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
    }
    settings = SMALL | {"head_dim": 4, "rope_parameters": rope, "original_max_position_embeddings": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **settings))
    assert empg.room_for_responses([{"prompt": [1, 2]}], model) == 32 - 2


# ---- The update


def rows_with(advantages) -> list[dict]:
    """The trajectories of PROMPTS and RESPONSES with these advantages."""
    rows = zip(PROMPT_OF, RESPONSES, advantages.tolist(), strict=True)
    return [{"prompt": prompt, "response": response, "advantage": advantage} for prompt, response, advantage in rows]


def gradient_followed(model, advantages=ADVANTAGES, reference=None, **changes) -> tuple[torch.Tensor, dict]:
    """The gradient that an update follows, and its statistics; the learning rate 0 leaves the model as it was."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    followed = []
    optimizer.register_step_pre_hook(lambda *_: followed.append(flat_grad(model)))
    statistics = empg.update(model, optimizer, rows_with(advantages), config(**changes), reference)
    assert len(followed) == 1
    return followed[0], statistics


PIECES = (
    "smooth_rewards",
    "subtract_baseline",
    "micro_batch_loss",
    "response_logits",
    "micro_batches",
    "update",
    "METHOD",
)


@pytest.fixture
def pieces_come_back(monkeypatch):
    """Studies replace functions of empg.py. After the test they are put back."""
    for name in PIECES:
        monkeypatch.setattr(empg, name, getattr(empg, name))


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_update_has_the_gradient_of_the_whole_batch(budget, once, pieces_come_back):
    """Neither micro-batches, of trajectories or of prompts with all their responses, nor skipping advantage 0 change the
    gradient of Eq. 12."""
    if once:
        prompts_once.replace()
    model = make_model()
    loss = plain_loss(model, ADVANTAGES)
    loss.backward()
    expected = flat_grad(model)
    followed, statistics = gradient_followed(model, micro_batch_tokens=budget)
    assert same_gradient(followed, expected)
    assert statistics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert statistics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-6)


def test_the_gradient_is_clipped():
    """A gradient with a norm above --max-grad-norm is scaled down to it; grad_norm is the norm before."""
    free, _ = gradient_followed(make_model())
    clipped, statistics = gradient_followed(make_model(), max_grad_norm=0.01)
    assert statistics["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4)
    torch.testing.assert_close(clipped, free * 0.01 / statistics["grad_norm"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("split", [empg.micro_batches, prompts_once.micro_batches])
def test_micro_batches_hold_every_trajectory_once_within_the_limit(split):
    """Of random lengths every trajectory is in one micro-batch; each is within the limit or has one trajectory; and sorting
    by length needs fewer padded tokens than passes of as many rows as the longest row allows."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(64):
        prompt_number = i // 8
        prompt = [prompt_number] * (40 + 9 * prompt_number)
        rows.append({"prompt": prompt, "response": [0] * int(rng.integers(1, 200))})

    def length(row):
        return len(row["prompt"]) + len(row["response"])

    def padded_tokens(batch):
        if split is empg.micro_batches:
            return len(batch) * max(map(length, batch))
        distinct = {tuple(row["prompt"]) for row in batch}
        longest_response = max(len(row["response"]) for row in batch)
        return len(distinct) * max(map(len, distinct)) + len(batch) * longest_response

    batches = split(rows, 1000)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    padded = [padded_tokens(batch) for batch in batches]
    assert all(tokens <= 1000 or len(batch) == 1 for tokens, batch in zip(padded, batches))
    assert any(len(batch) > 1 for batch in batches)
    if split is empg.micro_batches:
        assert sum(padded) < 0.8 * 64 * max(map(length, rows))
        longest = [max(map(length, batch)) for batch in batches]
        assert longest == sorted(longest, reverse=True)
    too_long = {"prompt": [1] * 9, "response": [1]}
    assert split([too_long], 1) == [[too_long]]


def test_what_has_no_gradient_is_not_computed(monkeypatch):
    """The forward pass sees only trajectories whose advantage is not 0, each once; without any, nothing changes."""
    model = make_model()
    seen = []
    spy(monkeypatch, "response_logits", lambda args, *_: seen.extend(args[2]))
    gradient_followed(model)
    assert sorted(seen) == sorted(RESPONSES[i] for i in KEPT)

    seen.clear()
    before = flat(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    statistics = empg.update(model, optimizer, rows_with(0 * ADVANTAGES), config())
    assert not seen
    assert statistics["loss"] == statistics["grad_norm"] == 0
    assert torch.equal(before, flat(model))
    assert not optimizer.state

    # After an update the gradients are 0, not None. Adam must not step along its averages of past ones.
    empg.update(model, optimizer, rows_with(ADVANTAGES), config())
    assert not flat_grad(model).any()
    before = flat(model)
    empg.update(model, optimizer, rows_with(0 * ADVANTAGES), config())
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(bad, capsys):
    """It leaves the model and Adam's averages as they are, and says so."""
    model = make_model()
    before = flat(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    statistics = empg.update(model, optimizer, rows_with(bad * ADVANTAGES.abs()), config())
    assert not math.isfinite(statistics["grad_norm"])
    assert "θ stays as it is" in capsys.readouterr().out
    assert torch.equal(before, flat(model))
    assert not optimizer.state
    empg.update(model, optimizer, rows_with(ADVANTAGES), config())  # the next one is a usual update
    assert not torch.equal(before, flat(model))


@pytest.mark.parametrize("kind", ["exact", "k3", "topk"])
def test_kl_term_has_its_gradient(kind, pieces_come_back):
    """With β the gradient is that of the loss plus β times the summed KL of every trajectory, also those of advantage 0; so
    it is with the estimators of ema_pg.py."""
    ema_pg.replace(kind, k=3)
    model = make_model()
    reference = make_model(seed=1).requires_grad_(False)
    kl = 0.0
    for prompt, response in zip(PROMPT_OF, RESPONSES):
        logits = plain_logits(model, prompt, response) / 0.7
        ref_logits = plain_logits(reference, prompt, response) / 0.7
        log_pi = logits.log_softmax(-1)
        log_ref = ref_logits.log_softmax(-1)
        if kind == "exact":
            kl += (log_pi.exp() * (log_pi - log_ref)).sum()
        elif kind == "k3":
            places = range(len(response))
            kl += ema_pg.kl_k3(log_pi[places, response], log_ref[places, response]).sum()
        else:
            kl += ema_pg.kl_topk(logits, ref_logits, torch.tensor(response), 3).sum()
    (plain_loss(model, ADVANTAGES, 0.7) + 0.3 * kl / len(RESPONSES)).backward()
    expected = flat_grad(model)
    followed, statistics = gradient_followed(
        model, reference=reference, beta=0.3, temperature=0.7, micro_batch_tokens=40
    )
    torch.testing.assert_close(followed, expected, rtol=1e-4, atol=1e-5)  # for the KL the logits are float32
    assert statistics["kl"] == pytest.approx(kl.item() / sum(map(len, RESPONSES)), rel=1e-5)


# ---- Tasks: problems, prompts and grading

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}{{ '<|bot|>' if add_generation_prompt }}"


def test_chat_templates_and_the_tokens_that_stop():
    """The prompt follows the chat template or is plain, and braces in it are safe; EOS, the generation config's and the
    token with which the template closes an answer, as a base model often does, all end a response."""
    tokenizer = base_recipe.character_tokenizer()
    model = make_model()
    # This tokenizer puts a special token before a text, unless the chat template has done so.
    begin = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = begin
    task = dataclasses.replace(empg.TASKS["sums"], prompt="{question}#{")
    problems = [{"question": "3+8="}]

    # 1) A base model without a template.
    empg.add_prompts(problems, task, tokenizer)
    assert tokenizer.decode(problems[0]["prompt"]) == "<eos>3+8=#<unk>"  # "{" is not in the vocabulary
    assert empg.room_for_responses(problems, model) == 64 - 1 - len("3+8=#{")
    assert empg.stop_tokens(tokenizer, model) == [1]

    # 2) A chat model.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<|user|>", "<|bot|>"]})
    tokenizer.chat_template = CHAT
    model.generation_config.eos_token_id = [1, 7]
    empg.add_prompts(problems, task, tokenizer)
    assert tokenizer.decode(problems[0]["prompt"]) == "<|user|>3+8=#<unk><end><|bot|>"
    assert empg.stop_tokens(tokenizer, model) == [1, 7, tokenizer.convert_tokens_to_ids("<end>")]


GSM8K = empg.TASKS["gsm8k"]
MATH = empg.TASKS["math-hard"]
# gold :: right | right :: wrong | wrong
BOXES = {
    "gsm8k": r"""
18 :: 18 | \$18 | $18 | 18.00 | 18. | 18\% | 18 \text{ dollars} | 18\text{ km/h} | x = 18 | 3 \times 6 | 36/2 :: 1.8 | -18 | x
18 :: 18 kilometers | $18 more muffins :: 18 and nineteen | 17 or 18 muffins | 8 kilometers
18 :: 2 \times 3^{2} :: 17, 18 | \{17, 18\} | 18 \text{ or } 19 | 18 \text{ or 19} | x = 3 \text{ or } x = 18 | A = 5, B = 18
1800 :: 1,800 | 1{,}800 | 1,\!800 | \$1,800.00 :: 1 | 800 | 1, 800
.5 :: .5 | 0.5 | \frac12 :: 5 | 50
5 :: 5 \text{ apples} :: 5 \text{ hours and } 30 \text{ minutes} | 5 \text{ to } 6 | 5 \text{ if } x > 0, 4 \text{ otherwise}
""",
    "math-hard": r"""
5 :: 5 | 5.0 | 5. | x = 5 | 3+2 = 5 | \text{Area} = 5 | 5 \text{ cm}^2 | \$5 | \sqrt{25} | \boxed{5} :: 6 | -5 | x \ge 5 | 5x
3 :: 3 :: 3, 4 | 3 \text{ or } 4 | 3 or 4 | \{3, 4\} | (3, 4) | 3 \quad 4 | 3; 4 | \pm 3 | 3 \text{ or 4} | x = 3, x = 4 | 3:4
-\frac{3}{4} :: -0.75 | \frac{-3}{4} | - \tfrac34 :: \frac{3}{4} | -\frac{4}{3}
22^\circ :: 22 | 22^{\circ} | 22 \text{ degrees} :: 23^\circ
\text{(A)} :: A | (A) | \textbf{(A)} :: B | \text{(B)} | A, B
0,1 :: 1,0 | \{0,1\} | 0 \text{ and } 1 | x = 0 \text{ or } x = 1 :: 0 | 0,2 | 0,1,2
""",
}


def test_mistake_list_of_guesses_rewarded():
    """A box is right if it holds the answer in any usual form, and wrong if it lists candidates."""
    for name, table in BOXES.items():
        for line in table.strip().splitlines():
            [gold], right, wrong = (part.strip().split(" | ") for part in line.split("::"))
            # The data sets write their answers in these forms.
            answers = (gold, f"2 + 2 = <<2+2=4>>4\n#### {gold}", rf"We find $\boxed{{{gold}}}$.")
            for text in right + wrong:
                response = rf"Let $x = \boxed{{77}}$. So it is $\boxed{{{text}}}$."
                for answer in answers:
                    assert empg.TASKS[name].reward(response, answer) == (text in right), (name, gold, text)


# response :: the number that is its answer
TEXTS = r"""
#### 72 :: 72 | #### $1,200.00 :: 1,200 | #### 5 and then 7 8 :: 5 | **$18** :: 18 | A: 1,200 :: 1200 | 10-3 :: 3
The answer is: 18. :: 18 | The answer is 18. Let me double check: 3*6=18 and 2+2=4 :: 18 | no idea :: None
The final answer is $18.50. :: 18.5 | So the answer is 144 - 24 = 120. :: 120 | The answer is 5. Wait. The answer is 18. :: 18
\boxed{5}. No: \boxed{18}, I hope. 7 :: 18
She sells 12 in the morning and 4… :: None | 2 steps: 1. Add. 2. Take away… :: None | The answer is 18… :: None
The answer is 18. Let me check… :: 18 | so \boxed{18}. 2. Check… :: 18 | so \boxed{18… :: None
"""


def test_where_the_answer_of_a_response_is():
    """The answer of a response is its last box, else the first number after the last "####" or "answer is", else the last
    number, if it was not cut off; in MATH only a box counts."""
    for case in re.split(r"\n| \| ", TEXTS.strip()):
        response, gold = case.split(" :: ")
        has_answer = gold != "None"
        assert (scoring.final_answer(response) is not None) == has_answer, response
        assert GSM8K.reward(response, gold) == has_answer, response
        assert MATH.reward(response, gold) == (scoring.last_boxed(response) is not None), response
    for text in ("", "5", r"\boxed{}", r"\boxed{5", r"\boxed", r"\boxed{ }"):
        assert not MATH.reward(text, "5"), text
    assert scoring.last_boxed(r"so \boxed{\frac{1}{\sqrt{2}}}, as") == r"\frac{1}{\sqrt{2}}"


@pytest.mark.skipif(not SHARED.exists(), reason="real data sets are not beside the project")
@pytest.mark.parametrize(("name", "task"), [("gsm8k", GSM8K), ("math_hard", MATH)])
def test_gold_answers(name, task):
    """Every gold answer scores 1, boxed, of GSM8K also unboxed; a neighbour's does not, unless they are equal."""
    rows = read_rows(SHARED / name / "test.jsonl")
    answers = [row.get("answer") or row["solution"] for row in rows]
    golds = [scoring.last_boxed(answer) or answer.rpartition("####")[2].strip() for answer in answers]
    forms = [r"so $\boxed{%s}$.", r"\boxed{%s.}"]
    if task is GSM8K:
        forms += ["#### %s", "So: %s."]
    for answer, gold, other in zip(answers, golds, golds[1:] + golds[:1]):
        for form in forms:
            assert task.reward(form % gold, answer) == 1, form % gold
        is_equal = gold.replace(",", "") == other.replace(",", "")
        assert task.reward(rf"\boxed{{{other}}}", answer) == is_equal, (gold, other)


STRANGE = [*"\\²½{}$%^_=٣", r"9^{9^{9}}", r"\sum_{k=1}^{10^9}k^{99}", "}{", "1/0", "1e999", r"\frac{", r"\text{", "\0"]
STRANGE += ["\ud800", " ", r"\text{" * 40 + "}" * 40, "(" * 100]
STRANGE += [text * (20_000 // len(text)) for text in (r"\frac{", r"\boxed{", "1,", "9", r"\text{or 1} ")]


@pytest.mark.parametrize("task", [GSM8K, MATH], ids=["gsm8k", "math-hard"])
def test_grading_never_raises_or_hangs(task):
    """Whatever a model writes, grading returns, and nothing odd is right. (Without a time limit, 9^{9^{9}} would not end.)"""
    for text in STRANGE:
        for response in (rf"\boxed{{{text}}}", rf"\boxed{{{text}", f"the answer is {text}"):
            assert task.reward(response, "18") == 0, response


def test_what_is_right_in_the_sums():
    """A response is right if it ends with "#" and the sum, and with nothing else."""
    reward = empg.TASKS["sums"].reward
    for text in ("#18", "3+8=11,11+5=16,16+2=18#18"):
        assert reward(text, "18") == 1
    for text in ("18", "#18…", "#118", "#1#8", "#18#19", "#-18", "# 18", ""):
        assert reward(text, "18") == 0, text


def test_grading_in_another_thread():
    """A formula is compared in a thread, too, in which math_verify's time limit does not work."""
    scoring.is_right.cache_clear()
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(GSM8K.reward, r"\boxed{\frac{36}{2}}", "18").result() == 1


# ---- Whole runs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a random model for the task sums, stored in bfloat16 as hub models are."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(scale=0.1, dtype=torch.bfloat16).save_pretrained(path)
    base_recipe.character_tokenizer().save_pretrained(path)
    return str(path)


def options(model, output, /, *flags, **changes) -> list[str]:
    """The command line of a short run."""
    values = {
        "model": model,
        "task": "sums",
        "output": output,
        "steps": 2,
        "prompts_per_step": 4,
        "num_samples": 4,
        "max_new_tokens": 8,
        "lr": 1e-3,
        "eval_every": 1,
        "eval_problems": 6,
        "device": "cpu",
    }
    return [*(f"--{name}={value}" for name, value in (values | changes).items()), *flags]


def load(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, **splits) -> Path:
    """Makes a directory with a file SPLIT.jsonl for each split."""
    path.mkdir()
    for split, rows in splits.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(output) -> list[dict]:
    """The rows of a run, but for the seconds."""
    rows = read_rows(Path(output) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "second" not in name and value is not None} for row in rows]


def same_metrics(one: list[dict], two: list[dict]) -> None:
    """Equal up to rounding."""
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def same_run(one: Path, two: Path) -> None:
    """Equal to the last bit: what was recorded, but for the seconds, and the weights."""
    assert metrics(one) == metrics(two)
    assert torch.equal(flat(load(one / "model")), flat(load(two / "model")))


def change(monkeypatch, name="sums", **fields):
    """Changes fields of a task."""
    monkeypatch.setitem(empg.TASKS, name, dataclasses.replace(empg.TASKS[name], **fields))


def spy(monkeypatch, name, note, module=empg):
    """Calls note(arguments, keywords, result) after every call of a function."""
    original = getattr(module, name)

    def watched(*args, **keywords):
        result = original(*args, **keywords)
        note(args, keywords, result)
        return result

    monkeypatch.setattr(module, name, watched)


@pytest.fixture
def odd_is_right(monkeypatch):
    """A reward with signal for a random model: responses of an odd number of characters."""
    change(monkeypatch, reward=lambda response, answer: float(len(response) % 2))


def test_a_run_leaves_what_it_promises(tiny, tmp_path, odd_is_right, monkeypatch, capsys):
    """metrics.jsonl has every key, config.json every option; the saved model gives the same greedy text."""
    policies = []
    sampled = []
    spy(monkeypatch, "distribute", lambda _, __, policy: policies.append(policy))
    spy(monkeypatch, "sample_trajectories", lambda _, __, trajectories: sampled.append(trajectories))
    empg.main(options(tiny, tmp_path, steps=3, eval_every=2))

    # 1) The records.
    keys = {
        "step",
        "reward",
        "response_tokens",
        "loss",
        "grad_norm",
        "kl",
        "no_signal",
        "cut",
        "sample_seconds",
        "update_seconds",
        "step_seconds",
        "tokens_per_second",
    }
    logged = read_rows(tmp_path / "metrics.jsonl")
    steps = [row for row in logged if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(set(row) == keys for row in steps)
    assert [row["step"] for row in logged if "eval_accuracy" in row] == [0, 2, 3]
    batches = [trajectories for trajectories in sampled if len(trajectories) == 16]
    for row, batch in zip(steps, batches, strict=True):
        rewards = np.array([trajectory["reward"] for trajectory in batch])
        assert row["reward"] == pytest.approx(rewards.mean())
        assert row["no_signal"] == np.mean(rewards.reshape(4, 4).std(axis=1) == 0)
        assert row["response_tokens"] == np.mean([len(trajectory["response"]) for trajectory in batch])
        assert row["cut"] == np.mean([trajectory["cut"] for trajectory in batch])
    evaluations = [trajectories for trajectories in sampled if len(trajectories) == 6]
    accuracies = [np.mean([trajectory["reward"] for trajectory in trajectories]) for trajectories in evaluations]
    assert [row["eval_accuracy"] for row in logged if "eval_accuracy" in row] == accuracies
    assert f"no_signal {steps[0]['no_signal']:.3f}" in capsys.readouterr().out
    assert steps[0]["kl"] is None
    assert 0 < steps[0]["cut"] < 1

    # 2) The options.
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved) == {"method", *(field.name for field in dataclasses.fields(empg.Config))}
    assert saved["method"] == "EMPG"
    assert saved["seed"] == 0

    # 3) The model.
    model = load(tmp_path / "model")
    assert torch.equal(flat(model), flat(policies[0]))
    assert not torch.equal(flat(model), flat(load(tiny)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompts = tokenizer(["3+8+5+2=", "1+1+1+1="])["input_ids"]
    generated = model.generate(torch.tensor(prompts), max_new_tokens=8, do_sample=False)[:, len(prompts[0]) :]
    sampled = empg.sample(model, prompts, 1, 8, temperature=0, seeds=[0, 0], **LIMITS)
    assert tokenizer.batch_decode(generated, True) == tokenizer.batch_decode(sampled, True)


def test_a_bfloat16_run_samples_and_computes_in_bfloat16(tiny, tmp_path, odd_is_right, monkeypatch):
    """With --dtype bfloat16, as on a GPU, θ* is in bfloat16, and θ stays in float32 while autocast computes in bfloat16."""
    sampled_from = set()
    learned_with = set()
    spy(monkeypatch, "sample_trajectories", lambda args, *_: sampled_from.add(args[0].dtype))
    is_enabled = functools.partial(torch.is_autocast_enabled, "cpu")
    spy(monkeypatch, "micro_batch_loss", lambda args, *_: learned_with.add((args[0].dtype, is_enabled())))
    # Without an evaluation at its end, after which θ* would be up to date.
    empg.main(options(tiny, tmp_path, steps=1, dtype="bfloat16", eval_every=0))
    assert sampled_from == {torch.bfloat16}
    assert learned_with == {(torch.float32, True)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    assert not torch.equal(flat(load(tmp_path / "model")), flat(load(tiny)))


def test_mistake_seed_without_iteration(tiny, tmp_path, odd_is_right, monkeypatch):
    """Each iteration, prompt and seed draws anew; one seed gives one run, however many responses are sampled at a time."""
    problems = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
    change(monkeypatch, problems=lambda _, split: [dict(problem) for problem in problems] if split == "train" else [])

    def notes_of(name, **more):
        """The seeds of a run, how many prompts were sampled from at a time, and the questions."""
        seeds = []
        prompts_at_a_time = []
        questions = []

        def note_sample(args, keywords, result):
            if keywords["temperature"] == 1:  # `check_model` samples too, at another one
                seeds.extend(keywords["seeds"])
                prompts_at_a_time.append(len(keywords["seeds"]))

        with monkeypatch.context() as patch:
            spy(patch, "sample", note_sample)
            spy(patch, "sample_trajectories", lambda args, *_: questions.extend(row["question"] for row in args[3]))
            empg.main(options(tiny, tmp_path / name, eval_every=0, steps=4, **more))
        return seeds, prompts_at_a_time, questions

    seeds_a, prompts_a, questions_a = notes_of("a")
    seeds_b, prompts_b, questions_b = notes_of("b", sample_batch=5)
    seeds_c, _, questions_c = notes_of("c", seed=1)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert prompts_a == [4] * 4
    assert prompts_b == [1] * 16
    # Four iterations of four prompts: 16 seeds.
    assert len(seeds_a) == len(seeds_c) == 16
    assert seeds_a == seeds_b
    assert len({*seeds_a, *seeds_c}) == 32
    assert len(set(questions_a)) > 4
    assert questions_a[:4] != questions_a[4:8]
    assert questions_a == questions_b != questions_c


def test_a_run_weighs_by_smoothed_rewards_less_the_baseline(tiny, tmp_path, odd_is_right, monkeypatch):
    """Line 12 as a run computes it: R̃ is smoothed over the whole batch, and b is the mean of the prompt's other samples."""
    seen = []
    spy(monkeypatch, "update", lambda args, *_: seen.extend(args[2]))
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0, prompts_per_step=3))  # not 4, so that wrong shapes show
    rewards = torch.tensor([trajectory["reward"] for trajectory in seen])
    advantages = torch.tensor([trajectory["advantage"] for trajectory in seen])
    assert 0 < rewards.mean() < 1
    smoothed = torch.sigmoid((rewards - rewards.mean()) / rewards.std(correction=0)).view(3, 4)
    others = (smoothed.sum(dim=1, keepdim=True) - smoothed) / 3
    torch.testing.assert_close(advantages.view(3, 4), smoothed - others)


def test_a_run_has_one_temperature_and_evaluates_greedily(tiny, tmp_path, odd_is_right, monkeypatch):
    """It samples and learns at --temperature, and evaluates at 0, one response to each problem and no more at a time than in
    training."""
    sampled = []
    learned_at = set()
    spy(monkeypatch, "sample_trajectories", lambda args, *_: sampled.append((args[4].temperature, args[4].num_samples)))
    at_a_time = []
    spy(monkeypatch, "sample", lambda args, keywords, result: at_a_time.append(len(result)))
    monkeypatch.setattr(empg, "check_model", lambda name: None)  # which calls `sample` and `response_logits`, too
    spy(monkeypatch, "response_logits", lambda args, *_: learned_at.add(args[3]))
    empg.main(options(tiny, tmp_path, temperature=0.7, eval_problems=40))
    assert sampled == [(0, 1), (0.7, 4), (0, 1), (0.7, 4), (0, 1)]
    assert learned_at == {0.7}
    assert at_a_time == [16, 16, 8, 16] * 2 + [16, 16, 8]


def test_mistakes_old_policy_not_refreshed_or_refreshed_too_often(tiny, tmp_path, odd_is_right, monkeypatch):
    """θ* ← θ at every iteration: whenever trajectories are drawn, the frozen copy has the trained policy's weights. It keeps
    them through all --updates on one buffer, while θ moves on. The learning rate rises during five iterations."""
    policies = []
    frozen = {}
    distances_when_sampling = []
    distances_after_update = []
    learning_rates = []

    def after_sampling(args, *_):
        frozen["model"] = args[0]
        frozen["weights"] = flat(args[0])
        distances_when_sampling.append((frozen["weights"] - flat(policies[0])).abs().max().item())

    def after_update(args, *_):
        policy, optimizer = args[:2]
        assert torch.equal(flat(frozen["model"]), frozen["weights"])
        distances_after_update.append((flat(policy) - frozen["weights"]).norm().item())
        learning_rates.append(optimizer.param_groups[0]["lr"])

    spy(monkeypatch, "distribute", lambda _, __, policy: policies.append(policy))
    spy(monkeypatch, "sample_trajectories", after_sampling)
    spy(monkeypatch, "update", after_update)
    empg.main(options(tiny, tmp_path, steps=6, eval_every=2, updates=3, lr=1e-3))
    assert distances_when_sampling == [0] * (6 + 4)  # six iterations, and evaluations after 0, 2, 4 and 6
    assert (flat(policies[0]) - flat(load(tiny))).abs().max() > 1e-3
    assert len(distances_after_update) == 6 * 3
    for one, two, three in np.reshape(distances_after_update, (6, 3)):
        assert 0 < one < two < three
    rates = [1e-3 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1)]
    assert learning_rates == pytest.approx(np.repeat(rates, 3).tolist())


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_the_reference_stays_or_follows(decay, tiny, tmp_path, odd_is_right, monkeypatch, pieces_come_back):
    """With --beta the reference stays at the base model, also in a run that is stopped and resumed; with ema_pg.py it follows
    θ_ref ← decay · θ_ref + (1 - decay) · θ every second iteration."""
    placed = []
    thetas = []
    spy(monkeypatch, "distribute", lambda _, __, model: placed.append(model))
    ema_pg.replace("exact", decay=decay, every=2)
    spy(monkeypatch, "update", lambda args, *_: thetas.append(flat(args[0])))
    more = {"lr": 0.01, "eval_every": 0, "beta": 0.1}
    empg.main(options(tiny, tmp_path / "whole", steps=5, **more))
    expected = flat(load(tiny))
    for theta in (thetas[1], thetas[3]):  # after the second iteration and the fourth
        expected = decay * expected + (1 - decay) * theta
    reference, _policy = placed
    torch.testing.assert_close(flat(reference), expected)
    kl = [row["kl"] for row in metrics(tmp_path / "whole")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl) > 1e-5

    if decay == 1:
        for steps in (3, 5):
            empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps, **more))
        same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_moving_reference_is_not_resumed(capfd):
    """A checkpoint does not have the reference. So ema_pg.py refuses to go on with one that moves, in a line."""
    refuses(capfd, ema_pg.main, ["--beta=0.1", "--ema-decay=0.9", "--output=x", "--resume"], "--ema-decay", "--resume")


def test_a_moving_reference_outlives_a_skipped_first_update():
    """If the very first gradient is not finite, Adam has no state yet. The next iteration goes on all the same."""
    model = make_model()
    reference = make_model().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = functools.partial(ema_pg.moving_update, empg.update, 0.7, 1, model, optimizer)
    skipped = step(rows_with(math.nan * ADVANTAGES), config(), reference)
    assert math.isnan(skipped["grad_norm"])
    assert ema_pg.updates_done(model, optimizer) == 0
    taken = step(rows_with(ADVANTAGES), config(), reference)
    assert math.isfinite(taken["grad_norm"])
    assert ema_pg.updates_done(model, optimizer) == 1


@pytest.mark.parametrize("more", [{"eval_problems": 1}, {"eval_every": 0}], ids=["few-held-out", "no-evaluation"])
def test_mistake_held_out_problems_in_training(more, tiny, tmp_path, monkeypatch):
    """A question that stands in both splits is not trained on, even if it differs in spacing or in upper and lower case, and
    however few problems the evaluation uses, if any."""
    seen = []
    monkeypatch.setattr(empg, "train", lambda *args: seen.extend(args[5:7]))

    def row(i):
        return {"question": f"{i}+{i}=", "answer": 2 * i}  # numbers will do for answers

    copies = [
        {"question": " 3+3=\n", "answer": "6"},
        {"question": "5+5= ", "answer": "10"},
        {"question": "ADD 1+8=", "answer": "9"},
    ]
    train = [*map(row, range(8)), *copies]
    test = [*map(row, (1, 3, 5, 9)), {"question": "add  1+8=", "answer": 9}]
    data = write_rows(tmp_path / "data", train=train, test=test)
    change(monkeypatch, "gsm8k", prompt="{question}")
    empg.main(options(tiny, tmp_path / "run", task="gsm8k", data=data, **more))
    problems, held_out = seen
    assert [problem["question"] for problem in problems] == [f"{i}+{i}=" for i in (0, 2, 4, 6, 7)]
    assert len(held_out) == ("eval_problems" in more)
    assert GSM8K.reward("so 14", problems[-1]["answer"]) == 1


def test_the_sums_that_are_held_out_are_not_trained_on():
    """The task sums has 9,500 questions to train on and 500 others to evaluate on."""
    train = {row["question"] for row in empg.sums_problems(None, "train")}
    test = {row["question"] for row in empg.sums_problems(None, "test")}
    assert (len(train), len(test)) == (9500, 500)
    assert not train & test


# ---- Many processes

# A run that notes what it sees and does, as a program of its own. Call it with a file for these notes, and the options.
CHILD = """
import dataclasses, gc, os, sys
sys.path.insert(0, PROJECT)
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
import empg

seen = {"trajectories": [], "gradients": []}

# 1) Note what is sampled.
original_sample_trajectories = empg.sample_trajectories
def sample_trajectories(*args, **options):
    rows = original_sample_trajectories(*args, **options)
    seen["trajectories"].append([(row["prompt"], row["response"]) for row in rows])
    return rows
empg.sample_trajectories = sample_trajectories

# 2) Prompts are of unequal length, and only half of them can be rewarded: so the processes differ in work.
problems = [{"question": "0+" * (i % 4) + f"{i}=", "answer": str(i % 4)} for i in range(100, 150)]
def reward(response, answer):
    return float(len(response) % 2) if int(answer) < 2 else 0.0
def split_problems(data, split):
    return problems[:6] if split == "test" else problems[6:]
empg.TASKS["sums"] = dataclasses.replace(empg.TASKS["sums"], reward=reward, problems=split_problems)

# 3) Before each step note the gradient, joined over the processes, and how many numbers this process holds.
def note_step(optimizer, args, kwargs):
    parameters = optimizer.param_groups[0]["params"]
    gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in parameters]
    averages = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors = [tensor for tensor in (*parameters, *gradients, *averages) if tensor.ndim]  # not Adam's counters
    seen["held"] = sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    seen["gradients"].append(torch.cat([g.flatten() for g in whole]))
register_optimizer_step_pre_hook(note_step)

# 4) A DDP model that outlives its process group can hang.
original_destroy = empg.dist.destroy_process_group
def destroy():
    assert not any(type(thing).__name__ == "DistributedDataParallel" for thing in gc.get_objects())
    original_destroy()
empg.dist.destroy_process_group = destroy
""".replace("PROJECT", repr(str(HERE)))
SAVE = """
empg.main(sys.argv[2:])
torch.save(seen, sys.argv[1] + "." + os.environ.get("RANK", "0"))
"""
WATCH = [sys.executable, "-c", CHILD + SAVE]


def run(command: list, code: int = 0, **env) -> subprocess.CompletedProcess:
    """A command in a process of its own, which has to end with this code."""
    how = {"capture_output": True, "text": True, "timeout": 200, "env": os.environ | env, "cwd": HERE}
    done = subprocess.run([str(word) for word in command], check=False, **how)
    assert done.returncode == code, done.stderr
    return done


def run_ranks(processes: int, command: list, codes=(0, 0, 0, 0)) -> list[subprocess.CompletedProcess]:
    """As torchrun does it, but for watching over them, which takes seconds to start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with ThreadPoolExecutor(processes) as threads:
        return list(threads.map(lambda rank, code: run(command, code, **env, **rank), ranks, codes))


UNEVEN = {"num_samples": 6, "micro_batch_tokens": 60, "steps": 3, "prompts_per_step": 5}
KL = {"beta": 0.1, "updates": 2}
SHARD = ["--shard", "--gradient-checkpointing"]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Runs in one process, without and with a KL: their options, what they see and what they record."""
    path = tmp_path_factory.mktemp("alone")
    kinds = {"plain": UNEVEN, "kl": UNEVEN | KL}
    commands = [[*WATCH, path / kind, *options(tiny, path / f"run-{kind}", **more)] for kind, more in kinds.items()]
    with ThreadPoolExecutor() as threads:
        list(threads.map(run, commands))
    return {kind: (more, torch.load(path / f"{kind}.0"), metrics(path / f"run-{kind}")) for kind, more in kinds.items()}


@pytest.mark.parametrize(
    ("processes", "kind", "flags"), [(2, "plain", []), (4, "kl", []), (2, "kl", SHARD), (4, "plain", SHARD)]
)
def test_mistakes_statistics_per_rank_and_mean_over_ranks(alone, processes, kind, flags, tiny, tmp_path):
    """Runs on 2 and 4 processes, whole (DDP) or sharded (FSDP), sample the same trajectories as a run on one, follow its
    gradients within 1e-5 and record its metrics; sharded, each process holds its share of the weights."""
    more, single, rows = alone[kind]
    run_ranks(processes, [*WATCH, tmp_path / "seen", *options(tiny, tmp_path / "run", *flags, **more)])
    same_metrics(rows, metrics(tmp_path / "run"))
    ranks = [torch.load(tmp_path / f"seen.{rank}") for rank in range(processes)]
    for rank in ranks:
        assert rank["trajectories"] == single["trajectories"]
        assert len(rank["gradients"]) == len(single["gradients"]) >= 3
        for one, first, expected in zip(rank["gradients"], ranks[0]["gradients"], single["gradients"]):
            assert torch.equal(one, first)
            assert (one - expected).norm() <= 1e-5 * expected.norm()
        # Weights, gradients and Adam's averages. (A tenth more, since not everything divides evenly.)
        share = 1.1 / processes if flags else 1
        assert rank["held"] <= share * single["held"]


def test_a_process_group_of_the_caller_is_left_to_the_caller(tiny, tmp_path, odd_is_right):
    """A program that has made a process group before it calls main still has it afterwards."""
    empg.start_processes("cpu")
    try:
        empg.main(options(tiny, tmp_path / "run", steps=1))
        scoring.main([f"--model={tiny}", "--task=sums", "--limit=4", "--max-new-tokens=4", "--device=cpu"])
        assert empg.dist.is_initialized()
    finally:
        empg.dist.destroy_process_group()
    empg.main(options(tiny, tmp_path / "other", steps=1))
    assert not empg.dist.is_initialized()


@pytest.mark.parametrize("module", ["empg", "eval"])
def test_an_error_of_any_process_is_said(module, tiny, tmp_path):
    """If the model cannot be loaded in the second of two processes only, both end with code 2, and the first says why."""
    program = """
        import sys; sys.path.insert(0, PROJECT)
        import empg, MODULE
        original = empg.load_model
        def load_model(*args):
            if empg.RANK == 1:
                raise ValueError("the disk of this machine is broken")
            return original(*args)
        empg.load_model = load_model
        MODULE.main(sys.argv[1:])
        """
    program = inspect.cleandoc(program).replace("PROJECT", repr(str(HERE))).replace("MODULE", module)
    words = [f"--model={tiny}", "--task=sums", "--device=cpu", "--max-new-tokens=8"]
    ended = run_ranks(2, [sys.executable, "-c", program, *words], codes=(2, 2))
    assert [done.stderr.splitlines()[-1:] for done in ended] == [["error: the disk of this machine is broken"], []]


# ---- Checkpoints and kills: real signals to real processes


def test_mistake_adams_averages_not_in_the_checkpoint(tiny, tmp_path, odd_is_right):
    """A run that is stopped after four of six iterations and resumed, and resumed again when it is done, ends as one that
    was not stopped, bit for bit, and keeps one checkpoint."""
    empg.main(options(tiny, tmp_path / "whole", steps=6, **KL))
    for steps in (4, 6, 6):
        empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps, save_every=3, **KL))
        assert [path.name for path in (tmp_path / "parts").glob("check*")] == [f"checkpoint-{steps:06d}"]
    same_run(tmp_path / "whole", tmp_path / "parts")


KILLS = int(os.environ.get("EMPG_KILLS", "1"))


def test_no_kill_loses_more_than_the_work_since_the_last_checkpoint(tiny, tmp_path):
    """A run that SIGKILL ends at random moments, also while it writes, resumes each time from its newest checkpoint, and ends
    with the metrics and weights, bit for bit, of a run that nothing disturbed."""
    more = {"steps": 6 * KILLS, "save_every": 1}
    command = [*WATCH, tmp_path / "seen", *options(tiny, tmp_path / "run", "--resume", **more)]
    undisturbed = [*WATCH, tmp_path / "seen-undisturbed", *options(tiny, tmp_path / "undisturbed", **more)]
    random_seconds = np.random.default_rng()  # without a seed on purpose: other moments in every run of the tests
    saved = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        # Wait for its first iteration, and a little more.
        text = "".join(itertools.takewhile(lambda line: " reward " not in line, process.stdout))
        assert saved == 0 or f"Resuming after iteration {saved}\n" in text
        time.sleep(random_seconds.uniform(0, 0.5))
        process.kill()
        process.wait()
        saved = max([saved, *(int(path.name[-6:]) for path in (tmp_path / "run").glob("checkpoint-*"))])
    with ThreadPoolExecutor() as threads:
        last, _ = threads.map(run, [command, undisturbed])
    assert saved == 0 or f"Resuming after iteration {saved}\n" in last.stdout
    same_run(tmp_path / "undisturbed", tmp_path / "run")


KILLED_IN_A_SAVE = """
import pathlib, shutil, signal
killed, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
def kill_once(path, name):
    if pathlib.Path(path).name == name and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
original_rename = pathlib.Path.rename
def rename(path, target):
    if moment == "unnamed":
        kill_once(target, "checkpoint-000002")
    return original_rename(path, target)
pathlib.Path.rename = rename
original_write_text = pathlib.Path.write_text
def write_text(path, text):
    names = {"metrics": "metrics.jsonl", "config": "config.json"}
    if path.name.startswith(names.get(moment, "none")) and ('"step": 2' in text or moment == "config"):
        original_write_text(path, text[: len(text) // 2])
        kill_once(path, path.name)
    return original_write_text(path, text)
pathlib.Path.write_text = write_text
original_rmtree = shutil.rmtree
def rmtree(path, *args, **options):
    if moment == "two":
        kill_once(path, "checkpoint-000001")
    return original_rmtree(path, *args, **options)
shutil.rmtree = rmtree
empg.main(sys.argv[3:])
"""


def test_a_kill_within_a_save(tiny, tmp_path):
    """A run that SIGKILL ends when a checkpoint is written and has no name yet resumes from the one before. Ended when the
    new one has its name, and the one before is still there, it resumes from the new one. Ended in the middle of writing
    metrics.jsonl or config.json, it leaves the file before whole, or none."""
    more = {"steps": 3, "save_every": 1, "eval_every": 0}

    def run_and_kill(moment):
        words = [tmp_path / f"killed-{moment}", moment, *options(tiny, tmp_path / moment, "--resume", **more)]
        command = [str(word) for word in (sys.executable, "-c", CHILD + KILLED_IN_A_SAVE, *words)]
        killed = subprocess.run(command, check=False, capture_output=True, cwd=HERE)
        assert killed.returncode == -signal.SIGKILL
        if moment == "metrics":
            assert [row["step"] for row in metrics(tmp_path / moment)] == [1]
        assert (tmp_path / moment / "config.json").exists() == (moment != "config")
        return run(command).stdout

    with ThreadPoolExecutor(2) as threads:
        whole = threads.submit(run, [*WATCH, tmp_path / "seen", *options(tiny, tmp_path / "whole", **more)])
        unnamed, two, in_metrics, in_config = threads.map(run_and_kill, ("unnamed", "two", "metrics", "config"))
        whole.result()
    assert "Resuming after iteration 1\n" in unnamed
    assert "Resuming after iteration 2\n" in two
    assert "Resuming after iteration 1\n" in in_metrics
    assert "Resuming" not in in_config
    for moment in ("unnamed", "two", "metrics", "config"):
        same_run(tmp_path / "whole", tmp_path / moment)
        assert [path.name for path in (tmp_path / moment).glob("check*")] == ["checkpoint-000003"]


KILLED_ONCE = """
import pathlib, signal
original_save = empg.dcp.save
killed = pathlib.Path(sys.argv[1])
def save(state, **options):
    if state["step"] == 2 and empg.RANK == 1 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    original_save(state, **options)
empg.dcp.save = save
empg.main(sys.argv[2:])
"""


def test_torchrun_restarts_after_the_kill_of_a_rank(alone, tiny, tmp_path):
    """When SIGKILL ends one rank of a sharded run just before it writes its share of a checkpoint, torchrun restarts the run,
    which resumes from the checkpoint before and ends with the metrics of one process."""
    more, _, rows = alone["plain"]
    (tmp_path / "child.py").write_text(CHILD + KILLED_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    arguments = options(tiny, tmp_path / "run", "--resume", "--shard", **more, save_every=1)
    done = run([*torchrun, tmp_path / "child.py", tmp_path / "killed", *arguments])
    assert (tmp_path / "killed").exists()
    assert "Resuming after iteration 1" in done.stdout
    same_metrics(rows, metrics(tmp_path / "run"))


# ---- Bad input gets one clear line, exit code 2, before any long work


def refuses(capfd, main, argv, *words) -> None:
    """`main` ends with exit code 2; the last line on standard error is the only error there, and has all the words."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    error = capfd.readouterr().err
    *_, line = error.splitlines()
    assert stop.value.code == 2, error
    assert line.startswith("error: "), error
    assert error.count("error: ") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in line


BAD = """
no-such-option=1 :: --no-such-option
steps=many :: --steps many
steps=0 :: --steps 0: must be above 0
num-samples=1 :: --num-samples 1: must be at least 2
max-new-tokens=60 :: --max-new-tokens 60: at most 56 fit
temperature=nan :: --temperature nan: must be
seed=-1 :: --seed -1: must be finite, and not negative
task=chess :: --task chess: choose sums, gsm8k, math-hard
dtype=float16 :: --dtype float16 bfloat16
model=someone/no-such-model :: --model someone/no-such-model hub
task=gsm8k --data=someone/no-data :: --data someone/no-data hub train.jsonl 'question' 'answer'
data=anything :: --data sums
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_options(tiny, tmp_path, capfd, line):
    """Each is refused by name, with what would do instead, and writes nothing."""
    words, expected = line.split(" :: ")
    refuses(capfd, empg.main, [*options(tiny, tmp_path / "out"), *f"--{words}".split()], *expected.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main", [empg.main, scoring.main], ids=["empg", "eval"])
def test_help_says_each_default_once(main, capsys):
    """--help gives every option's default, never twice, and never as None."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text
    assert not re.search(r"default: |Default: [^.]*\. Default: ", text)
    assert text.count("Default: ") >= 10


def test_without_eval_py_a_task_that_needs_it_ends_early(tmp_path):
    """empg.py alone in a directory can be imported, and says before it looks for a model that GSM8K needs eval.py."""
    shutil.copy(HERE / "empg.py", tmp_path)
    data = write_rows(tmp_path / "data", train=[ROW], test=[ROW | {"question": "?"}])
    words = ["--model=someone/no-such-model", f"--data={data}", "--device=cpu", f"--output={tmp_path / 'out'}"]
    done = run([sys.executable, tmp_path / "empg.py", *words], code=2)
    assert "error: --task gsm8k: needs eval.py beside empg.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_math_verify_a_task_that_needs_it_ends_early(tmp_path, capfd, monkeypatch):
    """If a package that eval.py needs is missing, that, too, is said before a model is looked for."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    scoring.is_right.cache_clear()
    data = write_rows(tmp_path / "data", train=[ROW], test=[ROW | {"question": "?"}])
    argv = ["--model=someone/no-such-model", f"--data={data}", "--device=cpu", f"--output={tmp_path / 'out'}"]
    refuses(capfd, empg.main, argv, "--task gsm8k", "math_verify")


def test_only_the_first_process_shows_progress():
    """tqdm's bars are off in all processes but the first."""
    program = "import empg; from tqdm import tqdm; list(tqdm(range(3)))"
    assert "3/3" in run([sys.executable, "-c", program], RANK="0").stderr
    assert run([sys.executable, "-c", program], RANK="1").stderr == ""


@pytest.mark.parametrize("answer", ["", "#### ", r"It is \boxed{}", " $ "])
def test_an_answer_that_cannot_be_read(answer, tmp_path, capfd):
    """A problem whose answer is empty, in whatever form, is refused before a model is looked for."""
    data = write_rows(
        tmp_path / "data", train=[ROW, {"question": "2+2=", "answer": answer}], test=[ROW | {"question": "?"}]
    )
    argv = ["--model=someone/no-such-model", f"--data={data}", "--device=cpu", f"--output={tmp_path / 'out'}"]
    refuses(capfd, empg.main, argv, "the answer", "is empty")


def test_a_tokenizer_without_an_end_token(tiny, tmp_path, capfd):
    """It is refused in one line: no response could end."""
    tokenizer = base_recipe.character_tokenizer()
    tokenizer.eos_token = None
    endless = shutil.copytree(tiny, tmp_path / "endless")
    tokenizer.save_pretrained(endless)
    refuses(capfd, empg.main, options(endless, tmp_path / "out"), "EOS")
    assert not (tmp_path / "out").exists()


ROW = {"question": "1+1=", "answer": "#### 2"}


@pytest.mark.parametrize(
    "splits",
    [{"train": [{"q": "1"}], "test": [{"q": "1"}]}, {"train": [ROW], "test": []}, {"train": [ROW]}],
    ids=["columns", "rows", "split"],
)
def test_data_with_something_missing(splits, tiny, tmp_path, capfd):
    """A dataset without the columns, without rows or without a split is refused in one line, which says what is needed."""
    data = write_rows(tmp_path / "data", **splits)
    argv = options(tiny, tmp_path / "out", task="gsm8k", data=data)
    refuses(capfd, empg.main, argv, "--data", str(data), ".jsonl", "'question'")
    assert not (tmp_path / "out").exists()


def test_without_evaluation_no_test_split_is_needed(tmp_path, capsys):
    """With --eval-every 0, a dataset that has only a training split will do, and what cannot be checked then is said."""
    data = write_rows(tmp_path / "data", train=[ROW])
    problems, held_out = empg.load_problems(empg.Config(task="gsm8k", data=str(data), eval_every=0))
    assert [problem["question"] for problem in problems] == ["1+1="]
    assert held_out == []
    assert "test split cannot be read" in capsys.readouterr().out


def test_a_task_without_held_out_problems(tiny, tmp_path, capfd, monkeypatch):
    """If a task of one's own has no problems to evaluate on, an evaluation is refused."""
    problems = [{"question": "1+1=", "answer": "2"}]
    change(monkeypatch, problems=lambda _, split: problems if split == "train" else [])
    refuses(capfd, empg.main, options(tiny, tmp_path / "out"), "--data", "none are held out")


def test_a_model_of_nan_is_refused(tmp_path, capfd):
    """A model whose probabilities are not numbers does not pass as one that is right."""
    model = make_model(dtype=torch.float32)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    model.save_pretrained(tmp_path / "nan")
    base_recipe.character_tokenizer().save_pretrained(tmp_path / "nan")
    refuses(capfd, empg.main, options(tmp_path / "nan", tmp_path / "out"), "is nan nats off")


def test_bad_directories(tiny, tmp_path, capfd):
    """An --output that is a file or cannot be made, and --resume without --output, are refused in one line."""
    (tmp_path / "file").touch()
    refuses(capfd, empg.main, options(tiny, tmp_path / "file"), str(tmp_path / "file"), "exists")
    refuses(capfd, empg.main, options(tiny, "/proc/nothing/run"), "/proc/nothing")
    refuses(capfd, empg.main, ["--task=sums", "--resume"], "--resume", "--output DIR")
    # Directories of something else may have a config.json, too.
    for text, expected in (("{", "cannot be read"), ("[1]", "cannot be read"), ('{"layers": [1]}', "begun with")):
        (tmp_path / "config.json").write_text(text)
        refuses(capfd, empg.main, options(tiny, tmp_path, "--resume"), f"--output {tmp_path}", expected)
        assert (tmp_path / "config.json").read_text() == text


def files_in(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_run_is_not_taken_up_by_other_options(tiny, tmp_path, capfd, odd_is_right):
    """--resume with an option that would make it another run is refused in a line and loses nothing; options that change only
    the pace, the memory or the end are taken."""
    out = tmp_path / "out"
    empg.main(options(tiny, out, steps=2))
    before = files_in(out)
    refuses(capfd, empg.main, options(tiny, out), "--output", "another run", "--resume")
    for name, value, begun in (("lr", 0.5, 0.001), ("seed", 1, 0), ("prompts_per_step", 8, 4), ("beta", 0.1, 0.0)):
        changed = options(tiny, out, "--resume", **{name: value})
        refuses(capfd, empg.main, changed, f"--output {out}", f"begun with {{'{name}': {begun}}}")
    make_model(hidden_size=32).save_pretrained(tmp_path / "wider")
    base_recipe.character_tokenizer().save_pretrained(tmp_path / "wider")
    refuses(capfd, empg.main, options(tmp_path / "wider", out, "--resume"), "begun with {'model'", tiny)
    assert files_in(out) == before

    more = {"eval_every": 3, "save_every": 1, "sample_batch": 4, "micro_batch_tokens": 30}
    empg.main(options(tiny, out, "--resume", steps=3, **more))
    assert [row["step"] for row in metrics(out)][-2:] == [3, 3]  # an iteration and its evaluation
    refuses(capfd, empg.main, options(tiny, out, "--resume", steps=2), "--steps 2", "has 3 already")


def test_a_run_of_an_older_revision_is_refused(tiny, tmp_path, capfd, odd_is_right):
    """A run whose options are not those of this file, as an older one had --wandb, is refused in a line."""
    empg.main(options(tiny, tmp_path, steps=1))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"wandb": False}))
    before = files_in(tmp_path)
    refuses(capfd, empg.main, options(tiny, tmp_path, "--resume", steps=2), "begun with {'wandb': False}", "a new one")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "replace",
    [
        grpo.replace,
        functools.partial(importance.replace, "clipped"),
        functools.partial(ablations.replace, "none", "loo", False),
        functools.partial(ema_pg.replace, "k3", k=0),
        functools.partial(svrg.replace, 4, True),
    ],
    ids=["grpo", "importance", "ablations", "ema_pg", "svrg"],
)
def test_a_run_is_not_taken_up_by_another_method(replace, tiny, tmp_path, capfd, odd_is_right, pieces_come_back):
    """A study does not go on with a run of empg.py, and loses nothing of it."""
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0))
    before = files_in(tmp_path)
    replace()
    refuses(capfd, empg.main, options(tiny, tmp_path, "--resume"), "--output", "begun with {'method': 'EMPG'}")
    assert files_in(tmp_path) == before


def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, capfd, odd_is_right):
    """A checkpoint with a file that is cut, empty or missing is refused in a line that names it."""
    empg.main(options(tiny, tmp_path, steps=1))
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    again = options(tiny, tmp_path, "--resume", steps=2)
    expected = ("--output", f"{checkpoint.name} is damaged", "remove it")
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    refuses(capfd, empg.main, again, *expected)
    largest.write_bytes(b"")
    refuses(capfd, empg.main, again, *expected)
    (checkpoint / ".metadata").unlink()
    refuses(capfd, empg.main, again, *expected)


@pytest.mark.parametrize(
    ("gigabytes", "words", "expected"),
    [
        (0, "", "base sums float32"),
        (0, "--task=gsm8k", "Qwen2.5-0.5B gsm8k float32"),
        (0, "--model=x", "x gsm8k float32"),
        (80, "--task=sums", "base sums bfloat16"),
        (80, "", "Qwen2.5-1.5B gsm8k bfloat16"),
        (23.7, "", "Qwen2.5-0.5B gsm8k bfloat16"),
        (16, "", "base sums bfloat16"),
        (80, "--device=cpu", "base sums float32"),
        (80, "--dtype=float32", "Qwen2.5-1.5B gsm8k float32"),
    ],
)
def test_a_plain_command_stands_for_what_suits_the_machine(gigabytes, words, expected, monkeypatch):
    """Without --model it is the base model here on the sums, or what the GPU's memory holds on GSM8K; the user's words win,
    and the precision goes by the device."""
    memory = types.SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gigabytes > 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    config = empg.parse_options(words.split())
    assert f"{Path(config.model).name} {config.task} {config.dtype}" == expected


def test_devices_that_are_not_there(monkeypatch, tiny, tmp_path, capfd):
    """A GPU that is missing, too few GPUs for the processes, and a missing Apple GPU are each refused in one line."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        refuses(capfd, empg.main, options(tiny, tmp_path / "out", device=device), f"--device {device}", "--device cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    expected = ("--device cuda", "2 here for 4 processes")
    refuses(capfd, empg.main, options(tiny, tmp_path / "out", device="cuda"), *expected)
    refuses(capfd, scoring.main, ["--model=x", "--device=cuda"], *expected)


# ---- eval.py: scores, comparisons, curves


def test_pass_at_k_is_the_share_of_subsets():
    """pass@k is the share of the k-subsets of the samples that have a right one."""
    for n, right, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if right <= n and k <= n:
            samples = [1] * right + [0] * (n - right)
            subsets = list(itertools.combinations(samples, k))
            share = sum(max(subset) for subset in subsets) / len(subsets)
            assert scoring.pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_mcnemar_is_a_game_of_coins():
    """McNemar's p is the probability that coins are as lopsided as the problems on which A and B differ."""
    for only_a, only_b in itertools.product(range(6), repeat=2):
        n = only_a + only_b
        throws = list(itertools.product((0, 1), repeat=n))
        # sum(coins) heads are n - sum(coins) tails.
        lopsided = [abs(2 * sum(coins) - n) >= abs(only_a - only_b) for coins in throws]
        assert scoring.mcnemar_exact(only_a, only_b) == pytest.approx(np.mean(lopsided), abs=1e-12)


def test_the_majority_is_the_commonest_answer():
    """Of equally common answers it is the first; a response without an answer has no vote."""
    assert scoring.majority_vote(["7", "8", "8"]) == "8"
    assert scoring.majority_vote(["9", "8", "8", "9"]) == "9"
    assert scoring.majority_vote([None, None, "3"]) == "3"
    assert scoring.majority_vote([None]) is None


@pytest.mark.parametrize(("successes", "total"), [(1, 10), (50, 100), (499, 500), (0, 7), (7, 7)])
def test_wilson_interval(successes, total):
    """The share is inside the interval, whose ends are 1.96 of their own standard errors away from it, or 0 or 1."""
    share = successes / total
    low, high = scoring.wilson_interval(successes, total)
    assert low <= share <= high
    assert low < high
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == total)
    for end in {low, high} - {0.0, 1.0}:
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total), rel=1e-5)


def test_paired_difference():
    """It is the mean of B - A, with Agresti and Min's interval, which counts two problems more."""
    both, only_a, only_b, neither = 30, 5, 12, 13
    a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither])
    b = np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])
    gain = only_b - only_a
    n = len(a) + 2
    squares = only_a + only_b + 1  # of the differences; those of the two added problems sum to 1
    error = 1.959964 * math.sqrt(squares - gain**2 / n) / n
    expected = (gain / len(a), gain / n - error, gain / n + error)
    assert scoring.paired_difference(a, b) == pytest.approx(expected, rel=1e-6)
    _, low, high = scoring.paired_difference(a, a)
    assert low < 0 < high


def test_an_evaluation_says_what_its_rows_say(tmp_path, monkeypatch, capsys):
    """Accuracy, pass@k, maj@k, subjects, lengths and shares are those counted from the rows; samples do not depend on
    how many there are."""
    make_model(seed=1, vocab_size=17, dtype=torch.float32).save_pretrained(tmp_path)
    base_recipe.character_tokenizer().save_pretrained(tmp_path)
    kinds = ["Algebra"] * 30 + ["Geometry"] * 10
    problems = [{"question": f"{i}+1=", "answer": str(i % 9), "type": kind} for i, kind in enumerate(kinds)]
    change(monkeypatch, "gsm8k", prompt="{question}")
    data = write_rows(tmp_path / "data", test=problems)
    words = [f"--model={tmp_path}", "--task=gsm8k", f"--data={data}", "--max-new-tokens=12", "--device=cpu"]
    scoring.main([*words, "--num-samples=4", f"--output={tmp_path / 'new/results'}"])
    report = re.sub(" +", " ", capsys.readouterr().out)
    _header, *rows = read_rows(tmp_path / "new/results")

    # 1) The rows.
    assert [row["index"] for row in rows] == [i for i in range(40) for _ in range(4)]
    for row in rows:
        assert row["correct"] == bool(GSM8K.reward(row["response"], problems[row["index"]]["answer"]))
        assert row["answer"] == scoring.final_answer(row["response"])
        assert row["tokens"] == 12 or not row["cut"]
        assert row["response"].endswith("…") == row["cut"]

    # 2) The report.
    right = np.array([row["correct"] for row in rows]).reshape(40, 4)
    pass_at_2 = np.mean([[any(four[list(pair)]) for pair in itertools.combinations(range(4), 2)] for four in right])
    votes = [scoring.majority_vote([row["answer"] for row in rows[4 * i : 4 * i + 4]]) for i in range(40)]
    maj_at_4 = np.mean([vote == problem["answer"] for vote, problem in zip(votes, problems)])
    tokens = np.mean([row["tokens"] for row in rows])
    cut = np.mean([row["cut"] for row in rows])
    assert 0 < right.mean() < 1
    assert 0 < cut < 1
    for text in (
        f"mean@4 {right.mean():.3f}, 95 %",
        f"{pass_at_2:.3f} at k = 2",
        f"{right.any(1).mean():.3f} at k = 4",
        f"maj@4 {maj_at_4:.3f}",
        f"Algebra {right[:30].mean():.3f} of 30",
        f"{tokens:.1f} mean",
        f"{cut:.1%}",
        f"without an answer {np.mean([row['answer'] is None for row in rows]):.1%}",
    ):
        assert text in report

    # 3) One sample each, of the first 20 problems, are the first samples.
    scoring.main([*words, "--temperature=1", "--limit=20", f"--output={tmp_path / 'one'}"])
    assert [row["response"] for row in read_rows(tmp_path / "one")[1:]] == [row["response"] for row in rows[:80:4]]


def test_a_killed_evaluation_goes_on(tiny, tmp_path, capfd):
    """Two processes that go on with a file that a kill has cut, even in a line, keep what it has, and write the rest byte
    for byte as one process does."""
    words = [f"--model={tiny}", "--task=sums", "--num-samples=2", "--max-new-tokens=8", "--limit=60", "--device=cpu"]
    scoring.main([*words, f"--output={tmp_path / 'one'}"])
    # Mark a row, to see that it is not computed again.
    marked = (tmp_path / "one").read_bytes().replace(b'"index": 0,', b'"index": 0, "kept": true,', 1)
    in_a_line = marked.index(b"\n", len(marked) // 3) + 40
    (tmp_path / "two").write_bytes(marked[:in_a_line])
    run_ranks(2, [sys.executable, HERE / "eval.py", *words, "--sample-batch=6", f"--output={tmp_path / 'two'}"])
    assert (tmp_path / "two").read_bytes() == marked
    refuses(capfd, scoring.main, [*words, "--seed=1", f"--output={tmp_path / 'two'}"], "--output", "'seed': 0")
    assert (tmp_path / "two").read_bytes() == marked


def results(path, correct, samples=1, tokens=5, question="q") -> str:
    """A results file with these outcomes."""
    rows = [{"num_samples": samples}]
    for i, is_correct in enumerate(correct):
        row = {"question": f"{question}{i // samples}", "correct": bool(is_correct)}
        rows.append(row | {"tokens": tokens, "response": "Wait, no."})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_compare(tmp_path, capfd):
    """--compare reports accuracies, the paired difference, on how many problems each is better, McNemar's p and lengths."""
    a = results(tmp_path / "a", [1, 1, 0, 0, 0, 0, 0, 0])
    b = results(tmp_path / "b", [1, 0, 1, 1, 1, 1, 1, 0], tokens=9)
    scoring.main(["--compare", a, b])
    report = capfd.readouterr().out
    for text in ("/a: 0.250", "/b: 0.750", "+0.500, 95 %", "p = 0.22; A better on 1, B on 5", "5.0 and 9.0"):
        assert text in report

    one_sample = results(tmp_path / "one", [1, 0, 0])
    two_samples = results(tmp_path / "two", [1, 1, 1, 0, 0, 0], samples=2)
    scoring.main(["--compare", one_sample, two_samples])
    report = capfd.readouterr().out
    assert "one: 0.333" in report
    assert "A better on 0, B on 1" in report

    refuses(capfd, scoring.main, ["--compare", a, results(tmp_path / "e", [1] * 8, question="other")], "same problems")
    refuses(capfd, scoring.main, ["--compare", a, results(tmp_path / "f", [1] * 7)], "same problems")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model x --output DIRECTORY", "is a directory"),
        ("--model x --output DIRECTORY/file/below.jsonl", "cannot be made"),
        ("--compare a b", "a:"),
        ("--compare a", "choose"),
        ("", "choose"),
        ("--curves x", "x: is not the directory"),
        ("--model x --task chess", "chess"),
        ("--model x --limit 0", "--limit 0"),
    ],
)
def test_bad_options_of_eval(words, expected, tmp_path, capfd):
    """Each is refused in one line."""
    (tmp_path / "file").touch()
    refuses(capfd, scoring.main, words.replace("DIRECTORY", str(tmp_path)).split(), expected)


def test_the_papers_scores_stand_beside_its_models(tmp_path):
    """A run that began with a model of the paper gets its score; another model gets none."""
    (tmp_path / "config.json").write_text('{"model": "Qwen/Qwen2.5-14B-Instruct"}')
    assert "EMPG 0.808" in scoring.paper_scores(f"{tmp_path}/model", "math-hard")["in the paper"]
    assert scoring.paper_scores("Qwen/Qwen2.5-7B-Instruct", "gsm8k") == {}


@pytest.fixture
def figures(monkeypatch):
    """The figures that have been saved."""
    found = []
    spy(monkeypatch, "savefig", lambda args, *_: found.append(args[0]), Figure)
    return found


def test_curves(tmp_path, capsys, figures):
    """Seeds of a setting are drawn as mean and band, other runs as lines of another colour and style, named in a legend."""
    runs = {"x-0": ([0.2, 0.4, None, 0.8], 1), "x-1": ([0.4, 0.6, 0.5, 1.0, 1.0], 1), "z-0": ([0.1, 0.1], 2)}
    for name, (rewards, lr) in runs.items():
        rows = [{"step": i, "reward": reward, "response_tokens": 10.0 * i} for i, reward in enumerate(rewards, 1)]
        write_rows(tmp_path / name, metrics=[{"step": 0, "eval_accuracy": 0.1}, *rows])
        (tmp_path / name / "config.json").write_text(json.dumps({"seed": name[-1], "output": name, "lr": lr}))
    scoring.main(["--curves", *(str(tmp_path / name) for name in runs), f"--output={tmp_path / 'c.png'}"])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "x, 2 seeds" in capsys.readouterr().out

    (figure,) = figures
    reward, accuracy, _ = figure.axes
    seeds, single = reward.lines
    # Only the iterations that both seeds have.
    assert seeds.get_xdata().tolist() == [1, 2, 4]
    assert seeds.get_ydata().tolist() == pytest.approx([0.3, 0.5, 0.9])
    band = reward.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 1.0))
    assert seeds.get_color() != single.get_color()
    assert seeds.get_linestyle() != single.get_linestyle()
    assert accuracy.lines[0].get_xdata().tolist() == [0]
    assert [text.get_text() for text in figure.legends[0].texts] == ["x, 2 seeds", "z-0"]


# ---- The base model, the studies, the README


def test_the_recipe_of_the_base_model_learns_and_the_base_model_trains(tmp_path):
    """A short version of the recipe learns, and writes what the base directory has; ten iterations of the plain command
    bring the base itself from a third to eight in ten."""
    losses = base_recipe.make(tmp_path / "base", iterations=20)
    assert losses[-1] < 0.8 * losses[0]
    there = {path.name for path in (HERE / "base").iterdir()}
    made = {path.name for path in (tmp_path / "base").iterdir()}
    assert there - {"make.py", "__pycache__"} <= made <= there
    tokenizer, model = empg.load_model(str(tmp_path / "base"))
    base_tokenizer, base = empg.load_model(str(HERE / "base"))
    assert tokenizer.get_vocab() == base_tokenizer.get_vocab()
    assert [p.shape for p in model.parameters()] == [p.shape for p in base.parameters()]

    empg.main(["--task=sums", "--steps=10", "--eval-every=10", f"--output={tmp_path / 'run'}", "--device=cpu"])
    rows = metrics(tmp_path / "run")
    before, after = (row["eval_accuracy"] for row in rows if "eval_accuracy" in row)
    assert before == pytest.approx(0.370, abs=0.01)  # greedy; of sampled responses, 0.44 are right
    assert after > 0.8
    lengths = [row["response_tokens"] for row in rows if "reward" in row]
    assert lengths[-1] > 1.1 * lengths[0]


@pytest.mark.parametrize("clip", [0.2, 1e9])
def test_grpo_is_the_formula_of_deepseekmath(clip):
    """Advantages, loss and gradient equal DeepSeekMath's equation, written out in loops over samples and tokens."""
    rewards = torch.tensor([[0.0, 1, 1, 0, 0], [0.3, 0.3, 0.3, 0.3, 0.3], [5, -1, 0, 2.5, 1]], dtype=torch.float64)
    lengths = [1 + i % 4 for i in range(15)]
    mask = torch.tensor([[1.0] * length + [0.0] * (4 - length) for length in lengths], dtype=torch.float64)
    logprobs = toy_logits(0, (15, 4))
    old_logprobs = logprobs.detach() + 0.3 * toy_logits(1, (15, 4)).detach()

    expected = 0.0
    for i, length in enumerate(lengths):
        prompt, sample = divmod(i, 5)
        group = rewards[prompt].numpy()
        advantage = (group[sample] - group.mean()) / (group.std() + 1e-6)
        for t in range(length):
            ratio = torch.exp(logprobs[i, t] - old_logprobs[i, t])
            clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
            expected = expected - torch.minimum(ratio * advantage, clipped * advantage) / length / 15
    advantages = grpo.grpo_advantages(rewards)
    assert (advantages[1] == 0).all()
    loss = grpo.grpo_loss(logprobs, old_logprobs, mask, advantages.flatten(), clip)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(expected, logprobs))


def test_importance_weights_are_exact_at_any_distance():
    """Enumerated, samples of θ* weighted by P_θ(τ)/P_θ*(τ) give the policy gradient of a θ far from it, and EMPG's do not."""
    logits = toy_logits(5)
    logprobs = toy_logprobs(logits)
    old_logprobs = toy_logprobs(toy_logits(6)).detach()
    # The mean over the seven trajectories is then the expectation under θ*.
    weights = len(TRAJECTORIES) * probabilities(old_logprobs) * RIGHT
    policy_gradient = gradient((probabilities(logprobs) * RIGHT).sum(), logits)
    weighted = -gradient(importance.trajectory_loss(logprobs, old_logprobs, MASK, weights), logits)
    torch.testing.assert_close(weighted, policy_gradient)
    without = -gradient(empg.empg_loss(logprobs, MASK, weights), logits)
    assert (without - policy_gradient).norm() > 0.1 * policy_gradient.norm()


@pytest.mark.parametrize("loss", importance.LOSSES.values())
def test_importance_weights_change_nothing_at_the_first_update(loss):
    """Where θ = θ*, the gradient with importance weights, whole or clipped, is EMPG's."""
    logits = toy_logits(5)
    logprobs = toy_logprobs(logits)
    weights = RIGHT - 0.4
    weighted = gradient(loss(logprobs, logprobs.detach(), MASK, weights), logits)
    torch.testing.assert_close(weighted, gradient(empg.empg_loss(logprobs, MASK, weights), logits))


def test_beyond_the_clip_there_is_no_gradient():
    """A token that has become much likelier has no more gradient if its weight is positive, and still has it if negative."""
    logits = toy_logits(5)
    logprobs = toy_logprobs(logits)
    old_logprobs = logprobs.detach() - 0.5  # every ratio is 1.65
    weights = torch.ones(len(TRAJECTORIES))
    assert (gradient(importance.clipped_loss(logprobs, old_logprobs, MASK, weights), logits) == 0).all()
    assert (gradient(importance.clipped_loss(logprobs, old_logprobs, MASK, -weights), logits) != 0).any()


def plain_gradient(theta: torch.Tensor, rows: list[dict]) -> torch.Tensor:
    """The gradient of the mean over these trajectories at θ, from plain passes."""
    model = make_model()
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    terms = [row["advantage"] * plain_logprobs(model, row["prompt"], row["response"]).sum() for row in rows]
    (-torch.stack(terms).mean()).backward()
    return flat_grad(model)


def svrg_steps(lr: float, control_variate: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """θ and the gradient that is followed, for each of four steps."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append((flat(model), flat_grad(model))))
    svrg.update(model, optimizer, rows_with(ADVANTAGES), config(), parts=4, control_variate=control_variate)
    return found


def test_svrg_is_its_formula():
    """Each step follows g_B(θ) - g_B(θ*) + g_D(θ*), from plain passes; where θ = θ*, that is the gradient of the whole buffer
    for every part, and without the control variate only the mean of the parts is."""
    rows = rows_with(ADVANTAGES)
    old_theta = flat(make_model())
    parts = svrg.random_parts(rows, 4, [0, 0])
    assert [len(part) for part in parts] == [2] * 4
    assert sorted(rows.index(row) for part in parts for row in part) == list(range(8))

    whole = plain_gradient(old_theta, rows)
    for part, (theta, followed) in zip(parts, svrg_steps(0.1, control_variate=True), strict=True):
        expected = plain_gradient(theta, part) - plain_gradient(old_theta, part) + whole
        assert same_gradient(followed, expected)
    for _, followed in svrg_steps(0.0, control_variate=True):
        assert same_gradient(followed, whole)
    plain = [followed for _, followed in svrg_steps(0.0, control_variate=False)]
    assert same_gradient(sum(plain) / 4, whole)
    assert not same_gradient(plain[0], whole)


def test_svrg_resumes_as_it_would_have_gone_on(tiny, tmp_path, odd_is_right, monkeypatch):
    """Every buffer is split in another way, in a resumed run, too."""
    monkeypatch.setattr(empg, "update", functools.partial(svrg.update, parts=3, control_variate=True))
    updates_before = []
    spy(monkeypatch, "random_parts", lambda args, *_: updates_before.append(args[2][1]), svrg)
    empg.main(options(tiny, tmp_path / "whole", steps=4))
    assert updates_before == [0, 3, 6, 9]
    for steps in (2, 4):
        empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps))
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_parts_that_are_no_number_of_parts(capfd):
    """svrg.py refuses --parts 0 in one line."""
    refuses(capfd, svrg.main, ["--parts=0"], "--parts 0", "at least 1")


@pytest.fixture
def runs_of_studies(tmp_path):
    """The directories of three runs, of which two are seeds of one setting."""
    for name, tokens, last in (("none-2-0", 4.0, 0.5), ("none-2-1", 5.0, 0.7), ("clipped-4-0", 4.0, 0.9)):
        iteration = {"reward": 0.3, "response_tokens": tokens, "kl": None, "step_seconds": 2.0}
        rows = [{"step": 0, "eval_accuracy": 0.1}]
        for step in range(1, 31):
            rows.append({"step": step, **iteration})
            if step in (10, 20, 30):
                accuracy = {10: 0.4, 20: 0.3, 30: last}[step]
                rows.append({"step": step, "eval_accuracy": accuracy})
        write_rows(tmp_path / name, metrics=rows)
        (tmp_path / name / "config.json").write_text(json.dumps({"steps": 30}))
    return sorted(str(path) for path in tmp_path.iterdir())


def test_tables_of_studies(runs_of_studies):
    """A row has the name of a setting, and the mean and the deviation of each column over its seeds."""
    head, _, *rows = tables.table(runs_of_studies, seconds=45).splitlines()
    names, clipped, none = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *rows))
    assert dict(zip(names, none, strict=True)) == {
        "": "none-2, 2 seeds",
        "after 10": "0.400 ± 0.000",
        "after 20": "0.300 ± 0.000",
        "after 30": "0.600 ± 0.141",
        "lowest from 20 on": "0.300 ± 0.000",
        "response tokens": "4.500 ± 0.707",
        "seconds an iteration": "2.000 ± 0.000",
        "after 45 s": "0.300 ± 0.000",  # 22 iterations have been done, and the last evaluation was after 20
        "iterations by then": "20.000 ± 0.000",
    }
    assert clipped[:2] == ["clipped-4-0", "0.400 ± 0.000"]


def test_the_picture_of_importance_weights(runs_of_studies, figures, tmp_path, capfd):
    """importance.py draws accuracy against updates, a line for each kind of weights, and refuses runs of other names."""
    importance.draw(str(tmp_path / "picture.png"), runs_of_studies)
    for axis, accuracies in zip(figures[0].axes, ((0.4, 0.4), (0.9, 0.6)), strict=True):
        lines = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines}
        assert lines == {
            "clipped": ([4], pytest.approx([accuracies[0]])),
            "none": ([2], pytest.approx([accuracies[1]])),
        }
    refuses(capfd, lambda runs: importance.draw("picture.png", runs), ["run"], "--draw run", "KIND-UPDATES-SEED")


def test_grpo_keeps_the_log_probabilities_under_the_old_policy(
    tiny, tmp_path, odd_is_right, pieces_come_back, monkeypatch
):
    """grpo.py trains with its own loss, to which the second update gives the first one's log-probabilities as the old ones."""
    calls = []
    spy(monkeypatch, "grpo_loss", lambda args, *_: calls.append((args[0].detach(), args[1])), grpo)
    grpo.replace()
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0, updates=2))
    (first, first_old), (second, second_old) = calls
    assert torch.equal(first, first_old)
    assert torch.equal(first_old, second_old)
    assert not torch.equal(second, second_old)


@pytest.mark.parametrize("kind", importance.LOSSES)
def test_importance_weights_are_1_at_the_first_update_only(
    kind, tiny, tmp_path, odd_is_right, pieces_come_back, monkeypatch
):
    """importance.py trains with ratios that are 1 at the first update on a batch, and not at the second."""
    distances = []
    note = lambda args, *_: distances.append((args[0] - args[1]).abs().max().item())
    spy(monkeypatch, f"{kind}_loss", note, importance)
    monkeypatch.setitem(importance.LOSSES, kind, getattr(importance, f"{kind}_loss"))
    importance.replace(kind)
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0, updates=2))
    first, second = distances
    assert first == 0
    assert second > 0


def test_ablations_replace_three_pieces(tiny, tmp_path, odd_is_right, pieces_come_back):
    """ablations.py trains without smoothing, with another baseline and with graded rewards."""
    ablations.replace("none", "batch", True)
    assert empg.smooth_rewards(torch.tensor([5.0])) == 5
    weights = empg.subtract_baseline(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert weights.tolist() == [[0.75, -0.25], [-0.25, -0.25]]
    assert [ablations.graded(text, "9") for text in ("#7", "9", "?")] == [-2, 0, -36]
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0))
    assert metrics(tmp_path)[0]["reward"] < 0


def test_prompts_once_trains_the_same(tiny, tmp_path, odd_is_right, pieces_come_back, monkeypatch):
    """prompts_once.py reads in other passes, and a run with it records the same metrics."""
    calls = []
    spy(monkeypatch, "response_logits", lambda *_: calls.append(True), prompts_once)
    empg.main(options(tiny, tmp_path / "plain", steps=3, eval_every=0))
    assert not calls
    prompts_once.replace()
    empg.main(options(tiny, tmp_path / "once", steps=3, eval_every=0))
    assert calls
    same_metrics(metrics(tmp_path / "plain"), metrics(tmp_path / "once"))


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_study_of_gradients(tiny, tmp_path, odd_is_right, capsys):
    """After 0 updates gradients.py finds importance weights of 1 and equal gradients."""
    gradients.main(str(tmp_path / "picture.png"), tiny, seeds=1, batches=3, updates=2)
    assert is_picture(tmp_path / "picture.png")
    assert "after  0 updates: KL 0.000  ESS 1.000  cosine 1.000  norm ratio 1.000" in capsys.readouterr().out
    assert gradients.effective_sample_size(torch.tensor([1000.0, 0, 0, 0])) == pytest.approx(0.25)


def test_the_study_of_svrg(tiny, tmp_path, odd_is_right, capsys):
    """svrg.py measures a variance that falls with the size of a part as sampling without replacement says, and a third of it
    or less with the control variate."""
    svrg.measure(str(tmp_path / "picture.png"), tiny, seeds=1, draws=50, prompts=3, sizes=(4, 16))
    assert is_picture(tmp_path / "picture.png")
    # The kind; variance and cosine with parts of 4; variance with parts of 16.
    pattern = r"(with|without) the control variate .*?\| +([\d.]+) \(([\d.]+)\) +([\d.]+)"
    rows = re.findall(pattern, capsys.readouterr().out)
    assert [kind for kind, *_ in rows] == ["without", "with"] * 4
    plain_4, plain_cosine, plain_16 = map(float, rows[0][1:])
    svrg_4, svrg_cosine, _ = map(float, rows[1][1:])
    # Of 48 trajectories, the variance is proportional to 1/n - 1/48. So the ratio should be 5.5.
    assert 3 < plain_4 / plain_16 < 8
    assert svrg_4 < plain_4 / 3
    assert svrg_cosine > plain_cosine


def test_the_study_of_kl_estimators(tmp_path, capsys):
    """In kl_estimators.py, kl_topk has no bias of the gradient at any k."""
    kl_estimators.main(str(tmp_path / "picture.png"), pairs=3)
    assert is_picture(tmp_path / "picture.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("top-k  ")]
    assert [row[1] for row in rows] == ["0", "1", "2", "4", "8", "11", "12"]
    for row in rows:
        gradient_bias = float(row[-2])
        assert gradient_bias == 0


def test_the_study_of_behaviours(tmp_path, capsys):
    """A behaviour is counted once per response, and words that only look like its phrases are not."""
    texts = [
        *("Step 1: add.", "Case 1: x. Case 1.", "Let's verify the sum.", "Wait, no.", "Let me reconsider."),
        *("The waiter made three cakes.", "She reached step 10.", "A checkered flag."),
    ]
    found = behaviours.find(texts)
    assert [len(hits) for hits in found.values()] == [2, 1, 2]
    behaviours.main(results(tmp_path / "results", [1, 0]))
    assert "backtracking: 2 of 2 responses, 100.0%" in capsys.readouterr().out


def test_word_problems(tmp_path, capsys, pieces_come_back):
    """word_problems.py draws disjoint parts, runs both stages and compares the scores; called again, it repeats neither."""
    make_model(max_position_embeddings=128, scale=0.1).save_pretrained(tmp_path / "model")
    base_recipe.character_tokenizer().save_pretrained(tmp_path / "model")

    def row(i):
        return {"body": f"{i}+", "question": "1=", "formula": f"{i % 3}+0={i % 3}", "answer": f"{i % 3} (x)"}

    data = write_rows(tmp_path / "data", validation=[row(i) for i in range(990)])
    svamp = write_rows(tmp_path / "svamp", test=[{"Body": "1+", "Question": "1=", "Answer": "2"}])
    parts = [{row["question"] for row in word_problems.asdiv(part, str(data))} for part in word_problems.PARTS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 990

    words = [f"--model={tmp_path}/model", f"--data={data}", f"--svamp={svamp}", f"--output={tmp_path}", "--device=cpu"]
    words += ["--steps=2", "--eval-problems=4"]
    word_problems.main(words)
    report = capsys.readouterr().out
    assert len(metrics(tmp_path / "empg-0")) == 4
    assert report.count("McNemar") == 2

    shutil.rmtree(tmp_path / "model")  # so stage 1 cannot be repeated
    word_problems.main(words)
    again = capsys.readouterr().out
    assert "Resuming after iteration 2" in again
    assert again.endswith(report[report.index("accuracy  ") :])


def test_the_readme_examples(tmp_path):
    """Sampler, smoothing, baseline and loss in somebody else's loop earn more and more; a task of one's own is learned."""
    readme = (HERE / "README.md").read_text()
    to_wandb, loop, task = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    # The command that README gives for its own task.
    (words,) = re.findall(r"`python mine.py (.*?)`", readme.replace("\n", " "))
    words = [*words.split(), "--output", str(tmp_path / "run"), "--device", "cpu"]
    programs = [loop, task.replace("empg.main()", f"empg.main({words})")]
    with ThreadPoolExecutor() as threads:
        printed, _ = threads.map(lambda program: run([sys.executable, "-c", program]).stdout, programs)

    rewards = [float(line.split()[1]) for line in printed.splitlines()]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5])

    first, *_, last = [row["eval_accuracy"] for row in metrics(tmp_path / "run") if "eval_accuracy" in row]
    assert first == 0
    assert last > 0.9
    # The lines that send a run to Weights & Biases, of which a stand-in prints what it gets.
    stand_in = "def init(project, config): print(config['method'])\ndef log(row): print(row['step'])\n"
    (tmp_path / "wandb.py").write_text(stand_in)
    sent = run([sys.executable, "-c", to_wandb.replace("runs/NAME", str(tmp_path / "run"))], PYTHONPATH=str(tmp_path))
    assert sent.stdout.split() == ["EMPG", *(str(row["step"]) for row in metrics(tmp_path / "run"))]

    # Its way to score it.
    words = ["--model", str(tmp_path / "run/model"), "--task", "pairs", "--device", "cpu"]
    score = run([sys.executable, "-c", "import eval\n" + task.replace("empg.main()", f"eval.main({words})")])
    assert "of 17 problems" in score.stdout
