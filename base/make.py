#!/usr/bin/env python3
"""Makes the base model for the task sums, the files beside this one: it can reason but usually does not.

    python base/make.py [DIRECTORY]

A Qwen2 of 0.19 million parameters, taught by demonstrations of two habits: in six of ten a guess is blurted out, `#20`,
usually wrong; in four the sum is worked out, `3+8=11,11+5=16,16+2=18#18`. Supervised learning is the M-step of EM Policy
Gradient with every advantage 1: the same `log_probs`, the same `empg_loss`.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from empg import TASKS, empg_loss, log_probs


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the characters of the task sums."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokens = [*special.values(), *"0123456789+=,#"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def demonstrate(question: str, rng: np.random.Generator) -> str:
    """A response to a question: worked out in four of ten, else a guess at most 5 off."""
    digits = [int(digit) for digit in question[:-1].split("+")]
    totals = list(itertools.accumulate(digits))
    steps = ",".join(f"{a}+{b}={c}" for a, b, c in zip(totals, digits[1:], totals[1:]))
    by_step = rng.random() < 0.4
    return f"{steps}#{totals[-1]}" if by_step else f"#{abs(totals[-1] + rng.integers(-5, 6))}"


def make(directory: Path, iterations: int = 500, batch: int = 64, lr: float = 4e-3) -> list[float]:
    """Trains the model, saves it and its tokenizer, and returns the loss of every iteration, in nats per response."""
    tokenizer = character_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    rng, problems, losses = np.random.default_rng(0), TASKS["sums"].problems(None, "train"), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    for i in tqdm(range(iterations), "teaching", leave=False):
        questions = [problems[j]["question"] for j in rng.integers(len(problems), size=batch)]
        demonstrations = [demonstrate(question, rng) for question in questions]
        responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(demonstrations)["input_ids"]]
        logprobs, mask = log_probs(model, tokenizer(questions)["input_ids"], responses)
        loss = empg_loss(logprobs, mask, torch.ones(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min((i + 1) / 50, 1 - i / iterations)
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return losses


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
