"""With TRL installed (the `trl` extra): its RewardTrainer takes a SARM unchanged, GRPO takes the reward function."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from sarmlib.evaluation.scoring import score_conversations
from sarmlib.sarm.reward_function import SarmRewardFunction
from tests.tiny import conversation, tiny_config, tiny_pairs, tiny_sarm, tiny_tokenizer

trl = pytest.importorskip("trl", reason="the trl extra is not installed")
datasets = pytest.importorskip("datasets")
QUIET = dict(report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no")


@pytest.mark.parametrize("loaded", [False, True])
def test_reward_trainer_trains_a_sarm_and_leaves_the_encoder(tmp_path, loaded):
    model = tiny_sarm(head=0.1)
    if loaded:
        model.save_pretrained(tmp_path / "model")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    before, weights = model.sae_hash(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pairs = [{side: [*pair["prompt"], {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
             for pair in tiny_pairs(16)]
    trainer = trl.RewardTrainer(
        model=model, processing_class=tiny_tokenizer(), train_dataset=datasets.Dataset.from_list(pairs),
        args=trl.RewardConfig(output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4,
                              learning_rate=1e-3, max_length=64, logging_steps=1, **QUIET))
    trainer.train()
    after = model.state_dict()
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], weights[name])}
    assert moved == {"model", "score"} and model.sae_hash() == before
    assert any("accuracy" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_grpo_and_rloo_log_which_features_paid(tmp_path, method):
    torch.manual_seed(0)
    tokenizer, policy = tiny_tokenizer(), LlamaForCausalLM(tiny_config(2))
    reward = SarmRewardFunction(tiny_sarm(), tokenizer, log_features=2)
    prompts = datasets.Dataset.from_list([{"prompt": conversation(f"w{i}", "")[:1]} for i in range(4)])
    trainer = getattr(trl, f"{method}Trainer")(
        model=policy, reward_funcs=reward, train_dataset=prompts, processing_class=tokenizer,
        args=getattr(trl, f"{method}Config")(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=5, logging_steps=1, beta=0.0, **QUIET))
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert len(reward.history) == 2 and any("sarm/feature" in key for key in logged)
    assert any("rewards/sarm" in key for key in logged)


def test_a_reward_model_as_grpo_reward_is_called_as_trl_does():
    """The call of TRL for a model given as reward: right padding, no special tokens, logits[:, 0]."""
    model, tokenizer = tiny_sarm(), tiny_tokenizer()
    talks = [conversation("w3 w4", "w5"), conversation("w6", "w7 w8 w9 w10")]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.inference_mode():
        found = model(**inputs).logits[:, 0]
    expected = torch.tensor(score_conversations(model, tokenizer, talks).rewards).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
