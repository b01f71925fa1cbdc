"""Sentence view: in which sentences of an answer does a feature fire?  For display, and to compare with the paper.

The paper explains a feature from the sentences at whose end it fires; the reward reads one of these positions only,
so nothing here is evidence about rewards (`Contexts` is).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from sarmlib.chat import collate, encode_conversations, fit_length, pad_id, truncate_left
from sarmlib.evaluation.scoring import token_batches
from sarmlib.extractor import position_rule


@torch.inference_mode()
def sentence_contexts(model, tokenizer, conversations: Sequence[Sequence[dict]], features: Sequence[int], *,
                      per_decile: int = 2, rule="sentence_end", max_length: int = 2048, batch_tokens: int = 4096,
                      seed: int = 0) -> pd.DataFrame:
    """Sentences of the last turn at whose end each of ``features`` fires, ``per_decile`` of each activation decile.

    Columns: feature, conversation (number), sentence (decoded, from after the previous end to this one; an end of
    turn comes with the sentence before it), z, decile
    (10 = strongest), n_in_decile, n (sentences in which it fires), n_sentences (all that were read), at_reward (this
    end is the reward position).  The choice depends on seed and feature alone.
    """
    chosen, device = position_rule(tokenizer, rule), next(model.parameters()).device
    limit = fit_length(model, max_length)
    whole = encode_conversations(tokenizer, conversations)
    other = encode_conversations(tokenizer, [[*talk[:-1], {**talk[-1], "content": "x" if str(talk[-1]["content"])[:1]
                                                           != "x" else "y"}] for talk in conversations])
    ids = truncate_left(tokenizer, whole, limit)
    lost = [len(a) - len(b) for a, b in zip(whole, ids, strict=True)]
    starts = [max(0, _common(a, b) - n) for a, b, n in zip(whole, other, lost, strict=True)]
    found, total, wanted = {int(f): [] for f in features}, 0, np.asarray(features, int)
    for members in token_batches([len(one) for one in ids], batch_tokens):
        batch = {name: one.to(device) for name, one in collate([ids[i] for i in members], pad_id(tokenizer)).items()}
        mask = chosen(batch["input_ids"], batch["attention_mask"])
        pad = batch["attention_mask"].int().argmax(1).cpu().numpy()
        z = model.encode(model.model(**batch).last_hidden_state[mask]).to_csr()[:, wanted].toarray()
        rows, places = (one.cpu().numpy() for one in mask.nonzero(as_tuple=True))
        places = places - pad[rows]
        inside = places >= np.array([starts[i] for i in members])[rows]
        previous = np.r_[-1, np.where(rows[1:] == rows[:-1], places[:-1], -1)]
        # an end of turn right after a full stop ends the same sentence
        previous = np.where(previous == places - 1, np.r_[-1, np.where(rows[1:] == rows[:-1], previous[:-1], -1)],
                            previous)
        total += int(inside.sum())
        for at, column in zip(*np.nonzero(z * inside[:, None]), strict=True):
            member = members[rows[at]]
            begin = max(previous[at] + 1, starts[member])
            found[int(wanted[column])].append((member, begin, int(places[at]), float(z[at, column])))
    lines = []
    for feature, hits in found.items():
        hits.sort(key=lambda hit: (hit[3], hit[:3]))
        rng = np.random.default_rng([seed, feature])
        for decile, part in reversed(list(enumerate(np.array_split(np.arange(len(hits)), 10), 1))):
            for i in rng.choice(part, min(per_decile, len(part)), replace=False):
                member, begin, end, z_i = hits[i]
                lines.append({"feature": feature, "conversation": member, "z": z_i, "decile": decile,
                              "sentence": tokenizer.decode(ids[member][begin:end + 1]), "n_in_decile": len(part),
                              "n": len(hits), "n_sentences": total, "at_reward": end == len(ids[member]) - 1})
    columns = ["feature", "conversation", "sentence", "z", "decile", "n_in_decile", "n", "n_sentences", "at_reward"]
    return pd.DataFrame(lines, columns=columns)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
