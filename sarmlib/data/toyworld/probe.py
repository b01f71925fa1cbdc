"""What can be read linearly at the reward position: the toy backbone's probe report.

For each attribute a logistic regression is fitted on conversations from the pairs half of the world and
scored (AUROC) on conversations from the benchmark half, whose words and combinations it has not seen.
"""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from scipy.stats import rankdata

from . import lexicon as lx
from .datasets import dialogue
from .grammar import TASKS, make_problem

ATTRIBUTES = {  # attribute → (tasks it is asked of, what is true)
    "factual truth": (("fact",), lambda a: a.good),
    "arithmetic": (("math",), lambda a: a.good),
    "code": (("code",), lambda a: a.good),
    "safety": (("harmful", "harmless"), lambda a: a.good),
    "instruction following": (("include", "count"), lambda a: a.good),
    "focus": (("focus",), lambda a: a.good),
    "naming": (("naming",), lambda a: a.good),
    "tone": (TASKS, lambda a: a.tone == "rude"),
}


def conversations(tasks, n: int, side: str, seed: int):
    """``n`` answers (half of them good, styles and tones drawn) as dialogue texts, with their truth."""
    rng = random.Random(f"probe-{seed}-{side}-{tasks}")
    answers, texts = [], []
    for number in range(n):
        problem = make_problem(rng.choice(tasks), rng, side)
        answer = problem.answer(number % 2 == 0, rng, tone=rng.choice(lx.TONES))
        answers.append(answer)
        texts.append(dialogue(problem.prompt, answer.text))
    return answers, texts


@torch.no_grad()
def last_token_states(model, tokenizer, texts: list[str], batch_size: int = 64) -> np.ndarray:
    """Hidden states of every layer at the last token, [layers + 1, n, d] (index l = after layer l; the last
    one after the final norm)."""
    chunks = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start:start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False)
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       output_hidden_states=True).hidden_states
        last = batch["attention_mask"].sum(1) - 1
        chunks.append(torch.stack([h[torch.arange(len(last)), last] for h in states]).float().numpy())
    return np.concatenate(chunks, axis=1)


def probe_auroc(x_train, y_train, x_test, y_test, penalty: float = 1e-2) -> float:
    """AUROC on the test half of an L2 logistic regression on standardised features."""
    mean, std = x_train.mean(0), x_train.std(0) + 1e-6
    x_train, x_test, sign = (x_train - mean) / std, (x_test - mean) / std, np.where(y_train, 1.0, -1.0)

    def objective(w):
        margin = sign * (x_train @ w[:-1] + w[-1])
        slope = -sign / (1 + np.exp(np.clip(margin, -30, 30))) / len(sign)
        loss = np.logaddexp(0, -margin).mean() + penalty / 2 * (w[:-1] @ w[:-1])
        return loss, np.append(x_train.T @ slope + penalty * w[:-1], slope.sum())

    w = minimize(objective, np.zeros(x_train.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    ranks = rankdata(x_test @ w[:-1])
    positives = int(y_test.sum())
    return float((ranks[y_test].sum() - positives * (positives + 1) / 2) / (positives * (len(y_test) - positives)))


def probe_report(model, tokenizer, *, n: int = 600, seed: int = 0) -> pd.DataFrame:
    """AUROC per attribute and layer; columns attribute, layer, auroc, n_train, n_test."""
    model.eval()
    rows = []
    for attribute, (tasks, truth) in ATTRIBUTES.items():
        data = {}
        for side in ("pairs", "benchmark"):
            answers, texts = conversations(tasks, n, side, seed)
            data[side] = last_token_states(model, tokenizer, texts), np.array([truth(a) for a in answers])
        (x_train, y_train), (x_test, y_test) = data["pairs"], data["benchmark"]
        for layer in range(1, len(x_train)):
            rows.append({"attribute": attribute, "layer": layer, "n_train": n, "n_test": n,
                         "auroc": probe_auroc(x_train[layer], y_train, x_test[layer], y_test)})
    return pd.DataFrame(rows)
