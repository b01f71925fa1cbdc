"""A small scored set with planted truth, shared by the tests of interpretation, steering and figures.

240 prompts x 4 responses (one chosen).  Feature 0 fires on "sorry" (safe answers), 1 on "apple", 2 on long
responses, 3 on high quality; the others fire at random, and the upper half never fires.
"""

from functools import cache

import numpy as np
import pandas as pd
from scipy import sparse

from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import KeywordExplainer

SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
SORRY, APPLE, LONG, GOOD, NOISE = range(5)


def planted_world(seed=0, n_prompts=240, n_features=80):
    """Returns (z csr [n, M], index frame, w [M], quality [n]); rewards are exactly z @ w."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(60)]
    rows = []
    for p in range(n_prompts):
        domain, topic = SUBSETS[p % 5], rng.choice(words, 6)
        for k in range(4):
            quality = rng.normal() + (1.2 if k == 0 else 0)
            text = [*rng.choice(words, rng.integers(8, 25)), *topic]
            if domain == "Safety" and k == 0:
                text = ["well,", "sorry", *text]
            if rng.random() < 0.3:
                text += ["apple"]
            rows.append((f"p{p}", f"p{p}_{k}", domain, "rejected" if k else "chosen", len(text), " ".join(text),
                         f"prompt {p}", quality))
    index = pd.DataFrame(rows, columns=["prompt_id", "response_id", "domain", "label", "length", "text",
                                        "prompt_text", "quality"])
    n, size = len(index), rng.gamma(6, 0.5, (len(index), n_features))
    fires = rng.random((n, n_features)) < rng.uniform(0.1, 0.5, n_features)
    fires[:, SORRY] = index["text"].str.contains("sorry")
    fires[:, APPLE] = index["text"].str.contains("apple") & (rng.random(n) < 0.95)
    fires[:, LONG] = index["length"] > 24
    fires[:, GOOD] = index["quality"] > 1.2
    fires[:, n_features // 2:] = False
    z = sparse.csr_array((fires * size).astype(np.float32))
    w = rng.normal(size=n_features) * 0.1
    w[[SORRY, GOOD]] = 0.4
    index["reward"] = z @ w
    return z, index.drop(columns="quality"), w, index["quality"].to_numpy()


@cache
def planted_explainer():
    """The keyword explainer of `planted_world`, with its contexts; shared, so not to be changed."""
    return KeywordExplainer(Contexts(*planted_world()[:3]))


def contexts_of(z, index):
    """Contexts whose head weights do not matter; ``z`` may be boolean [n, M]."""
    return Contexts(sparse.csr_array(z).astype(float), index, np.zeros(z.shape[1]))
