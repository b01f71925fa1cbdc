"""Tiny random models, tokenizers and pairs for tests; everything is built in memory and deterministic."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from sarmlib.backbone import strip_final_norm
from sarmlib.sae.topk import TopKSAE
from sarmlib.sarm.model import SarmForSequenceClassification

SPECIALS = ["<pad>", "<unk>", "<bos>", "<user>", "<assistant>", "<eot>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<eot>{% endfor %}"
N_WORDS = 100
VOCAB = len(SPECIALS) + N_WORDS
ROWS = [[2, 10, 11, 5], [2, 12, 5, 13, 14, 15, 16, 5], [2, 5]]
"""Token ids of three texts of different lengths."""


def tiny_tokenizer(template: str | None = TEMPLATE, words=tuple(f"w{i}" for i in range(N_WORDS)),
                   **kwargs) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the specials (ids 0-5) and ``words``."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eot>", **kwargs}
    extra = ["<user>", "<assistant>", "<eot>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=extra, **names)
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(layers: int = 3, width: int = 32, **kwargs) -> LlamaConfig:
    return LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                       num_attention_heads=4, vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=0,
                       bos_token_id=2, eos_token_id=5, **kwargs)


def tiny_backbone(config=None, seed: int = 0):
    """A random decoder with its final norm removed."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(config or tiny_config()).eval()
    strip_final_norm(model)
    return model


def random_sae(k: int | None = 3, d: int = 6, n: int = 20, **options) -> TopKSAE:
    """An SAE none of whose weights is what it is at first."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(d, n, k, generator=generator, **options)
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
        if k is None:
            sae.threshold.abs_()
    return sae


def tiny_sarm(config=None, n_features: int = 64, k: int = 4, *, head: float = 1.0, seed: int = 0, topk: bool = True,
              **sae_kwargs) -> SarmForSequenceClassification:
    """A random SARM; `head` is the scale of the random head weights."""
    backbone, generator = tiny_backbone(config, seed), torch.Generator().manual_seed(seed)
    sae = TopKSAE(backbone.config.hidden_size, n_features, k, generator=generator, **sae_kwargs)
    model = SarmForSequenceClassification.from_backbone_and_sae(backbone, sae, topk=topk)
    model.score.weight.data.normal_(0, head, generator=generator)
    return model


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of them, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def padded(rows: list[list[int]], side: str = "right", pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of rows padded on one side."""
    ids, mask = [], []
    for row in rows:
        gap = max(map(len, rows)) - len(row)
        order = 1 if side == "right" else -1
        ids.append(sum([row, [pad] * gap][::order], []))
        mask.append(sum([[1] * len(row), [0] * gap][::order], []))
    return torch.tensor(ids), torch.tensor(mask)


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{rng.randrange(3, N_WORDS)}" for _ in range(rng.randint(low, high)))


def tiny_pairs(n: int, seed: int = 0) -> list[dict]:
    """Pairs of different lengths; a chosen answer ends in w1, a rejected one in w2."""
    rng = random.Random(seed)
    return [{"id": str(i), "prompt": [{"role": "user", "content": words(rng, 2, 8)}],
             "chosen": words(rng, 1, 9) + " w1", "rejected": words(rng, 1, 9) + " w2", "meta": {}} for i in range(n)]


def conversation(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
