#!/usr/bin/env python3
"""A real language model learns from right or wrong: SmolLM2-135M-Instruct on word problems, on two cores.

    python studies/word_problems.py [--output DIR] [--seed N] [--grpo] [the options of empg.py]

Stage 1 demonstrates equations, `2 + 4 = 6`, to 250 problems of ASDiv: supervised learning, which is the M-step with
every advantage 1. Stage 2 is EMPG (--grpo: studies/grpo.py) on 846 others, with nothing but right or wrong. Then both
models are scored on 300 problems of ASDiv that no stage saw, and on SVAMP. The same command goes on after a kill, and
seeds share stage 1.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import grpo
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg
import eval as scoring

BATCH = "--prompts-per-step=16 --num-samples=16 --max-new-tokens=24 --micro-batch-tokens=1024"
OPTIONS = ["--task=asdiv", "--resume", "--steps=120", "--lr=1e-5", *BATCH.split()]
PARTS = {
    "demonstrations": [(0, 250)],
    "validation": [(250, 350)],
    "test": [(550, 850)],
    "train": [(350, 550), (850, None)],
}


def asdiv(part: str, data: str) -> list[dict]:
    """The problems of ASDiv that one equation solves and that are in a part, always the same and disjoint."""
    problems = {}
    for row in empg.dataset_problems([""], "question", "answer", data, "validation"):
        equation = re.fullmatch(r"([\d.+\-*/() ]+)=\s*([\d.]+)", row["formula"])
        if equation and equation[2] == row["answer"].split()[0]:
            left = " ".join(re.findall(r"[\d.]+|\S", equation[1]))
            problem = {"question": f"{row['body']} {row['question']}", "answer": equation[2]}
            problems[row["body"]] = problem | {"equation": f"{left} = {equation[2]}"}
    order, problems = np.random.default_rng(0).permutation(len(problems)), list(problems.values())
    return [problems[i] for places in PARTS[part] for i in order[slice(*places)]]


def svamp(data: str, split: str) -> list[dict]:
    """The problems of SVAMP: of one step, with a number that distracts."""
    rows = empg.dataset_problems([""], "Question", "Answer", data, split)
    return [{"question": f"{row['Body']} {row['Question']}", "answer": row["Answer"]} for row in rows]


GRADER, PROMPT = empg.TASKS["gsm8k"].reward, "{question} Answer with a short equation."
# A run's own evaluations are of other problems than the reported ones: whoever looks for a setting looks at these.
SPLITS = {"train": "train", "test": "validation"}
empg.TASKS["asdiv"] = empg.Task(GRADER, lambda data, split: asdiv(SPLITS[split], data), PROMPT)
empg.TASKS["asdiv-test"] = empg.Task(GRADER, lambda data, split: asdiv(split, data), PROMPT)
empg.TASKS["svamp"] = empg.Task(GRADER, svamp, PROMPT)


def demonstrate(name: str, data: str, directory: Path, updates: int = 24, batch: int = 16, lr: float = 1e-4) -> None:
    """Stage 1: question → equation; model and tokenizer are saved in `directory`."""
    problems = asdiv("demonstrations", data)
    tokenizer, model = empg.load_model(name, torch.float32)
    device = empg.default_device()
    config = empg.Config(device=device, dtype=empg.best_precision(device, "asdiv"))
    empg.add_prompts(problems, empg.TASKS["asdiv"], tokenizer)
    for problem in problems:
        problem["response"] = [*tokenizer(problem["equation"])["input_ids"], tokenizer.eos_token_id]
    optimizer = torch.optim.AdamW(model.to(config.device).parameters(), weight_decay=0.0, fused=True)
    rng = np.random.default_rng(0)
    for i in tqdm(range(updates), "demonstrating", leave=False):
        rows = [{**problems[j], "advantage": 1.0} for j in rng.choice(len(problems), batch, replace=False)]
        optimizer.param_groups[0]["lr"] = lr * min(1, (i + 1) / 5, 2 * (1 - i / updates))
        empg.update(model, optimizer, rows, config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)  # the last of it


def main(argv: list[str] | None = None) -> None:
    """Both stages and their scores, or what is left of them to do."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="EleutherAI/asdiv")
    parser.add_argument("--svamp", default="ChilleD/SVAMP")
    parser.add_argument("--output", default="runs/word-problems", type=Path)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--grpo", action="store_true")
    given, rest = parser.parse_known_args(argv)
    start, run = given.output / "demonstrated", given.output / f"{'grpo' if given.grpo else 'empg'}-{given.seed}"
    try:
        svamp(given.svamp, "test")  # it is there
        if not (start / "tokenizer.json").exists():
            demonstrate(given.model, given.data, start)
    except ValueError as error:
        empg.fail(error)
    if given.grpo:
        grpo.replace()
    empg.main([*OPTIONS, f"--model={start}", f"--data={given.data}", f"--seed={given.seed}", f"--output={run}", *rest])
    steps = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    for task, data in (("asdiv-test", given.data), ("svamp", given.svamp)):
        files = [f"{given.output}/{name}-{task}.jsonl" for name in (start.name, f"{run.name}-after-{steps}")]
        for model, file in zip((start, run / "model"), files):
            how = [f"--model={model}", f"--task={task}", f"--data={data}", "--limit=500", "--max-new-tokens=24"]
            scoring.main([*how, f"--output={file}"])
        scoring.main(["--compare", *files])


if __name__ == "__main__":
    main()
