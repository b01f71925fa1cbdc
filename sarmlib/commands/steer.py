"""``python -m sarmlib steer``: multiply head weights of a saved SARM, or undo that."""

from __future__ import annotations

from pathlib import Path

HELP = "multiply (or add to) head weights of a saved SARM; the edit is recorded in its config and can be undone"


def add_arguments(parser) -> None:
    parser.add_argument("--model", required=True, help="folder of a saved SARM")
    parser.add_argument("--feature", action="append", default=[], metavar="ID=FACTOR", help="may be given many times")
    parser.add_argument("--add", action="append", default=[], metavar="ID=VALUE", help="added to the weight instead")
    parser.add_argument("--undo", action="store_true", help="undo every recorded edit")
    parser.add_argument("--output", required=True, help="folder of the edited model; must not exist")


def run(arguments) -> None:
    from ..errors import ConfigError
    factors, added = _pairs(arguments.feature, "--feature"), _pairs(arguments.add, "--add")
    if arguments.undo == bool(factors or added):
        raise ConfigError("give --feature ID=FACTOR or --add ID=VALUE (many are allowed), or --undo alone")
    if Path(arguments.output).exists():
        raise ConfigError(f"--output {arguments.output} exists; name a new folder")
    from ..backbone import load_tokenizer
    from ..errors import ModelError
    from ..sarm.model import SarmForSequenceClassification
    from ..sarm.steering import steer, unsteer
    model = SarmForSequenceClassification.from_pretrained(arguments.model)
    recorded = list(getattr(model.config, "sarm_edits", None) or [])
    edited = unsteer(model) if arguments.undo else steer(model, factors, add=added)
    work = Path(f"{arguments.output}.partial")
    edited.save_pretrained(work)
    try:
        load_tokenizer(Path(arguments.model)).save_pretrained(work)
    except ModelError:
        print("no tokenizer beside the model; none was copied")
    work.rename(arguments.output)
    for edit in recorded if arguments.undo else edited.config.sarm_edits[len(recorded):]:
        before, after = (edit["after"], edit["before"]) if arguments.undo else (edit["before"], edit["after"])
        print(f"feature {edit['feature']}: weight {before:+.6g} -> {after:+.6g}")
    print(f"saved {arguments.output}")


def _pairs(texts: list[str], option: str) -> dict[int, float]:
    from ..errors import ConfigError
    found: dict[int, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            key, number = int(name), float(value)
        except ValueError:
            raise ConfigError(f"{option} {text!r}: give ID=NUMBER, for example 123=8") from None
        if key in found:
            raise ConfigError(f"{option} names feature {key} twice")
        found[key] = number
    return found
