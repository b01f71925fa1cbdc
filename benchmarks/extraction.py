"""Extraction: half depth against the whole decoder, and packed documents against one sentence per row; CPU time."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from itertools import islice

import torch
from transformers import AutoModel, LlamaConfig

from sarmlib.backbone import cut_config, load_tokenizer, strip_final_norm
from sarmlib.chat import collate, reward_position
from sarmlib.data.text import iter_texts
from sarmlib.data.toyworld import BACKBONE_DIR
from sarmlib.data.toyworld.datasets import corpus as toy_corpus
from sarmlib.extractor import ActivationExtractor, position_rule


def models(vocabulary: int, width: int, layers: int):
    """(whole decoder, its lower half) with the same random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4,
                         num_hidden_layers=layers, num_attention_heads=width // 32, max_position_embeddings=1024)
    whole = AutoModel.from_config(config).eval()
    half = AutoModel.from_config(cut_config(config)).eval()
    half.load_state_dict(whole.state_dict(), strict=False)
    strip_final_norm(half)
    return whole, half


def compare(steps: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each step: least process-CPU seconds over interleaved rounds (the first warms up), median ratio to the first
    step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    first, *_ = times.values()
    return {name: (min(own[1:]), statistics.median(a / b for a, b in zip(own[1:], first[1:], strict=True)))
            for name, own in times.items()}


@torch.no_grad()
def per_row(model, layer: int, rows: list[list[int]], size: int, whole: bool) -> None:
    """One row per sentence, right-padded to the longest of its batch; the state of each row's last token."""
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size])
        out = model(**batch, use_cache=False, output_hidden_states=whole)
        states = out.hidden_states[layer] if whole else out.last_hidden_state
        states[torch.arange(len(states)), reward_position(batch["attention_mask"])]


def compare_depths(whole, half, rounds: int) -> None:
    """Print what the upper half costs."""
    width, layers = whole.config.hidden_size, whole.config.num_hidden_layers
    ids = torch.randint(3, whole.config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        steps = {"half": lambda: half(input_ids=ids, use_cache=False),
                 "whole": lambda: whole(input_ids=ids, use_cache=False, output_hidden_states=True)}
        states = steps["whole"]().hidden_states[half.config.num_hidden_layers]
        same = torch.equal(states, steps["half"]().last_hidden_state)
        times = compare(steps, rounds)
    print(f"random Llama, d {width}, {layers} layers, 4 x 512 tokens, one thread")
    print(f"half depth {times['half'][0] * 1e3:.0f} ms, whole with output_hidden_states "
          f"{times['whole'][0] * 1e3:.0f} ms: {times['whole'][1]:.2f}x; same states: {same}")


def sentences(tokenizer, documents: list[list[int]]) -> tuple[list, list, list]:
    """(documents up to their last sentence end, single sentences, each sentence after its document's text)."""
    rule, whole, single, after = position_rule(tokenizer), [], [], []
    for ids in documents:
        row = torch.tensor([ids])
        ends = rule(row, torch.ones_like(row))[0, :-1].nonzero()[:, 0].tolist()
        if ends:
            starts = [0, *(end + 1 for end in ends)]
            whole.append(ids[: starts[-1]])
            single += [ids[start : end + 1] for start, end in zip(starts, ends, strict=False)]
            after += [ids[: end + 1] for end in ends]
    return whole, single, after


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--corpus", help="file or folder of text (default: the generated world)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: the generated world's)")
    parser.add_argument("--rows", type=int, nargs="+", default=[32], help="sentences per batch of the row-wise forms")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer or BACKBONE_DIR)
    texts = iter_texts(args.corpus) if args.corpus else toy_corpus(args.documents, 0)
    documents = [tokenizer(text, truncation=True, max_length=512)["input_ids"]
                 for text in islice(texts, args.documents)]
    whole, half = models(len(tokenizer), args.width, args.layers)
    compare_depths(whole, half, args.rounds)

    packable, single, after = sentences(tokenizer, documents)
    lengths = [len(row) for row in single]
    print(f"\n{len(packable)} documents, {len(single)} sentence ends, {statistics.mean(lengths):.1f} tokens a sentence "
          f"(longest {max(lengths)})")
    extractor, steps = ActivationExtractor(half, tokenizer), {}
    steps["packed documents, half depth (ours)"] = lambda: extractor.collect(packable)
    for size in args.rows:
        for kind, rows in (("", single), (" after its document's text", after)):
            for depth, model in (("half depth", half), ("whole decoder", whole)):
                steps[f"a sentence a row{kind}, batches of {size}, {depth}"] = partial(
                    per_row, model, args.layers // 2, rows, size, model is whole)
    for name, (seconds, ratio) in compare(steps, args.rounds).items():
        print(f"{name:<76}{len(single) / seconds:>9,.0f} states/s   ours is {ratio:.2f}x as fast")
    stats = extractor.stats.summary()
    print(f"padding share of ours {stats['padding_share']:.3f}, used share {stats['used_share']:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
