#!/usr/bin/env python3
"""EM Policy Gradient (EMPG, arXiv 2504.18587): teach a language model to reason, by right or wrong alone.

This is the whole method, Algorithm 1 of the paper. On the right is the function that does each line.

     1  θ ← the base model                                                          load_model
     2  for each iteration:                                                         train
     3      empty the buffer D
     4      freeze a copy of the model: θ* ← θ                                      copy_weights
     5      E-step
     6      for each of P problems:                                                 sample_trajectories
     7          sample G responses from the frozen copy                             sample
     8          add them to D
     9          reward each of them: R = 1 if its final answer is right, else 0     Task.reward
    10      end for
    11      M-step
            R̃ = sigmoid((R - μ) / σ), with the μ and σ of all P·G rewards           smooth_rewards
            A = R̃ - b, with b the mean R̃ of the problem's other responses           subtract_baseline
    12      move θ, by AdamW, along the mean of A ∇log P_θ(response)  (Eq. 12)      update, empg_loss
    13  end for

(The two lines without a number are from the paper's text.) A response that is better than the others to its problem is
made more likely, and a worse one less likely.

In the words of reinforcement learning (RL), the model is the *policy*, and θ are its parameters. A *trajectory* τ is a
prompt with a response. P_θ(τ) is the probability that the policy gives this response to this prompt. R(τ) is the
*reward*, b the *baseline*, and A the *advantage*.

Why does this work? Let J(θ) = E[R(τ)] = Σ_τ P_θ(τ) R(τ) be the expected reward, where the sum is over all possible
responses to a prompt. (With many prompts, take the mean over them.) Since ∇P_θ = P_θ ∇log P_θ, its gradient is

    ∇J(θ) = Σ_τ R(τ) ∇P_θ(τ) = E[R(τ) ∇log P_θ(τ)].                                             (Eq. 4)

This is the *policy gradient*. It is an average over responses of the policy, so N = P·G samples estimate it. A may take
the place of R, as `subtract_baseline` and `smooth_rewards` say. So line 12 follows

    (1/N) Σᵢ A(τᵢ) ∇log P_θ(τᵢ).                                                                (Eq. 12)

With rewards of 0 or 1 this is, in expectation and up to a positive factor, nearly the policy gradient. (Nearly, as μ
and σ depend a little on the samples.)

Why E and M? In expectation-maximisation, the E-step infers what is hidden, with the old parameters θ*. Here, that is the
reasoning (the rationale) that leads to a right answer. The M-step moves θ to make it likely. Plain EM would keep the
right responses only, which is Eq. 12 with R in the place of A. EMPG learns from the wrong ones, too.

Words that stand for one thing in this file:

    problem        a dict with a question and its answer (or a whole solution), as text, and with its prompt
    prompt         the question as the model reads it: a list of token ids (Task.prompt is the text around a question)
    response       what the model writes after a prompt, a rationale and an answer: token ids; also called a sample
    trajectory     a prompt with a response: a dict that also has the text, the reward and, later, the advantage
    iteration      lines 3 to 12 (options and records call it a step)
    update         one change of θ by the optimizer; line 12 makes one, or as many as --updates says
    batch          the P·G trajectories of an iteration: the buffer D (--sample-batch is how many are sampled at a time)
    micro-batch    some of them, for one forward and backward pass

The first half of this file is the method, to be read from top to bottom. To run it:

    python empg.py                         on a laptop, a tiny model learns to add step by step, in about a minute
    torchrun --nproc-per-node 4 empg.py    on four GPUs of 80 GB, it trains Qwen2.5-1.5B on GSM8K
"""

import argparse
import atexit
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

# torchrun starts one process for each GPU. It tells each of them its number among all processes (RANK), its number on
# this machine (LOCAL_RANK), and how many processes there are (WORLD_SIZE). Without torchrun there is one process.
RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))

if RANK != 0:
    os.environ["TQDM_DISABLE"] = "1"  # only the first process shows progress bars; tqdm reads this when it is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
from transformers.hf_argparser import HfArg


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if RANK == 0:
        print(text, flush=True)


# ------------------------------ The mathematics: pure functions of tensors ------------------------------


def smooth_rewards(rewards: Tensor) -> Tensor:
    """Reward smoothing (section 4.2): R̃(τ) = sigmoid((R(τ) - μ) / σ).

    (N,) finite rewards, with mean μ and standard deviation σ → (N,) float32 from 0 to 1, all 0.5 if they are equal.

    Rewards of 0 and 1, as in the tasks here, become R̃ = low + distance · R, with a distance between 0.46 and 0.55. In
    the advantage A = R̃ - b the low number cancels. So A is what it would be without smoothing, times the distance, and
    the gradient keeps its direction. With rewards that are scores of any size, smoothing limits how much a single
    response counts. (But μ and σ contain an extreme reward, so that beside it all others become nearly equal.)

    >>> smooth_rewards(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.8497, 0.3595, 0.3595, 0.3595])
    """
    if len(rewards) == 0 or not rewards.isfinite().all():
        raise ValueError("smooth_rewards needs at least one reward, and finite ones")
    if rewards.max() == rewards.min():
        # No response was better than another, and σ is 0.
        return torch.full_like(rewards, 0.5, dtype=torch.float32)
    rewards = rewards.double() / rewards.abs().max()  # R̃ does not depend on the scale, and now no square overflows
    standard_scores = (rewards - rewards.mean()) / rewards.std(correction=0)
    return torch.sigmoid(standard_scores).float()


def subtract_baseline(rewards: Tensor) -> Tensor:
    """The advantages of Eq. 12, A(τ) = R̃(τ) - b.

    (P, G) rewards R̃, prompts × samples of each → (P, G) advantages, exactly 0 for a prompt whose rewards are equal.

    The baseline b is the mean R̃ of the prompt's *other* samples (leave-one-out, as in RLOO). As it does not depend on
    τ, subtracting it does not change the expected gradient:

        E[b ∇log P_θ(τ)] = b Σ_τ P_θ(τ) ∇log P_θ(τ) = b Σ_τ ∇P_θ(τ) = b ∇1 = 0.

    (After smoothing, b depends on τ a little: R(τ) is one of the N rewards that make μ and σ.) Subtracting b makes the
    gradient less noisy: an easy prompt no longer raises all of its responses. And a response that is wrong where
    another one is right has a negative advantage, so that it becomes less likely.

    >>> subtract_baseline(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError("subtract_baseline needs rewards of shape (prompts, samples), with two samples or more")
    num_samples = rewards.shape[1]
    # Subtracting the same number from all rewards of a prompt changes no advantage. Take the first of them: then equal
    # rewards become exactly 0, and rounding cannot leave them a tiny advantage.
    shifted = rewards - rewards[:, :1]  # (P, G)
    sum_of_others = shifted.sum(dim=1, keepdim=True) - shifted
    baseline = sum_of_others / (num_samples - 1)
    return shifted - baseline


def empg_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """The loss of N trajectories: a batch, or a micro-batch, which `update` weights by its share of the batch.

    Its gradient is minus Eq. 12, since an optimizer goes down and we want to go up:

        -(1/N) Σᵢ Aᵢ log P_θ(τᵢ)    with    log P_θ(τ) = Σₜ log π_θ(token t | tokens before it).

    π_θ is the policy's distribution of the next token. log P_θ(τ) is a sum over the tokens of the response, including
    the one that ends it. With a mean in its place, each token of a long response would count less: long right responses
    would be raised less than short ones, and long wrong responses lowered less.

    (N, T) log-probabilities of the response tokens, (N, T) mask with 1 on them and 0 on padding, (N,) advantages →
    a scalar.

    >>> logprobs = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]])
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> empg_loss(logprobs, mask, torch.tensor([1.0, -1.0]))
    tensor(-0.2500)
    """
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError("empg_loss needs one advantage for each trajectory")
    # Whatever stands on padding does not count, not even nan. (nan times 0 would still be nan.)
    trajectory_logprobs = logprobs.masked_fill(mask == 0, 0).sum(dim=1)  # (N,)
    return -(advantages * trajectory_logprobs).mean()


# ------------------------------ The policy: samples (E-step), log-probabilities (M-step) ------------------------------


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Draws a token for each row from softmax(logits / temperature); temperature 0 takes the likeliest one.

    (rows, V) logits over a vocabulary of V, (rows,) random numbers, uniform in [0, 1) → (rows,) tokens.

    It takes the first token at which the cumulative distribution exceeds the row's random number. So a row gets the
    same token, whatever the other rows are.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)  # (rows, V)
    # Rounding lets the cumulative distribution end a little off 1, so scale the random numbers to where it does end.
    thresholds = uniforms[:, None] * cumulative[:, -1:]  # (rows, 1)
    tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)
    # If the logits are nan, nothing exceeds a threshold, and a GPU would abort at an index past the end. So take the
    # last token then.
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, num_samples, max_new_tokens, *, eos_token_id, pad_token_id=0, temperature=1.0, seeds):
    """E-step, line 7: samples G = `num_samples` responses to each of P prompts. RL calls this a rollout.

    Why not the library's `model.generate`? It draws the random numbers of all rows from one stream, and goes on
    computing a row whose response has ended. Here, each response has random numbers of its own. So it does not depend
    on what is sampled beside it: a run is the same on any number of processes, with any --sample-batch, and after a
    resume. (Up to rounding: where that flips a token, the rest of the response changes.)

    Takes: model, in evaluation mode, as `from_pretrained` returns it; prompts, P lists of token ids, none of them
        empty; eos_token_id, the token that ends a response, or a list of several; pad_token_id, any token, as the
        model does not see it; temperature, by which the logits are divided, or 0 for the likeliest token each
        time; seeds, P ints, one for each prompt, none of them negative.
    Returns: P·G lists of token ids, those of the first prompt first. Each ends with an end token, unless it was cut
        off at `max_new_tokens`.
    """
    if not prompts or not all(prompts) or len(seeds) != len(prompts):
        raise ValueError("sample needs prompts with at least one token each, and one seed for each prompt")
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(map(int, eos_token_id))

    # 1) Draw all random numbers beforehand: for each response, one for each token that it may get.
    generators = [np.random.default_rng([seed, g]) for seed in seeds for g in range(num_samples)]
    numbers = np.stack([generator.random(max_new_tokens, dtype=np.float32) for generator in generators])
    uniforms = torch.tensor(numbers, device=model.device)  # (P·G, max_new_tokens)

    # 2) Read the prompts in one pass. They are padded on the left, so that all of them end in the last column, the only
    #    one whose logits are needed. `visible` hides the padding from attention.
    tensors = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    ones = [torch.ones_like(tensor) for tensor in tensors]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token_id, padding_side="left")  # (P, width)
    visible = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")  # (P, width)
    # Positions count from a prompt's first token. (A pad's own position does not matter.)
    positions = (visible.cumsum(dim=1) - 1).clamp(min=0)  # (P, width)
    cache = DynamicCache(config=model.config)  # what each layer remembers: keys and values, or a state
    output = model(ids, attention_mask=visible, position_ids=positions, past_key_values=cache, logits_to_keep=1)

    # 3) Copy what was computed for each prompt. Its samples go on from here, each in a row of its own.
    prompt_of_row = torch.arange(len(prompts), device=model.device).repeat_interleave(num_samples)  # (rows,)
    cache.reorder_cache(prompt_of_row)
    logits = output.logits[prompt_of_row, -1]  # (rows, V), for the next token
    visible = visible[prompt_of_row]  # (rows, columns)
    last_position = positions[prompt_of_row, -1:]  # (rows, 1), of the last token

    # 4) Sample token by token. Now and then, rows whose responses have ended are dropped. So keep track of which
    #    response a row has.
    responses = [[] for _ in range(len(prompts) * num_samples)]
    ended = [False] * len(responses)
    response_of_row = list(range(len(responses)))
    for t in tqdm(range(max_new_tokens), "sampling", leave=False, delay=2):
        tokens = draw_tokens(logits, uniforms[:, t], temperature)  # (rows,)
        for i, token in zip(response_of_row, tokens.tolist()):
            if not ended[i]:
                responses[i].append(token)
                ended[i] = token in stops
        if all(ended) or t == max_new_tokens - 1:
            break

        # A row whose response has ended costs as much as any other. Dropping rows means copying the cache, so wait
        # until more than a fifth of them have ended.
        going_on = [row for row, i in enumerate(response_of_row) if not ended[i]]
        if len(going_on) < 0.8 * len(response_of_row):
            response_of_row = [response_of_row[row] for row in going_on]
            rows = torch.tensor(going_on, device=model.device)
            cache.reorder_cache(rows)
            uniforms = uniforms[rows]
            tokens = tokens[rows]
            visible = visible[rows]
            last_position = last_position[rows]

        # The tokens just drawn are one more column. The model reads only them: the cache has the rest.
        visible = F.pad(visible, (0, 1), value=1)
        last_position = last_position + 1
        output = model(tokens[:, None], attention_mask=visible, position_ids=last_position, past_key_values=cache)
        logits = output.logits[:, -1]
    return responses


def response_logits(model, prompts, responses, temperature=1.0):
    """The logits of every response token, given the tokens before it, from one forward pass.

    The model reads each prompt (p) with its response (letters) in a row, padded (.) on the right. Each column has the
    logits of the token in the next column. An example with three rows:

        column  0 1 2 3 4 5 6    the response's logits are in columns    mask
                p p a b c . .    1 2 3                                   1 1 1 0
                p p p p d . .    3                                       1 0 0 0
                p p p e f g h    2 3 4 5                                 1 1 1 1

    Takes: N prompts, none of them empty, and N responses, one for each, all of them lists of token ids.
    Returns: for the n tokens of all responses, one response after the other (here n = 8, from a to h):
        logits, (n, V), in float32, divided by the temperature, as when sampling; tokens, (n,), the tokens themselves;
        mask, (N, T), as in the picture, where T is the length of the longest response.
    """
    # Causal attention never looks to the right. So padding on the right changes nothing, and the model needs neither a
    # mask nor positions. Without a mask, attention can use the fastest kernel of a GPU.
    device = next(model.parameters()).device  # (a model in DDP has no `model.device`)
    rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
    ids = pad_sequence(rows, batch_first=True).to(device)  # (N, columns)

    # Logits have an entry for each token of the vocabulary, and Qwen2.5 has 150,000. They are the largest tensor.
    # None are needed before the column that predicts the first response token. So compute only the last columns, from
    # there on. (In the example, a is in column 2. Column 1 predicts it, so 6 of the 7 columns are kept.)
    first_response = min(len(prompt) for prompt in prompts)
    num_kept = ids.shape[1] - (first_response - 1)
    logits = model(ids, use_cache=False, logits_to_keep=num_kept).logits  # (N, num_kept, V)

    # Token t of a response, counted from 0, is predicted in column len(prompt) + t - 1, and the first kept column is
    # first_response - 1. Take the logits there, row after row.
    places = []  # in the kept columns of all rows, one row after the other
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        begin = i * num_kept + len(prompt) - first_response
        places += range(begin, begin + len(response))
    logits = logits.flatten(0, 1).index_select(0, torch.tensor(places, device=device)).float()  # (n, V)
    if temperature != 1:  # dividing by 1 would be one more copy
        logits = logits / temperature

    tokens = torch.tensor([token for response in responses for token in response], device=device)  # (n,)
    length = torch.tensor([len(response) for response in responses], device=device)  # (N,)
    mask = torch.arange(int(length.max()), device=device) < length[:, None]  # (N, T)
    return logits, tokens, mask


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log softmax(logits)[token]. Takes what `response_logits` returns. Returns: (N, T), in nats, 0 on padding."""
    logprobs = -F.cross_entropy(logits, tokens, reduction="none")  # (n,)
    # Put them where the mask is true. Row by row, that is their order.
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def log_probs(model, prompts, responses, temperature=1.0):
    """log π_θ(token | tokens before it) of every response token, with gradient, for a training loop of your own.

    All responses go through the model in one pass. If that takes too much memory, do as `update` does: take a few
    responses at a time, and weight the loss of each part by its share of the batch.

    Takes: P prompts and P·G responses, lists of token ids, as `sample` takes and returns them; its temperature.
    Returns: (N, T) log-probabilities, in nats, 0 on padding; (N, T) mask, true on response tokens. N = P·G.
    """
    if not prompts or not responses or not all(prompts) or len(responses) % len(prompts) != 0:
        raise ValueError("log_probs needs prompts with at least one token, and equally many responses to each")
    num_samples = len(responses) // len(prompts)
    prompt_of_response = [prompt for prompt in prompts for _ in range(num_samples)]
    logits, tokens, mask = response_logits(model, prompt_of_response, responses, temperature)
    return token_logprobs(logits, tokens, mask), mask


@torch.no_grad()
def copy_weights(source, target) -> None:
    """Line 4, θ* ← θ: copies the parameters of one model to another. (`train` says why there are two.)"""
    for parameter, its_copy in zip(source.parameters(), target.parameters(), strict=True):
        # With --shard, each process has only a piece of each parameter, and `whole` joins the pieces.
        its_copy.copy_(whole(parameter.to(its_copy.dtype)))


# ------------------------------ Training: the E-step, the M-step, and Algorithm 1 ------------------------------


def sample_trajectories(model, tokenizer, task, problems, config, seed=0):
    """E-step, lines 6 to 9: samples G responses to each of P problems, and rewards them. The processes share the work.

    Takes: problems, dicts with question, answer and prompt; seed, to which a problem's index in the list is added.
    Returns: in every process, all P·G trajectories, those of the first problem first. Each is a dict with prompt and
        response (token ids), text (the response as text), reward, and cut (whether the token limit cut it off).
    """
    stops = stop_tokens(tokenizer, model)  # EOS, and what else ends a response
    # Each process takes a contiguous part of the problems.
    my_indices = np.array_split(range(len(problems)), WORLD_SIZE)[RANK].tolist()
    problems_at_a_time = max(1, config.sample_batch // config.num_samples)
    trajectories = []
    for start in range(0, len(my_indices), problems_at_a_time):
        indices = my_indices[start : start + problems_at_a_time]
        responses = sample(
            model,
            [problems[index]["prompt"] for index in indices],
            config.num_samples,
            config.max_new_tokens,
            eos_token_id=stops,
            temperature=config.temperature,
            seeds=[seed + index for index in indices],
        )
        for i, response in enumerate(responses):
            problem = problems[indices[i // config.num_samples]]
            cut = response[-1] not in stops
            # The token that ends a response is no part of its text, even if the tokenizer does not call it special.
            text = tokenizer.decode(response if cut else response[:-1], skip_special_tokens=True)
            if cut:
                text += CUT_MARK  # so that 1 is not taken for the answer where 18 was cut short
            reward = task.reward(text, problem["answer"])
            prompt = problem["prompt"]
            trajectories.append({"prompt": prompt, "response": response, "text": text, "reward": reward, "cut": cut})
    return gather(trajectories)  # joins the parts of all processes, in their order


def micro_batches(trajectories: list[dict], max_tokens: int) -> list[list[dict]]:
    """Splits trajectories into micro-batches, so that the memory of a forward and backward pass is bounded.

    Each has at most `max_tokens` tokens, counting the padding to its longest trajectory, unless a single one is longer.
    Trajectories of similar length go together, which keeps the padding small. Below, [4, 3] takes 2 · (1 + 4) tokens:

    >>> trajectories = [{"prompt": [0], "response": [0] * length} for length in (4, 2, 8, 3)]
    >>> [[len(each["response"]) for each in micro_batch] for micro_batch in micro_batches(trajectories, max_tokens=10)]
    [[8], [4, 3], [2]]
    """

    def length(trajectory):
        return len(trajectory["prompt"]) + len(trajectory["response"])

    result: list[list[dict]] = []
    for trajectory in sorted(trajectories, key=length, reverse=True):
        # The first trajectory of a micro-batch is its longest, to which the others are padded.
        if result and length(result[-1][0]) * (len(result[-1]) + 1) <= max_tokens:
            result[-1].append(trajectory)
        else:
            result.append([trajectory])
    return result


def kl_divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) = Σ_v π_θ(v) log(π_θ(v) / π_ref(v)) at each position, summed over the whole vocabulary.

    (..., V) finite logits of each → (...), in nats. It says how far the policy is from a reference model.

    >>> kl_divergence(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
    tensor(0.1109)
    """
    log_pi = logits.log_softmax(dim=-1)
    log_ref = ref_logits.log_softmax(dim=-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(dim=-1)


def micro_batch_loss(policy, micro_batch, config, reference=None):
    """`empg_loss` of a micro-batch. With --beta, β times the KL to a reference, the base model, is added.

    That keeps the policy near the base model. The KL depends on θ twice: through the next-token distributions, and
    through which responses are sampled. As is common, the gradient takes only the first: the responses are treated as
    fixed data. (Smoothing halves the advantages of 0/1 rewards. So β weighs about twice as much as it would without.)

    Returns: the loss; the KL, summed over each response, on average over the micro-batch (0 without a reference).
    """
    prompts = [trajectory["prompt"] for trajectory in micro_batch]
    responses = [trajectory["response"] for trajectory in micro_batch]
    logits, tokens, mask = response_logits(policy, prompts, responses, config.temperature)
    logprobs = token_logprobs(logits, tokens, mask)
    advantages = torch.tensor([trajectory["advantage"] for trajectory in micro_batch], device=logprobs.device)
    loss = empg_loss(logprobs, mask, advantages)
    if reference is None:
        return loss, 0.0
    with torch.no_grad():
        ref_logits, _, _ = response_logits(reference, prompts, responses, config.temperature)
    kl = kl_divergence(logits, ref_logits).sum() / len(micro_batch)
    return loss + config.beta * kl, kl.item()


def update(policy, optimizer, trajectories, config, reference=None) -> dict:
    """M-step, line 12: one update of θ along the policy gradient of Eq. 12 (minus β times the gradient of the KL).

    Takes: trajectories, the whole batch, in every process, each with its "advantage". The processes share the work.
    Returns: a dict with loss; grad_norm, the norm of the gradient before clipping; kl, in nats per response token (nan
        without a reference).
    """
    # 1) Without a KL, a trajectory whose advantage is 0 adds nothing to the gradient. Leave it out.
    kept = [trajectory for trajectory in trajectories if trajectory["advantage"] != 0 or reference is not None]

    # 2) Deal the micro-batches out to the processes. The loss of each is a mean. Multiplied by the micro-batch's share of
    #    the batch, these means add up to the mean over the batch. Processes exchange gradients within a pass, and wait
    #    for each other there. So all processes need equally many: fill up with repeats whose share is 0.
    parts = micro_batches(kept, config.micro_batch_tokens)
    shares = [len(part) / len(trajectories) for part in parts]
    while len(parts) % WORLD_SIZE != 0:
        parts.append(parts[-1])
        shares.append(0.0)
    my_parts = parts[RANK::WORLD_SIZE]
    my_shares = shares[RANK::WORLD_SIZE]

    # 3) Add up the gradients, micro-batch by micro-batch.
    loss_sum = 0.0
    kl_sum = 0.0
    for i, part in enumerate(tqdm(my_parts, "updating", leave=False, delay=2)):
        # DDP is to exchange gradients in the last pass only. This is the attribute that its `no_sync()` sets. (A model
        # without DDP ignores it. With --shard, FSDP has to exchange them in each pass.)
        policy.require_backward_grad_sync = i == len(my_parts) - 1
        # In bfloat16 a pass is faster. θ and its gradient are nevertheless in float32. (With --gradient-checkpointing,
        # `cache_enabled=False` keeps torch from holding a bfloat16 copy of each weight until the end of the pass.)
        in_bfloat16 = config.dtype == "bfloat16"
        with torch.autocast(config.device, torch.bfloat16, enabled=in_bfloat16, cache_enabled=False):
            loss, kl = micro_batch_loss(policy, part, config, reference)
        # DDP and FSDP average the gradients of the processes, but we need their sum: hence the factor WORLD_SIZE.
        (WORLD_SIZE * my_shares[i] * loss).backward()
        loss_sum += my_shares[i] * loss.item()
        kl_sum += my_shares[i] * kl

    # 4) Scale the gradient down if it is large, and change θ. But a gradient that is not finite would destroy the
    #    model. And without any micro-batch, Adam would still move θ, along its average of past gradients. So leave θ
    #    as it is in both cases.
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
    if not norm.isfinite():
        say(f"      the gradient's norm is {norm.item()}, so θ stays as it is")
    elif parts:
        optimizer.step()
    # Zero the gradients in place: with DDP they lie in its own buffers, and new ones would take more memory.
    optimizer.zero_grad(set_to_none=False)

    # 5) Each process has added up its own micro-batches. Join these sums.
    losses, kls = zip(*gather([(loss_sum, kl_sum)]))
    mean_length = np.mean([len(trajectory["response"]) for trajectory in trajectories])
    kl_per_token = sum(kls) / mean_length if reference is not None else math.nan
    return {"loss": sum(losses), "grad_norm": norm.item(), "kl": kl_per_token}


def evaluate(model, tokenizer, task, problems, config) -> float:
    """The mean reward, with the likeliest token taken each time: the share of right answers, if rewards are 0 or 1."""
    greedy = replace(config, num_samples=1, temperature=0.0)
    trajectories = sample_trajectories(model, tokenizer, task, problems, greedy)
    return float(np.mean([trajectory["reward"] for trajectory in trajectories]))


def train(config, policy, old_policy, reference, tokenizer, problems, held_out, output) -> None:
    """Algorithm 1. Each iteration and each evaluation adds a row to OUTPUT/metrics.jsonl.

    Why is there a second model? θ does not change while we sample, so we could sample from θ itself, and on a laptop
    that would do. But on GPUs sampling from θ* is faster: its weights are in bfloat16 (--dtype), and whole in every
    process. θ may be split over the GPUs, and has to be in float32, since bfloat16 would round updates of 1e-6 away.

    Takes: policy, θ; old_policy, θ*, at first the base model, and on return the trained θ; reference, the frozen base
        model, or None; problems to train on, and held_out ones to evaluate on, all with prompts.
    """
    task = TASKS[config.task]
    # AdamW with the usual settings for language models, but without weight decay, which would pull θ towards 0.
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    # Line 1: θ is the base model. But with --resume, read what the run's checkpoint holds into θ and the optimizer.
    last_step, metrics = load_checkpoint(output, policy, optimizer, config)
    if last_step == 0 and config.eval_every:
        accuracy = evaluate(old_policy, tokenizer, task, held_out, config)
        record(output, metrics, {"step": 0, "eval_accuracy": accuracy})

    for step in range(last_step + 1, config.steps + 1):  # line 2
        start = time.perf_counter()
        # Lines 3 and 4: D is `trajectories` below, new in each iteration. Freeze the old policy, θ* ← θ.
        copy_weights(policy, old_policy)

        # Lines 5 to 10, the E-step: choose P problems at random (one may come twice), sample from P_θ*, and reward.
        indices = np.random.default_rng([config.seed, step]).integers(len(problems), size=config.prompts_per_step)
        chosen = [problems[index] for index in indices]
        # `sample_trajectories` adds a problem's place in `chosen` to the seed. So no two problems share a seed, as long
        # as there are fewer than 10**6 of them in an iteration, and fewer than 10**6 iterations.
        seed = config.seed * 10**12 + step * 10**6
        trajectories = sample_trajectories(old_policy, tokenizer, task, chosen, config, seed)
        sample_seconds = time.perf_counter() - start

        # Line 11, the M-step: the advantages. μ and σ are those of the whole batch, which every process has.
        rewards = torch.tensor([trajectory["reward"] for trajectory in trajectories], dtype=torch.float64)  # (P·G,)
        smoothed = smooth_rewards(rewards).view(-1, config.num_samples)  # (P, G)
        advantages = subtract_baseline(smoothed)  # (P, G)
        for trajectory, advantage in zip(trajectories, advantages.flatten().tolist()):
            trajectory["advantage"] = advantage

        # The learning rate rises to --lr in five iterations, while Adam's averages form.
        optimizer.param_groups[0]["lr"] = config.lr * min(1, step / 5)

        # Line 12. At the first update θ = θ* (up to rounding, in bfloat16). So the samples come from the policy itself:
        # they are *on-policy*. At a second one (--updates) θ has moved away, and they are *off-policy*. PPO and GRPO
        # would correct for that by ratios of probabilities. EMPG does not, and is right only as long as θ is near θ*.
        for _ in range(config.updates):
            statistics = update(policy, optimizer, trajectories, config, reference)
        seconds = time.perf_counter() - start

        # Line 13: that was the iteration. Record how it went, and save it.
        record(output, metrics, describe(step, trajectories, advantages, statistics, sample_seconds, seconds))
        if step % 10 == 1:
            say(f"      sampled, reward {rewards[0]:g}: {chosen[0]['question']!r} → {trajectories[0]['text']!r}")
        is_last = step == config.steps
        if config.eval_every and (is_last or step % config.eval_every == 0):
            copy_weights(policy, old_policy)
            accuracy = evaluate(old_policy, tokenizer, task, held_out, config)
            record(output, metrics, {"step": step, "eval_accuracy": accuracy})
        if is_last or (config.save_every and step % config.save_every == 0):
            save_checkpoint(output, step, metrics, policy, optimizer)

    copy_weights(policy, old_policy)


# ------------------------------ The method ends here. Tasks and models ------------------------------


CUT_MARK = "…"  # stands after the text of a response that the token limit cut off


@dataclass(frozen=True)
class Task:
    """Something to learn. Put your own into TASKS. If `problems` raises ValueError, the command ends and prints it."""

    # Takes a response's text (with CUT_MARK after it, if the token limit cut it off) and an answer; returns a finite
    # number. Before a run it is called with each answer as the text, too. If it cannot read that, it should raise
    # ValueError.
    reward: Callable
    problems: Callable  # takes --data or None, and "train" or "test"; returns dicts with question and answer, both text
    prompt: str = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


def sums_problems(data: str | None, split: str) -> list[dict]:
    """Sums of four one-digit numbers, such as 3+8+5+2=. There are 10,000, of which always the same 500 are held out."""
    if data is not None:
        raise ValueError("--data: the task sums has its own problems")
    order = np.random.default_rng(0).permutation(10_000)
    chosen = order[:500] if split == "test" else order[500:]
    all_digits = [f"{number:04d}" for number in chosen]
    return [{"question": "+".join(digits) + "=", "answer": str(sum(map(int, digits)))} for digits in all_digits]


def dataset_problems(source, question_column, answer_column, data, split) -> list[dict]:
    """The rows of a dataset of the hub, or of --data. A row keeps its columns, and has "question" and "answer", too."""
    source = source if data is None else [data]
    where = source[0] if data is None else f"--data {data}"
    try:
        import datasets

        problems = []
        for number, row in enumerate(datasets.load_dataset(*source, split=split), 1):
            question, answer = row[question_column], row[answer_column]
            are_readable = isinstance(question, str) and isinstance(answer, str | int | float)
            if not are_readable or not question.strip() or not str(answer).strip():
                raise ValueError(f"row {number} has {question!r} and {answer!r}: needs a text, and a text or a number")
            problems.append({**row, "row": number, "question": question, "answer": str(answer)})
        if not problems:
            raise ValueError("there are none")
    except Exception as error:
        needs = f"needs, on the hub or in {split}.jsonl, rows with {question_column!r} and {answer_column!r}"
        raise ValueError(f"{where}: {needs} ({error.__cause__ or error!r})") from error
    return problems


def score(task: str, text: str, answer: str) -> float:
    """1.0 if the final answer of a text is right, else 0.0. eval.py knows how it is found and compared."""
    try:
        import eval as scoring  # here, and not above, because eval.py imports this file

        return scoring.SCORES[task](text, answer)
    except ImportError as error:
        raise ValueError(f"--task {task}: needs eval.py beside empg.py, and what it imports ({error})") from error


gsm8k_problems = partial(dataset_problems, ["openai/gsm8k", "main"], "question", "answer")
math_problems = partial(dataset_problems, ["lighteval/MATH-Hard"], "problem", "solution")
TASKS = {
    # The model in base/ knows two ways to answer, "3+8=11,11+5=16,16+2=18#18" and "#18", which is a guess, often wrong.
    # A response is right if it ends with the right sum. One that works the sum out is right more often.
    "sums": Task(lambda text, answer: float(text.endswith(f"#{answer}")), sums_problems, prompt="{question}"),
    "gsm8k": Task(partial(score, "gsm8k"), gsm8k_problems),
    "math-hard": Task(partial(score, "math-hard"), math_problems),
}


def try_rewards(task, problems: list[dict]) -> None:
    """Calls the reward on each problem's own answer. Raises ValueError if it cannot be read, or if eval.py is missing."""
    for problem in problems:
        try:
            task.reward(problem["answer"], problem["answer"])
        except ValueError as error:
            raise ValueError(f"{error} (row {problem.get('row', 'unknown')})") from error


def load_problems(config) -> tuple[list[dict], list[dict]]:
    """The problems to train on, and the held-out ones. Raises ValueError if some are missing or cannot be read."""
    task = TASKS[config.task]
    problems = task.problems(config.data, "train")
    try:
        tests = task.problems(config.data, "test")
    except ValueError:
        if config.eval_every:
            raise
        say("The test split cannot be read, so its questions are not removed from the training problems.")
        tests = []

    def words(problem):
        return tuple(problem["question"].lower().split())

    # A question of the test split may also be in the training split, with other spaces and capitals. Never train on it.
    test_questions = {words(problem) for problem in tests}
    problems = [problem for problem in problems if words(problem) not in test_questions]
    if not problems:
        raise ValueError("--data: no problems are left to train on, as all of their questions are in the test split")
    if config.eval_every and not tests:
        raise ValueError("--data: the test split has no problems; give it some, or --eval-every 0")
    try_rewards(task, problems + tests)
    num_held_out = config.eval_problems if config.eval_every else 0
    order = np.random.default_rng(0).permutation(len(tests))[:num_held_out]  # the same in each run
    return problems, [tests[index] for index in order]


def load_model(name: str, dtype="auto"):
    """A tokenizer, and a model on the CPU, in its stored precision, or in `dtype`. The model is in evaluation mode, and
    stays so: with dropout, the update would see another policy than the sampler."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        raise ValueError(f"--model {name}: no model and tokenizer there or on the hub: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token, which ends a response; save one with it")
    return tokenizer, model


def write_chat(tokenizer, turns, **how) -> str:
    """The text that the model's chat template makes of some turns. Raises ValueError if it cannot be used."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        # It writes today's date. But prompts must not change when a run is resumed. So it is always the same day.
        template = "{% macro strftime_now(form) %}15 June 2025{% endmacro %}" + template
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how)
    except Exception as error:
        raise ValueError(f"--model: its chat template cannot be used here ({error})") from error


def add_prompts(problems, task, tokenizer) -> None:
    """Gives each problem its "prompt", token ids, as the task and the model's chat template want it."""
    has_template = tokenizer.chat_template is not None  # Qwen2.5 has one even before it is taught to chat
    for problem in problems:
        text = task.prompt.replace("{question}", problem["question"])
        if has_template:
            text = write_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
        if problem["question"].strip() not in text:
            raise ValueError("--model: its chat template, or the task's prompt, leaves the question out")
        # A chat template has already written the special tokens.
        ids = tokenizer(text, add_special_tokens=not has_template)["input_ids"]
        # Some tokenizers put EOS after each text. Remove it: the response has to follow the question.
        problem["prompt"] = ids[:-1] if not has_template and ids[-1] == tokenizer.eos_token_id else ids


def stop_tokens(tokenizer, model) -> list[int]:
    """The token ids that end a response: EOS, those of the generation config, and what ends a turn of a chat."""
    stops = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id  # None, one token, or a list of several
    if configured is not None:
        stops.update([configured] if isinstance(configured, int) else configured)
    if tokenizer.chat_template is not None:
        # Write a short chat, and take the special token that comes last, after what the model says.
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        end = write_chat(tokenizer, turns).rpartition("!")[2]
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        special_tokens = [token for token in ids if token in tokenizer.added_tokens_decoder]
        stops.update(special_tokens[-1:])
    return sorted(stops)


def room_for_responses(problems, model) -> float:
    """How many tokens the model can read after the longest prompt; infinitely many if it has no limit.

    Raises ValueError if it cannot read all prompts.
    """
    largest_token = max(max(problem["prompt"]) for problem in problems)
    if largest_token >= len(model.get_input_embeddings().weight):
        raise ValueError("--model: its tokenizer has tokens that its embeddings lack")
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Such a model encodes positions in one way in a text of up to its original maximum, and in another way in a
        # longer one. A response that grows across this length would have keys of both kinds in its cache.
        limit = rope["original_max_position_embeddings"]
    longest = max(len(problem["prompt"]) for problem in problems)
    if longest >= limit:
        raise ValueError(f"--data: a prompt has {longest} tokens, and the model can read {limit} in all; leave it out")
    return limit - longest


@torch.no_grad()
def check_model(name: str) -> None:
    """Raises ValueError if `sample` and `response_logits` do not agree about a model. (Only short texts are tried.)

    The first reads token by token, with padding on the left, a mask, positions and a cache. The second reads all tokens
    in one pass, with none of these. A kind of model that one of them does not know would be trained on wrong numbers.
    """
    _, model = load_model(name, torch.float32)  # in bfloat16, rounding alone could exceed the limit below
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8]]  # of unequal length, so that one is padded
    passes = []  # the logits, (rows, V), of the last column in each forward pass
    model.register_forward_hook(lambda module, inputs, output: passes.append(output.logits[:, -1]))
    try:
        # At this temperature all tokens are equally probable, and a quarter of them end a response. So the seeds alone
        # decide which responses end, whatever the model: two of the four, early. `sample` drops their rows at once.
        stops = range(model.config.get_text_config().vocab_size // 4)
        responses = sample(model, prompts, 2, 5, eos_token_id=stops, temperature=1e6, seeds=[3, 2])
        # The first pass has a row for each prompt. The others have one for each response that goes on.
        sampled = torch.cat([passes[0].repeat_interleave(2, dim=0), *passes[1:]]).log_softmax(dim=-1)
        logits, _, mask = response_logits(model, [prompts[0], prompts[0], prompts[1], prompts[1]], responses)
        # These go response by response, and the sampler's go token by token. So turn (N, T, V) into (T, N, V).
        lengths = [len(response) for response in responses]
        trained = pad_sequence(logits.log_softmax(dim=-1).split(lengths))[mask.T]
        difference = (sampled - trained).abs().max().item()
        # In SmolLM2-135M, rounding alone makes a difference of 0.004 nats. (Not `>`, so that nan is refused, too.)
        if not difference < 0.02:
            raise ArithmeticError(f"sampling and training differ by {difference:.2g} nats")
    except Exception as error:
        raise ValueError(f"--model {name}: models of its kind do not work here ({error!r})") from error


# ------------------------------ Processes: data parallel with DDP, or sharded with FSDP ------------------------------


def fail(message, everywhere=False) -> NoReturn:
    """Prints one line to standard error, in the first process of each machine or `everywhere`, and exits with code 2."""
    if LOCAL_RANK == 0 or everywhere:
        print("error:", (str(message).splitlines() or ["unknown"])[0], file=sys.stderr)
    raise SystemExit(2)


def fail_together(errors: list[str]) -> None:
    """Ends all processes if one of them has an error, and says the first."""
    errors = gather(errors)
    if errors:
        fail(errors[0])


def start_processes(device) -> None:
    """Sets up the device and, if there are several processes, the process group by which they talk to each other."""
    # A CPU is enough for any number of processes, an Apple GPU for one.
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": WORLD_SIZE}
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if found[device] < num_processes:
        fail(f"--device {device}: torch finds {found[device]} here for {num_processes} processes; try --device cpu")
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        # For attention with a mask, newer GPUs would take cuDNN's kernel. It reportedly prepares for half a second
        # at each new length (FunASR issue 3704), and the sampler has one at every token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if WORLD_SIZE == 1:
        # There is nobody to talk to. But torch would warn of that at each checkpoint.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        return
    if dist.is_initialized():
        return  # by an earlier call of `main`, or by the program that calls it
    # Processes find each other's addresses in a store, a dictionary that all of them read and write. If it is
    # torchrun's own, it outlives a restart (--max-restarts). New processes would find the addresses of those that died,
    # and wait for them. So let the keys begin with the number of the restart. But each machine counts its own restarts,
    # so on several machines the keys could differ: refuse that.
    is_store_of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if is_store_of_torchrun and max_restarts and num_processes < WORLD_SIZE:
        fail("--max-restarts, on several machines, needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    timeout = timedelta(hours=1)  # in case one of the processes is slow to download the model
    store, _, _ = next(dist.rendezvous("env://", RANK, WORLD_SIZE, timeout=timeout))
    if is_store_of_torchrun:
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # On GPUs, gradients travel by NCCL (with FSDP, parameters as well), and everything else by gloo.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=timeout)


def end_processes() -> None:
    """Ends the process group, if there is one. `main` leaves this to the end of the program, as it may be called again.

    After an error it is not called: it could wait for processes that are in the middle of an exchange.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(values: list) -> list:
    """Joins the lists of all processes, in the order of their ranks. Every process gets the whole."""
    if WORLD_SIZE == 1:
        return values
    lists: list = [None] * WORLD_SIZE
    dist.all_gather_object(lists, values)
    return [value for each in lists for value in each]


def distribute(model, config):
    """Places a model on this process's device, in float32; with several processes, with DDP or FSDP (--shard)."""
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
        # FSDP gives each process a piece of every parameter, of its gradient and of Adam's averages. It puts a layer
        # together for its forward pass, and again for its backward pass. The model itself, which comes last, does the
        # same for the parameters that are in no layer: the embeddings and the output layer.
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    model = model.to(config.device).float()  # with FSDP, each process converts only its own pieces
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())  # then DDP has nothing to do
    if config.shard or is_frozen or WORLD_SIZE == 1:
        return model
    # DDP sends gradients from buffers. Let the gradients live there, so that they are not held twice. A model that also
    # reads images has parameters that get no gradient from text, for which DDP would wait.
    has_more_than_text = model.config.get_text_config() is not model.config
    return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=has_more_than_text)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has split over the processes, joined in every one. Any other is returned as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ------------------------------ Records and checkpoints ------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file, so that a kill at any moment leaves the old one whole, or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def describe(step, trajectories, advantages, statistics, sample_seconds, seconds) -> dict:
    """The row of metrics.jsonl for an iteration. `statistics` is what its last update returned."""
    tokens = sum(len(trajectory["response"]) for trajectory in trajectories)
    return {
        "step": step,
        "reward": float(np.mean([trajectory["reward"] for trajectory in trajectories])),
        "response_tokens": tokens / len(trajectories),
        **statistics,
        "no_signal": (advantages == 0).all(dim=1).double().mean().item(),  # share of prompts with equal rewards
        "cut": float(np.mean([trajectory["cut"] for trajectory in trajectories])),
        "sample_seconds": sample_seconds,
        "update_seconds": seconds - sample_seconds,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def record(output, metrics, row) -> None:
    """Prints a row and adds it to OUTPUT/metrics.jsonl, with null for what is not finite."""
    metrics.append({name: value if math.isfinite(value) else None for name, value in row.items()})
    shown = ("eval_accuracy", "reward", "response_tokens", "no_signal", "grad_norm", "step_seconds")
    say(f"{row['step']:4d}  " + "  ".join(f"{name} {row[name]:.3f}" for name in shown if name in row))
    if RANK == 0:
        # All rows, not only the last: a resumed run goes back to those of its checkpoint.
        write_atomically(output / "metrics.jsonl", "".join(json.dumps(each) + "\n" for each in metrics))


def checkpoint_state(policy, optimizer) -> dict:
    """What a checkpoint holds: the tensors themselves, not copies, so that reading into them restores a run."""
    model = policy.module if isinstance(policy, DistributedDataParallel) else policy
    for parameter in model.parameters():
        if not optimizer.state[parameter]:
            # AdamW makes its averages, of zeros, at its first update. To be read into, they have to be there before.
            averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] |= {"step": torch.zeros((), device=parameter.device), **averages}
    return {"policy": dict(model.named_parameters()), "adam": optimizer.state_dict()["state"]}


def save_checkpoint(output, step, metrics, policy, optimizer) -> None:
    """Writes OUTPUT/checkpoint-STEP, which gets its name when all of it is on the disk, and removes the one before."""
    unfinished = output / "unfinished"  # if a kill leaves one, the next call writes over it
    state = {"step": step, "metrics": json.dumps(metrics), **checkpoint_state(policy, optimizer)}
    # With a file for each tensor, they are written one by one, without a copy of all of them in memory.
    dcp.save(state, storage_writer=dcp.FileSystemWriter(unfinished, single_file_per_rank=False))
    if RANK == 0:
        unfinished.rename(output / f"checkpoint-{step:06d}")
        for old in sorted(output.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(old)


def cause(error: BaseException) -> BaseException:
    """The first error of those that `dcp` joins into one. Any other error is returned as it is."""
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error


def load_checkpoint(output, policy, optimizer, config):
    """With --resume, restores the newest checkpoint. Returns its iteration and rows of metrics, or 0 and []."""
    # What the first process sees: another one may have an old list of the files.
    checkpoints = gather([sorted(output.glob("checkpoint-*"))])[0]
    if not config.resume or not checkpoints:
        return 0, []
    state = {"step": 0, "metrics": "", **checkpoint_state(policy, optimizer)}
    newest = checkpoints[-1]
    try:
        dcp.load(state, checkpoint_id=newest)
    except (Exception, dcp.api.CheckpointException) as error:  # noqa: BLE001 - CheckpointException is a BaseException
        what = f"{newest.name} cannot be read; try again, or, if it is damaged, remove it to begin again"
        fail(f"--output {output}: {what} ({cause(error)!r})")
    say(f"Resuming after iteration {state['step']}")
    return state["step"], json.loads(state["metrics"])


def check_output(output: Path, options: dict) -> None:
    """Raises ValueError if a run is in OUTPUT that these options do not continue."""
    file = output / "config.json"
    if not file.exists():
        return
    if not options["resume"]:
        raise ValueError(f"--output {output}: holds another run; name a new one or --resume it")
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"--output {output}: its config.json cannot be read; name another directory") from error
    # Up to rounding, these options do not change what an iteration does. So a resumed run may have other values.
    may_change = {"steps", "eval_every", "save_every", "resume", "output", "device", "shard"}
    may_change |= {"sample_batch", "micro_batch_tokens", "gradient_checkpointing"}
    names = sorted({*before, *options} - may_change)
    begun = {name: before.get(name) for name in names if before.get(name) != options.get(name)}
    if begun:
        raise ValueError(f"--output {output}: its run was begun with {begun}; repeat that, or name a new one")
    done = max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)
    if done > options["steps"]:
        raise ValueError(f"--steps {options['steps']}: the run in {output} has {done} already; give as many or more")


def hold_directory(output: Path, options: dict):
    """Begins a run in OUTPUT with its config.json. Returns a lock, which keeps other commands out as long as it is open."""
    errors = []
    lock = None
    try:
        if RANK == 0:
            output.mkdir(parents=True, exist_ok=True)
            lock = (output / "lock").open("a")
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process, however that ends
            except BlockingIOError as error:
                raise ValueError(f"--output {output}: another command is at work there; name another one") from error
            except OSError:
                say(f"The file system of {output} has no locks: make sure that no other command uses this directory.")
            check_output(output, options)
            write_atomically(output / "config.json", json.dumps(options, indent=2))
    except OSError as error:
        errors.append(f"--output {output}: cannot be written ({error})")
    except ValueError as error:
        errors.append(str(error))
    fail_together(errors)
    if not (output / "config.json").exists():
        errors.append(f"--output {output}: is not the same directory on all machines")
    fail_together(errors)
    return lock


def what_to_do(error: BaseException, config) -> str:
    """A line for a run that ended because of memory, or because OUTPUT cannot be written. Raises any other error again."""
    functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    is_sampling = "sample_trajectories" in functions
    # (In sampling, `update` is a method of the cache. In `step`, AdamW is making its averages.)
    is_learning = "update" in functions and "step" not in functions and not is_sampling
    if isinstance(error, torch.OutOfMemoryError):
        remedies = []
        if is_sampling and config.sample_batch >= 2 * config.num_samples:
            remedies.append(f"--sample-batch {config.sample_batch // 2}")
        if is_learning and config.micro_batch_tokens > 1:
            remedies.append(f"--micro-batch-tokens {config.micro_batch_tokens // 2}")
        if is_learning and not config.gradient_checkpointing:
            remedies.append("--gradient-checkpointing")
        remedies.append("more GPUs, with --shard, or a smaller model, in a new --output")
        what = f"out of memory: try {', or '.join(remedies)}"
    elif is_sampling or "say" in functions:
        raise error  # it does not come from OUTPUT, but from a task's reward, which may read files, or from printing
    else:
        what = f"--output {config.output}: cannot be written; is the disk full? ({cause(error)})"
    checkpoints = sorted(Path(config.output).glob("checkpoint-*"))
    again = f"goes on from {checkpoints[-1].name}" if checkpoints else "begins again"
    return f"{what}; with --resume --output {config.output} the command {again}"


# ------------------------------ Options and the command line ------------------------------


def option(default, help):
    """A field of Config. --help shows the text and the default. (For None, the text says what is taken.)"""
    return HfArg(default=default, help=help if default is None else f"{help} Default: {default}.")


@dataclass
class Config:
    """The options of a run, with defaults for a pretrained model. (`parse_options` replaces each None but `data`.)"""

    # What to train, on what
    model: str | None = option(None, "A model of the Hugging Face hub, or a directory. Default: what fits the machine.")
    task: str | None = option(None, "sums, gsm8k or math-hard. Default: gsm8k with --model, or what fits the machine.")
    data: str | None = option(
        None, "Name or directory (train.jsonl, test.jsonl) of a dataset. Default: the task's own."
    )
    output: str | None = option(None, "Directory for results, the same on all machines. Default: a new one in runs/.")

    # The method
    steps: int = option(200, "Number of iterations, each with an E-step and an M-step.")
    prompts_per_step: int = option(64, "Number of prompts in each iteration, over all processes.")
    num_samples: int = option(8, "Number of responses sampled for each prompt.")
    max_new_tokens: int = option(512, "Longest response, in tokens. A longer one is cut off there.")
    temperature: float = option(1.0, "Temperature of sampling. The update uses the same temperature.")
    updates: int = option(1, "Number of updates on each batch. From the second on, the samples are an older policy's.")
    lr: float = option(1e-6, "Learning rate of AdamW, reached at the fifth iteration.")
    max_grad_norm: float = option(1.0, "A gradient with a larger norm than this is scaled down to it.")
    beta: float = option(0.0, "Weight of the KL divergence to the base model, which keeps the policy near. 0: without.")
    seed: int = option(0, "Seed of the choice of problems and of sampling.")

    # Evaluation and checkpoints
    eval_every: int = option(10, "Number of iterations between two evaluations on held-out problems. 0 for none.")
    eval_problems: int = option(256, "Number of held-out problems in an evaluation.")
    save_every: int = option(20, "Number of iterations between two checkpoints. 0 for one at the end only.")
    resume: bool = option(False, "Go on from the checkpoint in --output, or begin there if it has none.")

    # Memory and devices
    sample_batch: int = option(512, "Responses that a process samples at a time, at least those to one prompt.")
    micro_batch_tokens: int = option(2048, "Tokens that a process learns from at a time. Fewer take less memory.")
    gradient_checkpointing: bool = option(False, "Compute each layer again in the backward pass: slower, less memory.")
    shard: bool = option(False, "Use FSDP in place of DDP. It splits a policy that does not fit on one GPU.")
    device: Literal["cuda", "mps", "cpu"] | None = option(None, "Default: cuda if there is a GPU, else cpu.")
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "Precision of all passes; θ is in float32. Default: bfloat16 where it is fast, but float32 for sums."
    )


# What `python empg.py` does without a large GPU, or with --task sums: the tiny model in base/ learns the built-in task.
BASE = str(Path(__file__).resolve().with_name("base"))
LAPTOP: dict = {"model": BASE, "task": "sums", "max_new_tokens": 40, "lr": 1e-4, "steps": 60, "eval_every": 5}
LAPTOP |= {"prompts_per_step": 32, "num_samples": 16, "eval_problems": 500}

# The name of the method in config.json. A script that replaces a piece of this file, as in studies/, sets another one.
METHOD = "EMPG"


def default_device() -> Literal["cuda", "cpu"]:
    """The device of a command that does not name one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_precision(device: str, task: str) -> Literal["bfloat16", "float32"]:
    """The precision that is faster on a device. But for the sums it is float32: a tiny model gains nothing."""
    is_fast = False
    if device == "cuda":
        is_fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        # A processor without such instructions can be hundreds of times slower in bfloat16.
        is_fast = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bfloat16" if is_fast and task != "sums" else "float32"


def parse_options(argv) -> Config:
    """The options of a command line, with defaults for what it does not say. If one cannot work, prints a line and exits."""
    about = f"{__doc__.splitlines()[0]} The defaults are those for a pretrained model."
    how = {"description": about, "formatter_class": argparse.HelpFormatter, "allow_abbrev": False}
    parser: Any = HfArgumentParser(Config, **how)  # type: ignore[arg-type]
    parser.error = fail
    # The defaults depend on the machine and on what was asked for, so read the command line twice.
    asked = parser.parse_args(argv)
    device = asked.device or default_device()
    # (If there are more processes than GPUs, `start_processes` will say so.)
    has_gpu = device == "cuda" and torch.cuda.is_available() and LOCAL_RANK < torch.cuda.device_count()
    gigabytes = torch.cuda.get_device_properties(LOCAL_RANK).total_memory / 1e9 if has_gpu else 0
    # With the other defaults, 1.5B parameters take about 43 GB, and 0.5B about 18 GB: see docs/running.md.
    recipe = {"task": "gsm8k", "model": "Qwen/Qwen2.5-1.5B" if gigabytes > 60 else "Qwen/Qwen2.5-0.5B"}
    # A GPU that is sold with 24 GB has 23 to 26 · 10⁹ bytes.
    if asked.model is None and (asked.task == "sums" or (asked.task is None and gigabytes < 22)):
        recipe = LAPTOP
    parser.set_defaults(**recipe, device=device, dtype=best_precision(device, asked.task or recipe["task"]))
    config = Config(**vars(parser.parse_args(argv)))

    for name, value in asdict(config).items():
        flag = f"--{name.replace('_', '-')} {value}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not 0 <= value < math.inf:
            fail(f"{flag}: must be finite, and not negative")
        if is_number and value == 0 and name not in ("beta", "eval_every", "save_every", "seed"):
            fail(f"{flag}: must be above 0")
    if config.task not in TASKS:
        fail(f"--task {config.task}: choose {', '.join(TASKS)}")
    if config.num_samples == 1:
        fail("--num-samples 1: must be at least 2, since the baseline is the mean of the other samples")
    if config.resume and config.output is None:
        fail("--resume: repeat the command of a run, with its --output DIR")
    if config.shard and WORLD_SIZE == 1:
        fail("--shard: needs several processes, as torchrun starts them")
    # In training a process has no more than this to sample. Hold evaluation to it, so that it takes no more memory.
    share = math.ceil(config.prompts_per_step / WORLD_SIZE) * config.num_samples
    config.sample_batch = min(config.sample_batch, share)
    config.output = config.output or f"runs/{config.task}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return config


def main(argv=None) -> None:
    """Runs the command line, or `argv`."""
    config = parse_options(argv)
    start_processes(config.device)
    # The name of the default output has the time in it: take the options of the first process.
    config = gather([config])[0]
    output = Path(config.output)
    options = {"method": METHOD, **asdict(config)}
    errors = []
    try:
        problems, held_out = load_problems(config)
        tokenizer, policy = load_model(config.model)
        add_prompts(problems + held_out, TASKS[config.task], tokenizer)
        stop_tokens(tokenizer, policy)  # only for the errors that it may raise
        room = room_for_responses(problems + held_out, policy)
        if room < config.max_new_tokens:
            raise ValueError(f"--max-new-tokens {config.max_new_tokens}: at most {room} fit after the prompts")
        if RANK == 0:
            check_model(config.model)
    except (OSError, ValueError) as error:
        errors.append(str(error))
    fail_together(errors)

    # A resumed run has to draw from the same problems.
    contents = json.dumps([[problem["question"], problem["answer"], problem["prompt"]] for problem in problems])
    digest = hashlib.sha256(contents.encode()).hexdigest()
    options["training_problems"] = f"{len(problems)}, with digest {digest[:12]}"
    _lock = hold_directory(output, options)
    say(str(config))
    say(f"{len(problems)} problems to train on, {len(held_out)} held out")
    say(f"The first prompt: {tokenizer.decode(problems[0]['prompt'])!r}")
    _, old_policy = load_model(config.model, getattr(torch, config.dtype))
    try:
        # `sample` takes no gradient, so θ* learns nothing. Do not freeze it by `requires_grad_(False)`: with frozen
        # weights, in bfloat16 on a CPU, torch copies the output layer for each prompt that is read.
        old_policy = old_policy.to(config.device)
        reference = None
        if config.beta:
            _, reference = load_model(config.model)
            reference = distribute(reference.requires_grad_(False), config)
        train(config, distribute(policy, config), old_policy, reference, tokenizer, problems, held_out, output)
        # `old_policy` is the trained θ, in --dtype. The last checkpoint has it in float32.
        if RANK == 0:
            old_policy.save_pretrained(output / "model")
            tokenizer.save_pretrained(output / "model")
    except (torch.OutOfMemoryError, OSError, SafetensorError, dcp.api.CheckpointException) as error:
        fail(what_to_do(error, config), everywhere=True)
    atexit.register(end_processes)


if __name__ == "__main__":
    sys.modules["empg"] = sys.modules["__main__"]  # eval.py imports empg: let it find this copy
    main()
