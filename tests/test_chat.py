"""Conversation -> ids, and which token is rewarded."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from sarmlib import chat
from sarmlib.chat import collate, encode_conversations, end_of_turn_id, reward_position, truncate_left
from sarmlib.errors import ConfigError, DataError, ModelError
from tests.tiny import TEMPLATE, conversation, tiny_tokenizer

BOS, EOT = 2, 5


def encode_conversation(tokenizer, messages, max_length=None):
    return encode_conversations(tokenizer, [messages], max_length)[0]


@pytest.mark.parametrize("settings, expected", [
    ({}, "<bos> <user> w1 w2 <eot> <assistant> w3 <eot>"),
    (dict(bos_token="<eot>"), "<eot> <user> w1 w2 <eot> <assistant> w3 <eot>"),  # closes turns too
    (dict(template=None), "<unk> w1 w2 <unk> w3 <eot>")])  # "<|user|>" is an unknown word here
def test_ids_follow_the_template_and_end_with_the_turn(settings, expected):
    tokenizer = tiny_tokenizer(**settings)
    ids = encode_conversation(tokenizer, conversation("w1 w2", "w3"))
    assert tokenizer.convert_ids_to_tokens(ids) == expected.split()
    assert encode_conversation(tokenizer, conversation("w1", ""))[-1] == EOT
    assert end_of_turn_id(tokenizer) == EOT
    tokenizer.chat_template = TEMPLATE.replace("<eot>", "<user>")
    assert end_of_turn_id(tokenizer) == 3


@pytest.mark.parametrize("in_template, by_tokenizer", [(True, True), (True, False), (False, True), (False, False)])
def test_exactly_one_bos_when_template_or_tokenizer_writes_one(in_template, by_tokenizer):
    tokenizer = tiny_tokenizer(TEMPLATE if in_template else TEMPLATE.replace("{{ bos_token }}", ""))
    if by_tokenizer:
        adds = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
        tokenizer.backend_tokenizer.post_processor = adds
    ids = encode_conversation(tokenizer, conversation("w1 <bos> w2", "w3"))
    assert (ids[0] == BOS and ids.count(BOS) == 1) if in_template or by_tokenizer else ids[0] != BOS


def test_white_space_after_the_end_of_turn_is_dropped():
    # The tokenizer sees the newline as a token of its own, as ChatML templates produce it.
    vocabulary = {"<unk>": 0, "<eot>": 1, "\n": 2, "a": 3, "b": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eot>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eot>\n{% endfor %}"
    assert encode_conversation(tokenizer, conversation("a", "b")) == [3, 1, 2, 4, 1]


def test_left_truncation_keeps_bos_and_end_of_turn():
    tokenizer = tiny_tokenizer()
    full = encode_conversation(tokenizer, conversation("w1 w2 w3", "w4 w5"))
    cut = encode_conversation(tokenizer, conversation("w1 w2 w3", "w4 w5"), max_length=4)
    assert cut == [BOS, *full[-3:]] and cut[-1] == EOT
    assert truncate_left(tokenizer, [full], len(full)) == [full]
    with pytest.raises(ConfigError, match="max_length"):
        encode_conversation(tokenizer, conversation("w1", "w2"), max_length=1)
    assert encode_conversations(tokenizer, []) == []


@pytest.mark.parametrize("messages,match", [
    ([], "non-empty"), ("text", "non-empty"), ([{"role": "user", "content": "w1"}], "'user'"),
    ([{"role": "user"}], "'content'"), ([{"role": "assistant", "content": None}], "'content'"), (["w1"], "'role'"),
])
def test_malformed_conversations_are_refused(messages, match):
    with pytest.raises(DataError, match=match):
        encode_conversation(tiny_tokenizer(), messages)


@pytest.mark.parametrize("start, words", [
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "no system role"),
    *((start, "it computes .* at most 1,000,000") for start in (
        "{{ 10**(10 + messages|length)**8 }}", "{% set x = 9**9**9 %}", "{{ 'x' * 10**10 }}", "{{ 99999999 * [1] }}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}"))])
def test_a_template_that_refuses_a_role_or_computes_something_huge_is_a_data_error(start, words):
    with pytest.raises(DataError, match=words):
        encode_conversation(tiny_tokenizer(start + TEMPLATE),
                            [{"role": "system", "content": "w1"}, *conversation("w2", "w3")])


def test_a_template_may_multiply_and_pass_keywords():
    small = "{{ 2**-1 * (-3)**3 * 'ab'|length }}{{ '-' * 3 }}{{ dict(a=1, **{'b': 2}).b }} "
    assert chat.render(tiny_tokenizer(small + TEMPLATE), conversation("w1", "w2")).startswith("-27.0---2 <bos>")


def test_a_tokenizer_with_one_id_too_many_is_refused():
    tokenizer = tiny_tokenizer()
    chat.check_vocabulary(LlamaConfig(vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(ModelError, match="belong to different models"):
        chat.check_vocabulary(LlamaConfig(vocab_size=len(tokenizer) - 1), tokenizer)


def test_what_does_not_end_its_turn_is_counted_and_a_batch_is_padded_on_the_right():
    with pytest.warns(UserWarning, match="1 conversations do not end"):
        chat.warn_of_open_turns(tiny_tokenizer(), [[2, 9, EOT], [2, 9]])
    batch = collate([[7, 8, 9], [7]], pad_id=5)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_reward_position_is_the_last_attended_token_for_any_padding():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    assert reward_position(mask).tolist() == [2, 3, 2, 0]
    assert reward_position(mask.bool()).tolist() == [2, 3, 2, 0]
    with pytest.raises(DataError, match="without attended"):
        reward_position(torch.tensor([[1, 1], [0, 0]]))
