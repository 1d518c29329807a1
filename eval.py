#!/usr/bin/env python3
"""Scores models, compares two scores, and draws the curves of runs of empg.py.

python eval.py --model DIR_OR_HUB_NAME --task gsm8k                 greedy accuracy on the test split
torchrun --nproc-per-node 4 eval.py --model ... --task math-hard    the same, shared among GPUs
python eval.py --model ... --task gsm8k --num-samples 16            mean@16, pass@k and maj@16
python eval.py --model ... --task gsm8k --output FILE.jsonl         keeps the responses; interrupted, it goes on
python eval.py --compare A.jsonl B.jsonl                            is B better than A by more than chance?
python eval.py --curves RUN_DIR [RUN_DIR ...] --output curves.png   reward, accuracy and length while training

*Greedy* means that the model takes the likeliest token each time. With --num-samples G it samples G responses to each
problem. Then the report has three scores: mean@G is the share of right responses; pass@k is the probability that at
least one of k responses is right; maj@G is the share of problems for which the commonest answer is right.
"""

import argparse
import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

import empg
from empg import RANK, TASKS, WORLD_SIZE, fail, option, say


@dataclass
class Options:
    """All options. (`parse_options` fills in those that are None.)"""

    model: str = option(None, "A model of the Hugging Face hub, or a directory, such as runs/NAME/model.")
    task: str = option("gsm8k", f"What to score it on: {', '.join(TASKS)}.")
    data: str | None = option(
        None, "Other data than the task's own: a dataset of the hub, or a directory with test.jsonl."
    )
    split: Literal["test", "train"] = option("test", "Split of the dataset.")
    limit: int | None = option(None, "Score only this many problems, the first ones. Default: all.")
    num_samples: int = option(1, "Number of responses to each problem.")
    temperature: float | None = option(
        None, "Temperature of sampling. Default: 0, which is greedy; 1 for several samples."
    )
    max_new_tokens: int | None = option(
        None, "Longest response, in tokens. Default: 1024, or what the model has room for."
    )
    seed: int = option(0, "Seed of sampling.")
    dtype: Literal["bfloat16", "float32"] = option(None, "Precision. Default: bfloat16 on cuda, else float32.")
    output: str | None = option(
        None, "File for the responses (FILE.jsonl), which an interrupted command goes on with; or picture of --curves."
    )
    sample_batch: int = option(128, "Number of responses that a process samples at a time. Fewer take less memory.")
    device: Literal["cuda", "mps", "cpu"] | None = option(None, "Default: cuda if there is a GPU, else cpu.")
    compare: list[str] | None = field(
        default=None, metadata={"help": "Compare two files of responses to the same problems."}
    )
    curves: list[str] | None = field(default=None, metadata={"help": "Draw the curves of runs: their directories."})


# The paper's scores: (EMPG, GRPO).
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "Qwen2.5-1.5B": {"gsm8k": (0.744, 0.739), "math-hard": (0.575, 0.568)},
    "Qwen2.5-7B": {"gsm8k": (0.888, 0.867), "math-hard": (0.742, 0.730)},
    "Qwen2.5-Math-7B": {"gsm8k": (0.918, 0.004), "math-hard": (0.794, 0.755)},
    "Qwen2.5-14B-Instruct": {"gsm8k": (0.952, 0.940), "math-hard": (0.808, 0.816)},
}

# ------------------------------------------------------------------------------------------
# What is right: finding the answer of a response, and comparing it
# ------------------------------------------------------------------------------------------


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
    is_cut = text.endswith(empg.CUT_MARK)
    if is_cut:
        # A number at the cut may not be complete.
        text = text.removesuffix(empg.CUT_MARK).rstrip("0123456789.,")
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

    The answer is a formula, or a solution as in datasets, with the formula in its last \boxed{} or behind a "####". If
    there is no such formula, that is a ValueError.

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

    boxed = last_boxed(answer)
    gold = clean(answer.rpartition("####")[2] if boxed is None else boxed)
    if not gold:
        raise ValueError(f"the answer {answer!r} is empty, or has nothing in its box or behind its ####")
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


# Task → a function of a response and the problem's answer, which returns 1.0 or 0.0. empg.py trains on these rewards.
SCORES = {
    "gsm8k": lambda response, answer: is_right(final_answer(response), answer),
    "math-hard": lambda response, answer: is_right(last_boxed(response), answer),
}


# ------------------------------------------------------------------------------------------
# The mathematics: pure functions
# ------------------------------------------------------------------------------------------

# 95 % of a normal distribution lie within this many standard deviations of its mean.
Z = 1.959963984540054


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, successes / total (Wilson 1927): (low, high).

    It is not of width 0 even if all or none succeed.
    """
    share = successes / total
    weight = 1 + Z**2 / total
    centre = (share + Z**2 / (2 * total)) / weight
    half_width = Z * math.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2) / weight
    # At the ends, rounding would miss 0 and 1 by a little.
    low = centre - half_width if successes > 0 else 0.0
    high = centre + half_width if successes < total else 1.0
    return low, high


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that k of n samples, drawn without replacement, include a correct one (Chen et al. 2021)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The commonest answer; of equally common ones, the first. None if there is no answer at all."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    return max(votes, key=lambda answer: votes[answer])


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """The two-sided p-value of McNemar's test (1947).

    Only problems that one of A and B gets right, and the other not, say which is better. If A and B were equally good,
    each of these would be decided by the toss of a coin. The p-value is the probability that coins give a result at
    least as one-sided as this one.
    """
    n = only_a + only_b
    fewer = min(only_a, only_b)
    one_sided = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    return min(1.0, 2 * one_sided)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The mean of b - a, and its 95 % interval: (mean, low, high). a and b are accuracies on the same problems.

    The interval is that of Agresti and Min (2005). It counts two more problems, which together have one difference of 0
    and half a difference each of 1 and -1. So it is not of width 0 even if all differences are equal.
    """
    differences = np.asarray(b, float) - np.asarray(a, float)
    n = len(differences) + 2
    centre = differences.sum() / n
    mean_square = (np.square(differences).sum() + 1) / n
    half_width = Z * math.sqrt(max(0.0, mean_square - centre**2) / n)
    return float(differences.mean()), float(max(-1.0, centre - half_width)), float(min(1.0, centre + half_width))


# ------------------------------------------------------------------------------------------
# Scoring a model
# ------------------------------------------------------------------------------------------


def read_results(file: str | Path) -> tuple[dict, list[dict]]:
    """The header and the rows of a file of responses, without what a kill has left incomplete.

    Raises: ValueError if it is some other file.
    """
    try:
        lines = Path(file).read_text().split("\n")
        # Behind the last end of a line there is nothing, or a line that was not finished.
        header, *rows = [json.loads(line) for line in lines[:-1]]
        complete = len(rows) - len(rows) % header["num_samples"]
        return header, rows[:complete]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not a results file of eval.py; name another file ({error!r})") from error


def check_output(output: str | None) -> None:
    """Raises ValueError if --output cannot be written, before an hour of work."""
    if output is None:
        return
    if Path(output).is_dir():
        raise ValueError(f"--output {output}: is a directory; name a file")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be made ({error.strerror}); name another file") from error


def prepare(options: Options) -> tuple:
    """The problems, with prompts, the tokenizer and the model. Raises ValueError if an option cannot work."""
    task = TASKS[options.task]
    problems = task.problems(options.data, options.split)[: options.limit]
    tokenizer, model = empg.load_model(options.model, getattr(torch, options.dtype))
    if RANK == 0:
        empg.check_model(options.model)
    empg.add_prompts(problems, task, tokenizer)
    room = empg.room_for_responses(problems, model)
    if options.max_new_tokens is None:
        options.max_new_tokens = int(min(1024, room))
    if room < max(1, options.max_new_tokens):
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: at most {room} fit after the prompts")
    return problems, tokenizer, model.to(options.device)


def evaluate(options: Options, problems: list[dict], tokenizer, model) -> list[dict]:
    """Samples responses to all problems, and grades them. What --output has already is not sampled again.

    Returns: a row for each response, those of the first problem first.
    Raises: ValueError if --output has results of other options.
    """
    task = TASKS[options.task]
    G = options.num_samples
    # The first line of a results file has the options that say what was computed.
    names = ["model", "task", "data", "split", "limit", "num_samples", "temperature", "max_new_tokens", "seed", "dtype"]
    header: dict[str, Any] = {name: getattr(options, name) for name in names}
    header["problems"] = len(problems)
    file = None if options.output is None else Path(options.output)

    # The first process reads what an interrupted command has left, and tells the others.
    found: list[tuple[dict, list[dict]]] = []
    if RANK == 0:
        found = [read_results(file) if file is not None and file.is_file() else (header, [])]
    [(header_of_file, rows)] = empg.gather(found)
    if header_of_file != header:
        raise ValueError(
            f"--output {file}: has results of {header_of_file}; repeat these options, or name another file"
        )
    if file is not None and RANK == 0:
        empg.write_atomically(file, "".join(json.dumps(row) + "\n" for row in (header, *rows)))

    problems_at_a_time = max(1, options.sample_batch * WORLD_SIZE // G)
    starts = range(len(rows) // G, len(problems), problems_at_a_time)
    for start in tqdm(starts, "evaluating", leave=False, delay=2):
        some = problems[start : start + problems_at_a_time]
        # `sample_trajectories` adds the problem's number among these to the seed.
        seed = options.seed * 10**18 + start
        trajectories = empg.sample_trajectories(model, tokenizer, task, some, options, seed)
        new_rows = []
        for i, trajectory in enumerate(trajectories):
            problem = some[i // G]
            text = trajectory["text"]
            row = {
                "index": start + i // G,
                "question": problem["question"],
                "type": problem.get("type"),
                "response": text,
                "answer": last_boxed(text) if options.task == "math-hard" else final_answer(text),
                "correct": trajectory["reward"] == 1,
                "tokens": len(trajectory["response"]),
                "cut": trajectory["cut"],
            }
            new_rows.append(row)
        rows += new_rows
        if file is not None and RANK == 0:
            with file.open("a") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in new_rows))
    return rows


def describe(rows: list[dict], G: int) -> dict[str, str]:
    """The report: name → text, from rows with G responses to each problem."""
    groups = [rows[start : start + G] for start in range(0, len(rows), G)]
    correct = np.array([[row["correct"] for row in group] for group in groups], float)  # (problems, G)
    tokens = [row["tokens"] for row in rows]
    report = {}

    # The responses to a problem are alike. So for the interval only the number of problems counts.
    low, high = wilson_interval(correct.mean(axis=1).sum(), len(correct))
    name = f"mean@{G}" if G > 1 else "accuracy"
    report[name] = f"{correct.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}, of {len(correct)} problems"

    if G > 1:
        powers_of_two = [2**i for i in range(G.bit_length())]
        scores = []
        for k in sorted({*powers_of_two, G}):
            score = np.mean([pass_at_k(G, int(right), k) for right in correct.sum(axis=1)])
            scores.append(f"{score:.3f} at k = {k}")
        report["pass@k"] = ", ".join(scores)

        won = []
        for group in groups:
            vote = majority_vote([row["answer"] for row in group])
            won.append(any(row["correct"] for row in group if row["answer"] == vote))
        report[f"maj@{G}"] = f"{np.mean(won):.3f}"

    # MATH has subjects.
    types = np.array([group[0]["type"] or "" for group in groups])
    for subject in sorted({*types} - {""}):
        has_type = types == subject
        report[f"  {subject}"] = f"{correct[has_type].mean():.3f} of {has_type.sum()} problems"

    report["response tokens"] = f"{np.mean(tokens):.1f} mean, {np.median(tokens):g} median"
    report["cut at the limit"] = f"{np.mean([row['cut'] for row in rows]):.1%}"
    report["without an answer"] = f"{np.mean([row['answer'] is None for row in rows]):.1%}"
    return report


def paper_scores(model: str, task: str) -> dict[str, str]:
    """What the paper reports for a model of the hub, or for the one that a run began with. Else, nothing."""
    name = model
    config_of_run = Path(model).parent / "config.json"
    if config_of_run.exists():
        name = json.loads(config_of_run.read_text()).get("model", "")
    scores = PAPER.get(Path(name).name, {}).get(task)
    if scores is None:
        return {}
    return {"in the paper": "EMPG {:.3f}, GRPO {:.3f}".format(*scores)}


# ------------------------------------------------------------------------------------------
# Comparing two results
# ------------------------------------------------------------------------------------------


def compare(file_a: str, file_b: str) -> dict[str, str]:
    """Is B better than A on the same problems?

    With several samples, a problem's accuracy is their mean. B is better on a problem if its accuracy is higher there.
    """
    questions = []
    accuracies = []
    mean_tokens = []
    for file in (file_a, file_b):
        header, rows = read_results(file)
        G = header["num_samples"]
        questions.append([row["question"] for row in rows[::G]])
        correct = np.array([row["correct"] for row in rows], float)
        accuracies.append(correct.reshape(-1, G).mean(axis=1))
        mean_tokens.append(np.mean([row["tokens"] for row in rows]))
    if questions[0] != questions[1]:
        raise ValueError("--compare: the files are not of the same problems, or not complete")

    a, b = accuracies
    only_a = int((a > b).sum())
    only_b = int((b > a).sum())
    p = mcnemar_exact(only_a, only_b)
    return {
        "A": f"{file_a}: {a.mean():.3f}",
        "B": f"{file_b}: {b.mean():.3f}, of {len(b)} problems",
        "B - A": "{:+.3f}, 95 % interval {:+.3f} to {:+.3f}".format(*paired_difference(a, b)),
        "McNemar's exact test": f"p = {p:.2g}; A better on {only_a}, B on {only_b}",
        "response tokens": "{:.1f} and {:.1f}".format(*mean_tokens),
    }


# ------------------------------------------------------------------------------------------
# Drawing the curves of runs
# ------------------------------------------------------------------------------------------

# Runs that differ in nothing but these options are seeds of one setting.
SAME_SETTING = {"seed", "output", "device", "save_every", "resume", "sample_batch", "shard"}

PANELS = {"reward": "reward, sampled", "eval_accuracy": "held-out accuracy", "response_tokens": "response tokens"}

# These can be told apart by the colour-blind, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")


def read_runs(runs: list[str]) -> dict[str, list[list[dict]]]:
    """Label → for each run of this setting, the rows of its metrics.jsonl.

    Runs are of one setting if they have the same options, but for SAME_SETTING, and if their names are the same but for
    a last number.
    """
    settings: dict[tuple[str, str], list] = {}
    for run in runs:
        try:
            options = json.loads(Path(run, "config.json").read_text())
            rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: is not the directory of a run ({error})") from error
        name = Path(run).name
        stem = re.sub(r"\W*\d+$", "", name)
        same = json.dumps({key: value for key, value in options.items() if key not in SAME_SETTING})
        settings.setdefault((stem, same), []).append((name, rows))

    labelled = {}
    for (stem, _), seeds in settings.items():
        label = f"{stem}, {len(seeds)} seeds" if len(seeds) > 1 else seeds[0][0]
        labelled[label] = [rows for _, rows in seeds]
    return labelled


def draw_curves(runs: list[str], picture: str) -> dict[str, str]:
    """Draws the paper's figures 2 to 8 for these runs: for each setting, the mean of its seeds and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    report = {}
    for i, (label, seeds) in enumerate(read_runs(runs).items()):
        colour = COLOURS[i % len(COLOURS)]
        for axis, name in zip(axes, PANELS):
            by_step = [{row["step"]: row[name] for row in rows if row.get(name) is not None} for rows in seeds]
            # Draw only the iterations that all seeds have.
            steps = sorted(set.intersection(*map(set, by_step)))
            values = np.array([[found[step] for step in steps] for found in by_step])  # (seeds, steps)
            axis.plot(
                steps, values.mean(axis=0), label=label, linewidth=1.4, color=colour, linestyle=LINES[i % len(LINES)]
            )
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.set(ylabel=PANELS[name], xlabel="iteration")
            if name == "eval_accuracy" and steps:
                last = values[:, -1]
                deviation = last.std(ddof=1) if len(seeds) > 1 else 0.0
                report[label] = f"accuracy {last.mean():.3f} ± {deviation:.3f} after {steps[-1]} iterations"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=200)
    report["picture"] = picture
    return report


# ------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------


def parse_options(argv) -> Options:
    """The options of a command line, with defaults for what it does not say. Ends with a line if one cannot work."""
    what_it_does = (__doc__ or "").splitlines()[0]
    how = {"description": what_it_does, "formatter_class": argparse.HelpFormatter, "allow_abbrev": False}
    parser: Any = HfArgumentParser(Options, **how)  # type: ignore[arg-type]
    parser.error = fail
    options = Options(**vars(parser.parse_args(argv)))
    options.device, precision = empg.device_and_precision(options.device)
    options.dtype = options.dtype or precision
    if options.temperature is None:
        options.temperature = 1.0 if options.num_samples > 1 else 0.0

    for name in ("limit", "num_samples", "max_new_tokens", "sample_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value}: must be at least 1")
    things_to_do = [bool(options.model), bool(options.compare), bool(options.curves)]
    if sum(things_to_do) != 1 or (options.compare and len(options.compare) != 2):
        fail("choose one of --model NAME, --compare A B and --curves RUN ...")
    if options.task not in TASKS:
        fail(f"--task {options.task}: choose {', '.join(TASKS)}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Runs the command line, or `argv`."""
    options = parse_options(argv)
    try:
        if options.compare:
            report = compare(*options.compare)
        elif options.curves:
            report = draw_curves(options.curves, options.output or "curves.png")
        else:
            check_output(options.output)
            made_group = empg.start_processes(options.device)
            errors = []
            try:
                prepared = prepare(options)
            except ValueError as error:
                errors.append(str(error))
            empg.fail_together(errors, made_group)
            rows = evaluate(options, *prepared)
            report = describe(rows, options.num_samples) | paper_scores(options.model, options.task)
            if made_group:
                empg.dist.destroy_process_group()
    except ValueError as error:
        fail(error)
    for name, text in report.items():
        say(f"{name:<21} {text}")


if __name__ == "__main__":
    sys.modules["eval"] = sys.modules["__main__"]  # empg.py imports eval: let it find this copy
    main()
