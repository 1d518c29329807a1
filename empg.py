#!/usr/bin/env python3
"""EM Policy Gradient (EMPG): train a language model to reason from nothing but right or wrong. One file, no engine.

A trajectory τ = (prompt, rationale, answer) earns R(τ) = 1 if its answer is right, else 0, and training climbs
J(θ) = E[R(τ)] over τ ~ P_θ. By Jensen, log J(θ) ≥ E_q[log R + log P_θ − log q], and expectation-maximisation climbs this
bound: the E-step samples from a frozen copy θ* of the policy (the best q is ∝ P_θ* · R), the M-step raises log P_θ of
the sampled trajectories in proportion to their rewards. There are no importance weights, no clipping, no value network.

    Algorithm 1                                                     here
     1  θ ← base model                                              load_policy (build_base makes one)
     2  for each iteration t:                                       train
     4      θ* ← θ                                                  copy_weights
     6      for each prompt of the batch:                           draw_batch
     7, 8       sample several responses from P_θ*, keep them       sample
     9          reward each                                         Task.reward
    12      update θ with the off-policy policy gradient (Eq. 12)   smooth_rewards, subtract_baseline, log_probs,
                                                                    empg_loss, update

The method is the mathematics, `sample`, `log_probs`, `update` and `train`: begin with `train` if you like. The rest lets it
work on real tasks, on many devices, and through interruptions.

Run it:

    python empg.py                                    a laptop: learns to add step by step, in about a minute
    torchrun --nproc-per-node 4 empg.py               GPUs: Qwen2.5-1.5B on GSM8K
    python empg.py --model DIR_OR_HUB_NAME --task gsm8k --data DIR_OR_HUB_NAME
    python empg.py --help                             every option

Paper: Tianbing Xu, "Training Large Language Models to Reason via EM Policy Gradient", arXiv 2504.18587.
"""

import copy
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.hf_argparser import HfArg

# -------- Options -----------------------------------------------------------------------------------------------------

# What a run without --model stands for: these words go before the user's own, which therefore win.
LAPTOP = (
    "--model builtin --task sums --steps 60 --prompts-per-step 32 --num-samples 16 --max-new-tokens 40 --lr 1e-4"
    " --micro-batch-tokens 2048 --eval-every 5 --eval-problems 500"
)
GPU = "--model Qwen/Qwen2.5-1.5B --task gsm8k"


def option(default, help: str) -> Any:
    return HfArg(default=default, help=help)


@dataclass
class Config:
    """Every option of a run. The defaults suit a pretrained language model; LAPTOP has those of the built-in one."""

    model: str = option(None, "a hub name, a local directory, or builtin: the small model made here")
    task: str = option(None, "sums, gsm8k or math-hard")
    data: str | None = option(None, "local directory or hub name of a dataset with the task's columns")
    prompt_template: str | None = option(None, "replaces the chat template; has {question} in it")
    output: str | None = option(None, "directory for the results; by default a new one under runs/")
    steps: int = option(200, "iterations: each samples one batch and learns from it")
    prompts_per_step: int = option(64, "prompts in a batch, over all processes")
    num_samples: int = option(8, "responses sampled for each prompt")
    max_new_tokens: int = option(512, "token limit of a response")
    temperature: float = option(1.0, "of sampling; the policy that is trained is the tempered one")
    top_p: float = option(1.0, "sample from the likeliest tokens that have this much probability together")
    algo: Literal["empg", "grpo"] = option("empg", "grpo, the paper's baseline, has another advantage and loss")
    smoothing: Literal["sigmoid", "none"] | None = option(None, "of the rewards; empg's default is sigmoid")
    baseline: Literal["loo", "group", "batch", "none"] | None = option(None, "mean to subtract; by default loo")
    beta: float = option(0.0, "weight of KL(policy, anchor); at 0 there is no anchor")
    anchor: Literal["initial", "ema", "old"] = option("initial", "the initial policy, a moving average, or θ*")
    ema_decay: float = option(0.9, "share of the anchor that stays when the ema anchor moves")
    ema_every: int = option(10, "iterations between moves of the ema anchor")
    kl: Literal["k3", "topk"] = option("k3", "estimator of the KL; topk is exact over the likeliest tokens")
    kl_topk: int | None = option(None, "how many tokens of topk are exact; by default 32")
    lr: float = option(1e-6, "AdamW's learning rate")
    warmup_steps: int = option(5, "iterations over which the learning rate rises to its value")
    minibatches: int = option(1, "updates that a batch is split into")
    epochs: int = option(1, "passes over a batch")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    micro_batch_tokens: int = option(4096, "tokens in one forward and backward pass: bounds the memory")
    eval_every: int = option(10, "iterations between evaluations on held-out problems; 0 for none")
    eval_problems: int = option(256, "held-out problems in an evaluation")
    save_every: int = option(20, "iterations between checkpoints; 0 for none but the last")
    keep: int = option(2, "checkpoints that stay; older ones are removed")
    resume: bool = option(False, "go on from the newest checkpoint in --output, if there is one")
    shard: bool = option(False, "split weights, gradients and optimizer states over the processes (FSDP)")
    gradient_checkpointing: bool = option(False, "less memory: compute each layer again when going backward")
    report_to: Literal["tensorboard", "wandb"] | None = option(None, "where metrics go beside metrics.jsonl")
    seed: int = option(0, "of the prompts' order and of sampling")
    device: str = option(None, "cuda, mps or cpu; by default the best that is there")
    dtype: Literal["bfloat16", "float32"] | None = option(None, "by default bfloat16 on GPUs that have it")


# -------- The mathematics: pure functions of tensors ------------------------------------------------------------------


def smooth_rewards(rewards: torch.Tensor) -> torch.Tensor:
    """R̃(τ) = sigmoid((R(τ) − μ) / σ), with μ and σ the mean and standard deviation of the whole batch (section 4.2).

    A reward of 0 or 1 takes only two values, so here smoothing is R̃ = u + s·R with the scale
    s = sigmoid(√((1−p)/p)) − sigmoid(−√(p/(1−p))) at accuracy p: once a baseline is subtracted it scales the gradient
    by 0.46 to 0.55 and turns nothing. On graded rewards it does more: it limits what an outlier can weigh.

    Args:
        rewards: (N,), the rewards of all ranks; any finite numbers.
    Returns:
        (N,) in (0, 1), non-decreasing in the reward; all 0.5 when the rewards are equal.
    Raises:
        ValueError: `rewards` is empty or has a non-finite entry.

    >>> smooth_rewards(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.8497, 0.3595, 0.3595, 0.3595])
    """
    if rewards.numel() == 0 or not rewards.isfinite().all():
        raise ValueError("smooth_rewards needs at least one reward, and finite ones")
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    if rewards.max() == rewards.min():
        return torch.full_like(rewards, 0.5)
    rewards = rewards / rewards.abs().max()  # changes no z-score, and keeps the squares below finite
    z = (rewards - rewards.mean()) / rewards.std(correction=0)
    limits = torch.finfo(rewards.dtype)  # one success among a thousand has z = 32, where the sigmoid rounds to 1
    return torch.sigmoid(z).clamp(limits.tiny, 1 - limits.eps)


def subtract_baseline(rewards: torch.Tensor, kind: str = "loo") -> torch.Tensor:
    """The weight R̃(τ) − b of each trajectory in Eq. 12.

    With `loo`, leave-one-out, b is the mean over the prompt's *other* samples. It does not depend on τ, so it leaves the
    expected gradient as it is (E[∇log P · b] = 0) and lowers its variance. The mean that includes τ itself (`group`)
    shrinks the expected gradient by (G−1)/G; `batch` does likewise by (N−1)/N, and ignores how hard a prompt is.

    Args:
        rewards: (P, G), prompts × samples.
        kind: `loo`, `group`, `batch` or `none`.
    Returns:
        (P, G) weights. With `loo` and `group`, exactly 0 for a prompt whose samples all have the same reward.
    Raises:
        ValueError: unknown kind, not a matrix, or `loo` with one sample per prompt.

    >>> subtract_baseline(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    if rewards.ndim != 2 or (kind == "loo" and rewards.shape[1] < 2):
        raise ValueError(f"baseline {kind!r} needs (prompts, samples) rewards, loo with at least 2 samples per prompt")
    if kind == "none":
        return rewards
    # Measured from the first sample, equal rewards are exactly 0 and stay so; sums of 0.62 would round.
    centred = rewards - (rewards[:1, :1] if kind == "batch" else rewards[:, :1])
    if kind == "loo":
        others = centred.sum(1, keepdim=True) - centred
        return centred - others / (rewards.shape[1] - 1)
    if kind == "group":
        return centred - centred.mean(1, keepdim=True)
    if kind == "batch":
        return centred - centred.mean()
    raise ValueError(f"unknown baseline {kind!r}: choose loo, group, batch or none")


def empg_loss(logprobs: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """−(1/N) Σᵢ wᵢ log P_θ(τᵢ), with log P_θ(τ) = Σₜ log π_θ(token t | tokens before it).

    Its gradient is minus Eq. 12, E_{τ~D}[∇log P_θ(τ) (R̃(τ) − b)]. A sum over tokens, as the logarithm of a product is: a
    mean over tokens would favour short right answers and long wrong ones. With every weight 1 it is supervised learning.

    Args:
        logprobs: (N, T) log-probabilities of the response tokens, with gradient.
        mask: (N, T), 1 on the response, its end-of-sequence token included, 0 on padding.
        weights: (N,), R̃ − b; constants.
    Returns:
        scalar, in nats per trajectory.

    >>> logprobs, mask = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> empg_loss(logprobs, mask, weights=torch.tensor([1.0, -1.0]))
    tensor(-0.2500)
    """
    return -(weights * logprobs.masked_fill(mask == 0, 0).sum(1)).mean()


def grpo_advantages(rewards: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """GRPO's weights: (r − mean) / (standard deviation + ε), over each prompt's samples (DeepSeekMath, section 4.1.2).

    Args:
        rewards: (P, G), prompts × samples.
    Returns:
        (P, G) advantages. Exactly 0 for a prompt whose samples all have the same reward.

    >>> grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 1.0000, -1.0000, -1.0000,  1.0000]])
    """
    return subtract_baseline(rewards, "group") / (rewards.std(1, correction=0, keepdim=True) + epsilon)


def grpo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, clip: float = 0.2
) -> torch.Tensor:
    """−(1/N) Σᵢ (1/|τᵢ|) Σₜ min(ρₜ Aᵢ, clamp(ρₜ, 1 − clip, 1 + clip) Aᵢ), with ρₜ = π_θ / π_θ* (DeepSeekMath, Eq. 3).

    Where θ = θ*, ρ is 1 and nothing is clipped: what is left of the difference to `empg_loss` is the mean over tokens, by
    which a token of a long response weighs less, and the advantage.

    Args:
        logprobs, old_logprobs: (N, T) log-probabilities of the response tokens, under π_θ with gradient and under π_θ*.
        mask: (N, T), 1 on the response.
        advantages: (N,).
    Returns:
        scalar.
    """
    ratio = (logprobs - old_logprobs).masked_fill(mask == 0, 0).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])
    return -((gain * mask).sum(1) / mask.sum(1)).mean()


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(π_θ ‖ π_ref) estimated at each sampled token: r − 1 − log r with r = π_ref / π_θ ("k3", Schulman 2020).

    Never negative, with expectation KL(π_θ ‖ π_ref) over tokens of π_θ. Differentiated as it stands, as GRPO does, it has
    the gradient of the other direction, KL(π_ref ‖ π_θ): it pulls to the same point, with a different strength.

    Args:
        logprobs, ref_logprobs: (N, T) log-probabilities of the sampled tokens.
    Returns:
        (N, T), in nats.

    >>> kl_k3(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.1065]])
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def kl_topk(logits: torch.Tensor, ref_logits: torch.Tensor, tokens: torch.Tensor, k: int) -> torch.Tensor:
    """KL(π_θ ‖ π_ref) at each position: exact over the k likeliest tokens S, sampled over the rest (EMA-PG, 2602.04417).

        Σ_{v∈S} π(v) log(π(v)/ref(v)) + [x ∉ S] ρ log(π(x)/ref(x)),   ρ = π(x) / stopgrad(π(x)) = 1

    In expectation over x ~ π_θ both value and gradient are exact, at every k from 0 (sampled) to V (no sampling). The
    logarithm behind ρ must keep its gradient: it is what ∇Σ_{v∉S} π(v) comes from. The price is variance: the gradient of
    a token outside S is noise around a small mean, and does not vanish at π_θ = π_ref as that of k3 does.

    What stays biased in training: x is drawn from π_θ*, so the sampled part is exact only while θ = θ*; and the gradient
    at a position takes the tokens before it as given, though θ* chose them.

    Args:
        logits, ref_logits: (..., V) of π_θ, with gradient, and of π_ref.
        tokens: (...), the sampled tokens x.
        k: 0 to V.
    Returns:
        (...), in nats.
    Raises:
        ValueError: k is out of range.

    >>> kl_topk(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]), k=2)
    tensor([0.1109])
    """
    if not 0 <= k <= logits.shape[-1]:
        raise ValueError(f"k = {k} is not in 0..{logits.shape[-1]}, the size of the vocabulary")
    log_pi = logits.log_softmax(-1)
    log_ratio = log_pi - ref_logits.log_softmax(-1)
    likeliest = log_pi.detach().topk(k, -1).indices
    exact = (log_pi.gather(-1, likeliest).exp() * log_ratio.gather(-1, likeliest)).sum(-1)
    log_pi_x, log_ratio_x = (x.gather(-1, tokens[..., None]).squeeze(-1) for x in (log_pi, log_ratio))
    sampled = (log_pi_x - log_pi_x.detach()).exp() * log_ratio_x
    return exact + sampled.masked_fill((likeliest == tokens[..., None]).any(-1), 0)


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """(Σw)² / (N Σw²) of the importance weights w = P_θ(τ)/P_θ*(τ) that EMPG leaves out.

    1 while θ = θ*, where leaving them out changes nothing; it falls as further updates on one buffer move θ away.

    Args:
        log_weights: (N,), log w.
    Returns:
        a share in (0, 1].

    >>> round(effective_sample_size(torch.tensor([0.0, 1.0])), 3)
    0.824
    """
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item() / len(log_weights)


# -------- The policy: sample trajectories (E-step), log-probabilities of given tokens (M-step), copy θ* ← θ -----------


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor | None, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """One token per row by inverting the cumulative distribution; the likeliest one at temperature 0.

    Args:
        logits: (B, V).
        uniforms: (B,) in [0, 1), one per row; None at temperature 0.
        temperature, top_p: as in `sample`.
    Returns:
        (B,) token ids.
    """
    if uniforms is None:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() if temperature == 1 else logits.float() / temperature, -1)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)  # keeps the token that crosses top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    cumulative = probs.cumsum(-1)  # its last entry is not exactly 1
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return tokens.squeeze(-1).clamp(max=logits.shape[-1] - 1)


class GrowingLayer(DynamicLayer):
    """The keys and values of a layer, new ones written in place into room for 128 tokens at a time.

    DynamicLayer makes a new copy of all keys and values at every token, which takes most of the time on a CPU.
    """

    storage: list[torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        end = self.get_seq_length() + key_states.shape[-2]
        # Begin, outgrow the storage, or follow a change of the rows
        if not self.storage or self.storage[0].shape[2] < end or len(self.storage[0]) != len(key_states):
            self.storage = [
                torch.nn.functional.pad(x, (0, 0, 0, 128)) for x in super().update(key_states, value_states)
            ]
        else:
            for storage, new in zip(self.storage, (key_states, value_states)):
                storage[:, :, end - new.shape[-2] : end] = new
        self.keys, self.values = (storage[:, :, :end] for storage in self.storage)
        return self.keys, self.values


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    max_new_tokens: int,
    *,
    eos_token_id: int | Collection[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """E-step: trajectories from P_θ* (lines 6 to 8 of Algorithm 1).

    Sample g of a prompt with seed s draws its tokens with uniform numbers from a generator seeded by (s, g). So it does
    not depend on the other prompts, on their order, on `num_samples` or on how many processes share the work, up to the
    rounding of the logits.

    Args:
        model: a causal language model of transformers, in eval mode: dropout would sample from another policy.
        prompts: P lists of token ids.
        num_samples: G, responses per prompt.
        max_new_tokens: where a response is cut.
        eos_token_id: the token, or tokens, that end a response.
        pad_token_id: fills up short prompts, on the left, where no position attends to it.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least this; 1 for all.
        seeds: P non-negative integers; not needed at temperature 0.
    Returns:
        P·G lists of token ids, all samples of the first prompt first; each ends with EOS unless it was cut.
    Raises:
        ValueError: no prompts, an empty prompt, a count below 1, or as many seeds as prompts are not given.
    """
    if not prompts or not all(prompts) or num_samples < 1 or max_new_tokens < 1:
        raise ValueError("sample needs at least one prompt, prompts of at least one token, and counts of at least 1")
    uniforms = None
    if temperature > 0:
        if seeds is None or len(seeds) != len(prompts):
            raise ValueError("sample needs one seed per prompt when the temperature is above 0")
        generators = (np.random.default_rng([seed, g]) for seed in seeds for g in range(num_samples))
        uniforms = torch.from_numpy(np.stack([rng.random(max_new_tokens, np.float32) for rng in generators]))
        uniforms = uniforms.to(model.device)
    eos = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else sorted(eos_token_id), device=model.device)

    # Left padding puts every prompt's last token in the last column; positions count real tokens only.
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = min(map(len, prompts)) < width  # without padding no mask is passed: some attention kernels take none

    # Each prompt is read once; its samples start from copies of its cache.
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    attended = mask if padded else None
    output = model(ids, attention_mask=attended, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    logits = output.logits[:, -1].repeat_interleave(num_samples, 0)
    cache.batch_repeat_interleave(num_samples)
    mask = torch.nn.functional.pad(mask, (0, max_new_tokens), value=1).repeat_interleave(num_samples, 0)
    position = positions[:, -1:].repeat_interleave(num_samples, 0)

    rows = torch.arange(len(logits), device=model.device)  # the trajectory that each row of the batch belongs to
    responses = torch.full((len(rows), max_new_tokens), int(eos[0]), device=model.device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    for t in progress(range(max_new_tokens), "sampling", delay=2):
        tokens = draw_tokens(logits, None if uniforms is None else uniforms[rows, t], temperature, top_p)
        responses[rows, t] = tokens
        done |= torch.isin(tokens, eos)
        alive = (~done).nonzero().squeeze(-1)
        if len(alive) == 0 or t == max_new_tokens - 1:
            break
        # Rows that are done leave the batch, once they are enough to pay for copying the cache. What one that is still
        # in the batch adds behind its EOS is cut off below.
        if len(alive) < 0.8 * len(rows):
            rows, tokens, mask, position, done = (x[alive] for x in (rows, tokens, mask, position, done))
            cache.batch_select_indices(alive)
        position = position + 1
        attended = mask[:, : width + t + 1] if padded else None
        output = model(tokens[:, None], attention_mask=attended, position_ids=position, past_key_values=cache)
        logits = output.logits[:, -1]

    ended = torch.isin(responses, eos).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, max_new_tokens)
    return [row[:length] for row, length in zip(responses.tolist(), lengths.tolist())]


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[token] for hidden states h (N, H), the projection's weights W (V, H), tokens (N,).

    With a vocabulary of 152,000 the logits would be the largest tensor of all. Both passes hold those of `chunk` tokens
    at a time, in one buffer; the backward pass computes them again, for ∂ log π(token)/∂ logits = onehot(token) − π.
    """

    @staticmethod
    def logits(h: torch.Tensor, weight: torch.Tensor, temperature: float, buffer: torch.Tensor) -> torch.Tensor:
        out = buffer[: len(h)]
        out = torch.mm(h, weight.T, out=out) if h.dtype == out.dtype else out.copy_(h @ weight.T)
        return out if temperature == 1 else out.div_(temperature)

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, chunk):
        ctx.temperature, ctx.chunk = temperature, chunk
        w, dtype = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(w), dtype=dtype)
        values, log_sums = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        parts = (x.split(chunk) for x in (hidden, tokens, values, log_sums))
        for h, token, value, log_sum in zip(*parts):
            logits = TokenLogProbs.logits(h, w, temperature, buffer)
            chosen, largest = logits.gather(-1, token[:, None]), logits.amax(-1, keepdim=True)
            log_sum[:] = largest[:, 0] + logits.sub_(largest).exp_().sum(-1).log()
            value[:] = chosen[:, 0] - log_sum
        ctx.save_for_backward(hidden, weight, tokens, log_sums)
        return values

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, tokens, log_sums = ctx.saved_tensors
        w, d_hidden, d_weight = weight.to(hidden.dtype), torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = hidden.new_empty(min(ctx.chunk, len(hidden)), len(w), dtype=log_sums.dtype)
        parts = (x.split(ctx.chunk) for x in (hidden, tokens, log_sums, gradient, d_hidden))
        for h, token, log_sum, g, d_h in zip(*parts):
            pi = TokenLogProbs.logits(h, w, ctx.temperature, buffer).sub_(log_sum[:, None]).exp_()
            pi.scatter_add_(1, token[:, None], pi.new_full((len(h), 1), -1))
            d_logits = pi.mul_(-g[:, None] / ctx.temperature).to(h.dtype)
            torch.mm(d_logits, w, out=d_h)
            if d_weight.dtype == h.dtype:
                d_weight.addmm_(d_logits.T, h)
            else:
                d_weight += d_logits.T @ h
        return d_hidden, d_weight, None, None, None


def response_states(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last hidden states from which `model` predicts the response tokens, one after the other without padding.

    Returns:
        (n, H) hidden states, (n,) the tokens, and (N, T) bool, where a response of the batch has a token.
    Raises:
        ValueError: unequal numbers of prompts and responses, or an empty one.
    """
    if not prompts or len(prompts) != len(responses) or not all(prompts) or not all(responses):
        raise ValueError("log_probs needs one prompt per response, each of at least one token")
    # Padding stands on the right, after all that is read: causal attention cannot see it, and needs no mask for it.
    rows = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses)]
    ids = pad_sequence(rows, batch_first=True).to(model.device)
    # The model's own forward gathers the weights of a sharded model. It computes no logits.
    output = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=ids.new_empty(0))
    hidden = output.hidden_states[-1]

    # The token at position j is predicted at position j − 1: the first response token by the last prompt token.
    starts = torch.tensor([len(p) for p in prompts], device=model.device)
    lengths = torch.tensor([len(r) for r in responses], device=model.device)
    column = torch.arange(ids.shape[1], device=model.device)
    is_response = (column >= starts[:, None]) & (column < (starts + lengths)[:, None])
    hidden, tokens = hidden[:, :-1][is_response[:, 1:]], ids[is_response]
    if torch.is_autocast_enabled(hidden.device.type):  # which knows nothing of the products inside TokenLogProbs
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden, tokens, torch.arange(int(lengths.max()), device=model.device) < lengths[:, None]


def in_rows(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n,) values of the response tokens → (N, T), 0 on padding."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    tokens_per_chunk: int | None = None,
    reference: PreTrainedModel | None = None,
    topk: int = 0,
) -> tuple[torch.Tensor, ...]:
    """M-step: log π_θ(token | tokens before it) of every response token, with gradient.

    Args:
        model: a causal language model of transformers whose logits are its output embeddings times its last hidden state.
        prompts: N lists of token ids, one per response.
        responses: N lists of token ids.
        temperature: as the tokens were sampled with: the policy is the tempered distribution.
        tokens_per_chunk: of how many tokens the logits are held at a time; by default what suits the device.
        reference, topk: if given, `kl_topk` to the reference is computed as well, from the same hidden states.
    Returns:
        log-probabilities, (N, T) float32 (or float64 as the model), 0 on padding; their mask, (N, T) bool; with a
        reference, the KL, (N, T).
    Raises:
        ValueError: unequal numbers of prompts and responses, or an empty one.
    """
    hidden, tokens, mask = response_states(model, prompts, responses)
    chunk = tokens_per_chunk or (256 if hidden.device.type == "cpu" else 2048)  # each chunk is a pass over W
    weight = model.get_output_embeddings().weight
    values = in_rows(TokenLogProbs.apply(hidden, weight, tokens, temperature, chunk), mask)
    if reference is None:
        return values, mask
    with torch.no_grad():
        ref_hidden = response_states(reference, prompts, responses)[0]

    def kl(h: torch.Tensor, ref_h: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        both = (h, weight), (ref_h, reference.get_output_embeddings().weight)
        logits, ref_logits = ((x @ w.to(x.dtype).T).to(values.dtype) / temperature for x, w in both)
        return kl_topk(logits, ref_logits, token, topk)

    parts = zip(*(t.split(chunk // 4) for t in (hidden, ref_hidden, tokens)))  # several buffers of logits at a time
    return values, mask, in_rows(torch.cat([checkpoint(kl, *part, use_reentrant=False) for part in parts]), mask)


def freeze(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, from now on without gradients and dropout, its parameters in `dtype`.

    Buffers keep their precision: rotary frequencies in bfloat16 would shift every position.
    """
    for parameter in model.requires_grad_(False).eval().parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """θ* ← θ (line 4 of Algorithm 1), rounding to the target's dtype.

    Of a sharded source one tensor after the other is put together, already rounded; no whole copy ever exists beside θ*.
    """
    for new, old in zip(source.parameters(), target.parameters(), strict=True):
        rounded = new.to(old.dtype)
        old.copy_(rounded.full_tensor() if isinstance(rounded, DTensor) else rounded)


@torch.no_grad()
def move_anchor(reference: PreTrainedModel, policy: PreTrainedModel, decay: float) -> None:
    """θ_ref ← decay · θ_ref + (1 − decay) · θ (EMA-PG), share by share."""
    for anchor, new in zip(reference.parameters(), policy.parameters(), strict=True):
        anchor.mul_(decay).add_(new, alpha=1 - decay)


# -------- Tasks: problems and rewards ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What to learn.

    Attributes:
        reward: (response text, answer as in the problem) → 1.0 for a right final answer, else 0.0; it never raises.
        extract: response text → the final answer that the reward looks at, as text; None if there is none.
        problems: (`--data` or None, "train" or "test") → rows that have at least `question` and `answer`, both text.
        instruction: follows the question in a chat template.
        template: the prompt for a tokenizer without a chat template; {question} stands for the question.
    """

    reward: Callable[[str, str], float]
    extract: Callable[[str], str | None]
    problems: Callable[[str | None, str], list[dict]]
    instruction: str
    template: str = "Question: {question}\n{instruction}\nAnswer:"


BOX_START = re.compile(r"\\(?:boxed|fbox)\s*(\{|-?\d[^\s$]*)")  # some solutions of MATH have \boxed 5


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} of the text, braces matched; None without one, or when it is not closed.

    >>> last_boxed(r"so \\boxed{\\frac{1}{2}}, as was asked")
    '\\\\frac{1}{2}'
    """
    boxes = list(BOX_START.finditer(text))
    if not boxes or boxes[-1][1] != "{":
        return boxes[-1][1].rstrip(".,") if boxes else None
    start, depth = boxes[-1].end(), 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


# A minus is a sign only where it is not an operator: in 10-3 and 10 - 3 both numbers are positive.
NUMBER = re.compile(r"((?<![\w)])-\$?(?=[\d.]))?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,;:! ])(?=\d{3}(?!\d))")  # as in 10{,}000 and 10\,000


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order: 1,800 and 10{,}000 are one number each, $18.00 is 18, and 17,18 are two.

    Neither the exponent of a unit, cm^2, nor the minutes of 7:00 count as numbers.
    """
    text = THOUSANDS.sub(",", text.replace("\\$", "$").replace("−", "-"))
    text = re.sub(r"(?<=[A-Za-z})])\s*\^\s*\{?[23]\}?|(?<=\d):00\b", "", text)
    found = (sign[:1] + digits.replace(",", "") for sign, digits in NUMBER.findall(text))
    return [Decimal(re.sub(r"(?<=\.)(\d*?)0*$", r"\1", number).removesuffix(".") or 0) for number in found]


# A heading such as "#### 2. The profit" announces no answer.
MARK = re.compile(r"answer is|####(?! *(?:\d+[.)] +)?[a-z])", re.IGNORECASE)


def gsm8k_answer(response: str) -> str | None:
    """A response's final number: in its last \\boxed{}, else after its last "####" or "answer is", else its last one.

    Of `3 + 15 = 18` the right-hand side counts. A box without a number, or with several, is the answer as it stands.

    >>> gsm8k_answer("5 + 7 = 12 apples, 12 * 100 = 1,200 cents. #### 1,200")
    '1200'
    """
    boxed = last_boxed(response)
    if boxed is not None:
        sides = re.split(r"=|≈|\\approx", boxed)
        several = any(re.search(r"[,;](?!\d{3})|\b(?:or|and)\b", side) for side in sides[1:-1])  # x = 3 or x = 4
        inside = numbers(boxed if several else sides[-1])
        return str(inside[0]) if len(inside) == 1 else boxed or None
    for after in reversed(MARK.split(response)[1:]):
        sentence = re.split(r"\.\s|\n", after.strip())[0]
        if found := numbers(sentence.rpartition("=")[2]):
            return str(found[0])
    everywhere = numbers(response)
    return str(everywhere[-1]) if everywhere else None


def gsm8k_reward(response: str, answer: str) -> float:
    """1.0 if the response's final number equals the one after "####" of the answer (or the answer itself).

    What holds several numbers is a formula, 36/2, which has to equal it, or a list of candidates, which earns nothing.
    """
    given, gold = gsm8k_answer(response), numbers(answer.rpartition("####")[2])
    if given is None or not gold:
        return 0.0
    found = numbers(given)
    return float(found == gold[-1:] or (len(found) > 1 and same_math(given, str(gold[-1]))))


WORDS = r"\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}"
UNIT = r"(?:\s*" + WORDS + r"|(?<=\d) +(?!(?:or|and|pi)\b)[A-Za-z]{2,}[A-Za-z ]*)(?:\^\{?\d\}?)?"
# What people read otherwise than math_verify does: (pattern, replacement)
SPELLINGS: Any = [
    (THOUSANDS, ","),
    (r"~|\\[,;:!]", " "),
    (r"[−–]", "-"),
    (r"°", r"^\\circ"),
    (r"(?<=\d)i\b", " i"),
    (r"(frac)\s*(\\[a-z]+)", r"\1{\2}"),  # \frac\pi4
    (r"(\d+)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", lambda m: repeating(*m.groups())),
    (r"\\begin\{[pb]matrix\}([^&]*?)\\end\{[pb]matrix\}", lambda m: "(" + m[1].replace(r"\\", ",") + ")"),
    (r"\\(?:text|mbox)\s*\{((?:[^{}]*\d|\W*(?:or|and)\b)[^{}]*)\}", r" \1 "),  # 5 \text{ or 6} is not 5 with a unit
    (r"(?<=.)(?:" + UNIT + r")+$", ""),
    (r"^(?:" + WORDS + r"[\s=:]*)+(?=.)", ""),  # \text{Area} = 5
    (r"^[\s*$]+|[\s*$.,;\\]+$", ""),
    (r"^([^,]*)\\pm([^,]*)$", r"\1+\2,\1-\2"),
]
# Towers of powers, factorials of factorials and other numbers that sympy could work on for ever
HUGE = re.compile(
    r"\^\s*(?:\d{5}|\w\s*\^|\{[^}]*(?:\d{5}|[\^!]))|(?:\d{5}|[)}!])\s*!|binom\s*\{[^}]*(?:\d{5}|[\^!])"
    r"|\\(?:choose|sum|prod|int|lim|gcd)(?![a-z])|[({]{9}"
)


def repeating(whole: str, fixed: str, period: str) -> str:
    """A repeating decimal as a fraction: 0.1\\overline{6} is (16 − 1)/90."""
    top, bottom = int(whole + fixed + period) - int(whole + fixed), "9" * len(period) + "0" * len(fixed)
    return rf"\frac{{{top}}}{{{bottom}}}"


@lru_cache(maxsize=4096)
def same_math(given: str, gold: str) -> bool:
    """Whether two formulas in LaTeX are mathematically equal. A list of candidates equals no single answer."""
    import math_verify

    if max(len(given), len(gold)) > 300:  # no answer is that long, and reading it can take seconds
        return False
    try:
        for pattern, replacement in SPELLINGS:
            given, gold = re.sub(pattern, replacement, given), re.sub(pattern, replacement, gold)
        if given.replace(" ", "") == gold.replace(" ", ""):
            return given != ""
        if HUGE.search(given):
            return False
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every time-out
        limit = 2 if threading.current_thread() is threading.main_thread() else None  # seconds; it needs a signal
        # By itself, parse would look for any fraction in a box that it cannot read.
        how = {"extraction_config": [math_verify.LatexExtractionConfig()], "extraction_mode": "first_match"}
        trees = [math_verify.parse(f"\\boxed{{{text}}}", **how, parsing_timeout=limit) for text in (gold, given)]
        if math_verify.verify(*trees, allow_set_relation_comp=True, timeout_seconds=limit):
            return True
    except Exception:  # noqa: BLE001 - a model can write anything, and what cannot be read is not a right answer
        return False
    # 28 and 0.28 both stand for 28%, which verify accepts for whole numbers only.
    return "%" in given + gold and same_math(*(re.sub(r"\\?%", "", text) for text in (given, gold)))


def math_reward(response: str, answer: str) -> float:
    """1.0 if the last \\boxed{} of the response is mathematically equal to that of the solution (or the answer itself)."""
    given, gold = last_boxed(response), last_boxed(answer) or answer
    return float(given is not None and same_math(given, gold))


def sums_answer(response: str) -> str | None:
    """What follows the last "#"."""
    return response.rpartition("#")[2].strip() if "#" in response else None


def sums_reward(response: str, answer: str) -> float:
    """1.0 if what follows the last "#" is the answer."""
    return float(sums_answer(response) == answer)


def sums_problems(data: str | None, split: str) -> list[dict]:
    """All 10,000 sums of four digits, of which 500, the same ones always, are the test split and never trained on."""
    if data is not None:
        raise ValueError("--data: the task sums makes its own problems; leave the option out")
    order = np.random.default_rng(0).permutation(10_000)
    digits = [f"{n:04d}" for n in (order[:500] if split == "test" else order[500:])]
    return [{"question": "+".join(d) + "=", "answer": str(sum(map(int, d)))} for d in digits]


def hub_problems(path: str, name: str | None, columns: tuple[str, str], data: str | None, split: str) -> list[dict]:
    """The rows of a dataset on the hub, or of `data` in its place, with `columns` also under question and answer.

    Raises:
        ValueError: it cannot be reached, or has no such split, no such columns or no rows.
    """
    import datasets

    source = data or path
    try:
        rows = datasets.load_dataset(source, name if source == path else None, split=split)
    except Exception as error:
        raise ValueError(
            f"--data: cannot load the {split} split of dataset {source!r}: give a hub name that can be reached, or a local"
            f" directory with {split}.jsonl in it ({first_line(error)})"
        ) from error
    if missing := set(columns) - set(rows.column_names):
        raise ValueError(f"--data: {source!r} has no column {sorted(missing)}; its columns are {rows.column_names}")
    if len(rows) == 0:
        raise ValueError(f"--data: the {split} split of {source!r} has no rows")
    return [{**row, "question": row[columns[0]], "answer": row[columns[1]]} for row in rows]


BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
GSM8K = partial(hub_problems, "openai/gsm8k", "main", ("question", "answer"))
MATH_HARD = partial(hub_problems, "lighteval/MATH-Hard", None, ("problem", "solution"))
TASKS = {
    "sums": Task(sums_reward, sums_answer, sums_problems, "Write the answer after a #.", "{question}"),
    "gsm8k": Task(gsm8k_reward, gsm8k_answer, GSM8K, BOXED),
    "math-hard": Task(math_reward, last_boxed, MATH_HARD, BOXED),
}


def encode_prompts(tokenizer, task: Task, questions: Sequence[str], template: str | None = None) -> list[list[int]]:
    """Questions → lists of token ids: by `template` if given, else the tokenizer's chat template, else the task's own."""
    chat = template is None and tokenizer.chat_template is not None
    if chat:
        turns = [[{"role": "user", "content": f"{question}\n{task.instruction}"}] for question in questions]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    else:
        template = (template or task.template).replace("{instruction}", task.instruction)
        texts = [template.replace("{question}", question) for question in questions]
    return tokenizer(texts, add_special_tokens=not chat)["input_ids"]


def stop_tokens(tokenizer, model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that end a response: EOS, those of the model's generation config, and the end of a chat turn.

    A base model under a chat template often ends its turn with the template's own token, not with its EOS.
    """
    stops = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id
    stops.update([configured] if isinstance(configured, int) else configured or [])
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        end = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        stops.update(set(end) & set(tokenizer.added_tokens_decoder))
    return sorted(stops)


def sampling_limits(tokenizer, model: PreTrainedModel, max_new_tokens: int) -> dict:
    """The arguments of `sample` that say where a response ends."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"max_new_tokens": max_new_tokens, "eos_token_id": stop_tokens(tokenizer, model), "pad_token_id": pad}


def character_tokenizer():
    """A fast tokenizer of transformers whose tokens are the characters of the task sums."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokens = [*special.values(), *"0123456789+=,#"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def build_base(path: Path, device: str) -> None:
    """The built-in base model for the task sums: it can reason but usually does not. Writes it to `path`.

    A Qwen2 of 0.19 million parameters, taught by demonstrations of two habits: in six of ten a guess is blurted out,
    `#20`, usually wrong; in four the sum is worked out, `3+8=11,11+5=16,16+2=18#18`.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if path.exists():
        return
    tokenizer = character_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(device).eval()  # type: ignore[arg-type]

    rng, iterations, batch, lr = np.random.default_rng(0), 500, 64, 4e-3
    problems = sums_problems(None, "train")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    for i in progress(range(iterations), "teaching the built-in base model"):
        questions = [problems[i]["question"] for i in rng.integers(len(problems), size=batch)]
        demonstrations = []
        for question in questions:
            digits = [int(digit) for digit in question[:-1].split("+")]
            totals = list(itertools.accumulate(digits))
            steps = ",".join(f"{a}+{b}={c}" for a, b, c in zip(totals, digits[1:], totals[1:]))
            by_step = rng.random() < 0.4
            demonstrations.append(f"{steps}#{totals[-1]}" if by_step else f"#{abs(totals[-1] + rng.integers(-5, 6))}")
        responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(demonstrations)["input_ids"]]
        # Supervised learning is the M-step with every weight 1.
        logprobs, mask = log_probs(model, tokenizer(questions)["input_ids"], responses)
        loss = empg_loss(logprobs, mask, torch.ones(batch, device=device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min((i + 1) / 50, 1 - i / iterations)
        optimizer.step()

    if not path.exists():  # another run may have built the same in the meantime
        save_model(model, tokenizer, path)


def save_model(model: PreTrainedModel, tokenizer, path: Path) -> None:
    """Write model and tokenizer for `from_pretrained`, whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
    except Exception as error:  # a full disk is an error of the safetensors library's own kind
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error


def load_tokenizer(name: str):
    """The tokenizer of a model and the length of its context, from a hub name or a local directory.

    Raises:
        ValueError: they cannot be had, or the tokenizer has no EOS.
    """
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(name), transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"--model: cannot load {name!r}: it is neither a local directory with a model and its tokenizer, nor a hub name"
            f" that can be reached from here ({first_line(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError("--model: its tokenizer has no EOS token, so no response could end; set eos_token and save it")
    return tokenizer, getattr(config, "max_position_embeddings", None) or sys.maxsize


def load_policy(name: str, tokenizer) -> PreTrainedModel:
    """θ ← base model (line 1 of Algorithm 1), from a hub name or a local directory; on the CPU, in the dtype it is stored in.

    Raises:
        ValueError: it cannot be had, does not suit the tokenizer, or has logits that are not what `log_probs` assumes.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ValueError(f"--model: cannot load the weights of {name!r} ({first_line(error)})") from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(f"--model: the tokenizer of {name!r} has more tokens ({len(tokenizer)}) than the model")
    with torch.no_grad():
        output = model(torch.tensor([[0, 1]]), output_hidden_states=True)
        expected = output.hidden_states[-1] @ model.get_output_embeddings().weight.T
        if not torch.allclose(output.logits, expected, rtol=0.02, atol=0.02, equal_nan=True):
            raise ValueError(f"--model: {name!r} changes its logits after the output embeddings; log_probs does not")
    return model


# -------- Many devices: every process samples its share of the prompts; rewards and gradients are those of the whole batch ---


# This process among those that torchrun started, or the only one
RANK, LOCAL_RANK = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
TIMEOUT = timedelta(minutes=30)  # how long a process waits for the others: longer than sampling or evaluating takes
STORE: Any = None  # where every rank notes how many meetings it has come to
HOST: dist.ProcessGroup | None = None  # the group for what is not on a GPU; None is the default one
meetings = 0


def start_processes(config) -> None:
    """Try the device, and join the processes that torchrun started, each on a GPU of its own.

    Raises:
        ValueError: --device cannot be used.
    """
    global STORE, HOST
    try:
        torch.empty(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: cannot be used here ({first_line(error)})") from error
    if config.device == "cuda":
        config.device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(config.device)
    if WORLD_SIZE > 1 or getattr(config, "shard", False):
        STORE = dist.HashStore() if WORLD_SIZE == 1 else next(dist.rendezvous("env://", RANK, WORLD_SIZE))[0]
        STORE = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), STORE)  # a restart meets anew
        backend = "nccl" if config.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=STORE, rank=RANK, world_size=WORLD_SIZE, timeout=TIMEOUT)
        HOST = dist.new_group(backend="gloo", timeout=TIMEOUT) if backend == "nccl" else None


def gather(values: list, phase: str = "starting") -> list:
    """The values of all ranks, in the order of the ranks; every rank gets the same list.

    Args:
        values: of this rank; anything that pickle takes.
        phase: what the ranks have been doing until now, for the message.
    Raises:
        TimeoutError: a rank did not come within TIMEOUT, or is gone; the message names it and the phase.
    """
    global meetings
    if WORLD_SIZE == 1:
        return values
    meetings += 1
    STORE.set(f"meetings of {RANK}", str(meetings))
    parts: list[list] = [[]] * WORLD_SIZE
    try:
        dist.all_gather_object(parts, values, group=HOST)
    except RuntimeError as error:
        known = [f"meetings of {rank}" for rank in range(WORLD_SIZE)]
        came = [int(STORE.get(key)) if STORE.check([key]) else 0 for key in known]
        missing = [rank for rank, count in enumerate(came) if count < meetings]
        raise TimeoutError(
            f"rank {', '.join(map(str, missing)) or '?'} did not finish {phase}: it is stuck or was killed. The others"
            f" waited for up to {TIMEOUT}. --resume goes on from the last checkpoint ({first_line(error)})"
        ) from error
    return [value for part in parts for value in part]


def agree(facts: dict[str, object]) -> None:
    """Raise ValueError unless all ranks have the same facts; the message names the first that differs."""
    first, *others = gather([facts])
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(f"{name}: rank 0 has {value!r}, rank {rank} has {other[name]!r}; make them the same")


def sum_gradients(model: PreTrainedModel) -> None:
    """Gradients summed over the ranks. (Those of a sharded model are, from its backward passes.)

    Once per update and as a sum, where DistributedDataParallel would average at every backward pass: ranks differ in
    how many trajectories carry weight, and a rank may have none.
    """
    if WORLD_SIZE > 1 and not isinstance(model, FSDPModule):
        gradients = []
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        small = [g for g in gradients if g.numel() < 2**20]  # travel together: each journey has its delay
        together = parameters_to_vector(small)
        for g in (together, *(g for g in gradients if g.numel() >= 2**20)):
            dist.all_reduce(g)
        vector_to_parameters(together, small)


def spread(model: PreTrainedModel, config) -> PreTrainedModel:
    """The model itself, now in float32 on this rank's device: whole, or with --shard only this rank's share of it.

    In float32, whatever it is stored in: at a learning rate of 1e-6 bfloat16 would round most updates away. Sharded, a
    layer's weights are gathered in --dtype when the layer is used, and its gradient is summed in float32 over the ranks.
    """
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for layer in layers if config.gradient_checkpointing else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if config.shard:
        mesh = init_device_mesh(config.device.split(":")[0], (WORLD_SIZE,))
        precision = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
        for module in (*layers, model):
            sharded = fully_shard(module, mesh=mesh, mp_policy=precision)
            sharded.set_gradient_divide_factor(1.0)  # a sum, as in sum_gradients
            sharded.set_force_sum_reduction_for_comms(True)
    model.to(config.device)  # type: ignore[arg-type]
    return model.float()


def progress(items: Iterable | None, description: str, **options) -> tqdm:
    """A progress bar of the first process, on standard error; in a log file it moves every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, description, leave=False, mininterval=interval, disable=RANK != 0, dynamic_ncols=True, **options)


# -------- What a run goes on from, and its checkpoints ----------------------------------------------------------------


@dataclass
class Trajectory:
    """An entry of the buffer D: τ = (prompt, rationale and answer) in token ids, and its weight R̃ − b in Eq. 12."""

    prompt: list[int]
    response: list[int]
    weight: float = 0.0


@dataclass
class State:
    """A run between two iterations. A checkpoint has all of it but θ*, which is made from θ."""

    policy: PreTrainedModel  # θ
    old_policy: PreTrainedModel  # θ*, whole on every rank
    reference: PreTrainedModel | None  # π_ref of the KL term
    optimizer: torch.optim.Optimizer
    at_once: int  # responses that a rank samples at a time
    step: int = 0  # iterations done
    rows: list[dict] = field(default_factory=list)  # of metrics.jsonl
    track: Callable[[dict, int], None] | None = None  # takes each row, too, for --report-to


def begin(config: Config, policy: PreTrainedModel) -> State:
    """The state before the first iteration, from the base model on the CPU, which becomes the policy."""
    old_policy = freeze(copy.deepcopy(policy), getattr(torch, config.dtype)).to(config.device)  # type: ignore[arg-type]
    reference = None
    if config.beta:
        old = config.anchor == "old"
        reference = old_policy if old else spread(copy.deepcopy(policy).requires_grad_(False), config)
    policy = spread(policy, config)
    fused = {"fused": True} if policy.device.type in ("cpu", "cuda") else {}
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, **fused)
    at_once = config.prompts_per_step * config.num_samples // WORLD_SIZE
    return State(policy, old_policy, reference, optimizer, at_once)


def tensors(state: State) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps: θ, Adam's averages and the anchor, by name; the very tensors, so that loading restores them."""
    kept = {}
    if state.reference is not None and state.reference is not state.old_policy:
        kept = {f"reference.{name}": parameter.detach() for name, parameter in state.reference.named_parameters()}
    for name, parameter in state.policy.named_parameters():
        adam, fused = state.optimizer.state[parameter], state.optimizer.defaults["fused"]
        if not adam:  # as AdamW itself begins
            adam["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            adam["exp_avg"], adam["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        kept |= {f"{kind}.{name}": tensor for kind, tensor in {"weight": parameter.detach(), **adam}.items()}
    return kept


def bits(tensor: torch.Tensor) -> int:
    """A number that changes with any bit of the tensor: the sum of its elements, read as integers; of a share, its part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    return int(local.detach().contiguous().view(integers).sum(dtype=torch.int64))


def digests(kept: dict[str, torch.Tensor]) -> dict[str, int]:
    """`bits` of each tensor: the same numbers however the tensors are spread over the ranks."""
    numbers, *others = gather([{name: bits(tensor) for name, tensor in kept.items()}], "saving")
    for name in (name for name, tensor in kept.items() if isinstance(tensor, DTensor)):
        numbers[name] += sum(other[name] for other in others)
    return numbers


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    return sorted(path for path in (output / "checkpoints").glob("*") if path.name.isdigit())


def save_checkpoint(output: Path, state: State, keep: int) -> None:
    """Write OUTPUT/checkpoints/STEP, every rank its share, and remove all but the newest `keep`.

    It gets its name when all of it is on the disk: a kill at any instant leaves the checkpoints before it whole. Tensors
    are safetensors files, the rest is JSON: reading them runs no code that they might contain.

    Raises:
        OSError: it cannot be written.
    """
    path = output / "checkpoints" / f"{state.step:06d}"
    unfinished, kept = path.with_suffix(".unfinished"), tensors(state)
    facts = {"step": state.step, "digests": digests(kept), "rows": state.rows}
    try:
        writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        dcp.save(kept, storage_writer=writer, process_group=HOST)
        if RANK == 0:
            with open(unfinished / "state.json", "w") as file:
                json.dump(facts, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
            for old in checkpoints(output)[:-keep]:
                shutil.rmtree(old.rename(old.with_suffix(".unfinished")))
    except (OSError, dcp.api.CheckpointException) as error:
        raise OSError(f"checkpoint {path} cannot be written: {cause(error)}. Those before it are whole") from error


def load_checkpoint(output: Path, state: State) -> None:
    """Bring the state to OUTPUT's newest checkpoint, written by however many ranks; without one, leave it as it is.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    saved = checkpoints(output)
    if saved:
        try:
            facts, kept = json.loads((saved[-1] / "state.json").read_text()), tensors(state)
            dcp.load(kept, storage_reader=HuggingFaceStorageReader(str(saved[-1])), process_group=HOST)
            changed = [name for name, number in digests(kept).items() if facts["digests"][name] != number]
            problem = changed and f"{changed[0]} is not what was saved"
        except (OSError, ValueError, KeyError, dcp.api.CheckpointException) as error:
            problem = cause(error)
        if problem:
            advice = f"; to go on from {saved[-2].name}, remove it" if len(saved) > 1 else ""
            raise ValueError(f"checkpoint {saved[-1]} is damaged ({problem}){advice}")
        state.step, state.rows = facts["step"], facts["rows"]
        copy_weights(state.policy, state.old_policy)
    if RANK == 0:
        for path in (output / "checkpoints").glob("*.unfinished"):
            shutil.rmtree(path)
        # What was recorded after the checkpoint will be done, and recorded, again.
        replacement = output / "metrics.unfinished"
        replacement.write_text("".join(json.dumps(row) + "\n" for row in state.rows))
        replacement.replace(output / "metrics.jsonl")


def cause(error: BaseException) -> str:
    """The first line of what went wrong on the first rank where something did."""
    failures = getattr(error, "failures", None)
    return first_line(next(iter(failures.values()))[0] if failures else error)


# -------- Training ----------------------------------------------------------------------------------------------------


def draw_batch(size: int, count: int, step: int, seed: int) -> list[int]:
    """Which of `size` problems the `count` prompts of iteration `step` are: pass after pass, each in a new order.

    >>> draw_batch(size=4, count=3, step=1, seed=0), draw_batch(size=4, count=3, step=2, seed=0)
    ([2, 0, 1], [3, 3, 0])
    """
    places = range((step - 1) * count, step * count)
    orders = {e: np.random.default_rng([seed, e]).permutation(size) for e in {place // size for place in places}}
    return [int(orders[place // size][place % size]) for place in places]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices 0..N−1 in groups of similar length, each of at most `budget` tokens when padded to its longest.

    >>> micro_batches([5, 9, 4], budget=10)
    [[1], [0, 2]]
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def update(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    trajectories: Sequence[Trajectory],
    total: int,
    config: Config,
    old_policy: PreTrainedModel | None = None,
    reference: PreTrainedModel | None = None,
) -> dict[str, float] | None:
    """One update of θ along Eq. 12, less β ∇KL(π_θ ‖ π_ref). A gradient that is not finite leaves θ as it is.

    Args:
        policy, optimizer: θ, in place.
        trajectories: those of this rank; there may be none.
        total: the number of trajectories on all ranks, N of Eq. 12. Every rank divides by it, so that the sum of the
            ranks' gradients is the gradient of one process, however the trajectories are spread.
        config: the run's options.
        old_policy: θ*, to measure how far θ has moved; None while they are equal, at an iteration's first update.
        reference: the anchor of the KL term; None without one.
    Returns:
        statistics over all ranks: loss; grad_norm, before clipping; entropy in nats per token, estimated by the mean of
        −log π_θ over the tokens; kl to the reference, and kl_old, KL(θ* ‖ θ), in nats per token; ess; skipped, 1 for a
        gradient not finite. None if no trajectory on any rank has a gradient.
    """
    device = next(policy.parameters()).device
    # What has weight 0 adds nothing to the gradient and is not computed. (With a KL term it does, and is.)
    trajectories = [t for t in trajectories if t.weight != 0 or reference is not None]
    lengths = [len(t.prompt) + len(t.response) for t in trajectories]
    groups = [[trajectories[i] for i in group] for group in micro_batches(lengths, config.micro_batch_tokens)]
    if config.shard:  # all ranks take part in every pass of a sharded model: those with fewer groups add idle ones
        groups += [[]] * (max(gather([len(groups)], "sampling")) - len(groups))
    exact: dict[str, Any] = {}
    if reference is not None and config.kl == "topk":
        vocabulary = policy.get_output_embeddings().weight.shape[0]
        exact = {"reference": reference, "topk": min(32, vocabulary) if config.kl_topk is None else config.kl_topk}
    rows = []  # one per trajectory: loss, tokens, log P_θ(τ), KL to the anchor, KL(θ* ‖ θ), log P_θ(τ) − log P_θ*(τ)
    optimizer.zero_grad()
    for group in progress(groups, "updating", delay=2):
        some = group or [Trajectory([0], [0])]
        given: Any = [t.prompt for t in some], [t.response for t in some]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logprobs, mask, *exact_kl = log_probs(policy, *given, temperature=config.temperature, **exact)
            old = ref = logprobs.detach()
            with torch.no_grad():
                if old_policy is not None:
                    old = log_probs(old_policy, *given, temperature=config.temperature)[0]
                if reference is not None and not exact:
                    ref = log_probs(reference, *given, temperature=config.temperature)[0]
        kl = (exact_kl[0] if exact_kl else kl_k3(logprobs, ref)).sum(1)
        weights = logprobs.new_tensor([t.weight for t in some])
        if config.algo == "grpo":  # whose KL is a mean over tokens, too
            loss = grpo_loss(logprobs, old, mask, weights) + config.beta * (kl / mask.sum(1)).mean()
        else:
            loss = empg_loss(logprobs, mask, weights) + config.beta * kl.mean()
        (loss * len(group) / total).backward()
        columns = mask.sum(1), logprobs.sum(1), kl, kl_k3(old, logprobs).sum(1), (logprobs - old).sum(1)
        rows += [(loss.item(), *row) for row in zip(*(column.tolist() for column in columns))][: len(group)]
    if isinstance(reference, FSDPModule):
        reference.reshard()  # as a backward pass does with the policy
    rows = gather(rows, "the passes of an update")
    if not rows:
        return None
    sum_gradients(policy)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    losses, count, log_p, kls, kl_old, log_w = np.array(rows).T
    finite = bool(np.isfinite([grad_norm, losses.sum()]).all())
    if finite:
        optimizer.step()
    return {
        "loss": float(losses.sum()) / total,
        "grad_norm": grad_norm,
        "entropy": float(-log_p.sum() / count.sum()),
        "kl": float("nan") if reference is None else float(kls.sum() / count.sum()),
        "kl_old": float(kl_old.sum() / count.sum()),
        "ess": effective_sample_size(torch.from_numpy(log_w)),
        "skipped": int(not finite),
    }


def sample_in_parts(state: State, prompts: list, num_samples: int, seeds: list | None = None, **how) -> list[list[int]]:
    """`sample` from θ*, `at_once` responses at a time: a number that is halved whenever the GPU's memory runs out."""
    responses: list[list[int]] = []
    while len(responses) < len(prompts) * num_samples:
        start, count = len(responses) // num_samples, max(1, state.at_once // num_samples)
        some = slice(start, start + count)
        try:
            responses += sample(state.old_policy, prompts[some], num_samples, seeds=seeds and seeds[some], **how)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            state.at_once = min(count, len(prompts)) * num_samples // 2
            print(f"rank {RANK}: out of memory; from now on it samples {state.at_once} responses at a time", flush=True)
            torch.cuda.empty_cache()
    return responses


def evaluate(config: Config, state: State, tokenizer, held_out: list[dict], output: Path, **limits) -> str:
    """Score θ, greedily, on the held-out problems, which the ranks share: a row of metrics.jsonl. Returns it in words."""
    copy_weights(state.policy, state.old_policy)
    mine = held_out[RANK::WORLD_SIZE]
    responses = sample_in_parts(state, [problem["prompt"] for problem in mine], 1, temperature=0, **limits)
    texts, reward = tokenizer.batch_decode(responses, skip_special_tokens=True), TASKS[config.task].reward
    results = [(reward(text, problem["answer"]), len(r)) for text, r, problem in zip(texts, responses, mine)]
    accuracy, length = np.mean(gather(results, "an evaluation"), axis=0)
    record(output, state, {"step": state.step, "eval_accuracy": accuracy, "eval_response_tokens": length})
    return f"held-out accuracy {accuracy:.3f}"


def train(config: Config, state: State, tokenizer, problems: list[dict], held_out: list[dict], output: Path) -> None:
    """Algorithm 1: trains the policy in place; each iteration and evaluation adds a row to OUTPUT/metrics.jsonl.

    Args:
        state: where to begin; a checkpoint of it is written every `save_every` iterations and at the end.
        problems, held_out: rows with `prompt` (token ids), `question` and `answer`.
    Raises:
        FloatingPointError: in five iterations in a row no loss or gradient was finite.
        SystemExit: a signal asked for the end; code 128 + its number.
        OSError: a checkpoint cannot be written. TimeoutError: a rank is stuck or gone.
    """
    task, P, G, M = TASKS[config.task], config.prompts_per_step, config.num_samples, config.minibatches
    mine = range(RANK * P // WORLD_SIZE, (RANK + 1) * P // WORLD_SIZE)  # this rank's places in a batch
    limits = sampling_limits(tokenizer, state.policy, config.max_new_tokens)
    how = {"temperature": config.temperature, "top_p": config.top_p, **limits}
    warned: set[str] = set()
    if held_out and not state.rows:
        say(f"before training: {evaluate(config, state, tokenizer, held_out, output, **limits)}")

    for step in progress(range(state.step + 1, config.steps + 1), "training"):  # line 2 of Algorithm 1
        clock = [time.perf_counter()]
        # Line 4: θ* ← θ
        copy_weights(state.policy, state.old_policy)
        state.optimizer.zero_grad()  # leaves the gradients' memory to sampling
        # Line 6: for each prompt of the batch
        drawn = draw_batch(len(problems), P, step, config.seed)
        batch = [problems[drawn[place]] for place in mine]
        # Line 7: sample G responses from P_θ*
        prompts = [problem["prompt"] for problem in batch]
        seeds = [((config.seed << 32) + step << 32) + place for place in mine]
        responses = sample_in_parts(state, prompts, G, seeds, **how)
        clock.append(time.perf_counter())
        # Line 8: into the buffer D, which is empty at every iteration (line 3)
        buffer = [Trajectory(prompts[i // G], response) for i, response in enumerate(responses)]
        # Line 9: reward each; from the rewards of all ranks come the weights R̃ − b of Eq. 12
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        rewards = [task.reward(text, batch[i // G]["answer"]) for i, text in enumerate(texts)]
        cut = [response[-1] not in limits["eos_token_id"] for response in responses]
        facts = gather(list(zip(rewards, map(len, responses), cut, texts)), "sampling")
        weights = trajectory_weights(torch.tensor([fact[0] for fact in facts], dtype=torch.float64).view(P, G), config)
        for t, weight in zip(buffer, weights[list(mine)].flatten().tolist()):
            t.weight = weight
        # Line 12: update θ with Eq. 12 on samples from D, in M parts
        state.optimizer.param_groups[0]["lr"] = config.lr * min(1, step / max(1, config.warmup_steps))
        updates: list[dict] = []
        for part in list(range(M)) * config.epochs:
            chosen, total = [t for i, t in enumerate(buffer) if mine[i // G] % M == part], weights[part::M].numel()
            old_policy = state.old_policy if updates else None  # equal to the policy until the first update
            stats = update(state.policy, state.optimizer, chosen, total, config, old_policy, state.reference)
            updates += [stats] if stats else []  # without signal there is no gradient
        if state.reference is not None and config.anchor == "ema" and step % config.ema_every == 0:
            move_anchor(state.reference, state.policy, config.ema_decay)
        clock.append(time.perf_counter())

        # That was all of Algorithm 1. What is left is to tell, and to keep.
        state.step = step
        line = report(output, state, facts, weights, updates, clock)
        if held_out and (step % config.eval_every == 0 or step == config.steps):
            line += f"  {evaluate(config, state, tokenizer, held_out, output, **limits)}"
        say(line)
        if step % 10 == 1:
            say(f"      sampled, reward {rewards[0]:g}: {batch[0]['question']!r} → {texts[0]!r}")
        for warning in warnings_of([row for row in state.rows if "reward" in row], P) - warned:
            say(f"      Warning: {warning}")
            warned.add(warning)
        save_or_stop(config, state, output)


def trajectory_weights(rewards: torch.Tensor, config: Config) -> torch.Tensor:
    """(P, G) rewards → (P, G) weights of the trajectories' gradients: R̃ − b of Eq. 12, or GRPO's advantages."""
    if config.algo == "grpo":
        return grpo_advantages(rewards)
    if config.smoothing != "none":
        rewards = smooth_rewards(rewards.flatten()).view_as(rewards)
    return subtract_baseline(rewards, config.baseline or "loo")


def report(output: Path, state: State, facts: list, weights, updates: list[dict], clock: list[float]) -> str:
    """Write an iteration's row of metrics.jsonl and return its line.

    An update's statistics are means over the updates, but for the two that say how far θ went from θ*: there the last counts.
    """
    rewards, lengths, cut, texts = zip(*facts)
    seconds = clock[-1] - clock[0]
    means = ("loss", "grad_norm", "kl", "entropy")
    row = {
        "step": state.step,
        "reward": np.mean(rewards),
        "response_tokens": np.mean(lengths),
        **{name: np.mean([stats[name] for stats in updates]) if updates else None for name in means},
        **{name: updates[-1][name] if updates else None for name in ("ess", "kl_old")},
        "skipped_updates": sum(stats["skipped"] for stats in updates),
        "no_signal": (weights == 0).all(1).double().mean().item(),  # share of prompts
        "cut": np.mean(cut),  # share of responses that reached the token limit
        "distinct": len(set(texts)),  # different responses
        "sample_seconds": clock[1] - clock[0],
        "update_seconds": clock[2] - clock[1],
        "step_seconds": seconds,
        "tokens_per_second": sum(lengths) / seconds,
    }
    record(output, state, row)
    line = f"{state.step:4d}  reward {row['reward']:.3f}  length {row['response_tokens']:5.1f}  {seconds:5.1f} s"
    if not updates:
        return f"{line}  no signal: the samples of each prompt have the same reward, so there is nothing to learn from"
    line += f"  gradient norm {row['grad_norm']:.3f}  without signal {row['no_signal']:4.0%}"
    line += f"  KL {row['kl']:.4f}" if state.reference is not None else ""
    line += f"  effective samples {row['ess']:4.0%}" if row["ess"] < 0.99 else ""
    return line + f"  {row['skipped_updates']} updates skipped, not finite" * bool(row["skipped_updates"])


def warnings_of(rows: list[dict], prompts: int) -> set[str]:
    """What may be going wrong, in words that help, from the rows of metrics.jsonl of the iterations so far."""
    last, norms = rows[-1], [row["grad_norm"] for row in rows[-21:-1] if row["grad_norm"] is not None]
    signs = {
        "five iterations without signal: each prompt's responses were all right or all wrong. Take problems nearer to"
        " what the model can do, or more --num-samples, or see in its responses whether it knows the answer's form":
            len(rows) >= 5 and all(row["no_signal"] == 1 for row in rows[-5:]),
        "the effective sample size of the importance weights that EMPG leaves out is below 50%: θ has moved far from θ*,"
        " which sampled. Lower --epochs, --minibatches or --lr":
            last["ess"] is not None and last["ess"] < 0.5,
        "the gradient norm is more than ten times its running median. If rewards fall from here, lower --lr or"
        " --max-grad-norm":
            len(norms) >= 5 and last["grad_norm"] is not None and last["grad_norm"] > 10 * np.median(norms),
        "collapse: nearly all responses are the same text and the reward has fallen to less than half of its best. Go"
        " back to a checkpoint before it, with a lower --lr, fewer --epochs, or --beta above 0":
            last["distinct"] < prompts / 2 and last["reward"] < 0.5 * max(row["reward"] for row in rows),
    }  # fmt: skip
    return {warning for warning, seen in signs.items() if seen}


def record(output: Path, state: State, row: dict) -> None:
    """Append a row to OUTPUT/metrics.jsonl, in which null stands for a number that is missing or not finite."""
    row = {key: float(value) if value is not None and np.isfinite(value) else None for key, value in row.items()}
    state.rows.append(row | {"step": state.step})
    if RANK == 0:
        with open(output / "metrics.jsonl", "a") as file:
            file.write(json.dumps(state.rows[-1]) + "\n")
        if state.track:
            state.track({key: value for key, value in row.items() if value is not None}, state.step)


def tracker(config: Config, output: Path) -> Callable[[dict, int], None] | None:
    """A function that hands a row of metrics.jsonl on to --report-to."""
    if config.report_to == "wandb":
        import wandb

        return wandb.init(project="empg", name=output.name, dir=output, config=asdict(config)).log
    if config.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(output))

        def track(row: dict, step: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return track
    return None


def save_or_stop(config: Config, state: State, output: Path) -> None:
    """Write a checkpoint if it is time for one; end the run if a signal asks for it or no gradient is finite any more.

    Raises:
        as `train`.
    """
    stop = max(gather([max(STOP, default=0)], "an update"))
    last = stop or state.step == config.steps
    if last or (config.save_every and state.step % config.save_every == 0):
        save_checkpoint(output, state, config.keep)
    if last:
        copy_weights(state.policy, state.old_policy)  # θ* is what `main` saves, being whole
    if stop:
        raise SystemExit(128 + stop)
    skipped = [row["skipped_updates"] for row in state.rows if "reward" in row][-5:]
    if len(skipped) == 5 and all(skipped):
        raise FloatingPointError("five iterations in a row had a loss or gradient that is not finite")


# -------- The command line --------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print from the first process, above its progress bars."""
    if RANK == 0:
        (tqdm.write if sys.stderr.isatty() else partial(print, flush=True))(text)


STOP: list[int] = []  # the signals that have asked this process to end


def ask_to_stop(number: int, frame) -> None:
    """Ctrl-C, or SIGTERM as clusters send it: training ends after this iteration. Ctrl-C once more ends it at once."""
    if STOP and signal.SIGINT in (number, *STOP):
        os._exit(128 + number)
    STOP.append(number)
    if LOCAL_RANK == 0:
        text = "\nStopping: this iteration will be finished and a checkpoint written. Ctrl-C again ends at once.\n"
        os.write(2, text.encode())


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fail(message: object, code: int = 2, program: str = "empg.py") -> NoReturn:
    """End the process with one line on standard error; of several processes on a machine the first one prints it.

    That a process is missing is said by every other: the missing one may be the first.
    """
    if LOCAL_RANK == 0 or isinstance(message, TimeoutError):
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


class OptionParser(HfArgumentParser):
    """Reads a dataclass of options. Says in one line what is wrong with them."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see python {self.prog} --help", program=self.prog)


def parse_config(argv: list[str]) -> Config:
    """The options of a command line, with the recipe for this machine in front when it names no model."""
    about = __doc__.splitlines()[0]
    parser = OptionParser(Config, prog="empg.py", description=about, allow_abbrev=False)  # type: ignore[arg-type]
    given = parser.parse_args(argv)
    if given.model not in (None, "builtin"):
        recipe = []
    elif given.model == "builtin" or given.task == "sums" or (given.task is None and not torch.cuda.is_available()):
        recipe = LAPTOP.split()
    else:
        recipe = GPU.split()
    if recipe:
        say(f"This stands for: python empg.py {shlex.join(recipe + argv)}")
    config = Config(**vars(parser.parse_args(recipe + argv)))
    config.task = config.task or "gsm8k"
    choose_device(config)
    return config


def choose_device(config) -> None:
    """Fill in the --device and --dtype that are not given."""
    if config.device is None:
        config.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if config.dtype is None:
        bf16 = config.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        config.dtype = "bfloat16" if bf16 else "float32"


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def check(config: Config) -> None:
    """Raise ValueError for an option that cannot work, before anything is loaded; the message says what to change."""

    def require(name: str, holds: Any, advice: str) -> None:
        if not holds:
            raise ValueError(f"{flag(name)} {getattr(config, name)}: {advice}")

    counts = "steps prompts_per_step num_samples max_new_tokens micro_batch_tokens epochs keep ema_every"
    for name in counts.split():
        require(name, getattr(config, name) >= 1, "must be at least 1")
    for name in ("eval_every", "eval_problems", "save_every", "warmup_steps", "seed", "beta"):
        require(name, 0 <= getattr(config, name) < np.inf, "must be at least 0")
    for name in ("temperature", "lr", "max_grad_norm"):
        require(name, 0 < getattr(config, name) < np.inf, "must be above 0")
    require("top_p", 0 < config.top_p <= 1, "must be above 0 and at most 1")
    require("ema_decay", 0 <= config.ema_decay <= 1, "must be 0 to 1")
    require("minibatches", 1 <= config.minibatches <= config.prompts_per_step, "must be 1 to --prompts-per-step")
    require("prompts_per_step", config.prompts_per_step % WORLD_SIZE == 0, f"must divide among {WORLD_SIZE} processes")
    require("prompt_template", "{question}" in (config.prompt_template or "{question}"), "must contain {question}")
    require("task", config.task in TASKS, f"choose {', '.join(TASKS)}")
    require("model", config.model != "builtin" or config.task == "sums", f"cannot do {config.task}; name another model")
    grpo = config.algo == "grpo"
    for name in ("smoothing", "baseline"):
        require(
            name, not (grpo and getattr(config, name)), "--algo grpo has its own; leave it out, or take --algo empg"
        )
    compares = grpo or config.baseline in (None, "loo")  # samples of a prompt with each other
    require("num_samples", config.num_samples > 1 or not compares, "grpo and the baseline loo need at least 2")
    require("anchor", config.beta or config.anchor == "initial", "needs --beta above 0")
    require("kl", config.beta or config.kl == "k3", "needs --beta above 0")
    require("kl_topk", config.kl_topk is None or config.kl == "topk", "needs --kl topk")
    package = config.report_to
    require("report_to", not package or find_spec(package), f"is not installed; pip install {package}")
    require("resume", not config.resume or config.output, "needs --output, the directory of the run")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    require("resume", config.resume or not restarts, "torchrun --max-restarts needs --resume, else it would begin anew")


def library_versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "datasets", "numpy", "math-verify")
    return {"python": sys.version.split()[0], **{name: version(name) for name in libraries}}


# What may change when a run is resumed: how long it is, and what decides over memory, time and files only.
CHANGEABLE = {"steps", "output", "save_every", "keep", "resume", "report_to", "shard", "gradient_checkpointing"}
CHANGEABLE |= {"micro_batch_tokens"}


def make_output(config: Config) -> Path:
    """The directory for the results: --output, or else a new one under runs/; with --resume it may hold this run already.

    Raises:
        ValueError: it holds another run or cannot be written.
    """
    output = Path(config.output or f"runs/{config.task}-{datetime.now():%Y%m%d-%H%M%S-%f}")
    if any((output / name).exists() for name in ("config.json", "metrics.jsonl", "model")):
        if not config.resume:
            raise ValueError(f"--output {output}: holds another run; name a new directory, or --resume it")
        try:
            before = json.loads((output / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--output {output}: has no readable config.json of a run to resume") from error
        for name in asdict(config).keys() - {"device", *CHANGEABLE}:
            if name in before and before[name] != getattr(config, name):
                raise ValueError(f"{flag(name)} {getattr(config, name)}: the run to resume has {before[name]}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror})") from error
    return output


def load_problems(config: Config, task: Task, tokenizer, context: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out problems, each row with its `prompt` in token ids. What is held out is never trained on.

    Raises:
        ValueError: no problem is left to train on, or a prompt and its response do not fit the model's context.
    """
    held_out = task.problems(config.data, "test") if config.eval_every else []
    questions = {row["question"] for row in held_out}
    problems = [row for row in task.problems(config.data, "train") if row["question"] not in questions]
    if not problems:
        raise ValueError("--data: every training problem is held out, too; --eval-every 0 trains without evaluations")
    chosen = np.random.default_rng(0).permutation(len(held_out))[: config.eval_problems]  # the same for every seed
    held_out = [held_out[i] for i in chosen]
    rows = problems + held_out
    for row, ids in zip(rows, encode_prompts(tokenizer, task, [r["question"] for r in rows], config.prompt_template)):
        row["prompt"] = ids
    response_limit(config.max_new_tokens, rows, context)
    return problems, held_out


def response_limit(wanted: int | None, rows: list[dict], context: int) -> int:
    """--max-new-tokens, or without one what the context leaves behind the longest prompt, but at most 1024.

    Raises:
        ValueError: it does not fit.
    """
    longest = max(len(row["prompt"]) for row in rows)
    limit = wanted or max(1, min(1024, context - longest))
    if longest + limit > context:
        raise ValueError(
            f"--max-new-tokens {limit}: with the longest prompt, {longest} tokens, it exceeds the model's"
            f" context of {context}; at most {context - longest} fit"
        )
    return limit


def load(config: Config) -> tuple:
    """(state, tokenizer, training problems, held-out problems, output): all that `train` needs. What is wrong shows here.

    Raises:
        ValueError: an option cannot work, or the ranks differ in their options, versions, data or weights.
    """
    check(config)
    for known in ("FSDP2-wrapped module", "torch.distributed is disabled"):  # a view nobody writes to; one process
        warnings.filterwarnings("ignore", known)
    if RANK or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    start_processes(config)
    options = {f"--{name}": value for name, value in asdict(config).items() if name != "device"}
    agree(options | {f"version of {name}": number for name, number in library_versions().items()})
    output = gather([make_output(config)] if RANK == 0 else [])[0]
    task, name = TASKS[config.task], config.model
    if name == "builtin":
        name = "runs/sums-base"
        if LOCAL_RANK == 0:
            build_base(Path(name), config.device)
        gather([], "building the base model")
    tokenizer, context = load_tokenizer(name)
    problems, held_out = load_problems(config, task, tokenizer, context)
    policy = load_policy(name, tokenizer)
    vocabulary = policy.get_output_embeddings().weight.shape[0]
    if not 0 <= (config.kl_topk or 0) <= vocabulary:
        raise ValueError(f"--kl-topk {config.kl_topk}: must be 0 to {vocabulary}, the size of the model's vocabulary")
    state = begin(config, policy)
    data = {"the training data": problems, "the held-out data": held_out}
    facts: dict[str, object] = {what: hashlib.sha256(repr(rows).encode()).hexdigest() for what, rows in data.items()}
    weights = state.old_policy.named_parameters() if WORLD_SIZE > 1 else ()  # to read them all takes seconds
    agree(facts | {f"the weights {name}": bits(parameter) for name, parameter in weights})
    if config.resume:
        load_checkpoint(output, state)
        agree({"the checkpoint to resume": state.step})
    if RANK == 0:
        settings = {**asdict(config), "processes": WORLD_SIZE, "versions": library_versions()}
        (output / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        state.track = tracker(config, output)
    return state, tokenizer, problems, held_out, output


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `argv`, or else the process's own."""
    config = parse_config(list(sys.argv[1:] if argv is None else argv))
    STOP.clear()
    try:
        state, tokenizer, problems, held_out, output = load(config)
    except (ValueError, TimeoutError) as error:
        fail(error)

    size = sum(p.numel() for p in state.policy.parameters()) / 1e6
    say(f"{config.model}: {size:.1f}M parameters on {WORLD_SIZE} × {config.device}, {config.dtype}; {config.task}:")
    say(f"{len(problems)} problems to train on, {len(held_out)} held out. Results go to {output}")
    if state.step:
        say(f"Resuming after iteration {state.step}")
    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(config, state, tokenizer, problems, held_out, output)
    except (FloatingPointError, OSError) as error:
        fail(error, code=1)
    except torch.OutOfMemoryError as error:
        advice = "smaller --micro-batch-tokens, --num-samples or --max-new-tokens, --gradient-checkpointing or --shard"
        fail(f"the GPU's memory is too small: {advice} need less ({first_line(error)})", code=1)
    finally:  # whatever ends the training, what was learned is kept: θ* is θ after the last whole iteration
        for number, handler in handlers.items():
            signal.signal(number, handler)
        try:
            if RANK == 0:
                save_model(state.old_policy, tokenizer, output / "model")
            say(f"The model is in {output / 'model'}")
        except OSError as error:
            fail(error, code=1)
    accuracies = [row["eval_accuracy"] for row in state.rows if "eval_accuracy" in row]
    if accuracies:
        say(f"Accuracy on {len(held_out)} held-out problems: {accuracies[0]:.3f} before, {accuracies[-1]:.3f} after.")
    say(f"Score it with: python eval.py --model {output / 'model'} --task {config.task}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
