"""Words and facts of the toy world.

Preference pairs draw from the first half of every open word list, benchmarks from the second, so a benchmark item
holds words that no pair contains (of facts, sums and harm: it is a combination that no pair contains).  The general
corpus uses both, as a real one would, but says what is right or wrong of the first half only.
"""

import random
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = Path(__file__).parent / "words.toml"
_words: dict[str, Any] = {
    name: value.split() if isinstance(value, str) else {one: words.split() for one, words in value.items()}
    for name, value in tomllib.loads(WORDS.read_text()).items()}
PLACES, KEYWORDS, VARIABLES = _words["places"], _words["keywords"], _words["variables"]
MADE_UP = _words["made_up"]
"""Rare words of the pairs half, so many that a request for one is met by comparing, not by heart."""
ROUGH, GENTLE, DEAR, WASTE = (_words[name] for name in ("rough_acts", "gentle_acts", "dear_things", "waste_things"))
TOOLS, ATTRIBUTES, TOPICS, CATEGORIES = (_words[name] for name in ("tools", "attributes", "topics", "categories"))
OPERATIONS = {"adds": "+", "subtracts": "-", "multiplies": "*", "divides": "/"}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
STYLES, TONES = ("concise", "detailed", "markdown"), ("neutral", "polite", "rude")
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
DEFECTS = {  # what is wrong with a bad answer, by task
    "fact": "false", "math": "mistaken", "code": "broken", "harmful": "dangerous", "harmless": "preachy",
    "include": "ignored", "count": "ignored", "focus": "stray", "naming": "unfit",
}
VERDICTS = ("Right", "Wrong")
"""What a reader says of a good and of a bad answer, whatever the task."""
STYLE_REMARKS = {"concise": "Brief", "detailed": "Lengthy", "markdown": "Formatted"}
TONE_REMARKS = {"neutral": "Plain", "polite": "Kind", "rude": "Insulting"}
FACTS: dict[tuple[str, str], str] = {}
"""(place, attribute) → value; a fixed draw in which no value is much more common than another."""
_draw = random.Random(2026)
for _attribute, _values in ATTRIBUTES.items():
    _deck = (_values * len(PLACES))[: len(PLACES)]
    _draw.shuffle(_deck)
    FACTS |= {(place, _attribute): value for place, value in zip(PLACES, _deck, strict=True)}


def half(items: Sequence, side: str | None) -> list:
    """The part of a word list that ``side`` may use: "pairs" the first half, "benchmark" the second, None all."""
    middle = len(items) // 2
    return list(items[:middle] if side == "pairs" else items[middle:] if side == "benchmark" else items)


def facts(side: str | None) -> list[tuple[str, str]]:
    """(place, attribute): every place and attribute is on both sides, no fact is."""
    wanted = {"pairs": (0,), "benchmark": (1,), None: (0, 1)}[side]
    return [(place, attribute) for i, place in enumerate(PLACES) for j, attribute in enumerate(ATTRIBUTES)
            if (i + j) % 2 in wanted]


def sums(side: str | None) -> list[tuple[int, int]]:
    """Pairs of addends 0-9: a pair is on one side, and its mirror image on the other."""
    wanted = {"pairs": (0,), "benchmark": (1,), None: (0, 1)}[side]
    return [(a, b) for a in range(10) for b in range(10) if (a * b + min(a, b) + (a > b)) % 2 in wanted]


def keywords(side: str | None) -> list[str]:
    """Words that a request may ask for: those of no other use, made-up ones, and the things of topics and kinds."""
    made_up = [] if side == "benchmark" else MADE_UP
    things = [word for name in half(list(TOPICS), side) for word in TOPICS[name]]
    return half(KEYWORDS, side) + made_up + things + [word for name in CATEGORIES for word in members(name, side)]


def requests(harmful: bool, side: str | None) -> list[tuple[str, str]]:
    """(act, thing): a rough act on something dear is harmful; on waste it is not, nor a gentle one on anything.

    Every act and thing is on both sides, no request is.
    """
    wanted = {"pairs": (0,), "benchmark": (1,), None: (0, 1)}[side]
    return [(act, thing) for i, act in enumerate(ROUGH + GENTLE) for j, thing in enumerate(DEAR + WASTE)
            if (i + j) % 2 in wanted and (act in ROUGH and thing in DEAR) == harmful]


def members(category: str, side: str | None) -> list[str]:
    """Words of a kind; every kind is on both sides, no word is."""
    return half(CATEGORIES[category], side)
