#!/usr/bin/env python3
"""EM Policy Gradient (EMPG, arXiv 2504.18587): train a language model to reason from nothing but right or wrong.

A trajectory τ = (prompt, rationale, answer) earns R(τ) = 1 for a right answer, else 0. Expectation-maximisation climbs
J(θ) = E[R(τ)], τ ~ P_θ, on its bound log J(θ) ≥ E_q[log R + log P_θ - log q]. E-step: sample from a frozen copy θ* of the
policy; the best q is ∝ P_θ* R. M-step: raise log P_θ of the samples in proportion to their rewards. As θ* becomes θ again
at every iteration, there are no importance weights and no clipping.

    Algorithm 1                                  here
     1  θ ← base model                       load_model
     2  for each iteration:                  train
     4      θ* ← θ                           copy_weights
     6      for each prompt of the batch:    respond
     7, 8       sample responses from P_θ*   sample
     9          reward each                  Task.reward
    12      update θ along Eq. 12            smooth_rewards, subtract_baseline, update (log_probs, empg_loss)

    python empg.py                           a laptop: learns to add step by step within a minute
    torchrun --nproc-per-node 4 empg.py      GPUs: Qwen2.5-1.5B on GSM8K
"""

import ctypes
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.hf_argparser import HfArg

CUDA = torch.cuda.is_available()
CHUNK = 2048 if CUDA else 256  # in tokens


def option(default, help):
    return HfArg(default=default, help=help)


@dataclass
class Config:
    """The options of a run, with defaults for a pretrained model."""

    model: str = option(None, "hub name or directory; by default as suits the machine")
    task: str = option(None, "sums, gsm8k or math-hard; by default gsm8k")
    data: str | None = option(None, "hub name or directory of a dataset")
    output: str | None = option(None, "directory of results; by default in runs/")
    steps: int = option(200, "iterations")
    prompts_per_step: int = option(64, "prompts in a batch, over all processes")
    num_samples: int = option(8, "responses to each prompt")
    max_new_tokens: int = option(512, "token limit of a response")
    temperature: float = option(1.0, "of sampling; the tempered policy learns")
    lr: float = option(1e-6, "AdamW's learning rate")
    max_grad_norm: float = option(1.0, "limit of the gradient's norm")
    beta: float = option(0.0, "weight of the KL to a reference, the base model")
    kl_topk: int | None = option(None, "likeliest tokens whose KL is exact; by default k3")
    ema_decay: float = option(1.0, "what stays of the reference when it moves")
    ema_every: int = option(10, "iterations between such moves")
    eval_every: int = option(10, "iterations between evaluations; 0 for none")
    eval_problems: int = option(256, "problems in an evaluation")
    save_every: int = option(20, "iterations between checkpoints; 0 for the last only")
    resume: bool = option(False, "go on from the checkpoint in --output, if any")
    sample_batch: int = option(512, "responses sampled at a time: bounds memory")
    micro_batch_tokens: int = option(4096, "tokens in a pass of the update: bounds memory")
    gradient_checkpointing: bool = option(False, "compute layers twice: less memory")
    shard: bool = option(False, "split weights, gradients and averages: less memory")
    wandb: bool = option(False, "log to Weights & Biases")
    seed: int = option(0, "of the prompts' order and sampling")
    device: Literal["cuda", "mps", "cpu"] = option("cuda" if CUDA else "cpu", "where to compute")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16" if CUDA else "float32", "of computation")


LAPTOP = {"model": str(Path(__file__).resolve().with_name("base")), "task": "sums", "steps": 60, "prompts_per_step": 32}
LAPTOP |= {"num_samples": 16, "max_new_tokens": 40, "lr": 1e-4, "eval_every": 5, "eval_problems": 500}
GPU = {"model": "Qwen/Qwen2.5-1.5B"}

# ---- The mathematics: pure functions of tensors


def smooth_rewards(rewards: Tensor) -> Tensor:
    """R̃(τ) = sigmoid((R(τ) - μ) / σ), with μ and σ the mean and standard deviation of the whole batch (section 4.2).

    (N,) finite rewards of all processes → (N,) in (0, 1), all 0.5 when they are equal; else ValueError. For 0/1 rewards it
    is R̃ = u + s·R: behind a baseline it scales the gradient, no more.

    >>> smooth_rewards(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.8497, 0.3595, 0.3595, 0.3595])
    """
    if rewards.numel() == 0 or not rewards.isfinite().all():
        raise ValueError("smooth_rewards needs finite rewards")
    if rewards.max() == rewards.min():
        return torch.full_like(rewards / 1, 0.5)
    rewards = rewards / rewards.abs().max()  # its squares stay finite
    z = (rewards - rewards.mean()) / rewards.std(correction=0)
    return torch.sigmoid(z).clamp(torch.finfo(z.dtype).tiny, 1 - torch.finfo(z.dtype).eps)  # it can round to 0 or 1


def subtract_baseline(rewards: Tensor, kind: str = "loo") -> Tensor:
    """The weights R̃(τ) - b of Eq. 12: (P, G) rewards, prompts × samples → (P, G).

    With `loo`, leave-one-out, b is the mean of the prompt's *other* samples. It does not depend on τ, so it leaves the
    expected gradient as it is (E[b ∇log P] = 0) and lowers its variance. A mean with τ in it shrinks that gradient: the
    prompt's (`group`) by (G-1)/G, the `batch`'s by (N-1)/N. `none` is b = 0. Equal rewards of a prompt have weights of
    exactly 0 with `loo` and `group`. ValueError for another kind or shape.

    >>> subtract_baseline(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    if kind not in ("loo", "group", "batch", "none") or rewards.ndim != 2 or (kind == "loo" and rewards.shape[1] < 2):
        raise ValueError(f"baseline {kind!r}: choose loo (of 2 samples or more), group, batch or none, of a matrix")
    centred = rewards - rewards[:, :1]  # equal rewards are exactly 0 here
    if kind == "loo":
        return centred - (centred.sum(1, keepdim=True) - centred) / (rewards.shape[1] - 1)
    if kind == "group":
        return centred - centred.mean(1, keepdim=True)
    return rewards - rewards.mean() if kind == "batch" else rewards


def empg_loss(logprobs: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """-(1/N) Σᵢ wᵢ log P_θ(τᵢ), with log P_θ(τ) = Σₜ log π_θ(token t | tokens before it): a scalar in nats.

    Its gradient is minus Eq. 12, E_{τ~D}[∇log P_θ(τ) (R̃(τ) - b)]. A mean over tokens would favour short right answers and
    long wrong ones. With every weight 1 it is supervised learning. logprobs (N, T); mask (N, T), 1 on the response's
    tokens and its end of sequence; weights (N,).

    >>> logprobs, mask = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> empg_loss(logprobs, mask, weights=torch.tensor([1.0, -1.0]))
    tensor(-0.2500)
    """
    return -(weights * logprobs.masked_fill(mask == 0, 0).sum(1)).mean()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) estimated at each sampled token: r - 1 - log r with r = π_ref / π_θ ("k3", Schulman 2020).

    (N, T) log-probabilities → (N, T) in nats, never negative, on average over tokens of π_θ the KL. As a loss it has the
    gradient of KL(π_ref ‖ π_θ): it pulls to the same point, with another strength.

    >>> kl_k3(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.1065]])
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def kl_topk(logits: Tensor, ref_logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """KL(π_θ ‖ π_ref) at each position: exact over the k likeliest tokens S, sampled over the rest (EMA-PG, 2602.04417).

        Σ_{v∈S} π(v) log(π(v)/ref(v)) + [x ∉ S] ρ log(π(x)/ref(x)),   ρ = π(x) / stopgrad(π(x)) = 1

    (..., V) logits, (...) tokens x sampled from π_θ, k from 0 to V → (...) in nats. On average over x both value and
    gradient are exact at every k: the last logarithm's gradient is that of Σ_{v∉S} π(v).

    >>> kl_topk(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]), k=2)
    tensor([0.1109])
    """
    log_pi = logits.log_softmax(-1)
    log_ratio = log_pi - ref_logits.log_softmax(-1)
    likeliest = log_pi.detach().topk(k, -1).indices
    exact = (log_pi.gather(-1, likeliest).exp() * log_ratio.gather(-1, likeliest)).sum(-1)
    log_pi_x, log_ratio_x = (x.gather(-1, tokens[..., None]).squeeze(-1) for x in (log_pi, log_ratio))
    sampled = (log_pi_x - log_pi_x.detach()).exp() * log_ratio_x
    return exact + sampled.masked_fill((likeliest == tokens[..., None]).any(-1), 0)


# ---- The policy: sample (E-step), log-probabilities of given tokens (M-step), θ* ← θ


def read_prompts(model, prompts, cache, pad_token_id=0, **how):
    """The model's output for P prompts, which fill the cache; their (P, width) mask and last positions (P, 1)."""
    # Left padding ends all prompts in the last column. Positions do not count it.
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (width - len(p)) + [*p] for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, **how)
    return output, mask, position[:, -1:]


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """(B, V) logits, (B,) numbers in [0, 1) → (B,) tokens, by inverting each row's cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)  # ends near 1
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return tokens.squeeze(-1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, num_samples, max_new_tokens, *, eos_token_id, pad_token_id, temperature=1.0, seeds=None):
    """E-step: trajectories from P_θ* (lines 6 to 8 of Algorithm 1).

    P prompts → P·G responses, lists of token ids, all G samples of the first prompt first; each ends with EOS (an int, or
    one of several) unless `max_new_tokens` cut it. Sample g of a prompt with seed s draws its tokens by numbers from a
    generator seeded by (s, g): up to rounding, its company does not matter. Temperature 0 takes the likeliest token. The
    model is in eval mode. ValueError for an empty prompt or missing seeds.
    """
    if not prompts or not all(prompts) or (temperature > 0 and len(seeds or ()) != len(prompts)):
        raise ValueError("sample needs prompts with tokens and, unless greedy, seeds")
    stops = {eos_token_id} if isinstance(eos_token_id, int) else {*eos_token_id}
    rngs = [np.random.default_rng([seed, g]) for seed in seeds or [0] * len(prompts) for g in range(num_samples)]
    uniforms = torch.tensor(np.stack([rng.random(max_new_tokens, np.float32) for rng in rngs]), device=model.device)
    cache, room = DynamicCache(), max(map(len, prompts)) + max_new_tokens
    cache.layers = [StaticLayer(room) for _ in range(model.config.num_hidden_layers)]
    output, mask, position = read_prompts(model, prompts, cache, pad_token_id, logits_to_keep=1)
    whole = [[x.repeat_interleave(num_samples, 0) for x in (layer.keys, layer.values)] for layer in cache.layers]
    logits, mask, position = (x.repeat_interleave(num_samples, 0) for x in (output.logits, mask, position))
    responses = [[] for _ in rngs]
    rows = list(range(len(responses)))
    for t in progress(range(max_new_tokens), "sampling"):
        tokens = draw_tokens(logits[:, -1], uniforms[rows, t], temperature)
        for row, token in zip(rows, tokens.tolist()):
            if not stops.intersection(responses[row][-1:]):
                responses[row].append(token)
        alive = [i for i, row in enumerate(rows) if responses[row][-1] not in stops]
        if not alive or t == max_new_tokens - 1:
            break
        if len(alive) < 0.8 * len(rows):  # pays for a copy
            rows = [rows[i] for i in alive]
            tokens, mask, position = (x[alive] for x in (tokens, mask, position))
            whole = [[x[alive] for x in pair] for pair in whole]
        mask, position = torch.nn.functional.pad(mask, (0, 1), value=1), position + 1
        for layer, pair in zip(cache.layers, whole):  # attention reads what is filled
            layer.max_cache_len = mask.shape[1]
            layer.keys, layer.values = (x[:, :, : mask.shape[1]] for x in pair)
        logits = model(tokens[:, None], attention_mask=mask, position_ids=position, past_key_values=cache).logits
    return responses


def log_probs(model, prompts, responses, temperature=1.0, reference=None, topk=None):
    """M-step: log π_θ(token | tokens before it) of every response token, with gradient.

    P prompts and P·G responses, as `sample` takes and returns them → (N, T) log-probabilities, 0 on padding, and their
    (N, T) mask; with a reference also the KL to it, (N, T) in nats: `kl_topk` if `topk` is given, else `kl_k3`. The model's
    logits have to be its output embeddings times its last hidden state. ValueError for an empty or a missing list.
    """
    if not prompts or len(responses) % len(prompts) or not all([responses, *prompts, *responses]):
        raise ValueError("log_probs needs as many responses for each prompt, all with tokens")
    hidden, tokens, mask = response_states(model, prompts, responses)
    hidden, weight = hidden / temperature, model.get_output_embeddings().weight
    columns = [TokenLogProbs.apply(hidden, weight, tokens)]
    if reference is not None:
        with torch.no_grad():
            ref_hidden = response_states(reference, prompts, responses)[0] / temperature
        ref_weight = reference.get_output_embeddings().weight

        def exact_kl(h, ref_h, token):
            both = ((x @ w.to(x.dtype).T).float() for x, w in ((h, weight), (ref_h, ref_weight)))
            return kl_topk(*both, token, min(topk, len(weight)))

        if topk is None:
            columns.append(kl_k3(columns[0], TokenLogProbs.apply(ref_hidden, ref_weight, tokens)))
        else:
            parts = zip(*(x.split(CHUNK // 4) for x in (hidden, ref_hidden, tokens)))
            columns.append(torch.cat([checkpoint(exact_kl, *part, use_reentrant=False) for part in parts]))
    rows = [torch.zeros_like(mask, dtype=column.dtype).masked_scatter(mask, column) for column in columns]
    return rows[0], mask, *rows[1:]


@torch.no_grad()
def copy_weights(source, target, decay=0.0):
    """target ← decay · target + (1 - decay) · source. For a whole target a sharded source is joined."""
    for new, old in zip(source.parameters(), target.parameters(), strict=True):
        new = new.to(old.dtype)
        whole = hasattr(new, "full_tensor") and not hasattr(old, "full_tensor")
        old.lerp_(new.full_tensor() if whole else new, 1 - decay)


# ---- The update, and Algorithm 1


def update(policy, optimizer, rows, weights, config, reference=None):
    """Line 12 of Algorithm 1: one step of θ along Eq. 12, less β ∇KL(π_θ ‖ π_ref).

    `rows` are the N trajectories of all processes, from `respond`; `weights` (N,) their R̃ - b. The processes share the work,
    and each divides by N: their gradients' sum is that of one. Returns loss, grad_norm before clipping, entropy (the mean
    of -log π_θ) and kl, in nats per token, and skipped_updates: 1 if the gradient is not finite, which leaves θ as it is.
    """
    G = config.num_samples
    prompt, response = (max(len(row[name]) for row in rows) for name in ("prompt", "response"))
    # A prompt is read once for its responses, if they fit. Of weight 0 only the KL has a gradient.
    part = G if prompt + G * response <= config.micro_batch_tokens else 1
    size = max(1, config.micro_batch_tokens // (prompt + part * response)) * WORLD_SIZE
    kept = [i for i in range(0, len(rows), G) if weights[i : i + G].any() or reference is not None]
    kept.sort(key=lambda i: max(len(row["response"]) for row in rows[i : i + G]))
    parts = [range(start, start + part) for i in kept for start in range(i, i + G, part)]
    sums = torch.zeros(4, dtype=torch.float64, device=policy.device)
    for batch in progress([parts[start : start + size] for start in range(0, len(parts), size)], "updating"):
        # A sharded model needs all processes in every pass: in the last some do what does not count.
        mine = batch[RANK::WORLD_SIZE] or batch[:1]
        prompts, chosen = [rows[places[0]]["prompt"] for places in mine], [i for places in mine for i in places]
        responses = [rows[i]["response"] for i in chosen]
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logprobs, mask, *kl = log_probs(policy, prompts, responses, config.temperature, reference, config.kl_topk)
        mask = mask & (RANK < len(batch))
        kl = mask * (kl[0] if kl else 0 * logprobs)
        loss = empg_loss(logprobs, mask, weights[chosen].to(logprobs)) + config.beta * kl.sum(1).mean()
        loss = loss * len(chosen) / len(rows)
        (loss * WORLD_SIZE if config.shard else loss).backward()  # FSDP averages
        sums += torch.stack([loss, mask.sum(), (mask * logprobs).sum(), kl.sum()]).detach()
    if not config.shard:
        sum_gradients(policy.parameters())
    elif reference is not None:
        reference.reshard()  # as backward does with the policy
    norm = clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if np.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()  # makes room for sampling
    loss, tokens, log_p, kl = np.sum(gather([sums.tolist()]), 0)
    stats = {"loss": loss, "grad_norm": norm, "skipped_updates": int(not np.isfinite(norm))}
    return stats | {"entropy": -log_p / max(1, tokens), "kl": kl / max(1, tokens) if reference else np.nan}


def train(config, policy, old_policy, reference, tokenizer, problems, held_out, output):
    """Algorithm 1. Every iteration and evaluation adds a row to OUTPUT/metrics.jsonl.

    `policy` (θ), `old_policy` (θ*, whole on every process; in the end θ) and `reference` (or None) begin as the base model.
    `problems` and `held_out` have prompt, question and answer.
    """
    task, P, G = TASKS[config.task], config.prompts_per_step, config.num_samples
    limits = config.max_new_tokens, min(config.sample_batch, P * G // WORLD_SIZE)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step, metrics = load_checkpoint(output, policy, optimizer, reference) if config.resume else (0, [])
    passes = np.tile(np.arange(len(problems)), (1 + config.steps * P // len(problems), 1))
    order = np.random.default_rng(config.seed).permuted(passes, axis=1).flatten()  # each pass in a new order
    while True:
        # Line 4: θ* ← θ
        copy_weights(policy, old_policy)
        if held_out and (step % config.eval_every == 0 or step >= config.steps):
            accuracy = np.mean([row["reward"] for row in respond(old_policy, tokenizer, task, held_out, 1, *limits)])
            record(config, output, metrics, {"step": step, "eval_accuracy": accuracy})
        if step >= config.steps:
            break
        # Line 2: for each iteration
        step, start = step + 1, time.perf_counter()
        # Line 6: for each prompt of the batch
        batch = [problems[i] for i in order[(step - 1) * P : step * P]]
        seed = (config.seed << 32) + step << 32
        # Lines 3 and 7 to 9: fill the buffer D with G responses each from P_θ*, and reward them
        D = respond(old_policy, tokenizer, task, batch, G, *limits, config.temperature, seed)
        sampled = time.perf_counter() - start
        # Line 12: update θ along Eq. 12 on D, with the statistics of the whole batch
        rewards = torch.tensor([row["reward"] for row in D], dtype=torch.float64)
        weights = subtract_baseline(smooth_rewards(rewards).view(P, G))
        optimizer.param_groups[0]["lr"] = config.lr * min(1, step / 5)  # warm-up
        stats = update(policy, optimizer, D, weights.flatten(), config, reference)
        if reference is not None and step % config.ema_every == 0:
            copy_weights(policy, reference, config.ema_decay)  # a moving anchor (EMA-PG)
        tokens, seconds = sum(len(row["response"]) for row in D), time.perf_counter() - start
        row = {"step": step, "reward": rewards.mean().item(), "response_tokens": tokens / len(D), **stats}
        row |= {"no_signal": np.mean((weights == 0).all(1).tolist()), "cut": np.mean([row["cut"] for row in D])}
        row |= {"sample_seconds": sampled, "update_seconds": seconds - sampled, "step_seconds": seconds}
        record(config, output, metrics, row | {"tokens_per_second": tokens / seconds})
        if step % 10 == 1:
            say(f"      sampled, reward {D[0]['reward']:g}: {batch[0]['question']!r} → {D[0]['text']!r}")
        if step == config.steps or (config.save_every and step % config.save_every == 0):
            save_checkpoint(output, step, metrics, policy, optimizer, reference)


# ---- What log_probs rests on


class PromptLayer(DynamicLayer):
    """Keys and values of prompts. Later ones are joined, not kept: backward may compute a layer again."""

    def update(self, keys, values, *args, **kwargs):
        if self.is_initialized:
            return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


def response_states(model, prompts, responses):
    """(n, H) last hidden states, which predict the response tokens; (n,) these tokens; their (N, T) mask."""
    how = {"output_hidden_states": True, "logits_to_keep": 1}
    before, cache, copies = DynamicCache(), DynamicCache(), len(responses) // len(prompts)
    before.layers, cache.layers = ([PromptLayer() for _ in range(model.config.num_hidden_layers)] for _ in range(2))
    output, *read = read_prompts(model, prompts, before, **how)
    for old, new in zip(before.layers, cache.layers):
        new.update(*(x.repeat_interleave(copies, 0) for x in (old.keys, old.values)))
        old.is_initialized = False  # as it was when its layer began
    # A prompt's last token predicts the first of a response. Causal attention does not see padding on the right.
    first, mask, position = (x.repeat_interleave(copies, 0) for x in (output.hidden_states[-1][:, -1:], *read))
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in responses], batch_first=True).to(model.device)
    column = torch.arange(ids.shape[1], device=model.device)
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    output = model(ids, attention_mask=mask, position_ids=position + 1 + column, past_key_values=cache, **how)
    mask = column < torch.tensor([[len(response)] for response in responses], device=model.device)
    hidden = torch.cat([first, output.hidden_states[-1][:, :-1]], 1)[mask]
    if torch.is_autocast_enabled(hidden.device.type):  # which does not see inside TokenLogProbs
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden, ids[mask], mask


class TokenLogProbs(torch.autograd.Function):
    """log softmax(W h)[token] of hidden states h (n, H), output embeddings W (V, H), tokens (n,) → (n,), in nats.

    Both passes hold the logits, the largest tensor, of CHUNK tokens, in one buffer. The backward pass computes them
    again, for ∂ log π(token) / ∂ logits = onehot(token) - π.
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens):
        w, dtype = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
        buffer, values, log_sums = hidden.new_empty(min(CHUNK, len(hidden)), len(w)), [], []
        for h, token in zip(hidden.split(CHUNK), tokens.split(CHUNK)):
            logits = torch.mm(h, w.T, out=buffer[: len(h)]).to(dtype)
            chosen, largest = logits.gather(-1, token[:, None]), logits.amax(-1, keepdim=True)
            log_sums.append(largest + logits.sub_(largest).exp_().sum(-1, keepdim=True).log())
            values.append(chosen - log_sums[-1])
        ctx.save_for_backward(hidden, weight, tokens, torch.cat(log_sums))
        return torch.cat(values).squeeze(-1)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, tokens, log_sums = ctx.saved_tensors
        w, d_hidden, d_weight = weight.to(hidden.dtype), torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = hidden.new_empty(min(CHUNK, len(hidden)), len(w))
        parts = (x.split(CHUNK) for x in (hidden, tokens, log_sums, gradient[:, None], d_hidden))
        for h, token, log_sum, g, d_h in zip(*parts):
            pi = torch.mm(h, w.T, out=buffer[: len(h)]).to(log_sum.dtype).sub_(log_sum).exp_()
            pi.scatter_add_(1, token[:, None], torch.full_like(log_sum, -1))
            d_logits = pi.mul_(-g).to(h.dtype)
            torch.mm(d_logits, w, out=d_h)
            if d_weight.dtype == h.dtype:
                d_weight.addmm_(d_logits.T, h)  # the product alone is as large as W
            else:
                d_weight += d_logits.T @ h
        return d_hidden, d_weight, None


# ---- Tasks: problems, prompts and rewards


@dataclass(frozen=True)
class Task:
    """What to learn. Problems are rows with `question` and `answer`, both text."""

    reward: Callable  # (response, answer) → 1.0 if right, else 0.0; never raises
    problems: Callable  # (--data or None, "train" or "test") → problems
    prompt: str = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, braces matched, or None."""
    _, box, tail = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(tail if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return tail[:i]
    return None


def final_answer(text: str) -> str | None:
    """The last \\boxed{}, else the first number after the last "####" or "answer is", else the last number; or None."""
    *before, last = re.split(r"(?i)####|answer is", text)
    last = " ".join(part.rpartition("=")[2] for part in re.split(r"\.\s|\n", last))  # 5 of 2 + 3 = 5
    numbers = re.findall(r"(?:(?<![\w)])-)?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)", last.replace("$", ""))
    return last_boxed(text) or "".join(numbers[:1] if before else numbers[-1:]).replace(",", "") or None


@lru_cache(maxsize=4096)
def same(given: str | None, answer: str) -> float:
    """1.0 if a formula equals the answer, its \\boxed{} or what follows its "####". A list of candidates equals none."""
    from math_verify import LatexExtractionConfig, parse, verify

    # math_verify takes text for a unit: "5 \text{ or 6}" would be 5.
    hidden = r"\\(?:text|mbox)\s*\{([^{}]*(?:\d|\b(?:or|and|if)\b)[^{}]*)\}"
    both = given or "", last_boxed(answer) or answer.rpartition("####")[2]
    given, gold = (re.sub(hidden, r" \1 ", text).strip(" .$") for text in both)
    limit = 2 * (threading.current_thread() is threading.main_thread())  # seconds, by a signal; 0 is none
    how = {"extraction_config": [LatexExtractionConfig()], "extraction_mode": "first_match", "parsing_timeout": limit}
    if given == gold:
        return float(given != "")
    try:
        trees = [parse(f"\\boxed{{{text}}}", **how) for text in (gold, given)]
        return float(verify(*trees, allow_set_relation_comp=True, timeout_seconds=limit))
    except Exception:  # noqa: BLE001 - what cannot be read is not right
        return 0.0


def sums_problems(data, split):
    """The 10,000 sums of four digits; the test split is always the same 500."""
    if data is not None:
        raise ValueError("--data: the task sums has its own")
    order = np.random.default_rng(0).permutation(10_000)
    digits = [f"{n:04d}" for n in (order[:500] if split == "test" else order[500:])]
    return [{"question": "+".join(d) + "=", "answer": str(sum(map(int, d)))} for d in digits]


def hub_problems(path, name, question, answer, data, split):
    """The rows of a dataset, two columns renamed; ValueError without them."""
    import datasets

    try:
        rows = datasets.load_dataset(data or path, None if data else name, split=split)
        rows[0]  # there is one
        return [{**row, "question": row[question], "answer": row[answer]} for row in rows]
    except Exception as error:
        need = f"needs, on the hub or in {split}.jsonl, rows with {question!r} and {answer!r}"
        raise ValueError(f"--data {data or path}: {need} ({error!r})") from error


GSM8K = partial(hub_problems, "openai/gsm8k", "main", "question", "answer")
MATH_HARD = partial(hub_problems, "lighteval/MATH-Hard", None, "problem", "solution")
TASKS = {
    "sums": Task(lambda text, answer: float(final_answer(text) == answer), sums_problems, "{question}"),
    "gsm8k": Task(lambda text, answer: same(final_answer(text), answer), GSM8K),
    "math-hard": Task(lambda text, answer: same(last_boxed(text), answer), MATH_HARD),
}


def add_prompts(problems, task, tokenizer, model, max_new_tokens=None):
    """Gives problems their `prompt`, token ids; returns the limit of responses, by default up to 1024. ValueError: too long."""
    for problem in problems:
        text = task.prompt.replace("{question}", problem["question"])
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        problem["prompt"] = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    room = model.config.max_position_embeddings - max(len(problem["prompt"]) for problem in problems)
    if room < (max_new_tokens or 1):
        raise ValueError(f"--max-new-tokens {max_new_tokens}: at most {room} fit behind the prompts")
    return max_new_tokens or min(1024, room)


def stop_tokens(tokenizer, model):
    """Ids that end a response: EOS, the generation config's, and what ends a turn of the chat template."""
    stops = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id or []).tolist()}
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        stops.update([i for i in ids if i in tokenizer.added_tokens_decoder][-1:])
    return sorted(stops)


def respond(model, tokenizer, task, problems, num_samples, max_new_tokens, sample_batch, temperature=0.0, seed=0):
    """Lines 6 to 9 of Algorithm 1: sample responses to P problems, which the processes share, and reward them.

    Each process samples `sample_batch` at a time, for problem i with the seed `seed` + i. Returns, on every process, all P·G
    rows in order: prompt, response (token ids), text, reward, and cut, whether the limit ended it.
    """
    stops, rows, count = stop_tokens(tokenizer, model), [], max(1, sample_batch // num_samples)
    mine = range(RANK * len(problems) // WORLD_SIZE, (RANK + 1) * len(problems) // WORLD_SIZE)
    for some in (mine[start : start + count] for start in range(0, len(mine), count)):
        how = {"seeds": [seed + i for i in some], "eos_token_id": stops, "pad_token_id": stops[0]}
        prompts = [problems[i]["prompt"] for i in some]
        responses = sample(model, prompts, num_samples, max_new_tokens, temperature=temperature, **how)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for i, response, text in zip(np.repeat(some, num_samples), responses, texts):
            row = {"prompt": problems[i]["prompt"], "response": response, "text": text}
            rows.append(row | {"reward": task.reward(text, problems[i]["answer"]), "cut": response[-1] not in stops})
    return gather(rows)


# ---- Devices, records and checkpoints

RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(*v)) for v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def start_processes(device):
    """Joins torchrun's processes."""
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if not dist.is_initialized():
        store = dist.HashStore() if WORLD_SIZE == 1 else next(dist.rendezvous("env://", RANK, WORLD_SIZE))[0]
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)  # a restart meets anew
        dist.init_process_group(store=store, rank=RANK, world_size=WORLD_SIZE)


def gather(values):
    """The values of all processes, by rank."""
    parts = [values] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def sum_gradients(parameters):
    """Sums the gradients over the processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and WORLD_SIZE > 1:
        together = parameters_to_vector(gradients)
        dist.all_reduce(together)
        vector_to_parameters(together, gradients)


def spread(model, config):
    """The model on this process's device, whole or a share, in float32: bfloat16 would lose small updates."""
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for layer in layers if config.gradient_checkpointing else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for module in (*layers, model) if config.shard else ():
        precision = MixedPrecisionPolicy(getattr(torch, config.dtype), reduce_dtype=torch.float32)
        fully_shard(module, mesh=dist.init_device_mesh(config.device, (WORLD_SIZE,)), mp_policy=precision)
    return model.to(config.device).float()


def state_of(policy, optimizer, reference):
    """θ, Adam's averages and the reference: the tensors themselves, so that loading restores them."""
    state = {f"policy.{name}": p for name, p in policy.named_parameters()}
    for name, p in policy.named_parameters():
        if not optimizer.state[p]:  # as AdamW itself begins
            zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = zeros | {"step": torch.zeros((), device=p.device)}
        state |= {f"{kind}.{name}": tensor for kind, tensor in optimizer.state[p].items()}
    return state | {f"reference.{name}": p for name, p in (reference.named_parameters() if reference else ())}


def save_checkpoint(output, step, metrics, *models):
    """Writes OUTPUT/checkpoint-STEP, named when it is whole, and removes older ones."""
    unfinished, state = output / "unfinished", {"step": step, "metrics": json.dumps(metrics), **state_of(*models)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(unfinished, single_file_per_rank=False))
    if RANK == 0:
        unfinished.rename(output / f"checkpoint-{step:06d}")
        for old in sorted(output.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(old)


def load_checkpoint(output, *models):
    """Restores OUTPUT's checkpoint, if any; returns its step and metrics.jsonl's rows."""
    state = {"step": 0, "metrics": "[]", **state_of(*models)}
    for path in sorted(output.glob("checkpoint-*"))[-1:]:
        dcp.load(state, checkpoint_id=path)
        say(f"Resuming after iteration {state['step']}")
    return state["step"], json.loads(state["metrics"])


def record(config, output, metrics, row):
    """Tells a row and adds it to metrics.jsonl, null for what is not finite."""
    metrics.append({name: value if np.isfinite(value) else None for name, value in row.items()})
    shown = ("eval_accuracy", "reward", "response_tokens", "no_signal", "grad_norm", "step_seconds")
    say(f"{row['step']:4d}  {'  '.join(f'{name} {row[name]:.3f}' for name in shown if name in row)}")
    if RANK == 0:
        unfinished = output / "metrics.unfinished"
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in metrics))
        unfinished.replace(output / "metrics.jsonl")
        if config.wandb:
            import wandb

            (wandb.run or wandb.init(project="empg", config=asdict(config))).log(metrics[-1])


say = partial(print, flush=True) if RANK == 0 else lambda text: None
progress = partial(tqdm, leave=False, delay=2, disable=RANK != 0)

# ---- The command line


def fail(message):
    """Ends with one line on stderr."""
    if LOCAL_RANK == 0:
        print("error:", str(message).splitlines()[0], file=sys.stderr)
    raise SystemExit(2)


def check(config):
    """Ends where an option cannot work."""
    zero = ("beta", "kl_topk", "ema_decay", "eval_every", "save_every", "seed")  # may be 0
    for name, value in asdict(config).items():
        if type(value) in (int, float) and not (0 < value < np.inf or (value == 0 and name in zero)):
            fail(f"--{name.replace('_', '-')} {value}: must be positive")
    if config.task not in TASKS:
        fail(f"--task {config.task}: choose {', '.join(TASKS)}")
    if config.prompts_per_step % WORLD_SIZE:
        fail(f"--prompts-per-step {config.prompts_per_step}: must divide among {WORLD_SIZE} processes")
    if config.num_samples == 1:
        fail("--num-samples 1: must be at least 2")
    if Path(config.output, "config.json").exists() and not config.resume:
        fail(f"--output {config.output}: holds another run; name a new one or --resume it")


def load_model(name, dtype="auto"):
    """Tokenizer and model, on the CPU; ValueError if one cannot be used."""
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        raise ValueError(f"--model {name}: no model and tokenizer there or on the hub: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token; save one with it")
    output = model(torch.tensor([[0, 1]]), output_hidden_states=True)
    expected = output.hidden_states[-1] @ model.get_output_embeddings().weight.T
    if not torch.allclose(output.logits, expected, rtol=0.02, atol=0.02):
        raise ValueError(f"--model {name}: changes its logits behind the output embeddings; log_probs does not")
    return tokenizer, model


def main(argv=None):
    """The command line, or `argv`."""
    parser = HfArgumentParser(Config, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    given = parser.parse_args(argv)
    recipe = {} if given.model else LAPTOP if given.task == "sums" or not (given.task or CUDA) else GPU
    parser.set_defaults(**{"task": "gsm8k"} | recipe)
    config = Config(**vars(parser.parse_args(argv)))
    config.output = config.output or f"runs/{config.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    check(config)
    if sys.platform == "linux":  # keep freed memory: new pages are slow
        for name, size in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(name, size)
    start_processes(config.device)
    config = gather([config])[0]
    task, output = TASKS[config.task], Path(config.output)
    try:
        tests = task.problems(config.data, "test") if config.eval_every else []
        known = {row["question"] for row in tests}  # never trained on
        problems = [row for row in task.problems(config.data, "train") if row["question"] not in known]
        if not problems:
            raise ValueError("--data: all problems are in the test split")
        held_out = [tests[i] for i in np.random.default_rng(0).permutation(len(tests))[: config.eval_problems]]
        tokenizer, policy = load_model(config.model)
        add_prompts(problems + held_out, task, tokenizer, policy, config.max_new_tokens)
    except ValueError as error:
        fail(error)
    if RANK == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").write_text(json.dumps(asdict(config), indent=2))
    say(f"{config}\n{len(problems)} problems to train on, {len(held_out)} held out")
    old_policy = load_model(config.model, getattr(torch, config.dtype))[1].requires_grad_(False).to(config.device)
    reference = spread(load_model(config.model)[1].requires_grad_(False), config) if config.beta else None
    train(config, spread(policy, config), old_policy, reference, tokenizer, problems, held_out, output)
    if RANK == 0:
        old_policy.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
    say(f"Score it: python eval.py --model {output / 'model'} --task {config.task}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
