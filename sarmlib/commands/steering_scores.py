"""``python -m sarmlib steering-scores``: the steering analysis on anybody's scores before and after an edit."""

from __future__ import annotations

from pathlib import Path

HELP = "Figure 3, the confound plot and the matched estimate for your own table of rewards before and after steering"


def add_arguments(parser) -> None:
    parser.add_argument("--target", required=True, metavar="FILE",
                        help="the released format {id: {reward, reward_steered, activated_latents}} of T; without "
                             "--complement a CSV, JSON, JSONL or Parquet table of both sets with reward, "
                             "reward_steered, active, is_target and, if known, group (prompt) and category")
    parser.add_argument("--complement", metavar="FILE", help="the released format of the complement C")
    parser.add_argument("--min-reward", type=float, help="match on base reward >= this (default: ten quantile bins)")
    parser.add_argument("--output", required=True, help="folder for tables and figures")


def run(arguments) -> None:
    import json

    from .. import figures
    from ..artifacts import write_atomic, write_json
    from ..sarm.steering import matched_difference, summarise_shift
    table = read_scores(arguments.target, arguments.complement)
    summary = summarise_shift(table)
    matched = {"C": matched_difference(table, min_reward=arguments.min_reward)}
    for name in sorted(set(table.category) - {"T", "C"}):
        against = (table.category == name).to_numpy()
        if against.any() and not table.is_target[against].any():
            matched[name] = matched_difference(table, min_reward=arguments.min_reward, against=against)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "shift.csv", summary.to_csv(index=False))
    write_json(folder / "matched.json", json.loads(json.dumps(matched, default=float)))
    for name, fig in (("figure3", figures.figure3(table, "Rewards before and after steering")),
                      ("confound", figures.confound(table, "Does the feature mean the target or high reward?"))):
        caption = f"{Path(arguments.target).name}, {len(table)} responses."
        figures.save_figure(fig, name, folder, table, caption, "your scores")
    print(summary.drop(columns=["wasserstein", "d_pooled"]).round(3).T.to_string(header=False))
    for name, found in matched.items():
        few = " -- too few to judge" if min(found["n_target"], found["n_other"]) < 10 else ""
        print(f"\nT against {name}, at equal base reward ({found['how']}): {found['target_shift']:+.2f} "
              f"(n = {found['n_target']}) against {found['other_shift']:+.2f} (n = {found['n_other']}), difference "
              f"{found['difference']:+.2f} [{found['lo']:+.2f}, {found['hi']:+.2f}]{few}")


def read_scores(path: str, complement: str | None = None):
    """The table of `table_from_scores` from a file of rows, or from the authors' two files ``{id: {reward,
    reward_steered, activated_latents}}`` (target, complement), where T holds the accepted answer of every safety
    prompt: an id of C that T has too is a rejected answer to a safety prompt."""
    import json

    import pandas as pd

    from ..data.files import iter_rows
    from ..errors import DataError
    from ..sarm.steering import table_from_scores
    if complement:
        rows, asked = [], set()
        for name, target in ((path, True), (complement, False)):
            try:
                found = json.loads(Path(name).read_text(encoding="utf-8"))
                asked |= set(found) if target else set()
                rows += [{"reward": row["reward"], "reward_steered": row["reward_steered"], "is_target": target,
                          "active": bool(row["activated_latents"]), "group": key,
                          "category": "T" if target else "safety rejected" if key in asked else "non-safety"}
                         for key, row in found.items()]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f"{name} is not in the authors' format {{id: {{reward, reward_steered, "
                                f"activated_latents}}}}: {error!r}") from None
        frame = pd.DataFrame(rows)
    elif Path(path).suffix == ".csv":
        try:
            frame = pd.read_csv(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as CSV: {error}") from None
    else:
        frame = pd.DataFrame([row if isinstance(row, dict) else {} for row in iter_rows(path)])
    if missing := {"reward", "reward_steered", "active", "is_target"} - set(frame):
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(map(str, frame)) or 'no rows'}")
    return table_from_scores(*(frame[name].to_numpy() for name in ("reward", "reward_steered", "active", "is_target")),
                             **{name: frame[name].to_numpy() for name in ("group", "category") if name in frame})
