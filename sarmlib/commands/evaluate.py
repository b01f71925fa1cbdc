"""``evaluate``: any reward model on RewardBench 2 and RM-Bench."""

from __future__ import annotations

HELP = "Score a reward model (SARM, scalar, or any sequence classifier) on RewardBench 2 and RM-Bench."
NAMES = {"rewardbench2": "rewardbench2", "rm-bench": "rm_bench"}


def add_arguments(parser) -> None:
    parser.add_argument("--model", required=True, help="folder (as save_pretrained or the hub lay it out) or hub id")
    parser.add_argument("--benchmark", default="rewardbench2,rm-bench", help="rewardbench2, rm-bench or both")
    parser.add_argument("--data", default="hub", help="folder with the benchmarks' files; hub (pinned commits); or toy "
                                                      "(the generated world)")
    parser.add_argument("--output", required=True, help="folder of scores.jsonl (resumed) and results.json")
    parser.add_argument("--revision", help="commit of a model on the hub")
    parser.add_argument("--rm-bench-revision", help="commit of THU-KEG/RM-Bench on the hub, with --data hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that the model brings")
    parser.add_argument("--limit", type=int, help="at most this many rows per subset (Ties couples stay whole)")
    parser.add_argument("--batch-tokens", type=int, help="padded tokens a batch (default: fitting the machine)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def run(arguments) -> None:
    from ..errors import ConfigError
    from ..evaluation.evaluate import evaluate, lines
    names = [name.strip() for name in arguments.benchmark.split(",") if name.strip()]
    if not names or (unknown := [name for name in names if name not in NAMES]):
        raise ConfigError(f"--benchmark {arguments.benchmark!r}: unknown {', '.join(unknown) if names else 'nothing'}; "
                          f"choose {' or '.join(NAMES)}")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: give a positive number of rows")
    scorer = _load(arguments)  # the model first: a mistyped name shows before any data are read
    rows = benchmark_rows([NAMES[name] for name in names], arguments.data, arguments.limit,
                          arguments.rm_bench_revision)
    found = evaluate(scorer, rows, arguments.output, batch_tokens=arguments.batch_tokens, progress=True)
    print("\n".join(lines(found)))


def _load(arguments):
    import torch

    from ..sarm.released import load_any
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return load_any(arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code,
                    dtype=arguments.dtype, device=device)


def benchmark_rows(names: list[str], data: str, limit: int | None = None, rm_bench_revision: str | None = None) -> dict:
    """``{"rewardbench2": rows, "rm_bench": rows}`` of a folder, the hub ("hub") or the toy world ("toy")."""
    from ..data import benchmarks
    from ..data.files import Rows
    from ..data.local import discover
    from ..errors import DataError
    from ..stages import _limit
    if data == "toy":
        from ..data.toyworld import datasets
        found = {name: Rows(getattr(datasets, name)(limit or 200, 0)) for name in names}
    elif data == "hub":
        revisions = {"rm_bench": rm_bench_revision}
        found = {name: getattr(benchmarks, f"load_{name}")(revision=revisions.get(name)) for name in names}
    else:
        local = discover(data, require=())
        absent = [name for name in names if getattr(local, name) is None]
        if absent:
            raise DataError(f"--data {data!r} holds no {' and no '.join(absent)}; put there the hub's files "
                            "(RewardBench 2: parquet or jsonl; RM-Bench: total_dataset.json or <domain>_filtered.json)")
        found = {name: getattr(benchmarks, f"load_{name}")(getattr(local, name)) for name in names}
    if limit is None or data == "toy":
        return found
    return {name: Rows(_limit(part, "subset" if name == "rewardbench2" else "domain", limit, 0), part.report)
            for name, part in found.items()}
