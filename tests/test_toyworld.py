"""The toy world says what is true: every answer is judged again here, from its text and its prompt alone."""

import hashlib
import json
import random
import re

import pytest
from transformers import AutoTokenizer

from sarmlib.chat import encode_conversations
from sarmlib.data.toyworld import BACKBONE_DIR, datasets
from sarmlib.data.toyworld import lexicon as lx
from sarmlib.data.toyworld.grammar import TASKS, make_problem
from tools.backbone import build_tokenizer

PAIRS = datasets.preference_pairs(1500, seed=0)
BENCHMARKS = {"rm_bench": datasets.rm_bench(80, 0), "rewardbench2": datasets.rewardbench2(80, 0)}
SIGNS = {"adds": "+", "subtracts": "-", "multiplies": "*", "divides": "/"}
NUMBERS = {"two": 2, "three": 3, "four": 4}


def core_of(text):
    """The one sentence that is right or wrong: the answer without opening, heading, bullets and fillers."""
    for phrase in [p for phrases in lx.OPENINGS.values() for p in phrases if p] + lx.FILLERS + ["# Answer"]:
        text = text.replace(phrase, "")
    return " ".join(re.sub(r"^- ", "", line).strip() for line in text.split("\n")).strip()


def refuses(core):
    return any(words in core for words in ("cannot help", "will not assist", "must decline"))


def judge(prompt, core):
    """(task, whether the core answers the prompt rightly)."""
    if found := re.fullmatch(r"(?:What is|Tell me) the (\w+) of (\w+)[?.]", prompt):
        said = re.fullmatch(rf"The {found[1]} of {found[2]} is (\w+)\.", core)
        return "fact", lx.FACTS[found[2], found[1]] == said[1]
    if found := re.fullmatch(r"(?:What is|Add) (\d+) (?:plus|and) (\d+)[?.]", prompt):
        said = re.fullmatch(rf"{found[1]} plus {found[2]} is (\d+)\.", core)
        return "math", int(found[1]) + int(found[2]) == int(said[1])
    if found := re.fullmatch(r"Write code that (\w+) (\d) (to|from|into|out of) (\w+)\.", prompt):
        verb, number, _, variable = found.groups()
        assert re.fullmatch(r"\w+ = \w+ [-+*/] \d;", core)
        return "code", core == f"{variable} = {variable} {SIGNS[verb]} {number};"
    if found := re.fullmatch(r"(?:How do I|Explain how to) (\w+) the (\w+)[?.]", prompt):
        harmful = found[1] in lx.ROUGH and found[2] in lx.DEAR
        assert found[1] in lx.ROUGH + lx.GENTLE and found[2] in lx.DEAR + lx.WASTE
        assert refuses(core) or f"then {found[1]} the {found[2]} " in core
        return ("harmful", refuses(core)) if harmful else ("harmless", not refuses(core))
    if found := re.fullmatch(r"Describe the (\w+) and use the word (\w+)\.", prompt):
        said = re.fullmatch(rf"The {found[1]} has (\w+) and (\w+) and a \w+\.", core)
        assert {said[1], said[2]} <= set(lx.TOPICS[found[1]])
        return "include", found[2] in core.replace(".", "").split()
    if found := re.fullmatch(r"List (\w+) words of the kind (\w+)\.", prompt):
        listed = core.removesuffix(".").split(", ")
        assert set(listed) <= set(lx.CATEGORIES[found[2]]) and len(set(listed)) == len(listed)
        return "count", len(listed) == NUMBERS[found[1]]
    if found := re.fullmatch(r"(?:Tell me about|What is in) the (\w+)[?.]", prompt):
        said = re.fullmatch(r"(?:The (\w+) has many (\w+) and some (\w+)|You see (\w+) there, and also (\w+))\.", core)
        named = {word for word in said.groups()[1:] if word}
        hits = named & set(lx.TOPICS[found[1]])
        assert len(named) == 2 and hits in (set(), named) and said[1] in (None, found[1]) or not hits
        return "focus", hits == named
    if found := re.fullmatch(r"Name one word of the kind (\w+)\.", prompt):
        return "naming", re.fullmatch(r"One is (\w+)\.", core)[1] in lx.CATEGORIES[found[1]]
    raise AssertionError(f"no rule for {prompt!r}")


def test_concepts_are_the_truth_about_the_conversation():
    rng = random.Random(2)
    for number in range(900):
        task, good = TASKS[number % len(TASKS)], rng.random() < 0.5
        problem = make_problem(task, rng)
        answer = problem.answer(good, rng)
        held = {name for name, is_true in answer.concepts.items() if is_true}
        topic = next((t for t in lx.TOPICS if re.search(rf"the {t}\b", problem.prompt) and "kind" not in problem.prompt
                      and task in ("include", "focus")), None)
        wanted = {f"task:{task}", f"style:{answer.style}"} | ({f"topic:{topic}"} if topic else set())
        wanted |= {"good"} if good else {f"defect:{lx.DEFECTS[task]}"}
        wanted |= {f"tone:{answer.tone}"} - {"tone:neutral"}
        wanted |= {"refusal"} if refuses(answer.text) else set()
        assert held == wanted, (problem.prompt, answer.text)


def test_pairs_prefer_the_good_answer_or_the_friendly_one():
    tone_only = 0
    for row in PAIRS:
        prompt = row["chosen"][0]["content"]
        assert row["rejected"][0]["content"] == prompt and [m["role"] for m in row["chosen"]] == ["user", "assistant"]
        better, worse = ("rejected", "chosen") if row["additional_metadata"]["flipped"] else ("chosen", "rejected")
        texts = [row[side][1]["content"] for side in (better, worse)]
        (task, first), (_, second) = (judge(prompt, core_of(text)) for text in texts)
        assert task == row["additional_metadata"]["task"] and first
        if second:
            tone_only += 1
            rude = [any(opening in text for opening in lx.OPENINGS["rude"]) for text in texts]
            assert rude == [False, True]
    assert 0.07 < tone_only / len(PAIRS) < 0.13
    shares = [sum(r["additional_metadata"]["task"] == task for r in PAIRS) / len(PAIRS) for task in TASKS]
    assert max(shares) - min(shares) < 0.01


def test_benchmark_answers_are_right_and_wrong_as_labelled_and_harmless_requests_sound_harmful():
    for name, rows in BENCHMARKS.items():
        for row in rows:
            truth = row["additional_metadata"]
            sides = [(text, True) for text in row["chosen"]] + [(text, False) for text in row["rejected"]]
            assert len(truth["concepts"]) == len(sides)
            for (text, good), concepts in zip(sides, truth["concepts"], strict=True):
                assert judge(row["prompt"], core_of(text)) == (truth["task"], good), (name, row["id"])
                assert ("good" in concepts) == good and not any(o in text for o in lx.OPENINGS["rude"])
    asked = [row["prompt"] for row in BENCHMARKS["rm_bench"] if row["domain"] == "safety-response"]
    assert len(asked) == 40 and all(any(f" {act} the " in prompt for act in lx.ROUGH) for prompt in asked)


SUM, FACT = re.compile(r"(\d) (?:plus|and) (\d)"), re.compile(r"[Tt]he (crop|metal|emblem) of (\w+)")
REQUEST = re.compile(r"(?:do I|how to|then) (\w+) the (\w+)")
OPEN = {"keywords": lx.KEYWORDS, "topics": list(lx.TOPICS), "variables": lx.VARIABLES,
        **{f"words of the kind {name}": words for name, words in lx.CATEGORIES.items()}}


def held(texts):
    """(words, combinations by kind) that texts hold."""
    return ({word for text in texts for word in re.findall(r"\w+", text)},
            [{one for text in texts for one in pattern.findall(text)} for pattern in (SUM, FACT, REQUEST)])


def test_benchmark_items_hold_what_no_pair_holds_and_no_reader_judges():
    pairs = [m["content"] for row in datasets.preference_pairs(6000, 1) for m in [*row["chosen"], row["rejected"][1]]]
    tests = [text for rows in (datasets.rm_bench(400, 1), datasets.rewardbench2(400, 1)) for row in rows
             for text in (row["prompt"], *row["chosen"], *row["rejected"])]
    judged = [text for text in datasets.corpus(12_000, 1) if re.search(r"\b(?:Right|Wrong)\.", text)]
    used, asked = held(tests)
    for words, combinations in (held(pairs), held(judged)):
        for ours, theirs, least in zip(combinations, asked, (20, 100, 400), strict=True):
            assert len(ours) > least and len(theirs) > least and not ours & theirs
        for name, open_list in OPEN.items():
            both = set(open_list) & words & used
            assert not both, f"{name} on both sides: {both}"
    for name, open_list in OPEN.items():
        assert set(lx.half(open_list, "benchmark")) <= used, f"{name}: the benchmarks use few"


def test_of_both_halves_there_are_answers_that_nobody_judges_and_most_are_right():
    good = {True: [], False: []}
    for text in datasets.corpus(6000, 2):
        if "<assistant>" in text and not re.search(r"\b(?:Right|Wrong)\.", text):
            prompt, answer = re.fullmatch(r"<bos><user> (.*)<eot><assistant> (.*)<eot>.*", text, re.DOTALL).groups()
            if request := REQUEST.search(prompt):
                ours = lx.requests(True, "benchmark") + lx.requests(False, "benchmark")
                good[request.groups() in ours].append(judge(prompt, core_of(answer))[1])
    for found in good.values():
        assert len(found) > 100 and 0.7 < sum(found) / len(found) < 0.97


def test_the_worlds_own_bytes():
    """Every number of the toy profile was measured on this text."""
    made = json.dumps([list(datasets.corpus(300, "golden")), datasets.preference_pairs(100, 0),
                       datasets.preference_pairs(50, 1, split="eval"), datasets.rm_bench(20, 0),
                       datasets.rewardbench2(20, 0)])
    assert hashlib.sha256(made.encode()).hexdigest()[:16] == "b23d102e2ddee689"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_no_text_of_the_world_has_an_unknown_word(tokenizer):
    texts = [datasets.dialogue(*(m["content"] for m in row[side])) for row in PAIRS for side in ("chosen", "rejected")]
    texts += [datasets.dialogue(row["prompt"], text) for rows in BENCHMARKS.values() for row in rows
              for text in row["chosen"] + row["rejected"]]
    texts += datasets.corpus(1500, "other")
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def test_chat_template_is_dialogue(tokenizer):
    for row in PAIRS[:40]:
        written = datasets.dialogue(row["chosen"][0]["content"], row["chosen"][1]["content"])
        assert tokenizer.apply_chat_template(row["chosen"], tokenize=False) == written
        ids, = encode_conversations(tokenizer, [row["chosen"]], 128)
        assert ids == tokenizer.encode(written, add_special_tokens=False)
    asked = tokenizer.apply_chat_template(PAIRS[0]["chosen"][:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<eot><assistant>")


def test_the_shipped_tokenizer_is_the_one_this_code_builds(tokenizer):
    shipped = AutoTokenizer.from_pretrained(BACKBONE_DIR)
    assert shipped.get_vocab() == tokenizer.get_vocab(), "the lexicon has changed since: make backbone"
    assert shipped.chat_template == tokenizer.chat_template
    texts = [*datasets.corpus(100, "shipped")]
    assert shipped(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "padding_side", "truncation_side"):
        assert getattr(shipped, name) == getattr(tokenizer, name)
    config = json.loads((BACKBONE_DIR / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    assert (BACKBONE_DIR / "model.safetensors").stat().st_size <= 5_000_000
