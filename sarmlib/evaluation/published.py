"""Numbers printed in the paper (AAAI 2026, Tables 1 and 2), as data; never mixed with numbers measured here.

RewardBench 2 scores in percent, single runs without intervals; baselines from the leaderboard.
"""

from __future__ import annotations

import pandas as pd

NUMBERS = ["Overall", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"]
_TABLE_1 = """
open-source|ArmoRM-Llama3-8B-v0.1|7.5B|66.5|65.7|41.9|66.1|82.2|76.6|66.3
open-source|GRM-Llama3-8B-rewardmodel-ft|7.5B|67.7|62.7|35.0|58.5|92.2|89.3|68.2
open-source|Llama-3.1-Tulu-3-8B-RL-RM-RB2|7.5B|68.7|76.4|40.0|61.7|86.4|84.8|62.8
open-source|RAMO-Llama3.1-8B|7.5B|69.2|65.5|37.5|56.3|97.6|90.7|67.5
open-source|QRM-Llama3.1-8B-v2|7.5B|70.7|66.5|40.6|61.2|94.7|89.1|72.3
open-source|Skywork-Llama-8B-v0.2|7.5B|71.8|69.7|40.6|60.1|94.2|94.1|71.7
open-source|LDL-Reward-Gemma-2-27B-v0.1|27B|72.5|75.6|35.0|64.5|92.2|91.3|76.3
open-source|Llama-3.1-Tulu-3-70B-SFT-RM-RB2|70B|72.2|80.8|36.9|67.8|86.9|77.8|83.1
closed|GPT-4o|–|64.9|56.8|33.1|62.3|86.2|72.9|78.2
closed|Gemini 2.5 Pro|–|67.8|65.3|46.9|53.4|88.1|83.1|69.7
closed|Claude Sonnet 4|–|71.2|76.1|35.9|70.5|89.1|76.0|79.4
closed|GPT-4.1|–|72.3|82.9|39.7|65.2|87.3|73.4|85.4
paper|SARM-2B|2.0B|62.5|55.6|35.6|60.7|84.9|82.4|56.0
paper|SARM-3B|2.7B|64.2|58.6|34.4|62.8|87.3|86.3|55.6
paper|SARM-4B|4.3B|73.6|68.5|42.5|63.9|91.3|96.0|79.6
"""
_TABLE_2 = """
random_encoder|SAE Encoder with Random Init|(4+0.3) B|68.4|65.7|38.4|64.5|88.9|88.2|64.9
token_sae|Token-level SAE Pretraining|(4+0.3) B|71.5|68.0|40.6|62.3|92.9|92.5|72.5
sarm|SARM-4B|(4+0.3) B|73.6|68.5|42.5|63.9|91.3|96.0|79.6
"""


def _frame(text: str, first: str) -> pd.DataFrame:
    rows = [line.split("|") for line in text.strip().splitlines()]
    frame = pd.DataFrame(rows, columns=[first, "model", "size", *NUMBERS])
    return frame.astype(dict.fromkeys(NUMBERS, float))


def table_1() -> pd.DataFrame:
    """Table 1 of the paper: columns kind, model, size, Overall and the six subsets."""
    return _frame(_TABLE_1, "kind")


def table_2() -> pd.DataFrame:
    """Table 2 of the paper: columns variant (our name of it), model, size, Overall and the six subsets."""
    return _frame(_TABLE_2, "variant")
