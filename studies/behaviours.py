#!/usr/bin/env python3
"""How often responses show the behaviours of the paper's figure 14, by the phrases that are taken for them: a proxy, as
either may stand without the other.

    python eval.py --model DIR --task gsm8k --output a.jsonl
    python studies/behaviours.py a.jsonl
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
    """Behaviour → the surroundings of its phrase in each response that has one."""
    found = {}
    for name, phrases in BEHAVIOURS.items():
        pattern = re.compile(rf"\b({phrases})", re.IGNORECASE)
        hits = [(text, match) for text in responses if (match := pattern.search(text.replace("’", "'")))]
        found[name] = [text[max(0, match.start() - 50) : match.end() + 50] for text, match in hits]
    return found


def main(file: str) -> None:
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()[1:]]
    for name, texts in find([row["response"] for row in rows]).items():
        print(f"{name}: {len(texts)} of {len(rows)} responses, {len(texts) / len(rows):.1%}")
        for text in texts[:3]:
            print(f"    {text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
