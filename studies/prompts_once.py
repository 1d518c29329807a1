#!/usr/bin/env python3
"""Reads each prompt once for all its responses, where empg.py reads it again with each of them.

    python studies/prompts_once.py [the options of empg.py]

The result is the same, values and gradients; `test_empg.py` compares them. It is faster where prompts are long, responses
are short and the machine is slow. It is not in empg.py, because it needs two passes in one backward pass, with a cache, a
mask and positions: under FSDP that keeps all layers' gradients in memory, and the mask rules out the fastest attention
kernel of a GPU.
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg


class PromptLayer(DynamicLayer):
    """The keys and values of prompts in one layer. Those of the responses are joined to them, but not kept.

    The library's own layer would keep them. But with --gradient-checkpointing the backward pass computes a layer again,
    which must then find its cache as it was.
    """

    def update(self, keys, values, *args, **kwargs):
        if self.is_initialized:
            return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys = keys
        self.values = values
        self.is_initialized = True
        return keys, values


def prompt_cache(model) -> DynamicCache:
    model = getattr(model, "module", model)  # without DDP
    cache = DynamicCache()
    cache.layers = [PromptLayer() for _ in range(model.config.get_text_config().num_hidden_layers)]
    return cache


def response_logits(model, prompts, responses, temperature=1.0):
    """The same result as `empg.response_logits`, from one pass over the distinct prompts and one over the responses."""
    device = next(model.parameters()).device
    prompts = [tuple(prompt) for prompt in prompts]  # one for each response
    distinct = list(dict.fromkeys(prompts))
    prompt_of_response = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)

    # 1) Read the distinct prompts. They are padded on the left, so that all of them end in the last column.
    width = max(len(prompt) for prompt in distinct)
    padding = [width - len(prompt) for prompt in distinct]
    ids = torch.tensor([[0] * pads + list(prompt) for pads, prompt in zip(padding, distinct)], device=device)
    mask = torch.tensor([[0] * pads + [1] * (width - pads) for pads in padding], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    read = prompt_cache(model)
    output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=read, logits_to_keep=1)
    # The last token of a prompt predicts the first one of each of its responses.
    first_logits = output.logits[prompt_of_response]  # (N, 1, V)

    # 2) Give every response a copy of its prompt's keys and values.
    copied = prompt_cache(model)
    for layer, copy in zip(read.layers, copied.layers):
        copy.update(layer.keys[prompt_of_response], layer.values[prompt_of_response])
        # If the backward pass computes the layer again, it has to find its cache empty, as it was.
        layer.is_initialized = False

    # 3) Read the responses. They are padded on the right, to which causal attention does not look.
    ids = pad_sequence([torch.tensor(response) for response in responses], batch_first=True).to(device)  # (N, T)
    column = torch.arange(ids.shape[1], device=device)
    mask = torch.cat([mask[prompt_of_response], torch.ones_like(ids)], dim=1)
    positions = positions[prompt_of_response, -1:] + 1 + column
    output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=copied)
    logits = torch.cat([first_logits, output.logits[:, :-1]], dim=1)  # (N, T, V)

    length = torch.tensor([len(response) for response in responses], device=device)[:, None]
    is_token = column < length  # (N, T)
    return logits[is_token].float() / temperature, ids[is_token], is_token


def micro_batches(trajectories: list[dict], max_tokens: int) -> list[list[dict]]:
    """As `empg.micro_batches`, but with all responses to a prompt in one pass, as far as they fit.

    A pass has its distinct prompts, padded to the longest, and its responses, padded to the longest.

    >>> trajectories = [{"prompt": [i // 2], "response": [0] * length} for i, length in enumerate((4, 2, 1, 3, 1, 1))]
    >>> [[len(row["response"]) for row in batch] for batch in micro_batches(trajectories, max_tokens=10)]
    [[4, 2], [1, 3], [1, 1]]
    """

    def padded_tokens(batch):
        distinct = {tuple(row["prompt"]) for row in batch}
        longest_response = max(len(row["response"]) for row in batch)
        return len(distinct) * max(map(len, distinct)) + len(batch) * longest_response

    groups: dict[tuple, list[dict]] = {}
    for trajectory in trajectories:
        groups.setdefault(tuple(trajectory["prompt"]), []).append(trajectory)
    by_longest = sorted(groups.values(), key=lambda group: max(len(row["response"]) for row in group), reverse=True)

    batches: list[list[dict]] = []
    for group in by_longest:
        if batches and padded_tokens([*batches[-1], *group]) <= max_tokens:
            batches[-1] = [*batches[-1], *group]
        elif padded_tokens(group) <= max_tokens:
            batches.append(group)
        else:
            batches += empg_micro_batches(group, max_tokens)
    return batches


empg_micro_batches = empg.micro_batches


def log_probs(*args, **options):
    """The same result as `empg.log_probs`, to which it gives the logits of this file."""
    with mock.patch.object(empg, "response_logits", response_logits):
        return empg.log_probs(*args, **options)


def replace() -> None:
    """Lets empg.py read each prompt once."""
    empg.response_logits = response_logits
    empg.micro_batches = micro_batches


if __name__ == "__main__":
    replace()
    empg.main()
