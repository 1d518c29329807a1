#!/usr/bin/env python3
"""Turns models and runs of empg.py into the numbers and pictures of the paper.

python eval.py --model DIR_OR_HUB_NAME --task gsm8k                 greedy accuracy on the test split
torchrun --nproc-per-node 4 eval.py --model ... --task math-hard    the same, shared among GPUs
python eval.py --model ... --task gsm8k --num-samples 16            mean@16, pass@k and maj@16
python eval.py --model ... --task gsm8k --output FILE.jsonl         keeps the responses; interrupted, it goes on
python eval.py --compare A.jsonl B.jsonl                            is B better than A by more than chance?
python eval.py --curves RUN_DIR [RUN_DIR ...] --output curves.png   reward, accuracy and length while training
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import HfArgumentParser

import empg
from empg import RANK, TASKS, WORLD_SIZE, fail, option, progress, say


@dataclass
class Options:
    """Every option. --compare takes no other, --curves only --output."""

    model: str = option(None, "hub name or directory, as runs/NAME/model")
    task: str = option("gsm8k", ", ".join(TASKS))
    data: str | None = option(None, "hub name or directory of a dataset for the task")
    split: Literal["test", "train"] = option("test", "of the dataset")
    limit: int | None = option(None, "only so many problems, the first ones")
    num_samples: int = option(1, "responses to each problem")
    temperature: float = option(None, "0 is greedy; by default 0 for one sample, 1 for several")
    max_new_tokens: int = option(None, "token limit of a response; by default 1024, or what fits")
    seed: int = option(0, "of sampling")
    dtype: Literal["bfloat16", "float32"] = option(None, "of computation; by default bfloat16 on cuda, else float32")
    output: str | None = option(None, "FILE.jsonl that gets every response; the picture of --curves")
    sample_batch: int = option(128, "responses that a process samples at a time: bounds its memory")
    device: Literal["cuda", "mps", "cpu"] = option(
        None, "where to compute; by default cuda if there is a GPU, else cpu"
    )
    compare: list[str] | None = field(default=None, metadata={"help": "two results files of the same problems"})
    curves: list[str] | None = field(default=None, metadata={"help": "directories of runs"})


# The paper's EMPG and GRPO scores
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "Qwen2.5-1.5B": {"gsm8k": (0.744, 0.739), "math-hard": (0.575, 0.568)},
    "Qwen2.5-7B": {"gsm8k": (0.888, 0.867), "math-hard": (0.742, 0.730)},
    "Qwen2.5-Math-7B": {"gsm8k": (0.918, 0.004), "math-hard": (0.794, 0.755)},
    "Qwen2.5-14B-Instruct": {"gsm8k": (0.952, 0.940), "math-hard": (0.808, 0.816)},
}
# Runs that differ in nothing else are seeds of one setting.
SAME = {"seed", "output", "device", "save_every", "resume", "wandb", "sample_batch", "shard"}
PANELS = {"reward": "reward, sampled", "eval_accuracy": "held-out accuracy", "response_tokens": "response tokens"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # also for the colour-blind

# ---- The mathematics: pure functions; 95 % of the normal distribution lie within ±Z

Z = 1.959963984540054


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """95 % score interval of the share successes/total (Wilson 1927). It has a width even where all or none succeed."""
    share, weight = successes / total, 1 + Z**2 / total
    centre = (share + Z**2 / (2 * total)) / weight
    half = Z * math.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2) / weight
    return centre - half if successes > 0 else 0.0, centre + half if successes < total else 1.0


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a correct one (Chen et al. 2021)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The commonest answer, of equally common ones the earliest; None if there is no answer at all."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=lambda answer: votes[answer]) if votes else None


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of equal A and B, where a coin decides each problem that one alone gets right (McNemar 1947)."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """(mean of b - a, low, high): accuracies on the same problems, the difference's 95 % interval (Agresti and Min 2005).

    It counts two more problems, one of difference 0 and half a one each of ±1, so that it always has a width.
    """
    d, n = np.asarray(b, float) - np.asarray(a, float), len(a) + 2
    centre = float(d.sum()) / n
    half = Z * math.sqrt(max(0.0, (float(d @ d) + 1) / n - centre**2) / n)
    return float(d.mean()), max(-1.0, centre - half), min(1.0, centre + half)


# ---- Evaluation


def read_results(file: str | Path) -> tuple[dict, list[dict]]:
    """(first row, the others) of a results file, of complete problems only; ValueError if it is another file."""
    try:
        header, *rows = [json.loads(line) for line in Path(file).read_text().split("\n")[:-1]]
        return header, rows[: len(rows) - len(rows) % header["num_samples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not a results file of eval.py; name another file ({error!r})") from error


def check_output(output: str | None) -> None:
    """ValueError if --output is no file that can be written, before an hour of work."""
    if output is None:
        return
    if Path(output).is_dir():
        raise ValueError(f"--output {output}: is a directory; name a file")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be made ({error.strerror}); name another file") from error


def evaluate(options: Options) -> list[dict]:
    """Rows of the results file, G for each problem; those in --output are not done again. ValueError for bad options."""
    task, G = TASKS[options.task], options.num_samples
    extract = empg.last_boxed if options.task == "math-hard" else empg.final_answer
    problems = task.problems(options.data, options.split)[: options.limit]
    tokenizer, model = empg.load_model(options.model, getattr(torch, options.dtype))
    if RANK == 0:
        empg.check_model(options.model, tokenizer)
    empg.add_prompts(problems, task, tokenizer)
    room = empg.room_for_responses(problems, model)
    if room < (options.max_new_tokens or 1):
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: at most {room} fit after the prompts")
    options.max_new_tokens = options.max_new_tokens or int(min(1024, room))
    names = ("model", "task", "data", "split", "limit", "num_samples", "temperature", "max_new_tokens", "seed", "dtype")
    header = {name: getattr(options, name) for name in names} | {"problems": len(problems)}
    file = Path(options.output or "")
    before, rows = empg.gather([read_results(file) if file.is_file() else (header, [])] if RANK == 0 else [])[0]
    if before != header:
        raise ValueError(f"--output {file}: has results of {before}; repeat these options, or name another file")
    if options.output and RANK == 0:
        complete = file.with_name(f"{file.name}.unfinished")
        complete.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
        complete.replace(file)
    limits = options.max_new_tokens, options.sample_batch, options.temperature
    model, count = model.to(options.device), max(1, options.sample_batch * WORLD_SIZE // G)
    for start in progress(range(len(rows) // G, len(problems), count), "evaluating"):
        some = problems[start : start + count]
        new: list[dict] = []
        for i, row in enumerate(
            empg.sample_trajectories(model, tokenizer, task, some, G, *limits, options.seed * 10**18 + start)
        ):
            problem, text = some[i // G], row["text"]
            new.append({"index": start + i // G, "question": problem["question"], "type": problem.get("type")})
            new[i] |= {"response": text, "answer": extract(text), "correct": row["reward"] == 1}
            new[i] |= {"tokens": len(row["response"]), "cut": row["cut"]}
        rows += new
        if options.output and RANK == 0:
            with file.open("a") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in new))
    return rows


def describe(rows: list[dict], G: int) -> dict[str, str]:
    """The scores of G rows for each problem, in words. The interval counts problems, as the samples of one are alike."""
    correct = np.array([row["correct"] for row in rows], float).reshape(-1, G)
    tokens = [row["tokens"] for row in rows]
    low, high = wilson_interval(correct.mean(1).sum(), len(correct))
    name = f"mean@{G}" if G > 1 else "accuracy"
    lines = {name: f"{correct.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}, of {len(correct)} problems"}
    if G > 1:
        ks = [k for k in range(1, G + 1) if k & (k - 1) == 0 or k == G]
        shares = [np.mean([pass_at_k(G, int(right), k) for right in correct.sum(1)]) for k in ks]
        lines["pass@k"] = ", ".join(f"{share:.3f} at k = {k}" for k, share in zip(ks, shares))
        groups = [rows[start : start + G] for start in range(0, len(rows), G)]
        votes = [majority_vote([row["answer"] for row in group]) for group in groups]
        won = [any(r["correct"] and r["answer"] == vote for r in group) for group, vote in zip(groups, votes)]
        lines[f"maj@{G}"] = f"{np.mean(won):.3f}"
    kinds = np.array([row["type"] or "" for row in rows[::G]])
    for kind in sorted({*kinds} - {""}):
        lines[f"  {kind}"] = f"{correct[kinds == kind].mean():.3f} of {(kinds == kind).sum()} problems"
    lines["response tokens"] = f"{np.mean(tokens):.1f} mean, {np.median(tokens):g} median"
    lines["cut at the limit"] = f"{np.mean([row['cut'] for row in rows]):.1%}"
    return lines | {"without an answer": f"{np.mean([row['answer'] is None for row in rows]):.1%}"}


def paper_scores(model: str, task: str) -> dict[str, str]:
    """The paper's scores of a hub model, or of one that the run in the directory around `model` has made of it."""
    run = Path(model).parent / "config.json"
    name = Path(json.loads(run.read_text()).get("model", "") if run.exists() else model).name
    found = PAPER.get(name, {}).get(task)
    return {"in the paper": "EMPG {:.3f}, GRPO {:.3f}".format(*found)} if found else {}


# ---- Comparison and curves


def compare(a: str, b: str) -> dict[str, str]:
    """Is B better than A on the same problems? Of several samples the mean counts, and the better is right more often."""
    grouped = [(rows, header["num_samples"]) for header, rows in (read_results(a), read_results(b))]
    if len({tuple(row["question"] for row in rows[::G]) for rows, G in grouped}) > 1:
        raise ValueError("--compare: the files are not of the same problems, or not complete")
    first, second = (np.reshape([float(row["correct"]) for row in rows], (-1, G)).mean(1) for rows, G in grouped)
    only_a, only_b = int((first > second).sum()), int((second > first).sum())
    lines = {"A": f"{a}: {first.mean():.3f}", "B": f"{b}: {second.mean():.3f}, of {len(second)} problems"}
    lines["B - A"] = "{:+.3f}, 95 % interval {:+.3f} to {:+.3f}".format(*paired_difference(first, second))
    lines["McNemar's exact test"] = f"p = {mcnemar_exact(only_a, only_b):.2g}; A better on {only_a}, B on {only_b}"
    means = "{:.1f} and {:.1f}".format(*(np.mean([row["tokens"] for row in rows]) for rows, _ in grouped))
    return lines | {"response tokens": means}


def draw_curves(runs: list[str], picture: str) -> dict[str, str]:
    """The paper's figures 2 to 8. Runs of one setting, whose names differ in a last number, are drawn as mean and range."""
    from matplotlib.figure import Figure

    groups: dict[tuple, list] = {}
    try:
        for run in runs:
            settings = json.loads(Path(run, "config.json").read_text())
            rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
            same = json.dumps({name: value for name, value in settings.items() if name not in SAME})
            key = re.sub(r"\W*\d+$", "", Path(run).name), same
            groups.setdefault(key, []).append((Path(run).name, rows))
    except (OSError, ValueError) as error:
        raise ValueError(f"--curves {run}: is not the directory of a run ({error})") from error
    figure, lines = Figure(figsize=(10, 3), layout="constrained"), {}
    axes = figure.subplots(1, 3)
    for i, ((stem, _), seeds) in enumerate(groups.items()):
        label = f"{stem}, {len(seeds)} seeds" if len(seeds) > 1 else seeds[0][0]
        for axis, name in zip(axes, PANELS):
            values = [{row["step"]: row[name] for row in rows if row.get(name) is not None} for _, rows in seeds]
            steps = sorted(set.intersection(*map(set, values)))
            found = np.array([[value[step] for step in steps] for value in values])
            style: Any = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[i % 4]}
            axis.plot(steps, found.mean(0), label=label, linewidth=1.4, **style)
            axis.fill_between(steps, found.min(0), found.max(0), color=style["color"], alpha=0.25, linewidth=0)
            axis.set(ylabel=PANELS[name], xlabel="iteration")
            if name == "eval_accuracy" and steps:
                mean, deviation = found[:, -1].mean(), found[:, -1].std(ddof=len(seeds) > 1)
                lines[label] = f"accuracy {mean:.3f} ± {deviation:.3f} after {steps[-1]} iterations"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=200)
    return lines | {"picture": picture}


def main(argv: list[str] | None = None) -> None:
    """The command line: `argv`, or else the process's own."""
    parser: Any = HfArgumentParser(Options, description=(__doc__ or "").splitlines()[0], allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = fail
    options = Options(**vars(parser.parse_args(argv)))
    options.device = options.device or empg.default_device()
    options.dtype = options.dtype or empg.default_dtype(options.device)
    options.temperature = options.temperature if options.temperature is not None else float(options.num_samples > 1)
    for name in ("limit", "num_samples", "max_new_tokens", "sample_batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if sum(map(bool, (options.model, options.compare, options.curves))) != 1 or len(options.compare or "AB") != 2:
        fail("choose one of --model NAME, --compare A B and --curves RUN ...")
    if options.task not in TASKS:
        fail(f"--task {options.task}: choose {', '.join(TASKS)}")
    try:
        if options.compare:
            lines = compare(*options.compare)
        elif options.curves:
            lines = draw_curves(options.curves, options.output or "curves.png")
        else:
            empg.check_device(options.device)
            check_output(options.output)
            empg.start_processes(options.device)
            lines = describe(evaluate(options), options.num_samples) | paper_scores(options.model, options.task)
            empg.dist.destroy_process_group()
    except ValueError as error:
        fail(error)
    say("\n".join(f"{name:<21} {text}" for name, text in lines.items()))


if __name__ == "__main__":
    main()
