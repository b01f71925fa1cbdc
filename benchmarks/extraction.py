"""Extraction: half depth against the whole decoder, and packed documents against one sentence per row; CPU time."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from functools import partial
from itertools import islice

import torch
from transformers import AutoModel, LlamaConfig

from sarmlib.backbone import cut_config, load_tokenizer, strip_final_norm
from sarmlib.data.corpora import iter_corpus
from sarmlib.data.toyworld.datasets import corpus as toy_corpus
from sarmlib.data.toyworld.tokenizer import build_tokenizer
from sarmlib.extractor import ActivationExtractor, position_rule


def models(vocabulary: int, width: int, layers: int):
    """(whole decoder, its lower half) with the same random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4,
                         num_hidden_layers=layers, num_attention_heads=width // 32, max_position_embeddings=1024)
    whole = AutoModel.from_config(config).eval()
    half = AutoModel.from_config(cut_config(copy.deepcopy(config))).eval()
    half.load_state_dict(whole.state_dict(), strict=False)
    strip_final_norm(half)
    return whole, half


def compare(steps: dict, rounds: int) -> dict[str, float]:
    """Least process-CPU seconds of each step over interleaved rounds (the first warms up)."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:
                times[name].append(time.process_time() - start)
    ratio = {name: statistics.median(t / b for t, b in zip(values, times[next(iter(steps))], strict=True))
             for name, values in times.items()}
    return {name: (min(values), ratio[name]) for name, values in times.items()}


@torch.no_grad()
def per_row(model, layer: int, rows: list[list[int]], batch: int, whole: bool) -> int:
    """One row per sentence, right-padded to the longest of its batch; the state of each row's last token."""
    used = 0
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        longest = max(map(len, part))
        input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in part])
        out = model(input_ids=input_ids, attention_mask=mask, use_cache=False, output_hidden_states=whole)
        states = out.hidden_states[layer] if whole else out.last_hidden_state
        used += len(states[torch.arange(len(part)), mask.sum(1) - 1])
    return used


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
    parser.add_argument("--isolated", action="store_true", help="leave out the rows with their document's text")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else build_tokenizer(4000)
    texts = iter_corpus(arguments.corpus) if arguments.corpus else toy_corpus(arguments.documents, 0)
    documents = [tokenizer(text, truncation=True, max_length=512)["input_ids"]
                 for text in islice(texts, arguments.documents)]
    whole, half = models(len(tokenizer), arguments.width, arguments.layers)
    layer = arguments.layers // 2

    ids = torch.randint(3, len(tokenizer), (4, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = torch.equal(whole(input_ids=ids[:, :64], output_hidden_states=True).hidden_states[layer],
                           half(input_ids=ids[:, :64]).last_hidden_state)

        def run(model, **options):
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, **options)

        times = compare({"half": lambda: run(half), "whole": lambda: run(whole, output_hidden_states=True)},
                        arguments.rounds)
    print(f"random Llama, d {arguments.width}, {arguments.layers} layers, 4 x 512 tokens, one thread")
    print(f"half depth {times['half'][0] * 1e3:.0f} ms, whole with output_hidden_states {times['whole'][0] * 1e3:.0f} "
          f"ms: {times['whole'][1]:.2f}x; same states: {same}")

    rule, sentences, prefixes, packable = position_rule(tokenizer), [], [], []
    for document in documents:
        row = torch.tensor([document])
        ends = [i for i in rule(row, torch.ones_like(row))[0].nonzero()[:, 0].tolist() if i < len(document) - 1]
        if not ends:
            continue
        packable.append(document[: ends[-1] + 1])
        starts = [0, *(end + 1 for end in ends[:-1])]
        sentences += [document[a:b + 1] for a, b in zip(starts, ends, strict=True)]
        prefixes += [document[: end + 1] for end in ends]
    extractor = ActivationExtractor(half, tokenizer, window=512, batch_size=4)
    used = len(extractor.collect(packable))
    lengths = [len(row) for row in sentences]
    print(f"\n{len(packable)} documents, {used} sentence ends, {statistics.mean(lengths):.1f} tokens a sentence "
          f"(longest {max(lengths)})")
    steps = {"packed documents, half depth (ours)": lambda: extractor.collect(packable)}
    for size in arguments.rows:
        for kind, rows in (("", sentences), (" after its document's text", prefixes)):
            if kind and arguments.isolated:
                continue
            for depth, model in (("half depth", half), ("whole decoder", whole)):
                steps[f"a sentence a row{kind}, batches of {size}, {depth}"] = partial(
                    per_row, model, layer, rows, size, model is whole)
    for name, (seconds, ratio) in compare(steps, arguments.rounds).items():
        print(f"{name:<76}{used / seconds:>9,.0f} states/s   ours is {ratio:.2f}x as fast")
    stats = extractor.stats.summary()
    print(f"padding share of ours {stats['padding_share']:.3f}, used share {stats['used_share']:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
