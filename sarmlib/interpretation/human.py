"""People as judges: a sheet of questions goes out as CSV, comes back filled in, and is scored like any other judge."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd

from sarmlib.artifacts import hash_json, write_atomic
from sarmlib.errors import DataError
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import Label
from sarmlib.interpretation.judges import MIN_POSITIVES, held_out_sample

COLUMNS = ("item", "label", "response", "matches")


def _item(label: str, text: str) -> str:
    return hash_json([label, text])[:16]


def _cell(text: str) -> str:
    """A spreadsheet must not take a response for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def write_sheet(path, contexts: Contexts, labels: list[Label], *, n_per_class: int = MIN_POSITIVES,
                seed: int = 0) -> int:
    """Questions about the held-out sample of every label, shuffled, without activations; returns their number.

    Each row asks: does this response match this label?  Fill ``matches`` with yes or no, or 0 to 10.
    """
    asked = {}
    for label in labels:
        if not label.abstained:
            rows, _ = held_out_sample(contexts, label.feature, n_pos=n_per_class, n_neg=n_per_class, seed=seed)
            for text in contexts.index["text"].iloc[rows].astype(str):
                asked[_item(label.text, text)] = (label.text, text)
    if not asked:
        raise DataError("every label abstained; there is nothing to ask a person")
    order = np.random.default_rng(seed).permutation(len(asked))
    buffer, items = io.StringIO(), list(asked.items())
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    writer.writerows([(items[i][0], *map(_cell, items[i][1]), "") for i in order])
    write_atomic(path, buffer.getvalue())
    return len(asked)


class HumanJudge:
    """Answers of a filled-in sheet (`write_sheet`); questions that were left empty count as not judged.

    Raises DataError, naming the line, for an answer that is neither yes, no nor a number from 0 to 10.
    """

    def __init__(self, path):
        self.answers: dict[str, float] = {}
        try:
            with open(Path(path), newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                names = set(reader.fieldnames or ())
                lines = [(reader.line_num, line) for line in reader]
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as a UTF-8 CSV file ({error}); save the sheet as such") from None
        if not {"item", "matches"} <= names:
            raise DataError(f"{path}: the columns item and matches are needed; found {sorted(map(str, names))[:9]}")
        for number, line in lines:
            value = (line["matches"] or "").strip().lower()
            if value:
                self.answers[line["item"]] = self._number(value, path, number)

    @staticmethod
    def _number(value: str, path, line: int) -> float:
        try:
            number = {"yes": 10.0, "no": 0.0}.get(value)
            number = float(value.replace(",", ".")) if number is None else number
        except ValueError:
            number = -1.0
        if not 0 <= number <= 10:
            raise DataError(f"{path}, line {line}: matches is {value[:40]!r}; write yes, no or a number from 0 to 10")
        return number / 10

    def score(self, label: Label, units: pd.DataFrame) -> np.ndarray:
        """float [n] in [0, 1]; NaN where nobody answered."""
        found = [self.answers.get(_item(label.text, text), np.nan) for text in units["text"].astype(str)]
        return np.array(found, float)
