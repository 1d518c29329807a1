#!/usr/bin/env python3
"""The rows of the tables in studies/README.md, from the records of runs.

    python studies/tables.py runs/empg-? runs/grpo-?         a row for each setting, mean ± standard deviation of its seeds
    python studies/tables.py --seconds 30 runs/empg-?        and the accuracy when so many seconds had been spent on iterations

Runs whose names differ in a last number are seeds of one setting.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np


def read(run) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def accuracies(run) -> dict[int, float]:
    """Iteration → held-out accuracy after it."""
    rows = read(run)
    return {row["step"]: row["eval_accuracy"] for row in rows if "eval_accuracy" in row}


def measures(run, seconds: float | None) -> dict[str, float]:
    """Column → number, for one run."""
    accuracy = accuracies(run)
    rows = [row for row in read(run) if "reward" in row]
    last = max(accuracy)
    found = {f"after {step}": accuracy[step] for step in (10, 20, last) if step in accuracy}
    late = [value for step, value in accuracy.items() if step >= 20]
    if late:
        found["lowest from 20 on"] = min(late)
    found["response tokens"] = rows[-1]["response_tokens"]
    if rows[-1].get("kl") is not None:
        found["kl per token"] = rows[-1]["kl"]
    found["seconds an iteration"] = float(np.median([row["step_seconds"] for row in rows]))
    if seconds is not None:
        spent = np.cumsum([row["step_seconds"] for row in rows])
        done = [step for step in accuracy if step == 0 or spent[step - 1] <= seconds]
        found[f"after {seconds:g} s"] = accuracy[max(done)]
        found["iterations by then"] = float(max(done))
    return found


def table(runs: list[str], seconds: float | None = None) -> str:
    """A Markdown table."""
    settings: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        settings.setdefault(re.sub(r"\W*\d+$", "", Path(run).name), []).append(measures(run, seconds))
    columns = list(dict.fromkeys(name for seeds in settings.values() for name in seeds[0]))
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for setting, seeds in settings.items():
        cells = []
        for name in columns:
            values = [seed[name] for seed in seeds if name in seed]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=len(values) > 1):.3f}" if values else "")
        lines.append(f"| {setting} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--seconds", type=float)
    chosen = parser.parse_args()
    print(table(chosen.runs, chosen.seconds))
