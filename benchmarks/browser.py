"""Feature browser: seconds and megabytes, on a set as large as RM-Bench with as many live features.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/browser.py

1,327 prompts with 6 responses of about 1,500 characters, 564 live of 65,536 features, 192 of them active per response
(what the authors report of their model), 100 labels.  Prints one row; no threshold is tested here.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from sarmlib.browser import write_browser
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import KeywordExplainer
from sarmlib.interpretation.judges import KeywordJudge, judge_labels


def world(n_prompts: int = 1327, n_features: int = 65_536, live: int = 564, k: int = 192, seed: int = 0) -> Contexts:
    """Random activations of random responses."""
    rng, rows = np.random.default_rng(seed), []
    words = np.array([f"word{i}" for i in range(5000)])
    for p in range(n_prompts):
        domain = ("chat", "code", "math", "safety-refuse", "safety-response")[p % 5]
        for r in range(6):
            text = " ".join(rng.choice(words, 190))
            label = "chosen" if r < 3 else "rejected"
            rows.append((f"p{p}", f"p{p}/{r}", domain, label, 190, text, f"prompt {p} {text}"))
    index = pd.DataFrame(rows, columns=["prompt_id", "response_id", "domain", "label", "length", "text", "prompt_text"])
    columns = rng.choice(n_features, live, replace=False)
    weight = rng.dirichlet(np.full(live, 0.5))
    active = np.array([columns[np.argpartition(-(np.log(weight) + rng.gumbel(size=live)), k)[:k]]
                       for _ in range(len(index))])
    z = sparse.csr_array((rng.gamma(4, 1, active.size), active.ravel(), np.arange(0, active.size + 1, k)),
                         (len(index), n_features))
    w = rng.normal(0, 1e-3, n_features)
    return Contexts(z, index.assign(reward=z @ w), w)


def main() -> None:
    """Label, write, measure."""
    contexts = world()
    explainer = KeywordExplainer(contexts, permutations=20)
    features = contexts.features()
    features = features[features.kind == "usual"].sort_values("contribution_sd").feature.tail(100)
    labels = explainer.explain_all(features)
    judged = judge_labels(contexts, labels, KeywordJudge(explainer.vocabulary), n_boot=50)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_browser(Path(folder) / "pages", contexts, labels, judged)
        seconds = time.perf_counter() - start
        sizes = [file.stat().st_size for file in (Path(folder) / "pages").iterdir()]
    print(f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
