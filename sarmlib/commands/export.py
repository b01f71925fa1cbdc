"""``python -m sarmlib export``: a finished run's features and labels for other programs, and for people to judge."""

from __future__ import annotations

import json
from pathlib import Path

from . import browse

HELP = "write features, labels and examples of a finished run as JSON Lines, for Neuronpedia, or as a sheet to fill in"


def add_arguments(parser) -> None:
    browse.add_run(parser)
    parser.add_argument("--output", required=True, help="folder of the files")
    parser.add_argument("--features", type=int, default=500, help="most features: labelled ones first")
    parser.add_argument("--redact", action="store_true", help="no text of prompts, responses and labels")
    parser.add_argument("--neuronpedia", action="store_true", help="also Neuronpedia's import layout")
    parser.add_argument("--sheet", action="store_true", help="also sheet.csv: held-out questions for a person")
    parser.add_argument("--filled", help="a filled-in sheet.csv: score every label by its answers (human.jsonl)")


def run(arguments) -> None:
    from ..artifacts import write_atomic
    from ..errors import ConfigError
    from ..export import write_jsonl, write_neuronpedia
    from ..gallery import browser_of
    from ..interpretation.human import HumanJudge, write_sheet
    from ..interpretation.judges import MIN_POSITIVES, judge_labels
    if arguments.redact and arguments.sheet:
        raise ConfigError("--sheet shows responses to a person; it cannot be redacted")
    judge = HumanJudge(arguments.filled) if arguments.filled else None
    found, seed = browse.open_run(arguments)
    browser, provenance = browser_of(found, seed, redact=arguments.redact, n_features=arguments.features)
    target = Path(arguments.output)
    n = write_jsonl(browser, target)
    write_atomic(target / "provenance.json", json.dumps(provenance, indent=2) + "\n")
    print(f"{n} features in {target / 'features.jsonl'}, described by {target / 'schema.json'}")
    if arguments.neuronpedia:
        write_neuronpedia(browser, target / "neuronpedia", model=f"sarm-{found.profile.name}",
                          source=f"{found.shape['layer']}-sarm-reward", tokenizer=found.tokenizer,
                          max_length=found.profile.benchmarks.max_length)
        print(f"Neuronpedia's layout in {target / 'neuronpedia'}")
    labels = list(browser.labels.values())
    if arguments.sheet:
        asked = write_sheet(target / "sheet.csv", browser.contexts, labels, seed=browser.seed)
        print(f"{asked} questions in {target / 'sheet.csv'}: fill in the column matches, then --filled sheet.csv")
    if judge is not None:
        table = judge_labels(browser.contexts, labels, judge, n_per_class=MIN_POSITIVES, seed=browser.seed)
        write_atomic(target / "human.jsonl", table.to_json(orient="records", lines=True))
        print(f"{int(table.reliable.sum())} of {int(table.auroc.notna().sum())} scored labels are reliable by these "
              f"answers: {target / 'human.jsonl'}")
