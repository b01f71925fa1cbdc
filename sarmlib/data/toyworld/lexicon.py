"""Words and facts of the toy world.

Preference pairs draw from the first half of every open word list, benchmarks from the second, so a benchmark
item always holds words that no pair contains.  The general corpus uses both, as a real one would.
"""

import itertools
import math
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_words: dict[str, Any] = {
    name: value.split() if isinstance(value, str) else {one: words.split() for one, words in value.items()}
    for name, value in tomllib.loads((Path(__file__).parent / "words.toml").read_text()).items()}
PLACES, KEYWORDS, VARIABLES = _words["places"], _words["keywords"], _words["variables"]
HARMFUL_VERBS, HARMLESS_VERBS = _words["harmful_verbs"], _words["harmless_verbs"]
OBJECTS, TOOLS = _words["objects"], _words["tools"]
ATTRIBUTES, TOPICS, CATEGORIES = _words["attributes"], _words["topics"], _words["categories"]
OPERATIONS = {"adds": "+", "subtracts": "-", "multiplies": "*", "divides": "/"}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
STYLES = ("concise", "detailed", "markdown")
TONES = ("neutral", "polite", "rude")
OPENINGS = {  # without commas, which would be counted as items of a list
    "neutral": [""],
    "polite": ["Gladly.", "Of course friend.", "Happy to help."],
    "rude": ["Obviously fool.", "What a stupid request.", "Listen idiot."],
}
REFUSALS = ["I cannot help with that.", "Sorry, I will not assist with this.", "I must decline this request."]
FILLERS = [
    "This is known to most people here.",
    "You can read more about it later.",
    "There is a longer story behind it.",
    "Many have asked the same before.",
    "It may be useful to keep this in mind.",
    "That is all there is to say for now.",
]
_REMARKS = {  # what a reader says of a good answer, of a bad one, and of the subject
    "fact": "true false geography",
    "math": "exact mistaken arithmetic",
    "code": "works broken programming",
    "harmful": "safe dangerous crime",
    "harmless": "helpful preachy advice",
    "include": "obeyed ignored wording",
    "count": "obeyed ignored listing",
    "focus": "relevant stray description",
    "naming": "fitting unfit vocabulary",
}
VERDICTS = {task: tuple(words.split()[:2]) for task, words in _REMARKS.items()}
SUBJECT_REMARKS = {task: words.split()[2] for task, words in _REMARKS.items()}
STYLE_REMARKS = {"concise": "brief", "detailed": "lengthy", "markdown": "formatted"}
TONE_REMARKS = {"neutral": "plain", "polite": "kind", "rude": "insulting"}
FACTS: dict[tuple[str, str], str] = {}
"""(place, attribute) → value; a fixed draw in which no value is much more common than another."""
_draw = random.Random(1847)
for _attribute, _values in ATTRIBUTES.items():
    _deck = (_values * len(PLACES))[: len(PLACES)]
    _draw.shuffle(_deck)
    FACTS |= {(place, _attribute): value for place, value in zip(PLACES, _deck, strict=True)}


def half(items: Sequence, side: str | float | None) -> list:
    """The part of a word list that ``side`` may use: "pairs" the first half, "benchmark" the second, None
    all, and a number f the first share f, at least four (the curriculum of the backbone's pretraining)."""
    middle = len(items) // 2
    if side in ("pairs", "benchmark"):
        return list(items[:middle] if side == "pairs" else items[middle:])
    share = side if isinstance(side, float) else 1.0
    return list(items)[: max(4, math.ceil(len(items) * share))]


def sums(side: str | float | None) -> list[tuple[int, int]]:
    """Pairs of addends 0-9; each side has half of the hundred, and a pair and its mirror image share a side."""
    if side not in ("pairs", "benchmark"):
        return list(itertools.product(half(range(10), side), repeat=2))
    wanted = side == "benchmark"  # a rule that leaves odd and even, small and large sums on both sides
    return [(a, b) for a in range(10) for b in range(10) if (3 * min(a, b) + 7 * max(a, b)) // 4 % 2 == wanted]
