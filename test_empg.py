"""The second half of the lesson: every claim of the method, and of the program, has a test here that fails if it is
wrong.

Part 1 proves the method. Its policies are so small that all their trajectories can be listed. So an expectation there
is a sum, not an estimate. Read it after the first half of empg.py. Parts 2 and 3 test the program: part 2 the sampler,
the update and the graders, with tiny real models, and part 3 whole runs of the commands.

`pytest -q test_empg.py` needs no network. Each test says in its first lines what it shows. The name test_mistake_X
stands for a mistake that is common in this field: whoever makes it fails the test.
"""

import contextlib
import dataclasses
import doctest
import functools
import gc
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2LMHeadModel,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

import empg
import eval as scoring

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared/data"

# ------------------------------ Part 1: the method, on policies that can be listed ------------------------------

# A policy over three tokens. Token 0 ends a response, and a response has at most two tokens. So one prompt has these
# seven trajectories. A prefix is what stands before the next token, and the policy is a table: three logits for each
# prefix.
TRAJECTORIES = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
PREFIXES = [(), (1,), (2,)]
MASK = torch.tensor([[1.0] * len(t) + [0.0] * (2 - len(t)) for t in TRAJECTORIES], dtype=torch.float64)  # (7, 2)
RIGHT = torch.tensor([0.0, 1, 0, 0, 1, 0, 1], dtype=torch.float64)  # (7,): the reward R, 1 for three of them
SCORES = torch.tensor([0.0, 1, 9, 2, 0, 3, 0], dtype=torch.float64)  # (7,): another reward, which is not only 0 or 1


def toy_logits(seed: int, shape=(3, 3)) -> torch.Tensor:
    """Random parameters θ: (prefixes, tokens) logits."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def toy_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """(prefixes, tokens) logits, or (tokens,) that all prefixes share → (7, 2) log π_θ of the tokens of each
    trajectory."""
    table = logits.expand(3, 3).log_softmax(dim=-1)
    zero = torch.zeros((), dtype=logits.dtype)
    rows = []
    for trajectory in TRAJECTORIES:
        row = [table[PREFIXES.index(trajectory[:t]), token] for t, token in enumerate(trajectory)]
        padding = [zero] * (2 - len(row))
        rows.append(torch.stack(row + padding))
    return torch.stack(rows)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """P_θ(τ) of each of the seven trajectories."""
    return toy_logprobs(logits).sum(dim=1).exp()


def objective(logits: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """J(θ) = Σ_τ P_θ(τ) R(τ) (Eq. 3)."""
    return (probabilities(logits) * rewards).sum()


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def direction(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_τ weight(τ) ∇log P_θ(τ): minus the gradient of `empg_loss`, which is a mean over the seven trajectories."""
    return -gradient(empg.empg_loss(toy_logprobs(logits), MASK, 7 * weights), logits)


def all_groups(logits: torch.Tensor, advantages_of, num_samples: int = 3):
    """Every way in which `num_samples` responses to the prompt can be sampled: its probability, and the direction that
    EMPG takes then. `advantages_of` is a function of the numbers of the sampled trajectories."""
    logprobs = toy_logprobs(logits)
    probability = probabilities(logits).detach()
    for numbers in itertools.product(range(7), repeat=num_samples):
        sampled = list(numbers)
        loss = empg.empg_loss(logprobs[sampled], MASK[sampled], advantages_of(sampled))
        yield probability[sampled].prod(), -gradient(loss, logits)


def mean_and_variance(groups: list) -> tuple[torch.Tensor, float]:
    """Of the direction, over all groups."""
    mean = sum(probability * found for probability, found in groups)
    return mean, sum(probability * (found - mean).square().sum() for probability, found in groups).item()


def test_the_policy_is_a_distribution():
    """The probabilities of the seven trajectories add up to 1."""
    assert probabilities(toy_logits(3)).sum().item() == pytest.approx(1, abs=1e-12)


def test_the_gradient_that_is_followed_is_the_policy_gradient():
    """On average over all groups of three samples, the direction is ∇J (Eq. 4), with the rewards as they are. With
    smoothed rewards, whose μ and σ are held fixed here, it is ∇J times their distance. The leave-one-out baseline does
    not change that, and leaves less than half of the variance."""
    logits = toy_logits(3)
    policy_gradient = gradient(objective(logits, RIGHT), logits)
    with_rewards, _ = mean_and_variance(list(all_groups(logits, lambda sampled: RIGHT[sampled])))
    torch.testing.assert_close(with_rewards, policy_gradient, rtol=1e-10, atol=1e-12)

    smoothed = 0.3 + 0.5 * RIGHT
    without_baseline, large_variance = mean_and_variance(list(all_groups(logits, lambda sampled: smoothed[sampled])))
    torch.testing.assert_close(without_baseline, 0.5 * policy_gradient, rtol=1e-10, atol=1e-12)

    def advantages_of(sampled):
        return empg.subtract_baseline(smoothed[sampled][None])[0]

    with_baseline, small_variance = mean_and_variance(list(all_groups(logits, advantages_of)))
    torch.testing.assert_close(with_baseline, 0.5 * policy_gradient, rtol=1e-10, atol=1e-12)
    assert small_variance < 0.5 * large_variance


def cosine_with_smoothing(rewards: torch.Tensor) -> float:
    """Of the angle between ∇J and the direction that EMPG takes on average, if every group of three is a batch."""
    logits = toy_logits(3)

    def advantages_of(sampled):
        return empg.subtract_baseline(empg.smooth_rewards(rewards[sampled])[None])[0]

    mean, _ = mean_and_variance(list(all_groups(logits, advantages_of)))
    policy_gradient = gradient(objective(logits, rewards), logits)
    return torch.cosine_similarity(mean.flatten(), policy_gradient.flatten(), dim=0).item()


def test_smoothing_keeps_the_direction_for_rewards_of_0_and_1():
    """With smoothing, too, the average direction is that of ∇J if rewards are 0 or 1. For scores it is another one."""
    assert cosine_with_smoothing(RIGHT) == pytest.approx(1, abs=1e-10)
    assert 0.5 < cosine_with_smoothing(SCORES) < 0.999


def lower_bound(logits: torch.Tensor, q: torch.Tensor) -> float:
    """E_{τ~q}[log R(τ) + log P_θ(τ) - log q(τ)], Jensen's bound on log J(θ), for a q on the right trajectories only."""
    right = RIGHT == 1
    log_p = toy_logprobs(logits).sum(dim=1)
    return (q[right] * (log_p[right] - q[right].log())).sum().item()


@pytest.mark.parametrize("shape", [(3, 3), (3,)], ids=["a-table", "shared-by-all-prefixes"])
def test_em_never_lowers_the_objective(shape):
    """EM with exact expectations. After the E-step (Eq. 8) the bound is log J, and with another q it is lower. An
    M-step that goes down `empg_loss` (Eq. 10) raises the bound, and log J at least as far. So J rises in every
    iteration."""
    logits = toy_logits(4, shape)
    uniform = RIGHT / RIGHT.sum()
    assert lower_bound(logits, uniform) < objective(logits, RIGHT).log().item() - 1e-6
    history = []
    for _ in range(8):
        # E-step: q is the frozen policy, restricted to what is right.
        history.append(objective(logits, RIGHT).log().item())
        q = (probabilities(logits) * RIGHT / objective(logits, RIGHT)).detach()
        assert lower_bound(logits, q) == pytest.approx(history[-1], abs=1e-12)
        # M-step: make samples of q likelier.
        for _ in range(60):
            logits = (logits + direction(logits, q)).detach().requires_grad_()
        assert history[-1] - 1e-9 <= lower_bound(logits, q) <= objective(logits, RIGHT).log().item() + 1e-12
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(history))
    assert history[1] > history[0]
    assert history[-1] > history[0] + 0.1


def test_the_error_of_stale_samples_grows_with_their_age():
    """Off-policy, the samples are those of θ*, and θ has moved away. Then the average direction is not ∇J. The error is
    in proportion to the distance, and at θ = θ* there is none."""
    old_probability = probabilities(toy_logits(5)).detach()
    errors = []
    for distance in (0.2, 0.1, 0.05, 0.0):
        logits = (toy_logits(5) + distance * toy_logits(6)).detach().requires_grad_()
        policy_gradient = gradient(objective(logits, RIGHT), logits)
        errors.append((direction(logits, old_probability * RIGHT) - policy_gradient).norm().item())
    far, middle, near, none = errors
    assert far > 0.01
    assert far == pytest.approx(4 * near, rel=0.2)
    assert middle == pytest.approx(2 * near, rel=0.2)
    assert none == pytest.approx(0, abs=1e-12)


def test_with_a_baseline_stale_samples_can_point_down():
    """Far from θ*, a small step along the average direction can lower J. There are three responses of one token
    here."""
    old_probability = torch.tensor([0.3, 0.69, 0.01], dtype=torch.float64)
    rewards = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    logits = torch.tensor([0.01, 0.6, 0.39], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(dim=0)[:, None]  # (3, 1)
    # The mean over the three is then the expectation under θ*. The baseline is that of infinitely many samples.
    advantages = 3 * old_probability * (rewards - old_probability @ rewards)
    followed = -gradient(empg.empg_loss(logprobs, torch.ones(3, 1), advantages), logits)
    policy_gradient = gradient((logprobs[:, 0].exp() * rewards).sum(), logits)
    assert (followed @ policy_gradient).item() < -1e-3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("num_right", [1, 8, 13, 15])
def test_mistake_standard_deviation_of_a_sample(num_right):
    """Smoothed rewards of 0 and 1 are low + distance · R, by the formula with the population's σ. The distance is
    between 0.46 and 0.55; with the sample's σ, which is larger, it would be smaller."""
    share = num_right / 16
    low = sigmoid(-math.sqrt(share / (1 - share)))
    distance = sigmoid(math.sqrt((1 - share) / share)) - low
    assert 0.46 < distance < 0.55
    rewards = torch.tensor([1.0] * num_right + [0.0] * (16 - num_right), dtype=torch.float64)
    torch.testing.assert_close(empg.smooth_rewards(rewards).double(), low + distance * rewards, rtol=0, atol=1e-7)


def test_the_distance_of_smoothed_rewards_hardly_depends_on_the_share_that_is_right():
    """For rewards of 0 and 1, whatever share of 512 is right, smoothing scales advantages by 0.46 to 0.55."""
    for num_right in range(1, 512):
        smoothed = empg.smooth_rewards(torch.tensor([0.0] * (512 - num_right) + [1.0] * num_right))
        assert 0.46 < (smoothed[-1] - smoothed[0]).item() < 0.55


def test_one_extreme_reward_still_outweighs_the_others():
    """Smoothing bounds what one response counts. But μ and σ contain it, so that beside it the others hardly differ:
    with a reward of 1000 among 511 of 0 and 1, its advantage is 0.51 and all others, but for its prompt's, are at most
    0.006."""
    rewards = torch.tensor([1000.0] + [0.0, 1.0] * 256)[:512]
    smoothed = empg.smooth_rewards(rewards)
    assert [round(value, 3) for value in smoothed[:3].tolist()] == [1.0, 0.486, 0.492]
    advantages = empg.subtract_baseline(smoothed.view(64, 8))
    assert advantages[0, 0].item() == pytest.approx(0.51, abs=0.005)
    assert advantages[0, 1:].tolist() == pytest.approx([-0.07] * 7, abs=0.008)
    assert advantages[1:].abs().max().item() < 0.006


def test_smoothing_keeps_the_order_of_any_finite_rewards():
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
    for value in (1e200, 1e-200, -1e300):  # whose squares are no numbers of float64
        shape = torch.tensor([value, 0, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(empg.smooth_rewards(shape), empg.smooth_rewards(shape.sign()))
    for name, values in cases.items():
        rewards = torch.tensor(values)
        smoothed = empg.smooth_rewards(rewards)
        assert smoothed.dtype == torch.float32, name
        assert (smoothed >= 0).all(), name
        assert (smoothed <= 1).all(), name
        assert (smoothed[rewards.argsort()].diff() >= 0).all(), name
        assert smoothed.max() > smoothed.min(), name


def test_smoothing_of_equal_and_of_bad_rewards():
    """Equal rewards are smoothed to exactly 0.5. No rewards, nan and infinity are refused."""
    for value in (0, 1, 0.1, -3e38):
        assert (empg.smooth_rewards(torch.full((37,), value)) == 0.5).all()
    for rewards in ([], [1.0, math.nan], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="smooth_rewards needs"):
            empg.smooth_rewards(torch.tensor(rewards))


def test_mistake_baseline_with_the_wrong_sign():
    """An advantage is the reward minus the mean of the prompt's other samples."""
    rewards = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = torch.empty_like(rewards)
    for i, j in itertools.product(range(3), range(4)):
        others[i, j] = np.mean([rewards[i, k].item() for k in range(4) if k != j])
    torch.testing.assert_close(empg.subtract_baseline(rewards), rewards - others)
    for shape in ((4,), (4, 1)):
        with pytest.raises(ValueError, match="subtract_baseline needs"):
            empg.subtract_baseline(torch.ones(shape))


def test_equal_rewards_have_advantage_0_to_the_last_bit():
    """A prompt whose responses are all right or all wrong gets advantages of exactly 0, whatever its sums are rounded
    to."""
    for num_samples in range(2, 33):
        rewards = torch.full((2, num_samples), 0.6224593)
        rewards[1, 0] = 0.3775407
        advantages = empg.subtract_baseline(rewards)
        assert (advantages[0] == 0).all()
        assert (advantages[1] != 0).all()


def test_mistake_mean_over_padding():
    """empg_loss is -(1/N) Σᵢ Aᵢ Σₜ log π by hand: tokens are summed, and what stands on padding, even nan, does not
    count."""
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


@pytest.mark.parametrize("module", [empg, scoring])
def test_examples_in_docstrings(module):
    """What the docstrings show is what the functions return."""
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# ------------------------------ Part 2: tiny real models. Sampling and log-probabilities ------------------------------

SMALL = {"vocab_size": 18, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5,
         "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip


def make_model(seed=0, scale=0.5, dtype=torch.float64, kind=Qwen2ForCausalLM, **settings):
    """A two-layer Qwen2 with grouped-query attention, whose predictions are far from uniform; or another kind of
    model."""
    torch.manual_seed(seed)
    config = kind.config_class(**SMALL | {"initializer_range": scale} | settings)
    return kind(config).to(dtype).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the characters of the task sums."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokens = [*special.values(), *"0123456789+=,#"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def save(model, path) -> str:
    """Writes a model and its tokenizer, as a directory for --model."""
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


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


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("rotary", False), ("window", False), ("absolute", False), ("rotary", True)]
)
def test_mistakes_temperature_forgotten_and_wrong_tensor_detached(kind, checkpointing):
    """log_probs equals the plain formula, values and gradients: prompts of unequal length, padding, layers computed
    again and a temperature change nothing, for any parameter."""
    model = make_model(**MODELS[kind])
    plain_loss(model, ADVANTAGES, 0.7).backward()
    expected_gradient = flat_grad(model)
    expected = [plain_logprobs(model, prompt, response, 0.7) for prompt, response in zip(PROMPT_OF, RESPONSES)]
    model.zero_grad()

    # `distribute` puts the model into float32, in which its weights were drawn. So nothing is lost.
    model = empg.distribute(model, config(gradient_checkpointing=checkpointing)).double()
    # Watch whether a layer is computed again. `distribute` wraps its forward, so that a hook on the layer itself would
    # not see the second time. Its first child does.
    layer = next(module for module in model.modules() if type(module).__name__ in model._no_split_modules)
    layer_computed = []
    next(layer.children()).register_forward_pre_hook(lambda module, args: layer_computed.append(True))

    values, mask = empg.log_probs(model, PROMPTS, RESPONSES, 0.7)
    assert mask.sum(1).tolist() == [len(response) for response in RESPONSES]
    assert (values[~mask] == 0).all()
    torch.testing.assert_close(values[mask].double(), torch.cat(expected), rtol=1e-6, atol=2e-6)

    empg.empg_loss(values, mask, ADVANTAGES).backward()
    assert same_gradient(flat_grad(model), expected_gradient)
    assert len(layer_computed) == (2 if checkpointing else 1)


def test_mistake_logits_of_a_neighbouring_column():
    """response_logits gives, response after response, the logits before each token of plain passes, the tokens
    themselves, and a mask in which each row has as many places as its response has tokens."""
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
    """The probabilities of all tokens after one prompt, EOS among them, sum to 1. They do not if each token has been
    seen when it is predicted, or if EOS does not count: then nobody would learn to stop."""
    values, mask = empg.log_probs(make_model(), [[3, 4]], [[token] for token in range(18)])
    assert mask.all()
    assert values.exp().sum().item() == pytest.approx(1)


def test_mistakes_dropout_on_and_bfloat16_master_weights(tmp_path):
    """A model with dropout that is stored in bfloat16 is loaded without dropout, and learns in float32, in which
    updates of 1e-6 survive. Its frozen copy is in the dtype that was asked for, but for rotary frequencies, which stay
    in float32."""
    name = save(make_model(dtype=torch.bfloat16, attention_dropout=0.5), tmp_path)
    _, policy = empg.load_model(name)
    _, frozen = empg.load_model(name, torch.bfloat16)
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
    """Greedy responses to prompts of unequal length, which pad each other, are those that transformers' own generate
    gives each of them alone; 200 tokens are those of one plain pass."""
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
    """Neither 0 nor the largest float below 1 draws a token of probability 0, and broken logits end in the last
    token."""
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
    """The mathematics, the sampler and log_probs, taken by their source into an empty module with nothing but imports
    of libraries, run there and give the same, gradient included."""
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


def test_what_the_functions_take():
    """Several end tokens may come in any collection. Advantages of another shape, which torch would broadcast, are refused."""
    limits = {name: value for name, value in LIMITS.items() if name != "eos_token_id"}
    expected = empg.sample(make_model(), [[3, 4]], 8, 6, seeds=[0], eos_token_id=[1, 5], **limits)
    assert {len(response) for response in expected} > {6}
    for ends in ({1, 5}, torch.tensor([1, 5]), np.array([1, 5])):
        assert empg.sample(make_model(), [[3, 4]], 8, 6, seeds=[0], eos_token_id=ends, **limits) == expected
    with pytest.raises(ValueError, match="empg_loss needs"):
        empg.empg_loss(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 1))


HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2}
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
    # Some layers keep a state in place of keys and values.
    "qwen3_5_text": HYBRID | {"linear_key_head_dim": 4, "linear_value_head_dim": 4},
    "qwen3_next": HYBRID | {"num_experts": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"num_experts": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4}
    | {"attn_layer_period": 2, "attn_layer_offset": 1},
}
REFUSED_KINDS = {
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"lru_width": 16, "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 16},
}
# transformers does not accept these settings for these kinds.
WITHOUT = {"bloom": "max_position_embeddings", "mpt": "max_position_embeddings", "falcon": "head_dim"}


def save_kind(kind, settings, path) -> str:
    torch.manual_seed(0)
    settings = SMALL | {"head_dim": 4} | settings
    settings = {name: value for name, value in settings.items() if name != WITHOUT.get(kind)}
    return save(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)), path)


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
    return save(make_model(scale=2.0, dtype=torch.float32), path)


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


def change_rows(monkeypatch, change):
    """Changes which rows of the cache are repeated or kept."""
    original = empg.DynamicCache.reorder_cache
    changed = lambda cache, rows: original(cache, torch.tensor(change(rows.tolist())))
    monkeypatch.setattr(empg.DynamicCache, "reorder_cache", changed)


def prompts_in_turn(monkeypatch):
    """The cache is repeated as a whole, and not prompt by prompt."""
    change_rows(monkeypatch, lambda rows: [0, 1, 0, 1] if rows == [0, 0, 1, 1] else rows)


def wrong_rows_dropped(monkeypatch):
    """The cache keeps as many rows as it should, but the first ones."""
    change_rows(monkeypatch, lambda rows: rows if rows == [0, 0, 1, 1] else list(range(len(rows))))


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
@pytest.mark.parametrize("make", [functools.partial(save_kind, "qwen2", {}), peaked], ids=["usual", "peaked"])
def test_a_model_is_tried_on_unlikely_tokens_and_dropped_rows(make, fault, tmp_path, monkeypatch):
    """check_model passes a model, also one that is nearly sure of each token, and refuses it if sampling or
    log-probabilities were wrong for it."""
    name = make(tmp_path)
    empg.check_model(name)
    fault(monkeypatch)
    with pytest.raises(ValueError, match="models of its kind"):
        empg.check_model(name)


def test_long_rope_is_not_crossed():
    """For a model with long rope, room_for_responses counts up to the length that it was first trained on, less the
    prompt, so that no text reaches the length beyond which its keys would be rotated in another way."""
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


# ------------------------------ The update ------------------------------


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


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_update_has_the_gradient_of_the_whole_batch(budget):
    """Neither micro-batches nor skipping advantage 0 change the gradient of Eq. 12."""
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


def test_micro_batches_hold_every_trajectory_once_within_the_limit():
    """Of random lengths every trajectory is in one micro-batch; each is within the limit or has one trajectory; and
    sorting by length needs fewer padded tokens than passes of as many rows as the longest row allows."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": [0] * (40 + 9 * (i // 8)), "response": [0] * int(rng.integers(1, 200))} for i in range(64)]

    def length(row):
        return len(row["prompt"]) + len(row["response"])

    batches = empg.micro_batches(rows, 1000)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    longest = [max(map(length, batch)) for batch in batches]
    padded = [len(batch) * length_of_row for batch, length_of_row in zip(batches, longest)]
    assert all(tokens <= 1000 or len(batch) == 1 for tokens, batch in zip(padded, batches))
    assert any(len(batch) > 1 for batch in batches)
    assert sum(padded) < 0.8 * 64 * max(map(length, rows))
    assert longest == sorted(longest, reverse=True)
    too_long = {"prompt": [1] * 9, "response": [1]}
    assert empg.micro_batches([too_long], 1) == [[too_long]]


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


def check_kl_term(kl_of_response):
    """With β the gradient is that of the loss plus β times the summed KL of every trajectory, also those of advantage
    0. `kl_of_response` gets the log-probabilities of all tokens, under both models, and the response."""
    model = make_model()
    reference = make_model(seed=1).requires_grad_(False)
    kl = 0.0
    for prompt, response in zip(PROMPT_OF, RESPONSES):
        log_pi = (plain_logits(model, prompt, response) / 0.7).log_softmax(-1)
        log_ref = (plain_logits(reference, prompt, response) / 0.7).log_softmax(-1)
        kl += kl_of_response(log_pi, log_ref, response)
    (plain_loss(model, ADVANTAGES, 0.7) + 0.3 * kl / len(RESPONSES)).backward()
    expected = flat_grad(model)
    followed, statistics = gradient_followed(
        model, reference=reference, beta=0.3, temperature=0.7, micro_batch_tokens=40
    )
    torch.testing.assert_close(followed, expected, rtol=1e-4, atol=1e-5)  # for the KL the logits are float32
    assert statistics["kl"] == pytest.approx(kl.item() / sum(map(len, RESPONSES)), rel=1e-5)


def test_kl_term_has_its_gradient():
    """The KL of a trajectory is the exact one, summed over its tokens."""
    check_kl_term(lambda log_pi, log_ref, response: (log_pi.exp() * (log_pi - log_ref)).sum())


# ------------------------------ Tasks: problems, prompts and grading ------------------------------

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}{{ '<|bot|>' if add_generation_prompt }}"


def test_chat_templates_and_the_tokens_that_stop():
    """The prompt follows the chat template or is plain, and braces in it are safe; EOS, the generation config's and the
    token with which the template closes an answer, as a base model often does, all end a response."""
    tokenizer = make_tokenizer()
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

    # 3) A token before what the model says, as templates of reasoning models write one, does not end a response.
    tokenizer.chat_template = CHAT.replace("{{ m.content }}<end>", "<end>{{ m.content }}")
    assert empg.stop_tokens(tokenizer, model) == [1, 7]


def test_the_token_that_ends_a_response_is_not_in_its_text(tmp_path, monkeypatch):
    """A response's text ends with its last word, also if the tokenizer does not know the end token as a special one."""
    name = save(make_model(dtype=torch.float32), tmp_path)
    tokenizer, model = empg.load_model(name)
    monkeypatch.setattr(empg, "stop_tokens", lambda *_: [1, 5])  # the second one is a digit
    problems = [{"prompt": [4, 5], "answer": ""}]
    config = empg.Config(task="sums", num_samples=64, max_new_tokens=8)
    trajectories = empg.sample_trajectories(model, tokenizer, empg.TASKS["sums"], problems, config)
    ended = [each for each in trajectories if each["response"][-1] == 5]
    assert len(ended) > 5
    for each in ended:
        assert each["text"] == tokenizer.decode(each["response"][:-1], skip_special_tokens=True)


GSM8K = empg.TASKS["gsm8k"]
MATH = empg.TASKS["math-hard"]
# What stands in a box, by kinds. gold :: right | right :: wrong | wrong
BOXES = {
    "gsm8k": r"""
18 :: 18 | \$18 | $18 | €18 | 18€ | 18.00 | 18. | +18 | 18\% | **18** | \textbf{18} | \text{18} :: 1.8 | -18 | 81 | x | 19 | **19** | €19
18 :: 36/2 | \frac{36}{2} | \dfrac{36}{2} | \frac{54}3 | 18/1 :: 3 \times 6 | 18^2 | 18! | 18x | \sqrt{18} | \frac{1}{18} | 36/2/1 | 18/0
18 :: 18 \text{ dollars} | 18 \text {dollars} | 18\text{ km/h} | 18 \mathrm{~km/h} | 18 km/h | 18 cm^2 | 18\text{ m}^{2} :: 19 km/h | 18 m 5 cm | 18^2 cm
18 :: 18 kilometers | 18km | $18 more muffins | 18 dollars per day | \$18/hour | 18^\circ | 18 a day :: 8 kilometers | 18 - tax | 18xyz | 18 to twenty | 18 over three | 18 and Nineteen | 18 a | 18 x | 18 or so
18 :: 18 \text{ in all} | \boxed{18} | 18^\circ \text{C} | 18 for the two of them | 9*2 = <<9*2=18>>18 :: 18?? | 18 or not | 18 below zero | negative 18 | 17 \boxed{18} | \boxed{17}\boxed{18} | 18 squared dollars | 18 \text{ thousand} | 18 dozen | 18k | 18M | 18 and a half | 18 squared | 18 million | 18 hundredths | 18 \text{ if } x \text{ is odd}
18 :: x = 18 | \text{Total} = 18 \text{ dollars} | 2 \cdot 9 = 18 | x = 20 - 2 = 18 | Total: 18 :: 18 = 2 \cdot 9 | 2x = 18 | x^2 = 18 | -x = 18 | cost - 5 = 18 | half = 18 | cost or x = 18
18 :: 20 \text{ dollars} - 2 \text{ dollars} = 18 \text{ dollars} :: A = 5, B = 18 | x = 3 \text{ or } x = 18 | x = 3 \quad x = 18 | x=3 x=18 | x \ge 18 | x \ne 18
18 :: 18 :: 17, 18 | \{17, 18\} | 17 or 18 muffins | 17 \text{ or } 18 | 18 \text{ or 19} | 18 and nineteen | 17-18 | 17–18 | 17; 18 | \pm 18 | \approx 18 | 17 18
1800 :: 1800 | 1,800 | 1{,}800 | 1,\!800 | 1\,800 | \$1,800.00 :: 1 | 800 | 1, 800 | 1 800 | 18,00 | 1,800,1 | 1{,}801
.5 :: .5 | 0.5 | \frac12 | 1/2 | 0.50 :: 5 | 50 | 1/20 | .05 | 2/1 | 0,5
2.5 :: 2.5 | 2 1/2 | 2\frac{1}{2} | 2\frac12 \text{ hours} | 5/2 :: 2 | 1/2 | 2, 1/2 | 2 \text{ hours } 30 \text{ minutes} | 2 \cdot 1/2 | 2 1/3
-5 :: -5 | −5 | -5.0 | -\$5 | \$-5 :: 5 | 10 - 5 | 3-5 | −50 | \text{minus } 5
5 :: 5 \text{ apples} | 5:00 | 5:00 PM | 5:00 \text{ p.m.} | 5 PM :: 5:30 | 5:05 | 5:00:30 | 17:5 | 5 \text{ PM or } 6 \text{ PM}
5 :: 5 \text{ hours} :: 5 \text{ hours } 30 \text{ minutes} | 5 \text{ hours and } 30 \text{ minutes} | 5 \text{ feet } 6 \text{ inches} | 5 \text{ cm} \times 4 \text{ cm} | 5 hours thirty minutes | 5 \text{ hours and a half}
18 :: 36 \div 2 = 18 | 36 ÷ 2 = 18 | 18lbs | 18mph :: x² = 18 | 18 \div 2 | 18(of 20) | S = 18(\text{sum of the faces})
5 :: 5\text{ m} :: 5 \text{ dollars}, 6 \text{ dollars} | 5 \text{ to } 6 | 5 \text{ if } x > 0, 4 \text{ otherwise} | 5 \text{ pounds } 8 \text{ ounces} | 5\text{m }20\text{s}
""",
    "math-hard": r"""
5 :: 5 | 5.0 | 5. | x = 5 | 3+2 = 5 | \text{Area} = 5 | 5 \text{ cm}^2 | \$5 | m + n = 5 | \boxed{5} | 5 cm :: 6 | -5 | x \ge 5 | 5x | 4 = 5 | x = 4 = 5 | \text{half} = 5
18 :: 18 | \frac{36}{2} | \frac {36} {2} | {18} | 36/2 | \theta = 18 | 18.0 :: \sqrt{324} | 6 \cdot 3 | \sqrt[3]{5832} | \binom{18}{17} | 3!+12 | \log_2 2^{18} | 17+1 | 1.8E1 | 18.0000001
18 :: A = 18 | f(2) = 18 | x = 9 \cdot 2 = 18 | AB = 18 | a_1 = 18 :: 2x = 18 | x^2 = 18 | -x = 18 | \log x = 18 | x + 1 = 18 | x = 18 = y
18 :: 18 \text{ inches} | 18 kilometers | 18 \mathrm{ cm} | 18 \text {dollars} :: 18 \text{ and a half} | 18 \text{ feet } 6 \text{ inches} | 18 \text{ thousand}
18 :: 18 :: 18 \text{ dollars}, 19 \text{ dollars} | 18 \mbox{ or } 19 | \mathrm{18~or~19} | 18s | 18 h | 18_9 | 18! | 18 + x | 1 8
3 :: 3 :: 3, 4 | 3 \text{ or } 4 | 3 or 4 | \{3, 4\} | (3, 4) | 3 \quad 4 | 3; 4 | \pm 3 | 3 \text{ or 4} | x = 3, x = 4 | 3:4 | x = (3, 4)
-\frac{3}{4} :: -0.75 | \frac{-3}{4} | - \tfrac34 | −3/4 | -\frac{6}{8} :: \frac{3}{4} | -\frac{4}{3} | -3 | -\frac34s | -\frac{3}{4}, 1
22^\circ :: 22 | 22^{\circ} | 22 \text{ degrees} | 22° | 22 degrees :: 23^\circ | 22^2 | 22^\circ \text{ or } 158^\circ | -22 | 22^\circ, 23^\circ
\text{(A)} :: A | (A) | \textbf{(A)} | \text{A} | \mathrm{A} :: B | \text{(B)} | A, B | \text{A or B} | \text{(AB)}
\text{Evelyn} :: Evelyn | \text{Evelyn} | \textbf{Evelyn} | \mathrm{Evelyn} | \text{ Evelyn } :: \text{Evelyn or Carla} | \text{Carla} | E | \text{Evelyn, Carla} | x
3 \text{ or more} :: 3 \text{ or more} :: 3 | 4 | 3, 4
D, E :: D,E | E, D | \text{D, E} | \text{D and E} | D \text{ and } E :: D | D, F | D, E, F | \text{D or F} | E
0,1 :: 1,0 | \{0,1\} | 0 \text{ and } 1 | x = 0 \text{ or } x = 1 | 0, 1 :: 0 | 0,2 | 0,1,2 | 0 \text{ or } 2 | (1, 0, 1) | 2x = 0, 1 | x^2 = 0, 1 | x=0, y=1
\pm 7 :: \pm 7 | 7, -7 | -7, 7 | x = \pm 7 | 7 \text{ or } -7 :: 7 | -7 | \pm 8 | 7, 7, -8 | 0
12x :: 12x | 12 x | 12 \cdot x | x \cdot 12 | y = 12x :: 6x+6x | (6+6)x | 1 2x | 12 | 12y | 2x | 12x^2
2s :: 2 s | 2 \cdot s | s \cdot 2 | s+s | 2s. :: \overline{2s} | 2 | 2t | \$2 | 4 | 2 \text{ s}^2
\pi r^2 h :: \pi h r^2 | h \pi r^2 | \pi r^2h | r^2 h \pi | \pi \cdot r^2 \cdot h :: \pi r^2 | \pi r^2 d | r^2 h | \pi r h | \pi r^2 \text{ h}
9\pi :: 9π | 9 \pi \text{ cm}^2 | A = \pi r^2 = 9\pi | 9 \cdot \pi | \pi \cdot 9 | 9\pi \approx 28.3 :: \pi 3^2 | \pi \cdot (1+2)^2 | 9 | 9\pi r | 28.27 | \pi | 9 + \pi
28_9 :: 28_9 | 28_{9} | 28 | x = 28_9 | 28_{9}. :: 28_8 | 28_{10} | 27_9 | 26 | 28_9, 1
\frac{1}{2004!} :: \frac{1}{2004!} | \dfrac{1}{2004!} | 1/2004! | \frac1{2004!} | x = \frac{1}{2004!} :: \frac{1}{2006!} | \frac{1}{2003!} | -\frac{1}{2004!} | 0 | \frac{2}{2004!}
10^{-9} :: 10^{-9} | 0.000000001 | \frac{1}{10^9} | 1 / 10^9 | x = 10^{-9} :: 10 \cdot 10^{-10} | 10^{-8} | 0 | 2 \cdot 10^{-9} | -10^{-9} | 10^9
\frac \pi4 + 2 - \sqrt2 :: \frac{\pi}{4} + 2 - \sqrt{2} | 2-\sqrt2+\frac{\pi}{4} | \frac\pi4+2-\sqrt 2 :: \frac{\pi}{4} | 2 | \frac{\pi}{4}+2+\sqrt2
\frac{8}{3} :: 2 2/3 | 2\frac{2}{3} | 8/3 | \tfrac83 | \frac{16}{6} :: 2 | \frac43 | 2 \cdot 2/3 | 2, 2/3 | 2.66
237.5\% :: 237.5 | 237.5\% | 237.5% | 237.50 | \frac{475}{2} :: 238 | 23.75 | 237 | 237.5, 1 | -237.5
1800 :: 1800 | 1,800 | 1\,800 | 1{,}800 | 1,\!800 | x = 1,800 :: 1 | 800 | 1, 800 | 180 | 18{,}00
(-\infty, 2) \cup (3, \infty) :: x < 2 \text{ or } x > 3 | (-\infty,2)\cup(3,\infty) | x<2 or x>3 | t < 2 \text{ or } t > 3 :: x < 2 | [-\infty,2) \cup (3,\infty) | x < 3 \text{ or } x > 2 | x \le 2 \text{ or } x \ge 3
[0, 1) :: [0,1) | [0, 1) | \left[0,1\right) | x \in [0,1) | 0 \le x < 1 :: (0,1) | [0,1] | 0, 1 | x \ge 0 | x^2 = [0,1)
(3, 4) :: (3,4) | (3, 4) | \left(3,4\right) | (x,y) = (3,4) | (A, B) = (3, 4) :: 3, 4, 5 | (4,3) | 3 | (3, 4, 5) | x^2 = (3,4) | 3, 4 | \{3,4\} | [3,4] | y=4, x=3
(-2, 2) :: (-2,2) | -2 < x < 2 | \left(-2,2\right) | x \in (-2,2) | (-2, 2). :: x^2 < 4 | |x| < 2 | -4 < 2x < 4 | -2 \le x \le 2 | x < 2 | \{-2, 2\} | -2, 2
14\sqrt{15} :: 14 \sqrt{15} | 14 \cdot \sqrt{15} | \sqrt{15} \cdot 14 | x = 14\sqrt{15} | 14\sqrt{15} \text{ cm} :: \sqrt{2940} | \sqrt{14 \cdot 14 \cdot 15} | \sqrt{14^2 \cdot 15} | 54.22 | \sqrt{((1+1)(1+1)+1)} | 14\sqrt{16} | 15\sqrt{14} | 14 | \sqrt{7!}
4(3-x)(3+x) :: 4(3+x)(3-x) | 4 (3 - x) (3 + x) | (3-x) \cdot 4(3+x) | 4(x+3)(3-x) | -4(x-3)(x+3) :: 36-4x^2 | 4(9-x^2) | (3-x)(3+x) | 4(3-x) | 4(3-x)(3-x) | 4(3^2-x^2) | 4\cdot 3\cdot 3-4x\cdot x
\frac{x^2}{16}-\frac{y^2}{9}=1 :: \frac{x^2}{16} - \frac{y^2}{9} = 1 | x^2/16-y^2/9=1 :: \frac{x^2}{9}-\frac{y^2}{16}=1 | \frac{x^2}{16}+\frac{y^2}{9}=1 | 1
\text{Monday} :: Monday | \text{Monday} | \textbf{Monday} | \mathrm{Monday} | \text{ Monday } :: noMday | \text{Tuesday or } = Monday | Tuesday | \text{Monday or Tuesday} | M
x^2+2x+1 :: (x+1)^2 | 1 + 2x + x^2 | x(x+2)+1 | y = x^2+2x+1 | (1+x)(1+x) :: x^2+2x | (x+1) | x^2+2x+1, 1 | (x+1)^3 | x^2 + 2x + 2
\frac{1}{2} :: .5 | 0.5 :: 5 | .05
.0625 :: .0625 | 0.0625 | \frac{1}{16} :: 625 | 0.625
75 :: 75 | 75. :: .75 | 0.75
-1, 3 :: -1, 3 | x=-1 \quad \text{or} \quad x=3 | -1, \quad 3 | \{-1, 3\} :: -1 < x < 3 | -1 \le x \le 3 | (-1, 3) | [-1, 3]
\frac{R}{2} :: \frac{R}{2} | R/2 | 0.5R :: \frac{r}{2} | r/2
2A + a :: 2A+a | 2A + a. :: 2a+A | 2A+A | 3a
-221_3 :: -221_3 | -221 | -221_{3} :: 221 | -221_4 | -25
\text{odd} :: odd | \text{Odd} | \text{odd} :: \text{even} | od | \text{not odd}
y = 2x+3 :: y=3+2x | 2x + 3 = y | y = 2x + 3. | y-3=2x | 2x+3 :: y = 2x - 3 | y = 2x | y = 3x+2 | x = 2y+3 | 0
14 - i :: 14 - 1.0i | 14-i | -i + 14 | 14 - 1i | z = 14 - i :: 14 + i | 14 | -i | 14 - 2i | 14i
12\pi :: 12\pi \, \text{square units} | 12\pi \text{units} :: 12\pi \, \text{or more} | 12\pi \text{or } 13\pi
120 :: \binom{10}{3} = 120 | 5! = 120 | \dbinom{10}{3} = 120 :: 5! | \binom{10}{3} | 5! = 121
\frac{1}{12} :: \frac{1}{12} \approx 0.083 :: 0.083 | \frac{1}{11} \approx 0.083
(2, 12) :: P = (2, 12) | (2,12) :: 2P = (2,12) | (12, 2) | P = (2, 13)
1 - \frac{1}{2^{100}} :: 1 - \frac{1}{2^{100}} | 1-\frac1{2^{100}} :: 1 + \frac{1}{2^{100}} | 1 - \frac{1}{2^{99}} | 1
\begin{pmatrix} 1 \\ 2 \end{pmatrix} :: \begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix} :: -\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix}s | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
""",
}


def test_mistake_list_of_guesses_rewarded():
    """A box is right if it holds the answer in any usual form, and wrong if it holds more, or lists candidates."""
    for name, table in BOXES.items():
        for line in table.strip().splitlines():
            [gold], right, wrong = (part.strip().split(" | ") for part in line.split("::", 2))
            # The data sets write their answers in these forms.
            answers = (gold, f"2 + 2 = <<2+2=4>>4\n#### {gold}", rf"We find $\boxed{{{gold}}}$.")
            for text in right + wrong:
                response = rf"Let $x = \boxed{{77}}$. So it is $\boxed{{{text}}}$."
                for answer in answers:
                    assert empg.TASKS[name].reward(response, answer) == (text in right), (name, gold, text)


# response to a problem of GSM8K :: the number that is its answer
TEXTS = r"""
#### 72 :: 72 | #### $1,200.00 :: 1,200 | **$18** :: 18 | A: 1,200 :: 1200 | - 18 apples :: 18 | Thus she has 18! :: 18
#### 18 dollars a day :: 18 | #### Answer: 18 :: 18 | #### -5 :: -5 | #### x = 18 :: 18 | 2 + 40 = 42¶#### 42¶and so on :: 42
#### 5 and then 7 8 :: None | #### Step 2: Now we take… :: None | #### 2. Take the eggs :: None | #### 17 or 18 :: None
#### Step 1: Eggs¶16 - 3 = 13¶#### Step 2: We take 2… :: None | #### x, 18 :: None | #### 18… :: None | #### 1 egg, 2 eggs :: None
The answer is: 18. :: 18 | The answer is 18. Let me double check: 3*6=18 and 2+2=4 :: 18 | The answer is **18** apples. :: 18
The final answer is $18.50. :: 18.5 | So the answer is 144 - 24 = 120. :: 120 | The answer is 5. Wait. The answer is 18. :: 18
The final answer is:¶\[ 18 \] :: 18 | The answer is 18, which is what was asked for. :: 18 | The answer is 1/2. :: 0.5 | The answer is −5. :: -5
The answer is 17 or 18. :: None | The answer is 18, 19 or 20. :: None | The answer is not 18. :: None | The answer is 5:30 PM. :: None
The answer is 18 = 2 * 9. :: None | The answer is 18 thousand. :: None | The answer is between 17 and 18. :: None | The answer is 2x = 18. :: None
The answer is 18 because 9*2 is 18. :: 18 | So she makes <<9*2=18>>18 dollars. :: 18 | So she arrives at 5:00 PM. :: 5 | So each gets 2 1/2 hours. :: 2.5 | So he eats 1/4. :: 0.25 | It is −5 degrees. :: -5 | There are 5 * 241 = 1,205 boxes :: 1205
10-3 :: None | there are 10 -3 :: None | * 18 apples :: 18 | #### Step 2: Find it¶So it is 18. :: 18 | 18 = 2 * 9 :: None | It is 17 or 18. :: None | pages 17-18 :: None | from 17 to 18 :: None | 17 and 18 :: None | 16, 17, 18 :: None
So she gains minus 18. :: None | It is not 18. :: None | So it is half of 18. :: None | It is seventeen or 18. :: None
She has at least 18 apples. :: None | It is more than $18. :: None | It is **not** 18, or 17. So 18. :: 18 | It is negative 18. :: None
\(\boxed{17}\) or \(\boxed{18}\) :: None | \[\boxed{17}\]¶or¶\[\boxed{18}\] :: None | $\boxed{17} \quad \text{or} \quad \boxed{18}$ :: None
\boxed{\text{Half} = 18} :: None | \boxed{\text{half} = 18} :: None | so \(\boxed{18}\). :: 18 | \boxed{17}. So \(\boxed{18}\) :: 18
on the 18th :: None | in row B18 :: None | 18 thousand :: None | 3 * 6 :: None | at 5:30 :: None | 2024-05-18 :: None | 18 and a half :: None | x - 18 :: None
\boxed{5}. No: \boxed{18}, I hope. 7 :: 18 | so $\boxed {18}$. :: 18 | so $\boxed 18$. :: 18 | so \boxed{18}. I put it in \boxed{}. :: 18
\boxed{17} or \boxed{18} :: None | \boxed{17}, \boxed{18} :: None | \boxed{17}, \boxed{}, \boxed{18} :: None | $x = \boxed{17}$ or $x = \boxed{18}$ :: None | no idea :: None
\boxed{17}\boxed{18} :: None | $\boxed{17}$ or maybe $\boxed{18}$ :: None | \boxed{17} apples or \boxed{18} apples :: None | \boxed{17}/\boxed{18} :: None
$\boxed{17}$ (or $\boxed{18}$) :: None | \boxed{17}¶\boxed{18} :: None | \boxed{17} OR \boxed{18} :: None | $\boxed{17} \lor \boxed{18}$ :: None | \boxed{18}¶\boxed{18} :: 18
It is \boxed{17} or equivalently \boxed{18} :: 18 | I put it within \boxed. So $\boxed{18}$ :: 18 | \boxed{17}. I put it within \boxed… :: None
How many are left if 18 are sold? :: None | Is it 18? It is late. :: None | Is it 17? It is 18. :: 18 | By Step 18 we are done. :: None
17. Find the eggs.¶18. Subtract the eggs that are eaten. :: None | ### Step 18: Multiply by the price. :: None | (18) Multiply by the price. :: None
She sells 12 in the morning and 4… :: None | 2 steps: 1. Add. 2. Take away… :: None | The answer is 18… :: None | The answer is 18 dol… :: None
The answer is 18. Let me check… :: 18 | so \boxed{18}. 2. Check… :: 18 | so \boxed{18… :: None | The answer is 17. So \boxed{18 :: None | \boxed{18 :: None | The answer is 18.… :: None | \boxed{5} or \boxed{18… :: None
"""


@pytest.mark.parametrize("rule", [scoring.number_of, scoring.is_right_formula.__wrapped__])
def test_the_tables_of_what_is_right(rule):
    """What the docstrings of the two rules call right is right, and what they call wrong is wrong."""
    examples = re.findall(r"(right|wrong) for (\S+): +(.*?)\n(?= +(?:right|wrong) for|\n)", rule.__doc__, re.DOTALL)
    assert [verdict for verdict, _, _ in examples] == ["right", "wrong"]
    task = GSM8K if rule is scoring.number_of else MATH
    for verdict, gold, lines in examples:
        for text in re.split(r" \| |\n +", lines):
            assert task.reward(rf"\boxed{{{text}}}", gold) == (verdict == "right"), text


def test_where_the_answer_of_a_response_is():
    """The answer of a response is its last box, else what stands after the last "####" or "answer is", else the last
    number, if it was not cut off, and if it is one number, with nothing joined to it. In MATH only a box counts."""
    for case in re.split(r"\n| \| ", TEXTS.strip()):
        response, gold = case.replace("¶", "\n").split(" :: ")
        if gold == "None":
            assert scoring.number_of(scoring.final_answer(response) or "") is None, response
        else:
            assert GSM8K.reward(response, gold) == 1, response
            assert GSM8K.reward(response, "77") == 0, response
            assert MATH.reward(response, gold) == (scoring.last_boxed(response) is not None), response
    for text in ("", "5", r"\boxed{}", r"\boxed{5", r"\boxed", r"\boxed{ }"):
        assert not MATH.reward(text, "5"), text
    assert scoring.last_boxed(r"so \boxed{\frac{1}{\sqrt{2}}}, as") == r"\frac{1}{\sqrt{2}}"


def test_long_sums_do_not_stop_a_run():
    """A sampled text may repeat itself. Reading it takes no longer for it: with a bad pattern, for ever."""
    for plus in (" + ", r" \, + \, ", "+"):
        for term in ("5", "ABC", "5 apples", "x"):
            text = plus.join([term] * 60)
            for end in (r" + \ldots = 110", " = 110", "! = 18", ""):
                assert scoring.number_of(text[:200] + end) in (None, 110)
                assert MATH.reward(rf"\boxed{{{text[:200]}{end}}}", "x + 1") == 0


# A solution in MATH :: right | right :: wrong | wrong
SOLUTIONS = r"""
From $x^2-x-2=0$ we get $x = \boxed{2}$ or $x = \boxed{-1}$. :: 2, -1 | -1, 2 | x = 2 \text{ or } x = -1 :: -1 | 2 | 1, -2
The roots are $\boxed{2}$, $\boxed{3}$, and $\boxed{7}$. :: 2, 3, 7 | 7, 2, 3 :: 7 | 3, 7 | 2 | 2, 3, 8
So $\boxed{5}$ and $\boxed{6}$. :: 5, 6 | 6,5 | 5 \text{ and } 6 :: 6 | 5 | 56
So it is $\boxed{\frac{2\sqrt{53}+53}{53}}$. Then $a+b+c+d$ is $\boxed{161}.$ :: 161 :: \frac{2\sqrt{53}+53}{53} | 53, 161
We find $\boxed{\frac{25}{13}} = \boxed{1\frac{12}{13}}$ units. :: \frac{25}{13} | 1\frac{12}{13} | 25/13 :: 25, 13 | 1
If $x^2=9$ and $x$ is positive, then $x=\boxed 3$. :: 3 :: 9 | -3
It is \(x = \boxed{2}\) or \(x = \boxed{-1}\). :: 2, -1 | -1, 2 :: -1 | 2
It is $\boxed{2}, \quad \boxed{-1}$. :: 2, -1 | -1, 2 :: -1 | 2
It is $x = \boxed{2} \quad \text{or} \quad x = \boxed{-1}$. :: 2, -1 | -1, 2 :: -1 | 2
It is $\boxed{2}$; $\boxed{-1}$. :: 2, -1 | -1, 2 :: -1 | 2
It is **$\boxed{2}$** or **$\boxed{-1}$**. :: 2, -1 | -1, 2 :: -1 | 2
It is $\boxed{87}.$ Alternatively, note that it is $\boxed{87}.$ :: 87 :: 87, 88 | 8
"""


def test_solutions_with_several_boxes():
    """The boxes of a solution are a list if "or", "and" or a comma joins them in a sentence. Otherwise the last one
    counts."""
    for line in SOLUTIONS.strip().splitlines():
        [solution], right, wrong = (part.strip().split(" | ") for part in line.split("::"))
        for text in right + wrong:
            assert MATH.reward(rf"So it is $\boxed{{{text}}}$.", solution) == (text in right), (solution, text)


def wrong_numbers(gold: str):
    """Wrong answers, made by rule from a right one."""
    yield from (
        gold[:-1] + str((int(gold[-1]) + 1) % 10),
        gold + "1",
        "-" + gold,
        f"{gold}x",
        f"{gold}^2",
        f"2x = {gold}",
    )
    yield from (
        f"{gold}, {int(gold) + 1}",
        f"1, {gold}",
        rf"{gold} \text{{ or }} 1",
        f"1 or {gold}",
        rf"\{{{gold}, 1\}}",
    )
    yield from (rf"{gold} \text{{ hours }} 30 \text{{ minutes}}", rf"{gold} \text{{ dollars}}, 1 \text{{ dollar}}")
    yield from (rf"{gold} \text{{ thousand}}", rf"\frac{{{gold}}}{{7}}", rf"{gold}\frac{{1}}{{2}}", f"{gold}-{gold}1")
    yield from (f"{gold} = 2 * {gold}", rf"x \ge {gold}", f"x, {gold}")


def right_numbers(gold: str):
    """The same answer as models write it."""
    thousands = f"{int(gold):,}"
    yield from (
        gold,
        f"{gold}.",
        f"{gold}.00",
        thousands,
        rf"\${thousands}",
        f"**{gold}**",
        rf"\textbf{{{gold}}}",
        f"x = {gold}",
    )
    yield from (
        thousands.replace(",", "{,}"),
        thousands.replace(",", r"\,"),
        rf"{gold}\%",
        rf"{gold} \text{{ dollars}}",
    )
    yield from (
        rf"{gold}\text{{ km/h}}",
        f"{gold} dollars per week",
        rf"{gold} \text{{ cm}}^2",
        rf"\frac{{{2 * int(gold)}}}{{2}}",
    )
    yield rf"\text{{Total}} = {gold} \text{{ dollars}}"


def wrong_formulas(gold: str):
    """Wrong answers, made by rule from a right one, whose value is not 0 or 1."""
    for digit in list(re.finditer(r"\d", gold))[:3]:
        yield gold[: digit.start()] + str((int(digit[0]) + 1) % 10) + gold[digit.end() :]
    yield from (
        f"-({gold})",
        f"{gold}s",
        f"{gold} h",
        f"{gold}+1",
        f"{gold}_7",
        rf"2x = {gold}",
        f"x^2 = {gold}",
        f"x > {gold}",
    )
    yield from (
        f"{gold}, 12345",
        rf"{gold} \text{{ or }} 12345",
        rf"\{{12345, {gold}\}}",
        rf"{gold} \text{{ and a half}}",
    )
    yield from (rf"{gold} \text{{ hours }} 30 \text{{ minutes}}", rf"{gold} \text{{ feet}}, 19 \text{{ feet}}")
    without_factor = re.sub(r"(?:\\pi|\\sqrt\{[^{}]*\}|[a-z])$", "", gold)
    if without_factor not in ("", gold):
        yield without_factor


def right_formulas(gold: str):
    """The same answer as models write it."""
    yield from (gold, f" {gold} ", f"{gold}.", f"${gold}$", gold.replace(r"\frac", r"\dfrac"), rf"\displaystyle {gold}")
    yield from (re.sub(r",(?!\\!)", ", ", gold), gold.replace("+", " + "))
    if not re.search(r"[=,<>]|\\(?:text|cup|[lg]e)", gold):
        yield from (f"x = {gold}", rf"\text{{Area}} = {gold}", rf"{gold} \text{{ cm}}", rf"{gold} \text{{ cm}}^2")


def some_golds(name: str) -> list[str]:
    """Every tenth answer of the test file of a dataset, or all of them with EMPG_ALL=1."""
    rows = read_rows(SHARED / name / "test.jsonl")
    answers = [row.get("answer") or row["solution"] for row in rows]
    return answers if os.environ.get("EMPG_ALL") else answers[::10]


needs_data = pytest.mark.skipif(not SHARED.exists(), reason="real data sets are not beside the project")


@needs_data
@pytest.mark.parametrize("form", [r"So it is \boxed{%s}.", "The answer is %s.", "#### %s"])
def test_mutations_of_numbers(form):
    """Of the answers of GSM8K, no mutation is right in any place, and every spelling is."""
    for answer in some_golds("gsm8k"):
        gold = scoring.gold_answer(answer).replace(",", "")
        for text in wrong_numbers(gold):
            assert GSM8K.reward(form.replace("%s", text), answer) == 0, (gold, text)
        for text in right_numbers(gold):
            assert GSM8K.reward(form.replace("%s", text), answer) == 1, (gold, text)


@needs_data
def test_mutations_of_formulas():
    """Of the answers of MATH-Hard, no mutation is right, and every spelling is."""
    for answer in some_golds("math_hard"):
        gold = scoring.gold_answer(answer)
        for text in wrong_formulas(gold) if gold not in ("0", "1") else ():
            assert MATH.reward(rf"\boxed{{{text}}}", answer) == 0, (gold, text)
        for text in right_formulas(gold):
            assert MATH.reward(rf"So it is $\boxed{{{text}}}$.", answer) == 1, (gold, text)


@needs_data
@pytest.mark.parametrize(("name", "task"), [("gsm8k", GSM8K), ("math_hard", MATH)])
def test_gold_answers(name, task):
    """The answer of a problem is not right for its neighbour, unless they are equal."""
    answers = some_golds(name)
    golds = [scoring.gold_answer(answer) for answer in answers]
    for answer, gold, other in zip(answers, golds, golds[1:] + golds[:1]):
        is_equal = gold.replace(",", "") == other.replace(",", "")
        assert task.reward(rf"\boxed{{{other}}}", answer) == is_equal, (gold, other)


STRANGE = [*"\\²½{}$%^_=٣", r"9^{9^{9}}", r"\sum_{k=1}^{10^9}k^{99}", "}{", "1/0", "1e999", r"\frac{", r"\text{", "\0"]
STRANGE += ["\ud800", " ", r"\text{" * 40 + "}" * 40, "(" * 100]
STRANGE += [
    text * (20_000 // len(text))
    for text in (r"\frac{", r"\boxed{", "1,", "9", r"\text{or 1} ", "1 1/1 ", "it's ", "####")
]
STRANGE += [
    "5 " + "it's " * 50 + "1",
    r"5 \text{" + "it's " * 50 + "1}",
    r"1}" + " " * 9_000 + r"\boxed{2",
    "1E999999999",
    "9^{9*9^9}",
]
STRANGE += [
    "9^{99!}",
    "(9^9)!",
    r"\log(9999!)",
    "9^9*9^9*9^9!",
    "2^{9*9^9}x",
    r"\sqrt{2}^{9*9^9}",
    "10^{999*999*999}",
    "((9^{99})^{99})^{99}",
]
STRANGE += [r"5\text{}", r"5\text{} \text{}", r"5\mbox{ }", r"5\text{}^2"]


@pytest.mark.parametrize("task", [GSM8K, MATH], ids=["gsm8k", "math-hard"])
def test_grading_never_raises_or_hangs(task):
    """Whatever a model writes, grading returns, and nothing odd is right. (Without a time limit, 9^{9^{9}} would not
    end.)"""
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
    scoring.is_right_formula.cache_clear()
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(MATH.reward, r"\boxed{\frac{36}{2}}", "18").result() == 1
        for text in STRANGE:
            assert threads.submit(MATH.reward, rf"\boxed{{{text}}}", "18").result() == 0, text


# ------------------------------ Part 3: whole runs ------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a random model for the task sums, stored in bfloat16 as hub models are."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save(make_model(scale=0.1, dtype=torch.bfloat16), path)


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
        "dtype": "float32",
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
    assert set(saved) == {"method", "training_problems", *(field.name for field in dataclasses.fields(empg.Config))}
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


def test_no_pass_copies_the_output_layer(tiny, tmp_path, odd_is_right):
    """To multiply the prompts' last column by the weights of a frozen output layer, torch would repeat these for each
    prompt. In bfloat16 on a CPU that is a real copy: 17 GB for 64 prompts to Qwen2.5-0.5B."""
    weights = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.bmm.default:
                weights.add(tuple(args[1].shape[1:]))
            return function(*args, **(kwargs or {}))

    with Products():
        empg.main(options(tiny, tmp_path, steps=1))
    config = load(tiny).config
    assert (config.hidden_size, config.vocab_size) not in weights


def test_a_bfloat16_run_samples_and_computes_in_bfloat16(tiny, tmp_path, odd_is_right, monkeypatch):
    """With --dtype bfloat16 θ* is in bfloat16, and θ stays in float32 while autocast computes in bfloat16."""
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
    """Each iteration, prompt and seed draws anew; one seed gives one run, however many responses are sampled at a
    time."""
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
    """Line 12 as a run computes it: R̃ is smoothed over the whole batch, and b is the mean of the prompt's other
    samples."""
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
    """It samples and learns at --temperature, and evaluates at 0, one response to each problem and no more at a time
    than in training."""
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
    """θ* ← θ at every iteration: whenever trajectories are drawn, the frozen copy has the trained policy's weights. It
    keeps them through all --updates on one buffer, while θ moves on. The learning rate rises during five iterations."""
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


def test_the_reference_stays_at_the_base_model(tiny, tmp_path, odd_is_right, monkeypatch):
    """With --beta the reference stays at the base model, also in a run that is stopped and resumed."""
    placed = []
    spy(monkeypatch, "distribute", lambda _, __, model: placed.append(model))
    more = {"lr": 0.01, "eval_every": 0, "beta": 0.1}
    empg.main(options(tiny, tmp_path / "whole", steps=5, **more))
    reference, _policy = placed
    assert torch.equal(flat(reference), flat(load(tiny)))
    kl = [row["kl"] for row in metrics(tmp_path / "whole")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl) > 1e-5
    for steps in (3, 5):
        empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps, **more))
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("more", [{"eval_problems": 1}, {"eval_every": 0}], ids=["few-held-out", "no-evaluation"])
def test_mistake_held_out_problems_in_training(more, tiny, tmp_path, monkeypatch):
    """A question that stands in both splits is not trained on, even if it differs in spacing or in upper and lower
    case, and however few problems the evaluation uses, if any."""
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


# ------------------------------ Many processes ------------------------------


# To import torch and transformers takes a process seconds. So processes are forked from a server that has imported
# them. It has not imported empg.py, which reads its rank from the environment when it is imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "matplotlib.figure",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.auto.modeling_auto",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.mistral.modeling_mistral",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)
LOGS = tempfile.TemporaryDirectory()
# What such a process does first: it becomes `python SCRIPT ARGUMENTS`, which prints into a file.
BECOME = """
import os, runpy, sys
log = os.open({log!r}, os.O_WRONLY)
os.dup2(log, 1)
os.dup2(log, 2)
os.environ.update({env!r})
sys.argv = {argv!r}
sys.path = [os.path.dirname(sys.argv[0]), *(path for path in sys.path if path not in {paths!r})]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script, *words, **env) -> types.SimpleNamespace:
    """Starts `python SCRIPT WORDS` with these variables in the environment: its process, and the file of what it
    prints."""
    handle, log = tempfile.mkstemp(dir=LOGS.name)
    os.close(handle)
    argv = [str(word) for word in (script, *words)]
    paths = ["", str(HERE), str(HERE / "studies")]  # which pytest has put there
    program = BECOME.format(log=log, env=env, argv=argv, paths=paths)
    process = FORKS.Process(target=exec, args=(program, {}), daemon=True)  # which does not outlive the tests
    process.start()
    return types.SimpleNamespace(process=process, log=Path(log))


def wait(child, code: int = 0) -> str:
    """Waits for the end of a process, which has to have this exit code. Returns what it has printed."""
    child.process.join(200)
    text = child.log.read_text()
    assert child.process.exitcode == code, text
    return text


def start_ranks(processes: int, script, *words) -> list:
    """As torchrun does it, but for watching over them, which takes seconds to start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(script, *words, **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


def watch() -> dict:
    """Lets this process note, in what it returns, what it samples and how it learns. Such a process runs nothing
    else."""
    patch = pytest.MonkeyPatch()
    seen = {"trajectories": [], "gradients": []}

    # 1) Note what is sampled.
    def note_trajectories(args, keywords, rows):
        seen["trajectories"].append([(row["prompt"], row["response"]) for row in rows])

    spy(patch, "sample_trajectories", note_trajectories)

    # 2) Prompts are of unequal length, and only half of them can be rewarded: so the processes differ in work.
    problems = [{"question": "0+" * (i % 4) + f"{i}=", "answer": str(i % 4)} for i in range(100, 150)]
    change(
        patch,
        reward=lambda response, answer: float(len(response) % 2) if int(answer) < 2 else 0.0,
        problems=lambda data, split: problems[:6] if split == "test" else problems[6:],
    )

    # 3) Before each step note the gradient, joined over the processes, and how many numbers this process holds.
    def note_step(optimizer, args, keywords):
        parameters = optimizer.param_groups[0]["params"]
        gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in parameters]
        averages = [tensor for state in optimizer.state.values() for tensor in state.values()]
        tensors = [tensor for tensor in (*parameters, *gradients, *averages) if tensor.ndim]  # not Adam's counters
        seen["held"] = sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)
        seen["gradients"].append(torch.cat([empg.whole(g).flatten() for g in gradients]))

    register_optimizer_step_pre_hook(note_step)

    # 4) A DDP model that outlives its process group can hang.
    original_destroy = empg.dist.destroy_process_group

    def destroy():
        assert not any(type(thing).__name__ == "DistributedDataParallel" for thing in gc.get_objects())
        original_destroy()

    patch.setattr(empg.dist, "destroy_process_group", destroy)
    return seen


def run_watched(file: str, *argv: str) -> None:
    """What a process of this file does, if it is started with this name: a run, and FILE.RANK with what it has
    noted."""
    seen = watch()
    empg.main(list(argv))
    torch.save(seen, f"{file}.{empg.RANK}")


WATCH = (__file__, "run_watched")
UNEVEN = {"num_samples": 6, "micro_batch_tokens": 60, "steps": 3, "prompts_per_step": 5}
KL = {"beta": 0.1, "updates": 2}
SHARD = ["--shard", "--gradient-checkpointing"]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Runs in one process, without and with a KL: their options, what they have noted, and their directories."""
    path = tmp_path_factory.mktemp("alone")
    kinds = {"plain": UNEVEN, "kl": UNEVEN | KL}
    children = [
        start(*WATCH, path / kind, *options(tiny, path / f"run-{kind}", **more)) for kind, more in kinds.items()
    ]
    for child in children:
        wait(child)
    return {kind: (more, torch.load(path / f"{kind}.0"), path / f"run-{kind}") for kind, more in kinds.items()}


@pytest.mark.parametrize(
    ("processes", "kind", "flags"), [(2, "plain", []), (4, "kl", []), (2, "kl", SHARD), (4, "plain", SHARD)]
)
def test_mistakes_statistics_per_rank_and_mean_over_ranks(alone, processes, kind, flags, tiny, tmp_path):
    """Runs on 2 and 4 processes, whole (DDP) or sharded (FSDP), sample the same trajectories as a run on one, follow
    its gradients within 1e-5 and record its metrics; sharded, each process holds its share of the weights."""
    more, single, run_alone = alone[kind]
    children = start_ranks(processes, *WATCH, tmp_path / "seen", *options(tiny, tmp_path / "run", *flags, **more))
    for child in children:
        wait(child)
    same_metrics(metrics(run_alone), metrics(tmp_path / "run"))
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


def test_a_model_that_also_reads_images(tmp_path):
    """Its parameters for images get no gradient. Two processes do not wait for one, and train as one process does."""
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=SMALL | {"head_dim": 8, "eos_token_id": 1, "pad_token_id": 0},
        vision_config=images | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        **{name: 3 for name in ("image_token_id", "boi_token_index", "eoi_token_index")},
    )
    torch.manual_seed(0)
    model = save(Gemma3ForConditionalGeneration(config), tmp_path / "model")
    for processes in (1, 2):
        words = options(
            model, tmp_path / str(processes), steps=4, lr=1e-5, prompts_per_step=8, num_samples=8, eval_every=0
        )
        for child in start_ranks(processes, *WATCH, tmp_path / "seen", *words):
            wait(child)
    same_metrics(metrics(tmp_path / "1"), metrics(tmp_path / "2"))
    assert sum(row["grad_norm"] > 0 for row in metrics(tmp_path / "1")) > 1


def run_with_a_broken_disk(module: str, *argv: str) -> None:
    """A command whose second process cannot load the model."""

    def load_model(*args):
        if empg.RANK == 1:
            raise ValueError("the disk of this machine is broken")
        return original(*args)

    original, empg.load_model = empg.load_model, load_model
    {"empg": empg, "eval": scoring}[module].main(list(argv))


@pytest.mark.parametrize("module", ["empg", "eval"])
def test_an_error_of_any_process_is_said(module, tiny):
    """If the model cannot be loaded in the second of two processes only, both end with code 2, and the first says
    why."""
    words = [f"--model={tiny}", "--task=sums", "--device=cpu", "--max-new-tokens=8"]
    first, second = start_ranks(2, __file__, "run_with_a_broken_disk", module, *words)
    assert wait(first, code=2).splitlines()[-1] == "error: the disk of this machine is broken"
    assert wait(second, code=2) == ""


# ------------------------------ Checkpoints and kills: real signals to real processes ------------------------------


def test_mistake_adams_averages_not_in_the_checkpoint(tiny, tmp_path, odd_is_right):
    """A run that is stopped after four of six iterations and resumed, and resumed again when it is done, ends as one
    that was not stopped, bit for bit, and keeps one checkpoint."""
    empg.main(options(tiny, tmp_path / "whole", steps=6, **KL))
    for steps in (4, 6, 6):
        empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps, save_every=3, **KL))
        assert [path.name for path in (tmp_path / "parts").glob("check*")] == [f"checkpoint-{steps:06d}"]
    same_run(tmp_path / "whole", tmp_path / "parts")


KILLS = int(os.environ.get("EMPG_KILLS", "1"))


def test_no_kill_loses_more_than_the_work_since_the_last_checkpoint(tiny, tmp_path):
    """A run that SIGKILL ends at random moments, also while it writes, resumes each time from its newest checkpoint,
    and ends with the metrics and weights, bit for bit, of a run that nothing disturbed."""
    more = {"steps": 6 * KILLS, "save_every": 1}
    command = [*WATCH, tmp_path / "seen", *options(tiny, tmp_path / "run", "--resume", **more)]
    undisturbed = start(*WATCH, tmp_path / "seen-undisturbed", *options(tiny, tmp_path / "undisturbed", **more))
    random_seconds = np.random.default_rng()  # without a seed on purpose: other moments in every run of the tests
    saved = 0
    for _ in range(KILLS):
        child = start(*command)
        # Wait for its first iteration, and a little more.
        while " reward " not in child.log.read_text() and child.process.is_alive():
            time.sleep(0.01)
        assert saved == 0 or f"Resuming after iteration {saved}\n" in child.log.read_text()
        time.sleep(random_seconds.uniform(0, 0.5))
        child.process.kill()
        child.process.join()
        saved = max([saved, *(int(path.name[-6:]) for path in (tmp_path / "run").glob("checkpoint-*"))])
    last = wait(start(*command))
    wait(undisturbed)
    assert saved == 0 or f"Resuming after iteration {saved}\n" in last
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def run_killed_in_a_save(killed: str, moment: str, *argv: str) -> None:
    """A run that kills itself once, at a moment of its second iteration, and then makes the file `killed`."""
    patch = pytest.MonkeyPatch()

    def kill_once():
        if not Path(killed).exists():
            Path(killed).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(module, name, is_the_moment):
        original = getattr(module, name)

        def watched(path, *args, **keywords):
            if is_the_moment(Path(path), *args):
                kill_once()
            return original(path, *args, **keywords)

        patch.setattr(module, name, watched)

    if moment == "unnamed":
        before(Path, "rename", lambda path, target: target.name == "checkpoint-000002")
    if moment == "two":
        before(shutil, "rmtree", lambda path: path.name == "checkpoint-000001")

    # The file is half written when the kill comes.
    def is_half_written(path, text):
        name, marker = {"metrics": ("metrics.jsonl", '"step": 2'), "config": ("config.json", "")}[moment]
        if not path.name.startswith(name) or marker not in text:
            return False
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        return True

    if moment in ("metrics", "config"):
        before(Path, "write_text", is_half_written)
    watch()
    empg.main(list(argv))


def test_a_kill_within_a_save(alone, tiny, tmp_path):
    """A run that SIGKILL ends when a checkpoint is written and has no name yet resumes from the one before. Ended when
    the new one has its name, and the one before is still there, it resumes from the new one. Ended in the middle of
    writing metrics.jsonl or config.json, it leaves the file before whole, or none."""
    more, _, undisturbed = alone["plain"]
    resumes = {"unnamed": "after iteration 1\n", "two": "after iteration 2\n", "metrics": "after iteration 1\n"}
    commands = {}
    for moment in (*resumes, "config"):
        words = [tmp_path / f"killed-{moment}", moment]
        run = options(tiny, tmp_path / moment, "--resume", **more, save_every=1)
        commands[moment] = [__file__, "run_killed_in_a_save", *words, *run]

    killed = {moment: start(*command) for moment, command in commands.items()}
    for child in killed.values():
        wait(child, code=-signal.SIGKILL)
    assert {row["step"] for row in metrics(tmp_path / "metrics")} == {0, 1}
    assert [moment for moment in commands if not (tmp_path / moment / "config.json").exists()] == ["config"]

    resumed = {moment: start(*command) for moment, command in commands.items()}
    for moment, child in resumed.items():
        text = wait(child)
        assert f"Resuming {resumes[moment]}" in text if moment in resumes else "Resuming" not in text
        same_run(undisturbed, tmp_path / moment)
        assert [path.name for path in (tmp_path / moment).glob("check*")] == ["checkpoint-000003"]


def run_killed_once(killed: str, *argv: str) -> None:
    """A run whose second process kills itself once, just before it writes its share of a checkpoint. The first one is
    busy at that time, as a GPU may be, and learns of it from torchrun, and not from a broken connection."""

    def save(state, **keywords):
        if state["step"] == 2 and not Path(killed).exists():
            if empg.RANK == 1:
                Path(killed).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(4)
        original(state, **keywords)

    original, empg.dcp.save = empg.dcp.save, save
    watch()
    empg.main(list(argv))


def test_torchrun_restarts_after_the_kill_of_a_rank(alone, tiny, tmp_path):
    """When SIGKILL ends one rank of a sharded run just before it writes its share of a checkpoint, torchrun restarts
    the run, which resumes from the checkpoint before and ends with the metrics of one process."""
    more, _, run_alone = alone["plain"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    words = [tmp_path / "killed", *options(tiny, tmp_path / "run", "--resume", "--shard", **more, save_every=1)]
    command = [str(word) for word in (*torchrun, __file__, "run_killed_once", *words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert "Resuming after iteration 1" in done.stdout
    same_metrics(metrics(run_alone), metrics(tmp_path / "run"))


def run_three_times(output: str, *argv: str) -> None:
    """A program that calls `main` several times."""
    for number in range(3):
        empg.main([*argv, f"--output={output}-{number}"])


def test_a_program_may_call_main_several_times(tiny, tmp_path):
    """Under torchrun, the processes still find each other at the second call, and all calls do the same. A process group
    that the program has made is still there afterwards."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [word for word in options(tiny, tmp_path, steps=1) if not word.startswith("--output")]
    command = [str(word) for word in (*torchrun, __file__, "run_three_times", tmp_path / "run", *words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, *others = (metrics(tmp_path / f"run-{number}") for number in range(3))
    for other in others:
        same_metrics(first, other)
    empg.dist.init_process_group("gloo", store=empg.dist.HashStore(), rank=0, world_size=1)
    try:
        empg.main(options(tiny, tmp_path / "own", steps=1))
        assert empg.dist.is_initialized()
    finally:
        empg.dist.destroy_process_group()


def test_restarts_need_a_store_of_their_own(monkeypatch, capfd):
    """On several machines, restarts with torchrun's own store, in which new processes wait for those that died, are
    refused in a line that names the remedy. One machine, or no restarts, or the remedy, are taken."""
    monkeypatch.setattr(empg, "WORLD_SIZE", 2)

    def rendezvous(*args, **keywords):
        raise ConnectionError("as far as that")

    monkeypatch.setattr(empg.dist, "rendezvous", rendezvous)
    for own, restarts, here, is_refused in (
        ("True", "3", "1", True),
        ("False", "3", "1", False),
        ("True", "0", "1", False),
    ):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", own)
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        if is_refused:
            refuses(capfd, lambda argv: empg.start_processes("cpu"), [], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
        else:
            with pytest.raises(ConnectionError, match="as far as that"):
                empg.start_processes("cpu")


@pytest.mark.skipif("EMPG_KILLS" not in os.environ, reason="takes a minute; set EMPG_KILLS")
def test_restarts_on_several_machines(alone, tiny, tmp_path):
    """Two torchruns, as on two machines, of whose processes one is killed: the run ends as one that nothing
    disturbed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    more, _, run_alone = alone["plain"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint={endpoint}", __file__, "run_killed_once"]
    words = [tmp_path / "killed", *options(tiny, tmp_path / "run", "--resume", **more, save_every=1)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    how["env"] = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [subprocess.Popen([*torchrun, *map(str, words)], **how) for _ in range(2)]
    printed = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert (tmp_path / "killed").exists()
    assert "Resuming after iteration 1" in "".join(printed)
    same_metrics(metrics(run_alone), metrics(tmp_path / "run"))


# ------------------------------ Bad input gets one clear line, exit code 2, before any long work ------------------------------


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
    text = wait(start(tmp_path / "empg.py", *words), code=2)
    assert "error: --task gsm8k: needs eval.py beside empg.py" in text
    assert "Traceback" not in text


def test_without_math_verify_a_task_that_needs_it_ends_early(tmp_path, capfd, monkeypatch):
    """If a package that eval.py needs is missing, that, too, is said before a model is looked for."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    scoring.is_right_formula.cache_clear()
    row = {"problem": "1+1=", "solution": r"It is \boxed{2}."}
    data = write_rows(tmp_path / "data", train=[row], test=[row | {"problem": "?"}])
    argv = ["--model=someone/no-such-model", "--task=math-hard", f"--data={data}", f"--output={tmp_path / 'out'}"]
    refuses(capfd, empg.main, [*argv, "--device=cpu"], "--task math-hard", "math_verify")


def test_only_the_first_process_shows_progress(capfd):
    """tqdm's bars are off in a process that is not the first, if empg.py is what it imports first."""
    list(empg.tqdm(range(3)))
    assert "3/3" in capfd.readouterr().err
    program = "import empg; list(empg.tqdm(range(3)))"
    how = {"capture_output": True, "text": True, "env": os.environ | {"RANK": "1"}, "cwd": HERE}
    assert subprocess.run([sys.executable, "-c", program], check=True, **how).stderr == ""


@pytest.mark.parametrize("answer", ["", "#### ", r"It is \boxed{}", " $ "])
def test_an_answer_that_cannot_be_read(answer, tmp_path, capfd):
    """A problem whose answer is empty, in whatever form, is refused before a model is looked for."""
    data = write_rows(
        tmp_path / "data", train=[ROW, {"question": "2+2=", "answer": answer}], test=[ROW | {"question": "?"}]
    )
    argv = ["--model=someone/no-such-model", f"--data={data}", "--device=cpu", f"--output={tmp_path / 'out'}"]
    refuses(capfd, empg.main, argv, "row 2", "empty" if answer else "''")


def test_a_tokenizer_without_an_end_token(tiny, tmp_path, capfd):
    """It is refused in one line: no response could end."""
    tokenizer = make_tokenizer()
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
    """A dataset without the columns, without rows or without a split is refused in one line, which says what is
    needed."""
    data = write_rows(tmp_path / "data", **splits)
    argv = options(tiny, tmp_path / "out", task="gsm8k", data=data)
    refuses(capfd, empg.main, argv, "--data", str(data), ".jsonl", "'question'")
    assert not (tmp_path / "out").exists()


BAD_ROWS = [
    {"question": None, "answer": "3"},
    {"question": [{"role": "user", "content": "1+1="}], "answer": "3"},
    {"question": 7, "answer": "3"},
    {"question": " ", "answer": "3"},
    {"question": "1+1+1=", "answer": None},
    {"question": "1+1+1=", "answer": {"value": 3}},
    {"question": "1+1+1=", "answer": ["3"]},
    {"question": "1+1+1=", "answer": " "},
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=str)
def test_rows_that_cannot_be_read(row, tiny, tmp_path, capfd):
    """A question that is no text, and an answer that is neither text nor a number, are refused with the row's
    number."""
    data = write_rows(tmp_path / "data", train=[row, row], test=[row])
    refuses(capfd, empg.main, options(tiny, tmp_path / "out", task="gsm8k", data=data), "--data", "row 1")
    assert not (tmp_path / "out").exists()


def test_answers_that_are_numbers(tmp_path):
    """Whole numbers, floats and text are answers; a word is none, and its row is named."""
    rows = [{"question": f"{i}=", "answer": answer} for i, answer in enumerate((3, 3.0, 3.5))]
    data = write_rows(tmp_path / "data", train=rows)
    problems, _ = empg.load_problems(empg.Config(task="gsm8k", data=str(data), eval_every=0))
    assert [GSM8K.reward(text, row["answer"]) for text, row in zip((r"\boxed{3}", "3.00", "7/3"), problems)] == [
        1,
        1,
        0,
    ]
    words = [{"question": "1+1=", "answer": 2}, {"question": "2+2=", "answer": "many"}]
    data = write_rows(tmp_path / "words", train=words)
    with pytest.raises(ValueError, match=r"'many' is empty, or is not a number \(row 2\)"):
        empg.load_problems(empg.Config(task="gsm8k", data=str(data), eval_every=0))


@pytest.mark.parametrize(("main", "more"), [(empg.main, ["--steps=1"]), (scoring.main, [])], ids=["empg", "eval"])
def test_a_prompt_that_is_too_long(main, more, tiny, tmp_path, capfd):
    """It is refused by its length, and not by a negative room."""
    long = {"question": "1+" * 100 + "1=", "answer": "101"}
    data = write_rows(tmp_path / "data", train=[ROW, long], test=[ROW | {"question": "?"}, long])
    words = [f"--model={tiny}", "--task=gsm8k", f"--data={data}", "--device=cpu", f"--output={tmp_path / 'out'}"]
    refuses(capfd, main, [*words, *more], "--data", "tokens, and the model can read 64 in all")


def save_chat(path, template: str, **tokens) -> str:
    """The tiny model with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(tokens)
    tokenizer.chat_template = template
    make_model(scale=0.1, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


TURNS = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
BAD_TEMPLATES = {
    "needs a system turn": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS,
        "no system",
    ),
    "allows no assistant": (
        "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('alone') }}{% endif %}" + TURNS,
        "alone",
    ),
    "is broken": ("{% for m in messages %}{{ m['content'] ", "chat template cannot be used"),
    "takes parts": (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
        "leaves the question out",
    ),
    "says nothing": ("{{ '1+1=' }}", "leaves the question out"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_chat_templates_that_are_refused(name, tmp_path, capfd):
    """A template that cannot be used with one turn of a user and one of the model is refused in a line."""
    template, expected = BAD_TEMPLATES[name]
    model = save_chat(tmp_path / "model", template)
    refuses(capfd, empg.main, options(model, tmp_path / "out"), "--model", expected)
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_embeddings_lack(tmp_path, capfd):
    """A tokenizer with tokens that the model does not know is refused in a line."""
    tokens = {"additional_special_tokens": ["<end>", "<more>"]}
    model = save_chat(tmp_path / "model", TURNS.replace("<eos>", "<more>"), **tokens)
    refuses(capfd, empg.main, options(model, tmp_path / "out"), "--model", "embeddings lack")


def test_prompts_do_not_change_with_the_date(tmp_path, odd_is_right, capsys, monkeypatch):
    """A template that writes the time gives the same prompts later, so that a resumed run is the same run. The first
    prompt is printed as it is sent."""
    model = save_chat(tmp_path / "model", "{{ strftime_now('%H%M%S') }}" + TURNS)
    seen = []
    spy(monkeypatch, "sample_trajectories", lambda args, *_: seen.extend(row["prompt"] for row in args[3]))
    for steps in (1, 2):
        empg.main(options(model, tmp_path / "out", "--resume", steps=steps, eval_every=0, max_new_tokens=4))
        time.sleep(1.1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = {tokenizer.decode(prompt).rpartition("=")[0][:20] for prompt in seen}
    assert len({prompt.rstrip("0123456789+") for prompt in prompts}) == 1
    printed = re.findall(r"The first prompt: '(.*)'", capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert printed[0].endswith("=<eos>")


def test_nothing_is_written_after_eos():
    """A tokenizer that puts EOS after each text does not put it after a prompt."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    problems = [{"question": "3+8="}]
    empg.add_prompts(problems, empg.TASKS["sums"], tokenizer)
    assert tokenizer.decode(problems[0]["prompt"]) == "3+8="


def test_without_evaluation_no_test_split_is_needed(tmp_path, capsys):
    """With --eval-every 0, a dataset that has only a training split will do, and what cannot be checked then is
    said."""
    data = write_rows(tmp_path / "data", train=[ROW])
    problems, held_out = empg.load_problems(empg.Config(task="gsm8k", data=str(data), eval_every=0))
    assert [problem["question"] for problem in problems] == ["1+1="]
    assert held_out == []
    assert "test split cannot be read" in capsys.readouterr().out


def test_a_task_without_held_out_problems(tiny, tmp_path, capfd, monkeypatch):
    """If a task of one's own has no problems to evaluate on, an evaluation is refused."""
    problems = [{"question": "1+1=", "answer": "2"}]
    change(monkeypatch, problems=lambda _, split: problems if split == "train" else [])
    refuses(capfd, empg.main, options(tiny, tmp_path / "out"), "--data", "--eval-every 0")


def test_a_model_of_nan_is_refused(tmp_path, capfd):
    """A model whose probabilities are not numbers does not pass as one that is right."""
    model = make_model(dtype=torch.float32)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    name = save(model, tmp_path / "nan")
    refuses(capfd, empg.main, options(name, tmp_path / "out"), "differ by nan nats")


def test_bad_directories(tiny, tmp_path, capfd):
    """An --output that is a file or cannot be made, and --resume without --output, are refused in one line."""
    (tmp_path / "file").touch()
    refuses(capfd, empg.main, options(tiny, tmp_path / "file"), f"--output {tmp_path / 'file'}", "exists")
    refuses(capfd, empg.main, options(tiny, "/proc/nothing/run"), "--output /proc/nothing")
    refuses(capfd, empg.main, options(tiny, "/proc"), "--output /proc")
    refuses(capfd, empg.main, ["--task=sums", "--resume"], "--resume", "--output DIR")
    # Directories of something else may have a config.json, too.
    for text, expected in (("{", "cannot be read"), ("[1]", "cannot be read"), ('{"layers": [1]}', "begun with")):
        (tmp_path / "config.json").write_text(text)
        refuses(capfd, empg.main, options(tiny, tmp_path, "--resume"), f"--output {tmp_path}", expected)
        assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=["new", "resumed"])
def test_two_runs_in_one_directory(flags, tiny, tmp_path, capfd, odd_is_right):
    """While a command is at work in a directory, another one is refused, and leaves it as it is. Then it is free
    again."""
    out = tmp_path / "out"
    if flags:
        empg.main(options(tiny, out, steps=1))
    argv = options(tiny, out, *flags, steps=2)
    out.mkdir(exist_ok=True)
    (out / "lock").touch()
    before = files_in(out)
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold, out / "lock"], stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        refuses(capfd, empg.main, argv, f"--output {out}", "another command is at work there")
        assert files_in(out) == before
        other.kill()
    empg.main(argv)
    assert [row["step"] for row in metrics(out)][-1] == 2


def test_two_commands_at_once(tiny, tmp_path):
    """Of two commands that begin at the same time in one directory, one is refused, and the other one is undisturbed.
    Two without --output get directories of their own."""
    words = [f"--model={tiny}", "--task=sums", "--steps=3", "--prompts-per-step=4", "--num-samples=4", "--device=cpu"]
    words += ["--max-new-tokens=8", "--eval-every=0"]
    one, two = (start(HERE / "empg.py", *words, f"--output={tmp_path / 'out'}", f"--seed={seed}") for seed in (0, 1))
    for child in (one, two):
        child.process.join(200)
    assert sorted(child.process.exitcode for child in (one, two)) == [0, 2]
    refused = one if one.process.exitcode else two
    assert "Traceback" not in refused.log.read_text()
    seed = json.loads((tmp_path / "out/config.json").read_text())["seed"]
    assert seed == (1 if refused is one else 0)
    assert len(metrics(tmp_path / "out")) == 3
    assert empg.parse_options(words).output.endswith(f"-{os.getpid()}")


@contextlib.contextmanager
def a_full_disk():
    """No file may grow beyond 8,000 bytes: that is an error of the system, as a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tiny, tmp_path, capfd, odd_is_right):
    """A run that cannot write its checkpoint ends in a line that names the one before, from which it goes on later."""
    more = {"save_every": 1, "eval_every": 0}
    empg.main(options(tiny, tmp_path / "whole", steps=3, **more))
    empg.main(options(tiny, tmp_path / "out", steps=1, **more))
    with a_full_disk():
        again = options(tiny, tmp_path / "out", "--resume", steps=3, **more)
        refuses(capfd, empg.main, again, f"--output {tmp_path / 'out'}", "cannot be written", "checkpoint-000001")
    empg.main(again)
    same_run(tmp_path / "whole", tmp_path / "out")


def test_a_full_disk_while_the_model_is_saved(tiny, tmp_path, capfd, odd_is_right, monkeypatch):
    """safetensors has an error of its own for that. The run ends in a line, and loses nothing."""
    words = options(tiny, tmp_path, "--resume", steps=1)

    def save_pretrained(*args):
        raise empg.SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(empg.AutoModelForCausalLM.from_pretrained(tiny).__class__, "save_pretrained", save_pretrained)
        refuses(capfd, empg.main, words, "cannot be written", "No space left", "checkpoint-000001")
    empg.main(words)
    assert (tmp_path / "model/model.safetensors").exists()


def test_a_full_disk_while_scoring(tiny, tmp_path, capfd):
    """eval.py ends in a line, too, keeps what it has, and goes on later."""
    words = [f"--model={tiny}", "--task=sums", "--max-new-tokens=8", "--limit=90", "--device=cpu", "--sample-batch=10"]
    scoring.main([*words, f"--output={tmp_path / 'whole'}"])
    with a_full_disk():
        refuses(
            capfd, scoring.main, [*words, f"--output={tmp_path / 'out'}"], "cannot be written", "repeat the command"
        )
    assert 1_000 < (tmp_path / "out").stat().st_size <= 8_000
    scoring.main([*words, f"--output={tmp_path / 'out'}"])
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def run_out_of_memory(*args, **keywords):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        ("empg.DynamicCache.update", {}, ["try --sample-batch 8", "checkpoint-000001"]),  # of 4 prompts × 4 samples
        ("empg.DynamicCache.update", {"sample_batch": 4}, ["out of memory: try more GPUs"]),
        (
            "empg.micro_batch_loss",
            {},
            ["try --micro-batch-tokens 1024", "or --gradient-checkpoint", "checkpoint-000001"],
        ),
        ("empg.micro_batch_loss", {"micro_batch_tokens": 1}, ["try --gradient-checkpointing", "checkpoint-000001"]),
        ("empg.micro_batch_loss", {"gradient_checkpointing": True}, ["try --micro-batch-tokens 1024, or more GPUs"]),
        ("torch.optim.AdamW._init_group", {}, ["more GPUs, with --shard"]),
    ],
)
def test_out_of_memory(where, changes, words, tiny, tmp_path, capfd, odd_is_right, monkeypatch):
    """A line says what to change, and from where the run goes on, if it can with that change, as it then does."""
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0))
    again = options(tiny, tmp_path, "--resume", steps=2, eval_every=0, **changes)
    monkeypatch.setattr(empg, "check_model", lambda name: None)
    with monkeypatch.context() as patch:
        patch.setattr(where, run_out_of_memory)
        refuses(capfd, empg.main, again, "out of memory", *words)
    if "checkpoint-000001" in words:
        empg.main([*again, *words[0].removeprefix("try ").split()])


def test_out_of_memory_while_scoring(tiny, capfd, monkeypatch):
    """A line says what to halve."""
    monkeypatch.setattr(empg, "check_model", lambda name: None)
    monkeypatch.setattr(empg, "sample", run_out_of_memory)
    words = [f"--model={tiny}", "--task=sums", "--limit=2", "--max-new-tokens=4", "--device=cpu"]
    refuses(capfd, scoring.main, words, "out of memory", "halve --sample-batch")


def test_an_error_of_a_reward_is_its_own(tiny, tmp_path, monkeypatch):
    """If the reward of a task of one's own misses a file, or is wrong about a text, this is what is said, in training
    and in scoring: not that --output cannot be written, nor nothing at all."""
    for error in (FileNotFoundError("gcc"), ValueError("no number")):

        def reward(text, answer, error=error):
            if text != answer:
                raise error
            return 1.0

        change(monkeypatch, reward=reward)
        with pytest.raises(type(error), match=str(error)):
            empg.main(options(tiny, tmp_path / str(error)))
        with pytest.raises(type(error), match=str(error)):
            scoring.main([f"--model={tiny}", "--task=sums", "--limit=2", "--max-new-tokens=4", "--device=cpu"])


def test_scoring_reads_all_answers_first(tiny, tmp_path, capfd, monkeypatch):
    """An answer that cannot be read is found before any response is sampled, and its row is named."""
    data = write_rows(tmp_path / "data", test=[ROW, ROW | {"answer": "a dozen"}])
    monkeypatch.setattr(empg, "sample", None)
    refuses(capfd, scoring.main, [f"--model={tiny}", "--task=gsm8k", f"--data={data}", "--device=cpu"], "row 2")


def files_in(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_run_is_not_taken_up_with_other_problems(tiny, tmp_path, capfd):
    """--resume draws from the same problems. If a test split appears that takes some of them away, it is refused."""
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)]
    data = write_rows(tmp_path / "data", train=rows)
    words = options(tiny, tmp_path / "out", f"--data={data}", task="gsm8k", steps=1, eval_every=0, max_new_tokens=4)
    change_prompt = dataclasses.replace(GSM8K, prompt="{question}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(empg.TASKS, "gsm8k", change_prompt)
        empg.main(words)
        shutil.copy(write_rows(tmp_path / "more", test=rows[:1]) / "test.jsonl", data)
        refuses(capfd, empg.main, [*words, "--resume"], "begun with {'training_problems': '6, with digest")


def test_scores_of_any_size_train(tiny, tmp_path, monkeypatch):
    """Rewards that differ by less than float32 can tell apart have advantages."""
    change(monkeypatch, reward=lambda text, answer: 1e9 + len(text))
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0))
    assert metrics(tmp_path)[-1]["grad_norm"] > 0


def test_a_closed_pipe_is_not_taken_for_a_bad_disk(tmp_path):
    """A reader of the output that has gone is what it is."""
    config = empg.Config(output=str(tmp_path))

    def say():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        try:
            say()
        except OSError as error:
            empg.what_to_do(error, config)
    with pytest.raises(SystemExit):
        empg.fail("")


def test_a_run_is_not_taken_up_by_other_options(tiny, tmp_path, capfd, odd_is_right):
    """--resume with an option that would make it another run is refused in a line and loses nothing; options that
    change only the pace, the memory or the end are taken."""
    out = tmp_path / "out"
    empg.main(options(tiny, out, steps=2))
    before = files_in(out)
    refuses(capfd, empg.main, options(tiny, out), "--output", "another run", "--resume")
    for name, value, begun in (("lr", 0.5, 0.001), ("seed", 1, 0), ("prompts_per_step", 8, 4), ("beta", 0.1, 0.0)):
        changed = options(tiny, out, "--resume", **{name: value})
        refuses(capfd, empg.main, changed, f"--output {out}", f"begun with {{'{name}': {begun}}}")
    wider = save(make_model(hidden_size=32), tmp_path / "wider")
    refuses(capfd, empg.main, options(wider, out, "--resume"), "begun with {'model'", tiny)
    assert files_in(out) == before

    more = {"eval_every": 3, "save_every": 1, "sample_batch": 4, "micro_batch_tokens": 30}
    empg.main(options(tiny, out, "--resume", steps=3, **more))
    assert [row["step"] for row in metrics(out)][-2:] == [3, 3]  # an iteration and its evaluation
    words = options(tiny, out, "--resume", **more)
    refuses(capfd, empg.main, [*words, "--dtype=bfloat16"], "begun with {'dtype': 'float32'}")
    before = files_in(out)
    refuses(capfd, empg.main, [*words, "--steps=2", "--save-every=9"], "--steps 2", "has 3 already")
    assert files_in(out) == before


def test_a_run_of_an_older_revision_is_refused(tiny, tmp_path, capfd, odd_is_right):
    """A run whose options are not those of this file, as an older one had --wandb, is refused in a line."""
    empg.main(options(tiny, tmp_path, steps=1))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"wandb": False}))
    before = files_in(tmp_path)
    refuses(capfd, empg.main, options(tiny, tmp_path, "--resume", steps=2), "begun with {'wandb': False}", "a new one")
    assert files_in(tmp_path) == before


def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, capfd, odd_is_right):
    """A checkpoint with a file that is cut, empty or missing is refused in a line that names it, and the cause."""
    empg.main(options(tiny, tmp_path, steps=1))
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    again = options(tiny, tmp_path, "--resume", steps=2)
    expected = ("--output", f"{checkpoint.name} cannot be read", "remove it")
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    refuses(capfd, empg.main, again, *expected, "(RuntimeError(")
    largest.write_bytes(b"")
    refuses(capfd, empg.main, again, *expected, "(EOFError(")
    (checkpoint / ".metadata").unlink()
    refuses(capfd, empg.main, again, *expected, "No such file")


@pytest.mark.parametrize(
    ("gigabytes", "cpu", "words", "expected"),
    [
        (0, "avx2", "", "base sums float32"),
        (0, "avx2", "--task=gsm8k", "Qwen2.5-0.5B gsm8k float32"),
        (0, "avx2", "--model=x", "x gsm8k float32"),
        (0, "avx2", "--model=x --dtype=bfloat16", "x gsm8k bfloat16"),
        (0, "amx_bf16", "", "base sums float32"),
        (0, "amx_bf16", "--model=x", "x gsm8k bfloat16"),
        (0, "avx512_bf16", "--model=x", "x gsm8k bfloat16"),
        (0, "avx512_bf16", "--model=x --task=sums", "x sums float32"),
        (0, "avx512_bf16", "--model=x --dtype=float32", "x gsm8k float32"),
        (0, "avx512_bf16", "--model=x --device=mps", "x gsm8k float32"),
        (80, "avx2", "--task=sums", "base sums float32"),
        (80, "avx2", "", "Qwen2.5-1.5B gsm8k bfloat16"),
        (23.7, "avx2", "", "Qwen2.5-0.5B gsm8k bfloat16"),
        (16, "amx_bf16", "", "base sums float32"),
        (80, "avx2", "--device=cpu", "base sums float32"),
        (80, "avx2", "--device=cpu --model=x", "x gsm8k float32"),
        (80, "avx2", "--dtype=float32", "Qwen2.5-1.5B gsm8k float32"),
    ],
)
def test_a_plain_command_stands_for_what_suits_the_machine(gigabytes, cpu, words, expected, monkeypatch):
    """Without --model it is the base model here on the sums, or what the GPU's memory holds on GSM8K; the user's words
    win. The precision is bfloat16 where the device multiplies it, except for the sums; eval.py chooses likewise."""
    memory = types.SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gigabytes > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, cpu: True})
    config = empg.parse_options(words.split())
    assert f"{Path(config.model).name} {config.task} {config.dtype}" == expected
    scored = scoring.parse_options([f"--model={config.model}", f"--task={config.task}", *words.split()])
    assert (scored.device, scored.dtype) == (config.device, config.dtype)


def test_each_process_asks_its_own_gpu(monkeypatch):
    """A GPU without bfloat16 gets float32, and each process asks for the memory of its own GPU."""
    memory = types.SimpleNamespace(total_memory=80e9)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: asked.append(number) or memory)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(empg, "LOCAL_RANK", 3)
    assert empg.parse_options([]).dtype == "float32"
    # A process too many asks for nothing, so that it is `start_processes` that ends it, with a line.
    monkeypatch.setattr(empg, "LOCAL_RANK", 4)
    empg.parse_options([])
    assert set(asked) == {3}


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


# ------------------------------ eval.py: scores, comparisons, curves ------------------------------


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
    """Of equally common answers it is the first; a response without an answer has no vote; spellings of one are one."""
    assert scoring.majority_vote(["7", "8", "8"]) == "8"
    assert scoring.majority_vote(["9", "8", "8", "9"]) == "9"
    assert scoring.majority_vote([None, None, "3"]) == "3"
    assert scoring.majority_vote([None]) is None
    # Spellings of one answer are one answer.
    assert scoring.majority_vote(["17", "17", "18", r"\$18", "18.00"]) == "18"
    assert scoring.majority_vote([r"\sqrt 3", r"\frac12", "3", r"\frac{1}{2}", "0.5"]) == r"\frac12"


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
    save(make_model(seed=1, vocab_size=17, dtype=torch.float32), tmp_path)
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

    # If right responses have answers that cannot be read, as those of a task of one's own, there is nothing to count.
    assert "maj@4" not in scoring.describe([row | {"answer": None} for row in rows], 4)

    # 3) One sample each, of the first 20 problems, are the first samples.
    scoring.main([*words, "--temperature=1", "--limit=20", f"--output={tmp_path / 'one'}"])
    assert [row["response"] for row in read_rows(tmp_path / "one")[1:]] == [row["response"] for row in rows[:80:4]]


def test_a_killed_evaluation_goes_on(tiny, tmp_path, capfd):
    """Two processes that go on with a file that a kill has cut, even in a line, keep what it has, and write the rest
    byte for byte as one process does."""
    words = [f"--model={tiny}", "--task=sums", "--num-samples=2", "--max-new-tokens=8", "--limit=60", "--device=cpu"]
    scoring.main([*words, f"--output={tmp_path / 'one'}"])
    # Mark a row, to see that it is not computed again.
    marked = (tmp_path / "one").read_bytes().replace(b'"index": 0,', b'"index": 0, "kept": true,', 1)
    lines = marked.splitlines(keepends=True)
    # The header, 39 rows, of which the last is one of two for its problem, and a part of a row.
    (tmp_path / "two").write_bytes(b"".join(lines[:40]) + lines[40][:40])
    for child in start_ranks(2, HERE / "eval.py", *words, "--sample-batch=6", f"--output={tmp_path / 'two'}"):
        wait(child)
    assert (tmp_path / "two").read_bytes() == marked
    refuses(capfd, scoring.main, [*words, "--seed=1", f"--output={tmp_path / 'two'}"], "--output", "'seed': 0")
    assert (tmp_path / "two").read_bytes() == marked


def test_results_of_other_weights_are_not_taken(tmp_path, capfd):
    """After more training of a model at the same place, a file of results is refused, and left as it is. The same
    weights go on with it."""
    name = save(make_model(scale=0.1), tmp_path / "model")
    words = [
        f"--model={name}",
        "--task=sums",
        "--limit=4",
        "--max-new-tokens=4",
        "--device=cpu",
        f"--output={tmp_path / 'out'}",
    ]
    scoring.main(words)
    before = (tmp_path / "out").read_bytes()
    scoring.main(words)
    model = make_model(scale=0.1)
    with torch.no_grad():
        model.model.norm.weight += 1e-3
    for other in (model, make_model(seed=1, scale=0.1)):
        other.save_pretrained(name)
        refuses(capfd, scoring.main, words, f"--output {tmp_path / 'out'}", "other weights")
        assert (tmp_path / "out").read_bytes() == before
    save(make_model(scale=0.1), tmp_path / "model")
    scoring.main(words)


def results(path, correct, samples=1, tokens=5, question="q") -> str:
    """A results file with these outcomes."""
    rows = [{"num_samples": samples, "problems": len(correct) // samples}]
    for i, is_correct in enumerate(correct):
        row = {"question": f"{question}{i // samples}", "correct": bool(is_correct)}
        rows.append(row | {"tokens": tokens, "response": "Wait, no."})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_compare(tmp_path, capfd):
    """--compare reports accuracies, the paired difference, on how many problems each is better, McNemar's p and
    lengths."""
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
    lines = Path(a).read_text().splitlines(keepends=True)
    (tmp_path / "part").write_text("".join(lines[:-1]))
    refuses(capfd, scoring.main, ["--compare", a, tmp_path / "part"], "part is not complete")


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
        ("--model x --temperature -1", "--temperature -1"),
        ("--model x --temperature nan", "--temperature nan"),
        ("--model x --seed -1", "--seed -1"),
        ("--model x --output /proc/x.jsonl", "cannot be made"),
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
    """Seeds of a setting are drawn as mean and band, other runs as lines of another colour and style, named in a
    legend."""
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

    # Runs of one name with other options do not take each other's place.
    other = tmp_path / "other/z-0"
    shutil.copytree(tmp_path / "z-0", other)
    (other / "config.json").write_text(json.dumps({"seed": 0, "lr": 3}))
    assert list(scoring.read_runs([str(tmp_path / "z-0"), str(other)])) == ["z-0", str(other)]


# ------------------------------ The base model, and the README's examples ------------------------------


needs_base = pytest.mark.skipif(not (HERE / "base/make.py").exists(), reason="base/ is not beside this file")


@needs_base
def test_the_recipe_of_the_base_model_learns(tmp_path, monkeypatch):
    """A short version of the recipe learns, and writes what the base directory has."""
    monkeypatch.syspath_prepend(HERE / "base")
    losses = importlib.import_module("make").make(tmp_path / "base", iterations=20)
    assert losses[-1] < 0.8 * losses[0]
    there = {path.name for path in (HERE / "base").iterdir()}
    made = {path.name for path in (tmp_path / "base").iterdir()}
    assert there - {"make.py", "__pycache__"} <= made <= there
    tokenizer, model = empg.load_model(str(tmp_path / "base"))
    base_tokenizer, base = empg.load_model(str(HERE / "base"))
    assert tokenizer.get_vocab() == base_tokenizer.get_vocab()
    assert [p.shape for p in model.parameters()] == [p.shape for p in base.parameters()]


@needs_base
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_iterations_of_the_plain_command_learn(dtype, tmp_path):
    """They bring the base model from a third to eight in ten, in bfloat16, too."""
    if dtype == "bfloat16" and empg.best_precision("cpu", "gsm8k") == "float32":
        pytest.skip("this processor is slow in bfloat16")
    words = ["--task=sums", "--steps=10", "--eval-every=10", "--device=cpu"]
    empg.main([*words, f"--output={tmp_path / 'run'}", f"--dtype={dtype}"])
    rows = metrics(tmp_path / "run")
    before, after = (row["eval_accuracy"] for row in rows if "eval_accuracy" in row)
    assert before == pytest.approx(0.370, abs=0.02)  # greedy; of sampled responses, 0.44 are right
    assert after > 0.8
    lengths = [row["response_tokens"] for row in rows if "reward" in row]
    assert lengths[-1] > 1.1 * lengths[0]


@needs_base
def test_the_readme_examples(tmp_path, monkeypatch):
    """README's loop of its own earns more and more. Its task of one's own is learned and scored."""
    for name in ("empg.py", "eval.py", "base"):
        (tmp_path / name).symlink_to(HERE / name)
    monkeypatch.chdir(tmp_path)
    readme = (HERE / "README.md").read_text()
    loop, task = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    Path("loop.py").write_text(loop)
    Path("mine.py").write_text(task)
    # The command that README gives for its own task.
    (words,) = re.findall(r"`python mine.py (.*?)`", readme.replace("\n", " "))
    looping = start(tmp_path / "loop.py")
    wait(start(tmp_path / "mine.py", *words.split(), "--output=run", "--device=cpu"))
    first, *_, last = [row["eval_accuracy"] for row in metrics("run") if "eval_accuracy" in row]
    assert first == 0
    assert last > 0.9

    rewards = [float(reward) for reward in re.findall(r"^\d+ ([\d.]+)$", wait(looping), re.MULTILINE)]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])

    # Its way to score it.
    Path("score.py").write_text("import eval\n" + task.replace("empg.main()", "eval.main()"))
    score = wait(start(tmp_path / "score.py", "--model=run/model", "--task=pairs", "--device=cpu"))
    assert "of 17 problems" in score


if __name__ == "__main__":
    # A process that a test has started: the name of a function of this file, and its arguments.
    globals()[sys.argv[1]](*sys.argv[2:])
