"""Numbers printed in the paper (AAAI 2026, Tables 1 and 2), as data; never mixed with numbers measured here.

RewardBench 2 scores in percent, single runs without intervals; baselines from the leaderboard.
"""

from pathlib import Path

import pandas as pd


def table_1() -> pd.DataFrame:
    """Table 1 of the paper: columns kind, model, size, Overall and the six subsets."""
    return pd.read_csv(Path(__file__).parent / "table_1.csv")


def table_2() -> pd.DataFrame:
    """Table 2 of the paper: columns variant (our name of it), model, size, Overall and the six subsets."""
    return pd.read_csv(Path(__file__).parent / "table_2.csv")
