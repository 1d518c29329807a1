#!/usr/bin/env python3
"""How many responses show the behaviours of the paper's figure 14.

    python eval.py --model DIR --task gsm8k --output a.jsonl
    python studies/behaviours.py a.jsonl

They are counted by phrases. That is a proxy: a response may have the phrase without the behaviour, or the other way
round.
"""

import json
import re
import sys
from pathlib import Path

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


def find(responses: list[str]) -> dict[str, list[str]]:
    """Behaviour → its phrase, with what stands around it, from each response that has one."""
    found = {}
    for name, phrases in BEHAVIOURS.items():
        pattern = re.compile(rf"(?s:.{{0,50}})\b({phrases})(?s:.{{0,50}})", re.IGNORECASE)
        matches = [pattern.search(text.replace("’", "'")) for text in responses]
        found[name] = [match[0] for match in matches if match]
    return found


def main(file: str) -> None:
    _header, *rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for name, examples in find([row["response"] for row in rows]).items():
        print(f"{name}: {len(examples)} of {len(rows)} responses, {len(examples) / len(rows):.1%}")
        for example in examples[:3]:
            print(f"    {example!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
