#!/usr/bin/env python3
"""EM Policy Gradient (EMPG, arXiv 2504.18587): train a language model to reason from nothing but right or wrong.

The *policy* is a language model with parameters θ. A *trajectory* τ is a prompt with a sampled response: a
rationale and a final answer. P_θ(τ) is the probability that the policy gives this response to this prompt. The
*reward* R(τ) is 1 if the final answer is right, else 0. (Below, Σ_τ is over the responses to one prompt. With many
prompts, take the average over them. README also counts the probability of the prompt, which does not depend on θ.)

We want a policy with a high expected reward, J(θ) = E[R(τ)] = Σ_τ P_θ(τ) R(τ). Since ∇P = P ∇log P, its gradient is

    ∇J(θ) = Σ_τ R(τ) ∇P_θ(τ) = E[R(τ) ∇log P_θ(τ)].                                            (Eq. 4)

This is an average, so samples can estimate it. A step along the estimate makes each sampled trajectory more likely,
in proportion to its reward. The gradient is called the policy gradient; the method that follows it is called
REINFORCE. EMPG, too, follows it, in two steps that repeat. They are named after those of expectation-maximisation
(EM), from which README derives them:

    E-step: Freeze a copy θ* of the policy. Sample several trajectories for each prompt from it, into a buffer D,
            and reward them.
    M-step: Update θ along the average of (R̃(τ) - b) ∇log P_θ(τ) over the trajectories in D.   (Eq. 12)

R̃ is the smoothed reward. (Smoothing is for rewards that are scores, and brings them between 0 and 1. With rewards
of 0 and 1 it changes little.) The *baseline* b is the mean of R̃ over the prompt's other samples. So trajectories
that are better than the average become more likely, and the others less.

PPO and GRPO multiply the term of each token by the ratio of its new probability to its old one, and clip this
ratio. PPO also trains a second network to predict rewards. EMPG does neither.

    Algorithm 1 of the paper                                      in this file
     1  θ ← base model                                            load_model
     2  for each iteration:                                       train
     3      empty the buffer D                                    train
     4      freeze the old policy: θ* ← θ                         copy_weights
     5      E-step
     6      for each prompt of a batch:                           sample_trajectories
     7, 8       sample several responses from P_θ*, into D        sample
     9          reward each of them                               Task.reward
    10      end of the prompts
    11      M-step
    12      update θ along the policy gradient on D (Eq. 12)      smooth_rewards, subtract_baseline, update
    13  end of the iterations

On a laptop, this trains a tiny model to add step by step, in about a minute:

    python empg.py

On four GPUs of 80 GB, this trains Qwen2.5-1.5B on GSM8K:

    torchrun --nproc-per-node 4 empg.py
"""

import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NoReturn

# The sampler's cache grows at every token. With this setting, CUDA's allocator extends a block of memory instead of
# looking for a larger one, which would leave holes. It has to be set before torch starts CUDA.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
from transformers.hf_argparser import HfArg

# torchrun starts one process for each GPU. It tells each of them its number among all processes (RANK), its number on
# this machine (LOCAL_RANK), and how many processes there are (WORLD_SIZE). Without torchrun there is one process.
RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if RANK == 0:
        print(text, flush=True)


# A progress bar for what takes longer than two seconds, in the first process only.
progress = partial(tqdm, leave=False, delay=2, disable=RANK != 0)


# ------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------


def option(default, help):
    """A field of Config with its default and the text that --help shows."""
    return HfArg(default=default, help=help)


@dataclass
class Config:
    """The options of a run, with defaults for a pretrained model. (`parse_options` fills in those that are None.)"""

    model: str | None = option(
        None, "Name of a model on the Hugging Face hub, or a directory. Default: one that fits this machine."
    )
    task: str | None = option(
        None, "What to learn: sums, gsm8k or math-hard. Default: gsm8k with --model, else what fits this machine."
    )
    data: str | None = option(
        None, "Name of a dataset on the hub, or a directory with train.jsonl and test.jsonl, instead of the task's own."
    )
    output: str | None = option(None, "Directory for the results. Default: a new one in runs/.")
    steps: int = option(200, "Number of iterations, each with an E-step and an M-step.")
    prompts_per_step: int = option(64, "Number of prompts in each iteration's batch, over all processes.")
    num_samples: int = option(8, "Number of responses sampled for each prompt.")
    max_new_tokens: int = option(512, "Longest response, in tokens. A longer one is cut off there.")
    temperature: float = option(1.0, "Temperature of sampling. The update uses the same temperature.")
    updates: int = option(
        1, "Number of updates on each iteration's batch. From the second on, the samples are an older policy's."
    )
    lr: float = option(1e-6, "Learning rate of AdamW, reached at the fifth iteration.")
    max_grad_norm: float = option(1.0, "A gradient with a larger norm than this is scaled down to it.")
    beta: float = option(
        0.0, "Weight of the KL divergence to the base model, which keeps the policy near it. 0 leaves it out."
    )
    eval_every: int = option(10, "Number of iterations between two evaluations on held-out problems. 0 for none.")
    eval_problems: int = option(256, "Number of held-out problems in an evaluation.")
    save_every: int = option(20, "Number of iterations between two checkpoints. 0 for one at the end only.")
    resume: bool = option(False, "Go on from the checkpoint in --output, or begin there if it has none.")
    sample_batch: int = option(
        512,
        "Number of responses that a process samples at a time, never fewer than --num-samples. Fewer take less memory.",
    )
    micro_batch_tokens: int = option(
        4096, "Number of tokens that a process learns from at a time. Fewer take less memory."
    )
    gradient_checkpointing: bool = option(
        False, "Compute each layer again in the backward pass. Slower, but takes less memory."
    )
    shard: bool = option(
        False, "Split the policy over the GPUs with FSDP, for models that do not fit on one. Default: DDP."
    )
    wandb: bool = option(False, "Log to Weights & Biases, too.")
    seed: int = option(0, "Seed of the order of the problems and of sampling.")
    device: Literal["cuda", "mps", "cpu"] | None = option(
        None, "Where to compute. Default: cuda if there is a GPU, else cpu."
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "Precision of computation. Default: bfloat16 on cuda, else float32."
    )


# What `python empg.py` does on a laptop: the tiny model in base/ learns the built-in task.
LAPTOP = {
    "model": str(Path(__file__).resolve().with_name("base")),
    "task": "sums",
    "steps": 60,
    "prompts_per_step": 32,
    "num_samples": 16,
    "max_new_tokens": 40,
    "lr": 1e-4,
    "eval_every": 5,
    "eval_problems": 500,
}


# ------------------------------------------------------------------------------------------
# The mathematics: pure functions of tensors
# ------------------------------------------------------------------------------------------


def smooth_rewards(rewards: Tensor) -> Tensor:
    """Reward smoothing (section 4.2): R̃(τ) = sigmoid((R(τ) - μ) / σ).

    μ and σ are the mean and the standard deviation of the rewards of the whole batch, over all processes.

    It is meant for rewards such as scores, of which one extreme value could outweigh all others. Rewards of 0 and 1
    just become two other numbers. Then the weights that `subtract_baseline` makes of them are those without smoothing,
    times a factor that is the same for the whole batch.

    Takes: rewards, (N,), finite numbers.
    Returns: (N,), strictly between 0 and 1; all 0.5 if the rewards are equal.
    Raises: ValueError if there are no rewards, or one is not finite.

    >>> smooth_rewards(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.8497, 0.3595, 0.3595, 0.3595])
    """
    if rewards.numel() == 0 or not rewards.isfinite().all():
        raise ValueError("smooth_rewards needs at least one reward, and finite ones")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    if rewards.max() == rewards.min():
        # No response was better than another, and σ is 0.
        return torch.full_like(rewards, 0.5)

    # The scale of the rewards does not matter. With the largest at 1, no square in σ can overflow.
    rewards = rewards / rewards.abs().max()
    standard_scores = (rewards - rewards.mean()) / rewards.std(correction=0)
    smoothed = torch.sigmoid(standard_scores)

    # The sigmoid itself never reaches 0 or 1, but far from the mean it is rounded to them.
    limits = torch.finfo(smoothed.dtype)
    return smoothed.clamp(limits.tiny, 1 - limits.eps)


def subtract_baseline(rewards: Tensor) -> Tensor:
    """The weights R̃(τ) - b of Eq. 12, which RL calls advantages.

    The baseline b is the mean reward of the prompt's *other* samples (leave-one-out, as in RLOO). As it does not
    depend on τ, subtracting it does not change the expected gradient:

        E[b ∇log P_θ(τ)] = b Σ_τ P_θ(τ) ∇log P_θ(τ) = b Σ_τ ∇P_θ(τ) = b ∇1 = 0.

    (With smoothed rewards this is nearly true: through μ and σ, b depends a little on R(τ). In a large batch that is
    negligible.) What it does change is the variance: it removes what all samples of a prompt share because the prompt
    is easy or hard. It also gives wrong answers a negative weight.

    Takes: rewards, (P, G): prompts × samples of each, with G of 2 or more.
    Returns: (P, G) weights, exactly 0 for a prompt whose rewards are all equal.
    Raises: ValueError for another shape.

    >>> subtract_baseline(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError("subtract_baseline needs rewards of shape (prompts, samples), with two samples or more")
    num_samples = rewards.shape[1]

    # Subtracting the same number from all rewards of a prompt changes none of its weights. Subtract the first reward:
    # then equal rewards are exactly 0, and rounding cannot leave them a tiny weight.
    rewards = rewards - rewards[:, :1]
    sum_of_others = rewards.sum(dim=1, keepdim=True) - rewards
    baseline = sum_of_others / (num_samples - 1)
    return rewards - baseline


def empg_loss(logprobs: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """The loss whose gradient is minus Eq. 12, with wᵢ = R̃(τᵢ) - b:

        -(1/N) Σᵢ wᵢ log P_θ(τᵢ)    with    log P_θ(τ) = Σₜ log π_θ(token t | tokens before it).

    log P_θ(τ) is a sum over the tokens of the response, its end-of-sequence token included. With a mean in its place,
    each token of a long response would count less: long right answers would be raised less than short ones, and long
    wrong answers lowered less.
    If all weights are 1, this is the loss of supervised learning.

    Takes: logprobs, (N, T), log-probabilities of the response tokens, in nats;
        mask, (N, T), 1 on response tokens and 0 on padding;
        weights, (N,).
    Returns: a scalar, in nats.

    >>> logprobs = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]])
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> empg_loss(logprobs, mask, weights=torch.tensor([1.0, -1.0]))
    tensor(-0.2500)
    """
    # Padding may hold anything, even nan, so replace it: nan times 0 would still be nan.
    trajectory_logprobs = logprobs.masked_fill(mask == 0, 0).sum(dim=1)
    return -(weights * trajectory_logprobs).mean()


def kl_divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) = Σ_v π_θ(v) log(π_θ(v) / π_ref(v)) at each position, summed over the whole vocabulary.

    The expectation is over the policy that learns, not over the reference: this is called the reverse KL.

    Takes: logits and ref_logits, (..., V).
    Returns: (...), in nats.

    >>> kl_divergence(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
    tensor(0.1109)
    """
    log_pi = logits.log_softmax(dim=-1)
    log_ref = ref_logits.log_softmax(dim=-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(dim=-1)


# ------------------------------------------------------------------------------------------
# The policy: sampling from it (E-step), log-probabilities under it (M-step), and its frozen copy
# ------------------------------------------------------------------------------------------


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Draws a token for each row: the first one at which the cumulative distribution exceeds the row's number u.

    Unlike torch.multinomial, this gives the same token for the same u, whatever else is in the batch.

    Takes: logits, (B, V); uniforms, (B,), numbers u in [0, 1). Temperature 0 takes the likeliest token instead.
    Returns: (B,) tokens.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # Rounding lets the cumulative distribution end a little off 1, so scale u to where it does end.
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).squeeze(-1)
    # If the logits are nan, no entry exceeds anything, and the index is past the end, at which a GPU would abort. So
    # take the last token then. (`update` leaves θ as it was if its gradient is nan.)
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, num_samples, max_new_tokens, *, eos_token_id, pad_token_id, temperature=1.0, seeds=None):
    """E-step, lines 7 and 8: samples G = `num_samples` responses to each prompt. RL calls this a rollout.

    A response depends on its prompt, the prompt's seed and its own number among the prompt's samples, and, up to
    rounding, on nothing else in the batch. Temperature 0 takes the likeliest token each time, and needs no seeds.
    Call `model.eval()` before.

    Takes: prompts, P lists of token ids;
        eos_token_id, the token that ends a response, or a list of several;
        pad_token_id, any token (it fills up short prompts, and a mask hides it);
        seeds, P ints.
    Returns: P·G lists of token ids, those of the first prompt first. Each ends with an end token, unless
        `max_new_tokens` cut it off.
    Raises: ValueError if a prompt is empty, or if there is not one seed for each prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("sample needs prompts with at least one token each")
    if seeds is None and temperature == 0:
        seeds = [0] * len(prompts)
    if seeds is None or len(seeds) != len(prompts):
        raise ValueError("sample needs one seed for each prompt")
    end_tokens = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)

    # 1) Draw all random numbers beforehand. Each response has a generator of its own, and a number for each token.
    generators = [np.random.default_rng([seed, g]) for seed in seeds for g in range(num_samples)]
    uniforms = np.stack([generator.random(max_new_tokens, dtype=np.float32) for generator in generators])
    uniforms = torch.tensor(uniforms, device=model.device)  # (P·G, max_new_tokens)

    # 2) Read the prompts in one pass. They are of unequal length, so pad them on the left: then all of them end in the
    #    last column, and their responses begin in the next. The mask hides the padding from attention.
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    padded_prompts = [[pad_token_id] * pads + list(prompt) for pads, prompt in zip(padding, prompts)]
    ids = torch.tensor(padded_prompts, device=model.device)  # (P, width)
    mask = torch.tensor([[0] * pads + [1] * (width - pads) for pads in padding], device=model.device)  # (P, width)
    # Positions count from a prompt's first token, not from its padding. (A pad's own position does not matter.)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache()  # keeps the keys and values of every layer
    output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)

    # 3) Copy what was computed for each prompt. Its samples go on from here, each in a row of its own.
    cache.batch_repeat_interleave(num_samples)
    logits = output.logits[:, -1].repeat_interleave(num_samples, dim=0)  # (rows, V), for the next token
    mask = mask.repeat_interleave(num_samples, dim=0)  # (rows, columns)
    last_position = positions[:, -1:].repeat_interleave(num_samples, dim=0)  # (rows, 1), of the last token

    # 4) Sample token by token. Rows leave the batch when their responses have ended, so remember whose row it is.
    responses = [[] for _ in range(len(prompts) * num_samples)]
    ended = [False] * len(responses)
    response_of_row = list(range(len(responses)))
    for t in progress(range(max_new_tokens), "sampling"):
        tokens = draw_tokens(logits, uniforms[response_of_row, t], temperature)  # (rows,)
        for i, token in zip(response_of_row, tokens.tolist()):
            if not ended[i]:
                responses[i].append(token)
                ended[i] = token in end_tokens
        if all(ended) or t == max_new_tokens - 1:
            break

        # A row whose response has ended costs as much as any other. Dropping rows means copying the cache, so wait
        # until more than a fifth of them have ended.
        going_on = [row for row, i in enumerate(response_of_row) if not ended[i]]
        if len(going_on) < 0.8 * len(response_of_row):
            response_of_row = [response_of_row[row] for row in going_on]
            cache.batch_select_indices(going_on)
            tokens = tokens[going_on]
            mask = mask[going_on]
            last_position = last_position[going_on]

        # The tokens just drawn are one more column. The model reads only them: the cache has the rest.
        mask = F.pad(mask, (0, 1), value=1)
        last_position = last_position + 1
        output = model(tokens[:, None], attention_mask=mask, position_ids=last_position, past_key_values=cache)
        logits = output.logits[:, -1]
    return responses


def unwrap(model):
    """The model itself, if DistributedDataParallel is around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def response_states(model, prompts, responses):
    """The hidden states that predict the response tokens, from one forward pass over prompts and responses.

    Takes: P prompts and P·G = N responses, lists of token ids, with n response tokens in all.
    Returns: hidden, (n, H), the last layer's hidden states that predict these tokens, one response after the other;
        tokens, (n,), the tokens that they predict;
        mask, (N, T), true where a response, padded to the longest of them, has a token.
    """
    num_samples = len(responses) // len(prompts)
    prompts = [prompt for prompt in prompts for _ in range(num_samples)]  # one for each response

    # Put each response after its prompt, and pad on the right. Causal attention never looks to the right, so the
    # padding changes nothing, and the model needs neither a mask nor positions. Without a mask, attention can use the
    # fastest kernel of a GPU.
    device = unwrap(model).device
    rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses)]
    ids = pad_sequence(rows, batch_first=True).to(device)  # (N, columns)
    # We need only the last hidden states, which are those behind the final norm. But DDP and FSDP hook into the forward
    # pass of the whole model. So call the whole model, and let it compute as few logits as possible.
    output = model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)

    # The state in one column predicts the token in the next one: shift them by one.
    hidden = output.hidden_states[-1][:, :-1]  # (N, columns - 1, H)
    next_tokens = ids[:, 1:]  # (N, columns - 1)

    # The last token of the prompt predicts the first token of the response.
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)[:, None]
    length = torch.tensor([len(response) for response in responses], device=device)[:, None]
    column = torch.arange(next_tokens.shape[1], device=device)
    predicts_response = (column >= first) & (column < first + length)  # (N, columns - 1)

    mask = torch.arange(max(map(len, responses)), device=device) < length  # (N, T)
    return hidden[predicts_response], next_tokens[predicts_response], mask


# The number of rows of logits that are computed at a time. A row has an entry for each token of the vocabulary, of
# which Qwen2.5 has 150,000: 2,048 rows take 1.2 GB in float32. A GPU is slow with few rows, a CPU is not.
LOGIT_ROWS = 2048 if torch.cuda.is_available() else 256


def token_logprobs(hidden: Tensor, output_weight: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(W h)[token]: the log-probability of each token, given the hidden state h before it.

    This is minus the cross entropy of the logits W h. For a whole batch the logits would be the largest tensor of all.
    So F.linear_cross_entropy computes them for some rows at a time, and again in the backward pass. (It is new in torch
    2.13. Before, use F.cross_entropy for some rows at a time, under torch.utils.checkpoint.)

    Takes: hidden, (n, H); output_weight, the output embeddings W, (V, H); tokens, (n,).
    Returns: (n,) float32, in nats.
    """
    # Autocast does not look into torch's function. So cast here as it would: in a bfloat16 run, multiply in bfloat16.
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        output_weight = output_weight.to(hidden.dtype)
    # Fix the number of rows, so that memory is bounded. (chunking_method=None switches off the function's own choice.)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LOGIT_ROWS, chunking_method=None)
    logprobs = -F.linear_cross_entropy(hidden, output_weight, tokens, reduction="none", options=options)
    # In a bfloat16 run, torch's function computes logits and softmax in float32, but returns bfloat16: a
    # log-probability of -10 is accurate only to 0.03. The gradient does not see that rounding, since the loss is linear
    # in the log-probabilities. In the mean over tokens, by which `update` estimates the entropy, it averages out. A
    # ratio of two probabilities, which EMPG has no use for, would be a few percent off.
    return logprobs.float()


def token_kls(hidden: Tensor, output_weight: Tensor, ref_hidden: Tensor, ref_output_weight: Tensor) -> Tensor:
    """`kl_divergence` of policy and reference at each of n positions, from their hidden states.

    Takes: hidden and ref_hidden, (n, H); output_weight and ref_output_weight, (V, H).
    Returns: (n,) float32, in nats.
    """

    def chunk_kls(states, ref_states):
        logits = states.float() @ output_weight.float().T
        ref_logits = ref_states.float() @ ref_output_weight.float().T
        return kl_divergence(logits, ref_logits)

    # `checkpoint` forgets the logits of a chunk when its KL is known, and computes them again in the backward pass. A
    # chunk holds several tensors of the size of its logits, for two models, so take fewer rows. The KL is a small
    # difference of large numbers, so compute it in float32 even in a bfloat16 run.
    chunks = zip(hidden.split(LOGIT_ROWS // 4), ref_hidden.split(LOGIT_ROWS // 4))
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.cat([checkpoint(chunk_kls, *chunk, use_reentrant=False) for chunk in chunks])


def log_probs(model, prompts, responses, temperature=1.0, reference=None):
    """M-step: log π_θ(token | tokens before it) of every response token, with gradient.

    The model's logits have to be its output embeddings times its last hidden state; `check_model` makes sure.

    Takes: prompts and responses, P and P·G = N lists of token ids, as `sample` takes and returns them;
        temperature, that of the policy (and of the reference), above 0;
        reference, another model, or None.
    Returns: logprobs, (N, T) float32, in nats, 0 on padding;
        mask, (N, T), true on response tokens;
        and, only if there is a reference: kl, (N, T), the KL divergence to it at each token.
    Raises: ValueError if a list is empty, or if the responses cannot be divided evenly among the prompts.
    """
    if not prompts or not responses or not all(prompts) or not all(responses):
        raise ValueError("log_probs needs prompts and responses with at least one token each")
    if len(responses) % len(prompts) != 0:
        raise ValueError("log_probs needs as many responses to each prompt as to the others")
    hidden, tokens, mask = response_states(model, prompts, responses)

    def place(values):
        """(n,) values of the response tokens → (N, T), with 0 on padding."""
        return torch.zeros(mask.shape, device=values.device).masked_scatter(mask, values)

    # Dividing the hidden states by the temperature divides the logits by it.
    hidden = hidden / temperature
    # Here a weight of the model is used outside its forward pass. DDP and FSDP allow that: in the backward pass they
    # average its gradient over the processes, wherever the weight was used. With FSDP the weight must not be split at
    # this moment, and it is not: see `distribute`.
    output_weight = unwrap(model).get_output_embeddings().weight
    logprobs = place(token_logprobs(hidden, output_weight, tokens))
    if reference is None:
        return logprobs, mask

    with torch.no_grad():
        ref_hidden, _, _ = response_states(reference, prompts, responses)
    ref_hidden = ref_hidden / temperature
    ref_output_weight = unwrap(reference).get_output_embeddings().weight
    return logprobs, mask, place(token_kls(hidden, output_weight, ref_hidden, ref_output_weight))


@torch.no_grad()
def copy_weights(source, target) -> None:
    """Line 4, θ* ← θ: copies the parameters of one model to another of the same shape."""
    for parameter, its_copy in zip(source.parameters(), target.parameters(), strict=True):
        values = parameter.to(its_copy.dtype)
        if isinstance(values, DTensor):
            # With --shard each process holds a share of the parameter. This joins all shares.
            values = values.full_tensor()
        its_copy.copy_(values)


# ------------------------------------------------------------------------------------------
# The method: the E-step, the M-step, and Algorithm 1
# ------------------------------------------------------------------------------------------


def sample_trajectories(
    model, tokenizer, task, problems, num_samples, max_new_tokens, sample_batch, temperature, seed=0
):
    """E-step, lines 6 to 9: samples G responses to each of P problems, which the processes share, and rewards them.

    Takes: problems, dicts with question, answer and prompt (token ids);
        sample_batch, the number of responses that a process samples at a time;
        seed, to which the number of the problem is added.
    Returns: in every process, all P·G trajectories, those of the first problem first. Each is a dict with
        prompt and response, token ids;
        text, the response as text, with "…" (CUT_MARK) behind it if the token limit cut it off;
        reward;
        cut, whether the token limit cut the response off.
    """
    stops = stop_tokens(tokenizer, model)
    my_first = RANK * len(problems) // WORLD_SIZE
    my_end = (RANK + 1) * len(problems) // WORLD_SIZE
    problems_at_a_time = max(1, sample_batch // num_samples)
    trajectories = []
    for start in range(my_first, my_end, problems_at_a_time):
        indices = range(start, min(start + problems_at_a_time, my_end))
        responses = sample(
            model,
            [problems[i]["prompt"] for i in indices],
            num_samples,
            max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            temperature=temperature,
            seeds=[seed + i for i in indices],
        )
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        problem_of_response = [problems[i] for i in indices for _ in range(num_samples)]
        for problem, response, text in zip(problem_of_response, responses, texts):
            is_cut = response[-1] not in stops
            if is_cut:
                text += CUT_MARK
            trajectory = {
                "prompt": problem["prompt"],
                "response": response,
                "text": text,
                "reward": task.reward(text, problem["answer"]),
                "cut": is_cut,
            }
            trajectories.append(trajectory)
    # `gather` joins the lists of all processes.
    return gather(trajectories)


def micro_batches(trajectories: list[dict], max_tokens: int) -> list[list[dict]]:
    """Splits trajectories into micro-batches, for one forward and backward pass each, so that memory is bounded.

    A micro-batch has at most `max_tokens` tokens, including the padding to its longest trajectory, unless a single
    trajectory is longer than that. Trajectories of similar length go together, which keeps the padding small. The
    longest come first: if they fit into memory, so do the others. Here, two rows of 1 + 4 tokens fit into 10:

    >>> trajectories = [{"prompt": [0], "response": [0] * length} for length in (4, 2, 8, 3)]
    >>> [[len(row["response"]) for row in batch] for batch in micro_batches(trajectories, max_tokens=10)]
    [[8], [4, 3], [2]]
    """

    def length(trajectory):
        return len(trajectory["prompt"]) + len(trajectory["response"])

    batches: list[list[dict]] = []
    for trajectory in sorted(trajectories, key=length, reverse=True):
        # The first trajectory of a micro-batch is its longest, so it says how long all rows are.
        if batches and length(batches[-1][0]) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(trajectory)
        else:
            batches.append([trajectory])
    return batches


def micro_batch_loss(policy, batch, config, reference=None):
    """The loss of some trajectories: `empg_loss`, plus β times the KL to the reference, summed over each response.

    Returns: the loss, and a dict of sums over the response tokens, for the records: tokens, logprobs and kl.
    """
    prompts = [trajectory["prompt"] for trajectory in batch]  # one for each response
    responses = [trajectory["response"] for trajectory in batch]
    if reference is None:
        logprobs, mask = log_probs(policy, prompts, responses, config.temperature)
        kl = torch.zeros_like(logprobs)
    else:
        logprobs, mask, kl = log_probs(policy, prompts, responses, config.temperature, reference)
    weights = torch.tensor([trajectory["weight"] for trajectory in batch], device=logprobs.device)
    loss = empg_loss(logprobs, mask, weights) + config.beta * kl.sum(dim=1).mean()
    return loss, {"tokens": mask.sum().item(), "logprobs": logprobs.sum().item(), "kl": kl.sum().item()}


def update(policy, optimizer, trajectories, config, reference=None) -> dict:
    """M-step, line 12: one step of θ along the policy gradient of Eq. 12, minus β times the gradient of the KL.

    The KL is that of the next-token distributions after each beginning of the sampled responses. It depends on θ twice:
    through these distributions, and through which responses are sampled. As is common, the gradient takes only the
    first: the responses are treated as fixed data.

    Takes: trajectories, the dicts of `sample_trajectories`, each with its "weight" R̃ - b. They are those of all
        processes, which share the work.
    Returns: a dict with loss;
        grad_norm, the gradient's norm before clipping;
        skipped_updates, 1 if the gradient was not finite, so that θ was left as it is, else 0;
        entropy, in nats, estimated by the mean of -log π_θ over the tokens that were computed (nan if there were none);
        kl, the mean of the KL over these tokens, in nats (nan without a reference).
    """
    # 1) A trajectory of weight 0 has no gradient, unless the KL gives it one. Leave it out.
    kept = [trajectory for trajectory in trajectories if trajectory["weight"] != 0 or reference is not None]

    # 2) Split those that are kept into micro-batches. In each round, every process takes one, and the gradients add up.
    batches = micro_batches(kept, config.micro_batch_tokens)
    rounds = math.ceil(len(batches) / WORLD_SIZE)
    totals = {"loss": 0.0, "tokens": 0, "logprobs": 0.0, "kl": 0.0}
    for turn in progress(range(rounds), "updating"):
        number = turn * WORLD_SIZE + RANK
        has_work = number < len(batches)
        # DDP and FSDP wait for all processes. So in the last round, a process that has no micro-batch left computes
        # the first one once more, with a share of 0.
        batch = batches[number] if has_work else batches[0]
        # The loss of a micro-batch is a mean over it. Times the micro-batch's share of all trajectories, these means
        # add up to the mean over all trajectories. (Those left out in step 1 would add 0.)
        share = len(batch) / len(trajectories) if has_work else 0.0

        # In DDP training we only need to sync gradients at the last micro-batch. Until then they add up in each
        # process. (Without DDP this attribute does nothing. FSDP syncs every time: whole gradients would not fit.)
        policy.require_backward_grad_sync = turn == rounds - 1
        with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss, sums = micro_batch_loss(policy, batch, config, reference)
        # DDP and FSDP average the gradients of the processes, but we need their sum: hence the factor WORLD_SIZE.
        (WORLD_SIZE * share * loss).backward()

        totals["loss"] += share * loss.item()
        if has_work:
            for name, value in sums.items():
                totals[name] += value
    if config.shard and reference is not None:
        # FSDP keeps the embeddings whole after a forward pass, till the backward pass splits them again (see
        # `distribute`). The reference has no backward pass, so split them here.
        reference.reshard()

    # 3) Step along the gradient. Skip the step if the gradient is not finite, which would destroy the model. Skip it,
    #    too, if there were no micro-batches. (With DDP the gradients are then 0, and Adam would still step along its
    #    average of past gradients.)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    is_finite = bool(norm.isfinite())
    if is_finite and batches:
        optimizer.step()
    # Free the gradients' memory for sampling. With DDP the gradients are views of its buffers (see `distribute`), which
    # stay in memory. So with DDP only zero them: new gradients would be held beside the buffers.
    optimizer.zero_grad(set_to_none=not isinstance(policy, DistributedDataParallel))

    # 4) Add up what the processes have counted.
    totals_of_all = gather([totals])
    totals = {name: sum(each[name] for each in totals_of_all) for name in totals}
    tokens = totals["tokens"] if totals["tokens"] > 0 else math.nan  # of no tokens there is no mean
    return {
        "loss": totals["loss"],
        "grad_norm": norm.item(),
        "skipped_updates": int(not is_finite),
        "entropy": -totals["logprobs"] / tokens,
        "kl": totals["kl"] / tokens if reference is not None else math.nan,
    }


def train(config, policy, old_policy, reference, tokenizer, problems, held_out, output) -> None:
    """Algorithm 1. Each iteration and each evaluation adds a row to OUTPUT/metrics.jsonl.

    Why is there a second model? θ does not change while we sample, so we could sample from θ itself. But θ* is faster
    to sample from. It is whole in every process, whereas θ may be split over the GPUs. On a GPU it is in
    bfloat16, whereas θ has to be float32, since bfloat16 would round updates of 1e-6 away. After sampling, θ* is not
    needed until the next iteration. (PPO and GRPO would need its probabilities for their ratios.)

    Takes: policy, θ, which learns (inside DDP or FSDP if there are several processes);
        old_policy, θ*, its frozen copy (on return, it equals the trained θ);
        reference, the frozen base model for the KL, or None;
        problems and held_out, dicts with question, answer and prompt (token ids), to train on and to evaluate on;
        output, the directory of the run.
    """
    task = TASKS[config.task]
    P = config.prompts_per_step  # not the probability P_θ
    G = config.num_samples
    # As is usual for language models, Adam remembers the squares of about 20 gradients (0.95), not of 1,000. Weight
    # decay would pull θ towards 0, away from the base model.
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    # Line 1: θ is the base model, or what a checkpoint has made of it.
    last_step, metrics = 0, []
    if config.resume:
        last_step, metrics = load_checkpoint(output, policy, optimizer, reference)
    if last_step > config.steps:
        fail(f"--steps {config.steps}: the run in {output} has {last_step} already; give as many or more")

    # An evaluation samples no more responses at a time than training does, so that it needs no more memory.
    sample_batch = min(config.sample_batch, math.ceil(P / WORLD_SIZE) * G)

    def evaluate(step):
        """Records the share of held-out problems that θ answers correctly, taking the likeliest token each time."""
        copy_weights(policy, old_policy)
        trajectories = sample_trajectories(
            old_policy,
            tokenizer,
            task,
            held_out,
            num_samples=1,
            max_new_tokens=config.max_new_tokens,
            sample_batch=sample_batch,
            temperature=0,
        )
        accuracy = np.mean([trajectory["reward"] for trajectory in trajectories])
        record(config, output, metrics, {"step": step, "eval_accuracy": accuracy})

    # The order of the problems: one random permutation after the other. Iteration t takes the t-th block of P.
    num_permutations = math.ceil(config.steps * P / len(problems))
    generator = np.random.default_rng(config.seed)
    order = np.concatenate([generator.permutation(len(problems)) for _ in range(num_permutations)])

    if last_step == 0 and config.eval_every:
        evaluate(step=0)

    # Line 2: for each iteration
    for step in range(last_step + 1, config.steps + 1):
        start = time.perf_counter()

        # Line 4: freeze the old policy, θ* ← θ.
        copy_weights(policy, old_policy)

        # Lines 3 and 5 to 10, the E-step: for each prompt of the batch, sample G trajectories from P_θ*, and reward
        # them. They are the buffer D, which is new in each iteration.
        batch = [problems[i] for i in order[(step - 1) * P : step * P]]
        trajectories = sample_trajectories(
            old_policy,
            tokenizer,
            task,
            batch,
            num_samples=G,
            max_new_tokens=config.max_new_tokens,
            sample_batch=sample_batch,
            temperature=config.temperature,
            # `sample_trajectories` adds the prompt's number, so no two prompts, iterations or values of --seed share a
            # seed (with fewer than 10**6 prompts in an iteration, and 10**6 iterations).
            seed=config.seed * 10**12 + step * 10**6,
        )
        sample_seconds = time.perf_counter() - start

        # Smooth the rewards and subtract the baseline. Every process has the trajectories of all, so that these are
        # the statistics of the whole batch.
        rewards = torch.tensor([float(trajectory["reward"]) for trajectory in trajectories])  # (P·G,)
        weights = subtract_baseline(smooth_rewards(rewards).view(P, G))  # (P, G)
        for trajectory, weight in zip(trajectories, weights.flatten().tolist()):
            trajectory["weight"] = weight

        # The learning rate rises during the first five iterations, in which Adam's averages form.
        optimizer.param_groups[0]["lr"] = config.lr * min(1, step / 5)

        # Lines 11 and 12, the M-step. At the first update θ = θ* (on a GPU, up to the rounding of θ* to bfloat16). So
        # the samples come from the policy itself: they are *on-policy*, and Eq. 12 is the policy gradient (Eq. 4) for
        # smoothed rewards, with nothing to correct. At a second update (--updates) θ has moved away from θ*, and the
        # samples are *off-policy*. PPO and GRPO would now multiply each term by π_θ/π_θ*, and clip it. Eq. 12 does not,
        # and so is right only as long as θ stays near θ*.
        all_statistics = []
        for _ in range(config.updates):
            all_statistics.append(update(policy, optimizer, trajectories, config, reference))

        # Line 13: that was the iteration. What follows records how it went, and saves it.
        seconds = time.perf_counter() - start
        tokens = sum(len(trajectory["response"]) for trajectory in trajectories)
        row = {
            "step": step,
            "reward": rewards.mean().item(),
            "response_tokens": tokens / len(trajectories),
            # With several updates, these are the last one's statistics.
            **all_statistics[-1],
            "skipped_updates": sum(statistics["skipped_updates"] for statistics in all_statistics),
            # The share of prompts whose responses all got the same reward. Their rewards teach nothing.
            "no_signal": (weights == 0).all(dim=1).double().mean().item(),
            # The share of responses that the token limit cut off.
            "cut": np.mean([trajectory["cut"] for trajectory in trajectories]),
            "sample_seconds": sample_seconds,
            "update_seconds": seconds - sample_seconds,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        record(config, output, metrics, row)
        if step % 10 == 1:
            say(f"      sampled, reward {rewards[0]:g}: {batch[0]['question']!r} → {trajectories[0]['text']!r}")
        is_last = step == config.steps
        if config.eval_every and (is_last or step % config.eval_every == 0):
            evaluate(step)
        if is_last or (config.save_every and step % config.save_every == 0):
            save_checkpoint(output, step, metrics, policy, optimizer, reference)

    # `main` saves the trained model from `old_policy`, which is whole in every process.
    copy_weights(policy, old_policy)


# The method ends here. What follows lets it work on real problems, on many devices, and from the command line.

# ------------------------------------------------------------------------------------------
# Tasks: problems, prompts and rewards
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Something to learn. Put your own into TASKS."""

    # A function of a response and the problem's answer, both text, that returns the reward: a finite number, in the
    # tasks here 1.0 if the response is right, else 0.0. It must not raise, whatever the response is. A response that
    # the token limit cut off ends with CUT_MARK.
    reward: Callable
    # A function of --data (or None) and the split, "train" or "test", that returns the problems: a list of dicts with
    # "question" and "answer", both text.
    problems: Callable
    # What the model is asked. {question} stands for the question.
    # (A problem's "prompt" is this text as token ids: see `add_prompts`.)
    prompt: str = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


# This is put behind a response that the token limit cut off, so that a reader and a reward function can tell.
CUT_MARK = "…"


def last_boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{...} in a text, or None. Braces within it are matched.

    >>> last_boxed(r"So it is $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    _, box, rest = text.rpartition("\\boxed{")
    if not box:
        return None
    depth = 1
    for i, character in enumerate(rest):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return rest[:i]
    # The box is never closed.
    return None


NUMBER = re.compile(
    r"""
    (?: (?<! [\w)] ) - )?        # perhaps a minus sign, as in -3; but the one in 10-3 is not a sign
    (?:
        \d+                      # 18
        (?: , \d{3} (?!\d) )*    # perhaps with thousands, as in 1,200
        (?: \. \d+ )?            # perhaps with decimals, as in 2.50
    |
        \. \d+                   # .5
    )
    """,
    re.VERBOSE,
)


def final_answer(text: str) -> str | None:
    r"""The final answer of a response, or None.

    It is the contents of the last \boxed{}. If that is not there, not closed or empty, it is the first number after the
    last "####" or "answer is". Without these words, it is the last number. Of a sentence or line, only what follows its
    last "=" counts.

    If the token limit cut a response off, its last number does not count. It is only the number at which the model was
    stopped. By accident it can be right, and the model would be rewarded for an answer that it did not give.

    >>> final_answer(r"So it is \boxed{18}, not 17.")
    '18'
    >>> final_answer("The answer is 18. Let me check: 9 + 9 = 18 and 2 + 2 = 4.")
    '18'
    >>> final_answer("Of 5 boxes with 241 each there are 5 * 241 = 1,205")
    '1205'
    >>> final_answer("There are two steps. 1. Find the number of boxes. 2…") is None
    True
    """
    boxed = last_boxed(text)
    if boxed:
        return boxed
    is_cut = text.endswith(CUT_MARK)
    if is_cut:
        # A number at the cut may not be complete.
        text = text.removesuffix(CUT_MARK).rstrip("0123456789.,")
    parts = re.split("####|answer is", text, flags=re.IGNORECASE)
    is_announced = len(parts) > 1
    if is_cut and not is_announced:
        return None

    # In "The answer is 20 - 2 = 18" the right-hand side counts. So in each sentence or line, keep what follows its last
    # "=".
    sentences = re.split(r"\.\s|\n", parts[-1])
    ending = " ".join(sentence.rpartition("=")[2] for sentence in sentences)
    numbers = NUMBER.findall(ending.replace("$", ""))
    if not numbers:
        return None
    number = numbers[0] if is_announced else numbers[-1]
    return number.replace(",", "")


# Many samples give the same answer to a problem. Compare it once.
@lru_cache(maxsize=4096)
def is_right(given: str | None, answer: str) -> float:
    r"""1.0 if a formula equals the answer, else 0.0.

    The answer is a formula, or a solution as in datasets, with the formula in its last \boxed{} or behind a "####".

    A list is compared as a whole, by math_verify. So "3 or 4" equals the answer "3, 4", but not the answer 3:
    otherwise a model would learn to list guesses.

    >>> [is_right(given, "#### 18") for given in ("18.00", r"\$18", r"\frac{36}{2}", "17, 18", None)]
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def clean(formula):
        # math_verify takes \text{...} for a unit, and so would read "5 \text{ or 6}" as 5. If the text holds a digit,
        # or "or", "and" or "if", take it out of \text{}, so that math_verify reads it as a part of the formula.
        formula = re.sub(r"\\(?:text|mbox)\s*\{([^{}]*(?:\d|\b(?:or|and|if)\b)[^{}]*)\}", r" \1 ", formula)
        # Remove dollar signs around the formula, and a full stop behind it. (The dot in .5 stays.)
        formula = formula.lstrip(" $").rstrip(" .$")
        # Words behind a number, as in "6 kilometers", are its unit. Without \text{}, math_verify would read them as a
        # product of letters. Only words of three letters or more: "or" and a variable are no unit, nor is "and".
        return re.sub(r"^([\d.,]+)(?:\s+(?!and\b)[a-z]{3,})+$", r"\1", formula)

    gold = clean(last_boxed(answer) or answer.rpartition("####")[2])
    given = clean(given or "")
    if not given:
        return 0.0
    if given == gold:
        return 1.0

    # A formula such as 9^{9^{9}} would take forever. math_verify's time limit uses a signal, which works in the main
    # thread only. In a program that grades in other threads, 0 switches the limit off, and such a formula can hang.
    seconds = 2 if threading.current_thread() is threading.main_thread() else 0
    options = {
        "extraction_config": [LatexExtractionConfig()],
        "extraction_mode": "first_match",
        "parsing_timeout": seconds,
    }
    try:
        gold_formula = parse(f"\\boxed{{{gold}}}", **options)
        given_formula = parse(f"\\boxed{{{given}}}", **options)
        # The option compares sets with equations, too: the answer "0,1" with "x = 0 or x = 1".
        return float(verify(gold_formula, given_formula, allow_set_relation_comp=True, timeout_seconds=seconds))
    except Exception:  # noqa: BLE001 - what cannot be read is not right
        return 0.0


def sums_problems(data: str | None, split: str) -> list[dict]:
    """The problems of the task sums: all 10,000 sums of four one-digit numbers, such as 3+8+5+2=.

    The test split is always the same 500 of them.
    """
    if data is not None:
        raise ValueError("--data: the task sums has its own problems")
    order = np.random.default_rng(0).permutation(10_000)
    chosen = order[:500] if split == "test" else order[500:]
    all_digits = [f"{number:04d}" for number in chosen]
    return [{"question": "+".join(digits) + "=", "answer": str(sum(map(int, digits)))} for digits in all_digits]


def dataset_problems(path, configuration, question_column, answer_column, data, split) -> list[dict]:
    """The rows of a dataset on the hub, or of --data, with two columns renamed to "question" and "answer".

    Raises: ValueError if there are no rows, or no such columns.
    """
    import datasets

    try:
        if data is None:
            rows = datasets.load_dataset(path, configuration, split=split)
        else:
            rows = datasets.load_dataset(data, split=split)
        problems = [{**row, "question": row[question_column], "answer": str(row[answer_column])} for row in rows]
    except Exception as error:
        need = f"needs, on the hub or in {split}.jsonl, rows with {question_column!r} and {answer_column!r}"
        raise ValueError(f"--data {data or path}: {need} ({error!r})") from error
    if not problems:
        raise ValueError(f"--data {data or path}: its {split} split is empty; it needs rows with {question_column!r}")
    return problems


TASKS = {
    "sums": Task(
        # In "3+8=11,11+5=16,16+2=18#18" there is neither a box nor "####", so that the last number counts.
        reward=lambda response, answer: float(final_answer(response) == answer),
        problems=sums_problems,
        prompt="{question}",
    ),
    "gsm8k": Task(
        reward=lambda response, answer: is_right(final_answer(response), answer),
        problems=partial(dataset_problems, "openai/gsm8k", "main", "question", "answer"),
    ),
    "math-hard": Task(
        reward=lambda response, answer: is_right(last_boxed(response), answer),
        problems=partial(dataset_problems, "lighteval/MATH-Hard", None, "problem", "solution"),
    ),
}


def add_prompts(problems, task, tokenizer) -> None:
    """Gives each problem its "prompt", token ids, as the task and the model's chat template want it."""
    # Base models of Qwen2.5, too, have a chat template, and are prompted with it.
    has_template = tokenizer.chat_template is not None
    for problem in problems:
        text = task.prompt.replace("{question}", problem["question"])
        if has_template:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        # A chat template has already written the special tokens.
        problem["prompt"] = tokenizer(text, add_special_tokens=not has_template)["input_ids"]


def room_for_responses(problems, model) -> float:
    """How many tokens the model can read after the longest prompt; infinitely many if it has no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Once a text is longer than `original_max_position_embeddings`, such a model rotates all keys in another way.
        # But those in the sampler's cache were rotated in the old way, and stay so. So stay below that length.
        limit = rope["original_max_position_embeddings"]
    return limit - max(len(problem["prompt"]) for problem in problems)


def stop_tokens(tokenizer, model) -> list[int]:
    """The token ids that end a response: EOS, those of the generation config, and what ends a turn of a chat."""
    stops = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id
    if isinstance(configured, int):
        stops.add(configured)
    elif configured is not None:
        stops.update(configured)
    if tokenizer.chat_template is not None:
        # Write a short chat and see which special token comes last.
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        special_tokens = [token for token in ids if token in tokenizer.added_tokens_decoder]
        stops.update(special_tokens[-1:])
    return sorted(stops)


# ------------------------------------------------------------------------------------------
# Processes: data parallel with DDP, or sharded with FSDP
# ------------------------------------------------------------------------------------------


def start_processes(device) -> None:
    """Makes a process group of the processes that torchrun has started. FSDP needs it even for one process."""
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        # On newer GPUs, attention with a mask, as in `sample`, would take cuDNN's kernel. Others report that it takes
        # half a second to prepare for each new length (FunASR issue 3704), and the sampler has a new length at every
        # token. It has also given gradients that are nan (PyTorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if dist.is_initialized():
        # A program that calls `main` may have made one already.
        return
    store: dist.Store = dist.HashStore()
    if WORLD_SIZE > 1:
        store, _, _ = next(dist.rendezvous("env://", RANK, WORLD_SIZE))
    # The processes find each other in this store. When torchrun restarts them, the store still holds what the dead ones
    # wrote. So put the number of the restart before every key: then the new processes do not read the old entries.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    # On GPUs, gradients travel by NCCL (with FSDP, weights as well), and everything else by gloo. The processes wait
    # for each other for up to an hour, in case one of them is slow to download the model.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=timedelta(hours=1))


def gather(values: list) -> list:
    """Joins the lists of all processes, in the order of their ranks. Every process gets the whole."""
    if WORLD_SIZE == 1:
        return values
    lists: list = [None] * WORLD_SIZE
    dist.all_gather_object(lists, values)
    return [value for each in lists for value in each]


def distribute(model, config):
    """Places a model on this process's device, in float32, with DDP or FSDP around it.

    With DDP each process has the whole model, and the gradients are averaged. With FSDP (--shard) each process has a
    share of every parameter, of its gradient and of Adam's averages. A frozen model needs no DDP.
    """
    # `_no_split_modules` lists the class names of the model's layers.
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not layers and (config.gradient_checkpointing or config.shard):
        fail("--gradient-checkpointing and --shard: transformers does not name the layers of this kind of model")
    if config.gradient_checkpointing:
        # transformers has a switch for this, too, but it works in training mode only, in which dropout is on.
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if config.shard:
        mesh = dist.init_device_mesh(config.device, (WORLD_SIZE,))
        precision = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
        # Each layer is a unit, which is put together for its forward pass, and split again after it. The last turn of
        # the loop, with the model itself, makes one more unit of the parameters that are left, the embeddings among
        # them. By default (reshard_after_forward=None) fully_shard keeps this outermost unit whole from its forward to
        # its backward pass. `log_probs` relies on that.
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    # With FSDP, each process converts only its own share.
    model = model.to(config.device).float()
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    if config.shard or is_frozen or WORLD_SIZE == 1:
        return model
    # Let the gradients live in the buffers that DDP sends, so that they are not held twice.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


# ------------------------------------------------------------------------------------------
# Records and checkpoints
# ------------------------------------------------------------------------------------------


def record(config, output, metrics, row) -> None:
    """Prints a row and adds it to OUTPUT/metrics.jsonl, with null for what is not finite."""
    metrics.append({name: value if np.isfinite(value) else None for name, value in row.items()})
    shown = ("eval_accuracy", "reward", "response_tokens", "no_signal", "grad_norm", "step_seconds")
    say(f"{row['step']:4d}  " + "  ".join(f"{name} {row[name]:.3f}" for name in shown if name in row))
    if RANK == 0:
        # A file that is written anew and then renamed is whole at any moment, even if the process is killed.
        unfinished = output / "metrics.unfinished"
        unfinished.write_text("".join(json.dumps(each) + "\n" for each in metrics))
        unfinished.replace(output / "metrics.jsonl")
        if config.wandb:
            import wandb

            if wandb.run is None:
                wandb.init(project="empg", config=asdict(config))
            wandb.log(metrics[-1])


def state_of(policy, optimizer, reference) -> dict:
    """What a checkpoint holds: θ, Adam's averages, and the reference (which `studies/ema_pg.py` moves).

    These are the tensors themselves, not copies, so that loading into this dict restores them.
    """
    state = {}
    for name, parameter in unwrap(policy).named_parameters():
        adam = optimizer.state[parameter]
        if not adam:
            # AdamW makes its averages at its first step. Before that, make them here, as AdamW would: zeros.
            adam["step"] = torch.zeros((), device=parameter.device)
            adam["exp_avg"] = torch.zeros_like(parameter)
            adam["exp_avg_sq"] = torch.zeros_like(parameter)
        state[f"policy.{name}"] = parameter
        for kind, tensor in adam.items():
            state[f"{kind}.{name}"] = tensor
    if reference is not None:
        for name, parameter in reference.named_parameters():
            state[f"reference.{name}"] = parameter
    return state


def save_checkpoint(output, step, metrics, policy, optimizer, reference) -> None:
    """Writes OUTPUT/checkpoint-STEP, which gets its name when all of it is on the disk, and removes the one before.

    If a kill leaves an unfinished one, the next call writes over it.
    """
    unfinished = output / "unfinished"
    state = {"step": step, "metrics": json.dumps(metrics), **state_of(policy, optimizer, reference)}
    # With a file for each tensor, they are written one by one, without a copy of all of them in memory.
    dcp.save(state, storage_writer=dcp.FileSystemWriter(unfinished, single_file_per_rank=False))
    if RANK == 0:
        unfinished.rename(output / f"checkpoint-{step:06d}")
        for old in sorted(output.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(old)


def load_checkpoint(output, policy, optimizer, reference):
    """Restores the newest checkpoint. Returns its iteration and the rows of metrics.jsonl; 0 and [] without one."""
    checkpoints = sorted(output.glob("checkpoint-*"))
    if not checkpoints:
        return 0, []
    state = {"step": 0, "metrics": "", **state_of(policy, optimizer, reference)}
    newest = checkpoints[-1]
    try:
        dcp.load(state, checkpoint_id=newest)
    except (Exception, dcp.api.CheckpointException) as error:  # noqa: BLE001 - CheckpointException is a BaseException
        fail(f"--output {output}: {newest.name} is damaged; remove it to begin again ({type(error).__name__})")
    say(f"Resuming after iteration {state['step']}")
    return state["step"], json.loads(state["metrics"])


# ------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------


def fail(message) -> NoReturn:
    """Ends with one line on standard error, on each machine, and exit code 2."""
    if LOCAL_RANK == 0:
        print("error:", str(message).splitlines()[0], file=sys.stderr)
    raise SystemExit(2)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def default_recipe(model, task, device) -> dict:
    """The defaults that depend on the model, the task and the device that a command names. What it names wins.

    Without a model and a task, this picks a pair that the machine can train. With any task but sums, it picks a real
    model: the smallest, unless there is a large GPU. A model that is named, even base/, gets the defaults of Config.
    """
    if model is not None:
        return {"task": "gsm8k"}
    gigabytes = 0.0
    if device == "cuda" and torch.cuda.is_available():
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
    # A GPU that is sold with 24 GB may report no more than 22.
    if task == "sums" or (task is None and gigabytes < 22):
        return LAPTOP
    # With the other defaults, 1.5B parameters take about 50 GB, and 0.5B about 20 GB. README has the arithmetic.
    if gigabytes > 60:
        return {"task": "gsm8k", "model": "Qwen/Qwen2.5-1.5B"}
    return {"task": "gsm8k", "model": "Qwen/Qwen2.5-0.5B"}


def parse_options(argv) -> Config:
    """The options of a command line, with defaults for what it does not say."""
    what_it_does = __doc__.splitlines()[0]
    parser: Any = HfArgumentParser(Config, description=what_it_does, allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = fail
    # The defaults depend on what was asked for, so read the command line twice.
    asked = parser.parse_args(argv)
    device = asked.device or default_device()
    recipe = default_recipe(asked.model, asked.task, device)
    parser.set_defaults(device=device, dtype=default_dtype(device), **recipe)
    config = Config(**vars(parser.parse_args(argv)))
    if config.resume and config.output is None:
        fail("--resume: say which run to go on with, by --output DIR")
    if config.output is None:
        config.output = f"runs/{config.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config


def check_options(config) -> None:
    """Ends with a line that says what to change, if an option cannot work."""
    may_be_zero = ("beta", "eval_every", "save_every", "seed")
    for name, value in asdict(config).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        flag = f"--{name.replace('_', '-')}"
        if is_number and name in may_be_zero and not 0 <= value < math.inf:
            fail(f"{flag} {value}: must not be negative or infinite")
        if is_number and name not in may_be_zero and not 0 < value < math.inf:
            fail(f"{flag} {value}: must be positive and finite")
    if config.task not in TASKS:
        fail(f"--task {config.task}: choose {', '.join(TASKS)}")
    if config.num_samples == 1:
        fail("--num-samples 1: must be at least 2, since the baseline is the mean of the other samples")
    check_device(config.device)
    check_output(config)


def check_device(device) -> None:
    """Ends if this machine does not have the device, or not one for each process."""
    if device == "cuda":
        num_gpus = torch.cuda.device_count()
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if num_gpus == 0:
            fail("--device cuda: torch finds no GPU here; take --device cpu, or a torch that was built for your GPU")
        if num_processes > num_gpus:
            fail(f"torchrun --nproc-per-node {num_processes}: but this machine has {num_gpus} GPUs")
    if device == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: torch finds no Apple GPU here; take --device cpu")


# The method of a run, which its config.json names. A script that replaces pieces of this file sets another name. So
# --resume cannot go on with another method.
METHOD = "EMPG"

# A resumed run may have other values of these options: up to rounding, they do not change what an iteration does.
MAY_CHANGE = {"steps", "eval_every", "save_every", "wandb", "resume", "output", "device", "shard"}
MAY_CHANGE |= {"sample_batch", "micro_batch_tokens", "gradient_checkpointing"}


def check_output(config) -> None:
    """Ends if the results cannot be written to --output, or if a run is there that these options do not continue."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        fail(f"--output {output}: is a file; name a directory")
    if not output.exists() and RANK == 0:
        # Try it. In case another option is refused, do not leave the directory behind.
        try:
            output.mkdir(parents=True)
            output.rmdir()
        except OSError as error:
            fail(f"--output {output}: cannot be made ({error.strerror}); name another directory")

    begun_with = output / "config.json"
    if not begun_with.exists():
        return
    if not config.resume:
        fail(f"--output {output}: holds another run; name a new one or --resume it")
    try:
        before = json.loads(begun_with.read_text())
    except ValueError:
        fail(f"--output {output}: its config.json cannot be read; name another directory")
    # With another method or other options this would be another run, and its checkpoint would replace the first one's.
    method = before.get("method", METHOD)
    if method != METHOD:
        fail(f"--output {output}: the run there was begun with {method}, not {METHOD}; name a new --output")
    for name, value in asdict(config).items():
        if name not in MAY_CHANGE and before.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            begun = f"the run in {output} was begun with {before.get(name)}"
            fail(f"{flag} {value}: {begun}; repeat that, or name a new --output")


def load_problems(config) -> tuple[list[dict], list[dict]]:
    """The problems to train on, and the held-out ones. ValueError if there are none."""
    task = TASKS[config.task]
    try:
        tests = task.problems(config.data, "test")
    except ValueError:
        # A dataset without a test split will do, if nothing is to be evaluated on it.
        if config.eval_every:
            raise
        tests = []

    def plain(problem):
        """The question without the differences of spacing and case that copies of a problem may have."""
        return " ".join(problem["question"].lower().split())

    # A question of the test split may also stand in the training split. Never train on it.
    test_questions = {plain(problem) for problem in tests}
    problems = [problem for problem in task.problems(config.data, "train") if plain(problem) not in test_questions]
    if not problems:
        raise ValueError("--data: all training problems are in the test split, too")
    if not config.eval_every:
        return problems, []
    order = np.random.default_rng(0).permutation(len(tests))
    return problems, [tests[i] for i in order[: config.eval_problems]]


def load_model(name: str, dtype="auto"):
    """A tokenizer and a model from the hub or a directory, on the CPU, in the precision as stored, or in `dtype`.

    `from_pretrained` returns the model in evaluation mode, without dropout, and it stays so: the update needs the
    probabilities of the policy that was sampled from.

    Raises: ValueError if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        raise ValueError(f"--model {name}: no model and tokenizer there or on the hub: {error}") from error
    return tokenizer, model


@torch.no_grad()
def check_model(name: str, tokenizer) -> None:
    """Raises ValueError if a model cannot be used, because it has no EOS token or is of a kind that is not supported.

    To find out, it tries `sample` and `log_probs` on two prompts of unequal length, in float32. They have to give what
    the model's own forward pass gives for each text alone. So a kind of model that is not supported does not go
    unnoticed.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token; save one with it")
    _, model = load_model(name, torch.float32)
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8]]
    differences = []
    # The hook collects the logits of the sampler's forward passes, one for each new token.
    sampler_logits = []
    hook = model.register_forward_hook(lambda module, inputs, output: sampler_logits.append(output.logits[:, -1]))
    try:
        # Two responses of four tokens to each prompt. No token is -1, so none of them ends early.
        responses = sample(
            model, prompts, num_samples=2, max_new_tokens=4, eos_token_id=-1, pad_token_id=0, temperature=0
        )
        hook.remove()
        sampler_logits[0] = sampler_logits[0].repeat_interleave(2, dim=0)  # the first pass has one row for each prompt
        sampler_logprobs = torch.stack(sampler_logits, dim=1).log_softmax(dim=-1)  # (4, 4, V)
        logprobs, _ = log_probs(model, prompts, responses)  # (4, 4)
        for i, response in enumerate(responses):
            prompt = prompts[i // 2]
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(dim=-1)  # (4, V)
            differences.append((sampler_logprobs[i] - expected).abs().max())
            differences.append((logprobs[i] - expected[range(4), response]).abs().max())
    except Exception as error:
        reason = repr(error).splitlines()[0]
        raise ValueError(
            f"--model {name}: models of its kind cannot be sampled from or trained here ({reason})"
        ) from error
    worst = torch.stack(differences).max().item()
    # Rounding alone makes 1e-4 nats, measured with Qwen2.5-Coder-0.5B.
    if not worst < 1e-3:  # so that nan is refused, too
        raise ValueError(
            f"--model {name}: models of its kind are not supported; sample or log_probs are {worst:.2g} nats off the "
            "model's own forward pass"
        )


def main(argv=None) -> None:
    """Runs the command line, or `argv`."""
    config = parse_options(argv)
    check_options(config)
    start_processes(config.device)
    # The name of the default output has the time in it: take that of the first process.
    config = gather([config])[0]
    try:
        problems, held_out = load_problems(config)
        tokenizer, policy = load_model(config.model)
        if RANK == 0:
            # If this ends the first process, torchrun ends the others.
            check_model(config.model, tokenizer)
        add_prompts(problems + held_out, TASKS[config.task], tokenizer)
        room = room_for_responses(problems + held_out, policy)
        if room < config.max_new_tokens:
            raise ValueError(f"--max-new-tokens {config.max_new_tokens}: at most {room} fit after the prompts")
    except ValueError as error:
        fail(error)

    output = Path(config.output)
    if RANK == 0:
        output.mkdir(parents=True, exist_ok=True)
        unfinished = output / "config.unfinished"
        unfinished.write_text(json.dumps({"method": METHOD, **asdict(config)}, indent=2))
        unfinished.replace(output / "config.json")
    say(str(config))
    say(f"{len(problems)} problems to train on, {len(held_out)} held out")

    _, old_policy = load_model(config.model, getattr(torch, config.dtype))
    old_policy = old_policy.requires_grad_(False).to(config.device)
    reference = None
    if config.beta:
        _, reference = load_model(config.model)
        reference = distribute(reference.requires_grad_(False), config)
    # The process group can hang when it is destroyed while the DDP model still exists. So that model gets no name here:
    # it is freed when `train` returns.
    train(config, distribute(policy, config), old_policy, reference, tokenizer, problems, held_out, output)

    if RANK == 0:
        old_policy.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
    data = f" --data {config.data}" if config.data else ""
    say(f"Score it: python eval.py --model {output / 'model'} --task {config.task}{data}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
