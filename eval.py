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
import atexit
import hashlib
import json
import logging
import math
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
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
    dtype: Literal["bfloat16", "float32"] = option(
        None, "Precision. Default: bfloat16 where it is fast, but float32 for sums."
    )
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
# What is right: the answer in the box
# ------------------------------------------------------------------------------------------

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# What stands between two boxes that are one list: a comma or the like, "or" or "and", and perhaps a name, as in
# "or x ="; or any words with "or" among them
JOINED = re.compile(
    r"[^\w.!?=]*(?:text\w* ?\{ ?|mathrm ?\{ ?|mbox ?\{ ?)?(?:or|and|to|lor|vee)?[^\w.!?=]*(?:[a-z] ?= ?)?"
    r"|[^.!?=]*\bor\b(?! equivalently)[^.!?=]*",
    re.IGNORECASE,
)


def box_contents(text: str, start: int) -> tuple[str | None, int]:
    r"""The contents of a box whose brace opens at `start`, or None if it is never closed, and where the box ends.

    A number may be in a box without braces: \boxed 7.
    """
    if text[start : start + 1] != "{":
        number = re.compile(r"-?[\d.,]*\d").match(text, start)
        return (number[0], number.end()) if number else (None, start)
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
        if depth == 0:
            return text[start + 1 : i].strip(), i + 1
    return None, len(text)


def last_boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{...} of a text, or None. Braces within it are matched.

    Empty boxes do not count: a model may repeat the words of its prompt. If the last box is never closed, there is no
    answer. Boxes with no more than a comma, "or" or the like between them are a list.

    >>> last_boxed(r"So it is $\boxed{\frac{1}{2}}$. I put my answer in \boxed{}.")
    '\\frac{1}{2}'
    >>> last_boxed(r"Is it \boxed{5}? No: $x = \boxed{2}$ or $x = \boxed{-1}$.")
    '2, -1'
    """
    found: list[str] = []
    end = 0
    for match in [*BOX.finditer(text)][-10:]:
        if match.start() < end:
            continue  # this box is within another one
        between = re.sub(r"(?:\\(?:q?quad\b|[()\[\],:;! ])|[\s$}*])+", " ", text[end : match.start()])
        contents, end = box_contents(text, match.end())
        if contents is None and text.startswith("{", match.end()):
            return None  # it is never closed
        if contents is None:
            found = []  # the text only speaks of a box, as the prompt does
        if contents:
            is_joined = len(between) < 40 and JOINED.fullmatch(between)
            inner = re.fullmatch(r"\\boxed\s*\{([^{}]*)\}", contents)
            found = [*(found if is_joined else []), inner[1] if inner else contents]
    return ", ".join(dict.fromkeys(found)) or None  # the same box twice is one answer


def gold_answer(answer: str) -> str:
    r"""The answer in a row of a dataset: what is in its last \boxed{}, or after its "####", or all of it."""
    boxed = last_boxed(answer)
    return answer.rpartition("####")[2].strip() if boxed is None else boxed


def rewrite(text: str, rules: list[tuple[str, str]]) -> str:
    """Replaces each pattern by its replacement, one after the other."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


# What has several spellings in LaTeX gets one. This is for numbers and for formulas.
SPELLINGS = [
    (r"\\(?:mbox|emph|operatorname|(?:text|math)(?:rm|bf|it|sf))(?![a-zA-Z])", r"\\text"),
    (r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"(?<!\\)\\[()\[\]]", ""),  # \( and \[ around a formula
    # Separators of thousands: 1{,}800, 1,\!800, 1\,800, and spaces that do not break a line
    (r"(?<=\d)(?:\{,\}|,?\\!|\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\(?:[,:;! ]|q?quad(?![a-zA-Z]))|~", " "),
    # Degrees: 22^\circ, 22^{\circ}, 22°C
    (r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|°)\s*(?:[CF]\b|\\text\{\s*[CF]\s*\})?", ""),
    (r"\\?%", ""),
    (r"\\?\$|[€£¥₹¢]", " "),
    (r"[\u2012\u2013\u2212]", "-"),  # a dash, or a minus sign of its own
    (r"\\[dtc]?frac(?![a-zA-Z])\s*", r"\\frac"),
    (r"(\\frac\{[^{}]*\})\s+(?=\{)", r"\1"),  # \frac{1} {2}
    (r"\\frac\s*(\d|\\[a-zA-Z]+)\s*(\d|\\[a-zA-Z]+)", r"\\frac{\1}{\2}"),  # \frac12, \frac\pi4
    (r"\\frac\s*(\d|\\[a-zA-Z]+)\s*(?=\{)", r"\\frac{\1}"),  # \frac1{2}
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),  # \frac{1}2
]

# Words, and what may stand between them
LETTERS = r"[^\W\d_]+(?![^\W\d_])"  # a whole word: else there would be many ways to match one
WORD = rf"{LETTERS}(?:[-'’]{LETTERS})*(?:['’](?![^\W\d_]))?"
BETWEEN = r"[\s.,;:/()²³—]*"
# (Behind "18. Next" another sentence begins.)
WORDS = re.compile(rf"(?!\s*\.\s*\w){BETWEEN}(?:{WORD}(?:\s*\^[23])?{BETWEEN})*")
SHORT_UNIT = "m|g|s|h|l|L|t|km|cm|mm|mi|mph|ft|in|yd|sq|kg|Kg|mg|lbs?|oz|ml|mL|hrs?|min|am|pm|AM|PM|MB|GB|TB"
# Words that make another number of the one before them: 18 thousand, 18 and a half
MULTIPLE = re.compile(
    r"\W*(?:and (?:an? )?)?(?:hundreds?|thousands?|[mbtr]+illions?|mil|bn|dozens?|half|halves|thirds?|quarters?"
    r"|(?:fif|six|seven|eigh|nin|ten|hundred|thousand)ths|squared|cubed|factorial|or|plus|minus)\b",
    re.IGNORECASE,
)
# Words that are another number: 18 and nineteen, 5 hours thirty minutes. "18 dollars for the two of them" has none.
NUMBER_WORD = (
    r"(?:(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:-\w+)?|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b"
)
OF_SOME = (
    r"\b(?:the|all|these|those|of|in|for|her|his|their|per|each|every|next|last|first|other|another|a|only|after|than"
    rf"|with|under|during)\s+{NUMBER_WORD}"
)
ANOTHER_NUMBER = (
    rf"\b(?:{NUMBER_WORD}|(?:or (?:more|less|fewer|so|not)|and (?:an? )?half|at (?:most|least)|approximately|maybe"
    r"|negative|minus|below zero|lakh|crore|gross|doubled|tripled|squared|cubed|power of|remainder"
    r"|is (?:wrong|incorrect|not))\b)"
)


def is_unit(text: str) -> bool:
    """Whether what stands after a number is its unit, or are words that leave the number as it is."""
    if (
        not WORDS.fullmatch(text)
        or text.startswith("(")
        or MULTIPLE.match(text)
        or re.search(ANOTHER_NUMBER, re.sub(OF_SOME, "", text.lower()))
    ):
        return False
    words = re.findall(WORD, text)
    # Letters that are joined to the number may be variables, and so may a single small letter (but for the article),
    # and a word of one or two letters, if it is the only one.
    if re.match(LETTERS, text) and not re.fullmatch(SHORT_UNIT, words[0]):
        return False
    if any(re.fullmatch("[b-z]", word) and not re.fullmatch(SHORT_UNIT, word) for word in words):
        return False
    return len(words) != 1 or len(words[0]) > 2 or re.fullmatch(SHORT_UNIT, words[0]) is not None


# ------------------------------------------------------------------------------------------
# What is right in GSM8K: a number
# ------------------------------------------------------------------------------------------

# What is left of LaTeX and Markdown, as plain text
PLAIN = [
    (r"<<[^<>]*>>", ""),  # GSM8K's own calculations: 9 + 9 = <<9+9=18>>18
    (r"\\text\s*\{([^{}]*)\}", r" \1 "),
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2 "),
    (r"\\times|\\cdot|×|·", "*"),
    (r"\\div(?![a-zA-Z])|÷", "/"),
    (r"\*\*([^*]+)\*\*", r"\1"),
    (r"\^\{([23])\}", r"^\1"),
    (r"\b([ap])\.\s?m\b\.?", r"\1m"),
]
NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+|\.(?!\s*\w))?|\.\d+)"
# 18, 36/2, 2 1/2 or 5:00, and what stands after it
AMOUNT = re.compile(rf"([-+]?)\s*({NUMBER})(?:\s*/\s*(\d+)|\s+(\d+)/(\d+)|:00)?(.*)", re.DOTALL)
# The left-hand side of an equation: a name, or a calculation with numbers and their units
NAME = r"\s*[^\W\d_][^\d=:;,+*/^²³<>!\\-]*"
NOT_A_NAME = (
    rf"\b(?:or|and|not|plus|minus|half|twice|double|triple|square|squared|root|log|ln|sin|cos|tan|{NUMBER_WORD})\b"
)
TERM = rf"[\s(-]*{NUMBER}(?:\s*{WORD}\.*)*[\s)]*"
CALCULATION = rf"{TERM}(?:[+*/-]{TERM})+"

# Where a response announces its answer: up to the end of the line, or of the sentence. (A heading may have #### too.)
HASHES = r"####(?!\s{0,9}(?!(?:final\s)?answer)[^\W\d_]{3})(?P<line>.*)"
ANSWER_IS = (
    r"answer\s+is\b[\s:]*(?:(?:therefore|thus|indeed|simply|exactly|actually),?\s+)?"
    r"(?P<sentence>(?:(?!answer\s+is\b|,?\s(?:because|since)\b)(?:[^.!?\n]|[.!?](?=\S)))*)"
)
ANNOUNCEMENT = re.compile(f"{HASHES}|{ANSWER_IS}", re.IGNORECASE)
# A number with what is joined to it, as in 5:30 or 17-18
JOINED_NUMBERS = re.compile(r"-?\.?\d(?:[\d.,:/^_-]*\d)?(?:\s+\d+/\d+)?")
# What stands before a number that is a part of a calculation or of a list
UNFINISHED = re.compile(r"\w$|[+*/^<>]\s*$|\S\s*-\s+$|\d\s*,\s*$|\d\s+(?:(?:and|to)\s+)?$")


def number_of(text: str) -> Fraction | None:
    r"""The number that an answer stands for, or None if it stands for anything else, or for several numbers.

    right for 18:   18 | $18 | €18.00 | 18\% | **18** | \textbf{18} | 36/2 | \frac{36}{2} | 18 dollars a day | 18 km/h
                    18 \text{ dollars} | 18 cm^2 | x = 18 | 20 - 2 = 18 | \text{Total} = 18 \text{ dollars} | 18:00
    wrong for 18:   17 or 18 | 17, 18 | \{17, 18\} | 17-18 | 18 and nineteen | 18 hours 30 minutes | 18 = 2 * 9 | 3 * 6
                    2x = 18 | x \ge 18 | 18x | 18^2 | 18! | 18 thousand | 18 dozen | 18 and a half | 18:30 | \sqrt{18}

    So a number may have a sign, a currency, separators of thousands, a percent sign, emphasis, and a unit or words that
    leave it as it is. It may be a fraction or a mixed number. Of an equation the last side counts, if the first one is
    a name or a calculation. A time of day passes if it is a full hour. A number with a number word is neither that
    number nor the product: 18 thousand is wrong for 18 and for 18,000. In doubt it is None. A right answer in a rare
    spelling costs a sample, but a wrong one that gets a reward is learned.
    """
    if len(text) > 300:
        return None
    *sides, last = rewrite(text, SPELLINGS + PLAIN).strip("*_` \n").split("=")
    for i, side in enumerate(sides):
        side = re.sub(r"_\{?\w+\}?", "", side)  # without an index
        is_name = i == 0 and re.fullmatch(NAME, side)
        if re.search(NOT_A_NAME, side, re.IGNORECASE) or not (is_name or re.fullmatch(CALCULATION, side)):
            return None
    if not sides:
        last = re.sub(f"^{NAME}:", "", last)  # a name may also stand before a colon
    amount = AMOUNT.fullmatch(last.strip("*_` \n"))
    if amount is None or not is_unit(amount[6]):
        return None
    sign, number, denominator, numerator, denominator_of_mixed, _ = amount.groups()
    try:
        value = Fraction(number.replace(",", "").rstrip("."))
        if denominator:
            value /= int(denominator)
        if numerator:
            value += Fraction(int(numerator), int(denominator_of_mixed))
    except ZeroDivisionError:
        return None
    return -value if sign == "-" else value


# Words before a number that make it another one, or not the answer
OTHER_NUMBER = re.compile(
    r"\b(?:step|equation|minus|negative|not|or|half(?: of)?|twice|double|(?:less|more|fewer) than|at (?:most|least))[\s$*]+$",
    re.IGNORECASE,
)


def last_number(text: str) -> str | None:
    """The last number of a text, up to the end of its sentence, unless it is a part of a calculation, of a list, of a
    heading or of a question."""
    text = rewrite(text, SPELLINGS + PLAIN)
    numbers = list(JOINED_NUMBERS.finditer(text))
    if not numbers:
        return None
    start = numbers[-1].start()
    before = re.split(r"\n|[.!?]\s", text[:start])[-1]
    is_in_list = re.search(r"\d", before) and re.search(r"\bor\s+(?:\w+\s+){0,2}$", before[-50:])
    is_bullet = re.fullmatch(r"\s*[*+-]\s*", before)
    is_heading = re.fullmatch(r"[\s(*#]*", before) and re.match(r"\d+[.):][^\w\n]+[^\W\d_]{2}", text[start:])  # 3. Next
    is_question = "?" in text[start:]  # perhaps that of the problem
    is_unfinished = UNFINISHED.search(before) and not is_bullet
    if is_heading or is_question or is_in_list or is_unfinished or OTHER_NUMBER.search(before):
        return None
    return re.split(r"\n|[.!?](?:\s|$)", text[start:])[0]


def final_answer(text: str) -> str | None:
    r"""The final answer of a response to a problem of GSM8K, or None. `number_of` reads it.

    It is what is in the box. Without a box, it is what stands after the last "####" or "answer is", up to the end of
    the line or of the sentence. Without these, it is the last number.

    If the token limit cut a response off, a box counts, and so does an announcement in a sentence that was finished.
    The last number does not: it is only where the model was stopped. By accident it can be right, and the model would
    be rewarded for an answer that it did not give.

    >>> final_answer(r"So it is \boxed{18}, not 17.")
    '18'
    >>> final_answer("The answer is 18 dollars. Let me check: 9 + 9 = 18 and 2 + 2 = 4.")
    '18 dollars'
    >>> final_answer("Of 5 boxes with 241 each there are 5 * 241 = 1,205")
    '1,205'
    >>> final_answer("There are two steps. 1. Find the number of boxes. 2…") is None
    True
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    last_box = text[text.rfind("\\boxed") :] if "\\boxed" in text else ""
    if last_box.count("{") > last_box.count("}"):
        return None  # it is never closed
    is_cut = text.endswith(empg.CUT_MARK)
    text = text.removesuffix(empg.CUT_MARK)
    announcements = [match for match in ANNOUNCEMENT.finditer(text) if re.search(r"\d", match[0])]
    if not announcements:
        return None if is_cut else last_number(text)
    last = announcements[-1]
    # A full stop at the cut may be the point of 18.50.
    is_whole = not is_cut or re.match(r"[.!?]?\s", text[last.end() :])
    return (last["line"] or last["sentence"]) if is_whole else None


def is_right_number(given: str | None, answer: str) -> float:
    """1.0 if an answer is the number of a row of GSM8K, else 0.0. Raises ValueError if the row has no number.

    >>> is_right_number("18 dollars", "9 + 9 = <<9+9=18>>18\\n#### 18")
    1.0
    """
    gold = number_of(gold_answer(answer))
    if gold is None:
        raise ValueError(f"the answer {answer!r} is empty, or is not a number")
    return float(given is not None and number_of(given) == gold)


# ------------------------------------------------------------------------------------------
# What is right in MATH: a formula
# ------------------------------------------------------------------------------------------

OR = r"(?:\\text\s*\{\s*or\s*\}|\bor\b)\s*"
# What else has several spellings in a formula
FORMULA = [
    (r"π", r"\\pi "),
    (r"\\([lg])eqslant(?![a-z])", r"\\\1eq"),
    # Two inequalities, joined by "or", as a union of intervals
    (rf"[a-z]\s*<([^<>=,]+){OR}[a-z]\s*>([^<>=,]+)", r"(-\\infty,\1)\\cup(\2,\\infty)"),
    (rf"[a-z]\s*>([^<>=,]+){OR}[a-z]\s*<([^<>=,]+)", r"(-\\infty,\2)\\cup(\1,\\infty)"),
    (rf"[a-z]\s*\\leq?\s([^<>=,]+){OR}[a-z]\s*\\geq?\s([^<>=,]+)", r"(-\\infty,\1]\\cup[\2,\\infty)"),
    (r"^\s*[a-z]\s*\\in(?![a-z])", ""),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"_\{(\d+)\}", r"_\1"),
    (r"(?<=\d)\.0+(?=[a-z])", ""),
    (r"(?<![\w.])1(?=i\b)", ""),
    (r"^\s*(-?\d+)\s+(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),  # 2 2/3
    (r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|\b(?:or|and)\b(?![^{]*\})", ","),
    (r",(?:\s*,)+", ","),
    (r"^\s*\([a-zA-Z](?:\s*,\s*[a-zA-Z])+\)\s*=(?=\s*\()", ""),  # names: (x, y) = (3, 4)
    (rf"^\s*\\text\s*\{{(?![^{{}}]*{NOT_A_NAME})[^{{}}\d]*\}}\s*=", ""),  # a name
    (r"^\s*\\text\s*\{\s*([^{}]*)\}\s*$", r"\1"),  # nothing but words
    (r"^\s*\{([^{}]*)\}\s*$", r"\1"),
    (r"(\\(?:pi|sqrt|frac)(?![a-zA-Z]).*?)\s*\\approx\s*[\d.]+\s*$", r"\1"),
]
# A unit after a formula, in \text{}, or in plain words after a number
LAST_WORDS = re.compile(r"(?<=[\w})])\s*\\text\s*\{([^{}]*)\}(?:\^[23])?[.\s]*$|(?<=\d)((?:\s+[a-z]{3,})+)[.\s]*$")

# math_verify reads what it can, and drops the rest without a word. So it gets only what it reads as a whole.
COMMAND = (
    r"\\(?:frac|sqrt|pi|cdot|times|div|pm|mp|leq?|geq?|lt|gt|neq?|in|cup|cap|infty|emptyset|varnothing|setminus|mathbb"
    r"|log|ln|arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|exp|binom|begin|end|alpha|beta|gamma|theta|lambda|phi|omega)"
    r"(?![a-zA-Z])"
)
# What it does not read, or reads in another way; and what it might compute forever, in which no alarm interrupts it.
UNREADABLE = re.compile(
    r"[^\w\s.,+*/^=<>!|()\[\]{}\\&-]"  # other characters, such as ; and :
    r"|\d\s+[\d.]"  # two numbers side by side
    r"|\d_\w"  # a base, as in 28_9
    r"|\d\s*[eE]\s*[+-]?\d"  # 1E9
    r"|\[\s*-?\\infty|\\infty\s*\]"  # an interval that is closed at infinity
    r"|\S\s*\\begin|\\end\{\w+\}\s*\S"  # a matrix with something beside it
    r"|\^\s*\(|\^\s*\w\s*\^|\^\s*-?\d{4}"  # 9^(99), 9^9^9, 9^9999
    r"|\^\s*\{[^{}]*(?:[*!^]|\\cdot|\\times|\d{4}|\{[^{}]*[*!^])"  # 9^{9*9}, 9^{99!}, 9^{9^{9}}
    r"|\)\s*\^\s*\{?\d\d"  # (9^9)^{99}
    r"|!.*\^|\^.*!|[)}]\s*!|\d{5,}\s*!"  # 9!^9, 9^9!, (99)!, 99999!
    r"|\\l(?:og|n).*!"  # \log 9999!
)
FUNCTION = r"!|\\(?:log|ln|exp|binom|arc\w+|sin|cos|tan|cot|sec|csc)(?![a-z])"
RELATION = r"<|>|\\(?:leq?|geq?|neq?)(?![a-z])"
# The left-hand side of an equation that gives a value: a name, such as x, f(2), AB or area, or a calculation
LETTER_OR_NAME = r"(?:[a-zA-Z]|[A-Z]{2}|[a-zA-Z]{3,}|\\(?:alpha|beta|gamma|theta|lambda|phi|omega))"
ONE_NAME = rf"\s*(?:\\(?:angle|triangle|overline)\s*)?\{{?{LETTER_OR_NAME}'?\}}?(?:_\w+)?(?:\([^()=]*\))?\s*"
VARIABLE = rf"(?!\s*{NOT_A_NAME}){ONE_NAME}(?:\+{ONE_NAME})*"  # such as m + n, too
ARITHMETIC = r"(?:[\d\s.+*/()^{}!-]|\\(?:[dt]?binom|frac|sqrt|cdot|times|div|pi)(?![a-zA-Z]))*"


def normal(formula: str) -> str:
    """A formula in one spelling, without its unit."""
    formula = rewrite(formula, SPELLINGS + FORMULA)
    words = LAST_WORDS.search(formula)
    if words and len(re.findall(WORD, words[0])) <= 5 and is_unit(f" {words[words.lastindex or 0]}"):
        formula = formula[: words.start()]
    return formula.strip().rstrip(" .\n")


def last_side(formula: str) -> str | None:
    """The last side of an equation that gives a value, as x = 9 + 9 = 18 does. None if it gives none, as 2x = 18."""
    equals = r"(?<![<>!\\])="
    if len(re.findall(equals, formula)) == 1:
        formula = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", formula)  # x = 1,800
    first, *sides = re.split(equals, formula)
    if not sides:
        return formula
    if len(sides) == 1 and brackets(sides[0]) and re.fullmatch(VARIABLE, first):  # P = (2, 12)
        return sides[0]
    if "," in formula:  # a list of values, as x = 1, x = 2
        names = {name.strip() for name in re.findall(r"([^,=]*)=", formula)}
        return formula if len(names) == 1 and re.fullmatch(VARIABLE, *names) else None
    numbers = {number_of(side) for side in (first, *sides)} - {None}
    is_value = re.fullmatch(VARIABLE, first) or all(re.fullmatch(ARITHMETIC, side) for side in (first, *sides[:-1]))
    return sides[-1] if is_value and len(numbers) <= 1 else None  # 17 = 18 gives no value, either


def brackets(formula: str) -> str:
    """The brackets around a list, or "" """
    formula = formula.replace(" ", "")
    return formula[:1] + formula[-1:] if formula[:1] in "([" and formula[-1:] in ")]" and "," in formula else ""


def is_finished(formula: str, gold: str) -> bool:
    r"""Whether a formula is worked out as far as the answer is. Else a model might copy it from the problem.

    It has no more numbers than the answer, and no larger ones; no other functions; and no decimals for a root:
    \sqrt{2940} and \sqrt{14 \cdot 14 \cdot 15} are 14\sqrt{15}, but not as an answer. Inequalities have a variable
    alone: x^2 < 4 is no answer for (-2, 2), but -2 < x < 2 is.
    """
    numbers, gold_numbers = (
        [float(number) for number in re.findall(r"\d+(?:\.\d+)?", each)] for each in (formula, gold)
    )
    if r"\pm" in gold:
        gold_numbers *= 2  # it may be written as a list
    if max(numbers, default=0) > max(gold_numbers, default=1):
        return False
    # There may be one more factor of 1, as in \frac{1}{2}x for \frac{x}{2}.
    ones = numbers.count(1) - gold_numbers.count(1)
    if ones > 1 or len(numbers) - numbers.count(1) > len(gold_numbers) - gold_numbers.count(1):
        return False
    if set(re.findall(FUNCTION, formula)) - set(re.findall(FUNCTION, gold)):
        return False
    if re.search(r"\\(?:sqrt|pi)", gold) and re.search(r"\d\.\d", formula) and "." not in gold:
        return False
    if re.search(RELATION, formula) and not (re.search(RELATION, gold) or brackets(gold) or r"\cup" in gold):
        return False
    if re.search(RELATION, gold) or not re.search(RELATION, formula):
        # Pairs and intervals have their brackets, and lists have none. (A union begins and ends with those of two.)
        return brackets(formula) == brackets(gold) or r"\cup" in gold
    constant = r"(?:[^a-zA-Z\\]|\\(?:frac|sqrt|pi|infty)(?![a-z]))*"
    return re.fullmatch(rf"(?:{constant}(?:{RELATION}))?\s*[a-z]\s*(?:{RELATION}){constant}", formula) is not None


def is_readable(formula: str) -> bool:
    """Whether math_verify reads all of a formula."""
    return not UNREADABLE.search(formula) and not re.search(r"\\[a-zA-Z]", re.sub(COMMAND, "", formula))


def within(seconds: int, function: Callable[[], bool]) -> bool:
    """What a function returns, or False if it takes longer."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    if threading.current_thread() is threading.main_thread():
        try:
            return timeout(seconds)(function)()
        except TimeoutException:
            return False
    # The signal that ends the function above reaches the main thread only. In another one, go on without the function.
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found) and found[0]


def are_equal(gold: str, given: str) -> bool:
    """Whether math_verify takes two formulas for equal, and two numbers are not only both near 0."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # Without this it would take the last letter of a formula for a unit. The time limit is that of `within`.
    no_units = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    how: dict = {"extraction_config": [LatexExtractionConfig(normalization_config=no_units)], "parsing_timeout": None}
    how |= {"fallback_mode": "no_fallback", "extraction_mode": "first_match"}
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time limit
    try:
        [one, *_], [two, *_] = parse(f"\\boxed{{{gold}}}", **how), parse(f"\\boxed{{{given}}}", **how)
        # The option compares sets with equations, too: the answer "0,1" with "x = 0 or x = 1".
        if not verify(one, two, allow_set_relation_comp=True, timeout_seconds=None):
            return False
        if getattr(one, "is_number", False) and getattr(two, "is_number", False):
            one, two = one.doit(), two.doit()
            if one.is_Rational and two.is_Rational:
                return bool(one == two)
            return bool(abs((one - two).evalf(20, maxn=400)) <= 1e-15 * abs(one.evalf(20)))
    except Exception:  # noqa: BLE001 - what cannot be read is not right
        return False
    return True


# Many samples give the same answer to a problem. Compare it once.
@lru_cache(maxsize=4096)
def is_right_formula(given: str | None, answer: str) -> float:
    r"""1.0 if an answer equals the formula of a row of MATH, else 0.0. Raises ValueError if the row has none.

    right for \frac{1}{2}:   \dfrac12 | 0.5 | 1/2 | \frac{2}{4} | x = \frac{1}{2} | \frac{1}{2} \text{ cm}^2
                             \text{Area} = 1/2 | x = 1 - 0.5 = 0.5
    wrong for \frac{1}{2}:   1 | \frac{1}{2}, 1 | \frac{1}{2} \text{ or } 1 | 2x = \frac{1}{2} | x > \frac{1}{2}
                             \frac{1}{2}s | \frac{1}{2} \text{ feet } 6 \text{ inches} | \frac{1}{2} \text{ and a half}
                             \sqrt{0.25} | \frac{3}{4} - \frac{1}{4} | 0.5000001 | 1 = \frac{1}{2}

    A number is compared as in GSM8K. Anything else is right if it is spelled in the same way, but for spaces, commands
    of LaTeX that only change the looks, and a unit. Otherwise math_verify compares the two, if it can read all of them,
    and if the given one is worked out. It compares lists as a whole: "3 or 4" is right for "3, 4", but not for 3, or a
    model would learn to list guesses.
    """
    import math_verify  # noqa: F401 - if it is missing, this is said before any work, when rows are tried

    def is_same(a, b):
        a, b = (re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text) for text in (a, b))
        return a == b

    gold = normal(gold_answer(answer))
    if not gold:
        raise ValueError(f"the answer {answer!r} is empty, or has nothing in its box or after its ####")
    if not given or len(given) > 300:
        return 0.0
    formula = normal(given)
    if "=" not in gold:
        formula = last_side(formula) or ""
    if not re.search("[a-zA-Z]", gold.replace(r"\frac", "")) and number_of(gold) is not None:
        # A number is compared as in GSM8K, so that it is worked out. But a single letter may be a variable.
        has_variable = re.search(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", formula)
        return float(not has_variable and number_of(formula) == number_of(gold))
    base = re.fullmatch(r"(-?\d\w*)_\d+", gold)
    if formula and (is_same(formula, gold) or (base and is_same(formula, base[1]))):  # of 28_9 the base may be left out
        return 1.0
    is_word = re.fullmatch(r"[a-zA-Z .'-]*[a-zA-Z]{2}[a-zA-Z .'-]*", gold)
    if is_word:
        return float(is_same(formula.casefold(), gold.casefold()))
    if not formula or not (is_readable(formula) and is_readable(gold) and is_finished(formula, gold)):
        return 0.0
    # To math_verify, R and r are the same variable.
    letters = re.sub(r"\\[a-zA-Z]+|[a-zA-Z]{3,}", "", formula + gold)
    if any(letter.isupper() and letter.lower() in letters for letter in letters):
        return 0.0
    return float(within(2, lambda: are_equal(gold, formula)))


# Task → how the answer of a response is found, and how it is compared with that of the problem
ANSWERS: dict[str, tuple[Callable, Callable]] = {
    "gsm8k": (final_answer, is_right_number),
    "math-hard": (last_boxed, is_right_formula),
}


def grade(task: str, response: str, answer: str) -> float:
    """1.0 if the final answer of a response is right, else 0.0."""
    find, compare_with = ANSWERS[task]
    return compare_with(find(response), answer)


# Task → a function of a response and the problem's answer, which returns 1.0 or 0.0. empg.py trains on these rewards.
SCORES = {task: partial(grade, task) for task in ANSWERS}


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


def is_same_answer(one: str, two: str) -> bool:
    """Whether two answers are the same number or formula, in whatever spelling."""
    numbers = number_of(one), number_of(two)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return one == two or (bool(normal(gold_answer(two))) and is_right_formula(one, two) == 1)


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The commonest answer; of equally common ones, the first. None if there is no answer at all.

    >>> majority_vote(["17", "17", "18", r"\\$18", "18.00"])
    '18'
    """
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        group = next((group for group in groups if is_same_answer(answer, group[0])), None)
        if group is None:
            groups.append([answer])
        else:
            group.append(answer)
    return max(groups, key=len)[0] if groups else None


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
        with tempfile.TemporaryFile(dir=Path(output).parent):
            pass
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be made ({error.strerror}); name another file") from error


def prepare(options: Options) -> tuple:
    """The problems, with prompts, the tokenizer and the model. Raises ValueError if an option cannot work."""
    task = TASKS[options.task]
    problems = task.problems(options.data, options.split)[: options.limit]
    empg.try_rewards(task, problems)
    tokenizer, model = empg.load_model(options.model, getattr(torch, options.dtype))
    if RANK == 0:
        empg.check_model(options.model)
    empg.add_prompts(problems, task, tokenizer)
    room = empg.room_for_responses(problems, model)
    if options.max_new_tokens is None:
        options.max_new_tokens = int(min(1024, room))
    if room < options.max_new_tokens:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: at most {room} fit after the prompts")
    return problems, tokenizer, model.to(options.device)


def fingerprint(model) -> str:
    """A short name for the weights of a model, by a few values of each tensor."""
    tensors = [tensor.detach().flatten() for tensor in model.state_dict().values()]
    values = [tensor[:: max(1, len(tensor) // 16)].float().cpu() for tensor in tensors]
    return hashlib.sha256(torch.cat(values).numpy().tobytes()).hexdigest()[:16]


def write_rows(output: str, rows: Sequence[dict], anew: bool = False) -> None:
    """Adds rows to --output, or writes it anew, in the first process. Ends with a line if it cannot."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        if anew:
            empg.write_atomically(Path(output), text)
        else:
            with Path(output).open("a") as stream:
                stream.write(text)
    except OSError as error:
        fail(f"--output {output}: cannot be written ({error.strerror}); repeat the command")


def take_up(options: Options, problems: list[dict], model) -> list[dict]:
    """The rows that an interrupted command has left in --output. (If there are none, that begins with the options.)

    Raises: ValueError if --output has results of other options.
    """
    if options.output is None:
        return []
    # The first line of a results file has the options that say what was computed.
    names = ["model", "task", "data", "split", "limit", "num_samples", "temperature", "max_new_tokens", "seed", "dtype"]
    header: dict[str, Any] = {name: getattr(options, name) for name in names}
    header |= {"problems": len(problems), "weights": fingerprint(model)}
    file = options.output
    header_of_file, rows = read_results(file) if Path(file).is_file() else (header, [])
    other = {name: header_of_file.get(name) for name in header if header_of_file.get(name) != header[name]}
    if "weights" in other:
        raise ValueError(
            f"--output {file}: has results of other weights than {options.model} has now; name another file"
        )
    if other:
        raise ValueError(f"--output {file}: has results of {other}; repeat these options, or name another file")
    write_rows(file, [header, *rows], anew=True)
    return rows


def evaluate(options: Options, problems: list[dict], tokenizer, model, rows: list[dict]) -> list[dict]:
    """Samples responses to all problems, and grades them. `rows` are those that `take_up` has found.

    Returns: a row for each response, those of the first problem first.
    """
    task = TASKS[options.task]
    G = options.num_samples
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
        if options.output is not None and RANK == 0:
            write_rows(options.output, new_rows)
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

        # A task of your own may call a response right whose answer cannot be read here. Then there is nothing to count.
        if all(row["answer"] is not None for row in rows if row["correct"]):
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
        if len(rows) != header.get("problems", -1) * G:
            raise ValueError(f"--compare: {file} is not complete; repeat its command, which goes on with it")
        questions.append([row["question"] for row in rows[::G]])
        correct = np.array([row["correct"] for row in rows], float)
        accuracies.append(correct.reshape(-1, G).mean(axis=1))
        mean_tokens.append(np.mean([row["tokens"] for row in rows]))
    if questions[0] != questions[1]:
        raise ValueError("--compare: the files are not of the same problems")

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
        stem = re.sub(r"\W*\d+$", "", Path(run).name)
        same = json.dumps({key: value for key, value in options.items() if key not in SAME_SETTING})
        settings.setdefault((stem, same), []).append((run, rows))

    labelled = {}
    for (stem, _), seeds in settings.items():
        label = f"{stem}, {len(seeds)} seeds" if len(seeds) > 1 else Path(seeds[0][0]).name
        if label in labelled:  # by runs with other options
            label = ", ".join(run for run, _ in seeds)
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
    options.device = options.device or empg.default_device()
    options.dtype = options.dtype or empg.best_precision(options.device, options.task)
    if options.temperature is None:
        options.temperature = 1.0 if options.num_samples > 1 else 0.0

    for name in ("limit", "num_samples", "max_new_tokens", "sample_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= options.temperature < math.inf:
        fail(f"--temperature {options.temperature}: must be finite, and not negative")
    if options.seed < 0:
        fail(f"--seed {options.seed}: must not be negative")
    things_to_do = [bool(options.model), bool(options.compare), bool(options.curves)]
    if sum(things_to_do) != 1 or (options.compare and len(options.compare) != 2):
        fail("choose one of --model NAME, --compare A B and --curves RUN ...")
    if options.task not in TASKS:
        fail(f"--task {options.task}: choose {', '.join(TASKS)}")
    return options


def score_model(options: Options) -> dict[str, str]:
    """The report on a model. Ends with a line, before any response is sampled, if an option cannot work."""
    empg.start_processes(options.device)
    errors = []
    try:
        check_output(options.output)
        problems, tokenizer, model = prepare(options)
    except ValueError as error:
        errors.append(str(error))
    empg.fail_together(errors)
    rows: list[dict] = []
    try:
        if RANK == 0:
            rows = take_up(options, problems, model)
    except ValueError as error:
        errors.append(str(error))
    empg.fail_together(errors)
    try:
        rows = evaluate(options, problems, tokenizer, model, empg.gather(rows))
    except torch.OutOfMemoryError:
        fail("out of memory: halve --sample-batch, and repeat the command", everywhere=True)
    atexit.register(empg.end_processes)
    return describe(rows, options.num_samples) | paper_scores(options.model, options.task)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line, or `argv`."""
    options = parse_options(argv)
    try:
        if options.compare:
            report = compare(*options.compare)
        elif options.curves:
            picture = options.output or "curves.png"
            check_output(picture)
            report = draw_curves(options.curves, picture)
    except ValueError as error:
        fail(error)
    if options.model:
        report = score_model(options)
    for name, text in report.items():
        say(f"{name:<21} {text}")


if __name__ == "__main__":
    sys.modules["eval"] = sys.modules["__main__"]  # empg.py imports eval: let it find this copy
    main()
