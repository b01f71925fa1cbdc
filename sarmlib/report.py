"""Tables for the README, and the links that need the repository's public address."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from .artifacts import write_atomic
from .errors import DataError

COLAB = "https://colab.research.google.com/github/{repo}/blob/main/notebooks/{name}"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
INSTALL = '''import sys

if "google.colab" in sys.modules:
    %pip install -q "sarmlib[notebooks] @ git+https://github.com/{repo}"'''


def claims_markdown(verdicts: pd.DataFrame) -> str:
    """The claims table: ours with its interval, the paper's value apart, and the verdict (``claims.verdicts``)."""
    lines = ["| | the paper says | measured here | value [95 %] | paper | verdict here |", "|---|---|---|---|---|---|"]
    for row in verdicts.itertuples():
        value = "–" if pd.isna(row.value) else f"{row.value:.3g}"
        if not pd.isna(row.low) and row.low != row.high:
            value += f" [{row.low:.3g}, {row.high:.3g}]"
        paper = "–" if row.paper is None or row.paper != row.paper else str(row.paper)
        sentence = " ".join(str(row.sentence).replace("|", "\\|").split())
        lines.append(f"| {row.id} | “{sentence}” ({row.where}) | {row.quantity} | {value} | {paper} | {row.verdict} |")
    return "\n".join(lines)


def results_markdown(results_dir: Path) -> str:
    """Variants, SAEs and steering of the last run, from the numbers that the notebooks recorded."""
    numbers: dict = {}
    for file in sorted(results_dir.glob("*.json")):
        numbers |= json.loads(file.read_text())["numbers"]
    missing = [name for name in ("variants", "sae", "steering", "labels") if name not in numbers]
    if missing:
        raise DataError(f"{results_dir} has no {', '.join(missing)}; run all notebooks first (make reproduce)")
    lines = ["| reward model | held-out pairs | RewardBench 2 | RM-Bench |", "|---|---|---|---|"]
    for row in numbers["variants"]:
        cells = [f"{100 * row[n]:.1f} ± {100 * row[f'{n}_se']:.1f}" if row.get(n) is not None else "–"
                 for n in ("pairs", "rewardbench2", "rm_bench")]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    lines += ["", "Percent; mean ± standard error over seeds.", "",
              "| SAE on | seed | FVU | dead features | L0 |", "|---|---|---|---|---|"]
    for row in numbers["sae"]:
        lines.append(f"| {row['positions']} | {row['seed']} | {row['fvu']:.4f} | {100 * row['dead_fraction']:.0f} % | "
                     f"{row['l0']:.2f} |")
    lines += ["", "| seed | steered feature | s | weight | T active | C active | shift of T (sd) | shift of C (sd) |",
              "|---|---|---|---|---|---|---|---|"]
    for row in numbers["steering"]:
        lines.append(f"| {row['seed']} | {row['feature']} | {row['s']:.3f} | {row['w']:+.4f} | "
                     f"{100 * row['active_T']:.0f} % | {100 * row['active_C']:.0f} % | {row['shift_T']:+.2f} | "
                     f"{row['shift_C']:+.2f} |")
    labels = "; ".join(f"{row['reliable']} of {row['labelled']}" for row in numbers["labels"])
    lines += ["", f"Features whose label is reliable on held-out prompts, per seed: {labels}."]
    return "\n".join(lines)


def replace_between(path: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- name:begin -->`` and ``<!-- name:end -->``; DataError when a marker is missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    whole = path.read_text()
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise DataError(f"{path} needs one line {begin} and one line {end}")
    head, rest = whole.split(begin)
    write_atomic(path, head + begin + "\n" + text + "\n" + end + rest.split(end)[1])


def write_badges(root: Path, repo: str) -> list[Path]:
    """Colab badge and install cell in every numbered notebook, badges in the README; replaces earlier ones."""
    changed, links = [], []
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text())
        badge = BADGE.format(link=COLAB.format(repo=repo, name=path.name))
        links.append(f"`{path.stem}` {badge}")
        kept = [c for c in notebook["cells"] if c.get("id") not in ("colab-badge", "colab-install")]
        title = {"cell_type": "markdown", "id": "colab-badge", "metadata": {}, "source": [badge]}
        install = {"cell_type": "code", "id": "colab-install", "metadata": {"tags": ["nbval-skip"]}, "outputs": [],
                   "execution_count": 1, "source": INSTALL.format(repo=repo).splitlines(keepends=True)}
        first = next(i for i, c in enumerate(kept) if c["cell_type"] == "code")
        notebook["cells"] = [kept[0], title, *kept[1:first], install, *kept[first:]]
        code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
        for number, cell in enumerate(code, 1):
            cell["execution_count"] = number
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = number
        write_atomic(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        changed.append(path)
    replace_between(root / "README.md", "badges", "\n".join(f"- {link}" for link in links))
    return [*changed, root / "README.md"]
