"""Tables of the last run, as Markdown in <runs>/<profile>/report.md.

    python tools/readme_tables.py [--profile toy] [--data DATA] [--runs runs] [--tracked]        (or: make report)

``--tracked``: in results/<profile>.md, and the reward models also in the README, where it has a place for them.
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


KINDS = {"evidence": "Evidence: it could have come out otherwise.",
         "implementation": "What the paper says is done, and here is done.",
         "construction": "What follows from the equations."}


def claims_markdown(table: pd.DataFrame) -> str:
    """The claims by kind: ours with its interval, the paper's value apart, and the verdict (``claims.verdicts``)."""
    return "\n\n".join(f"{words}\n\n{_claims(table[table.kind == kind])}" for kind, words in KINDS.items()
                       if (table.kind == kind).any())


def _claims(table: pd.DataFrame) -> str:
    lines = ["| | the paper says | measured here | value [95 %] | paper | verdict here |", "|---|---|---|---|---|---|"]
    for row in table.itertuples():
        value = "–" if pd.isna(row.value) else f"{row.value:.3g}"
        if not pd.isna(row.low) and row.low != row.high:
            value += f" [{row.low:.3g}, {row.high:.3g}]"
        paper = "–" if pd.isna(row.paper) else row.paper
        said, what = (" ".join(str(text).replace("|", "\\|").split()) for text in (row.sentence, row.quantity))
        lines.append(f"| {row.id} | “{said}” ({row.where}) | {what} | {value} | {paper} | {row.verdict} |")
    return "\n".join(lines)


def broken_markdown(table: pd.DataFrame) -> str:
    """Each claim's broken version, and how far it falls outside the band, in widths of the band."""
    lines = ["| | what is broken | value | broken | band | outside by |", "|---|---|---|---|---|---|"]
    for row in table.dropna(subset=["control", "band_lo"]).itertuples():
        distance, width = max(row.band_lo - row.control, row.control - row.band_hi), row.band_hi - row.band_lo
        outside = f"{distance / width:.1f} bands" if width > 0 else "the band is one point"
        if distance <= 0:
            outside = "inside: by its interval it decides nothing"
        lines.append(f"| {row.id} | {row.broken} | {row.value:.3g} | {row.control:.3g} | {row.band_lo:g} to "
                     f"{row.band_hi:g} | {outside} |")
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
    """Reward models: percent, mean and standard error over seeds, and what guessing gets."""
    from sarmlib import results
    chance = results.against_chance(run).groupby("benchmark").chance.first() / 100
    table = results.variant_table(run)
    guess = {"variant": "guessing", "pairs": 0.5, **chance}
    table = pd.concat([table, pd.DataFrame([guess])], ignore_index=True)
    for name in ("pairs", "rewardbench2", "rm_bench"):
        if name not in table:
            table[name] = float("nan")
            continue
        pairs = zip(table[name], table[f"{name}_se"], strict=True)
        table[name] = ["–" if pd.isna(mean) else f"{100 * mean:.1f}" + ("" if pd.isna(se) else f" ± {100 * se:.1f}")
                       for mean, se in pairs]
    names = {"reward model": "variant", "held-out pairs": "pairs", "RewardBench 2": "rewardbench2",
             "RM-Bench": "rm_bench"}
    return f"{markdown(table, **names)}\n\nPercent; mean ± standard error over seeds."


def report(run) -> str:
    """Everything: claims, reward models, chance, differences, SAEs, steering and labels of a finished run."""
    from sarmlib import results
    sae = {"SAE on": "positions", "seed": "seed", "FVU": "fvu:.4f", "dead features": "dead_fraction:.0%",
           "L0": "l0:.2f"}
    steering = {"seed": "seed", "steered feature": "feature", "s": "s:.3f", "weight": "w:+.4f",
                "T active": "active_T:.0%", "C active": "active_C:.0%", "shift of T (sd)": "shift_T:+.2f",
                "shift of C (sd)": "shift_C:+.2f", "T - C at equal reward": "matched_T_minus_C:+.2f"}
    chance = {"benchmark": "benchmark", "reward model": "variant", "score": "score:.1f", "from": "low:.1f",
              "to": "high:.1f", "chance": "chance:.1f", "verdict": "verdict"}
    gaps = {"SARM minus": "variant", "points": "value:+.1f", "from": "lo:+.1f", "to": "hi:+.1f"}
    labels = {"seed": "seed", "features that fire": "alive", "labelled": "labelled", "reliable": "reliable",
              "share of the reward under reliable labels": "share:.0%",
              "also against matched answers": "share_harder:.0%", "answers whose largest part has one": "top:.0%"}
    claims = verdicts(run.store.root / "results")
    parts = {"The claims": claims_markdown(claims), "Broken on purpose": broken_markdown(claims),
             "Reward models": variants_markdown(run), "Against chance": markdown(results.against_chance(run), **chance),
             "Differences on RewardBench 2": markdown(results.differences(run), **gaps),
             "SAEs": markdown(results.sae_table(run), **sae),
             "Steering": markdown(results.steering_table(run), **steering),
             "Labels": markdown(results.attributed(run), **labels)}
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
    parser.add_argument("--data", help="your folder, for profiles whose sources are 'data'")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all profiles' artifacts")
    parser.add_argument("--tracked", action="store_true", help="write results/ and the README")
    arguments = parser.parse_args(argv)
    try:
        profile = load_profile(arguments.profile, data=arguments.data)
        run = Run(profile, root=arguments.runs.resolve() / profile.name, progress=False, read_only=True)
        target = ROOT / "results" / f"{profile.name}.md" if arguments.tracked else run.store.root / "report.md"
        print(write_atomic(target, report(run)))
        if arguments.tracked and f"<!-- {profile.name}:begin -->" in (ROOT / "README.md").read_text(encoding="utf-8"):
            replace_between(ROOT / "README.md", profile.name, variants_markdown(run))
    except SarmlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
