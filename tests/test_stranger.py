"""A stranger's script with public names only: an own decoder, own text and twenty pairs, to a steered SARM on disk."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import sarmlib

TEXTS = [f"The {one} cat sat on the {two} mat. Was it happy? Yes, it was {one}!"
         for one in ("red", "old", "big", "shy") for two in ("new", "wet", "soft", "long")]
PAIRS = [{"prompt": f"How was cat {i}?", "chosen": "It was happy.", "rejected": "It was wet and old!"}
         for i in range(20)]


def test_from_a_bare_decoder_to_a_steered_model_on_disk(tmp_path):
    words = Tokenizer(models.BPE(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "</s>"]
    words.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>")
    torch.manual_seed(0)
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        pad_token_id=1, eos_token_id=2, bos_token_id=None))

    backbone = sarmlib.load_backbone(decoder, layer=2)
    states = sarmlib.ActivationExtractor(backbone, tokenizer, "sentence_end").collect(TEXTS)
    settings = sarmlib.SAETrainConfig(steps=30, batch_size=16)
    sae, _ = sarmlib.train_sae(states, settings, d_model=32, n_features=128, k=4, progress=False)
    sarm = sarmlib.SarmForSequenceClassification.from_backbone_and_sae(backbone, sae)
    settings = sarmlib.RewardTrainConfig(lr=1e-3, head_lr=1e-2, batch_size=4)
    sarmlib.RewardTrainer(sarm, tokenizer, PAIRS, config=settings).train()
    why = sarmlib.explain_pair(sarm, tokenizer, "How was cat 3?", "It was happy.", "It was wet and old!")
    assert why.reward > 0  # the margin
    feature = int(why.table.feature[0])
    assert str(feature) in str(why)
    turned = sarmlib.steer(sarm, {feature: -1.0})
    turned.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "How was cat 3?"}, {"role": "assistant", "content": "It was happy."}]
    assert sarmlib.explain(loaded, tokenizer, talk).reward == sarmlib.explain(turned, tokenizer, talk).reward
    classify = transformers.pipeline("text-classification", model=str(tmp_path), function_to_apply="none")
    assert [set(one) for one in classify(["It was happy.", "It was wet!"])] == [{"label", "score"}] * 2
