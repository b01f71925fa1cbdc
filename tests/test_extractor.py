"""Extraction gives exactly the states of one-document-at-a-time forward passes, at exactly the chosen tokens."""

import pytest
import torch

from sarmlib.backbone import load_backbone, load_tokenizer
from sarmlib.errors import ConfigError, DataError
from sarmlib.extractor import ActivationExtractor, position_rule
from tests.helpers import shared_path
from tests.test_sarm_model import config_of
from tests.tiny import SPECIALS, tiny_backbone, tiny_tokenizer

WORDS = ["a", "b", "c", ".", "!", "?", "…", '."', ".)", ".\n\n", ";", ":", ",", ".com", "!=", "3.14", "?!", "Ġ.", "Ġ;",
         "。", '"', ")", "a."]
FIRST, DOT = len(SPECIALS), len(SPECIALS) + 3


def word_tokenizer():
    return tiny_tokenizer(None, WORDS)


def documents(count=60, low=1, high=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(FIRST, FIRST + len(WORDS), (length,), generator=generator).tolist() for length in lengths]


def as_set(states):
    return torch.stack(sorted(states.double(), key=lambda row: row.tolist()))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPTNeoX", "Gemma2", "Bloom"])
@pytest.mark.parametrize("rule", ["sentence_end", "last", "every"])
def test_equals_one_document_at_a_time(family, rule):
    tokenizer, docs = word_tokenizer(), documents()
    backbone = tiny_backbone(config_of(family, 8, hidden_size=16, intermediate_size=32, num_hidden_layers=2))
    extractor = ActivationExtractor(backbone, tokenizer, rule, window=48, batch_size=3)
    assert extractor.packed is (family != "Bloom")
    got = extractor.collect(docs)
    assert torch.equal(got, ActivationExtractor(backbone, tokenizer, rule, window=48, batch_size=3).collect(docs))
    select, ids = position_rule(tokenizer, rule), [torch.tensor([document]) for document in docs]
    with torch.no_grad():
        wanted = torch.cat([backbone(one).last_hidden_state[0, select(one, torch.ones_like(one))[0]] for one in ids])
    torch.testing.assert_close(as_set(got), as_set(wanted), atol=2e-6, rtol=0)
    stats = extractor.stats.summary()
    assert (stats["documents"], stats["vectors"], stats["tokens"]) == (60, len(wanted), sum(map(len, docs)))
    assert stats["padding_share"] < 0.25


def test_long_documents_are_cut_into_windows_that_start_with_bos():
    seen = []
    rule = lambda ids, mask: seen.append(ids.shape[1]) or mask.bool()  # noqa: E731
    tokenizer, backbone = word_tokenizer(), tiny_backbone()
    long = [2] + documents(1, 50, 50)[0]
    got = ActivationExtractor(backbone, tokenizer, rule, window=16).collect([long])
    assert seen == [51] and len(got) == 51  # the rule saw all of it; the repeated BOS gives no state
    pieces = [long[:16], [2] + long[16:31], [2] + long[31:46], [2] + long[46:]]
    with torch.no_grad():
        parts = [backbone(torch.tensor([piece])).last_hidden_state[0, n > 0 :] for n, piece in enumerate(pieces)]
    torch.testing.assert_close(as_set(got), as_set(torch.cat(parts)), atol=2e-6, rtol=0)
    assert len(ActivationExtractor(backbone, tokenizer, "last", window=16).collect([long])) == 1


def test_max_vectors_is_exact_and_streams_lazily():
    stream = iter(documents(5000, 10, 20))
    extractor = ActivationExtractor(tiny_backbone(), word_tokenizer(), "every", window=32, batch_size=2)
    parts = list(extractor.iter_activations(stream, 301))
    assert sum(map(len, parts)) == 301 and extractor.stats["vectors"] == 301
    assert all(len(part) <= 64 for part in parts) and len(list(stream)) > 4500  # a budget, and no more read than needed
    with pytest.warns(UserWarning, match="asked for 1000 states, the corpus gave 180"):
        extractor.collect(documents(20, 9, 9), 1000)
    assert len(extractor.collect(["a b .", "", [FIRST, FIRST, DOT], []])) == 6  # texts and ids, empty ones skipped


def test_sentence_end_rule():
    tokenizer = word_tokenizer()
    ids = torch.arange(len(tokenizer))[None]
    chosen = position_rule(tokenizer)(ids, torch.ones_like(ids))
    ends = {"<eot>", ".", "!", "?", "…", '."', ".)", ".\n\n", "?!", "Ġ.", "。", "a."}
    assert set(tokenizer.convert_ids_to_tokens(ids[chosen].tolist())) == ends


def test_rules_respect_the_mask():
    ids = torch.tensor([[DOT, 6, DOT, DOT], [DOT, DOT, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    tokenizer = word_tokenizer()
    wanted = {"sentence_end": [[0, 0, 1, 0], [1, 1, 0, 0]], "every": [[0, 1, 1, 0], [1, 1, 1, 1]],
              "last": [[0, 0, 1, 0], [0, 0, 0, 1]]}
    for name, rows in wanted.items():
        assert torch.equal(position_rule(tokenizer, name)(ids, mask), torch.tensor(rows).bool()), name
    tokenizer.bos_token = "<eot>"  # an opening one ends no sentence
    assert position_rule(tokenizer)(torch.tensor([[5, 6, DOT, 5]]), mask[1:]).tolist() == [[False, False, True, True]]


def test_real_tokenizer_merged_sentence_ends():
    path = shared_path("data/real/models/stories260K_hf")
    tokenizer = load_tokenizer(path)
    ids = tokenizer("Tom ran. “Stop!” said Mum.\n", return_tensors="pt").input_ids
    chosen = position_rule(tokenizer)(ids, torch.ones_like(ids))[0]
    ends = [tokenizer.decode([i]).strip()[0] for i in ids[0][chosen].tolist()]
    assert ends == [".", "!", "."]
    extractor = ActivationExtractor(load_backbone(path), tokenizer)
    assert extractor.collect(["One day. Two days.", "A cat sat."]).shape == (3, 64) and extractor.packed


def test_a_model_that_packs_single_rows_only_is_found_by_the_probe():
    """As attention kernels do that look for restarting positions in batches of one row."""
    backbone = tiny_backbone()
    plain = backbone.forward

    def forward(input_ids, position_ids=None, **kwargs):
        if len(input_ids) > 1:
            position_ids = None
        return plain(input_ids=input_ids, position_ids=position_ids, **kwargs)

    backbone.forward = forward
    assert not ActivationExtractor(backbone, word_tokenizer()).packed


def test_bad_input_is_refused():
    tokenizer, backbone = word_tokenizer(), tiny_backbone()
    with pytest.raises(ConfigError, match="use sentence_end, every, last"):
        position_rule(tokenizer, "sentences")
    with pytest.raises(ConfigError):
        ActivationExtractor(backbone, tokenizer, window=1)
    extractor = ActivationExtractor(backbone, tokenizer)
    with pytest.raises(ConfigError, match="one string"):
        extractor.collect("a b .")
    for empty in (["", []], ["a b c"]):
        with pytest.raises(DataError, match="no text, or the position rule selects none"):
            extractor.collect(empty)
    with torch.no_grad():
        backbone.get_input_embeddings().weight[FIRST] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        extractor.collect(["a ."])
