"""The second half of the lesson: each test states the claim that it proves, on policies small enough to enumerate, on
tiny real models, and on whole runs of the commands. `pytest -q` takes about five minutes on two cores and needs no network.
"""

import dataclasses
import doctest
import functools
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose more than they gain by a second thread

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
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
import make
import prompts_once
import svrg
import tables
import word_problems

# ---- Toy policies: every trajectory can be enumerated

EOS, V, T = 0, 3, 2  # three tokens, responses of at most two
TRAJECTORIES = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
PREFIXES = [(), (1,), (2,)]
RIGHT = torch.tensor([0.0, 1, 0, 0, 1, 0, 1], dtype=torch.float64)  # a 0/1 reward for each of the seven trajectories
MASK = torch.tensor([[1.0] * len(t) + [0.0] * (T - len(t)) for t in TRAJECTORIES], dtype=torch.float64)


def toy_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """(prefixes, V) logits, or one (V,) vector shared by all prefixes → (trajectories, T) log-probabilities."""
    table = logits.expand(len(PREFIXES), V).log_softmax(-1)
    zero = torch.zeros((), dtype=logits.dtype)
    rows = [[table[PREFIXES.index(t[:i]), t[i]] if i < len(t) else zero for i in range(T)] for t in TRAJECTORIES]
    return torch.stack([torch.stack(row) for row in rows])


def toy_logits(seed: int, shape=(3, V)) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def groups_of(logits: torch.Tensor, kind: str, group: int = 3):
    """Every group of `group` samples of the toy policy: its probability and its EMPG gradient with a baseline."""
    logprobs = toy_logprobs(logits)
    p = logprobs.sum(1).exp().detach()
    smoothed = 0.3 + 0.5 * RIGHT  # R̃ held fixed
    for rows in itertools.product(range(7), repeat=group):
        weights = ablations.baseline(smoothed[list(rows)][None], kind)[0]
        yield p[list(rows)].prod(), -gradient(empg.empg_loss(logprobs[list(rows)], MASK[list(rows)], weights), logits)


@pytest.mark.parametrize(("kind", "factor"), [("none", 1), ("loo", 1), ("group", 2 / 3), ("batch", 2 / 3)])
def test_expected_gradient_is_the_policy_gradient(kind, factor):
    """At θ = θ* the expected gradient of `empg_loss` is -∇ Σ_τ P(τ) R̃(τ) (Eq. 4 with Eq. 12), for a fixed R̃, by summing over
    all groups of three samples: exactly with leave-one-out, which has less than half of the variance; (G-1)/G of it with
    a mean that has τ in it."""
    logits = toy_logits(3)
    p = toy_logprobs(logits).sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    groups = list(groups_of(logits, kind))
    expected = sum(p * g for p, g in groups)
    true = gradient((p * (0.3 + 0.5 * RIGHT)).sum(), logits)
    torch.testing.assert_close(expected, factor * true, rtol=1e-10, atol=1e-12)
    if kind == "loo":
        loo, none = (sum(p * (g - expected).square().sum() for p, g in x) for x in (groups, groups_of(logits, "none")))
        assert loo < 0.5 * none


@pytest.mark.parametrize("shape", [(len(PREFIXES), V), (V,)])
def test_em_never_lowers_the_objective(shape):
    """An exact E-step (Eq. 8) and an M-step on `empg_loss` (Eq. 10) never lower log J(θ), and raise it at first."""
    logits = toy_logits(4, shape)
    history = []
    for _ in range(8):
        p = toy_logprobs(logits).sum(1).exp().detach()
        history.append((p * RIGHT).sum().log().item())
        q = p * RIGHT / (p * RIGHT).sum()
        for _ in range(60):
            step = gradient(empg.empg_loss(toy_logprobs(logits), MASK, 7 * q), logits)
            logits = (logits - step).detach().requires_grad_()
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(history))
    assert history[-1] > history[0] + 0.1


def test_missing_importance_weights_vanish_with_the_step():
    """Away from θ* the EMPG gradient is not the importance-weighted one; the gap shrinks in proportion to the distance."""
    gaps, p_old = [], toy_logprobs(toy_logits(5)).sum(1).exp().detach()
    for distance in (0.2, 0.1, 0.05, 0.0):
        logits = (toy_logits(5) + distance * toy_logits(6)).detach().requires_grad_()
        logprobs = toy_logprobs(logits)
        missing = (logprobs.sum(1).exp().detach() - p_old) * RIGHT
        gaps.append(gradient(empg.empg_loss(logprobs, MASK, 7 * missing), logits).norm().item())
    assert gaps[:3] == pytest.approx([4 * gaps[2], 2 * gaps[2], gaps[2]], rel=0.2) and gaps[0] > 0.01 and gaps[3] == 0


@pytest.mark.parametrize("right", [1, 8, 13, 15])
def test_mistake_standard_deviation_of_a_sample(right):
    """By the population's, on 0/1 rewards R̃ = u + s·R with s = sigmoid(√((1-p)/p)) - sigmoid(-√(p/(1-p))): 0.46 to 0.55."""
    p = right / 16
    rewards = torch.tensor([1.0] * right + [0.0] * (16 - right), dtype=torch.float64)
    smoothed = empg.smooth_rewards(rewards)
    s = 1 / (1 + math.exp(-math.sqrt((1 - p) / p))) - 1 / (1 + math.exp(math.sqrt(p / (1 - p))))
    assert 0.46 < s < 0.55
    torch.testing.assert_close(smoothed, smoothed[-1] + s * rewards, rtol=0, atol=1e-12)


def test_smoothing_keeps_order_strictly_between_0_and_1():
    """So also where the sigmoid itself rounds to 0 or 1, for any finite reward; equal rewards are exactly 0.5."""
    hard = ([3e38, -3e38, 1.0], [1e-45, 0.0, 0.0], [1, 0, 7], [1e30, 1e30 * (1 + 1e-6), 0.0])
    for rewards in (torch.randn(100), *map(torch.tensor, ([0.0] * 5000 + [1.0], [1.0] * 5000 + [0.0], *hard))):
        smoothed = empg.smooth_rewards(rewards)
        assert ((smoothed > 0) & (smoothed < 1)).all() and (smoothed[rewards.argsort()].diff() >= 0).all()
    assert all((empg.smooth_rewards(torch.full((37,), value)) == 0.5).all() for value in (0, 1, 0.1, -3e38))
    for rewards in ([], [1.0, math.nan], [math.inf, 0.0]):
        pytest.raises(ValueError, empg.smooth_rewards, torch.tensor(rewards))


def test_mistake_baseline_with_the_wrong_sign():
    """loo subtracts the mean of the prompt's other samples, group the prompt's mean, batch the mean of everything."""
    r = torch.rand(3, 4, dtype=torch.float64)
    others = torch.tensor([[[r[i, k] for k in range(4) if k != j] for j in range(4)] for i in range(3)]).mean(2)
    torch.testing.assert_close(empg.subtract_baseline(r), r - others)
    torch.testing.assert_close(ablations.baseline(r, "group"), r - r.mean(1, keepdim=True))
    torch.testing.assert_close(ablations.baseline(r, "batch"), r - r.mean())
    assert torch.equal(ablations.baseline(r, "none"), r) and torch.equal(
        ablations.baseline(r, "loo"), empg.subtract_baseline(r)
    )
    # Equal rewards have weight 0 to the last bit, whatever 0.6224593 summed seven times rounds to.
    equal = empg.smooth_rewards(torch.tensor([1.0] * 7 + [0, 0, 1, 0, 1, 1, 1] + [0.0] * 7)).view(3, 7)
    for weights in (empg.subtract_baseline(equal), ablations.baseline(equal, "group"), grpo.grpo_advantages(equal)):
        assert (weights[[0, 2]] == 0).all() and (weights[1] != 0).all()
    pytest.raises(ValueError, ablations.baseline, torch.rand(2, 2), "mean")
    for rewards in (torch.rand(4), torch.rand(4, 1)):
        pytest.raises(ValueError, empg.subtract_baseline, rewards)


def test_mistake_mean_over_padding():
    """-(1/N) Σ w Σ log π by hand: not a mean over tokens or columns, and nothing that stands on padding counts."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, math.nan, -math.inf]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert empg.empg_loss(logprobs, mask, torch.tensor([0.5, -1.0])).item() == pytest.approx(-(0.5 * -6 + -1 * -4) / 2)


def test_mistake_kl_of_the_wrong_direction():
    """kl_divergence is KL(π ‖ ref), by torch.distributions in value and gradient, and not KL(ref ‖ π)."""
    logits, ref = toy_logits(7, (3, 5)), toy_logits(8, (3, 5)).detach()
    kl = empg.kl_divergence(logits, ref)
    pi, reference = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref)
    expected = torch.distributions.kl_divergence(pi, reference)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(gradient(kl.sum(), logits), gradient(expected.sum(), logits))
    assert not torch.allclose(kl, torch.distributions.kl_divergence(reference, pi), rtol=0.01)


def test_k3_estimates_the_reverse_kl():
    """Its expectation under π is KL(π ‖ ref); as a plain loss its gradient is that of KL(ref ‖ π), as its docstring says."""
    logits, ref = toy_logits(7, (5,)), toy_logits(8, (5,)).detach().log_softmax(0)
    log_pi = logits.log_softmax(0)
    k3 = ema_pg.kl_k3(log_pi, ref)
    assert (k3 >= 0).all() and (ema_pg.kl_k3(ref, ref) == 0).all()
    assert (log_pi.exp() * k3).sum().item() == pytest.approx((log_pi.exp() * (log_pi - ref)).sum().item(), abs=1e-12)
    as_loss = gradient((log_pi.exp().detach() * k3).sum(), logits)
    torch.testing.assert_close(as_loss, gradient((ref.exp() * (ref - log_pi)).sum(), logits))


@pytest.mark.parametrize("k", [0, 1, 2, 4, 8])
def test_topk_kl_is_exact_in_value_and_gradient(k):
    """Enumerated over 8 tokens, kl_topk has on average the KL's value and gradient, at every k."""
    logits, ref = toy_logits(0, (8,)), toy_logits(9, (8,)).detach()
    pi = logits.softmax(-1)
    exact = (pi * (pi.log() - ref.log_softmax(-1))).sum()
    mean = (pi.detach() * ema_pg.kl_topk(logits.expand(8, 8), ref.expand(8, 8), torch.arange(8), k)).sum()
    torch.testing.assert_close(mean, exact)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [0, 1, 4, 11, 12])
def test_mistake_logarithm_of_the_tail_detached(k):
    """Enumerated over 12 tokens, the tail of released code has the right values, but its expected gradient lacks the one of
    the tail's probability: nothing at k = 0 and 12, more than half of the gradient at k = 1, on average over distributions."""
    one = torch.arange(12)
    shares = []
    for seed in range(20):
        logits, ref = toy_logits(seed, (12,)), toy_logits(100 + seed, (12,)).detach()
        pi = logits.softmax(-1)
        both = logits.expand(12, 12), ref.expand(12, 12)
        right, wrong = (f(*both, one, k) for f in (ema_pg.kl_topk, kl_estimators.kl_topk_detached))
        torch.testing.assert_close(right, wrong)
        exact, detached = (gradient((pi.detach() * value).sum(), logits) for value in (right, wrong))
        tail = gradient(pi.sum() - pi.topk(k).values.sum(), logits)
        lacking = tail if 0 < k < 12 else torch.zeros(12, dtype=torch.float64)
        torch.testing.assert_close(exact - detached, lacking, rtol=1e-9, atol=1e-12)
        shares.append((lacking.norm() / exact.norm()).item())
    assert np.mean(shares) == pytest.approx({0: 0, 1: 0.6, 4: 0.4, 11: 0.04, 12: 0}[k], abs=0.1)


@pytest.mark.parametrize("module", [empg, grpo, gradients, ablations, ema_pg, prompts_once])
def test_examples_in_docstrings(module):
    """What the docstrings show is what the functions return."""
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


# ---- Tiny real models: sampling and log-probabilities


def make_model(seed=0, vocab=18, scale=0.5, dtype=torch.float64, kind=Qwen2ForCausalLM, **config):
    """A two-layer Qwen2 with grouped-query attention, whose predictions are far from uniform; or another kind of model."""
    torch.manual_seed(seed)
    settings = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                "initializer_range": scale, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0} | config  # fmt: skip
    return kind(kind.config_class(**settings)).to(dtype).eval()


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10], [3, 3, 3, 3, 3, 3, 3, 4]]
RESPONSES = [[5, 6, 1], [1], [7, 7, 7, 7, 7, 7], [2, 9], [4, 1], [3, 4, 5, 6], [9], [1]]  # two for each prompt
WEIGHTS = torch.tensor([0.3, -0.2, 0.0, 0.0, 0.1, -0.5, 0.7, 0.2], dtype=torch.float64)
LIMITS = {"eos_token_id": 1, "pad_token_id": 0}
WINDOW = {"kind": MistralForCausalLM, "sliding_window": 3}
MODELS = {"rotary": {}, "window": WINDOW, "absolute": {"kind": GPT2LMHeadModel}}


flat = lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])
flat_grad = lambda model: torch.cat([p.grad.flatten() for p in model.parameters()])


def plain_logits(model, prompt, response) -> torch.Tensor:
    """With nothing clever: one sequence, all logits, those that predict the response."""
    return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]


def plain_logprobs(model, prompt, response, temperature=1.0) -> torch.Tensor:
    return (plain_logits(model, prompt, response) / temperature).log_softmax(-1)[range(len(response)), response]


def plain_loss(model, weights, temperature=1.0) -> torch.Tensor:
    """-(1/N) Σ w log P of RESPONSES, each read with its prompt, by itself."""
    terms = [plain_logprobs(model, PROMPTS[i // 2], r, temperature).sum() for i, r in enumerate(RESPONSES)]
    return -(weights * torch.stack(terms)).mean()


def same_gradient(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (one - two).norm().item() < 1e-6 * two.norm().item()  # norms of layers are computed in float32


@pytest.mark.parametrize("log_probs", [empg.log_probs, prompts_once.log_probs], ids=["one-pass", "prompts-once"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("chunk", "checkpointing"), [(1, False), (5, True), (256, False)])
def test_mistakes_temperature_forgotten_and_wrong_tensor_detached(log_probs, kind, chunk, checkpointing, monkeypatch):
    """log_probs equals the plain formula, values and gradients: prompts of unequal length, also read once for their
    responses, padding, chunks of logits, layers computed again and a temperature change nothing, for any parameter."""
    monkeypatch.setattr(empg, "LOGIT_ROWS", chunk)
    model = make_model(**MODELS[kind])
    plain_loss(model, WEIGHTS, 0.7).backward()
    expected = flat_grad(model)
    plain = [plain_logprobs(model, PROMPTS[i // 2], r, 0.7) for i, r in enumerate(RESPONSES)]
    model = empg.distribute(model, config(gradient_checkpointing=checkpointing)).double()
    model.zero_grad()
    values, mask = log_probs(model, PROMPTS, RESPONSES, 0.7)
    assert mask.sum(1).tolist() == [len(r) for r in RESPONSES] and (values[~mask] == 0).all()
    torch.testing.assert_close(values[mask].double(), torch.cat(plain), rtol=1e-6, atol=2e-6)
    empg.empg_loss(values, mask, WEIGHTS).backward()
    assert same_gradient(flat_grad(model), expected)


def test_logits_are_never_held_for_a_batch(monkeypatch):
    """The library gets no more rows of logits at a time than LOGIT_ROWS, and no tensor of log_probs has a vocabulary for
    more rows than that, or than there are responses, with a KL or not."""
    monkeypatch.setattr(empg, "LOGIT_ROWS", 8)
    model, reference = (make_model(seed, vocab=97, hidden_size=8).requires_grad_(not seed) for seed in (0, 1))
    seen, chunks = [], []
    spy(monkeypatch, "linear_cross_entropy", lambda _, how, __: chunks.append(how["options"].batch_chunk_size), empg.F)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, _, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (97,):
                seen.append(out.untyped_storage().nbytes() // (97 * out.element_size()))
            return out

    for more in ((), (reference,)):
        with Watch():
            sum(x.sum() for x in empg.log_probs(model, PROMPTS, RESPONSES, 1.0, *more)).backward()
    assert max(seen) == len(RESPONSES) == 8 < sum(map(len, RESPONSES)) and chunks == [8, 8]


def test_bfloat16_computation_stays_close_to_float32(monkeypatch):
    """Under autocast layers and logits compute in bfloat16. From the same hidden states, a log-probability is that of
    float32 logits but for its own rounding, which the mean does not show; its gradient is much the same; float32 weights
    get float32 gradients, and bfloat16 weights, as FSDP has them, do, too."""
    model, found, states = make_model(dtype=torch.float32), [], []
    spy(monkeypatch, "response_states", lambda _, __, result: states.append(result))
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values, mask = empg.log_probs(model, PROMPTS, RESPONSES)
        empg.empg_loss(values, mask, torch.ones(8)).backward()
        found.append(flat_grad(model))
        assert values.dtype == found[-1].dtype == torch.float32
    assert 0.99 < torch.cosine_similarity(*found, dim=0) < 1 - 1e-7

    hidden = states[1][0].detach().bfloat16().repeat(100, 1).requires_grad_()
    tokens = torch.randint(18, (len(hidden),), generator=torch.Generator().manual_seed(0))
    weight = model.get_output_embeddings().weight
    for w in (weight, weight.bfloat16()):
        exact = (hidden.float() @ w.bfloat16().float().T).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        expected = torch.autograd.grad(exact.sum(), hidden)[0].float()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = empg.token_logprobs(hidden, w, tokens)
        error = (rounded - exact).abs()
        assert rounded.dtype == torch.float32 and (error <= 2**-8 * exact.abs()).all() and error.max() > 1e-3
        assert (rounded - exact).mean().abs() < 1e-3 * exact.mean().abs()
        got = torch.autograd.grad(rounded.sum(), hidden)[0].float()
        assert (got - expected).norm() < 0.01 * expected.norm()
    other = make_model(seed=1, dtype=torch.float32).get_output_embeddings().weight
    with torch.autocast("cpu", torch.bfloat16):
        kl = empg.token_kls(hidden, weight, hidden, other)  # in float32 all the same
    torch.testing.assert_close(kl, empg.kl_divergence(hidden.float() @ weight.T, hidden.float() @ other.T))


def test_mistakes_labels_shifted_and_eos_left_out_of_the_loss():
    """The probabilities of all tokens after one prompt, EOS among them, sum to 1. They do not if each token has been seen
    when it is predicted, or if EOS does not count: then nobody would learn to stop."""
    values, mask = empg.log_probs(make_model(), [[3, 4]], [[token] for token in range(18)])
    assert mask.all() and values.exp().sum().item() == pytest.approx(1)


def test_mistakes_dropout_on_and_bfloat16_master_weights(tmp_path):
    """A model with dropout that is stored in bfloat16 learns in float32, in which updates of 1e-6 survive, and samples in
    --dtype, its rotary frequencies in float32; neither has dropout."""
    make_model(dtype=torch.bfloat16, attention_dropout=0.5).train().save_pretrained(tmp_path)
    make.character_tokenizer().save_pretrained(tmp_path)
    policy, frozen = empg.load_model(str(tmp_path))[1], empg.load_model(str(tmp_path), torch.bfloat16)[1]
    policy = empg.distribute(policy, config(dtype="bfloat16"))
    assert {p.dtype for p in policy.parameters()} == {torch.float32} == {b.dtype for b in frozen.buffers()}
    assert not any(module.training for model in (policy, frozen) for module in model.modules())
    for p in policy.parameters():
        p.data += 1
    empg.copy_weights(policy, frozen)
    assert torch.equal(flat(policy).bfloat16(), flat(frozen))


def test_sample_does_not_depend_on_its_company():
    """A trajectory is the same alone, in another order, with more samples, with padding, or with a higher limit."""
    model, seeds = make_model(scale=0.3), [11, 12, 13, 14]
    together = empg.sample(model, PROMPTS, 6, 20, seeds=seeds, **LIMITS)
    assert len({len(r) for r in together}) > 4
    for i, (prompt, seed) in enumerate(zip(PROMPTS, seeds)):
        for samples, limit in ((6, 20), (2, 20), (6, 4)):
            expected = [r[:limit] for r in together[6 * i : 6 * i + samples]]
            assert empg.sample(model, [prompt], samples, limit, seeds=[seed], **LIMITS) == expected
    backwards = empg.sample(model, PROMPTS[::-1], 6, 20, seeds=seeds[::-1], **LIMITS)
    assert [backwards[6 * i : 6 * i + 6] for i in (3, 2, 1, 0)] == [together[6 * i : 6 * i + 6] for i in range(4)]
    assert empg.sample(model, PROMPTS, 6, 20, seeds=[1, 2, 3, 4], **LIMITS) != together


@pytest.mark.parametrize("kind", MODELS)
def test_mistake_positions_missing_under_left_padding(kind):
    """Greedy responses to prompts of unequal length, which pad each other, are those that transformers' own generate gives
    each of them alone; 200 tokens are those of one plain pass."""
    model = make_model(max_position_embeddings=512, **MODELS[kind])
    for prompt, response in zip(PROMPTS, empg.sample(model, PROMPTS, 1, 12, temperature=0, **LIMITS)):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False)
        assert theirs[0, len(prompt) :].tolist() == response
    long = empg.sample(model, PROMPTS, 1, 200, temperature=0, eos_token_id=99, pad_token_id=0)
    assert all(plain_logits(model, p, r).argmax(-1).tolist() == r for p, r in zip(PROMPTS, long))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_frequencies_match_the_probabilities(temperature):
    """4,000 samples of the first two tokens are as frequent as the model says, within four standard deviations."""
    model, counts = make_model(vocab=6, scale=0.3), np.zeros((6, 6))
    how = {"temperature": temperature, "eos_token_id": 99, "pad_token_id": 0}
    for response in empg.sample(model, [[3, 4]], 4000, 2, seeds=[0], **how):
        counts[tuple(response)] += 1
    with torch.no_grad():
        terms = [plain_logprobs(model, [3, 4], [a, b], temperature).sum() for a in range(6) for b in range(6)]
    p = torch.stack(terms).exp().view(6, 6).numpy()
    assert p.max() > 5 * p.min() and (abs(counts - 4000 * p) < 4 * np.sqrt(4000 * p) + 3).all()
    # What has no probability is not drawn, either: by 0 and by the largest float below 1.
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf]).expand(2, 5)
    assert empg.draw_tokens(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0).tolist() == [1, 3]
    assert empg.draw_tokens(logits * math.nan, torch.tensor([0.0, 0.5]), 1.0).tolist() == [4, 4]


def test_a_response_ends_with_its_only_eos():
    """EOS, or any of several, stops a row and stays in it; other rows go on to the limit, and no step is in vain."""
    how = {"seeds": [0, 1, 2, 3], "eos_token_id": [1, 5], "pad_token_id": 0}
    responses = empg.sample(make_model(scale=0.2), PROMPTS, 50, 15, **how)
    assert all(not {1, 5} & set(r[:-1]) for r in responses)
    assert all(r[-1] in (1, 5) or len(r) == 15 for r in responses) and {r[-1] for r in responses} > {1, 5}
    model, rows = make_model(scale=0.3), []
    watch = lambda _, args, kwargs: rows.append(len(kwargs["input_ids"]))
    model.model.register_forward_pre_hook(watch, with_kwargs=True)
    responses = empg.sample(model, PROMPTS[:1], 12, 50, seeds=[5], **LIMITS)
    assert len(rows) == max(map(len, responses)) < 50 and rows[:2] == [1, 12]  # the prompt is read once
    assert sum(rows[1:]) < 0.9 * 12 * len(rows[1:])  # rows that are done leave


def test_sample_and_log_probs_refuse_bad_input():
    """No prompts, an empty prompt, missing seeds, an empty response or responses that do not divide are errors."""
    for prompts, seeds in (([], []), ([[3], []], [0, 1]), ([[3]], None), ([[3]], [0, 1])):
        pytest.raises(ValueError, empg.sample, make_model(), prompts, 2, 3, seeds=seeds, **LIMITS)
    for prompts, responses in (([], []), ([[3]], [[]]), ([[3]], []), ([[4], [5]], [[4]]), ([[], [4]], [[4], [5]])):
        pytest.raises(ValueError, empg.log_probs, make_model(), prompts, responses)


SMALL = {"vocab_size": 18, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "initializer_range": 0.5,
         "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
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
}
REFUSED_KINDS = {
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"lru_width": 16, "attention_window_size": 8},
    "jamba": {"num_experts": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "qwen3_next": {"num_experts": 0, "linear_num_value_heads": 2, "linear_num_key_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def save_kind(kind, settings, path) -> str:
    torch.manual_seed(0)
    left_out = {"bloom": "max_position_embeddings", "mpt": "max_position_embeddings", "falcon": "head_dim"}.get(kind)
    settings = {name: value for name, value in (SMALL | settings).items() if name != left_out}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(path)
    make.character_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", RIGHT_KINDS)
def test_families_of_models_that_are_right(kind, tmp_path):
    """Sampled token by token and read in one pass, responses are those of plain passes, in values and gradients."""
    name = save_kind(kind, RIGHT_KINDS[kind], tmp_path)
    tokenizer, model = empg.load_model(name, torch.float32)
    empg.check_model(name, tokenizer)
    for prompt, response in zip(
        PROMPTS, empg.sample(model, PROMPTS, 1, 20, temperature=0, **LIMITS | {"eos_token_id": 99})
    ):
        assert plain_logits(model, prompt, response).argmax(-1).tolist() == response
    plain_loss(model, WEIGHTS).backward()
    expected = flat_grad(model)
    model.zero_grad()
    empg.empg_loss(*empg.log_probs(model, PROMPTS, RESPONSES), WEIGHTS).backward()
    assert (flat_grad(model) - expected).norm() < 1e-4 * expected.norm()
    problems = [{"prompt": [1, 2, 3]}]
    assert empg.room_for_responses(problems, model) == (math.inf if kind in ("bloom", "mpt") else 61)


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_families_of_models_that_are_refused(kind, tmp_path, capfd):
    """Logits that are capped or scaled, and recurrent layers, end in one line before any work."""
    name = save_kind(kind, REFUSED_KINDS[kind], tmp_path / "model")
    refuses(capfd, empg.main, options(name, tmp_path / "out"), f"--model {name}", "models of its kind")
    assert not (tmp_path / "out").exists()


def test_long_rope_is_not_crossed():
    """Phi-3's long rope reads a text in another way once it is longer than the model was first trained on."""
    long = [1.0, 2.0]
    rope = {"rope_type": "longrope", "short_factor": long, "long_factor": long, "rope_theta": 1e4,
            "original_max_position_embeddings": 32}  # fmt: skip
    config = AutoConfig.for_model("phi3", **SMALL | {"rope_parameters": rope, "original_max_position_embeddings": 32})
    assert empg.room_for_responses([{"prompt": [1, 2]}], AutoModelForCausalLM.from_config(config)) == 30


# ---- The update


def rows_with(weights) -> list[dict]:
    """The trajectories of PROMPTS and RESPONSES with these weights."""
    pairs = enumerate(zip(RESPONSES, weights.tolist(), strict=True))
    return [{"prompt": PROMPTS[i // 2], "response": response, "weight": weight} for i, (response, weight) in pairs]


def config(**options) -> empg.Config:
    return empg.Config(**{"num_samples": 2, "max_grad_norm": 1e9, "device": "cpu", "dtype": "float32"} | options)


def update(model, weights=WEIGHTS, reference=None, **options):
    """The gradient that an update takes, and its statistics; the learning rate 0 leaves the model as it was."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), [None]
    optimizer.zero_grad()
    optimizer.register_step_pre_hook(lambda *_: found.append(flat_grad(model)))
    return found, empg.update(model, optimizer, rows_with(weights), config(**options), reference)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_update_has_the_gradient_of_the_whole_batch(budget, once, monkeypatch):
    """Neither micro-batches, of trajectories or of prompts with all their responses, nor skipping weight 0 change the
    gradient of Eq. 12."""
    if once:
        monkeypatch.setattr(empg, "response_states", prompts_once.response_states)
        monkeypatch.setattr(empg, "micro_batches", prompts_once.micro_batches)
    model = make_model()
    loss = plain_loss(model, WEIGHTS)
    loss.backward()
    expected = flat_grad(model)
    (_, got), stats = update(model, micro_batch_tokens=budget)
    assert same_gradient(got, expected) and stats["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-6)
    surprise = [-plain_logprobs(model, PROMPTS[i // 2], RESPONSES[i]) for i in (0, 1, 4, 5, 6, 7)]
    assert stats["entropy"] == pytest.approx(torch.cat(surprise).mean().item(), rel=1e-6)


@pytest.mark.parametrize("split", [empg.micro_batches, prompts_once.micro_batches])
def test_micro_batches_hold_every_trajectory_once_within_the_limit(split):
    """Of random lengths every trajectory is in one micro-batch; each is within the limit or has one trajectory; and sorting
    by length needs fewer padded tokens than passes of as many rows as the longest row allows."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": [i // 8] * (40 + 9 * (i // 8)), "response": [0] * int(rng.integers(1, 200))} for i in range(64)]
    batches = split(rows, 1000)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    length = lambda row: len(row["prompt"]) + len(row["response"])
    padded = [len(batch) * max(map(length, batch)) for batch in batches]
    if split is empg.micro_batches:
        assert all(tokens <= 1000 or len(batch) == 1 for tokens, batch in zip(padded, batches))
        assert sum(padded) < 0.8 * 64 * max(map(length, rows))
        assert [max(map(length, batch)) for batch in batches] == sorted(max(map(length, b)) for b in batches)[::-1]
    assert split([{"prompt": [1] * 9, "response": [1]}], 1) == [[{"prompt": [1] * 9, "response": [1]}]]


def test_what_has_no_gradient_is_not_computed(monkeypatch):
    """The forward pass sees only trajectories that carry weight, each once; without any, nothing changes."""
    seen, model = [], make_model()
    spy(monkeypatch, "log_probs", lambda args, *_: seen.extend(args[2]))
    update(model)
    assert sorted(seen) == sorted(RESPONSES[i] for i in (0, 1, 4, 5, 6, 7))
    before, optimizer = flat(model), torch.optim.AdamW(model.parameters(), lr=1.0)
    stats = empg.update(model, optimizer, rows_with(0 * WEIGHTS), config())
    assert len(seen) == 6 and stats["loss"] == stats["grad_norm"] == 0 and not optimizer.state
    assert math.isnan(stats["entropy"])  # not 0, which would look like a collapse
    for bad in (math.nan, math.inf):  # nor does a gradient that is not finite, which is counted
        stats = empg.update(model, optimizer, rows_with(bad * WEIGHTS.abs()), config())
        assert stats["skipped_updates"] == 1 and not math.isfinite(stats["grad_norm"]) and not optimizer.state
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("kind", ["exact", "k3", "topk"])
def test_kl_term_has_its_gradient(kind, monkeypatch):
    """With β the gradient is that of the loss plus β times the summed KL of every trajectory, also those of weight 0; so it
    is with the estimators of ema_pg.py."""
    monkeypatch.setattr(empg, "LOGIT_ROWS", 8)
    monkeypatch.setattr(empg, "log_probs", empg.log_probs)
    ema_pg.replace(kind, k=3)
    model, reference, kl = make_model(), make_model(seed=1).requires_grad_(False), 0.0
    for i, r in enumerate(RESPONSES):
        both = [plain_logits(m, PROMPTS[i // 2], r) / 0.7 for m in (model, reference)]
        log_pi, log_ref = (x.log_softmax(-1) for x in both)
        if kind == "exact":
            kl += (log_pi.exp() * (log_pi - log_ref)).sum()
        elif kind == "k3":
            kl += ema_pg.kl_k3(log_pi[range(len(r)), r], log_ref[range(len(r)), r]).sum()
        else:
            kl += ema_pg.kl_topk(*both, torch.tensor(r), 3).sum()
    (plain_loss(model, WEIGHTS, 0.7) + 0.3 * kl / 8).backward()
    expected = flat_grad(model)
    (_, got), stats = update(model, reference=reference, beta=0.3, temperature=0.7, micro_batch_tokens=40)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # of the KL the logits are float32
    assert stats["kl"] == pytest.approx(kl.item() / sum(map(len, RESPONSES)), rel=1e-5)


# ---- Tasks: problems, prompts and grading

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}{{ '<|bot|>' if add_generation_prompt }}"


def test_chat_templates_and_the_tokens_that_stop():
    """The prompt follows the chat template or is plain, and braces in it are safe; EOS, the generation config's and the
    token with which the template closes an answer, as a base model often does, all end a response."""
    tokenizer, model = make.character_tokenizer(), make_model()
    task, problems = dataclasses.replace(empg.TASKS["sums"], prompt="{question}#{"), [{"question": "3+8="}]
    empg.add_prompts(problems, task, tokenizer)
    assert empg.room_for_responses(problems, model) == 64 - 6 and empg.stop_tokens(tokenizer, model) == [1]
    assert tokenizer.decode(problems[0]["prompt"]) == "3+8=#<unk>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<|user|>", "<|bot|>"]})
    tokenizer.chat_template = CHAT
    model.generation_config.eos_token_id = [1, 7]
    assert empg.stop_tokens(tokenizer, model) == [1, 7, tokenizer.convert_tokens_to_ids("<end>")]
    empg.add_prompts(problems, task, tokenizer)
    assert tokenizer.decode(problems[0]["prompt"]) == "<|user|>3+8=#<unk><end><|bot|>"


GSM8K, MATH = empg.TASKS["gsm8k"], empg.TASKS["math-hard"]
# gold :: right | right :: wrong | wrong
BOXES = {
    "gsm8k": r"""
18 :: 18 | \$18 | $18 | 18.00 | 18. | 18\% | 18 \text{ dollars} | 18\text{ km/h} | x = 18 | 3 \times 6 | 36/2 :: 1.8 | -18 | x
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
            gold, right, wrong = (part.strip().split(" | ") for part in line.split("::"))
            for text in right + wrong:
                for answer in (gold[0], f"2 + 2 = <<2+2=4>>4\n#### {gold[0]}", rf"We find $\boxed{{{gold[0]}}}$."):
                    response = rf"Let $x = \boxed{{77}}$. So it is $\boxed{{{text}}}$."
                    assert empg.TASKS[name].reward(response, answer) == (text in right), (name, gold, text)


TEXTS = r"""
#### 72 :: 72 | #### $1,200.00 :: 1,200 | #### 5 and then 7 8 :: 5 | **$18** :: 18 | A: 1,200 :: 1200 | 10-3 :: 3
The answer is: 18. :: 18 | The answer is 18. Let me double check: 3*6=18 and 2+2=4 :: 18 | no idea :: None
The final answer is $18.50. :: 18.5 | So the answer is 144 - 24 = 120. :: 120 | The answer is 5. Wait. The answer is 18. :: 18
\boxed{5}. No: \boxed{18}, I hope. 7 :: 18
"""


def test_where_the_answer_of_a_response_is():
    """The last box, else the first number after the last "####" or "answer is", else the last number; MATH needs a box."""
    for response, gold in (case.split(" :: ") for case in re.split(r"\n| \| ", TEXTS.strip())):
        assert GSM8K.reward(response, gold) == (gold != "None") and MATH.reward(response, gold) == ("boxed" in response)
        assert (empg.final_answer(response) is None) == (gold == "None"), response
    assert not any(MATH.reward(text, "5") for text in ("", "5", r"\boxed{}", r"\boxed{5", r"\boxed", r"\boxed{ }"))
    assert empg.last_boxed(r"so \boxed{\frac{1}{\sqrt{2}}}, as") == r"\frac{1}{\sqrt{2}}"


@pytest.mark.skipif(not SHARED.exists(), reason="real data sets are not beside the project")
@pytest.mark.parametrize(("name", "task"), [("gsm8k", GSM8K), ("math_hard", MATH)])
def test_gold_answers(name, task):
    """Every gold answer scores 1, boxed, of GSM8K also unboxed; a neighbour's does not, unless they are equal."""
    rows = read_rows(SHARED / name / "test.jsonl")
    answers = [row.get("answer") or row["solution"] for row in rows]
    golds = [empg.last_boxed(answer) or answer.rpartition("####")[2].strip() for answer in answers]
    for answer, gold, other in zip(answers, golds, golds[1:] + golds[:1]):
        for form in (r"so $\boxed{%s}$.", r"\boxed{%s.}", *(("#### %s", "So: %s.") if task is GSM8K else ())):
            assert task.reward(form % gold, answer) == 1, form % gold
        assert task.reward(rf"\boxed{{{other}}}", answer) == (gold.replace(",", "") == other.replace(",", ""))


STRANGE = [*"\\²½{}$%^_=٣", r"9^{9^{9}}", r"\sum_{k=1}^{10^9}k^{99}", "}{", "1/0", "1e999", r"\frac{", r"\text{", "\0"]
STRANGE += ["\ud800", " ", r"\text{" * 40 + "}" * 40, "(" * 100]
STRANGE += [text * (20_000 // len(text)) for text in (r"\frac{", r"\boxed{", "1,", "9", r"\text{or 1} ")]


def test_grading_never_raises_or_hangs():
    """Whatever a model writes, grading returns, after 2 s at most for each of its parts, and nothing odd is right."""
    for text in STRANGE:
        for response in (rf"\boxed{{{text}}}", rf"\boxed{{{text}", f"the answer is {text}"):
            assert GSM8K.reward(response, "18") == MATH.reward(response, "18") == 0


# ---- Whole runs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a random model for the task sums, stored in bfloat16 as hub models are."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(scale=0.1, dtype=torch.bfloat16).save_pretrained(path)
    make.character_tokenizer().save_pretrained(path)
    return str(path)


def options(model, output, /, *flags, **changes) -> list[str]:
    values = {"model": model, "task": "sums", "output": output, "steps": 2, "prompts_per_step": 4, "num_samples": 4,
              "max_new_tokens": 8, "lr": 1e-3, "eval_every": 1, "eval_problems": 6, "device": "cpu"} | changes  # fmt: skip
    return [*(f"--{name}={value}" for name, value in values.items()), *flags]


load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)


def metrics(output) -> list[dict]:
    """The rows of a run, but for the seconds."""
    rows = read_rows(Path(output) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "second" not in k and v is not None} for row in rows]


def change(monkeypatch, name="sums", **fields):
    monkeypatch.setitem(empg.TASKS, name, dataclasses.replace(empg.TASKS[name], **fields))


def spy(monkeypatch, name, note, module=empg):
    """Tell `note` the arguments of a function, and its result, at every call."""
    original = getattr(module, name)
    watched = lambda *args, **how: (result := original(*args, **how), note(args, how, result))[0]
    monkeypatch.setattr(module, name, watched)


@pytest.fixture
def odd_is_right(monkeypatch):
    """A reward with signal for a random model: responses of an odd number of characters."""
    change(monkeypatch, reward=lambda response, answer: float(len(response) % 2))


def test_a_run_leaves_what_it_promises(tiny, tmp_path, odd_is_right, monkeypatch, capsys):
    """metrics.jsonl has every key, config.json every option, wandb every row; the saved model gives the same greedy text."""
    logged, rewards = [], []
    spy(monkeypatch, "sample_trajectories", lambda _, how, rows: rewards.append([row["reward"] for row in rows]))
    wandb = types.SimpleNamespace(run=None, log=logged.append)
    wandb.init = lambda **how: setattr(wandb, "run", how)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    empg.main(options(tiny, tmp_path, "--wandb", steps=3, eval_every=2))
    keys = "step reward response_tokens loss grad_norm kl entropy sample_seconds update_seconds step_seconds"
    keys = {*keys.split(), "tokens_per_second", "no_signal", "cut", "skipped_updates"}
    steps = [row for row in logged if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and all(keys == set(row) for row in steps)
    assert [row["step"] for row in logged if "eval_accuracy" in row] == [0, 2, 3]
    assert read_rows(tmp_path / "metrics.jsonl") == logged
    batches = [np.reshape(batch, (4, 4)) for batch in rewards if len(batch) == 16]
    assert [row["no_signal"] for row in steps] == [np.mean(batch.std(1) == 0) for batch in batches]
    assert f"no_signal {steps[0]['no_signal']:.3f}" in capsys.readouterr().out
    assert steps[0]["kl"] is None and 0 < steps[0]["entropy"] < 4 and 0 < steps[0]["cut"] < 1
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(empg.Config)} == set(saved) and saved["seed"] == 0
    model, tokenizer = load(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    prompts = tokenizer(["3+8+5+2=", "1+1+1+1="])["input_ids"]
    generated = model.generate(torch.tensor(prompts), max_new_tokens=8, do_sample=False)[:, len(prompts[0]) :]
    sampled = empg.sample(model, prompts, 1, 8, temperature=0, **LIMITS)
    assert tokenizer.batch_decode(generated, True) == tokenizer.batch_decode(sampled, True)
    assert not torch.equal(flat(model), flat(load(tiny)))


def test_mistake_seed_without_iteration(tiny, tmp_path, odd_is_right, monkeypatch):
    """Each iteration, prompt and seed draws anew, problems without repetition in a pass; one seed gives one run, however
    many responses are sampled at a time."""
    used, drawn = [], []
    spy(monkeypatch, "sample", lambda args, how, _: used.extend(how["seeds"] if how["temperature"] else []))
    spy(monkeypatch, "sample_trajectories", lambda args, *_: drawn.extend(p["question"] for p in args[3]))
    problems = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
    change(monkeypatch, problems=lambda _, split: [dict(p) for p in problems] if split == "train" else [])
    for name, more in (("a", {}), ("b", {"sample_batch": 5}), ("c", {"seed": 1})):
        empg.main(options(tiny, tmp_path / name, eval_every=0, steps=4, **more))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert used[:16] == used[16:32] and len(set(used)) == len(used[16:]) == 32
    assert len(set(drawn[:8])) == len(set(drawn[8:16])) == 8 and drawn[:8] != drawn[8:16]
    assert drawn[:16] == drawn[16:32] != drawn[32:]


def test_mistakes_old_policy_not_refreshed_or_refreshed_too_often(tiny, tmp_path, odd_is_right, monkeypatch):
    """θ* ← θ at every iteration: whenever trajectories are drawn, the frozen copy has the trained policy's weights. It keeps
    them through all --updates on one buffer, while θ moves on."""
    policies, frozen, apart, moved = [], [], [], []
    spy(monkeypatch, "distribute", lambda args, how, policy: policies.append(policy))

    def drawn(args, *_):
        frozen[:] = [args[0], flat(args[0])]
        apart.append((flat(args[0]) - flat(policies[0])).abs().max().item())

    def updated(args, *_):
        assert torch.equal(flat(frozen[0]), frozen[1])
        moved.append((flat(args[0]) - frozen[1]).norm().item())

    spy(monkeypatch, "sample_trajectories", drawn)
    spy(monkeypatch, "update", updated)
    empg.main(options(tiny, tmp_path, steps=5, eval_every=2, updates=3))
    assert len(apart) == 9 and max(apart) == 0 and (flat(policies[0]) - flat(load(tiny))).abs().max() > 1e-3
    assert len(moved) == 15 and all(0 < one < two < three for one, two, three in np.reshape(moved, (5, 3)))


def test_the_reference_stays_or_follows(tiny, tmp_path, odd_is_right, monkeypatch):
    """It is there with β only, and stays; with ema_pg.py it follows θ_ref ← decay · θ_ref + (1 - decay) · θ, and a run that is
    stopped and resumed ends as one that is not."""
    placed, thetas, one_update = [], [], empg.update
    spy(monkeypatch, "distribute", lambda args, how, model: placed.append(model))
    for decay in (1.0, 0.7):
        monkeypatch.setattr(empg, "update", one_update)
        ema_pg.replace("exact", decay=decay, every=2)
        placed.clear(), thetas.clear()
        spy(monkeypatch, "update", lambda args, *_: thetas.append(flat(args[0])))
        more = {"lr": 0.01, "eval_every": 0, "beta": 0.1}
        empg.main(options(tiny, tmp_path / str(decay), steps=5, **more))
        expected = flat(load(tiny))
        for theta in (thetas[1], thetas[3]):
            expected = decay * expected + (1 - decay) * theta
        kl = [row["kl"] for row in metrics(tmp_path / str(decay))]
        assert kl[0] == pytest.approx(0, abs=1e-6) and max(kl) > 1e-5 and len(placed) == 2
        torch.testing.assert_close(flat(placed[0]), expected)  # the reference; after it the policy
        for steps in (3, 5):
            empg.main(options(tiny, tmp_path / f"{decay}-parts", "--resume", steps=steps, **more))
        same_run(tmp_path / str(decay), tmp_path / f"{decay}-parts")


def write_rows(path: Path, **splits) -> Path:
    path.mkdir()
    for split, rows in splits.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mistake_held_out_problems_in_training(tiny, tmp_path, monkeypatch):
    """A question that stands in both splits is not trained on, however few problems the evaluation uses."""
    seen = []
    monkeypatch.setattr(empg, "train", lambda *args: seen.extend(args[5:7]))
    row = lambda i: {"question": f"{i}+{i}=", "answer": 2 * i}  # numbers will do for answers
    copies = [{"question": " 3+3=\n", "answer": "6"}, {"question": "5+5= ", "answer": "10"}]
    data = write_rows(tmp_path / "data", train=[*map(row, range(8)), *copies], test=[row(i) for i in (1, 3, 5, 9)])
    change(monkeypatch, "gsm8k", prompt="{question}")
    for more in ({"eval_problems": 1}, {"eval_every": 0}):  # nor if nothing is evaluated now
        seen.clear()
        empg.main(options(tiny, tmp_path / f"run{len(more)}{more}", task="gsm8k", data=data, **more))
        assert [p["question"] for p in seen[0]] == [f"{i}+{i}=" for i in (0, 2, 4, 6, 7)]
        assert len(seen[1]) == ("eval_problems" in more) and GSM8K.reward("so 14", seen[0][-1]["answer"]) == 1
    sums = {split: {row["question"] for row in empg.sums_problems(None, split)} for split in ("train", "test")}
    assert len(sums["train"]) == 9500 and len(sums["test"]) == 500 and not sums["train"] & sums["test"]


# ---- Many processes

# What a run sees and does: its trajectories, and the gradients of its updates. Prompts are of unequal length, and few have
# signal, so that the processes differ in work.
CHILD = f"""
import dataclasses, gc, os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, empg
from torch.optim.optimizer import register_optimizer_step_pre_hook
seen = {{"trajectories": [], "gradients": []}}
def sample_trajectories(*args, sample_trajectories=empg.sample_trajectories, **options):
    rows = sample_trajectories(*args, **options)
    seen["trajectories"].append([(row["prompt"], row["response"]) for row in rows])
    return rows
empg.sample_trajectories = sample_trajectories
problems = [{{"question": "0+" * (i % 4) + f"{{i}}=", "answer": str(i % 4)}} for i in range(100, 150)]
reward = lambda response, answer: float(len(response) % 2) if int(answer) < 2 else 0.0
change = {{"reward": reward, "problems": lambda data, split: problems[:6] if split == "test" else problems[6:]}}
empg.TASKS["sums"] = dataclasses.replace(empg.TASKS["sums"], **change)
def hook(optimizer, args, kwargs):
    grads = [p.new_zeros(()) if p.grad is None else p.grad for group in optimizer.param_groups for p in group["params"]]
    held = [optimizer.param_groups[0]["params"], grads, *(s.values() for s in optimizer.state.values())]
    seen["held"] = sum(getattr(t, "_local_tensor", t).numel() for tensors in held for t in tensors if t.ndim)
    seen["gradients"].append(torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in grads]))
register_optimizer_step_pre_hook(hook)
def destroy(destroy=empg.dist.destroy_process_group):  # DDP that outlives its process group can hang
    assert not any(type(thing).__name__ == "DistributedDataParallel" for thing in gc.get_objects())
    destroy()
empg.dist.destroy_process_group = destroy
"""
SAVE = 'empg.main(sys.argv[2:])\ntorch.save(seen, sys.argv[1] + "." + os.environ.get("RANK", "0"))\n'
WATCH = [sys.executable, "-c", CHILD + SAVE]


def run(command: list, **env) -> subprocess.CompletedProcess:
    """A command in a process of its own, which has to succeed."""
    how = {"capture_output": True, "text": True, "timeout": 200, "env": os.environ | env, "cwd": HERE}
    done = subprocess.run([str(word) for word in command], check=False, **how)
    assert done.returncode == 0, done.stderr
    return done


def run_ranks(processes: int, command: list) -> None:
    """As torchrun does it, but for watching over them, which takes seconds to start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with ThreadPoolExecutor(processes) as threads:
        list(threads.map(lambda rank: run(command, **env, **rank), ranks))


KL = {"beta": 0.1, "updates": 2}
SHARD = ["--shard", "--gradient-checkpointing"]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Runs in one process, without and with a KL: their options, what they see and what they record."""
    kinds = {
        kind: {"num_samples": 6, "micro_batch_tokens": 60, "steps": 3, "prompts_per_step": 5}
        for kind in ("plain", "kl")
    }
    kinds["kl"] |= KL
    path = tmp_path_factory.mktemp("alone")
    words = [[*WATCH, path / kind, *options(tiny, path / f"run-{kind}", **kinds[kind])] for kind in kinds]
    with ThreadPoolExecutor() as threads:
        list(threads.map(run, words))
    return {kind: (kinds[kind], torch.load(path / f"{kind}.0"), metrics(path / f"run-{kind}")) for kind in kinds}


def same_metrics(one: list[dict], two: list[dict]) -> None:
    """Equal up to rounding."""
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("n,kind,flags", [(2, "plain", []), (4, "kl", []), (2, "kl", SHARD), (4, "plain", SHARD)])
def test_mistakes_statistics_per_rank_and_mean_over_ranks(alone, n, kind, flags, tiny, tmp_path):
    """1, 2 and 4 processes, whole or sharded: the same trajectories, gradients within 1e-5, the same metrics."""
    changes, single, rows = alone[kind]
    run_ranks(n, [*WATCH, tmp_path / "seen", *options(tiny, tmp_path / "run", *flags, **changes)])
    ranks = [torch.load(tmp_path / f"seen.{rank}") for rank in range(n)]
    for rank in ranks:  # weights, gradients and Adam's averages are split, but for what does not divide evenly
        assert rank["held"] <= (1.1 * single["held"] / n if flags else single["held"])
        assert (
            rank["trajectories"] == single["trajectories"] and len(rank["gradients"]) == len(single["gradients"]) >= 3
        )
        assert all(map(torch.equal, rank["gradients"], ranks[0]["gradients"]))
        for ours, theirs in zip(rank["gradients"], single["gradients"], strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    same_metrics(rows, metrics(tmp_path / "run"))


# ---- Checkpoints and kills: real signals to real processes


def same_run(one: Path, two: Path) -> None:
    """Equal to the last bit: what was recorded, but for the seconds, and the weights."""
    assert metrics(one) == metrics(two) and torch.equal(*(flat(load(path / "model")) for path in (one, two)))


def test_mistake_adams_averages_not_in_the_checkpoint(tiny, tmp_path, odd_is_right):
    """Stopped and resumed, before its first checkpoint, behind one or after its end, with a moving reference: the same."""
    empg.main(options(tiny, tmp_path / "whole", steps=6, **KL))
    for steps in (4, 6, 6):
        empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps, save_every=3, **KL))
        assert [path.name for path in (tmp_path / "parts").glob("check*")] == [f"checkpoint-{steps:06d}"]
    same_run(tmp_path / "whole", tmp_path / "parts")


KILLS = int(os.environ.get("EMPG_KILLS", "2"))


def test_no_kill_loses_more_than_the_work_since_the_last_checkpoint(tiny, tmp_path):
    """SIGKILL at random moments, in the middle of writing too: the newest checkpoint is whole, and the end is the same."""
    saved, more = 0, {"steps": 6 * KILLS, "save_every": 1}
    words = [str(word) for word in (*WATCH, tmp_path / "seen", *options(tiny, tmp_path / "run", "--resume", **more))]
    for _ in range(KILLS):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        text = "".join(itertools.takewhile(lambda line: " reward " not in line, process.stdout))
        assert saved == 0 or f"Resuming after iteration {saved}\n" in text
        time.sleep(np.random.default_rng().uniform(0, 0.5))
        process.kill()
        process.wait()
        saved = max([saved, *(int(path.name[-6:]) for path in (tmp_path / "run").glob("checkpoint-*"))])
    with ThreadPoolExecutor() as threads:
        list(threads.map(run, [words, [*WATCH, tmp_path / "seen", *options(tiny, tmp_path / "undisturbed", **more)]]))
    same_run(tmp_path / "undisturbed", tmp_path / "run")


KILLED = f"""{CHILD}
import pathlib, signal
save, flag = empg.dcp.save, pathlib.Path(sys.argv[1])
def killed(state, **how):
    if state["step"] == 2 and empg.RANK == 1 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, **how)
empg.dcp.save = killed
empg.main(sys.argv[2:])
"""


def test_torchrun_restarts_after_the_kill_of_a_rank(alone, tiny, tmp_path):
    """torchrun --max-restarts with a rank of a sharded run that SIGKILL ends while it writes ends as one process does."""
    (tmp_path / "child.py").write_text(KILLED)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    args = options(tiny, tmp_path / "run", "--resume", "--shard", **alone["plain"][0], save_every=1)
    done = run([*words, tmp_path / "child.py", tmp_path / "killed", *args])
    assert (tmp_path / "killed").exists() and "Resuming after iteration 1" in done.stdout
    same_metrics(alone["plain"][2], metrics(tmp_path / "run"))


# ---- Bad input gets one clear line, exit code 2, before any long work


def refuses(capfd, main, argv, *words) -> None:
    """`main` ends with exit code 2 and one line on standard error that has all the words, and nothing but progress before."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    error = capfd.readouterr().err
    *_, line = error.splitlines()
    assert stop.value.code == 2 and error.count("error: ") == 1 and line.startswith("error: "), error
    assert "Traceback" not in error and all(word in line for word in words), line


BAD = """
no-such-option=1 :: --no-such-option
steps=many :: --steps many
steps=0 :: --steps 0: must be positive
num-samples=1 :: --num-samples 1: must be at least 2
max-new-tokens=60 :: --max-new-tokens 60: at most 56 fit
temperature=nan :: --temperature nan: must be
seed=-1 :: --seed -1: must be
task=chess :: --task chess: choose sums, gsm8k, math-hard
dtype=float16 :: --dtype float16 bfloat16
model=someone/no-such-model :: --model someone/no-such-model hub
task=gsm8k --data=someone/no-data :: --data someone/no-data hub test.jsonl 'question' 'answer'
data=anything :: --data sums
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_options(tiny, tmp_path, capfd, line):
    """Each is refused by name, with what would do instead, and writes nothing."""
    words, expected = line.split(" :: ")
    refuses(capfd, empg.main, [*options(tiny, tmp_path / "out"), *f"--{words}".split()], *expected.split())
    assert not (tmp_path / "out").exists()


def test_bad_models_data_and_directories(tiny, tmp_path, capfd, odd_is_right, monkeypatch):
    """No EOS, logits that log_probs does not see, columns, rows or a split that are missing, a directory that
    is taken, prompts that do not divide: each is refused, and nothing is lost."""
    check = lambda model, *words, **more: refuses(capfd, empg.main, options(model, tmp_path / "out", **more), *words)
    tokenizer = make.character_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(shutil.copytree(tiny, tmp_path / "endless"))
    check(tmp_path / "endless", "EOS")
    row = {"question": "1+1=", "answer": "#### 2"}
    for splits in ({"train": [{"q": "1"}], "test": [{"q": "1"}]}, {"train": [row], "test": []}, {"train": [row]}):
        data = write_rows(tmp_path / f"data{len(str(splits))}", **splits)
        check(tiny, "--data", str(data), "test.jsonl", "'question'", task="gsm8k", data=data)
    (tmp_path / "file").touch()
    for output, words in ((tmp_path / "file", "is a file"), ("/proc/nothing/run", "cannot be made")):
        refuses(capfd, empg.main, options(tiny, output), f"--output {output}", *words.split())
    refuses(capfd, empg.main, ["--task=sums", "--resume"], "--resume", "--output DIR")


def test_a_run_is_not_taken_up_by_other_options(tiny, tmp_path, capfd, odd_is_right):
    """--resume with an option that would make it another run, or of a damaged checkpoint, is refused in a line and loses
    nothing; options that change only the pace, the memory or the end are taken."""
    out = tmp_path / "out"
    check = lambda *words, flags=("--resume",), **more: refuses(
        capfd, empg.main, options(tiny, out, *flags, **more), *words
    )
    empg.main(options(tiny, out, steps=2))
    files = lambda: {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    before = files()
    check("--output", "another run", "--resume", flags=())
    check("--lr 0.5", "0.001", lr=0.5)
    check("--seed 1", "begun with 0", seed=1)
    check("--prompts-per-step 8", "begun with 4", prompts_per_step=8)
    check("--beta 0.1", "begun with 0.0", beta=0.1)
    make_model(vocab=18, hidden_size=32).save_pretrained(tmp_path / "wider")
    make.character_tokenizer().save_pretrained(tmp_path / "wider")
    refuses(capfd, empg.main, options(tmp_path / "wider", out, "--resume"), "--model", "begun with", tiny)
    assert files() == before
    more = {"eval_every": 0, "save_every": 1, "sample_batch": 4, "micro_batch_tokens": 30}
    empg.main(options(tiny, out, "--resume", steps=3, **more | {"eval_every": 3}))
    assert [row["step"] for row in metrics(out)][-2:] == [3, 3]
    check("--steps 2", "has 3 already", steps=2, eval_every=3)
    (checkpoint,) = out.glob("checkpoint-*")
    part = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    for content in (part.read_bytes()[:100], b""):
        part.write_bytes(content)
        check("--output", "checkpoint-000003 is damaged", "remove it", steps=5)
    (checkpoint / ".metadata").unlink()
    check("--output", "checkpoint-000003 is damaged", "remove it", steps=5)


def test_a_plain_command_stands_for_what_suits_the_machine(monkeypatch):
    """Without --model it is the base model here on the sums, or what the GPU's memory holds on GSM8K; the user's words win,
    and the precision goes by the device."""
    found = []
    note = lambda config: found.append(f"{Path(config.model).name} {config.task} {config.dtype}") or sys.exit()
    monkeypatch.setattr(empg, "check_options", note)
    cases = {
        (0, ""): "base sums float32",
        (0, "--task=gsm8k"): "Qwen2.5-0.5B gsm8k float32",
        (0, "--model=x"): "x gsm8k float32",
        (80, "--task=sums"): "base sums bfloat16",
        (80, ""): "Qwen2.5-1.5B gsm8k bfloat16",
        (23.7, ""): "Qwen2.5-0.5B gsm8k bfloat16",
        (16, ""): "base sums bfloat16",
        (80, "--device=cpu"): "base sums float32",
        (80, "--dtype=float32"): "Qwen2.5-1.5B gsm8k float32",
    }
    for gigabytes, words in cases:
        memory = types.SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gigabytes=gigabytes: gigabytes > 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, memory=memory: memory)
        pytest.raises(SystemExit, empg.main, words.split())
    assert found == list(cases.values())


def test_devices_that_are_not_there(monkeypatch, tiny, tmp_path, capfd):
    """Neither a GPU, nor one for each process, nor an Apple GPU: a line each."""
    for device in ("cuda", "mps"):
        refuses(capfd, empg.main, options(tiny, tmp_path / "out", device=device), f"--device {device}", "--device cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    refuses(capfd, lambda words: empg.check_device(words[0]), ["cuda"], "--nproc-per-node 4", "has 2 GPUs")
    refuses(capfd, scoring.main, ["--model=x", "--device=cuda"], "--nproc-per-node 4", "has 2 GPUs")


# ---- eval.py: scores, comparisons, curves


def test_scores_are_what_enumeration_gives():
    """pass@k is the share of k-subsets with a correct sample, McNemar's p that of as lopsided coins, a vote the commonest
    answer; the ends of Wilson's interval are 1.96 standard errors away; Agresti and Min's counts two problems more."""
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if max(c, k) <= n:
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert scoring.pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-12)
    for a, b in itertools.product(range(6), repeat=2):
        extreme = [abs(2 * sum(coins) - a - b) >= abs(a - b) for coins in itertools.product((0, 1), repeat=a + b)]
        assert scoring.mcnemar_exact(a, b) == pytest.approx(sum(extreme) / len(extreme), abs=1e-12)
    votes = (["7", "8", "8"], ["9", "8", "8", "9"], [None, None, "3"], [None])
    assert [scoring.majority_vote(vote) for vote in votes] == ["8", "9", "3", None]
    for successes, total in [(1, 10), (50, 100), (499, 500), (0, 7), (7, 7)]:
        for p in {*scoring.wilson_interval(successes, total)} - {0.0, 1.0}:
            assert abs(successes / total - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / total), rel=1e-5)
    a, b = np.repeat([1, 1, 0, 0], [30, 5, 12, 13]), np.repeat([1, 0, 1, 0], [30, 5, 12, 13])
    error = 1.959964 * math.sqrt(18 - 7**2 / 62) / 62
    assert scoring.paired_difference(a, b) == pytest.approx((7 / 60, 7 / 62 - error, 7 / 62 + error), rel=1e-6)
    assert scoring.paired_difference(a, a)[1] < 0 < scoring.paired_difference(a, a)[2]


def test_an_evaluation_says_what_its_rows_say(tmp_path, monkeypatch, capsys):
    """Accuracy, pass@k, maj@k, subjects, lengths and shares are those counted from the rows; samples do not depend on
    how many there are."""
    make_model(seed=1, vocab=17, dtype=torch.float32).save_pretrained(tmp_path)
    make.character_tokenizer().save_pretrained(tmp_path)
    kinds = ["Algebra"] * 30 + ["Geometry"] * 10
    rows = [{"question": f"{i}+1=", "answer": str(i % 9), "type": kind} for i, kind in enumerate(kinds)]
    change(monkeypatch, "gsm8k", prompt="{question}")
    data = write_rows(tmp_path / "data", test=rows)
    words = [f"--model={tmp_path}", "--task=gsm8k", f"--data={data}", "--max-new-tokens=12", "--device=cpu"]
    scoring.main([*words, "--num-samples=4", f"--output={tmp_path / 'new/r'}"])
    report, (_, *rows) = capsys.readouterr().out, read_rows(tmp_path / "new/r")
    assert [row["index"] for row in rows] == [i for i in range(40) for _ in range(4)]
    assert all(row["correct"] == bool(GSM8K.reward(row["response"], str(row["index"] % 9))) for row in rows)
    assert all(row["answer"] == empg.final_answer(row["response"]) for row in rows)
    right = np.array([row["correct"] for row in rows]).reshape(40, 4)
    pairs = np.mean([[any(r[list(c)]) for c in itertools.combinations(range(4), 2)] for r in right])
    won = [scoring.majority_vote([row["answer"] for row in rows[4 * i : 4 * i + 4]]) == str(i % 9) for i in range(40)]
    tokens, cut = np.mean([row["tokens"] for row in rows]), np.mean([row["cut"] for row in rows])
    assert 0 < right.mean() < 1 and 0 < cut < 1 and all(row["tokens"] == 12 or not row["cut"] for row in rows)
    for text in (f"mean@4 {right.mean():.3f}, 95 %", f"{pairs:.3f} at k = 2", f"{right.any(1).mean():.3f} at k = 4",
                 f"maj@4 {np.mean(won):.3f}", f"Algebra {right[:30].mean():.3f} of 30", f"{tokens:.1f} mean", f"{cut:.1%}"):  # fmt: skip
        assert text in re.sub(" +", " ", report), (text, report)
    scoring.main([*words, "--temperature=1", "--limit=20", f"--output={tmp_path / 'one'}"])
    assert [row["response"] for row in read_rows(tmp_path / "one")[1:]] == [row["response"] for row in rows[:80:4]]


def test_a_killed_evaluation_goes_on(tiny, tmp_path, capfd):
    """Two processes that go on with a file that a kill has cut, even in a line, write it byte for byte as one process does."""
    words = [f"--model={tiny}", "--task=sums", "--num-samples=2", "--max-new-tokens=8", "--limit=60", "--device=cpu"]
    scoring.main([*words, f"--output={tmp_path / 'one'}"])
    whole = (tmp_path / "one").read_bytes()
    (tmp_path / "two").write_bytes(whole[: whole.index(b"\n", len(whole) // 3) + 40])
    run_ranks(2, [sys.executable, HERE / "eval.py", *words, "--sample-batch=6", f"--output={tmp_path / 'two'}"])
    assert (tmp_path / "two").read_bytes() == whole
    refuses(capfd, scoring.main, [*words, "--seed=1", f"--output={tmp_path / 'two'}"], "--output", "'seed': 0")
    assert (tmp_path / "two").read_bytes() == whole


def results(path, correct, samples=1, tokens=5, question="q") -> str:
    """A results file with these outcomes."""
    common = {"tokens": tokens, "response": "Wait, no."}
    rows = [{"question": f"{question}{i // samples}", "correct": bool(x)} | common for i, x in enumerate(correct)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in ({"num_samples": samples}, *rows)))
    return str(path)


def test_compare(tmp_path, capfd):
    """Accuracies, paired difference, problems that differ, McNemar's p, lengths; the paper's scores beside its models."""
    a = results(tmp_path / "a", [1, 1, 0, 0, 0, 0, 0, 0])
    scoring.main(["--compare", a, results(tmp_path / "b", [1, 0, 1, 1, 1, 1, 1, 0], tokens=9)])
    report = capfd.readouterr().out
    for text in ("/a: 0.250", "/b: 0.750", "+0.500, 95 %", "p = 0.22; A better on 1, B on 5", "5.0 and 9.0"):
        assert text in report
    two = results(tmp_path / "d", [1, 1, 1, 0, 0, 0], samples=2)
    scoring.main(["--compare", results(tmp_path / "c", [1, 0, 0]), two])
    assert "c: 0.333" in (report := capfd.readouterr().out) and "A better on 0, B on 1" in report
    refuses(capfd, scoring.main, ["--compare", a, results(tmp_path / "e", [1] * 8, question="other")], "same problems")
    refuses(capfd, scoring.main, ["--compare", a, results(tmp_path / "f", [1] * 7)], "same problems")
    file = f"{tmp_path}/a/below.jsonl"
    for words, expected in ((f"--model x --output {tmp_path}", "is a directory"), (f"--model x --output {file}", "cannot be made"),
                            ("--compare a b", "a:"), ("--compare a", "choose"), ("", "choose"), ("--curves x", "--curves x"),
                            ("--model x --task chess", "chess"), ("--model x --limit 0", "--limit 0")):  # fmt: skip
        refuses(capfd, scoring.main, words.split(), expected)
    (tmp_path / "config.json").write_text('{"model": "Qwen/Qwen2.5-14B-Instruct"}')
    assert "EMPG 0.808" in scoring.paper_scores(f"{tmp_path}/model", "math-hard")["in the paper"]
    assert scoring.paper_scores("Qwen/Qwen2.5-7B-Instruct", "gsm8k") == {}


def test_curves(tmp_path, capsys, monkeypatch):
    """Seeds of a setting are drawn as mean and band, other runs as lines of another colour and style, named in a legend."""
    runs = {"x-0": ([0.2, 0.4, None, 0.8], 1), "x-1": ([0.4, 0.6, 0.5, 1.0, 1.0], 1), "z-0": ([0.1, 0.1], 2)}
    for name, (rewards, lr) in runs.items():
        rows = [{"step": i, "reward": r, "response_tokens": 10.0 * i} for i, r in enumerate(rewards, 1)]
        write_rows(tmp_path / name, metrics=[{"step": 0, "eval_accuracy": 0.1}, *rows])
        (tmp_path / name / "config.json").write_text(json.dumps({"seed": name[-1], "output": name, "lr": lr}))
    figures = []
    spy(monkeypatch, "savefig", lambda args, *_: figures.append(args[0]), Figure)
    scoring.main(["--curves", *(str(tmp_path / name) for name in runs), f"--output={tmp_path / 'c.png'}"])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and "x, 2 seeds" in capsys.readouterr().out
    reward, accuracy, _ = figures[0].axes
    seeds, single = reward.lines
    assert seeds.get_xdata().tolist() == [1, 2, 4] and seeds.get_ydata().tolist() == pytest.approx([0.3, 0.5, 0.9])
    band = reward.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 1.0))
    assert seeds.get_color() != single.get_color() and seeds.get_linestyle() != single.get_linestyle()
    assert accuracy.lines[0].get_xdata().tolist() == [0]
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["x, 2 seeds", "z-0"]


# ---- The base model, the studies, the README


def test_the_base_model_is_made_by_its_script_and_learns(tmp_path):
    """A short version of the recipe learns, and writes what the base directory has; ten iterations of the plain command
    bring the base itself from a third to eight in ten."""
    losses = make.make(tmp_path / "base", iterations=20)
    assert losses[-1] < 0.8 * losses[0]
    files, ours = ({path.name for path in (place / "base").iterdir()} for place in (HERE, tmp_path))
    assert files - ours <= {"make.py", "__pycache__"} and ours <= files
    (_, ours), (_, base) = (empg.load_model(str(path)) for path in (tmp_path / "base", HERE / "base"))
    assert [p.shape for p in ours.parameters()] == [p.shape for p in base.parameters()]
    empg.main(["--task=sums", "--steps=10", "--eval-every=10", f"--output={tmp_path / 'run'}", "--device=cpu"])
    before, after = (row["eval_accuracy"] for row in metrics(tmp_path / "run") if "eval_accuracy" in row)
    assert 0.2 < before < 0.45 and after > 0.8


@pytest.mark.parametrize("clip", [0.2, 1e9])
def test_grpo_is_the_formula_of_deepseekmath(clip):
    """Advantages, loss and gradient equal DeepSeekMath's equation, written out in loops over samples and tokens."""
    rewards = torch.tensor([[0.0, 1, 1, 0, 0], [0.3, 0.3, 0.3, 0.3, 0.3], [5, -1, 0, 2.5, 1]], dtype=torch.float64)
    logprobs, noise, expected = toy_logits(0, (15, 4)), toy_logits(1, (15, 4)).detach(), 0.0
    old = logprobs.detach() + 0.3 * noise
    mask = torch.tensor([[1.0] * (1 + i % 4) + [0.0] * (3 - i % 4) for i in range(15)], dtype=torch.float64)
    for n, t in mask.nonzero().tolist():
        p = rewards[n // 5].numpy()
        advantage, ratio = (p[n % 5] - p.mean()) / (p.std() + 1e-6), torch.exp(logprobs[n, t] - old[n, t])
        clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
        expected = expected - torch.minimum(ratio * advantage, clipped * advantage) / (1 + n % 4) / 15
    advantages = grpo.grpo_advantages(rewards)
    loss = grpo.grpo_loss(logprobs, old, mask, advantages.flatten(), clip)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(expected, logprobs))
    assert (advantages[1] == 0).all()


def test_importance_weights_are_exact_at_any_distance():
    """Enumerated, samples of θ* weighted by P_θ(τ)/P_θ*(τ) give the policy gradient of a θ far from it, and EMPG's do not;
    where θ = θ*, the clipped loss, too, has EMPG's gradient; beyond the clip it has none."""
    logits = toy_logits(5)
    logprobs, old = toy_logprobs(logits), toy_logprobs(toy_logits(6)).detach()
    weights = 7 * old.sum(1).exp() * RIGHT  # so that the mean over the seven is the expectation under θ*
    true = gradient((logprobs.sum(1).exp() * RIGHT).sum(), logits)
    torch.testing.assert_close(gradient(importance.trajectory_loss(logprobs, old, MASK, weights), logits), -true)
    assert (gradient(empg.empg_loss(logprobs, MASK, weights), logits) + true).norm() > 0.1 * true.norm()
    for loss in importance.LOSSES.values():
        ours = gradient(loss(logprobs, logprobs.detach(), MASK, weights - 1), logits)
        torch.testing.assert_close(ours, gradient(empg.empg_loss(logprobs, MASK, weights - 1), logits))
    far = logprobs.detach() - 0.5  # every ratio is 1.65
    assert (gradient(importance.clipped_loss(logprobs, far, MASK, torch.ones(7)), logits) == 0).all()
    assert (gradient(importance.clipped_loss(logprobs, far, MASK, -torch.ones(7)), logits) != 0).any()


def test_svrg_is_its_formula(monkeypatch):
    """Each step follows g_B(θ) - g_B(θ*) + g_D(θ*), from plain passes; where θ = θ*, that is the gradient of the whole buffer
    for every part, and without the control variate only the mean of the parts is."""

    def steps(lr, control_variate):
        model, found = make_model(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        optimizer.register_step_pre_hook(lambda *_: found.append((flat(model), flat_grad(model))))
        svrg.update(model, optimizer, rows_with(WEIGHTS), config(), parts=4, control_variate=control_variate)
        return found

    def of(theta, rows):
        """The gradient of the mean over these trajectories, by the plain formula."""
        model = make_model()
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        terms = [row["weight"] * plain_logprobs(model, row["prompt"], row["response"]).sum() for row in rows]
        (-torch.stack(terms).mean()).backward()
        return flat_grad(model)

    rows, base = rows_with(WEIGHTS), flat(make_model())
    parts = svrg.random_parts(rows, 4, [0, 0])
    assert (
        sorted(map(rows.index, itertools.chain(*parts))) == list(range(8)) and [len(part) for part in parts] == [2] * 4
    )
    whole = of(base, rows)
    for part, (theta, got) in zip(parts, steps(0.1, True), strict=True):
        assert same_gradient(got, of(theta, part) - of(base, part) + whole)
    assert all(same_gradient(got, whole) for _, got in steps(0.0, True))
    plain = [got for _, got in steps(0.0, False)]
    assert same_gradient(sum(plain) / 4, whole) and not same_gradient(plain[0], whole)


def test_svrg_resumes_as_it_would_have_gone_on(tiny, tmp_path, odd_is_right, monkeypatch):
    """Every buffer is split in another way, in a resumed run, too."""
    monkeypatch.setattr(empg, "update", functools.partial(svrg.update, parts=3, control_variate=True))
    splits = []
    spy(monkeypatch, "random_parts", lambda args, _, parts: splits.append(args[2][1]), svrg)
    empg.main(options(tiny, tmp_path / "whole", steps=4))
    assert splits == [0, 3, 6, 9]
    for steps in (2, 4):
        empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps))
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_tables_and_pictures_of_studies(tmp_path):
    """A row of a table has the mean and the deviation of its seeds; importance.py draws a line for each kind."""
    for kind, updates, seed, last in (("none", 2, 0, 0.5), ("none", 2, 1, 0.7), ("clipped", 4, 0, 0.9)):
        run = tmp_path / f"{kind}-{updates}-{seed}"
        run.mkdir()
        train = {"reward": 0.3, "response_tokens": 4.0 + seed, "kl": None, "step_seconds": 2.0}
        rows = [{"step": 0, "eval_accuracy": 0.1}]
        for step, accuracy in ((10, 0.4), (20, 0.3), (30, last)):
            rows += [{"step": step - 9 + i, **train} for i in range(10)] + [{"step": step, "eval_accuracy": accuracy}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = sorted(str(path) for path in tmp_path.iterdir())
    head, _, first, second = tables.table(runs, seconds=45).splitlines()
    assert head.count("|") == first.count("|") and "kl" not in head
    assert [cell.strip() for cell in second.split("|")[1:7]] == [
        "none-2", "2", "0.400 ± 0.000", "0.300 ± 0.000", "0.600 ± 0.141", "0.300 ± 0.000"]  # fmt: skip
    assert "| 4.500 ± 0.707 | 2.000 ± 0.000 | 0.300 ± 0.000 | 20.000 ± 0.000 |" in second and first.startswith(
        "| clipped-4 | 1"
    )
    importance.draw(str(tmp_path / "picture.png"), runs)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_studies_replace_what_they_say(tiny, tmp_path, odd_is_right, monkeypatch):
    """grpo.py, ablations.py and prompts_once.py train through empg.main with their own pieces: another loss, for which each
    trajectory keeps its log-probabilities under θ*; no smoothing; the same trajectories and gradients in other passes."""
    names = ("smooth_rewards", "subtract_baseline", "micro_batch_loss", "response_states", "micro_batches")
    pieces = {name: getattr(empg, name) for name in names}
    for name, piece in pieces.items():
        monkeypatch.setattr(empg, name, piece)
    old = []
    spy(monkeypatch, "grpo_loss", lambda args, *_: old.append((args[0].detach(), args[1])), grpo)
    grpo.replace()
    empg.main(options(tiny, tmp_path / "grpo", steps=1, eval_every=0, updates=2))
    (first, first_old), (second, second_old) = old
    assert torch.equal(first, first_old) and torch.equal(first_old, second_old) and not torch.equal(second, second_old)
    vars(empg).update(pieces)
    ratios = []
    for kind in importance.LOSSES:
        spy(
            monkeypatch,
            f"{kind}_loss",
            lambda args, *_: ratios.append((args[0] - args[1]).abs().max().item()),
            importance,
        )
        monkeypatch.setitem(importance.LOSSES, kind, getattr(importance, f"{kind}_loss"))
        importance.replace(kind)
        empg.main(options(tiny, tmp_path / kind, steps=1, eval_every=0, updates=2))
    assert len(ratios) == 4 and ratios[0] == ratios[2] == 0 < min(ratios[1], ratios[3])
    vars(empg).update(pieces)
    ablations.replace("none", "batch", True)
    empg.main(options(tiny, tmp_path / "ablations", steps=1, eval_every=0))
    assert empg.smooth_rewards(torch.tensor([5.0])) == 5 and metrics(tmp_path / "ablations")[0]["reward"] < 0
    assert [ablations.graded(text, "9") for text in ("#7", "9", "?")] == [-2, 0, -36]
    vars(empg).update(pieces)
    for name in ("plain", "once"):
        empg.main(options(tiny, tmp_path / name, steps=3, eval_every=0))
        prompts_once.replace()
    same_metrics(metrics(tmp_path / "plain"), metrics(tmp_path / "once"))


def test_studies_that_measure(tiny, tmp_path, odd_is_right, capsys):
    """At θ = θ* the importance weights are 1 and the two gradients equal; behaviours are counted once per response."""
    gradients.main(str(tmp_path / "g.png"), tiny, seeds=1, batches=3, updates=2)
    assert (tmp_path / "g.png").stat().st_size > 10_000
    assert "after  0 updates: KL 0.000  ESS 1.000  cosine 1.000  norm ratio 1.000" in capsys.readouterr().out
    svrg.measure(str(tmp_path / "s.png"), tiny, seeds=1, draws=50, prompts=3, sizes=(4, 16))
    found = re.findall(
        r"(with|without) the control variate .*?\| +([\d.]+) \(([\d.]+)\) +([\d.]+)", capsys.readouterr().out
    )
    assert [kind for kind, *_ in found] == ["without", "with"] * 4
    (small, cosine, large), (corrected, better, _) = (map(float, row[1:]) for row in found[:2])
    assert 8 > small / large > 3 and corrected < small / 3 and better > cosine  # (1/4 - 1/48) / (1/16 - 1/48) = 5.5
    kl_estimators.main(str(tmp_path / "k.png"), pairs=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and all(float(line.split()[-2]) == 0 for line in lines if line.startswith("top-k  "))
    for name in "sk":
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert gradients.effective_sample_size(torch.tensor([1000.0, 0, 0, 0])) == pytest.approx(0.25)
    texts = ["Step 1: add.", "Case 1: x. Case 1.", "Let's verify the sum.", "Wait, no.", "Let me reconsider."]
    found = behaviours.find([*texts, "The waiter made three cakes.", "She reached step 10.", "A checkered flag."])
    assert [len(hits) for hits in found.values()] == [2, 1, 2]
    behaviours.main(results(tmp_path / "r", [1, 0]))
    assert "backtracking: 2 of 2 responses, 100.0%" in capsys.readouterr().out


def test_word_problems(tmp_path, capsys):
    """Stages on parts that share no problem, and scores; repeated, none of it is done again."""
    make_model(max_position_embeddings=128, scale=0.1).save_pretrained(tmp_path / "model")
    make.character_tokenizer().save_pretrained(tmp_path / "model")
    row = lambda i: {"body": f"{i}+", "question": "1=", "formula": f"{i % 3}+0={i % 3}", "answer": f"{i % 3} (x)"}
    data = write_rows(tmp_path / "data", validation=[row(i) for i in range(990)])
    svamp = write_rows(tmp_path / "svamp", test=[{"Body": "1+", "Question": "1=", "Answer": "2"}])
    parts = [{row["question"] for row in word_problems.asdiv(part, str(data))} for part in word_problems.PARTS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 990
    words = [f"--model={tmp_path}/model", f"--data={data}", f"--svamp={svamp}", f"--output={tmp_path}", "--device=cpu"]
    words += ["--steps=2", "--eval-problems=4"]
    word_problems.main(words)
    report = capsys.readouterr().out
    assert len(metrics(tmp_path / "empg-0")) == 4 and report.count("McNemar") == 2
    shutil.rmtree(tmp_path / "model")
    word_problems.main(words)
    again = capsys.readouterr().out
    assert "Resuming after iteration 2" in again and again.endswith(report[report.index("accuracy  ") :])


def test_the_readme_examples(tiny, tmp_path):
    """Sampler, smoothing, baseline and loss in somebody else's loop earn more and more; a task of one's own trains."""
    loop, task = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    rewards = [float(line.split()[1]) for line in run([sys.executable, "-c", loop]).stdout.splitlines()]
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5])
    args = options(tiny, tmp_path / "run", task="pairs")
    run([sys.executable, "-c", task.replace("empg.main()", f"empg.main({args})")])
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 1, 2, 2]
