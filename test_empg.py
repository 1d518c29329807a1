"""The second half of the lesson: each test states the claim that it proves, on policies small enough to enumerate, on
tiny real models, and on whole runs of the command. `pytest -q` takes four minutes on two cores and needs no network.
"""

import copy
import dataclasses
import doctest
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Literal, get_args, get_origin

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose more than they gain by a second thread

import math_verify
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import empg
import eval as scoring

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared/data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="real data sets are not beside the project")

# -------- Toy policies: every trajectory can be enumerated ------------------------------------------------------------

EOS, V, T = 0, 3, 2  # three tokens, responses of at most two
TRAJECTORIES = [
    t for n in (1, T) for t in itertools.product(range(V), repeat=n) if (EOS in t[-1:] or n == T) and EOS not in t[:-1]
]
PREFIXES = [(), (1,), (2,)]
RIGHT = torch.tensor([0.0, 1, 0, 0, 1, 0, 1], dtype=torch.float64)  # a 0/1 reward for each of the seven trajectories
MASK = torch.tensor([[1.0] * len(t) + [0.0] * (T - len(t)) for t in TRAJECTORIES], dtype=torch.float64)


def toy_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """(prefixes, V) logits, or one (V,) vector shared by all prefixes → (trajectories, T) log-probabilities."""
    table = logits.expand(len(PREFIXES), V).log_softmax(-1)
    zero = torch.zeros((), dtype=logits.dtype)
    return torch.stack(
        [
            torch.stack([table[PREFIXES.index(t[:i]), t[i]] if i < len(t) else zero for i in range(T)])
            for t in TRAJECTORIES
        ]
    )


def toy_logits(seed: int, shape=(3, V)) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def test_toy_policy_is_a_distribution():
    """The probabilities of the enumerated trajectories sum to one."""
    assert len(TRAJECTORIES) == len(RIGHT) == 7
    assert toy_logprobs(toy_logits(0)).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_expected_empg_gradient_is_the_policy_gradient():
    """At θ = θ* the expected gradient of `empg_loss` is −∇ Σ_τ P(τ) R̃(τ) (Eq. 4 with Eq. 12), for any fixed R̃."""
    logits = toy_logits(1)
    logprobs = toy_logprobs(logits)
    smoothed = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    true = gradient((logprobs.sum(1).exp() * smoothed).sum(), logits)
    p = logprobs.sum(1).exp().detach()
    expected = 7 * p * smoothed  # times 7, since the loss is a mean over its seven rows
    torch.testing.assert_close(
        -gradient(empg.empg_loss(logprobs, MASK, expected), logits), true, rtol=1e-12, atol=1e-14
    )


def groups_of(logits: torch.Tensor, kind: str, group: int = 3):
    """Every group of `group` samples of the toy policy: its probability and its EMPG gradient with a baseline."""
    logprobs = toy_logprobs(logits)
    p = logprobs.sum(1).exp().detach()
    smoothed = 0.3 + 0.5 * RIGHT  # R̃ held fixed
    for rows in itertools.product(range(7), repeat=group):
        weights = empg.subtract_baseline(smoothed[list(rows)][None], kind)[0]
        yield p[list(rows)].prod(), -gradient(empg.empg_loss(logprobs[list(rows)], MASK[list(rows)], weights), logits)


@pytest.mark.parametrize(("kind", "factor"), [("none", 1), ("loo", 1), ("group", 2 / 3), ("batch", 2 / 3)])
def test_baseline_leaves_the_expected_gradient(kind, factor):
    """Over all groups of three samples leave-one-out has exactly the true gradient; a mean with τ in it, (G−1)/G of it."""
    logits = toy_logits(3)
    true = gradient((toy_logprobs(logits).sum(1).exp() * (0.3 + 0.5 * RIGHT)).sum(), logits)
    expected = sum(p * g for p, g in groups_of(logits, kind))
    torch.testing.assert_close(expected, factor * true, rtol=1e-10, atol=1e-12)


def test_baseline_lowers_the_variance():
    """Leave-one-out lowers the gradient's variance, here to less than half."""
    variance = {}
    for kind in ("none", "loo"):
        groups = list(groups_of(toy_logits(3), kind))
        mean = sum(p * g for p, g in groups)
        variance[kind] = sum(p * (g - mean).square().sum() for p, g in groups).item()
    assert variance["loo"] < 0.5 * variance["none"]


@pytest.mark.parametrize("shape", [(len(PREFIXES), V), (V,)], ids=["tabular", "shared logits"])
def test_em_never_lowers_the_objective(shape):
    """An exact E-step (Eq. 8) and a full M-step on `empg_loss` (Eq. 10) never lower log J(θ), and raise it at first."""
    logits = toy_logits(4, shape)
    history = []
    for _ in range(8):
        p = toy_logprobs(logits).sum(1).exp().detach()
        history.append((p * RIGHT).sum().log().item())
        q = p * RIGHT / (p * RIGHT).sum()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def surrogate(q=q, optimizer=optimizer):
            optimizer.zero_grad()
            loss = empg.empg_loss(toy_logprobs(logits), MASK, 7 * q)
            loss.backward()
            return loss

        optimizer.step(surrogate)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(history))
    assert history[-1] > history[0] + 0.1


def test_missing_importance_weights_vanish_with_the_step():
    """Away from θ* the EMPG gradient is not the importance-weighted one; the gap shrinks in proportion to the distance."""
    old = toy_logits(5).detach()
    p_old = toy_logprobs(old).sum(1).exp()
    direction = toy_logits(6).detach()
    gaps = []
    for distance in (0.2, 0.1, 0.05, 0.0):
        logits = (old + distance * direction).requires_grad_()
        logprobs = toy_logprobs(logits)
        weight = logprobs.sum(1).exp().detach() / p_old
        empg_gradient = gradient(empg.empg_loss(logprobs, MASK, 7 * p_old * RIGHT), logits)
        weighted = gradient(empg.empg_loss(logprobs, MASK, 7 * p_old * weight * RIGHT), logits)
        gaps.append((empg_gradient - weighted).norm().item())
    assert gaps[0] > 0.01
    assert gaps[3] < 1e-15
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)


# -------- Smoothing, baseline, loss, divergence -----------------------------------------------------------------------


@pytest.mark.parametrize("right", [1, 3, 8, 13, 15])
def test_smoothing_is_affine_on_binary_rewards(right):
    """On 0/1 rewards R̃ = u + s·R with s = sigmoid(√((1−p)/p)) − sigmoid(−√(p/(1−p))): σ is the population's."""
    p = right / 16
    rewards = torch.tensor([1.0] * right + [0.0] * (16 - right), dtype=torch.float64)
    smoothed = empg.smooth_rewards(rewards)
    sigmoid = lambda z: 1 / (1 + math.exp(-z))
    s = sigmoid(math.sqrt((1 - p) / p)) - sigmoid(-math.sqrt(p / (1 - p)))
    assert 0.46 < s < 0.55
    torch.testing.assert_close(smoothed, smoothed[-1] + s * rewards, rtol=0, atol=1e-12)


def test_smoothing_is_monotone_and_strictly_between_0_and_1():
    """R̃ keeps the order of graded rewards, and stays inside (0, 1) where the sigmoid itself rounds to 0 or 1."""
    for rewards in (torch.randn(100), torch.tensor([0.0] * 5000 + [1.0]), torch.tensor([1.0] * 5000 + [0.0])):
        smoothed = empg.smooth_rewards(rewards)
        assert ((smoothed > 0) & (smoothed < 1)).all()
        assert (smoothed[rewards.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("value", [0, 1, 0.1, -3e38])
def test_smoothing_of_equal_rewards_is_one_half(value):
    """A batch without differences is smoothed to exactly 0.5, and no rounding of its mean makes a signal."""
    assert (empg.smooth_rewards(torch.full((37,), value)) == 0.5).all()


@pytest.mark.parametrize("rewards", [[3e38, -3e38, 1.0], [1e-45, 0.0, 0.0], [1, 0, 7], [1e30, 1e30 * (1 + 1e-6), 0.0]])
def test_smoothing_is_finite_for_any_finite_reward(rewards):
    """Neither huge, tiny nor integer rewards make it overflow."""
    assert empg.smooth_rewards(torch.tensor(rewards)).isfinite().all()


@pytest.mark.parametrize("rewards", [[], [1.0, math.nan], [math.inf, 0.0]])
def test_smoothing_refuses_what_has_no_statistics(rewards):
    """No reward, or one that is not finite, is an error and not a silent nan in every weight."""
    with pytest.raises(ValueError, match="finite"):
        empg.smooth_rewards(torch.tensor(rewards))


def test_baselines_are_what_their_names_say():
    """loo subtracts the mean of the prompt's other samples, group the prompt's mean, batch the mean of everything."""
    r = torch.rand(3, 4, dtype=torch.float64)
    others = torch.tensor([[[r[i, k] for k in range(4) if k != j] for j in range(4)] for i in range(3)]).mean(2)
    torch.testing.assert_close(empg.subtract_baseline(r), r - others)
    torch.testing.assert_close(empg.subtract_baseline(r, "group"), r - r.mean(1, keepdim=True))
    torch.testing.assert_close(empg.subtract_baseline(r, "batch"), r - r.mean())
    assert torch.equal(empg.subtract_baseline(r, "none"), r)


@pytest.mark.parametrize("kind", ["loo", "group"])
def test_a_prompt_without_differences_has_weight_exactly_0(kind):
    """All right or all wrong is no signal: weight 0 to the last bit, whatever 0.6224593 summed seven times rounds to."""
    smoothed = empg.smooth_rewards(torch.tensor([1.0] * 7 + [0, 0, 1, 0, 1, 1, 1] + [0.0] * 7))
    weights = empg.subtract_baseline(smoothed.view(3, 7), kind)
    assert (weights[[0, 2]] == 0).all()
    assert (weights[1] != 0).all()


def test_bad_baselines_are_refused():
    """An unknown kind, a flat vector, and leave-one-out of a single sample are errors."""
    for rewards, kind in ((torch.rand(2, 2), "mean"), (torch.rand(4), "loo"), (torch.rand(4, 1), "loo")):
        with pytest.raises(ValueError, match="baseline"):
            empg.subtract_baseline(rewards, kind)


def test_loss_sums_over_tokens_and_averages_over_trajectories():
    """−(1/N) Σ w Σ log π by hand: not a mean over tokens, and nothing that stands on padding counts."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, -math.inf]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert empg.empg_loss(logprobs, mask, torch.tensor([0.5, -1.0])).item() == pytest.approx(-(0.5 * -6 + -1 * -4) / 2)


def test_k3_estimates_the_reverse_kl():
    """Its expectation under π is KL(π ‖ ref); as a plain loss its gradient is that of KL(ref ‖ π), as its docstring says."""
    logits, ref = toy_logits(7, (5,)), toy_logits(8, (5,)).detach().log_softmax(0)
    log_pi = logits.log_softmax(0)
    k3 = empg.kl_k3(log_pi, ref)
    assert (k3 >= 0).all()
    assert (log_pi.exp() * k3).sum().item() == pytest.approx((log_pi.exp() * (log_pi - ref)).sum().item(), abs=1e-12)
    as_loss = gradient((log_pi.exp().detach() * k3).sum(), logits)
    torch.testing.assert_close(as_loss, gradient((ref.exp() * (ref - log_pi)).sum(), logits))
    assert (empg.kl_k3(ref, ref) == 0).all()


@pytest.mark.parametrize("clip", [0.2, 1e9])
def test_grpo_is_the_formula_of_deepseekmath(clip):
    """Advantages, loss and gradient equal DeepSeekMath's equation, written out in loops over samples and tokens."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[0.0, 1, 1, 0, 0], [0.3, 0.3, 0.3, 0.3, 0.3], [5, -1, 0, 2.5, 1]], dtype=torch.float64)
    logprobs = torch.randn(15, 4, generator=g, dtype=torch.float64).requires_grad_()
    old = (logprobs.detach() + 0.3 * torch.randn(15, 4, generator=g, dtype=torch.float64)).clone()
    lengths = [1 + i % 4 for i in range(15)]
    mask = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in lengths], dtype=torch.float64)

    expected = 0.0
    for p in range(3):
        mean = sum(rewards[p].tolist()) / 5
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards[p].tolist()) / 5)
        for i in range(5):
            advantage, n = (rewards[p, i].item() - mean) / (std + 1e-6), 5 * p + i
            for t in range(lengths[n]):
                ratio = torch.exp(logprobs[n, t] - old[n, t])
                clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
                expected = expected - torch.minimum(ratio * advantage, clipped * advantage) / lengths[n] / 15
    advantages = empg.grpo_advantages(rewards)
    assert (advantages[1] == 0).all()
    loss = empg.grpo_loss(logprobs, old, mask, advantages.flatten(), clip)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(expected, logprobs))


def test_grpo_at_the_old_policy_is_a_policy_gradient_with_a_mean_over_tokens():
    """At θ = θ* nothing is clipped: GRPO's gradient is EMPG's with the advantage, divided by each response's length."""
    logprobs, advantages = (
        toy_logprobs(toy_logits(0)).detach().requires_grad_(),
        torch.linspace(-1, 1, len(TRAJECTORIES)).double(),
    )
    grpo = gradient(empg.grpo_loss(logprobs, logprobs.detach(), MASK, advantages), logprobs)
    ours = gradient(empg.empg_loss(logprobs, MASK, advantages / MASK.sum(1)), logprobs)
    torch.testing.assert_close(grpo, ours)


@pytest.mark.parametrize("k", [0, 1, 2, 4, 8])
def test_topk_kl_is_exact_in_value_and_gradient(k):
    """Enumerated over 8 tokens, kl_topk has the KL's value and gradient at every k; the two forms in use have not.

    With the logarithm of the sampled part detached, as published, the gradient is off wherever that part is used together
    with an exact one; k3, used as a loss, has another gradient altogether.
    """
    torch.manual_seed(0)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(8, dtype=torch.float64)
    log_pi, log_ref = logits.log_softmax(-1), ref.log_softmax(-1)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()
    truth, pi = gradient(exact, logits), log_pi.detach().exp()

    def error(values: torch.Tensor) -> tuple[float, float]:  # of the expectation over the sampled token
        mean = (pi * values).sum()
        return (mean - exact).abs().item(), ((gradient(mean, logits) - truth).norm() / truth.norm()).item()

    tokens = torch.arange(8)
    ours = error(empg.kl_topk(logits.expand(8, 8), ref.expand(8, 8), tokens, k))
    assert max(ours) < 1e-14
    # What has REINFORCE's gradient ρ · stopgrad(log ratio) in place of ρ · log ratio
    outside = torch.ones(8, dtype=torch.bool)
    outside[log_pi.topk(k).indices] = False
    head = (log_pi.exp() * (log_pi - log_ref))[~outside].sum()
    detached = head + outside * (log_pi - log_pi.detach()).exp() * (log_pi - log_ref).detach()
    value, slope = error(detached)
    assert value < 1e-14 and (slope > 0.05 if 0 < k < 8 else slope < 1e-14)
    value, slope = error(empg.kl_k3(log_pi, log_ref))
    assert value < 1e-14 and slope > 0.05


def test_topk_kl_of_a_model_is_that_of_its_logits():
    """log_probs with a reference gives kl_topk, value and gradient, on the logits of both models, in chunks or not."""
    model, reference = make_model(), make_model(seed=1).requires_grad_(False)
    prompts, responses = [[3, 4, 5], [6]], [[7, 8, 1], [9, 10, 11, 12, 1]]
    for chunk in (4, 100):
        how = {"temperature": 0.7, "tokens_per_chunk": chunk, "reference": reference, "topk": 3}
        values, mask, kl = empg.log_probs(model, prompts, responses, **how)
        ours = torch.autograd.grad(kl.sum() + values.sum(), list(model.parameters()))
        total = 0.0
        for p, r in zip(prompts, responses):
            ids = torch.tensor([p + r])
            both = [m(ids).logits[0, len(p) - 1 : -1] / 0.7 for m in (model, reference)]
            total = total + empg.kl_topk(*both, ids[0, len(p) :], 3).sum()
            total = total + both[0].log_softmax(-1).gather(-1, ids[0, len(p) :, None]).sum()
        torch.testing.assert_close(kl.sum() + values.sum(), total)
        for a, b in zip(ours, torch.autograd.grad(total, list(model.parameters()))):
            torch.testing.assert_close(a, b)
        assert kl.shape == mask.shape and (kl[~mask] == 0).all()


@pytest.mark.parametrize("k", [-1, 9])
def test_topk_beyond_the_vocabulary_is_refused(k):
    """k counts tokens of the vocabulary."""
    with pytest.raises(ValueError, match="not in 0..8"):
        empg.kl_topk(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, dtype=torch.long), k)


def test_effective_sample_size():
    """(Σw)²/(NΣw²): 1 for equal weights, 1/N when one weight is all, and finite for weights that overflow."""
    log_w = torch.randn(50, dtype=torch.float64)
    w = log_w.exp()
    assert empg.effective_sample_size(log_w) == pytest.approx((w.sum() ** 2 / (50 * (w**2).sum())).item())
    assert empg.effective_sample_size(torch.full((9,), 900.0)) == pytest.approx(1)
    assert empg.effective_sample_size(torch.tensor([1000.0, 0, 0, 0])) == pytest.approx(0.25)


# -------- Tiny real models: sampling and log-probabilities ------------------------------------------------------------


def make_model(seed=0, vocab=18, scale=0.5, dtype=torch.float64, **config):
    """A two-layer Qwen2 with grouped-query attention, whose predictions are far from uniform."""
    torch.manual_seed(seed)
    settings = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                "initializer_range": scale, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0} | config  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**settings)).to(dtype).eval()


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [3, 3, 3, 3, 3, 3, 3, 4]]
LIMITS = {"eos_token_id": 1, "pad_token_id": 0}


def plain_logprobs(model, prompt, response, temperature=1.0):
    """The formula with nothing clever: one sequence, all logits, log-softmax, pick the next token."""
    logits = model(torch.tensor([prompt + response])).logits[0] / temperature
    return torch.stack([logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(response)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_log_probs_equal_the_plain_formula_and_its_gradient(temperature, chunk, monkeypatch):
    """Batching, right padding, chunks of logits and recomputation change neither values nor gradients; logits are never
    held for more tokens than a chunk."""
    model, held, logits = make_model(), [], empg.TokenLogProbs.logits
    spy = lambda h, *args: held.append(len(h)) or logits(h, *args)
    monkeypatch.setattr(empg.TokenLogProbs, "logits", staticmethod(spy))
    responses = [[5, 6, 1], [1], [7, 7, 7, 7, 7, 7], [2, 9]]
    values, mask = empg.log_probs(model, PROMPTS, responses, temperature=temperature, tokens_per_chunk=chunk)
    plain = [plain_logprobs(model, p, r, temperature) for p, r in zip(PROMPTS, responses)]
    assert mask.sum(1).tolist() == [3, 1, 6, 2] and max(held) <= (chunk or 256)
    assert (values[~mask] == 0).all()
    for i, expected in enumerate(plain):
        torch.testing.assert_close(values[i][mask[i]], expected, rtol=1e-10, atol=1e-12)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    empg.empg_loss(values, mask, weights).backward()
    fast = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (-sum(w * lp.sum() for w, lp in zip(weights, plain)) / 4).backward()
    for a, p in zip(fast, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-8, atol=1e-10)


# The mistakes of this field, each with the test that shows it. (Statistics per rank instead of over the whole batch need
# several ranks: test_any_number_of_processes_does_what_one_does.)


def test_mistake_baseline_with_the_wrong_sign():
    """Of four samples the right one is raised and the wrong ones are lowered, all in all by nothing."""
    (weights,) = empg.subtract_baseline(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(weights, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))


def test_mistake_standard_deviation_of_a_sample():
    """Rewards 1 and 0 are one population standard deviation from their mean; by the sample's they would be 0.7."""
    torch.testing.assert_close(empg.smooth_rewards(torch.tensor([1.0, 0.0])), torch.sigmoid(torch.tensor([1.0, -1.0])))


def test_mistake_mean_over_padding():
    """A longer neighbour, which pads a response, does not change what the response weighs."""
    logprobs, mask, weights = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2), torch.tensor([3.0])
    padded, longer = torch.nn.functional.pad(logprobs, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    assert empg.empg_loss(padded, longer, weights) == empg.empg_loss(logprobs, mask, weights) == 9


def test_mistake_eos_left_out_of_the_loss():
    """A response that is EOS alone has a log-probability: without it nobody learns to stop."""
    values, mask = empg.log_probs(make_model(), [[3, 4, 5]], [[LIMITS["eos_token_id"]]])
    assert mask.tolist() == [[True]] and values.item() < 0


def test_mistake_labels_shifted_by_one():
    """The probabilities of all tokens after one prompt sum to 1. They do not if each token has been seen when it is predicted."""
    values, _ = empg.log_probs(make_model(), [[3, 4]] * 18, [[token] for token in range(18)])
    assert values.exp().sum().item() == pytest.approx(1)


def test_mistake_wrong_tensor_detached():
    """A gradient reaches every parameter of the model, and none comes from θ*, which has only been sampled from."""
    model, old = make_model(), make_model(seed=1)
    empg.update(
        model, torch.optim.SGD(model.parameters(), lr=0.0), make_trajectories(WEIGHTS), 9, config(algo="grpo"), old
    )
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(p.grad is None for p in old.parameters())


@pytest.mark.parametrize(("flag", "passes"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_layers_again(flag, passes):
    """With --gradient-checkpointing activations are not kept: each layer runs a second time, in the backward pass."""
    calls, model = [], make_model(dtype=torch.float32)
    model = empg.spread(model, config(gradient_checkpointing=flag))
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *args: calls.append(1))
    empg.log_probs(model, [[3, 4]], [[5, 6]])[0].sum().backward()
    assert len(calls) == passes * len(model.model.layers)


def test_bfloat16_computation_stays_close_to_float32(monkeypatch):
    """Under autocast the projection, too, computes in bfloat16; float32 weights get float32 gradients, much the same."""
    model, gradients, used, logits = make_model(dtype=torch.float32), [], [], empg.TokenLogProbs.logits
    spy = lambda h, weight, *args: used.append((h.dtype, weight.dtype)) or logits(h, weight, *args)
    monkeypatch.setattr(empg.TokenLogProbs, "logits", staticmethod(spy))
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            values, mask = empg.log_probs(model, PROMPTS, [[5, 6, 1], [1], [7, 7, 7, 7, 7, 7], [2, 9]])
        empg.empg_loss(values, mask, torch.ones(4)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert set(used) == {(dtype, dtype)} and values.dtype == gradients[-1].dtype == torch.float32
        used.clear()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_log_probs_equal_those_that_sample_saw(monkeypatch):
    """For left-padded prompts of unequal length, `log_probs` under θ* gives what the sampler drew its tokens from."""
    model, seen = make_model(), []
    draw = empg.draw_tokens

    def spy(logits, uniforms, temperature, top_p):
        tokens = draw(logits, uniforms, temperature, top_p)
        seen.append((logits / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1))
        return tokens

    monkeypatch.setattr(empg, "draw_tokens", spy)
    never = {"eos_token_id": 17, "pad_token_id": 0}
    responses = empg.sample(model, PROMPTS, 3, 9, temperature=0.8, seeds=[0, 1, 2, 3], **never)
    values, mask = empg.log_probs(model, [p for p in PROMPTS for _ in range(3)], responses, temperature=0.8)
    whole = [i for i, r in enumerate(responses) if len(r) == 9 and 17 not in r]
    first = torch.stack([s for s in seen if len(s) == 12], 1)  # the steps before any row left the batch
    assert len(whole) >= 3 and first.shape[1] >= 3
    torch.testing.assert_close(values[:, : first.shape[1]][mask[:, : first.shape[1]]], first[mask[:, : first.shape[1]]])


def test_sample_does_not_depend_on_its_company():
    """A trajectory is the same alone, in another order, with more samples, with padding, or with a higher limit."""
    model = make_model(scale=0.3)
    seeds = [11, 12, 13, 14]
    together = empg.sample(model, PROMPTS, 6, 20, seeds=seeds, **LIMITS)
    assert len({len(r) for r in together}) > 4  # rows have left the batch at many moments
    for i, (prompt, seed) in enumerate(zip(PROMPTS, seeds)):
        assert empg.sample(model, [prompt], 6, 20, seeds=[seed], **LIMITS) == together[6 * i : 6 * i + 6]
        assert empg.sample(model, [prompt], 2, 20, seeds=[seed], **LIMITS) == together[6 * i : 6 * i + 2]
        shorter = empg.sample(model, [prompt], 6, 4, seeds=[seed], **LIMITS)
        assert shorter == [r[:4] for r in together[6 * i : 6 * i + 6]]
    backwards = empg.sample(model, PROMPTS[::-1], 6, 20, seeds=seeds[::-1], **LIMITS)
    assert [backwards[6 * i : 6 * i + 6] for i in (3, 2, 1, 0)] == [together[6 * i : 6 * i + 6] for i in range(4)]
    assert empg.sample(model, PROMPTS, 6, 20, seeds=[1, 2, 3, 4], **LIMITS) != together


def test_greedy_sampling_equals_generate():
    """Temperature 0 gives what transformers' own generate gives."""
    model = make_model()
    ours = empg.sample(model, PROMPTS, 1, 12, temperature=0, **LIMITS)
    for prompt, response in zip(PROMPTS, ours):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False)
        assert theirs[0, len(prompt) :].tolist() == response


def test_long_responses_outgrow_the_cache():
    """The cache is extended every 128 tokens: 300 greedy tokens are those of one plain forward pass over them."""
    model = make_model(max_position_embeddings=512)
    responses = empg.sample(model, PROMPTS, 1, 300, temperature=0, eos_token_id=99, pad_token_id=0)
    for prompt, response in zip(PROMPTS, responses):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_frequencies_match_the_probabilities(temperature):
    """χ² of 4,000 samples of the first two tokens against the model's probabilities: no more than chance."""
    model = make_model(vocab=6, scale=0.3)
    counts = np.zeros((6, 6))
    for response in empg.sample(
        model, [[3, 4]], 4000, 2, seeds=[0], temperature=temperature, eos_token_id=99, pad_token_id=0
    ):
        counts[tuple(response)] += 1
    pairs = [[a, b] for a in range(6) for b in range(6)]
    with torch.no_grad():
        p = torch.stack([plain_logprobs(model, [3, 4], r, temperature).sum().exp() for r in pairs]).view(6, 6).numpy()
    often = 4000 * p >= 5  # the test's usual rule: what is expected less often is one cell together
    expected = np.append(4000 * p[often], 4000 * p[~often].sum())
    observed = np.append(counts[often], counts[~often].sum())
    degrees = len(expected) - 1
    assert degrees > 10 and p.max() / p.min() > 5
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)  # mean and four standard deviations


def test_a_response_ends_with_its_only_eos():
    """EOS, or any of several, stops a row and stays in it; other rows go on to the limit, and no step is in vain."""
    responses = empg.sample(
        make_model(scale=0.2), PROMPTS, 50, 15, seeds=[0, 1, 2, 3], eos_token_id=[1, 5], pad_token_id=0
    )
    assert all(not {1, 5} & set(r[:-1]) for r in responses)
    ends = [r[-1] in (1, 5) for r in responses]
    assert all(end or len(r) == 15 for r, end in zip(responses, ends))
    assert 0 < sum(ends) < len(ends) and {r[-1] for r, end in zip(responses, ends) if end} == {1, 5}
    model, steps = make_model(scale=0.3), []
    model.register_forward_hook(lambda *_: steps.append(1))
    responses = empg.sample(model, PROMPTS[:1], 12, 60, seeds=[5], **LIMITS)
    assert len(steps) == max(map(len, responses)) < 60


def test_top_p_keeps_the_smallest_nucleus():
    """Tokens outside the nucleus are never drawn; inside, frequencies are the probabilities over their sum."""
    probs = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    drawn = empg.draw_tokens(probs.log().expand(10_000, 5), uniforms, top_p=0.6)  # 0.4 + 0.25 reaches 0.6
    counts = torch.bincount(drawn, minlength=5) / 10_000
    torch.testing.assert_close(counts, torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65, atol=2e-4, rtol=0)
    only = empg.draw_tokens(probs.log().expand(100, 5), torch.linspace(0, 0.999, 100), top_p=1e-6)
    assert (only == 1).all()


def test_a_token_without_probability_is_never_drawn():
    """Also at the ends of the range: uniform numbers of 0 and of the largest float below 1."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf]).expand(2, 5)
    assert empg.draw_tokens(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 3]


def test_sample_and_log_probs_refuse_empty_input():
    """No prompts, an empty prompt, missing seeds or an empty response are errors."""
    model = make_model()
    for prompts, seeds in (([], []), ([[3], []], [0, 1]), ([[3]], None), ([[3]], [0, 1])):
        with pytest.raises(ValueError, match="needs"):
            empg.sample(model, prompts, 2, 3, seeds=seeds, **LIMITS)
    for prompts, responses in (([], []), ([[3]], [[]]), ([[3]], [[4], [5]])):
        with pytest.raises(ValueError, match="needs"):
            empg.log_probs(model, prompts, responses)


def test_freezing_rounds_parameters_only():
    """θ* in bfloat16 keeps its rotary frequencies in float32, has no gradients, and follows θ through `copy_weights`."""
    policy = make_model(dtype=torch.float32, attention_dropout=0.5).train()
    frozen = empg.freeze(copy.deepcopy(policy), torch.bfloat16)
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in frozen.buffers()} == {torch.float32}
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    empg.copy_weights(policy, frozen)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(policy.parameters(), frozen.parameters()))


# -------- The update --------------------------------------------------------------------------------------------------


def make_trajectories(weights):
    rng = np.random.default_rng(0)
    return [
        empg.Trajectory(PROMPTS[i % 4], rng.integers(3, 18, size=1 + i % 5).tolist() + [1], weight=w)
        for i, w in enumerate(weights)
    ]


def config(**options) -> empg.Config:
    return empg.Config(device="cpu", dtype="float32", max_grad_norm=1e9, **options)


def update_gradient(model, trajectories, *args, **kwargs):
    """The gradient that `update` leaves behind, and its statistics; the learning rate 0 leaves the model as it was."""
    stats = empg.update(model, torch.optim.SGD(model.parameters(), lr=0.0), trajectories, *args, **kwargs)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), stats


def direct_gradient(model, trajectories, total):
    model.zero_grad()
    (-sum(t.weight * plain_logprobs(model, t.prompt, t.response).sum() for t in trajectories) / total).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


WEIGHTS = [0.3, 0.0, -0.2, 0.1, 0.0, 0.0, -0.5, 0.7, 0.2]


@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_update_has_the_gradient_of_the_whole_batch(budget):
    """Neither micro-batches nor skipping trajectories of weight 0 change the gradient, which is that of Eq. 12."""
    model, trajectories = make_model(), make_trajectories(WEIGHTS)
    got, stats = update_gradient(model, trajectories, 9, config(micro_batch_tokens=budget))
    expected = direct_gradient(model, trajectories, 9)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-6)
    direct = -sum(t.weight * plain_logprobs(model, t.prompt, t.response).sum().item() for t in trajectories) / 9
    assert stats["loss"] == pytest.approx(direct, rel=1e-6)


def test_weight_0_is_not_computed(monkeypatch):
    """The forward pass sees only trajectories that carry weight."""
    seen = []
    original = empg.log_probs
    monkeypatch.setattr(empg, "log_probs", lambda m, p, r, **k: seen.append(len(p)) or original(m, p, r, **k))
    update_gradient(make_model(), make_trajectories(WEIGHTS), 9, config())
    assert sum(seen) == sum(w != 0 for w in WEIGHTS)


def test_kl_term_has_its_gradient():
    """With β the gradient is that of the loss plus β times the summed k3 of every trajectory, also those of weight 0."""
    model, reference, trajectories = make_model(), make_model(seed=1), make_trajectories(WEIGHTS)
    got, stats = update_gradient(model, trajectories, 9, config(beta=0.3, micro_batch_tokens=30), reference=reference)
    model.zero_grad()
    loss = kl = 0
    for t in trajectories:
        lp, ref = plain_logprobs(model, t.prompt, t.response), plain_logprobs(reference, t.prompt, t.response).detach()
        kl = kl + ((ref - lp).exp() - 1 - (ref - lp)).sum()
        loss = loss - t.weight * lp.sum()
    ((loss + 0.3 * kl) / 9).backward()
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-6, atol=1e-9)
    assert stats["kl"] == pytest.approx(kl.item() / sum(len(t.response) for t in trajectories), rel=1e-6)


def test_grpo_update_has_the_gradient_of_its_loss():
    """--algo grpo: clipped ratios to θ*, a mean over each response's tokens, over the trajectories of all micro-batches."""
    model, old, trajectories = make_model(), make_model(seed=1), make_trajectories(WEIGHTS)
    grads, stats = update_gradient(model, trajectories, 9, config(algo="grpo"), old_policy=old)
    loss = 0.0
    for t in make_trajectories(WEIGHTS):
        new, before = (plain_logprobs(m, t.prompt, t.response)[None] for m in (model, old))
        one = empg.grpo_loss(new, before.detach(), torch.ones_like(new), torch.tensor([t.weight], dtype=torch.float64))
        loss = loss + one / 9
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(grads, torch.cat([g.flatten() for g in expected]))
    assert stats["loss"] == pytest.approx(loss.item())


def test_ess_measures_the_distance_from_the_old_policy():
    """1 at θ = θ*, even for a model with dropout, which must be off in both; less for another θ."""
    model, trajectories = make_model(attention_dropout=0.5), make_trajectories(WEIGHTS)
    _, same = update_gradient(
        model, trajectories, 9, config(), old_policy=empg.freeze(copy.deepcopy(model), torch.float64)
    )
    assert same["ess"] == pytest.approx(1, abs=1e-12)
    trajectories = make_trajectories(WEIGHTS)
    _, other = update_gradient(model, trajectories, 9, config(), old_policy=make_model(seed=1))
    kept = [t for t in trajectories if t.weight]
    w = torch.stack([
        (plain_logprobs(model, t.prompt, t.response) - plain_logprobs(make_model(seed=1), t.prompt, t.response)).sum().exp()
        for t in kept
    ])  # fmt: skip
    assert other["ess"] == pytest.approx((w.sum() ** 2 / (len(w) * (w**2).sum())).item(), rel=1e-4)


def test_entropy_is_the_mean_surprise_of_the_tokens():
    """A uniform policy over 18 tokens has log 18 nats per token."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    _, stats = update_gradient(model, make_trajectories(WEIGHTS), 9, config())
    assert stats["entropy"] == pytest.approx(math.log(18))


def test_micro_batches_cover_everything_within_the_budget():
    """Each index once; no group of several exceeds the budget when padded; similar lengths stand together."""
    lengths = np.random.default_rng(0).integers(1, 50, size=200).tolist()
    groups = empg.micro_batches(lengths, 120)
    assert sorted(i for g in groups for i in g) == list(range(200))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 120 for g in groups)
    assert len(groups) < 1.3 * sum(lengths) / 120


def test_every_problem_is_drawn_once_per_pass():
    """Batches run through a shuffled data set without repetition, and differ by pass and by seed."""
    draws = [i for step in range(1, 8) for i in empg.draw_batch(10, 4, step, seed=0)]
    assert sorted(draws[:10]) == sorted(draws[10:20]) == list(range(10))
    assert draws[:10] != draws[10:20]
    assert empg.draw_batch(10, 4, 1, seed=1) != draws[:4]
    assert len(empg.draw_batch(3, 8, 1, seed=0)) == 8  # a batch larger than the data


# -------- Tasks -------------------------------------------------------------------------------------------------------


def test_sums_never_trains_on_what_is_held_out():
    """9,500 and 500 different problems, with right answers."""
    problems = {split: empg.sums_problems(None, split) for split in ("train", "test")}
    questions = {split: {row["question"] for row in rows} for split, rows in problems.items()}
    assert len(questions["train"]) == 9500 and len(questions["test"]) == 500
    assert not questions["train"] & questions["test"]
    for row in problems["test"]:
        assert str(eval(row["question"][:-1])) == row["answer"]


CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"


def test_prompts_follow_the_chat_template_or_a_plain_one():
    """The question and the instruction stand in the prompt once, by the template that applies; braces in them are safe."""
    tokenizer = empg.character_tokenizer()
    encode = lambda *args: tokenizer.decode(empg.encode_prompts(tokenizer, *args)[0])
    assert encode(empg.TASKS["sums"], ["3+8="]) == "3+8="
    assert encode(empg.TASKS["sums"], ["3+8="], "1,{question}#") == "1,3+8=#"
    shown = []
    spy = lambda texts, **options: shown.append((texts[0], options)) or {"input_ids": [[0]]}
    fake = type("Tokenizer", (), {"chat_template": CHAT, "__call__": lambda self, *a, **k: spy(*a, **k)})()
    fake.apply_chat_template = lambda turns, **k: f"<{turns[0]['content']}>"
    task = empg.TASKS["math-hard"]
    empg.encode_prompts(fake, task, ["What is {x}?"])
    assert shown[0] == (f"<What is {{x}}?\n{task.instruction}>", {"add_special_tokens": False})
    fake.chat_template = None
    empg.encode_prompts(fake, task, ["What is {x}?"])
    assert shown[1] == (f"Question: What is {{x}}?\n{task.instruction}\nAnswer:", {"add_special_tokens": True})


def test_responses_stop_at_eos_and_at_the_end_of_a_chat_turn():
    """EOS, the generation config's, and the token with which the chat template closes an answer, all end a response."""
    tokenizer, model = empg.character_tokenizer(), make_model()
    assert empg.stop_tokens(tokenizer, model) == [1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = CHAT
    model.generation_config.eos_token_id = [1, 7]
    assert empg.stop_tokens(tokenizer, model) == [1, 7, tokenizer.convert_tokens_to_ids("<end>")]


# -------- Grading: what counts as the same answer ---------------------------------------------------------------------

GSM8K, MATH = empg.TASKS["gsm8k"], empg.TASKS["math-hard"]


def rows_of(name: str) -> list[dict]:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    return [json.loads(line) for split in ("train", "test") for line in open(SHARED / name / f"{split}.jsonl")]


def cases(table: str, form: str) -> list:
    """Lines `gold :: right | right :: wrong | wrong` → (response, answer, expected), the responses put into `form`."""
    found = []
    for line in table.strip().splitlines():
        gold, right, wrong = (part.strip() for part in line.split("::"))
        found += [pytest.param(form % text.strip(), gold, 1.0) for text in right.split(" | ") if text.strip()]
        found += [pytest.param(form % text.strip(), gold, 0.0) for text in wrong.split(" | ") if text.strip()]
    return found


GSM8K_BOXES = r"""
18 :: 18 | \$18 | $18 | €18 | 18¢ | 18.00 | 18. | 18\% | {18} | \boxed{18} | \text{18} | \mathbf{18} | \approx 18 :: 180 | 1.8
18 :: 18 \text{ dollars} | 18\text{ km/h} | \text{Total: } 18 | \text{John has } 18 \text{ apples} | -0 + 18 = 18 :: -18
18 :: 18 \, \text{cm}^2 | 18 \text{ cm}^{2} | 18\,\mathrm{m}^2 | 18 cm^3 | \text{Janet makes \$18 per day} :: 18 : 2 | x
18 :: x = 18 | 3 + 15 = 18 | 3 \times 6 | \frac{36}{2} | 36/2 | 18.3 \approx 18 :: 18 \approx 18.3 | \text{Day } 5: 18
18 :: 2 \times 3^{2} :: 17, 18, 19 | 17, 18 | \{17, 18\} | 18 \text{ or } 19 | x = 3 \text{ or } x = 18 | A = 5, B = 18 | x=5, 18
1800 :: 1,800 | 2 \times 900 = 1,800 = \$1,800 | 1{,}800 | 1\,800 | 1,\!800 | \$1,800.00 | 1.8 \times 10^3 :: 1 | 800 | 1, 800 | 18,00
5 :: 5:00 \text{ PM} | 5:00 :: 5 \text{ hours and } 30 \text{ minutes} | 5:30 | 5 \text{ to } 6 | 5-6 | 5 \text{ days } 3 \text{ hours}
0.5 :: \frac{1}{2} | 1/2 | .5 | 0.50 | \dfrac{1}{2} :: 5 | 2 | 1
2.5 :: 2\frac{1}{2} | \frac{5}{2} | \$2.50 :: 2, 5 | \frac{2}{5}
-5 :: -5 | −5 | -\$5 :: 5
23 :: 23 :: 2, 3 | 2 \text{ and } 3
0 :: 0 | \$0.00 :: \text{none} |
"""

GSM8K_TEXTS = [
    ("**$18**", "18", 1.0),
    ("The answer is: 18.", "18", 1.0),
    ("the answer is **18**", "18", 1.0),
    ("The answer is:\n\n18", "18", 1.0),
    ("Therefore, Janet makes \\$18 per day at the farmers' market.", "18", 1.0),
    ("The answer is 18. Let me double check: 3*6=18 and 2+2=4", "18", 1.0),
    ("The answer is 3 + 15 = 18 dollars.", "18", 1.0),
    ("The final answer is $18.50.", "18.5", 1.0),
    ("The answer is 5. Wait. The answer is 18.", "18", 1.0),
    ("The answer is 18. Wait. The answer is 5.", "18", 0.0),
    ("The answer is incorrect, it should be 18", "18", 1.0),
    ("The answer is 18. I hope that this answer is correct.", "18", 1.0),
    ("The answer is 5 dollars per day for 3 days", "5", 1.0),
    ("The answer is 5 dollars per day for 3 days", "3", 0.0),
    ("#### 72", "72", 1.0),
    ("####72", "72", 1.0),
    ("#### $1,200.00", "1,200", 1.0),
    ("#### 5 and then 7 8", "5", 1.0),
    ("#### 5\nQuestion: what is 7?", "5", 1.0),
    ("#### Step 2: Profit\n20 - 2 = 18, so she makes $18.", "18", 1.0),
    ("#### 2. Profit\nShe makes $18.", "18", 1.0),
    ("#### Answer: 18", "18", 1.0),
    ("10 - 3", "3", 1.0),
    ("10-3", "3", 1.0),
    ("It is 5.", "5", 1.0),
    (r"\boxed{5}. No: \boxed{18}", "18", 1.0),
    (r"\boxed{18}. No: \boxed{5}", "18", 0.0),
    (r"\boxed{18}. I hope it is correct. 7", "18", 1.0),
    (r"\fbox{18}", "18", 1.0),
    (r"$\boxed 18$.", "18", 1.0),
    (r"18 \boxed{}", "18", 0.0),
    ("", "18", 0.0),
    ("no idea", "18", 0.0),
]


@pytest.mark.parametrize("response, answer, expected", cases(GSM8K_BOXES, r"3 - 1 = 2, so it is $\boxed{%s}$."))
def test_gsm8k_boxes(response, answer, expected):
    """A GSM8K box is right if it holds the gold number in any form, and wrong if it lists candidates."""
    assert GSM8K.reward(response, answer) == expected
    assert GSM8K.reward(response, f"2 + 2 = <<2+2=4>>4\n#### {answer}") == expected


@pytest.mark.parametrize("response, answer, expected", GSM8K_TEXTS)
def test_gsm8k_texts(response, answer, expected):
    """Without a box, the number after the last "####" or "answer is" counts, or else the last number."""
    assert GSM8K.reward(response, answer) == expected


def test_gsm8k_answers_are_comparable_as_text():
    """18, 18.0 and $18.00 are one vote in a majority."""
    forms = ("\\boxed{18}", "#### 18.0", "It is $18.00", "The answer is 18.")
    assert {GSM8K.extract(form) for form in forms} == {"18"}
    assert [GSM8K.extract(text) for text in ("100", "0.50", ".0", "1,200")] == ["100", "0.5", "0", "1200"]


GSM8K_FORMS = [
    r"\boxed{%s}",
    r"\boxed{\$%s.00}",
    r"\boxed{%s \text{ cm}^2}",
    r"\boxed{x = 1 + 2 = %s\%%}",
    "#### %s",
    "So: %s.",
]


def test_gsm8k_gold_answers():
    """Every gold answer of GSM8K scores 1 in any usual form, and 0 against the next problem's, unless those are equal."""
    problems = rows_of("gsm8k")
    golds = [row["answer"].rpartition("####")[2].strip() for row in problems]
    for row, gold, other in zip(problems, golds, golds[1:] + golds[:1]):
        for text in (gold, gold.replace(",", ""), gold.replace(",", "{,}")):
            for form in GSM8K_FORMS:
                assert GSM8K.reward(form % text, row["answer"]) == 1, form % text
        assert GSM8K.reward(row["answer"], gold) == 1
        same = int(gold.replace(",", "")) == int(other.replace(",", ""))
        assert GSM8K.reward(rf"\boxed{{{other}}}", row["answer"]) == same, (gold, other)


MATH_BOXES = r"""
5 :: 5 | 5.0 | 5. | +5 | 05 | $5$ | {5} | (5) | \{5\} | **5** | \text{5} | \mathbf{5} | \boxed{5} | \displaystyle 5 | 5 \, :: 6 | -5 | x
5 :: x = 5 | f(2) = 5 | 3+2 = 5 | x = 3+2 = 5 | \text{Area} = 5 | |AB| = 5 | \text{The answer is }5 :: x \ge 5 | x = 6 | x+5 | 5x
5 :: 5 \text{ cm}^2 | 5\,\mathrm{cm}^{2} | 5~\text{cm} | 5 \mathrm{~cm} | 5\text{ miles}\text{ per hour} | 5 nights | 5^\circ :: 5!
5 :: 5\% | \$5 | 5\$ | \text{5 dollars} | 5 \text{ (five)} | \sqrt{25} | \frac{10}{2} :: \text{Room 5} | 5\text{ hours and }30\text{ minutes}
3 :: :: 3, 4 | 3 \text{ or } 4 | 3 or 4 | \{3, 4\} | (3, 4) | [3, 4] | 3 \quad 4 | 3; 4 | \pm 3 | 3 \text{ and } 4 \text{ cm} | 3 \text{ or 4}
3 :: :: x = 3, x = 4 | x = 3 \text{ or } 4 | 4 \text{ or } 3 | 3 \text{ if } x > 0, 4 \text{ otherwise} | 3:4 | 3/4 | 3i | \foo{4} 3
\frac{1}{3} :: \frac13 | 1/3 | 0.\overline{3} | 0.\bar{3} | \dfrac{2}{6} :: 0.3 | 0.33 | 3 | \foo \frac{1}{3}
0.1\overline{6} :: \frac{1}{6} | 0.1\overline{6} | 0.1\overline{66} :: 0.1 | 0.16 | 0.\overline{16} | -0.1\overline{6}
-\frac{3}{4} :: -0.75 | \frac{-3}{4} | \frac{3}{-4} | −\frac{3}{4} | - \tfrac34 | -\cfrac{3}{4} :: \frac{3}{4} | -\frac{4}{3} | -0.7
2\frac{1}{2} :: \frac{5}{2} | 2.5 | 2 \frac12 :: 1 | 2, \frac12
\frac \pi4 + 2 - \sqrt2 :: \frac{\pi}{4} + 2 - \sqrt{2} | 2-\sqrt2+\frac{1}{4}\pi :: \frac{\pi}{4} + 2 + \sqrt{2}
50,\!625 :: 50625 | 50,625 | 50{,}625 | 50\,625 | \$50,625.00 :: 50 | 625 | 50, 62
22^\circ :: 22 | 22^{\circ} | 22° | 22 \text{ degrees} | \angle A = 22^\circ :: 23^\circ
28\% :: 28 | 28% | 0.28 | 28 \text{ percent} :: 29\% | 2.8
87.5 :: 87.5\% | 87.50 | \frac{175}{2} :: 87 | 875
12.5\% :: 12.5 | 12.5\% | \frac{1}{8} :: 12 | 125
1112112_3 :: 1112112 | 1112112_{3} | 1112112_{(3)} :: 1112111_3
\text{Tuesday} :: Tuesday | \text{tuesday} | \textbf{Tuesday} | \mathrm{Tuesday} :: \text{Monday} | 2
\text{(A)} :: A | (A) | \text{A} | \textbf{(A)} :: B | \text{(B)} | A, B
\text{June 20} :: \text{June 20} | June 20 :: 20 | \text{June 21}
7:30 :: 7:30 | 7:30 \text{ p.m.} | \text{7:30 PM} :: 8:30 | 7:3 | 7
0,1 :: 1,0 | \{0,1\} | 0 \text{ and } 1 | x = 0 \text{ or } x = 1 | 0, 1. :: 0 | 0,2 | 0,1,2
x=1, x=2 :: 2, 1 | x = 2, x = 1 | x = 1, 2 :: 1 | x = 1 | 1, 3
1,-1,-3i :: -3i, 1, -1 | 1, -3i, -1 | \pm 1, -3i :: 1, -1, 3i | 1, -1
\frac{3 \pm \sqrt{5}}{2} :: \frac{3+\sqrt5}{2}, \frac{3-\sqrt5}{2} | x = \frac{3\pm\sqrt5}{2} :: \frac{3+\sqrt5}{2} | 3 \pm \sqrt5
-\frac{1}{3} + \frac{2}{3}i :: \frac{-1+2i}{3} | -\frac{1}{3}+\frac{2i}{3} :: -\frac{1}{3}-\frac{2}{3}i
(6,31,-1) :: (6, 31, -1) | \left(6,31,-1\right) | (a,b,c) = (6,31,-1) | \begin{pmatrix}6\\31\\-1\end{pmatrix} :: (31,6,-1) | 6
(2,12) :: (2, 12) | x = 2, y = 12 | (x,y) = (2,12) :: (12,2) | [2,12] | 2
(1,2),(3,4) :: (3,4), (1,2) | (1,2) \text{ and } (3,4) :: (1,2) | (2,1),(3,4)
[-2,7] :: x \in [-2,7] | -2 \le x \le 7 | \left[-2, 7\right] :: (-2,7) | [-2,7) | [7,-2]
(2,\infty) :: x > 2 | (2, +\infty) | x \in (2,\infty) :: x \ge 2 | x < 2 | [2,\infty) | 2
(-\infty,0)\cup (0,\infty) :: x \neq 0 | \mathbb{R} \setminus \{0\} | (0,\infty) \cup (-\infty,0) :: (-\infty,\infty) | (0,\infty)
\begin{pmatrix} -4\\-3 \end{pmatrix} :: \begin{bmatrix} -4 \\ -3 \end{bmatrix} | (-4,-3) :: \begin{pmatrix} -3\\-4 \end{pmatrix}
\begin{bmatrix} 1&2\\3&4 \end{bmatrix} :: \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} :: \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\frac{x^2}{16} - \frac{y^2}{9} = 1 :: \dfrac{x^2}{16}-\dfrac{y^2}{9}=1 | 9x^2 - 16y^2 = 144 :: \frac{x^2}{9}-\frac{y^2}{16}=1 | 1
y=2x+3 :: 2x+3 | y = 3 + 2x | y-2x=3 :: 2x-3 | y=2x
4(3-x)(3+x) :: 36-4x^2 | -4(x-3)(x+3) | f(x) = 36 - 4x^2 :: 36+4x^2
\pi-2 :: -2+\pi | \pi - 2 :: 1.14 | \pi+2
10\sqrt3 :: 10\sqrt{3} | \sqrt{300} | \frac{30}{\sqrt{3}} :: 17.3 | 10 | 3
1024 :: 2^{10} | 4^5 :: 2^{11}
5040 :: 7! :: 6!
"""


@pytest.mark.parametrize(
    "response, answer, expected", cases(MATH_BOXES, r"Let $x = \boxed{77}$. So it is $\boxed{%s}$.")
)
def test_math_boxes(response, answer, expected):
    """A MATH box is right if it equals the gold answer mathematically, and wrong if it lists candidates."""
    assert MATH.reward(response, answer) == expected
    assert MATH.reward(response, rf"We find $\boxed{{{answer}}}$.") == expected


@pytest.mark.parametrize("solution", [r"so $\boxed 5$.", r"so \fbox{5}", r"\boxed{4} no \boxed{5}", "5"])
def test_math_gold_forms(solution):
    """The gold answer is found in a box without braces, in an \\fbox, in the last of several boxes, and bare."""
    assert MATH.reward(r"\boxed{5}", solution) == 1
    assert MATH.reward(r"\boxed{4}", solution) == 0


@pytest.mark.parametrize("response", ["", "5", "The answer is 5.", r"\boxed{}", r"\boxed{5", r"\boxed", r"\boxed{ }"])
def test_math_needs_a_box(response):
    """Without an answer in a closed box, a MATH response scores 0."""
    assert MATH.reward(response, "5") == 0


MATH_FORMS = [r"\boxed{%s\text{ units}.}", r"\boxed{\text{Answer: } %s \, }"]


def test_math_gold_answers():
    """Every gold answer of MATH scores 1 in any usual form, and 0 against the next problem's or in a list."""
    problems = rows_of("math_hard")
    golds = [empg.last_boxed(row["solution"]) for row in problems]
    for row, gold, other in zip(problems, golds, golds[1:] + golds[:1]):
        variants = [form % gold for form in MATH_FORMS] + [rf"\boxed{{{gold}}}", row["solution"]]
        variants.append(rf"\boxed{{{gold.replace('frac', 'dfrac').replace('ddfrac', 'tfrac').replace('-', ' - ')}}}")
        for response in variants:
            assert MATH.reward(response, row["solution"]) == 1, response
        assert MATH.reward(rf"\boxed{{{other}}}", row["solution"]) == (gold == other), (gold, other)
        assert MATH.reward(rf"\boxed{{{gold} \text{{ or }} 77}}", row["solution"]) == 0, gold


HUGE = re.findall(
    r"\S+",
    r"""
9^{9^{9}} 10^{10^{10}} 9^9^9 2^{1000000000} 3^{50000000}x 2^{2^{2^{2^{2^{2}}}}} 10^{-10^{10}} \log_{2}{3^{9^{9}}}
1000000! 9!!!! (((9!)!)!)! 10^{9}! \binom{10^8}{10^7} \binom{100000000}{5} {10^9\choose10^8} \gcd(10^{99999},3)
\sum_{k=1}^{10^9}k^{99} \prod_{k=1}^{1000000}k \int_0^1e^{-x^x}dx \left(1+\frac{1}{10^{9}}\right)^{1000000000}
""",
)
HUGE += ["(" * 100 + "1" + ")" * 100, "9" * 301, "{" * 300 + "1" + "}" * 300, r"\frac{1}{" * 100 + "1" + "}" * 100]
STRANGE = re.findall(
    r"\S+", r"\ \\ ² ½ { } }{ $ % ^ _ & = - ! 1/0 1e999999999 \frac \frac{ \frac{}{} \sqrt \left( \text{ \pm \infty"
)
STRANGE += ["\0", "\ud800", "٣", " ", "-" * 299, "^" * 299, "0." + "1" * 290, "0.\\overline{" + "9" * 250 + "}"]
STRANGE += ["5 " + "ab " * 95 + "1", r"5 \text{a}^2" * 20 + "1", r"\begin{pmatrix}" * 15, r"\text{" * 40 + "}" * 40]
STRANGE += [text * (100_000 // len(text)) for text in (r"\frac{", r"\boxed{", "\\", "1,", "=,", "9", " 1")]
STRANGE += ["{" * 50_000 + "}" * 50_000]


@pytest.mark.parametrize("name", ["gsm8k", "math-hard"])
def test_grading_never_raises(name):
    """Whatever the text, as response, box or answer, grading and extraction return; and nothing odd is right."""
    task = empg.TASKS[name]
    for text in HUGE + STRANGE:
        for form in ("%s", r"\boxed{%s}", r"\boxed{%s", "#### %s", "the answer is %s"):
            response = form.replace("%s", text)
            assert task.reward(response, "18") == 0
            assert isinstance(task.extract(response), str | None)
    for text in STRANGE:
        assert task.reward(r"\boxed{18}", text) == 0


def test_grading_works_in_a_thread():
    """Off the main thread, where no signal can end a comparison, the rewards are the same."""
    empg.same_math.cache_clear()
    responses, rewards = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2}"] + [rf"\boxed{{{h}}}" for h in HUGE], []
    thread = threading.Thread(target=lambda: rewards.extend(MATH.reward(text, "0.5") for text in responses))
    thread.start()
    thread.join()
    assert rewards == [1, 1] + [0] * (1 + len(HUGE))


def test_huge_numbers_are_not_computed(monkeypatch):
    """A batch of answers that would take for ever is refused unread: each alone could cost the whole time limit."""
    read = []
    monkeypatch.setattr(math_verify, "parse", lambda text, *_, **__: read.append(text) or [])
    empg.same_math.cache_clear()
    for i in range(20):
        for text in HUGE:
            assert MATH.reward(rf"\boxed{{{text} + {i}}}", "18") == 0
    assert read == []
    assert MATH.reward(r"\boxed{9^{9^{9}}}", r"\boxed{9^{9^9}}") == 0  # known: only the same spelling is right
    assert MATH.reward(r"\boxed{9^{9^{9}}}", r"\boxed{9^{ 9^{9} }}") == 1
    empg.same_math.cache_clear()


def test_time_limit_is_silent(caplog):
    """An answer that takes too long to compare scores 0 without a word in the log; other loggers are left as they are."""
    others = {name: logging.getLogger(name).level for name in ("", "sympy", "torch", "transformers")}
    assert MATH.reward(r"\boxed{(x+1)^{1000}}", "x+1") == 0
    assert caplog.records == []
    assert others == {name: logging.getLogger(name).level for name in others}


def test_repeated_answers_are_compared_once(monkeypatch):
    """The samples of a prompt often agree: the same answer to the same problem is compared once."""
    empg.same_math.cache_clear()
    calls, verify = [], math_verify.verify
    monkeypatch.setattr(math_verify, "verify", lambda *args, **options: calls.append(args) or verify(*args, **options))
    assert [MATH.reward(rf"{i} \boxed{{0.5}}", r"\frac{1}{2}") for i in range(8)] == [1] * 8
    assert len(calls) == 1


# -------- Whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a random model for the task sums, stored in bfloat16 as hub models are."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(scale=0.1, dtype=torch.bfloat16).save_pretrained(path)
    empg.character_tokenizer().save_pretrained(path)
    return path


def options(model, output, /, **changes) -> list[str]:
    values = {"model": model, "task": "sums", "output": output, "steps": 2, "prompts_per_step": 4, "num_samples": 4,
              "max_new_tokens": 8, "lr": 1e-3, "eval_every": 1, "eval_problems": 6, "device": "cpu"} | changes  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (empg.flag(name), str(value))]


def load(path) -> torch.nn.Module:
    return empg.load_policy(str(path), empg.load_tokenizer(str(path))[0]).float()


def metrics(output) -> list[dict]:
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def odd_is_right(monkeypatch):
    """A reward with signal for a random model: responses of an odd number of characters."""
    task = dataclasses.replace(empg.TASKS["sums"], reward=lambda response, answer: float(len(response) % 2))
    monkeypatch.setitem(empg.TASKS, "sums", task)


def test_a_run_leaves_what_it_promises(tiny, tmp_path, odd_is_right):
    """metrics.jsonl has every key, config.json every option, and the saved model gives the same greedy text on reload."""
    empg.main(options(tiny, tmp_path, steps=3, eval_every=2))
    rows = metrics(tmp_path)
    keys = {"step", "reward", "response_tokens", "loss", "grad_norm", "kl", "entropy", "ess", "sample_seconds",
            "update_seconds", "step_seconds", "tokens_per_second", "no_signal", "cut", "skipped_updates", "distinct", "kl_old"}  # fmt: skip
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and all(keys == set(row) for row in steps)
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 2, 3]
    assert steps[0]["ess"] == pytest.approx(1) and steps[0]["kl"] is None and 0 < steps[0]["entropy"] < 4
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(empg.Config)} < set(saved)
    assert saved["seed"] == 0 and saved["versions"]["torch"] == torch.__version__

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    prompts = tokenizer(["3+8+5+2=", "1+1+1+1="])["input_ids"]
    generated = model.generate(torch.tensor(prompts), max_new_tokens=8, do_sample=False)[:, len(prompts[0]) :]
    sampled = empg.sample(model, prompts, 1, 8, temperature=0, **LIMITS)
    assert [tokenizer.decode(r, skip_special_tokens=True) for r in generated] == tokenizer.batch_decode(
        sampled, skip_special_tokens=True
    )
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), load(tiny).parameters()))


def test_the_trained_weights_are_float32_and_dropout_is_off(tiny):
    """A checkpoint in bfloat16 is trained in float32, in which updates of 1e-6 survive."""
    policy = empg.load_policy(str(tiny), empg.load_tokenizer(str(tiny))[0])
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    state = empg.begin(dataclasses.replace(config(beta=0.1), dtype="bfloat16"), policy)
    dtypes = [{p.dtype for p in model.parameters()} for model in (state.policy, state.old_policy, state.reference)]
    assert dtypes == [{torch.float32}, {torch.bfloat16}, {torch.float32}]
    models = (state.policy, state.old_policy, state.reference)
    assert not any(module.training for model in models for module in model.modules())


def without_seconds(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def same_metrics(one: list[dict], two: list[dict]) -> None:
    """Equal up to rounding, but for the seconds."""
    for a, b in zip(without_seconds(one), without_seconds(two), strict=True):
        assert {k: v for k, v in a.items() if v is not None} == pytest.approx(
            {k: v for k, v in b.items() if v is not None}, rel=1e-4, abs=1e-6
        )


def test_the_seed_decides_the_run(tiny, tmp_path, odd_is_right, monkeypatch):
    """Two runs of one seed have the same metrics to the last digit; another seed, iteration or prompt draws anew."""
    used, sample = [], empg.sample
    monkeypatch.setattr(
        empg, "sample", lambda *args, **how: used.extend(how.get("seeds") or []) or sample(*args, **how)
    )
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        empg.main(options(tiny, tmp_path / name, seed=seed))
    a, b, c = (without_seconds(metrics(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert used[:8] == used[8:16] and len(set(used)) == len(used[8:]) == 16


def test_several_updates_on_one_buffer(tiny, tmp_path, odd_is_right, monkeypatch):
    """--minibatches and --epochs multiply the updates, cover the batch, and let the effective sample size fall below 1."""
    calls, original, batches, sample = [], empg.update, [], empg.sample
    monkeypatch.setattr(empg, "update", lambda *args: calls.append(args) or original(*args))
    spy = lambda model, prompts, *args, **how: batches.append(prompts) or sample(model, prompts, *args, **how)
    monkeypatch.setattr(empg, "sample", spy)
    empg.main(options(tiny, tmp_path, steps=1, minibatches=2, epochs=3, lr=0.03, warmup_steps=0))
    assert len(calls) == 6
    (batch,) = (prompts for prompts in batches if len(prompts) == 4)  # the others are evaluations, of six
    assert [sorted({batch.index(t.prompt) for t in args[2]}) for args in calls] == [[0, 2], [1, 3]] * 3
    assert [args[3] for args in calls] == [8] * 6
    assert [args[5] is None for args in calls] == [True] + [False] * 5
    assert metrics(tmp_path)[1]["ess"] < 0.999


@pytest.mark.parametrize("anchor", ["initial", "ema", "old"])
def test_anchors(anchor, tiny, tmp_path, odd_is_right, monkeypatch):
    """The initial policy stays; the moving average follows θ_ref ← decay · θ_ref + (1 − decay) · θ; the old one is θ*."""
    states, begin = [], empg.begin
    monkeypatch.setattr(empg, "begin", lambda *args: states.append(begin(*args)) or states[0])
    thetas, save = [], empg.save_checkpoint
    flat = lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])

    def spy(output, state, keep):
        thetas.append(flat(state.policy))
        save(output, state, keep)

    monkeypatch.setattr(empg, "save_checkpoint", spy)
    empg.main(
        options(tiny, tmp_path, steps=5, beta=0.1, anchor=anchor, ema_decay=0.7, ema_every=2, lr=0.01, save_every=1)
    )
    expected = flat(load(tiny))
    if anchor == "ema":
        for theta in (thetas[1], thetas[3]):
            expected = 0.7 * expected + 0.3 * theta
    if anchor == "old":
        assert states[0].reference is states[0].old_policy
    else:
        torch.testing.assert_close(flat(states[0].reference), expected)
    kl = [row["kl"] for row in metrics(tmp_path) if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-6) and (max(kl) > 1e-5) == (anchor != "old")


def test_a_moving_anchor_survives_a_resume(tiny, tmp_path, odd_is_right):
    """Where the anchor is stands in the checkpoint: the resumed run is the run, to the last bit."""
    more = {"beta": 0.1, "anchor": "ema", "ema_every": 2, "minibatches": 2, "kl": "topk", "kl_topk": 2}
    empg.main(options(tiny, tmp_path / "whole", steps=6, **more))
    for steps in (3, 6):
        empg.main([*options(tiny, tmp_path / "parts", steps=steps, **more), "--resume"])
    same_run(tmp_path / "whole", tmp_path / "parts")


def quiet(**changes) -> dict:
    """A row of metrics.jsonl with nothing to warn of."""
    return {"reward": 0.5, "no_signal": 0.2, "ess": 1.0, "grad_norm": 1.0, "distinct": 60} | changes


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([quiet()] * 9, set()),
        ([quiet(no_signal=1, ess=None, grad_norm=None)] * 4, set()),
        ([quiet(no_signal=1, ess=None, grad_norm=None)] * 5, {"five"}),
        ([quiet(), quiet(ess=0.49)], {"the effective sample size"}),
        ([quiet()] * 5 + [quiet(grad_norm=10.1)], {"the gradient norm"}),
        ([quiet()] * 3 + [quiet(grad_norm=10.1)], set()),
        ([quiet(), quiet(reward=0.2, distinct=3)], {"collapse"}),
        ([quiet(), quiet(reward=0.9, distinct=3)], set()),
        ([quiet(), quiet(reward=0.2)], set()),
    ],
)
def test_warnings(rows, kinds):
    """Each sign of failure has its warning, in words that say what to turn; a healthy run has none."""
    found = empg.warnings_of(rows, 32)
    assert len(found) == len(kinds) and all("--" in text and text.startswith(tuple(kinds)) for text in found)


def test_a_warning_is_printed_once(tiny, tmp_path, odd_is_right, capsys):
    """A learning rate that is far too high: the line about the effective sample size comes once."""
    empg.main(options(tiny, tmp_path, steps=4, epochs=4, lr=0.1, warmup_steps=0))
    assert capsys.readouterr().out.count("Warning: the effective sample size") == 1


def test_rows_are_reported_to_wandb_and_tensorboard(tiny, tmp_path, odd_is_right, capsys, monkeypatch):
    """--report-to hands every row on, beside metrics.jsonl; a package that is not installed is an error that says so."""
    monkeypatch.setattr(empg, "find_spec", lambda name: None)
    refuses(capsys, options(tiny, tmp_path / "no", report_to="tensorboard"), "tensorboard", "pip install tensorboard")
    logged, scalars = [], []
    wandb = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)))
    wandb.init = lambda **how: wandb
    writer = types.SimpleNamespace(add_scalar=lambda *values: scalars.append(values), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda path: writer)
    )
    monkeypatch.setattr(empg, "find_spec", lambda name: "there")
    for name in ("wandb", "tensorboard"):
        empg.main(options(tiny, tmp_path / name, report_to=name))
    rows = [(row["step"], {k: v for k, v in row.items() if v is not None}) for row in metrics(tmp_path / "wandb")]
    assert [(step, row | {"step": step}) for step, row in logged] == rows
    assert [value for name, value, _ in scalars if name == "reward"] == [
        row["reward"] for row in metrics(tmp_path / "tensorboard") if "reward" in row
    ]


def test_sampling_is_from_the_policy_as_it_is(tiny, tmp_path, odd_is_right, monkeypatch):
    """θ* ← θ at every iteration: whenever trajectories are drawn, the frozen copy has the trained policy's weights."""
    loaded, distances = [], []
    load_policy, sample = empg.load_policy, empg.sample
    monkeypatch.setattr(empg, "load_policy", lambda *args: loaded.append(load_policy(*args)) or loaded[-1])

    def spy(model, *args, **kwargs):
        distances.append(max((a - b).abs().max().item() for a, b in zip(model.parameters(), loaded[0].parameters())))
        return sample(model, *args, **kwargs)

    monkeypatch.setattr(empg, "sample", spy)
    empg.main(options(tiny, tmp_path, steps=5, eval_every=2))
    assert len(distances) > 3 and max(distances) == 0


def test_the_reference_model_is_there_only_with_beta(tiny, tmp_path, odd_is_right, monkeypatch):
    """With --beta 0 one copy of the policy is made for training, θ*; with it, a second one, which a KL is measured from."""
    copies, original = [], copy.deepcopy
    count = lambda thing, *memo: copies.append(isinstance(thing, torch.nn.Module)) or original(thing, *memo)
    monkeypatch.setattr(empg.copy, "deepcopy", count)
    empg.main(options(tiny, tmp_path / "0"))
    without = sum(copies)
    empg.main(options(tiny, tmp_path / "1", beta=0.1, lr=0.01, steps=3))
    assert without == 1 and sum(copies) == 3
    kl = [row["kl"] for row in metrics(tmp_path / "1") if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4


def test_a_batch_without_signal_is_reported_and_skipped(tiny, tmp_path, monkeypatch, capsys):
    """If every reward is the same, nothing is updated and the line and the metrics say so."""
    task = dataclasses.replace(empg.TASKS["sums"], reward=lambda response, answer: 1.0)
    monkeypatch.setitem(empg.TASKS, "sums", task)
    empg.main(options(tiny, tmp_path))
    rows = [row for row in metrics(tmp_path) if "reward" in row]
    assert all(row["no_signal"] == 1 and row["loss"] is None and row["grad_norm"] is None for row in rows)
    assert capsys.readouterr().out.count("no signal") == 2
    before, after = load(tiny), load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_updates_that_are_not_finite_are_skipped_and_stop_the_run(tiny, tmp_path, odd_is_right, capsys, monkeypatch):
    """A gradient of nan leaves the weights alone and is counted; five in a row end the run with a message, model saved."""
    original = empg.empg_loss
    monkeypatch.setattr(empg, "empg_loss", lambda *args: original(*args) * math.nan)
    with pytest.raises(SystemExit) as stop:
        empg.main(options(tiny, tmp_path, steps=9))
    assert stop.value.code == 1 and "five iterations in a row" in capsys.readouterr().err
    assert [row["skipped_updates"] for row in metrics(tmp_path) if "reward" in row] == [1] * 5
    before, after = load(tiny), load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_plain_runs_get_a_new_directory_each(tiny, tmp_path, odd_is_right, monkeypatch):
    """Without --output the same command can be repeated: nothing is overwritten."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        empg.main(options(tiny, None, steps=1, eval_every=0))
    assert len(list(tmp_path.glob("runs/sums-*/model/model.safetensors"))) == 2


def write_rows(path: Path, **splits) -> Path:
    path.mkdir()
    for split, rows in splits.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_held_out_problems_are_taken_out_of_the_training_data(tmp_path):
    """A question that stands in both splits is not trained on, however few problems the evaluation uses."""
    row = lambda i: {"question": f"{i}+{i}=", "answer": f"#### {2 * i}"}
    data = write_rows(tmp_path / "data", train=[row(i) for i in range(8)], test=[row(i) for i in (1, 3, 5, 9)])
    settings = config(task="gsm8k", data=str(data), max_new_tokens=8, eval_problems=1)
    problems, held_out = empg.load_problems(settings, empg.TASKS["gsm8k"], empg.character_tokenizer(), 4096)
    assert [p["question"] for p in problems] == [f"{i}+{i}=" for i in (0, 2, 4, 6, 7)]
    assert len(held_out) == 1 and all(p["prompt"] for p in problems + held_out)


# What a run sees and does: the responses it samples, the gradients of its updates, kept in `seen`.
WATCH = """
import dataclasses, os, sys
sys.path.insert(0, {here!r})
import torch, empg
from torch.optim.optimizer import register_optimizer_step_pre_hook
seen = {{"trajectories": [], "gradients": []}}
original = empg.sample
def sample(*args, **how):
    responses = original(*args, **how)
    if how["temperature"]:
        seen["trajectories"].append(responses)
    return responses
empg.sample = sample
# signal on few prompts, so that the ranks differ in work and one may have none
reward = lambda response, answer: float(len(response) % 2) if int(answer) % 3 == 0 else 0.0
empg.TASKS["sums"] = dataclasses.replace(empg.TASKS["sums"], reward=reward)
def hook(optimizer, args, kwargs):
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    held = [optimizer.param_groups[0]["params"], grads, *(s.values() for s in optimizer.state.values())]
    held = [getattr(t, "_local_tensor", t).numel() for tensors in held for t in tensors if t.ndim]
    seen["held"] = sum(held)
    seen["gradients"].append(torch.cat([g.flatten() for g in whole]))
register_optimizer_step_pre_hook(hook)
"""
CHILD = (
    WATCH
    + """
empg.main(sys.argv[2:])
torch.save(seen, sys.argv[1] + "." + os.environ.get("RANK", "0"))
"""
)


def launch(processes: int, *more) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *more]
    return [str(word) for word in words]


def run(command: list, timeout: float = 200, **how) -> subprocess.CompletedProcess:
    """A command in a process of its own, one thread for each rank."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    how = {"capture_output": True, "text": True, "timeout": timeout, "env": env} | how
    return subprocess.run([str(word) for word in command], check=False, **how)


def run_ranks(processes: int, command: list) -> None:
    """As torchrun does it, but for watching over them, which takes seconds to start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [str(word) for word in command],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), errors


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    path = tmp_path_factory.mktemp("child") / "child.py"
    path.write_text(CHILD.format(here=str(HERE)))
    return path


@pytest.fixture(scope="module")
def alone(tiny, child, tmp_path_factory):
    """Runs with unequal work for their ranks, in one process: their options, what they see and what they record."""
    runs = {}
    for kind, more in {
        "plain": {"steps": 3},
        "kl": {
            "steps": 2,
            "beta": 0.1,
            "minibatches": 2,
            "kl": "topk",
            "kl_topk": 4,
            "anchor": "ema",
            "ema_every": 1,
        },
    }.items():
        changes = {"num_samples": 8, "micro_batch_tokens": 60} | more
        output = tmp_path_factory.mktemp(kind)
        done = run([sys.executable, child, output / "seen", *options(tiny, output / "run", **changes)])
        assert done.returncode == 0, done.stderr
        runs[kind] = changes, torch.load(output / "seen.0"), metrics(output / "run")
    return runs


@pytest.mark.parametrize(
    ("processes", "kind", "flags"),
    [
        (2, "plain", []),
        (4, "kl", []),
        (1, "kl", ["--shard"]),
        (2, "kl", ["--shard"]),
        (4, "plain", ["--shard", "--gradient-checkpointing"]),
    ],
)
def test_any_number_of_processes_does_what_one_does(alone, processes, kind, flags, tiny, child, tmp_path):
    """1, 2 and 4 processes, whole or sharded: the same trajectories, gradients within 1e-5, the same metrics.

    Statistics per rank, a mean over ranks with unequal work, or a prompt that gets other samples elsewhere would show.
    """
    changes, single, rows = alone[kind]
    args = options(tiny, tmp_path / "run", **changes)
    run_ranks(processes, [sys.executable, child, tmp_path / "seen", *args, *flags])
    ranks = [torch.load(tmp_path / f"seen.{rank}") for rank in range(processes)]
    if "--shard" in flags:  # weights, gradients and Adam's averages are split, but for what does not divide evenly
        assert all(rank["held"] <= 1.1 * single["held"] / processes for rank in ranks)
    drawn = [[r for part in parts for r in part] for parts in zip(*(rank["trajectories"] for rank in ranks))]
    assert drawn == single["trajectories"]
    for rank in ranks:
        assert len(rank["gradients"]) == len(single["gradients"]) >= 2
        assert all(map(torch.equal, rank["gradients"], ranks[0]["gradients"]))  # else the copies of θ would drift apart
        for ours, theirs in zip(rank["gradients"], single["gradients"]):
            same = (ours - theirs).norm() <= 1e-5 * theirs.norm()
            assert same, "statistics per rank in place of the whole batch's, or a mean over ranks with unequal work"
    same_metrics(rows, metrics(tmp_path / "run"))


# -------- What the README says --------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def options_table() -> str:
    """Every option as a row of the README's table."""
    rows = ["| option | default | |", "|---|---|---|"]
    for option in dataclasses.fields(empg.Config):
        default = "" if option.default is None else f"`{option.default}`".replace("False", "off")
        kind = next((k for k in (option.type, *get_args(option.type)) if get_origin(k) is Literal), None)
        choices = ", ".join(f"`{choice}`" for choice in get_args(kind)) + ": " if kind else ""
        rows.append(f"| `{empg.flag(option.name)}` | {default} | {choices}{option.metadata['help']} |")
    return "\n".join(rows)


def test_the_readme_lists_every_option():
    """The table of options is the one made from Config: names, defaults and help."""
    assert options_table() in README


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_example_learns(tiny, tmp_path):
    """Sampler, smoothing, baseline and loss in somebody else's loop: as printed in the README, it earns more and more."""
    code = python_blocks()[0].replace("runs/sums-base", str(tiny))
    done = run([sys.executable, "-c", code], cwd=HERE)
    assert done.returncode == 0, done.stderr
    rewards = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5])


def test_the_readme_task_trains(tiny, tmp_path):
    """A task of one's own, with its problems and reward, as printed in the README."""
    args = options(tiny, tmp_path / "run", task="pairs", prompt_template="{question}")
    done = run([sys.executable, "-c", python_blocks()[1].replace("empg.main()", f"empg.main({args})")], cwd=HERE)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 1, 2, 2]


def test_examples_in_docstrings():
    """What the docstrings show is what the functions return."""
    assert doctest.testmod(empg).failed == 0 < doctest.testmod(empg).attempted


# -------- Checkpoints and faults: real signals to real processes -------------------------------------------------------


def same_run(one: Path, two: Path) -> None:
    """Equal to the last bit: what was recorded, but for the seconds, and the weights of model and newest checkpoint."""
    assert without_seconds(metrics(one)) == without_seconds(metrics(two))
    files = [max(path.glob("checkpoints/*/*.safetensors")) for path in (one, two)]
    weights = [[load_file(path / "model/model.safetensors"), load_file(file)] for path, file in zip((one, two), files)]
    for a, b in zip(*weights, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tiny, child, tmp_path_factory):
    """A run of 12 iterations in one process that nothing disturbs."""
    path = tmp_path_factory.mktemp("undisturbed")
    done = run([sys.executable, child, path / "seen", *options(tiny, path / "run", steps=12, save_every=1)])
    assert done.returncode == 0, done.stderr
    return path / "run"


def test_a_resumed_run_is_the_run(tiny, tmp_path, odd_is_right):
    """Stopped after 5 iterations and resumed, even before its first checkpoint or after its end: the same to the last bit."""
    empg.main(options(tiny, tmp_path / "whole", steps=8))
    for steps in (5, 8, 8):
        empg.main([*options(tiny, tmp_path / "parts", steps=steps, save_every=3), "--resume"])
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert [path.name for path in empg.checkpoints(tmp_path / "parts")] == ["000006", "000008"]  # --keep 2


def test_a_checkpoint_resumes_on_another_number_of_processes(tiny, undisturbed, child, tmp_path):
    """2 sharded → 1 → 2 processes: the metrics go on as if nothing had changed."""
    for processes, steps, flags in ((2, 2, ["--shard"]), (1, 4, []), (2, 6, [])):
        args = options(tiny, tmp_path / "run", steps=steps)
        run_ranks(processes, [sys.executable, child, tmp_path / "seen", *args, *flags, "--resume"])
    expected = [row for row in metrics(undisturbed) if row["step"] <= 6]
    same_metrics(metrics(tmp_path / "run"), expected)


def start(command: list, **how) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=env, **how)


def read_until(process: subprocess.Popen, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was never printed: {seen}")


KILLS = int(os.environ.get("EMPG_KILLS", "2"))


def test_no_kill_loses_more_than_the_work_since_the_last_checkpoint(tiny, child, undisturbed, tmp_path):
    """SIGKILL at random moments, in the middle of writing too: the newest checkpoint is whole, and the end is the same."""
    random, saved = np.random.default_rng(), 0
    args = options(tiny, tmp_path / "run", steps=max(12, 2 * KILLS), save_every=1)
    command = [sys.executable, child, tmp_path / "seen", *args, "--resume"]
    for _ in range(KILLS):
        process = start(command)
        text = read_until(process, "Results go to")
        if saved:
            assert f"Resuming after iteration {saved}\n" in text + read_until(process, "Resuming")
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
        saved = max([saved, *(int(path.name) for path in empg.checkpoints(tmp_path / "run"))])
    done = run(command)
    assert done.returncode == 0, done.stderr
    if KILLS > 6:  # a soak needs a longer run to be equal to
        undisturbed = tmp_path / "undisturbed"
        done = run([*command[:3], *options(tiny, undisturbed, steps=2 * KILLS, save_every=1)])
    same_run(undisturbed, tmp_path / "run")


def test_torchrun_restarts_after_the_kill_of_a_rank(tiny, tmp_path, alone):
    """torchrun --max-restarts with a rank that is killed by SIGKILL in the middle finishes like a run that is left alone."""
    changes, _, rows = alone["plain"]
    child = tmp_path / "child.py"
    child.write_text(WATCH.format(here=str(HERE)) + KILLED)
    args = options(tiny, tmp_path / "run", **changes, save_every=1)
    done = run([*launch(2, "--max-restarts", 3), child, tmp_path / "killed", *args, "--resume"])
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    assert "Resuming after iteration 1" in done.stdout
    assert "error: rank 1 did not finish saving: it is stuck or was killed" in done.stderr
    same_metrics(rows, metrics(tmp_path / "run"))


KILLED = """
import pathlib, signal
save, flag = empg.save_checkpoint, pathlib.Path(sys.argv[1])
def killed(output, state, keep):
    if state.step == 2 and empg.RANK == 1 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    save(output, state, keep)
empg.save_checkpoint = killed
empg.main(sys.argv[2:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_iteration(number, tiny, child, undisturbed, tmp_path):
    """Ctrl-C and SIGTERM: the iteration is finished, checkpoint and model are written, and --resume goes on from there."""
    args = options(tiny, tmp_path / "run", steps=1000, save_every=1000)
    process = start([sys.executable, child, tmp_path / "seen", *args], stderr=subprocess.PIPE)
    read_until(process, "   2  reward")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "a checkpoint written" in error
    (saved,) = empg.checkpoints(tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["step"] == int(saved.name) >= 2 and load(tmp_path / "run/model")
    if number == signal.SIGINT and rows[-1]["step"] < 12:
        done = run([sys.executable, child, tmp_path / "seen", *options(tiny, tmp_path / "run", steps=12), "--resume"])
        assert done.returncode == 0, done.stderr
        same_run(undisturbed, tmp_path / "run")


def test_the_second_ctrl_c_ends_at_once(tiny, tmp_path):
    """The first waits for the iteration, however long it lasts; the second does not."""
    child = tmp_path / "child.py"
    slow = "empg.sample_in_parts = lambda *args, **how: print('sampling', flush=True) or time.sleep(100)"
    child.write_text(
        f"import sys, time\nsys.path.insert(0, {str(HERE)!r})\nimport empg\n{slow}\nempg.main(sys.argv[1:])"
    )
    process = start([sys.executable, child, *options(tiny, tmp_path / "run", eval_every=0)], stderr=subprocess.PIPE)
    read_until(process, "sampling")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a cluster may say it twice
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT


FULL = """
import resource
save = empg.save_checkpoint
def full(output, state, keep):
    if state.step == 2:  # as a disk with room for 20,000 bytes more
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    save(output, state, keep)
empg.save_checkpoint = full
empg.main(sys.argv[1:])
"""


def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(tiny, tmp_path):
    """A checkpoint that cannot be written ends the run with one line; the run resumes from the one before it."""
    child = tmp_path / "child.py"
    child.write_text(WATCH.format(here=str(HERE)) + FULL)
    done = run([sys.executable, child, *options(tiny, tmp_path / "run", save_every=1)])
    assert done.returncode == 1 and "000002 cannot be written: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("run/model*"))
    assert [path.name for path in empg.checkpoints(tmp_path / "run")] == ["000001"]
    empg.main([*options(tiny, tmp_path / "run"), "--resume"])


def shorten(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 8)


def flip(path):
    with open(path, "r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("damage", "file"),
    [(shorten, "*1-*.safetensors"), (flip, "*1-*.safetensors"), (Path.unlink, "*1-*.safetensors"),
     (Path.unlink, "state.json"), (shorten, "state.json")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(damage, file, tiny, tmp_path, capsys, odd_is_right):
    """A shortened or missing file, even a single bit: one line names the checkpoint and what to do; nothing is touched."""
    args = options(tiny, tmp_path / "run", steps=3, save_every=1)
    empg.main(args)
    model = (tmp_path / "run/model/model.safetensors").read_bytes()
    (path,) = (tmp_path / "run/checkpoints/000003").glob(file)
    damage(path)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    refuses(capsys, [*args, "--resume"], "checkpoints/000003", "damaged", "000002, remove it")
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == model
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    shutil.rmtree(path.parent)
    empg.main([*args, "--resume"])
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == model


def test_a_run_is_resumed_with_its_own_options(tiny, tmp_path, capsys, odd_is_right):
    """Another --lr or --seed is another run; more --steps are not."""
    empg.main(options(tiny, tmp_path / "run", steps=1))
    refuses(capsys, [*options(tiny, tmp_path / "run", lr=1), "--resume"], "--lr 1.0", "has 0.001")
    empg.main([*options(tiny, tmp_path / "run", steps=2), "--resume"])
    assert "Resuming after iteration 1\n" in capsys.readouterr().out


FAULTY = """
import datetime, signal, time
empg.TIMEOUT = datetime.timedelta(seconds=4)
if empg.RANK == 1:
    {fault}
empg.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("empg.train = lambda *args: signal.signal(signal.SIGTERM, signal.SIG_DFL) and time.sleep(60)", "rank 1 did not finish an evaluation"),
        ("pass\nif empg.RANK == 0:\n    empg.train = lambda *args: signal.signal(signal.SIGTERM, signal.SIG_DFL) and "
         + "time.sleep(60)", "rank 0 did not finish an evaluation"),
        ("sys.argv += ['--lr', '0.5']", "--lr: rank 0 has 0.001, rank 1 has 0.5"),
        ("load = empg.load_policy; empg.load_policy = lambda *a: load(*a).apply("
         + "lambda m: hasattr(m, 'variance_epsilon') and m.weight.data.add_(1))", "the weights model.layers.0.input_layernorm.weight"),
    ],
    ids=["stuck", "first", "option", "weights"],
)  # fmt: skip
def test_a_rank_that_is_stuck_or_differs_is_named(fault, message, tiny, tmp_path):
    """Instead of hanging, or training on a mixture, the run ends with a line that names the rank and what is wrong."""
    child = tmp_path / "child.py"
    child.write_text(WATCH.format(here=str(HERE)) + FAULTY.format(fault=fault))
    done = run([*launch(2), child, *options(tiny, tmp_path / "run")], timeout=100)
    assert done.returncode and f"error: {message}" in done.stderr, done.stderr


@pytest.mark.parametrize("what", ["version of torch", "the training data", "the checkpoint to resume"])
def test_ranks_agree_on_everything_else(what, tiny, tmp_path, capsys, odd_is_right, monkeypatch):
    """Libraries, data and the checkpoint are compared, too: here with a rank that says something else."""
    empg.main(options(tiny, tmp_path, steps=1))

    def with_another(values, phase=""):
        facts = values[0] if values else None
        return [*values, facts | {what: "other"}] if isinstance(facts, dict) and what in facts else values

    monkeypatch.setattr(empg, "gather", with_another)
    refuses(capsys, [*options(tiny, tmp_path), "--resume"], f"{what}: rank 0 has", "rank 1 has 'other'")


def test_out_of_memory_halves_what_is_sampled_at_a_time(tiny, tmp_path, odd_is_right, monkeypatch, capsys):
    """Sampling that does not fit is done in halves, and says so; the trajectories and the run are the same."""
    empg.main(options(tiny, tmp_path / "whole", eval_every=0))
    original, sizes = empg.sample, []

    def small(model, prompts, num_samples, *args, **how):
        sizes.append(len(prompts) * num_samples)
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, prompts, num_samples, *args, **how)

    monkeypatch.setattr(empg, "sample", small)
    capsys.readouterr()
    empg.main(options(tiny, tmp_path / "parts", eval_every=0))
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    assert capsys.readouterr().out.count("out of memory; from now on it samples") == 2
    same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(SystemExit) as stop:
        empg.main(options(tiny, tmp_path / "none", num_samples=8))
    assert stop.value.code == 1 and "--max-new-tokens" in capsys.readouterr().err


def test_an_evaluation_samples_no_more_at_a_time_than_an_iteration(tiny, tmp_path, odd_is_right, monkeypatch):
    """However many problems are held out, the memory of sampling is that of a batch: 40 of them, 16 responses at a time."""
    original, sizes = empg.sample, []
    count = lambda model, prompts, samples, **how: (
        sizes.append(len(prompts) * samples) or original(model, prompts, samples, **how)
    )
    monkeypatch.setattr(empg, "sample", count)
    empg.main(options(tiny, tmp_path, steps=1, eval_problems=40))
    assert sizes == [16, 16, 8, 16, 16, 16, 8]


@needs_data
def test_learns_on_real_text(tmp_path, monkeypatch):
    """On GSM8K's own questions, through chat template and BPE, a random model learns to stop within 20 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [json.loads(line) for line in (SHARED / "gsm8k/train.jsonl").read_text().splitlines()]
    lines = sorted(lines, key=lambda row: len(row["question"]))[:300]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>", "<end>"], initial_alphabet=alphabet)
    bpe.train_from_iterator((row["question"] for row in lines), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<end>", padding_side="left"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "base")
    base = make_model(
        vocab=len(tokenizer), scale=0.02, dtype=torch.float32, hidden_size=32, max_position_embeddings=1024
    )
    base.save_pretrained(tmp_path / "base")
    data = write_rows(tmp_path / "data", train=lines[:280], test=lines[280:])

    lengths = []
    original = empg.sample
    monkeypatch.setattr(empg, "sample", lambda *a, **k: lengths.extend(map(len, r := original(*a, **k))) or r)
    short = dataclasses.replace(
        empg.TASKS["gsm8k"], reward=lambda response, answer: float(len(tokenizer(response)["input_ids"]) < 20)
    )
    monkeypatch.setitem(empg.TASKS, "gsm8k", short)
    empg.main(options(tmp_path / "base", tmp_path / "run", task="gsm8k", data=data, steps=25, prompts_per_step=8,
                      num_samples=16, max_new_tokens=24, lr=1e-2, eval_every=25, eval_problems=16))  # fmt: skip
    rewards = [row["reward"] for row in metrics(tmp_path / "run") if "reward" in row]
    assert rewards[0] < 0.3 and rewards[-1] > 0.9


# -------- Bad input gets one clear line, exit code 2, before any long work --------------------------------------------


def refuses(capsys, argv, *words):
    """`main` exits with 2 after one line on standard error that has all the words, and samples nothing."""
    with pytest.raises(SystemExit) as stop:
        empg.main([str(word) for word in argv])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("empg.py: error:")]
    assert stop.value.code == 2 and len(lines) == 1 and error.rstrip().endswith(lines[0]) and "Traceback" not in error
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_such_option": 1}, ["--no-such-option", "--help"]),
        ({"steps": "many"}, ["--steps", "many"]),
        ({"task": "chess"}, ["chess", "sums, gsm8k, math-hard"]),
        ({"baseline": "mean"}, ["--baseline", "'mean'", "loo", "group", "batch", "none"]),
        ({"prompts_per_step": 0}, ["prompts-per-step", "at least 1"]),
        ({"num_samples": 0}, ["num-samples", "at least 1"]),
        ({"num_samples": 1}, ["num-samples 1", "loo"]),
        ({"max_new_tokens": -3}, ["max-new-tokens", "at least 1"]),
        ({"steps": 0}, ["steps", "at least 1"]),
        ({"epochs": 0}, ["epochs"]),
        ({"minibatches": 0}, ["minibatches"]),
        ({"minibatches": 5}, ["minibatches", "prompts-per-step"]),
        ({"temperature": 0}, ["temperature", "above 0"]),
        ({"temperature": "nan"}, ["temperature", "above 0"]),
        ({"lr": 0}, ["lr", "above 0"]),
        ({"lr": -1e-4}, ["lr", "above 0"]),
        ({"top_p": 0}, ["top-p", "above 0"]),
        ({"top_p": 1.1}, ["top-p", "at most 1"]),
        ({"beta": -1}, ["beta", "at least 0"]),
        ({"seed": -1}, ["seed", "at least 0"]),
        ({"dtype": "float16"}, ["float16", "bfloat16"]),
        ({"device": "tpu"}, ["tpu"]),
        ({"prompt_template": "Solve:"}, ["{question}"]),
        ({"model": "builtin", "task": "gsm8k"}, ["builtin", "gsm8k"]),
        ({"model": "someone/no-such-model"}, ["someone/no-such-model", "local directory"]),
        ({"task": "gsm8k", "data": "someone/no-such-data"}, ["someone/no-such-data", "local directory"]),
        ({"data": "anything"}, ["--data", "sums"]),
        ({"max_new_tokens": 60}, ["max-new-tokens 60", "context of 64", "at most 56"]),
        ({"algo": "grpo", "num_samples": 1}, ["num-samples 1", "grpo"]),
        ({"algo": "ppo"}, ["--algo", "'ppo'", "empg", "grpo"]),
        ({"algo": "grpo", "smoothing": "sigmoid"}, ["--smoothing sigmoid", "--algo grpo"]),
        ({"algo": "grpo", "baseline": "loo"}, ["--baseline loo", "--algo grpo"]),
        ({"smoothing": "tanh"}, ["--smoothing", "'tanh'", "sigmoid", "none"]),
        ({"kl": "topk"}, ["--kl topk", "--beta"]),
        ({"anchor": "ema"}, ["--anchor ema", "--beta"]),
        ({"anchor": "last", "beta": 0.1}, ["--anchor", "'last'", "initial", "ema", "old"]),
        ({"beta": 0.1, "kl_topk": 4}, ["--kl-topk 4", "--kl topk"]),
        ({"beta": 0.1, "kl": "topk", "kl_topk": -1}, ["--kl-topk -1", "0 to 18"]),
        ({"beta": 0.1, "kl": "topk", "kl_topk": 19}, ["--kl-topk 19", "0 to 18"]),
        ({"ema_decay": 1.5, "beta": 0.1}, ["--ema-decay 1.5", "0 to 1"]),
        ({"ema_every": 0}, ["ema-every", "at least 1"]),
        ({"keep": 0}, ["keep", "at least 1"]),
        ({"report_to": "paper"}, ["report-to", "'paper'", "tensorboard", "wandb"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_options(tiny, tmp_path, capsys, changes, words):
    """Each is refused by name, with what would do instead, and writes no results."""
    refuses(capsys, options(tiny, tmp_path / "out", **changes), *words)
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_prompts_must_divide_among_the_processes(tiny, tmp_path, capsys, monkeypatch):
    """Three processes cannot share four prompts."""
    monkeypatch.setattr(empg, "WORLD_SIZE", 3)
    refuses(capsys, options(tiny, tmp_path / "out"), "prompts-per-step 4", "3")


def test_a_directory_with_results_is_not_overwritten(tiny, tmp_path, capsys, odd_is_right):
    """A second run into the same --output, or into a file, is refused and loses nothing."""
    empg.main(options(tiny, tmp_path / "out", steps=1))
    before = (tmp_path / "out/metrics.jsonl").read_text()
    capsys.readouterr()
    refuses(capsys, options(tiny, tmp_path / "out", steps=1), "--output", "another run")
    assert (tmp_path / "out/metrics.jsonl").read_text() == before
    (tmp_path / "file").write_text("mine")
    refuses(capsys, options(tiny, tmp_path / "file"), "--output", "file")


def test_bad_data_is_refused(tiny, tmp_path, capsys):
    """Missing columns are named beside those found; a dataset without rows, splits or new problems is refused."""
    row = {"question": "1+1=", "answer": "#### 2"}
    for name, splits, words in (
        ("columns", {"train": [{"q": "1", "a": "2"}], "test": [{"q": "1", "a": "2"}]}, ["question", "'q', 'a'"]),
        ("rows", {"train": [row], "test": []}, ["test"]),
        ("split", {"train": [row]}, ["test"]),
        ("leak", {"train": [row], "test": [row]}, ["held out"]),
    ):
        data = write_rows(tmp_path / name, **splits)
        refuses(capsys, options(tiny, tmp_path / "out", task="gsm8k", data=data), "--data", *words)


def test_bad_models_are_refused(tiny, tmp_path, capsys):
    """No model, no weights, a tokenizer without EOS, or one with more tokens than the model: each is refused."""
    (tmp_path / "empty").mkdir()
    refuses(capsys, options(tmp_path / "empty", tmp_path / "out"), "--model", "empty")
    shutil.copytree(tiny, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    refuses(capsys, options(tmp_path / "weightless", tmp_path / "out"), "--model", "weights", "weightless")
    make_model(dtype=torch.float32).save_pretrained(tmp_path / "endless")
    tokenizer = empg.character_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    refuses(capsys, options(tmp_path / "endless", tmp_path / "out"), "EOS")
    make_model(dtype=torch.float32, vocab=12).save_pretrained(tmp_path / "small")
    empg.character_tokenizer().save_pretrained(tmp_path / "small")
    refuses(capsys, options(tmp_path / "small", tmp_path / "out"), "more tokens")


def test_a_plain_command_names_what_it_stands_for(capsys, monkeypatch):
    """Without --model the recipe for this machine comes first, the user's words win, and the whole command is printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    laptop = empg.parse_config(["--steps", "7"])
    assert (laptop.model, laptop.task, laptop.steps, laptop.device) == ("builtin", "sums", 7, "cpu")
    assert "--model builtin --task sums" in capsys.readouterr().out
    assert empg.parse_config(["--model", "x"]).task == "gsm8k"
    assert empg.parse_config(["--task", "gsm8k"]).model == "Qwen/Qwen2.5-1.5B"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    gpu = empg.parse_config([])
    assert (gpu.model, gpu.task, gpu.device, gpu.dtype) == ("Qwen/Qwen2.5-1.5B", "gsm8k", "cuda", "bfloat16")
    assert empg.parse_config(["--task", "sums"]).model == "builtin"


# -------- eval.py: scores, comparisons, curves ----------------------------------------------------------------------

QUICK = ["--task", "sums", "--device", "cpu", "--max-new-tokens", "12", "--limit", "40"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A directory with a random model whose choices are clear-cut."""
    path = tmp_path_factory.mktemp("models") / "scored"
    make_model(seed=1, vocab=17, dtype=torch.float32, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        path
    )
    empg.character_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def lenient(monkeypatch):
    """Every other response is right and half have an answer, so that every score has something to count."""

    def reward(response, answer):
        return float(extract(response) == "even")

    def extract(response):
        return {0: "even", 1: "odd", 2: "even"}.get(sum(map(ord, response)) % 5)

    task = dataclasses.replace(empg.TASKS["sums"], reward=reward, extract=extract)
    monkeypatch.setitem(empg.TASKS, "sums", task)


def rows_in(path):
    header, *rows = map(json.loads, Path(path).read_text().splitlines())
    return header, sorted(rows, key=lambda row: (row["index"], row["sample"]))


def summary_of(capsys, *words):
    """The summary that a command prints with --json; it is all that stands on standard output."""
    capsys.readouterr()
    scoring.main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refusal(capsys, *words):
    """The line that a command ends with on standard error, when it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        scoring.main([*map(str, words)])
    err = capsys.readouterr().err
    assert end.value.code == 2
    lines = [line for line in err.splitlines() if line.strip() and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("eval.py: error: "), err
    return lines[0]


def results(path, correct, tokens=None, samples=1, texts=None, questions=None, **options):
    """Write a results file with these outcomes and return its path."""
    header = dict.fromkeys(scoring.DECISIVE) | {"model": Path(path).stem, "task": "sums", "max_new_tokens": 12}
    header |= {"num_samples": samples, "problems": len(correct) // samples, "versions": {}, **options}
    lines = [header]
    for i, right in enumerate(correct):
        row = {"index": i // samples, "sample": i % samples, "question": f"q{i // samples}", "gold": "1"}
        row |= {"response": texts[i] if texts else "r", "extracted": "1" if right else None, "correct": bool(right)}
        lines.append(row | {"tokens": tokens[i] if tokens else 5, "cut": False} | (questions or {}))
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path(path)


def test_wilson_interval_solves_its_equation():
    """The ends of Wilson's interval are the shares p from which the observed one is 1.96 standard errors away."""
    assert scoring.wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    for successes, total in [(1, 10), (50, 100), (499, 500), (3, 1319)]:
        for p in scoring.wilson_interval(successes, total):
            assert abs(successes / total - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / total), rel=1e-5)


@pytest.mark.parametrize("total", [1, 7, 500])
def test_wilson_interval_at_none_and_all(total):
    """At no and at full success the interval keeps a width, ends at exactly 0 or 1, and one mirrors the other."""
    low, high = scoring.wilson_interval(0, total)
    assert low == 0 and high == pytest.approx(1.959964**2 / (total + 1.959964**2), rel=1e-6)
    assert scoring.wilson_interval(total, total) == pytest.approx((1 - high, 1)) and high < 1
    assert scoring.wilson_interval(total, total)[1] == 1.0


def test_pass_at_k_is_the_share_of_subsets():
    """pass@k is the share of all k-subsets of the samples that hold a correct one."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert scoring.pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-12)
    assert scoring.pass_at_k(1000, 1, 1) == pytest.approx(0.001)


def test_majority_vote():
    """The commonest answer wins, the earliest of equals; a response without an answer has no vote."""
    assert scoring.majority_vote(["7", "8", "8"]) == "8"
    assert scoring.majority_vote(["9", "8", "8", "9"]) == "9"
    assert scoring.majority_vote([None, None, None, "3"]) == "3"
    assert scoring.majority_vote([None, None]) is None


def test_mcnemar_is_a_sum_over_coins():
    """McNemar's p-value is the probability of coin tosses at least as lopsided as what was observed."""
    for a, b in itertools.product(range(6), repeat=2):
        tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=a + b)]
        extreme = [abs(2 * heads - (a + b)) >= abs(a - b) for heads in tosses]
        assert scoring.mcnemar_exact(a, b) == pytest.approx(sum(extreme) / len(extreme), abs=1e-12)
    assert scoring.mcnemar_exact(0, 0) == 1
    assert scoring.mcnemar_exact(5, 0) == 0.0625
    assert scoring.mcnemar_exact(3000, 3000) == 1
    assert 0 < scoring.mcnemar_exact(900, 100) < 1e-100


def test_paired_difference_of_accuracies():
    """The interval of paired accuracies is Agresti and Min's from the 2 × 2 table: half a problem more in each cell."""
    both, only_a, only_b, neither = 30, 5, 12, 13
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    n, x, y = 62, only_a + 0.5, only_b + 0.5
    centre, error = (y - x) / n, math.sqrt((x + y) - (y - x) ** 2 / n) / n
    expected = (7 / 60, centre - 1.959964 * error, centre + 1.959964 * error)
    assert scoring.paired_difference(a, b, bound=1) == pytest.approx(expected, rel=1e-6)
    mirrored = scoring.paired_difference(b, a, bound=1)
    assert mirrored == pytest.approx((-expected[0], -expected[2], -expected[1]), rel=1e-6)


def test_paired_difference_at_the_edges():
    """Models that never differ get 0 with an interval around it; ones that always do stay within ±1; both are finite."""
    same, low, high = scoring.paired_difference([1] * 50, [1] * 50, bound=1)
    assert same == 0 and -0.1 < low < 0 < high < 0.1
    assert scoring.paired_difference([0] * 50, [1] * 50, bound=1)[0] == 1
    assert 0.85 < scoring.paired_difference([0] * 50, [1] * 50, bound=1)[1] < 1
    assert scoring.paired_difference([0] * 50, [1] * 50, bound=1)[2] == 1
    assert scoring.paired_difference([4], [9], bound=0) == (5, 5, 5)


def test_paired_difference_without_a_bound():
    """Without a bound the interval is that of a mean: 1.96 standard errors of the differences to both sides."""
    a, b = np.random.default_rng(0).normal([[10], [14]], 3, (2, 200))
    error = 1.959964 * (b - a).std() / math.sqrt(200)
    expected = ((b - a).mean(), (b - a).mean() - error, (b - a).mean() + error)
    assert scoring.paired_difference(a, b) == pytest.approx(expected, rel=1e-6)


def test_report_agrees_with_the_file(scored, tmp_path, capsys, lenient):
    """Accuracy, lengths, cut and unanswered shares of a greedy evaluation are those of the rows it writes."""
    file = tmp_path / "new" / "r.jsonl"
    s = summary_of(capsys, "--model", scored, *QUICK, "--output", file)
    header, rows = rows_in(file)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, 0) for i in range(40)]
    problems = empg.sums_problems(None, "test")[:40]
    assert [(row["question"], row["gold"]) for row in rows] != [] and header["problems"] == s["problems"] == 40
    assert [row["question"] for row in rows] == [problem["question"] for problem in problems]
    right = sum(row["correct"] for row in rows)
    assert 0 < right < 40 and s["accuracy"] == right / 40
    assert s["interval"] == pytest.approx(scoring.wilson_interval(right, 40))
    tokens = [row["tokens"] for row in rows]
    assert s["mean_tokens"] == pytest.approx(np.mean(tokens)) and s["median_tokens"] == np.median(tokens)
    assert s["cut"] == pytest.approx(np.mean([row["cut"] for row in rows]))
    assert s["no_answer"] == pytest.approx(np.mean([row["extracted"] is None for row in rows])) and s["no_answer"] > 0
    assert s["temperature"] == 0 and header["versions"]["torch"] == torch.__version__ and header["model"] == scored
    scoring.main(["--model", scored, *QUICK, "--output", str(file)])
    report = capsys.readouterr().out
    assert f"{s['accuracy']:.3f}, 95 % interval" in report and "40 responses from the file" in report


def test_responses_are_those_of_sample(scored, tmp_path):
    """Greedy responses, tokens and the cut mark are those of empg.sample on each problem alone."""
    scoring.main(["--model", scored, *QUICK, "--output", str(tmp_path / "r.jsonl")])
    tokenizer, _ = empg.load_tokenizer(scored)
    policy = empg.load_policy(scored, tokenizer)
    task, limits = empg.TASKS["sums"], empg.sampling_limits(tokenizer, policy, 12)
    kinds = set()
    for row in rows_in(tmp_path / "r.jsonl")[1][::3]:
        prompt = empg.encode_prompts(tokenizer, task, [row["question"]])
        (tokens,) = empg.sample(policy, prompt, 1, temperature=0, **limits)
        assert row["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (row["tokens"], row["cut"]) == (len(tokens), tokens[-1] != tokenizer.eos_token_id)
        assert row["extracted"] == task.extract(row["response"])
        assert row["correct"] == bool(task.reward(row["response"], row["gold"]))
        kinds.add(row["cut"])
    assert kinds == {True, False}


def test_samples_depend_on_seed_problem_and_number_only(scored, tmp_path):
    """Sampled responses are the same in any batch size, with fewer problems and with fewer samples; not so by seed."""
    files = {}
    for name, words in {
        "whole": ["--num-samples", "3", "--batch-size", "1000"],
        "small": ["--num-samples", "3", "--batch-size", "1"],
        "odd": ["--num-samples", "3", "--batch-size", "21", "--limit", "13"],
        "one": ["--num-samples", "1", "--temperature", "1"],
        "seed": ["--num-samples", "3", "--seed", "1"],
    }.items():
        scoring.main(["--model", scored, *QUICK, *words, "--output", str(tmp_path / name)])
        header, rows = rows_in(tmp_path / name)
        assert header["temperature"] == 1
        files[name] = {(row["index"], row["sample"]): row for row in rows}
    assert len(files["whole"]) == 120 and files["small"] == files["whole"]
    assert len(files["odd"]) == 39 and files["odd"].items() <= {k: v for k, v in files["whole"].items()}.items()
    assert len(files["one"]) == 40 and all(files["whole"][key] == row for key, row in files["one"].items())
    assert sum(files["seed"][key]["response"] != files["whole"][key]["response"] for key in files["whole"]) > 90
    texts = {(index, row["response"]) for (index, _), row in files["whole"].items()}
    assert len(texts) > 100


def test_scores_of_several_samples(scored, tmp_path, capsys, lenient):
    """mean@K, pass@k and maj@K are those counted from the rows; the interval is that of as many problems."""
    s = summary_of(capsys, "--model", scored, *QUICK, "--num-samples", "4", "--output", tmp_path / "r.jsonl")
    groups = [list(group) for _, group in itertools.groupby(rows_in(tmp_path / "r.jsonl")[1], lambda row: row["index"])]
    assert [len(group) for group in groups] == [4] * 40
    assert s["accuracy"] == pytest.approx(np.mean([row["correct"] for group in groups for row in group]))
    for k in range(1, 5):
        found = [np.mean([any(r["correct"] for r in c) for c in itertools.combinations(g, k)]) for g in groups]
        assert s["pass_at_k"][str(k)] == pytest.approx(np.mean(found))
    won = [scoring.majority_vote([row["extracted"] for row in group]) == "even" for group in groups]
    assert s["majority"] == pytest.approx(np.mean(won)) and 0 < s["majority"] < 1
    assert s["interval"] == pytest.approx(scoring.wilson_interval(40 * s["accuracy"], 40))
    scoring.main(["--model", scored, *QUICK, "--num-samples", "4", "--output", str(tmp_path / "r.jsonl")])
    report = capsys.readouterr().out
    header, _, _, *lines = (tmp_path / "r.jsonl").read_bytes().splitlines(True)
    (tmp_path / "r.jsonl").write_bytes(b"".join([header, *lines]))  # some samples of one problem are missing
    again = summary_of(capsys, "--model", scored, *QUICK, "--num-samples", "4", "--output", tmp_path / "r.jsonl")
    assert {k for k in s if s[k] != again[k]} <= {"seconds", "tokens_per_second", "responses_from_file"}
    assert "mean@4" in report and "at k = 4" in report and "at k = 3" not in report and "maj@4" in report


def test_no_answers_and_no_success_give_valid_json(scored, capsys, monkeypatch):
    """A model that never answers has accuracy 0 and majority 0, in JSON without NaN."""
    task = dataclasses.replace(empg.TASKS["sums"], reward=lambda response, answer: 0.0, extract=lambda response: None)
    monkeypatch.setitem(empg.TASKS, "sums", task)
    s = summary_of(capsys, "--model", scored, *QUICK, "--num-samples", "2")
    assert (s["accuracy"], s["majority"], s["no_answer"], s["interval"][0]) == (0, 0, 1, 0)
    assert s["pass_at_k"] == {"1": 0, "2": 0} and 0 < s["interval"][1] < 0.1


def test_two_processes_and_a_resumed_file(scored, tmp_path):
    """Two processes that go on with a cut file write it byte for byte as one process does, and print the same scores."""
    words = ["--model", scored, *QUICK, "--num-samples", "2", "--batch-size", "6"]
    scoring.main([*words, "--output", str(tmp_path / "one")])
    whole = (tmp_path / "one").read_bytes()
    (tmp_path / "two").write_bytes(whole[: whole.index(b"\n", len(whole) // 3) + 40])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
    command = [*torchrun, str(HERE / "eval.py"), *words, "--json", "--output", str(tmp_path / "two")]
    end = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert end.returncode == 0, end.stderr
    assert (tmp_path / "two").read_bytes() == whole
    rows = rows_in(tmp_path / "one")[1]
    s = json.loads(end.stdout)
    assert s["mean_tokens"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    assert 0 < s["responses_from_file"] < 80


def test_every_batch_is_on_disk_when_it_is_done(scored, tmp_path, monkeypatch):
    """When a batch starts, the file holds the first row and all rows of the batches before: a kill loses one batch."""
    file, seen, sample = tmp_path / "r.jsonl", [], empg.sample
    monkeypatch.setattr(
        empg, "sample", lambda *a, **k: (seen.append(file.read_bytes().count(b"\n")), sample(*a, **k))[1]
    )
    scoring.main(["--model", scored, *QUICK, "--batch-size", "8", "--output", str(file)])
    assert seen[1:] == [9, 17, 25, 33]


def test_killed_evaluation_goes_on(scored, tmp_path):
    """After SIGKILL in the midst of it, even in the midst of a line, the same command ends with the file it would have."""
    words = ["--model", scored, *QUICK[:-2], "--limit", "160", "--batch-size", "4"]
    scoring.main([*words, "--output", str(tmp_path / "whole")])
    whole, part = (tmp_path / "whole").read_bytes(), tmp_path / "part"
    process = subprocess.Popen([sys.executable, str(HERE / "eval.py"), *words, "--output", str(part)], stderr=-3)
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 30):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = part.read_bytes()
    assert 30 <= written.count(b"\n") < 161 and whole.startswith(written)
    for keep in (len(written), written.rindex(b"\n", 0, -1) + 25):
        part.write_bytes(written[:keep])
        scoring.main([*words, "--output", str(part)])
        assert part.read_bytes() == whole


def test_finished_file_is_only_read(scored, tmp_path, capsys, monkeypatch):
    """A complete results file gives its summary again, without sampling and without a change to the file."""
    first = summary_of(capsys, "--model", scored, *QUICK, "--output", tmp_path / "r.jsonl")
    before = (tmp_path / "r.jsonl").read_bytes()
    monkeypatch.setattr(empg, "sample", lambda *args, **kwargs: pytest.fail("sampled again"))
    again = summary_of(capsys, "--model", scored, *QUICK, "--output", tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == before
    assert {k for k in first if first[k] != again[k]} <= {"seconds", "tokens_per_second", "responses_from_file"}
    left_out = [word for word in QUICK if word not in ("--max-new-tokens", "12")]
    summary_of(capsys, "--model", scored, *left_out, "--output", tmp_path / "r.jsonl")  # goes by the file's limit


def test_default_token_limit_fits_the_context(scored, tmp_path):
    """Without --max-new-tokens a response may have what the model's context leaves."""
    scoring.main(
        ["--model", scored, "--task", "sums", "--device", "cpu", "--limit", "2", "--output", str(tmp_path / "r")]
    )
    assert rows_in(tmp_path / "r")[0]["max_new_tokens"] == 64 - len("1+2+3+4=")


def test_subjects_of_math(scored, tmp_path, capsys):
    """On MATH-Hard the accuracy is also given by subject, the dataset's column `type`."""
    kinds = ["Algebra"] * 3 + ["Geometry"] * 2
    lines = [{"problem": f"{i}+1=", "solution": f"\\boxed{{{i + 1}}}", "type": kind} for i, kind in enumerate(kinds)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", scored, "--task", "math-hard", "--data", tmp_path / "data", "--device", "cpu"]
    words += ["--prompt-template", "{question}", "--output", tmp_path / "r.jsonl"]
    s = summary_of(capsys, *words)
    assert {kind: subject["problems"] for kind, subject in s["subjects"].items()} == {"Algebra": 3, "Geometry": 2}
    header, *rows = (tmp_path / "r.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    for row in rows:
        row["correct"] = row["index"] in (0, 1, 4)
    (tmp_path / "r.jsonl").write_text("\n".join([header, *map(json.dumps, rows)]) + "\n")
    s = summary_of(capsys, *words)
    assert [s["subjects"][kind]["accuracy"] for kind in ("Algebra", "Geometry")] == [pytest.approx(2 / 3), 0.5]
    assert sorted(row["gold"] for row in rows) == ["1", "2", "3", "4", "5"]
    scoring.main([*map(str, words)])
    assert "0.667 of 3 problems" in capsys.readouterr().out


def test_paper_scores(tmp_path):
    """The paper's scores go with its models, by hub name or by a local model's shape, and with no other."""
    config = Qwen2Config(hidden_size=3584, num_hidden_layers=28, max_position_embeddings=4096)
    other = Qwen2Config(hidden_size=64, num_hidden_layers=2)
    expected = {"model": "Qwen2.5-Math-7B", "empg": 0.918, "grpo": 0.004}
    assert scoring.paper_scores(str(tmp_path), config, "gsm8k") == expected
    assert scoring.paper_scores("Qwen/Qwen2.5-Math-7B", other, "gsm8k") == expected
    assert scoring.paper_scores("Qwen/Qwen2.5-14B-Instruct", other, "math-hard")["grpo"] == 0.816
    assert scoring.paper_scores("Qwen/Qwen2.5-Math-7B-Instruct", config, "gsm8k") is None
    assert scoring.paper_scores(str(tmp_path), other, "gsm8k") is None
    assert scoring.paper_scores("Qwen/Qwen2.5-7B", other, "sums") is None
    s = {"model": "Qwen/Qwen2.5-Math-7B", "task": "gsm8k", "split": "test", "num_samples": 1, "temperature": 0.0}
    s |= {"problems": 3, "accuracy": 1.0, "interval": (0.4, 1.0), "mean_tokens": 3.0, "median_tokens": 3.0, "cut": 0.0}
    s |= {"no_answer": 0.0, "seconds": 1.0, "tokens_per_second": 9.0, "responses_from_file": 0, "max_new_tokens": 9}
    assert "EMPG 0.918, GRPO 0.004 (failed to learn)" in scoring.describe(s | {"paper": expected})


def test_compare(tmp_path, capsys):
    """--compare gives both accuracies, the paired difference, the discordant problems, McNemar's p and the lengths."""
    a = results(tmp_path / "a.jsonl", [1, 1, 0, 0, 0, 0, 0, 0], tokens=[1, 2, 3, 4, 5, 6, 7, 8])
    b = results(tmp_path / "b.jsonl", [1, 0, 1, 1, 1, 1, 1, 0], tokens=[2, 4, 6, 8, 10, 12, 14, 16], seed=3)
    s = summary_of(capsys, "--compare", a, b)
    assert (s["problems"], s["accuracy"], s["only_a"], s["only_b"]) == (8, [0.25, 0.75], [1], [2, 3, 4, 5, 6])
    assert s["difference"][0] == 0.5 and s["difference"][1] < 0.5 < s["difference"][2]
    assert s["p_value"] == scoring.mcnemar_exact(1, 5) and s["mean_tokens"] == [4.5, 9]
    assert s["tokens_difference"][0] == 4.5 and s["options"] == {"model": ["a", "b"], "seed": [None, 3]}
    scoring.main(["--compare", str(b), str(a)])
    report = capsys.readouterr().out
    assert "-0.500" in report and "A alone right on 5, B on 1" in report and "p = 0.22;" in report


def test_compare_several_samples(tmp_path, capsys):
    """Files of different numbers of samples are compared by the means of their problems."""
    a = results(tmp_path / "a.jsonl", [1, 0, 0])
    b = results(tmp_path / "b.jsonl", [1, 1, 1, 0, 0, 0], samples=2)
    s = summary_of(capsys, "--compare", a, b)
    assert (s["accuracy"], s["only_a"], s["only_b"]) == ([pytest.approx(1 / 3), 0.5], [], [1])


def test_compare_evaluations(scored, tmp_path, capsys, lenient):
    """Two evaluations of the same problems can be compared; a model compared with itself never differs."""
    for name, words in (("a", []), ("b", ["--temperature", "1"])):
        scoring.main(["--model", scored, *QUICK, *words, "--output", str(tmp_path / name)])
    s = summary_of(capsys, "--compare", tmp_path / "a", tmp_path / "b")
    assert s["problems"] == 40 and s["only_a"] + s["only_b"] and set(s["options"]) == {"temperature"}
    s = summary_of(capsys, "--compare", tmp_path / "a", tmp_path / "a")
    assert (s["difference"][0], s["p_value"], s["only_a"], s["only_b"]) == (0, 1, [], [])


def test_behaviours(tmp_path, capsys):
    """Each behaviour is counted once per response by its phrases, with the first three as examples and the caveat."""
    texts = {
        "sub-problem decomposition": [
            "Step 1: add.",
            "First, we add.",
            "Let’s start by adding.",
            "Case 1: x > 0. Case 1.",
        ],
        "self-verification": ["Let's verify the sum.", "We double-check."],
        "backtracking": ["Wait, that is not right.", "Hmm. Let me reconsider."],
        "": ["The waiter made three cakes.", "It is 18.", "She reached step 10 of the stairs.", "A checkered flag."],
    }
    flat = [text for group in texts.values() for text in group]
    file = results(tmp_path / "r.jsonl", [1] * len(flat), texts=flat)
    s = summary_of(capsys, "--behaviours", file)
    assert {name: s[name]["responses"] for name in s} == {name: len(texts[name]) for name in texts if name}
    for name, behaviour in s.items():
        assert [example["text"] for example in behaviour["examples"]] == texts[name][:3]
        assert behaviour["share"] == pytest.approx(len(texts[name]) / len(flat))
    scoring.main(["--behaviours", str(file)])
    report = capsys.readouterr().out
    assert "proxy" in report and "double-check" in report


def test_behaviours_with_an_evaluation(scored, capsys):
    """--behaviours without a file counts in the evaluation at hand."""
    s = summary_of(capsys, "--model", scored, *QUICK, "--behaviours")
    assert {b["responses"] for b in s["behaviours"].values()} == {0} and len(s["behaviours"]) == 3


def test_gradient_study(scored, tmp_path, lenient):
    """At θ = θ* the importance weights are 1 and the two gradients are equal; further updates part them."""
    found = scoring.gradient_study(str(scored), str(tmp_path / "picture.png"), seeds=1, batches=3, updates=3)
    first, *others = found["distance"]
    assert first[2:] == pytest.approx([0, 1, 1, 1], abs=1e-6)
    assert all(kl > 0 and ess < 1 for _, _, kl, ess, _, _ in others)
    assert all(len(v) == 1 and v[0] > 0 for v in found["variance"].values())
    assert "cosine 1.000" in scoring.describe_gradients(found) and (tmp_path / "picture.png").stat().st_size > 10_000


def make_run(path, rewards, evaluations=(), **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"task": "sums", "output": str(path), "seed": 0, **config}))
    rows = [{"step": 0, "eval_accuracy": 0.1, "eval_response_tokens": 5.0}] if evaluations else []
    for step, reward in enumerate(rewards, 1):
        rows.append({"step": step, "reward": reward, "response_tokens": 10.0 * step, "loss": None})
        if step in evaluations:
            rows.append({"step": step, "eval_accuracy": reward, "eval_response_tokens": 5.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_curves(tmp_path, capsys, monkeypatch):
    """Seeds of a setting are drawn as mean and band, other runs as lines of another colour and style, named in a legend."""
    from matplotlib.figure import Figure

    runs = [
        make_run(tmp_path / "x", [0.2, 0.4, None, 0.8], {2, 4}, baseline="loo"),
        make_run(tmp_path / "y", [0.4, 0.6, 0.5, 1.0, 1.0], {2, 4}, baseline="loo", seed=1, versions={"torch": "9"}),
        make_run(tmp_path / "z", [0.1, 0.1], baseline="group"),
    ]
    with open(tmp_path / "z" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward": NaN, "response_tokens": Infinity}\n{"step": 4, "rew')  # it is going on
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    scoring.main(["--curves", *runs, "--output", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and "c.png" in capsys.readouterr().out
    reward, accuracy, length, _ = figures[0].axes
    lines = {line.get_label(): line for line in reward.lines}
    assert set(lines) == {"baseline loo: 2 seeds", "z"}
    seeds, single = lines["baseline loo: 2 seeds"], lines["z"]
    assert seeds.get_xdata().tolist() == [1, 2, 4] and single.get_xdata().tolist() == [1, 2]
    assert seeds.get_ydata().tolist() == pytest.approx([0.3, 0.5, 0.9])
    band = reward.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.2) and band[:, 1].max() == pytest.approx(1.0)
    assert seeds.get_color() != single.get_color() and seeds.get_linestyle() != single.get_linestyle()
    assert accuracy.lines[0].get_xdata().tolist() == [0, 2, 4] and length.lines[1].get_ydata().tolist() == [10, 20]
    assert {text.get_text() for text in figures[0].legends[0].texts} == set(lines)
    assert all(axis.get_ylabel() for axis in figures[0].axes) and length.get_xlabel() == "iteration"


BAD = {
    "": "choose one of --model, --compare, --curves, --gradients and --behaviours FILE",
    "--behaviours": "choose one of",
    "--model MODEL --compare A B": "choose one of",
    "--model MODEL": "--task None: choose sums",
    "--model MODEL --task chess": "--task chess: choose sums, gsm8k, math-hard",
    "--model EMPTY --task sums": "--model: cannot load",
    "--model BARE --task sums": "--model: cannot load",
    "--model NAN --task sums": "weights that are not finite",
    "--model MODEL --task sums --limit 0": "--limit 0: must be at least 1",
    "--model MODEL --task sums --limit -3": "--limit -3: must be at least 1",
    "--model MODEL --task sums --num-samples 0": "--num-samples 0: must be at least 1",
    "--model MODEL --task sums --batch-size 0": "--batch-size 0: must be at least 1",
    "--model MODEL --task sums --max-new-tokens 0": "--max-new-tokens 0: must be at least 1",
    "--model MODEL --task sums --max-new-tokens 57": "at most 56 fit",
    "--model MODEL --task sums --seed -1": "--seed -1: must be at least 0",
    "--model MODEL --task sums --temperature -1": "--temperature -1.0: must be at least 0",
    "--model MODEL --task sums --temperature nan": "--temperature nan: must be at least 0",
    "--model MODEL --task sums --temperature 0 --num-samples 4": "--num-samples 4: all would be the same",
    "--model MODEL --task sums --limit many": "--limit",
    "--model MODEL --task sums --split dev": "--split dev: choose test or train",
    "--model MODEL --task sums --prompt-template Q": "--prompt-template: must contain {question}",
    "--model MODEL --task sums --dtype float8": "--dtype float8: choose",
    "--model MODEL --task sums --device abacus": "--device abacus: cannot be used here",
    "--model MODEL --task sums --data DIR": "--data: the task sums makes its own problems",
    "--model MODEL --task gsm8k --data EMPTY": "--data: cannot load",
    "--model MODEL --task sums --output DIR": "cannot be written",
    "--model MODEL --task sums --output A/r.jsonl": "cannot be written",
    "--model MODEL --task sums --output NOTES": "is not a results file",
    "--model MODEL --task sums --output PROSE": "cannot be read",
    "--model MODEL --task sums --output A": "was written with --model a",
    "--model MODEL --task sums --seeds 1": "unrecognized arguments: --seeds 1",
    "--model EMPTY --task sums --output MISSING": "--model: cannot load",
    "--compare A": "--compare: takes two results files",
    "--compare A B C": "--compare: takes two results files",
    "--compare A MISSING": "cannot be read (",
    "--compare A NOTES": "is not a results file",
    "--compare A CUT": "holds 2 of 3 responses",
    "--compare A ODD": "is not a results file",
    "--compare A TWICE": "is not a results file",
    "--compare A OTHER": "the files are of different problems",
    "--compare A FEWER": "the files are of different problems",
    "--compare A B --limit 5": "--limit: does not go with --compare",
    "--compare A B --output DIR": "--output: does not go with --compare",
    "--behaviours CUT": "holds 2 of 3 responses",
    "--behaviours MISSING": "cannot be read (",
    "--behaviours A --task sums": "--task: does not go with --behaviours",
    "--curves EMPTY": "has no config.json",
    "--curves MISSING": "has no config.json",
    "--curves STARTED": "metrics.jsonl: cannot be read (",
    "--curves IDLE": "holds no metrics yet",
    "--curves RUN RUN": "names a run twice",
    "--curves RUN --json": "--json: does not go with --curves",
    "--curves RUN --output DIR": "cannot be written",
    "--curves RUN --output A": "cannot be written",
}


@pytest.mark.parametrize("words", BAD, ids=lambda words: words or "nothing")
def test_bad_input(words, scored, tmp_path, capsys):
    """What cannot work is refused in one line that says so, with exit code 2, and leaves every file as it was."""
    a = results(tmp_path / "a.jsonl", [1, 0, 1])
    whole = a.read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(whole[: whole.rindex(b"{") + 9])
    (tmp_path / "twice.jsonl").write_bytes(whole[: whole.rindex(b"{")] + whole.splitlines(True)[1])
    places = {name: tmp_path / name.lower() for name in ("DIR", "EMPTY", "BARE", "NAN", "MISSING", "STARTED", "IDLE")}
    places |= {"MODEL": scored, "A": a, "B": results(tmp_path / "b.jsonl", [1, 1, 1]), "CUT": tmp_path / "cut.jsonl"}
    places |= {"OTHER": results(tmp_path / "other.jsonl", [1, 0, 1], questions={"question": "another"})}
    places |= {"FEWER": results(tmp_path / "fewer.jsonl", [1, 0]), "C": a, "TWICE": tmp_path / "twice.jsonl"}
    places |= {"ODD": results(tmp_path / "odd.jsonl", [1, 0, 1], questions={"tokens": "five"})}
    places |= {"NOTES": tmp_path / "notes", "PROSE": tmp_path / "prose", "RUN": make_run(tmp_path / "run", [0.5])}
    for name in ("DIR", "EMPTY", "BARE", "IDLE", "STARTED"):
        places[name].mkdir()
    (places["DIR"] / "keep").touch()
    for file in Path(scored).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, places["BARE"])
    if "NAN" in words:
        policy = AutoModelForCausalLM.from_pretrained(scored)
        policy.model.norm.weight.data[0] = float("nan")
        policy.save_pretrained(places["NAN"])
        AutoTokenizer.from_pretrained(scored).save_pretrained(places["NAN"])
    for name in ("STARTED", "IDLE"):
        (places[name] / "config.json").write_text("{}")
    (places["IDLE"] / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    places["NOTES"].write_text('{"a": 1}\n{"b": 2}\n')
    places["PROSE"].write_text("Buy milk.\nThen rest.")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parts = [word.partition("/") for word in words.split()]
    command = [f"{places.get(first, first)}{slash}{rest}" for first, slash, rest in parts]
    command += ["--device", "cpu"] * ("--model" in words and "--device" not in words)
    capsys.readouterr()
    assert BAD[words] in refusal(capsys, *command)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", 1), ("--limit", 39), ("--num-samples", 2), ("--max-new-tokens", 9)]
)
def test_file_of_other_options_is_refused(scored, tmp_path, capsys, option, value):
    """A results file of another configuration is refused by the option that differs, and stays as it is."""
    words = ["--model", scored, *QUICK, "--output", tmp_path / "r.jsonl"]
    summary_of(capsys, *words)
    before = (tmp_path / "r.jsonl").read_bytes()
    assert option in refusal(capsys, *words, option, value)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_file_of_other_problems_is_refused(scored, tmp_path, capsys):
    """A results file whose questions are not those of the task's is refused, and stays as it is."""
    words = ["--model", scored, *QUICK, "--output", tmp_path / "r.jsonl"]
    summary_of(capsys, *words)
    text = (tmp_path / "r.jsonl").read_text()
    question = rows_in(tmp_path / "r.jsonl")[1][0]["question"]
    (tmp_path / "r.jsonl").write_text(text.replace(question, "0+0+0+1="))
    assert "written for other problems" in refusal(capsys, *words)
    assert (tmp_path / "r.jsonl").read_text() == text.replace(question, "0+0+0+1=")


def test_bad_input_of_the_program(tmp_path):
    """As a program, too, it ends with code 2 and one line; importing it runs nothing and leaves matplotlib alone."""
    end = subprocess.run(
        [sys.executable, str(HERE / "eval.py"), "--compare", "a"], capture_output=True, text=True, check=False
    )
    assert (end.returncode, end.stdout, end.stderr.count("\n")) == (2, "", 1)
    code = "import sys, eval; assert 'matplotlib' not in sys.modules and 'datasets' not in sys.modules"
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=HERE)
    assert (end.returncode, end.stdout, end.stderr) == (0, "", "")
