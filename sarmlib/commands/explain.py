"""``python -m sarmlib explain``: which features paid a reward, or decided a pair."""

from __future__ import annotations

import json
from pathlib import Path

from . import score

HELP = "take rewards apart into feature contributions z_i w_i, for a file of rows or one prompt; pairs as differences"


def add_arguments(parser) -> None:
    score.add_model(parser)
    parser.add_argument("--versus", help="with --prompt and one --response: explain why it is rewarded more than this")
    parser.add_argument("--top", type=int, help="largest contributions shown (default: 10 when printed, all in a file)")
    parser.add_argument("--labels", help="words for features: JSON {id: words}, or JSONL rows with feature and label")
    parser.add_argument("--figure", help="PNG of the contributions as a waterfall (one explanation only)")


def run(arguments) -> None:
    from ..artifacts import write_atomic
    from ..errors import ConfigError
    from ..figures import png
    from ..figures_pairs import waterfall
    labels = read_labels(arguments.labels)
    if arguments.versus is not None:
        if arguments.input or len(arguments.response) != 1:
            raise ConfigError("--versus needs --prompt and exactly one --response")
        pair = {"prompt": arguments.prompt, "chosen": arguments.response[0], "rejected": arguments.versus}
        from ..data.conversations import load_items
        items = load_items([pair])
    else:
        items = score.read_items(arguments)
    if arguments.top is not None and arguments.top < 1:
        raise ConfigError(f"--top {arguments.top}: at least 1 is needed")
    if arguments.figure and len(items) * (1 if items[0].is_pair else len(items[0].conversations)) != 1:
        raise ConfigError("--figure draws one explanation; give one prompt with one response, or --versus")
    scorer = score.load(arguments)
    top = arguments.top or (None if arguments.output else 10)
    found = explanations(scorer, items, arguments.max_length, top, labels, progress=len(items) > 50)
    if arguments.output:
        texts = [json.dumps(as_dict(item, name, one)) + "\n" for item, name, one in found]
        write_atomic(arguments.output, "".join(texts))
        print(f"{len(texts)} explanations in {arguments.output}")
        return
    for item, name, one in found:
        print(text(item, name, one))
        if arguments.figure:
            write_atomic(arguments.figure, png(waterfall(one)))
            print(f"figure: {arguments.figure}")


def explanations(scorer, items, max_length: int, top: int | None, labels, progress: bool):
    """(item, name, Explanation) for every conversation; a pair is one explanation of its margin, named "margin"."""
    from tqdm.auto import tqdm

    from ..sarm.attribution import explain, explain_pair
    for item in tqdm(items, desc="explaining", unit="row", disable=not progress):
        if item.is_pair:
            talks = item.conversations
            yield item, "margin", explain_pair(
                scorer.model, scorer.tokenizer, talks["chosen"][:-1], talks["chosen"][-1]["content"],
                talks["rejected"][-1]["content"], top, max_length=max_length, labels=labels)
            continue
        for name, talk in item.conversations.items():
            yield item, name, explain(scorer.model, scorer.tokenizer, talk, top, max_length=max_length, labels=labels)


def as_dict(item, name: str, one) -> dict:
    """An explanation as JSON: row, id, of, reward, n_active, rest, features [{feature, z, w, contribution, label}]."""
    return {"row": item.row, "id": item.id, "of": name, "reward": one.reward, "n_active": one.n_active,
            "rest": one.rest, "features": one.table.to_dict("records")}


def text(item, name: str, one) -> str:
    """An explanation for a terminal; the rows and the rest add up to the reward."""
    table = one.table.copy()
    if "label" in table:  # labels may come from anywhere: no control characters on the terminal
        table["label"] = ["".join(c if c.isprintable() else "?" for c in word)[:60] for word in table["label"]]
    body = table.to_string(index=False, float_format=lambda value: f"{value:+.4f}")
    what = "margin (chosen - rejected)" if name == "margin" else f"reward of {name}"
    more = one.n_active - len(table)
    rest = f"{more} more features: {one.rest:+.4f}\n" if more else ""
    return f"row {item.row}, {what}: {one.reward:+.4f}\n{body}\n{rest}"


def read_labels(path: str | None) -> dict[int, str] | None:
    """feature -> words; DataError naming the line that holds neither."""
    from ..data.files import iter_rows
    from ..errors import DataError
    if path is None:
        return None
    try:
        if Path(path).suffix == ".json":
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return {int(key): str(value) for key, value in found.items()}
        return {int(row["feature"]): str(row["label"]) for row in iter_rows(path)}  # type: ignore[index]
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise DataError(f"--labels {path}: {error!r}; needed: JSON {{id: words}}, or JSONL rows with feature and label"
                        ) from None
