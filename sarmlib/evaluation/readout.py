"""What a decoder knows before it has seen a preference pair: its own next-token logits, read as a reward.

    r(x) = logsumexp_{v in F} u_v . x  -  logsumexp_{v in A} u_v . x

x is the state at the reward position after the final norm, u_v the unembedding of token v.  F and A are words that
praise and blame, or the tokens whose probability alone goes most with, and most against, the chosen answers of
RM-Bench: whichever does best there.  A reward model below this on RewardBench 2 has not shown what pairs taught it.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp

PRAISE = ("good", "right", "correct", "true", "yes", "safe", "helpful")
BLAME = ("bad", "wrong", "incorrect", "false", "no", "unsafe", "harmful")
SIZES = (1, 2, 4, 8, 16, 32)  # of F and A; the best on RM-Bench is taken
BLOCK = 2048  # tokens at a time


def vocabulary_readout(states: np.ndarray, unembedding: np.ndarray, praise: Sequence[int], blame: Sequence[int]
                       ) -> tuple[np.ndarray, np.ndarray, float]:
    """(F, A, accuracy on these states); ``states`` [6 n, d]: three chosen and three rejected answers a prompt,
    ``unembedding`` [V, d], ``praise`` and ``blame``: tokens to try as F and A."""
    blocks = [unembedding[at:at + BLOCK] for at in range(0, len(unembedding), BLOCK)]
    norm = logsumexp([logsumexp(states @ block.T, axis=1) for block in blocks], axis=0)[:, None]
    order = np.argsort(np.concatenate([_accuracy(states @ block.T - norm) for block in blocks]), kind="stable")
    choices = [(np.array(praise), np.array(blame))] + [(order[-size:], order[:size]) for size in SIZES]
    scores = [float(_accuracy(read_out(states, unembedding, *one)[:, None])[0]) for one in choices]
    best = int(np.argmax(scores))
    return *choices[best], scores[best]


def read_out(states: np.ndarray, unembedding: np.ndarray, favoured: np.ndarray, against: np.ndarray) -> np.ndarray:
    """r [n] of states [n, d]."""
    up, down = (logsumexp(states @ unembedding[tokens].T, axis=1) for tokens in (favoured, against))
    return up - down


def _accuracy(values: np.ndarray) -> np.ndarray:
    """Share of RM-Bench's nine comparisons that each column of [6 n, V] gets right; a tie counts half."""
    sides = values.reshape(-1, 2, 3, values.shape[1])
    chosen, rejected = sides[:, 0, :, None], sides[:, 1, None, :]
    return ((chosen > rejected).mean((0, 1, 2)) + (chosen >= rejected).mean((0, 1, 2))) / 2
