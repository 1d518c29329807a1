#!/usr/bin/env python3
"""Turn checkpoints and runs of empg.py into the numbers and pictures of the paper.

python eval.py --model DIR_OR_HUB_NAME --task gsm8k                 greedy pass@1 on the test split
torchrun --nproc-per-node 4 eval.py --model ... --task math-hard    the same, shared among GPUs
python eval.py --model ... --task gsm8k --num-samples 16            mean@16, pass@k and maj@16
python eval.py --model ... --task gsm8k --output FILE.jsonl         keeps the responses; interrupted, it goes on
python eval.py --compare A.jsonl B.jsonl                            is B better than A by more than chance?
python eval.py --curves RUN_DIR [RUN_DIR ...] --output curves.png   reward, accuracy and length while training
python eval.py --gradients MODEL_DIR --output gradients.png         what baseline and importance weights do to the gradient
python eval.py --behaviours FILE.jsonl                              decomposition, verification, backtracking
"""

import contextlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import empg
from empg import RANK, TASKS, WORLD_SIZE, OptionParser, fail, first_line, flag, gather, option, progress, say


@dataclass
class Options:
    """Every option; --compare, --curves, --gradients and --behaviours FILE take no other but --json or --output."""

    model: str = option(None, "a hub name or a local directory, as runs/NAME/model")
    task: str = option(None, ", ".join(TASKS))
    data: str | None = option(None, "local directory or hub name of a dataset with the task's columns")
    split: str = option("test", "test or train")
    limit: int | None = option(None, "only so many problems, the first ones")
    prompt_template: str | None = option(None, "replaces the chat template; has {question} in it")
    num_samples: int = option(1, "responses to each problem")
    temperature: float | None = option(None, "0 is greedy; by default 0 for one sample, 1 for several")
    max_new_tokens: int = option(None, "token limit of a response; by default 1024, or what fits")
    seed: int = option(0, "of sampling")
    dtype: str = option(None, "bfloat16 or float32; by default bfloat16 on GPUs that have it")
    batch_size: int = option(128, "responses that a process samples at a time: bounds the memory")
    device: str = option(None, "cuda, mps or cpu; by default the best that is there")
    output: str | None = option(None, "FILE.jsonl that gets every response; the picture of a mode that draws")
    json: bool = option(False, "print the summary as one JSON object, all else to standard error")
    compare: list[str] | None = field(default=None, metadata={"help": "two results files of the same problems"})
    curves: list[str] | None = field(default=None, metadata={"help": "directories of runs: draws their metrics"})
    gradients: str | None = option(None, "a model for the task sums, such as runs/sums-base")
    behaviours: str | None = field(
        default=None, metadata={"help": "a results file, or else this evaluation", "nargs": "?", "const": ""}
    )


# What decides the responses: a results file goes on only if it is the same. How work is batched and shared does not.
DECISIVE: tuple[str, ...] = ("model", "task", "data", "split", "limit", "prompt_template", "num_samples", "temperature")
DECISIVE += ("max_new_tokens", "seed", "dtype")
COLUMNS: dict[str, Any] = {
    "index": int,
    "sample": int,
    "question": str,
    "gold": str,
    "response": str,
    "extracted": str | None,
}
COLUMNS |= {"correct": bool, "tokens": int, "cut": bool}

# The paper's models, by (hidden size, layers, context), and their EMPG and GRPO scores.
PAPER = {
    "Qwen2.5-1.5B": ((1536, 28, 131072), {"gsm8k": (0.744, 0.739), "math-hard": (0.575, 0.568)}),
    "Qwen2.5-7B": ((3584, 28, 131072), {"gsm8k": (0.888, 0.867), "math-hard": (0.742, 0.730)}),
    "Qwen2.5-Math-7B": ((3584, 28, 4096), {"gsm8k": (0.918, 0.004), "math-hard": (0.794, 0.755)}),
    "Qwen2.5-14B-Instruct": ((5120, 48, 32768), {"gsm8k": (0.952, 0.940), "math-hard": (0.808, 0.816)}),
}

# The behaviours of the paper's figure 14, each by the phrases, as regular expressions, that are taken for it.
BEHAVIOURS = {
    "sub-problem decomposition": r"step 1\b|first(ly)?,|first,? (we|i|let's) |we (first )?need to (find|determine)|"
    r"break (it|this|the \w+) (down|into)|let's (start by|first|break)|sub-?problem|case 1\b|"
    r"(split|divide) (it|this|the problem) into|(consider|into) (two |three |the )?cases",
    "self-verification": r"(let's|let me|we can|i will|i'll|to) (check|verify|confirm)|double-?check|sanity check|"
    r"(check|verify)(ing)? (that|our|my|the|this) (answer|result|work|solution)|(substitut\w+|plug\w*) .{0,40}back\b",
    "backtracking": r"wait[,.!]|hmm|actually,|on second thought|(that|this)('s| is) (not right|wrong|incorrect)|"
    r"(made|is|was) (a|an) (mistake|error)|start over|try (again|another|a different)|another approach|"
    r"(let's|let me) (go back|correct|re-?\w+)|re-?(consider|evaluat|examin|calculat)",
}

# Okabe and Ito's colours, which the colour-blind can tell apart, less yellow, which is faint on paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
BASELINES = ("loo", "group", "batch", "none")
PANELS = {"reward": "reward, sampled", "eval_accuracy": "held-out accuracy, greedy"}
PANELS |= {"response_tokens": "response tokens, sampled", "eval_response_tokens": "response tokens, held-out"}
# Runs that differ in nothing else are seeds of one setting.
NO_SETTING = {"seed", "output", "versions", "processes", "device", "eval_every", "report_to", *empg.CHANGEABLE} - {
    "steps"
}


# -------- The mathematics: pure functions -----------------------------------------------------------------------------

Z = 1.959963984540054  # 95 % of the normal distribution lie within ±Z


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """95 % score interval of the share successes/total (Wilson 1927). It has a width even where all or none succeed."""
    share, weight = successes / total, 1 + Z**2 / total
    centre = (share + Z**2 / (2 * total)) / weight
    half = Z * math.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2) / weight
    return centre - half if successes > 0 else 0.0, centre + half if successes < total else 1.0


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a correct one: unbiased (Chen et al. 2021)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The commonest answer, of equally common ones the earliest; None if there is no answer at all."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=lambda answer: votes[answer]) if votes else None


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value that A and B are equally good (McNemar 1947, exact): then a fair coin decides each problem that
    only one of them gets right."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def paired_difference(a: Sequence[float], b: Sequence[float], bound: float = 0.0) -> tuple[float, float, float]:
    """Mean of b − a and its 95 % interval, (difference, low, high), from (P,) values on the same P problems.

    Where |b − a| has a bound, 1 for accuracies, the interval counts two more problems, one of difference 0 and half a
    one each of ±bound: it has a width even if A and B never differ (Agresti and Min 2005).
    """
    d = np.asarray(b, float) - np.asarray(a, float)
    n, limit = len(d) + 2 * (bound > 0), bound or math.inf
    centre = float(d.sum()) / n
    half = Z * math.sqrt(max(0.0, float(d @ d + bound**2) / n - centre**2) / n)
    return float(d.mean()), max(-limit, centre - half), min(limit, centre + half)


# -------- Files -------------------------------------------------------------------------------------------------------


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def read_rows(option: str, path: str | Path) -> tuple[list[dict], int]:
    """(objects on the lines of a file, bytes they take). What follows the last newline was cut short by a kill."""
    try:
        content = Path(path).read_bytes()
        *lines, rest = content.split(b"\n")
        rows = [json.loads(line) for line in lines]
        require(all(isinstance(row, dict) for row in rows), "a line of it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{option} {path}: cannot be read ({first_line(error)}); name another file") from error
    return rows, len(content) - len(rest)


def read_results(option: str, path: str | Path, complete: bool = True) -> tuple[dict, list[dict], int]:
    """(first row, the others by problem and sample, bytes they take) of a results file.

    Raises:
        ValueError: it cannot be read, is something else or, where it is to be complete, lacks responses.
    """
    rows, size = read_rows(option, path)
    header, rows = (rows or [{}])[0], rows[1:]
    try:
        every = {*np.ndindex(header["problems"], header["num_samples"])}
        rows.sort(key=place)
        known = all(name in header for name in DECISIVE) and len(every.intersection(map(place, rows))) == len(rows)
        known = known and all(isinstance(row[name], kind) for row in rows for name, kind in COLUMNS.items())
    except (KeyError, TypeError, ValueError):
        known = False
    require(known, f"{option} {path}: is not a results file of eval.py; name another file")
    lacks = f"{option} {path}: holds {len(rows)} of {len(every)} responses; the command that wrote it goes on with it"
    require(not complete or 0 < len(rows) == len(every), lacks)
    return header, rows, size


def place(row: dict) -> tuple[int, int]:
    return row["index"], row["sample"]


def resume(options: Options) -> tuple[dict, list[dict], int]:
    """What an interrupted evaluation left in --output, as `read_results` returns it; nothing if that is yet to be written.

    Raises:
        ValueError: it cannot be written, or holds something else.
    """
    if options.output is None:
        return {}, [], 0
    path = Path(options.output)
    fresh = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if fresh:  # if something else is wrong, no empty file stays behind
            path.unlink()
    except OSError as error:
        raise ValueError(f"--output {path}: cannot be written ({error.strerror}); name another file") from error
    if fresh or path.stat().st_size == 0:
        return {}, [], 0
    header, rows, size = read_results("--output", path, complete=False)
    options.max_new_tokens = options.max_new_tokens or header["max_new_tokens"]
    other = [f"{flag(option)} {header[option]}" for option in DECISIVE if header[option] != getattr(options, option)]
    require(not other, f"--output {path}: was written with {', '.join(other)}; use that again or name another file")
    return header, rows, size


# -------- Evaluation --------------------------------------------------------------------------------------------------


def load(options: Options) -> tuple:
    """(model, tokenizer, problems with their `prompt`, what `resume` returns). Whatever can be wrong shows here.

    Raises:
        ValueError: an option cannot work.
    """
    empg.start_processes(options)
    header, rows, size = gather([resume(options)] if RANK == 0 else [])[0]
    task = TASKS[options.task]
    problems = task.problems(options.data, options.split)[: options.limit]
    questions = [problem["question"] for problem in problems]
    same = header.get("problems", len(problems)) == len(problems)
    same = same and all(row["question"] == questions[row["index"]] for row in rows)
    require(same, f"--output {options.output}: was written for other problems; name another file")
    tokenizer, context = empg.load_tokenizer(options.model)
    for problem, ids in zip(problems, empg.encode_prompts(tokenizer, task, questions, options.prompt_template)):
        problem["prompt"] = ids
    wanted = header.get("max_new_tokens", options.max_new_tokens)
    options.max_new_tokens = empg.response_limit(wanted, problems, context)
    model = empg.load_policy(options.model, tokenizer).to(options.device)  # type: ignore[arg-type]
    finite = all(parameter.isfinite().all() for parameter in model.parameters())
    require(finite, f"--model {options.model}: has weights that are not finite; take an earlier checkpoint")
    return empg.freeze(model, getattr(torch, options.dtype)), tokenizer, problems, (header, rows, size)


def respond(options: Options, model, tokenizer, problems: list[dict], batch: Sequence[int]) -> list[dict]:
    """Rows of the results file for the problems of a batch."""
    if not batch:
        return []
    task, limits = TASKS[options.task], empg.sampling_limits(tokenizer, model, options.max_new_tokens)
    seeds = [(options.seed << 64) + i for i in batch]  # those of an iteration 0, which no training has
    how = {"temperature": options.temperature, "seeds": seeds, **limits}
    responses = empg.sample(model, [problems[i]["prompt"] for i in batch], options.num_samples, **how)
    rows = []
    for n, text in enumerate(tokenizer.batch_decode(responses, skip_special_tokens=True)):
        index, sample = batch[n // options.num_samples], n % options.num_samples
        question, answer, kind = problems[index]["question"], problems[index]["answer"], problems[index].get("type")
        row = {"index": index, "sample": sample, "question": question, "gold": task.extract(answer) or answer}
        row |= {"response": text, "extracted": task.extract(text), "correct": task.reward(text, answer) == 1}
        row |= {"tokens": len(responses[n]), "cut": responses[n][-1] not in limits["eos_token_id"]}
        rows.append(row if kind is None else {**row, "type": str(kind)})
    return rows


def evaluate(options: Options, model, tokenizer, problems: list[dict], left: tuple[dict, list[dict], int]) -> dict:
    """Respond to every problem, but for the rows that are left of an interrupted evaluation; returns the summary.

    A batch has the same problems however many processes share the batches and whatever is done already.
    """
    (_, rows, size), G = left, options.num_samples
    done, before = {*map(place, rows)}, sum(row["tokens"] for row in rows)
    # Prompts of similar length share a batch: little padding. In random order the running accuracy tells the final one.
    order, count = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt"])), options.batch_size // G or 1
    batches = [order[start : start + count] for start in range(0, len(order), count)]
    batches = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
    batches = [batch for batch in batches if any((i, g) not in done for i in batch for g in range(G))]
    clock = time.perf_counter()
    with open(options.output, "a") if options.output and RANK == 0 else contextlib.nullcontext() as file:
        if file:
            file.truncate(size)
            header = {name: getattr(options, name) for name in DECISIVE} | {"problems": len(problems)}
            file.write("" if size else json.dumps({**header, "versions": empg.library_versions()}) + "\n")
        bar = progress(None, "evaluating", total=len(problems) * G, initial=len(rows), unit=" responses")
        for first in range(0, len(batches), WORLD_SIZE):
            mine = batches[first + RANK] if first + RANK < len(batches) else []
            new = [row for row in gather(respond(options, model, tokenizer, problems, mine)) if place(row) not in done]
            rows += new
            if file:
                file.writelines(json.dumps(row) + "\n" for row in new)
                file.flush()
            bar.set_postfix_str(f"accuracy {np.mean([row['correct'] for row in rows]):.3f}", refresh=False)
            bar.update(len(new))
        bar.close()
    seconds = time.perf_counter() - clock
    rows.sort(key=place)
    summary = {name: getattr(options, name) for name in DECISIVE} | summarise(rows, G)
    summary |= {"responses_from_file": len(done), "seconds": seconds}
    summary["tokens_per_second"] = (sum(row["tokens"] for row in rows) - before) / seconds
    if options.split == "test" and (scores := paper_scores(options.model, model.config, options.task)):
        summary["paper"] = scores
    return summary | ({} if options.behaviours is None else {"behaviours": find_behaviours(rows)})


def per_problem(rows: list[dict], column: str, G: int) -> np.ndarray:
    """A column of complete, sorted rows: (problems, G)."""
    return np.array([row[column] for row in rows], float).reshape(-1, G)


def summarise(rows: list[dict], G: int) -> dict:
    """Scores of complete, sorted rows with G samples per problem.

    The interval counts problems, as the samples of one problem are alike; with several it is wider than it need be.
    """
    correct, tokens = per_problem(rows, "correct", G), per_problem(rows, "tokens", G)
    summary = {"problems": len(correct), "accuracy": correct.mean()}
    summary["interval"] = wilson_interval(correct.mean(1).sum(), len(correct))
    summary |= {"mean_tokens": tokens.mean(), "median_tokens": float(np.median(tokens))}
    summary["cut"] = per_problem(rows, "cut", G).mean()
    summary["no_answer"] = sum(row["extracted"] is None for row in rows) / len(rows)
    if G > 1:
        right = correct.sum(1).astype(int).tolist()
        summary["pass_at_k"] = {k: sum(pass_at_k(G, c, k) for c in right) / len(right) for k in range(1, G + 1)}
        groups = [rows[start : start + G] for start in range(0, len(rows), G)]
        votes = [majority_vote([row["extracted"] for row in group]) for group in groups]
        won = [any(r["correct"] and r["extracted"] == vote for r in group) for group, vote in zip(groups, votes)]
        summary["majority"] = sum(won) / len(won)
    if "type" in rows[0]:
        kinds = np.array([row.get("type", "") for row in rows[::G]])
        chosen = {kind: correct[kinds == kind] for kind in sorted({*kinds.tolist()})}
        summary["subjects"] = {kind: {"problems": len(c), "accuracy": c.mean()} for kind, c in chosen.items()}
    return summary


def paper_scores(name: str, config, task: str) -> dict | None:
    """The paper's scores of this model: of a hub model by its name, of a local directory by its name or else its shape."""
    known: str | None = name.rstrip("/").rpartition("/")[2]
    if known not in PAPER:
        shape = tuple(getattr(config, k, None) for k in ("hidden_size", "num_hidden_layers", "max_position_embeddings"))
        known = next((model for model in PAPER if PAPER[model][0] == shape and Path(name).is_dir()), None)
    if known is None or task not in PAPER[known][1]:
        return None
    return {"model": known, **dict(zip(("empg", "grpo"), PAPER[known][1][task]))}


def table(title: str, lines: dict[str, str]) -> str:
    return "\n".join([title, *(f"  {name:<24}  {text}" for name, text in lines.items())])


def describe(s: dict) -> str:
    """The report of an evaluation's summary."""
    G, (low, high) = s["num_samples"], s["interval"]
    how = "greedy" if s["temperature"] == 0 else f"sampled at temperature {s['temperature']:g}"
    lines = {f"mean@{G}" if G > 1 else "accuracy": f"{s['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}"}
    if G > 1:
        shown = {k: share for k, share in s["pass_at_k"].items() if k & (k - 1) == 0 or k == G}
        lines["pass@k"] = ", ".join(f"{share:.3f} at k = {k}" for k, share in shown.items())
        lines[f"maj@{G}"] = f"{s['majority']:.3f}"
    for kind, subject in s.get("subjects", {}).items():
        lines[f"  {kind}"] = f"{subject['accuracy']:.3f} of {subject['problems']} problems"
    if paper := s.get("paper"):
        failed = " (failed to learn)" * (paper["grpo"] < 0.01)
        lines["in the paper"] = f"EMPG {paper['empg']:.3f}, GRPO {paper['grpo']:.3f}{failed}, from {paper['model']}"
    lines["response tokens"] = f"{s['mean_tokens']:.1f} mean, {s['median_tokens']:g} median"
    lines["cut at the limit"] = f"{s['cut']:.1%}, at {s['max_new_tokens']} tokens"
    lines["without an answer"] = f"{s['no_answer']:.1%}"
    lines["time"] = f"{s['seconds']:.1f} s, {s['tokens_per_second']:.0f} tokens per second"
    lines["time"] += f", besides {s['responses_from_file']} responses from the file" * bool(s["responses_from_file"])
    text = table(f"{s['model']} on {s['problems']} {s['split']} problems of {s['task']}, {how}", lines)
    return f"{text}\n{describe_behaviours(s['behaviours'])}" if "behaviours" in s else text


# -------- Comparison, behaviours, curves ------------------------------------------------------------------------------


def compare(files: list[str]) -> dict:
    """Is B better than A on the same problems? Of several samples the mean counts, and the better one is right more often."""
    headers, problems, correct, tokens = [], [], [], []
    for path in files:
        header, rows, _ = read_results("--compare", path)
        G = header["num_samples"]
        headers.append(header)
        problems.append((header["task"], [(row["index"], row["question"], row["gold"]) for row in rows[::G]]))
        correct.append(per_problem(rows, "correct", G).mean(1))
        tokens.append(per_problem(rows, "tokens", G).mean(1))
    require(
        problems[0] == problems[1], "--compare: the files are of different problems; evaluate both on the same ones"
    )
    only_a, only_b = (np.flatnonzero(x > y).tolist() for x, y in (correct, correct[::-1]))
    options = {name: [h[name] for h in headers] for name in DECISIVE if headers[0][name] != headers[1][name]}
    summary = {"files": files, "options": options, "problems": len(correct[0])}
    summary["num_samples"] = [header["num_samples"] for header in headers]
    summary |= {
        "accuracy": [c.mean() for c in correct],
        "difference": paired_difference(correct[0], correct[1], bound=1),
    }
    summary |= {"only_a": only_a, "only_b": only_b, "p_value": mcnemar_exact(len(only_a), len(only_b))}
    return summary | {"mean_tokens": [t.mean() for t in tokens], "tokens_difference": paired_difference(*tokens)}


def describe_comparison(s: dict) -> str:
    title = f"A = {s['files'][0]}, B = {s['files'][1]}: {s['problems']} problems"
    better, longer = "{:+.3f}, 95 % interval {:+.3f} to {:+.3f}", "{:+.1f}, 95 % interval {:+.1f} to {:+.1f}"
    lines = {"accuracy of A and B": "{:.3f} and {:.3f}".format(*s["accuracy"])}
    lines["B − A"] = better.format(*s["difference"])
    alone = "alone right" if s["num_samples"] == [1, 1] else "more often right"
    alone = f"A {alone} on {len(s['only_a'])}, B on {len(s['only_b'])}"
    lines["McNemar's exact test"] = f"p = {s['p_value']:.2g}; {alone}"
    lines["response tokens"] = "{:.1f} and {:.1f}".format(*s["mean_tokens"])
    lines["B − A, tokens"] = longer.format(*s["tokens_difference"])
    return table(title, lines | {flag(name): "{} and {}".format(*values) for name, values in s["options"].items()})


def find_behaviours(rows: list[dict]) -> dict:
    """How many responses show each of BEHAVIOURS, and the surroundings of the phrase in the first three."""
    found = {}
    for name, phrases in BEHAVIOURS.items():
        pattern = re.compile(rf"\b({phrases})", re.IGNORECASE)
        hits = [(row, match) for row in rows if (match := pattern.search(row["response"].replace("’", "'")))]
        around = [row["response"][max(0, match.start() - 50) : match.end() + 50] for row, match in hits[:3]]
        examples = [{"index": row["index"], "text": text} for (row, _), text in zip(hits, around)]
        found[name] = {"responses": len(hits), "share": len(hits) / len(rows), "examples": examples}
    return found


def describe_behaviours(found: dict) -> str:
    lines = {}
    for name, behaviour in found.items():
        examples = (f"\n    problem {example['index']}: {example['text']!r}" for example in behaviour["examples"])
        lines[f"{name}  "] = f"{behaviour['share']:.1%}, {behaviour['responses']} responses{''.join(examples)}"
    return table("Behaviours by their phrases: a proxy, as either may stand without the other", lines)


def read_run(run: str) -> tuple[dict, dict[str, dict[int, float]]]:
    """(settings, metric → {iteration: value}) of a run. A value that was not finite is left out."""
    try:
        settings = dict(json.loads((Path(run) / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--curves {run}: has no config.json to be read; name the directory of a run") from error
    metrics: dict[str, dict[int, float]] = {name: {} for name in (*PANELS, "ess")}
    for row in read_rows("--curves", Path(run) / "metrics.jsonl")[0]:
        for name, values in metrics.items():
            if isinstance(row.get("step"), int) and isinstance(row.get(name), int | float) and math.isfinite(row[name]):
                values[row["step"]] = row[name]
    require(any(metrics.values()), f"--curves {run}: its metrics.jsonl holds no metrics yet; leave the run out")
    return {name: value for name, value in settings.items() if name not in NO_SETTING}, metrics


def draw_curves(runs: list[str], picture: str) -> None:
    """The paper's figures 2 to 8. Seeds of one setting are drawn as their mean, in a band from the lowest to the highest."""
    require(len({Path(run).resolve() for run in runs}) == len(runs), "--curves: names a run twice; name it once")
    configs: list[dict] = []
    groups: list[list] = []
    for run in runs:
        settings, metrics = read_run(run)
        if settings not in configs:
            configs.append(settings)
            groups.append([])
        groups[configs.index(settings)].append((run, metrics))
    keys = [key for key in configs[0] if any(config.get(key) != configs[0][key] for config in configs)] or ["task"]

    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(7, 5), layout="constrained", sharex=True, sharey="row")
    lines: dict[str, str] = {}
    for i, (config, seeds) in enumerate(zip(configs, groups)):
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 1.4}
        several = ", ".join(f"{key} {config.get(key)}" for key in keys) + f": {len(seeds)} seeds"
        label = several if len(seeds) > 1 else Path(seeds[0][0]).resolve().name
        lines[label] = describe_run([metrics for _, metrics in seeds])
        for axis, name in zip(axes.flat, PANELS):
            steps = sorted(set.intersection(*(set(metrics[name]) for _, metrics in seeds)))
            values = np.array([[metrics[name][step] for step in steps] for _, metrics in seeds])
            axis.plot(
                steps,
                values.mean(0),
                marker="o" if name.startswith("eval") else None,
                markersize=3,
                label=label,
                **look,
            )
            if len(seeds) > 1:
                axis.fill_between(steps, values.min(0), values.max(0), color=look["color"], alpha=0.25, linewidth=0)
    for axis, name in zip(axes.flat, PANELS):
        axis.set(ylabel=PANELS[name], xlabel="iteration" if axis in axes[1] else "")
        low, high = axis.get_ylim()
        axis.set_ylim(*((0, 1.02) if axis in axes[0] and low > -0.1 and high < 1.1 else ()))
        axis.tick_params(labelleft=True)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_picture(figure, picture)
    say(table("Accuracy, held-out; response tokens, sampled; mean ± standard deviation of the seeds", lines))


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over seeds; of one seed, its value."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def describe_run(seeds: list[dict[str, dict[int, float]]]) -> str:
    """Accuracy after a sixth, a third and all of the iterations, and length and lowest effective sample size."""

    accuracies = [[metrics["eval_accuracy"][step] for step in sorted(metrics["eval_accuracy"])] for metrics in seeds]
    words = []
    if all(accuracies):
        last = max(seeds[0]["eval_accuracy"])
        some = sorted(
            {min(seeds[0]["eval_accuracy"], key=lambda step: abs(step - last * x)) for x in (1 / 6, 1 / 3, 1)}
        )
        words += [f"after {step}: {spread([metrics['eval_accuracy'][step] for metrics in seeds], 3)}" for step in some]
    length = [list(metrics["response_tokens"].values())[-1] for metrics in seeds]
    words += [f"length {spread(length, 1)}"]
    ess = [min(metrics["ess"].values(), default=1.0) for metrics in seeds]
    return ", ".join([*words, f"lowest ESS {spread(ess, 2)}"])


def pyplot():
    """matplotlib's pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save_picture(figure, picture: str) -> None:
    """Write the picture and forget the figure. Raises ValueError if it cannot be written."""
    try:
        figure.savefig(picture, dpi=200, format=Path(picture).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise ValueError(f"--output {picture}: cannot be written ({first_line(error)}); name another file") from error
    finally:
        pyplot().close(figure)
    say(f"The picture is {picture}")


def gradient_study(name: str, picture: str, seeds: int = 3, batches: int = 20, updates: int = 40) -> dict:
    """What the baseline and the missing importance weights do to the gradient of one policy on the task sums.

    First the policy stays as it is, and fresh batches give the gradient's variance with each baseline, relative to the
    squared norm of its mean. Then it learns from one buffer again and again, and EMPG's gradient is compared with the one
    that has the importance weights w = P_θ(τ)/P_θ*(τ) of the same trajectories.

    Returns:
        variance: by baseline, for each seed. distance: rows [seed, update, KL(θ* ‖ θ) in nats per response,
        effective sample size, cosine and norm ratio of the gradient without weights to the one with them].
    """
    P, G, tokenizer = 32, 16, empg.load_tokenizer(name)[0]
    problems = TASKS["sums"].problems(None, "train")
    variance: dict[str, list[float]] = {kind: [] for kind in BASELINES}
    distance: list[list[float]] = []

    def gradient(model, L: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(-(weights.flatten().to(L) * L).mean(), list(model.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    for seed in progress(range(seeds), "seeds"):
        model = empg.load_policy(name, tokenizer).float()
        limits = empg.sampling_limits(tokenizer, model, 40)

        def draw(batch: int, seed=seed, model=model, limits=limits) -> tuple[list, list, torch.Tensor]:
            rows = [problems[i] for i in empg.draw_batch(len(problems), P, batch, seed)]
            prompts = tokenizer([row["question"] for row in rows])["input_ids"]
            seeds = [((seed << 32) + batch << 32) + place for place in range(P)]
            responses = empg.sample(model, prompts, G, seeds=seeds, **limits)
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            rewards = [TASKS["sums"].reward(text, rows[i // G]["answer"]) for i, text in enumerate(texts)]
            smooth = empg.smooth_rewards(torch.tensor(rewards, dtype=torch.float64)).view(P, G)
            return [p for p in prompts for _ in range(G)], responses, smooth

        found: dict[str, list[torch.Tensor]] = {kind: [] for kind in BASELINES}
        for batch in range(1, batches + 1):
            prompts, responses, rewards = draw(batch)
            L = empg.log_probs(model, prompts, responses)[0].sum(1)
            for kind, gradients in found.items():
                gradients.append(gradient(model, L, empg.subtract_baseline(rewards, kind)))
        for kind, gradients in found.items():
            g = torch.stack(gradients)
            variance[kind].append((g.var(0).sum() / g.mean(0).square().sum()).item())

        prompts, responses, rewards = draw(1)
        weights, old = empg.subtract_baseline(rewards), None
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(updates + 1):
            L = empg.log_probs(model, prompts, responses)[0].sum(1)
            old = L.detach() if old is None else old
            log_w = (L - old).detach()
            ours = gradient(model, L, weights)
            theirs = gradient(model, L, weights.flatten() * log_w.exp())
            cosine = torch.cosine_similarity(ours, theirs, dim=0).item()
            ess, ratio = empg.effective_sample_size(log_w), (ours.norm() / theirs.norm()).item()
            distance.append([seed, step, empg.kl_k3(old, L.detach()).mean().item(), ess, cosine, ratio])
            optimizer.zero_grad()
            empg.empg_loss(L[:, None], torch.ones_like(L)[:, None], weights.flatten().to(L)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    means = [np.mean(variance[kind]) for kind in BASELINES]
    left.bar(
        BASELINES,
        means,
        yerr=[np.std(variance[kind], ddof=min(1, seeds - 1)) for kind in BASELINES],
        color=COLOURS[0],
    )
    left.set(ylabel="variance / |mean gradient|²", xlabel="baseline")
    rows = np.array(distance).reshape(seeds, -1, 6).mean(0)
    for column, label in ((3, "effective sample size"), (4, "cosine"), (5, "norm ratio")):
        right.plot(rows[:, 2], rows[:, column], color=COLOURS[column - 3], linestyle=STYLES[column - 3], label=label)
    right.set(xlabel="KL(θ* ‖ θ), nats per response", ylim=(0, None))
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    save_picture(figure, picture)
    return {"variance": variance, "distance": distance}


def describe_gradients(s: dict) -> str:
    lines = {kind: f"variance / |mean|² {spread(v, 3)}" for kind, v in s["variance"].items()}
    rows = np.array(s["distance"])
    rows = rows.reshape(len(set(rows[:, 0])), -1, 6).mean(0)
    for _, step, kl, ess, cosine, ratio in (row for row in rows if row[1] in (0, 1, 2, 5, 10, 20, 40)):
        lines[f"update {step:.0f}"] = f"KL {kl:.3f}  ESS {ess:.3f}  cosine {cosine:.3f}  norm ratio {ratio:.3f}"
    return table("Gradients (means over the seeds, ± their standard deviation)", lines)


# -------- The command line --------------------------------------------------------------------------------------------


def check(options: Options) -> None:
    """Raise ValueError for options that cannot work, alone or together; fill in those that follow from others."""
    modes = [name for name in ("model", "compare", "curves", "gradients") if getattr(options, name)]
    modes += ["behaviours"] if options.behaviours else []
    require(
        len(modes) == 1,
        "choose one of --model, --compare, --curves, --gradients and --behaviours FILE; see eval.py --help",
    )
    if modes != ["model"]:
        given = [flag(option.name) for option in fields(options) if getattr(options, option.name) != option.default]
        allowed = {"curves": {"--output"}, "gradients": {"--output", "--json"}}.get(modes[0], {"--json"})
        extra = sorted({*given} - {flag(modes[0])} - allowed)
        require(not extra, f"{', '.join(extra)}: does not go with {flag(modes[0])}; leave it out")
        require(len(options.compare or "AB") == 2, "--compare: takes two results files")
        return
    require(options.task in TASKS, f"--task {options.task}: choose {', '.join(TASKS)}")
    require(options.split in ("test", "train"), f"--split {options.split}: choose test or train")
    for name in ("limit", "num_samples", "max_new_tokens", "batch_size"):
        value = getattr(options, name)
        require(value is None or value >= 1, f"{flag(name)} {value}: must be at least 1")
    require(options.seed >= 0, f"--seed {options.seed}: must be at least 0")
    if options.temperature is None:
        options.temperature = float(options.num_samples > 1)
    require(0 <= options.temperature < math.inf, f"--temperature {options.temperature}: must be at least 0")
    several = options.num_samples == 1 or options.temperature > 0
    require(several, f"--num-samples {options.num_samples}: all would be the same at --temperature 0; raise it")
    require("{question}" in (options.prompt_template or "{question}"), "--prompt-template: must contain {question}")
    empg.choose_device(options)
    require(options.dtype in ("bfloat16", "float32"), f"--dtype {options.dtype}: choose bfloat16 or float32")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `argv`, or else the process's own."""
    about = __doc__.splitlines()[0]
    parser = OptionParser(Options, prog="eval.py", description=about, allow_abbrev=False)  # type: ignore[arg-type]
    options, stdout = Options(**vars(parser.parse_args(argv))), sys.stdout
    with contextlib.redirect_stdout(sys.stderr if options.json else stdout):
        try:
            check(options)
            if options.model:
                loaded = load(options)
            elif options.compare:
                say(describe_comparison(summary := compare(options.compare)))
            elif options.behaviours:
                summary = find_behaviours(read_results("--behaviours", options.behaviours)[1])
                say(describe_behaviours(summary))
            elif options.gradients:
                say(describe_gradients(summary := gradient_study(options.gradients, options.output or "gradients.png")))
            elif options.curves and RANK == 0:
                draw_curves(options.curves, options.output or "curves.png")
        except ValueError as error:
            fail(error, program="eval.py")
        if options.model:
            try:
                say(describe(summary := evaluate(options, *loaded)))
            except OSError as error:
                fail(f"--output {options.output}: {first_line(error)}; the same command goes on", 1, "eval.py")
    if options.json and RANK == 0:
        print(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
