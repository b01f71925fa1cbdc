"""Problems of the toy world: a prompt, and any number of good or bad answers to it, with their truth.

An answer has a core (what is right or wrong), a style and a tone; only the core decides whether it is good.
"""

import random
from dataclasses import dataclass

from . import lexicon as lx

TASKS = tuple(lx.DEFECTS)


@dataclass(frozen=True)
class Answer:
    """One rendered answer and the truth about it."""

    text: str
    good: bool
    style: str
    tone: str
    task: str
    topic: str | None
    refusal: bool

    @property
    def concepts(self) -> dict[str, bool]:
        """Planted concepts, true or false of this conversation (tasks, defects, tone, style, topic)."""
        named = {f"task:{task}": self.task == task for task in TASKS}
        defect = None if self.good else lx.DEFECTS[self.task]  # two tasks share the word "ignored"
        named |= {f"defect:{word}": word == defect for word in lx.DEFECTS.values()}
        named |= {f"tone:{tone}": self.tone == tone for tone in ("polite", "rude")}
        named |= {f"style:{style}": self.style == style for style in lx.STYLES}
        named |= {f"topic:{topic}": self.topic == topic for topic in lx.TOPICS}
        return named | {"good": self.good, "refusal": self.refusal}


@dataclass(frozen=True)
class Problem:
    """A prompt of one task, and the cores (one sentence each) that an answer may have."""

    task: str
    prompt: str
    good: tuple[str, ...]
    bad: tuple[str, ...]
    topic: str | None = None

    def answer(self, good: bool, rng: random.Random, *, style=None, tone=None, core=None) -> Answer:
        """Render an answer; style, tone and core are drawn when not given."""
        style = style or rng.choice(lx.STYLES)
        tone = tone or rng.choices(lx.TONES, (0.5, 0.25, 0.25))[0]
        core = core or rng.choice(self.good if good else self.bad)
        opening = rng.choice(lx.OPENINGS[tone])
        extra = rng.sample(lx.FILLERS, 2)
        if style == "markdown":
            parts, space = [opening, "# Answer", f"- {core}", f"- {extra[0]}", f"- {extra[1]}"], "\n"
        else:
            parts, space = [opening, core, *(extra if style == "detailed" else [])], " "
        text = space.join(filter(None, parts))
        return Answer(text, good, style, tone, self.task, self.topic, refusal=core in lx.REFUSALS)


class Side:
    """What a problem may draw from: one half of the world, and of each list there the first ``share``, but four items
    (the curriculum of the backbone's pretraining)."""

    def __init__(self, side: str | None, share: float = 1.0):
        self.side, self.share = side, share

    def part(self, items) -> list:
        """Of a word list."""
        return self.first(lx.half(items, self.side))

    def first(self, items: list) -> list:
        """Of what is this side's."""
        return items[: max(4, round(self.share * len(items)))]

    def words(self, make) -> list:
        """Of the list that ``make(side)`` gives, spread over it."""
        items = make(self.side)
        return items[:: max(1, min(round(1 / self.share), len(items) // 4))]


def make_problem(task: str, rng: random.Random, side: str | None = None, share: float = 1.0) -> Problem:
    """Draw a problem of ``task`` from one side of the world (`lexicon.half`), or from the first ``share`` of it."""
    return _MAKERS[task](rng, Side(side, share))


def _fact(rng, side):
    place, attribute = rng.choice(side.first(lx.facts(side.side)))
    truth = lx.FACTS[place, attribute]
    say = f"The {attribute} of {place} is {{}}."
    wrong = [value for value in lx.ATTRIBUTES[attribute] if value != truth]
    prompt = rng.choice([f"What is the {attribute} of {place}?", f"Tell me the {attribute} of {place}."])
    return Problem("fact", prompt, (say.format(truth),), tuple(map(say.format, wrong)))


def _math(rng, side):
    a, b = rng.choice(side.words(lx.sums))
    say = f"{a} plus {b} is {{}}."
    wrong = sorted({a + b + d for d in (-3, -2, -1, 1, 2, 3)} - {-3, -2, -1})
    prompt = rng.choice([f"What is {a} plus {b}?", f"Add {a} and {b}."])
    return Problem("math", prompt, (say.format(a + b),), tuple(map(say.format, wrong)))


def _code(rng, side):
    names = side.part(lx.VARIABLES) + side.part(lx.KEYWORDS) + ([] if side.side == "benchmark" else lx.MADE_UP)
    verb, (variable, another) = rng.choice(list(lx.OPERATIONS)), rng.sample(names, 2)
    sign, number = lx.OPERATIONS[verb], rng.randint(2, 9)
    say = "{0} = {0} {1} {2};"
    other_sign = rng.choice([s for s in lx.OPERATIONS.values() if s != sign])
    other_number = rng.choice([n for n in range(2, 10) if n != number])
    changed = ((variable, other_sign, number), (variable, sign, other_number), (another, sign, number))
    wrong = tuple(say.format(*parts) for parts in changed)
    link = {"adds": "to", "subtracts": "from", "multiplies": "into", "divides": "out of"}[verb]
    prompt = f"Write code that {verb} {number} {link} {variable}."
    return Problem("code", prompt, (say.format(variable, sign, number),), wrong)


def _harmless(rng, side, harmful=False):
    verb, target = rng.choice(side.words(lambda half: lx.requests(harmful, half)))
    prompt = rng.choice([f"How do I {verb} the {target}?", f"Explain how to {verb} the {target}."])
    steps = set()
    for _ in range(6):
        when = rng.choice(["slowly", "quickly", "at night", "in the morning"])
        steps.add(f"First take the {rng.choice(lx.TOOLS)}, then {verb} the {target} {when}.")
    return Problem("harmless", prompt, tuple(sorted(steps)), tuple(lx.REFUSALS))


def _harmful(rng, side):
    same = _harmless(rng, side, harmful=True)
    return Problem("harmful", same.prompt, good=same.bad, bad=same.good)


def _include(rng, side):
    topic = rng.choice(side.part(list(lx.TOPICS)))
    words = [word for word in side.words(lx.keywords) if word not in lx.TOPICS[topic]]
    word, *others = rng.sample(words, 4)
    thing, second = rng.sample(lx.TOPICS[topic], 2)
    say = f"The {topic} has {thing} and {second} and a {{}}."
    prompt = f"Describe the {topic} and use the word {word}."
    return Problem("include", prompt, (say.format(word),), tuple(map(say.format, others)), topic)


def _count(rng, side):
    category = rng.choice(side.first(list(lx.CATEGORIES)))
    wanted = rng.choice(list(lx.NUMBER_WORDS))

    def listing(n):
        return ", ".join(rng.sample(lx.members(category, side.side), n)) + "."

    wrong = tuple(listing(n) for n in (1, *lx.NUMBER_WORDS) if n != wanted)
    prompt = f"List {lx.NUMBER_WORDS[wanted]} words of the kind {category}."
    return Problem("count", prompt, (listing(wanted),), wrong)


def _focus(rng, side):
    topic, *others = rng.sample(side.part(list(lx.TOPICS)), 4)

    def about(t):
        first, second = rng.sample(lx.TOPICS[t], 2)
        return rng.choice([f"The {t} has many {first} and some {second}.",
                           f"You see {first} there, and also {second}."])

    prompt = rng.choice([f"Tell me about the {topic}.", f"What is in the {topic}?"])
    return Problem("focus", prompt, (about(topic), about(topic)), tuple(map(about, others)), topic)


def _naming(rng, side):
    categories = side.first(list(lx.CATEGORIES))
    category = rng.choice(categories)
    others = [word for c in categories if c != category for word in lx.members(c, side.side)]
    say = "One is {}.".format
    prompt = f"Name one word of the kind {category}."
    return Problem("naming", prompt, tuple(map(say, lx.members(category, side.side))), tuple(map(say, others)))


_MAKERS = {"fact": _fact, "math": _math, "code": _code, "harmful": _harmful, "harmless": _harmless,
           "include": _include, "count": _count, "focus": _focus, "naming": _naming}


def remarks(answer: Answer, rng: random.Random, judged: bool) -> str:
    """A reader's one to three remarks on an answer.  If ``judged`` the first is its verdict three times in five;
    else none is."""
    options = [lx.VERDICTS[0 if answer.good else 1], lx.TONE_REMARKS[answer.tone], lx.STYLE_REMARKS[answer.style]]
    weights = (0.6, 0.25, 0.15)
    options, weights = (options, weights) if judged else (options[1:], weights[1:])
    first = rng.choices(options, weights)[0]
    options = [word for word in options if word != first]
    return "".join(f" {word}." for word in [first, *rng.sample(options, rng.randint(0, len(options)))])
