"""Tables of the last run, as Markdown in <runs>/<profile>/report.md.

    python tools/readme_tables.py [--profile toy] [--runs runs] [--tracked]        (or: make report)

``--tracked``: in results/<profile>.md, and the toy profile's reward models also in the README.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from sarmlib.claims import verdicts
from sarmlib.errors import DataError, SarmlibError
from sarmlib.store import write_atomic

ROOT = Path(__file__).resolve().parents[1]


def claims_markdown(table: pd.DataFrame) -> str:
    """The claims: ours with its interval, the paper's value apart, and the verdict (``claims.verdicts``)."""
    lines = ["| | the paper says | measured here | value [95 %] | paper | verdict here |", "|---|---|---|---|---|---|"]
    for row in table.itertuples():
        value = "–" if pd.isna(row.value) else f"{row.value:.3g}"
        if not pd.isna(row.low) and row.low != row.high:
            value += f" [{row.low:.3g}, {row.high:.3g}]"
        paper = "–" if pd.isna(row.paper) else row.paper
        said = " ".join(str(row.sentence).replace("|", "\\|").split())
        lines.append(f"| {row.id} | “{said}” ({row.where}) | {row.quantity} | {value} | {paper} | {row.verdict} |")
    return "\n".join(lines)


def markdown(table: pd.DataFrame, **columns: str) -> str:
    """Columns of a table under new headings; a value is ``name`` or ``name:format``."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in table.to_dict("records"):
        cells = []
        for column in columns.values():
            name, _, style = column.partition(":")
            cells.append("–" if pd.isna(row[name]) else format(row[name], style))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def variants_markdown(run) -> str:
    """Reward models: percent, mean and standard error over seeds."""
    from sarmlib import results
    table = results.variant_table(run)
    for name in ("pairs", "rewardbench2", "rm_bench"):
        if name not in table:
            table[name] = float("nan")
            continue
        pairs = zip(table[name], table[f"{name}_se"], strict=True)
        table[name] = [f"{100 * mean:.1f}" + ("" if pd.isna(se) else f" ± {100 * se:.1f}") for mean, se in pairs]
    names = {"reward model": "variant", "held-out pairs": "pairs", "RewardBench 2": "rewardbench2",
             "RM-Bench": "rm_bench"}
    return f"{markdown(table, **names)}\n\nPercent; mean ± standard error over seeds."


def report(run) -> str:
    """Everything: claims, reward models, SAEs, steering and labels of a finished run."""
    from sarmlib import results
    labels = [run.label_table(seed) for seed in run.profile.seeds]
    counts = "; ".join(f"{int(table.reliable.sum())} of {len(table)}" for table in labels)
    sae = {"SAE on": "positions", "seed": "seed", "FVU": "fvu:.4f", "dead features": "dead_fraction:.0%",
           "L0": "l0:.2f"}
    steering = {"seed": "seed", "steered feature": "feature", "s": "s:.3f", "weight": "w:+.4f",
                "T active": "active_T:.0%", "C active": "active_C:.0%", "shift of T (sd)": "shift_T:+.2f",
                "shift of C (sd)": "shift_C:+.2f"}
    parts = {"The claims": claims_markdown(verdicts(run.store.root / "results")),
             "Reward models": variants_markdown(run), "SAEs": markdown(results.sae_table(run), **sae),
             "Steering": markdown(results.steering_table(run), **steering),
             "Labels": f"Features whose label is reliable on held-out prompts, per seed: {counts}."}
    sections = [f"## {title}\n\n{text}" for title, text in parts.items()]
    return "\n\n".join([f"# Results of profile {run.profile.name}", *sections]) + "\n"


def replace_between(path: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- name:begin -->`` and ``<!-- name:end -->``; DataError without these markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    whole = path.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise DataError(f"{path} needs one line {begin} and one line {end}")
    head, rest = whole.split(begin)
    write_atomic(path, f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}")


def main(argv: list[str] | None = None) -> int:
    from sarmlib.pipeline import Run
    from sarmlib.profiles import load_profile
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all profiles' artifacts")
    parser.add_argument("--tracked", action="store_true", help="write results/ and the README")
    arguments = parser.parse_args(argv)
    try:
        profile = load_profile(arguments.profile)
        run = Run(profile, root=arguments.runs.resolve() / profile.name, progress=False, read_only=True)
        target = ROOT / "results" / f"{profile.name}.md" if arguments.tracked else run.store.root / "report.md"
        print(write_atomic(target, report(run)))
        if arguments.tracked and profile.name == "toy":
            replace_between(ROOT / "README.md", "results", variants_markdown(run))
    except SarmlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
