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
    """All options. (`parse_options` fills in those that are None.)"""

    model: str = option(None, "Name of a model on the Hugging Face hub, or a directory, such as runs/NAME/model.")
    task: str = option("gsm8k", f"What to score it on: {', '.join(TASKS)}.")
    data: str | None = option(
        None, "Name of a dataset on the hub, or a directory with test.jsonl, instead of the task's own."
    )
    split: Literal["test", "train"] = option("test", "Split of the dataset.")
    limit: int | None = option(None, "Score only this many problems, the first ones. Default: all.")
    num_samples: int = option(1, "Number of responses to each problem.")
    temperature: float = option(None, "Temperature of sampling. Default: 0, which is greedy; 1 for several samples.")
    max_new_tokens: int = option(
        None, "Longest response, in tokens. Default: 1024, or what fits into the model's context."
    )
    seed: int = option(0, "Seed of sampling.")
    dtype: Literal["bfloat16", "float32"] = option(
        None, "Precision of computation. Default: bfloat16 on cuda, else float32."
    )
    output: str | None = option(
        None, "File for the responses (FILE.jsonl), which an interrupted command goes on with; or picture of --curves."
    )
    sample_batch: int = option(128, "Number of responses that a process samples at a time. Fewer take less memory.")
    device: Literal["cuda", "mps", "cpu"] = option(None, "Where to compute. Default: cuda if there is a GPU, else cpu.")
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


def write_results(file: Path, header: dict, rows: list[dict]) -> None:
    """Writes a file of responses anew. It is whole at any moment, even if the process is killed."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    unfinished.replace(file)


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


def evaluate(options: Options) -> list[dict]:
    """Samples responses to all problems, and grades them. What --output has already is not sampled again.

    Returns: a row for each response, those of the first problem first.
    Raises: ValueError if an option cannot work.
    """
    task = TASKS[options.task]
    G = options.num_samples
    problems = task.problems(options.data, options.split)[: options.limit]
    tokenizer, model = empg.load_model(options.model, getattr(torch, options.dtype))
    if RANK == 0:
        empg.check_model(options.model, tokenizer)
    empg.add_prompts(problems, task, tokenizer)
    room = empg.room_for_responses(problems, model)
    if options.max_new_tokens is None:
        options.max_new_tokens = int(min(1024, room))
    if room < max(1, options.max_new_tokens):
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: at most {room} fit after the prompts")
    model = model.to(options.device)

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
        write_results(file, header, rows)

    problems_at_a_time = max(1, options.sample_batch * WORLD_SIZE // G)
    for start in progress(range(len(rows) // G, len(problems), problems_at_a_time), "evaluating"):
        some = problems[start : start + problems_at_a_time]
        trajectories = empg.sample_trajectories(
            model,
            tokenizer,
            task,
            some,
            num_samples=G,
            max_new_tokens=options.max_new_tokens,
            sample_batch=options.sample_batch,
            temperature=options.temperature,
            # `sample_trajectories` adds the problem's number among these.
            seed=options.seed * 10**18 + start,
        )
        new_rows = []
        for i, trajectory in enumerate(trajectories):
            problem = some[i // G]
            text = trajectory["text"]
            row = {
                "index": start + i // G,
                "question": problem["question"],
                "type": problem.get("type"),
                "response": text,
                "answer": empg.last_boxed(text) if options.task == "math-hard" else empg.final_answer(text),
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
SAME_SETTING = {"seed", "output", "device", "save_every", "resume", "wandb", "sample_batch", "shard"}

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
    parser: Any = HfArgumentParser(Options, description=what_it_does, allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = fail
    options = Options(**vars(parser.parse_args(argv)))
    if options.device is None:
        options.device = empg.default_device()
    if options.dtype is None:
        options.dtype = empg.default_dtype(options.device)
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
            empg.check_device(options.device)
            check_output(options.output)
            empg.start_processes(options.device)
            rows = evaluate(options)
            report = describe(rows, options.num_samples) | paper_scores(options.model, options.task)
            empg.dist.destroy_process_group()
    except ValueError as error:
        fail(error)
    for name, text in report.items():
        say(f"{name:<21} {text}")


if __name__ == "__main__":
    main()
