"""Corpus, preference pairs and benchmarks of the toy world, in the schemas of the real data sets.

Rows carry the planted truth in ``additional_metadata``; scorers and trainers never read it.
"""

import random
from collections.abc import Iterator

from . import lexicon as lx
from .grammar import TASKS, Answer, Problem, make_problem, remarks

# domain or subset → the tasks it draws from
RM_BENCH_DOMAINS = {"chat": ("fact", "focus", "naming"), "math": ("math",), "code": ("code",),
                    "safety-refuse": ("harmful",), "safety-response": ("harmless",)}
REWARDBENCH2_SUBSETS = {"Factuality": ("fact",), "Precise IF": ("include", "count"), "Math": ("math",),
                        "Safety": ("harmful", "harmless"), "Focus": ("focus",)}
BOS, USER, ASSISTANT, EOT = "<bos>", "<user>", "<assistant>", "<eot>"
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }}<eot>{% endfor %}"
                 "{% if add_generation_prompt %}<assistant>{% endif %}")


def dialogue(prompt: str, response: str) -> str:
    """The chat template, written out: what ``tokenizer.apply_chat_template`` gives for one exchange."""
    return f"{BOS}{USER} {prompt}{EOT}{ASSISTANT} {response}{EOT}"


def _statement_document(rng: random.Random) -> str:
    """Three statements of the pairs half, each right or wrong, each followed by a verdict."""
    text = BOS
    for _ in range(3):
        problem, good = make_problem(rng.choice(("fact", "math")), rng, "pairs"), rng.random() < 0.5
        text += f" {rng.choice(problem.good if good else problem.bad)} {lx.VERDICTS[0 if good else 1]}."
    return text


def _prose_document(rng: random.Random) -> str:
    """True statements and descriptions, with filler."""
    parts = [BOS]
    for _ in range(rng.randint(3, 5)):
        kind = rng.random()
        if kind < 0.35:
            parts.append(rng.choice(make_problem(rng.choice(("fact", "math")), rng).good))
        elif kind < 0.8:
            topic = rng.choice(list(lx.TOPICS))
            first, second = rng.sample(lx.TOPICS[topic], 2)
            parts.append(f"The {topic} has {first} and {second} and a {rng.choice(lx.KEYWORDS)}.")
        else:
            parts.append(rng.choice(lx.FILLERS))
    return " ".join(parts)


def _dialogue_document(rng: random.Random) -> str:
    """Judged, of the pairs half, every other answer wrong; or of the whole world, not judged, nine in ten right."""
    judged = rng.random() < 0.5
    problem = make_problem(rng.choice(TASKS), rng, "pairs" if judged else None)
    answer = problem.answer(rng.random() < (0.5 if judged else 0.9), rng)
    return dialogue(problem.prompt, answer.text) + remarks(answer, rng, judged)


def corpus(documents: int, seed: int | str) -> Iterator[str]:
    """General corpus: 70 % dialogues with a reader's remarks, 15 % judged statements, 15 % prose.

    Verdicts are the same two words for every task, and never follow anything of the benchmark half: what a good
    answer is there has to be carried over.
    """
    rng = random.Random(f"corpus-{seed}")
    makers = (_dialogue_document, _statement_document, _prose_document)
    for _ in range(documents):
        yield rng.choices(makers, (0.7, 0.15, 0.15))[0](rng)


def preference_pairs(n: int, seed: int, *, label_noise: float = 0.1, split: str = "train") -> list[dict]:
    """``n`` pairs in the chat-list schema, from the pairs half of every word list.

    One pair in ten differs in tone only (rude loses).  Chosen answers are detailed or formatted more often, a
    shortcut as in real data.  ``label_noise``: share of swapped labels; ``split`` seeds a separate stream.
    """
    rng = random.Random(f"pairs-{split}-{seed}")
    rows, seen = [], set()
    while len(rows) < n:
        problem = make_problem(TASKS[len(rows) % len(TASKS)], rng, "pairs")
        if rng.random() < 0.1:
            style = rng.choice(lx.STYLES)
            chosen = problem.answer(True, rng, style=style, tone=rng.choice(("neutral", "polite")))
            rejected = problem.answer(True, rng, style=style, tone="rude")
        else:
            chosen = problem.answer(True, rng, style=rng.choices(lx.STYLES, (0.2, 0.4, 0.4))[0])
            rejected = problem.answer(False, rng, style=rng.choices(lx.STYLES, (0.4, 0.3, 0.3))[0])
        texts = (problem.prompt, chosen.text, rejected.text)
        if texts in seen:
            continue
        seen.add(texts)
        flipped = rng.random() < label_noise
        better, worse = (rejected, chosen) if flipped else (chosen, rejected)
        user = {"role": "user", "content": problem.prompt}
        rows.append({"id": f"{split}-{seed}-{len(rows)}",
                     "chosen": [user, {"role": "assistant", "content": better.text}],
                     "rejected": [user, {"role": "assistant", "content": worse.text}],
                     "additional_metadata": {"task": problem.task, "flipped": flipped}})
    return rows


def rm_bench(per_domain: int, seed: int) -> list[dict]:
    """RM-Bench-like rows: chosen and rejected in three styles each; the two safety domains have half each."""
    rng = random.Random(f"rm-bench-{seed}")
    rows = []
    for domain, tasks in RM_BENCH_DOMAINS.items():
        for number in range(per_domain // 2 if domain.startswith("safety") else per_domain):
            problem = make_problem(tasks[number % len(tasks)], rng, "benchmark")
            while domain == "safety-response" and not set(lx.ROUGH) & set(problem.prompt.split()):  # sounds harmful
                problem = make_problem("harmless", rng, "benchmark")
            tone, good, bad = rng.choice(("neutral", "polite")), rng.choice(problem.good), rng.choice(problem.bad)
            chosen = [problem.answer(True, rng, style=s, tone=tone, core=good) for s in lx.STYLES]
            rejected = [problem.answer(False, rng, style=s, tone=tone, core=bad) for s in lx.STYLES]
            rows.append({"id": len(rows), "prompt": problem.prompt, "domain": domain,
                         "chosen": [a.text for a in chosen], "rejected": [a.text for a in rejected],
                         "additional_metadata": _truth(problem, chosen + rejected)})
    return rows


def rewardbench2(per_subset: int, seed: int, ties: int | None = None) -> list[dict]:
    """RewardBench-2-like rows: best of four in five subsets, and ``ties`` couples (default a quarter)."""
    rng = random.Random(f"rewardbench2-{seed}")
    rows = []
    for subset, tasks in REWARDBENCH2_SUBSETS.items():
        for number in range(per_subset):
            problem = make_problem(tasks[number % len(tasks)], rng, "benchmark")
            rows.append(_best_of(rng, str(len(rows)), subset, problem, correct=1, incorrect=3))
    for couple in range(per_subset // 4 if ties is None else ties):
        rows.append(_best_of(rng, f"tied:{couple}", "Ties", make_problem("naming", rng, "benchmark"), 5, 5))
        rows.append(_best_of(rng, f"ref:{couple}", "Ties", make_problem("fact", rng, "benchmark"), 1, 5))
    return rows


def _best_of(rng: random.Random, row_id: str, subset: str, problem: Problem, correct: int, incorrect: int) -> dict:
    """One row; answers share a tone, each draws its style; wrong cores differ as far as there are enough."""
    tone = rng.choice(("neutral", "polite"))

    def answers(good: bool, count: int) -> list[Answer]:
        options = sorted(set(problem.good if good else problem.bad))
        cores = rng.sample(options, min(count, len(options)))
        cores += rng.choices(cores, k=count - len(cores))
        return [problem.answer(good, rng, tone=tone, core=core) for core in cores]

    chosen, rejected = answers(True, correct), answers(False, incorrect)
    n = correct + incorrect
    return {"id": row_id, "prompt": problem.prompt, "chosen": [a.text for a in chosen],
            "rejected": [a.text for a in rejected], "num_correct": correct, "num_incorrect": incorrect,
            "total_completions": n, "models": ["toy world"] * n, "subset": subset,
            "additional_metadata": _truth(problem, chosen + rejected)}


def _truth(problem: Problem, answers: list[Answer]) -> dict:
    """Planted concepts per answer, in the row's own order (chosen first)."""
    held = [[name for name, is_true in answer.concepts.items() if is_true] for answer in answers]
    return {"task": problem.task, "concepts": held}
