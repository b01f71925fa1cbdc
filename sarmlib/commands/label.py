"""``python -m sarmlib label``: label a run's features with a chat model, and score every label on held-out prompts."""

from __future__ import annotations

from pathlib import Path

from . import browse, judge

HELP = "label a finished run's features with a chat model; its labels and keyword labels meet the same held-out sample"


def add_arguments(parser) -> None:
    judge.add_endpoint(parser)
    browse.add_run(parser)
    parser.add_argument("--features", type=int, default=40, help="features to label, largest contributions first")
    parser.add_argument("--self-grade", action="store_true", help="also ask for the paper's 1-5 rating; used nowhere")


def run(arguments) -> None:
    from ..errors import ConfigError
    if arguments.features < 1:
        raise ConfigError(f"--features {arguments.features}: at least 1 is needed")
    found, seed = browse.open_run(arguments)
    spec = found.profile.interpretation
    label_all(found.contexts(seed), arguments, spec.permutations, spec.top_keywords)


def label_all(contexts, arguments, permutations: int, top: int) -> None:
    """Ask, judge, and write ``labels.jsonl``: a row per feature, explainer and judge, with `judge_labels`' columns."""
    from ..artifacts import write_atomic
    from ..interpretation.explainers import KeywordExplainer
    from ..interpretation.judges import KeywordJudge, TfidfJudge, judge_labels
    from ..interpretation.llm import LLMExplainer, LLMJudge
    from ..stages import label_candidates
    endpoint = judge.make_endpoint(arguments)
    features = [int(one) for one in label_candidates(contexts.features(), arguments.features).feature]
    explainer = LLMExplainer(endpoint, contexts, self_grade=arguments.self_grade)
    asked = [messages for messages in map(explainer.messages, features) if messages is not None]
    judge.print_estimate(endpoint.estimate(asked))
    print(f"then, for each label, up to 600 short questions about held-out responses ({len(features)} features, two "
          "kinds of labels)", flush=True)
    if arguments.dry_run:
        return
    keywords = KeywordExplainer(contexts, permutations=permutations, top=top)
    made = {"llm": explainer.explain_all(features), "keyword": keywords.explain_all(features)}
    judges: dict = {"llm": LLMJudge(endpoint), "keyword": KeywordJudge(keywords.vocabulary),
                    "tfidf": TfidfJudge(keywords.vocabulary)}
    lines = []
    for kind, by in (("llm", "llm"), ("llm", "tfidf"), ("keyword", "llm"), ("keyword", "tfidf"),
                     ("keyword", "keyword")):
        table = judge_labels(contexts, made[kind], judges[by])
        table.insert(1, "explainer", kind)
        table.insert(2, "judge", by)
        table["self_grade"] = [label.self_grade for label in made[kind]]
        lines.append(table.to_json(orient="records", lines=True).rstrip("\n"))
        scored = table["auroc"].notna().sum()
        print(f"{kind} labels by the {by} judge: {int(table.reliable.sum())} reliable of {scored} scored, "
              f"{sum(label.abstained for label in made[kind])} abstained")
    target = write_atomic(Path(arguments.output) / "labels.jsonl", "\n".join(lines) + "\n")
    print(f"{target}; spent {endpoint.spent:.6g}")
