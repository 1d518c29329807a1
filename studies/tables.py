#!/usr/bin/env python3
"""Rows for the tables in studies/README.md, from the records of runs.

    python studies/tables.py runs/empg-? runs/grpo-?     a row for each setting, mean ± standard deviation of its seeds
    python studies/tables.py --seconds 30 runs/empg-?    and the accuracy after so many seconds of iterations

Runs that have the same options and names that differ in a last number are seeds of one setting, as in `eval.py
--curves`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empg
import eval as scoring


def accuracies(rows: list[dict]) -> dict[int, float]:
    """Iteration → held-out accuracy after it, from the rows of metrics.jsonl."""
    return {row["step"]: row["eval_accuracy"] for row in rows if "eval_accuracy" in row}


def measures(rows: list[dict], seconds: float | None) -> dict[str, float]:
    """Column → number, for one run."""
    accuracy = accuracies(rows)
    iterations = [row for row in rows if "reward" in row]
    found = {f"after {step}": accuracy[step] for step in (10, 20, max(accuracy)) if step in accuracy}
    late = [value for step, value in accuracy.items() if step >= 20]
    if late:
        found["lowest from 20 on"] = min(late)
    found["response tokens"] = iterations[-1]["response_tokens"]
    if iterations[-1].get("kl") is not None:
        found["kl per token"] = iterations[-1]["kl"]
    found["seconds an iteration"] = float(np.median([row["step_seconds"] for row in iterations]))
    if seconds is not None:
        spent = np.cumsum([row["step_seconds"] for row in iterations])
        evaluated_by_then = [step for step in accuracy if step == 0 or spent[step - 1] <= seconds]
        found[f"after {seconds:g} s"] = accuracy[max(evaluated_by_then)]
        found["iterations by then"] = float(max(evaluated_by_then))
    return found


def cell(values: list[float]) -> str:
    """The mean and the standard deviation of the seeds. (Of one seed it is 0.)"""
    if not values:
        return ""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} ± {deviation:.3f}"


def table(runs: list[str], seconds: float | None = None) -> str:
    """A Markdown table. Raises ValueError if a directory is not that of a run."""
    settings = {}
    for label, seeds in scoring.read_runs(runs).items():
        settings[label] = [measures(rows, seconds) for rows in seeds]
    columns = list(dict.fromkeys(name for seeds in settings.values() for name in seeds[0]))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, seeds in settings.items():
        cells = [cell([seed[name] for seed in seeds if name in seed]) for name in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--seconds", type=float)
    chosen = parser.parse_args(argv)
    try:
        print(table(chosen.runs, chosen.seconds))
    except ValueError as error:
        empg.fail(error)


if __name__ == "__main__":
    main()
