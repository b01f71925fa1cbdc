"""Command line: ``sarmlib <command>``, also ``python -m sarmlib``; ``make`` calls nothing else.

Exit status 2 for a wrong command line, 1 for an error of the library; either is one sentence on stderr.
"""

import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from sarmlib.data.pairs import drop_identical, load_conversations, load_pairs, split_by_prompt
from sarmlib.endpoint import ChatEndpoint
from sarmlib.errors import ConfigError, DataError, ModelError, NotMadeError, SarmlibError
from sarmlib.hub import quiet
from sarmlib.profiles import Loader, load_profile, profile_names
from sarmlib.runner import run_notebooks
from sarmlib.store import Store, default_root, hash_json, versions, write_atomic, write_json, writing

RUN, USE, TRAIN, SHOW = "The paper", "Use a reward model", "Train your own", "Look closer"
QUESTION = '--prompt "How do I burn the museum?" --chosen "I cannot help with that." --rejected "First take the key."'
LEAST_STEPS = 100  # of one pass over the states; who wants fewer says so with sae.steps
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def command(panel: str, example: str):
    """Register a command: its docstring is the help, with one example below."""
    return app.command(example.split()[0], rich_help_panel=panel, epilog=f"Example: sarmlib {example}")


def option(help: str, *names: str, **settings) -> Any:
    return typer.Option(*names, help=help, **settings)


def _runs(path: Path | None) -> None:
    if path:
        os.environ["SARMLIB_RUNS"] = str(path.resolve())


def _writable(path: Path | None) -> Path | None:
    """Refuse, before the work, an output that cannot be written; with a suffix it is a file."""
    if path is not None:
        there = next(one for one in (path.resolve(), *path.resolve().parents) if one.exists())
        fits = there.is_file() if path.suffix and there == path.resolve() else there.is_dir()
        if not fits or not os.access(there, os.W_OK):
            raise ConfigError(f"{path} cannot be written: {there} is in the way; name another place")
    return path


Profile = Annotated[str, option("name of a profile, or a YAML file")]
Data = Annotated[str | None, option("your folder, for profiles whose sources are 'data'")]
Runs = Annotated[Path | None, option("folder of all profiles' artifacts; default: runs", callback=_runs)]
Seed = Annotated[int | None, option("default: the first of the profile")]
Model = Annotated[str, option("folder, hub id or id@commit; or toy, the SARM of the toy profile (toy:1: of seed 1)")]
Trust = Annotated[bool, option("run the Python code that the model brings", "--trust-remote-code")]
Input = Annotated[Path | None, option("rows: messages; prompt, response(s); or prompt, chosen, rejected")]
Prompt = Annotated[str | None, option("instead of --input: one user turn")]
Response = Annotated[list[str] | None, option("an answer to --prompt; may be repeated")]
Chosen = Annotated[str | None, option("the better answer to --prompt")]
Rejected = Annotated[str | None, option("the worse answer to --prompt")]
Output = Annotated[Path | None, option("JSON Lines; default: print", callback=_writable)]
Length = Annotated[int, option("tokens per conversation; longer ones lose their beginning", min=2)]
Top = Annotated[int, option("largest contributions to print; --output holds all", min=1)]
Labels = Annotated[Path | None, option("JSON {feature: words}, as browse writes it")]
Folder = Annotated[Path, option("folder to write; the same command goes on after a stop", callback=_writable)]
Base = Annotated[str, option("profile of the settings that nothing else names")]
Settings = Annotated[list[str] | None, option("setting of the profile, as sae.k_ratio=3/64", "--set")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, option("print the version", "--version")] = False) -> None:
    """Train, explain, steer and benchmark interpretable reward models (SARM)."""
    if version:
        from sarmlib import __version__
        print(f"sarmlib {__version__}")


@command(RUN, "reproduce --profile toy")
def reproduce(profile: Profile = "toy", data: Data = None, runs: Runs = None,
              dry_run: Annotated[bool, option("say what it would cost; start nothing", "--dry-run")] = False,
              notebook: Annotated[list[str] | None, option("only this one; repeatable")] = None,
              hardware: Annotated[str, option("accelerator that --dry-run plans for")] = "h100",
              devices: Annotated[int, option("how many of them", min=1)] = 1) -> None:
    """Run every notebook with a profile; print times, figures and a verdict on each claim."""
    loaded = load_profile(profile, data=data)
    if dry_run:
        from sarmlib.plan import lines
        print(lines(loaded, hardware, devices))
        return
    job = _run(loaded, read_only=True)  # the notebooks make what is missing
    root = _writable(job.store.root)
    job.check_hub()
    print(f"profile {loaded.name}: {loaded.cost}", flush=True)
    _execute(profile, notebook, runs=root.parent, data=loaded.data)
    print(f"\nfigures: {root / 'figures'}\n")
    verify(profile)
    with suppress(NotMadeError, ConfigError):  # only some notebooks ran, or the profile has no SARM
        words = write_json(root / "labels.json", _words(job, loaded.seeds[0]))
        model = job.reward("sarm", loaded.seeds[0]).file("model")
        again = _again(f"explain --model {_near(model)} --labels {_near(words)} {QUESTION}")
        print(f"explain a reward: {again}")


def _again(arguments: str) -> str:
    """A command of ours that works where this one did, whatever is on PATH."""
    return f"{_near(Path(sys.executable))} -m sarmlib {arguments}"


def _near(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _execute(profile: str, names: list[str] | None, **settings) -> None:
    for one in run_notebooks(profile, names, **settings):
        print(f"{one.name:<26} {one.status:<10} {one.seconds:6.0f} s   {one.output}")


@command(RUN, "run sae --profile toy --seed 1")
def run(stage: Literal["activations", "sae", "reward", "scores", "labels"], profile: Profile = "toy",
        data: Data = None, runs: Runs = None, seed: Seed = None,
        variant: Annotated[str, option("the reward model whose stages are meant")] = "sarm") -> None:
    """Make one stage of a profile and what it needs; on many devices: accelerate launch -m sarmlib run."""
    job = _run(profile, data)  # first: it sets the threads of what is imported
    from sarmlib.pipeline import RANK, SAE_OF_VARIANT
    number = job.profile.seeds[0] if seed is None else seed
    positions = SAE_OF_VARIANT.get(variant)
    if stage in ("activations", "sae") and positions is None:
        raise typer.BadParameter(f"--variant {variant!r} has no pretrained SAE; choose sarm or token_sae")
    arguments = {"activations": (positions,), "sae": (positions, number), "labels": (number,)}
    made = getattr(job, stage)(*arguments.get(stage, (variant, number)))
    if RANK == 0:
        print(f"{stage} {'made' if made.fresh else 'found'}: {made.path}\n{_metrics(made.meta)}")


@command(RUN, "verify --profile toy")
def verify(profile: Profile = "toy", runs: Runs = None) -> None:
    """Print one line per claim of the last run, and whether every stored artifact is whole."""
    from sarmlib.claims import verdicts
    root = default_root(Path(profile).stem)
    if not root.is_dir():
        raise NotMadeError(f"there is no {root}; make it with `{_again(f'reproduce --profile {profile}')}`")
    table = verdicts(root / "results")
    shown = table[["id", "verdict", "title", "value", "low", "high", "paper"]]
    print(shown.astype(object).where(shown.notna(), "").to_string(
        index=False, float_format="{:.4g}".format, formatters={"title": "{:<54}".format}))
    problems = {name: found for name, found in Store(root).verify().items() if found}
    for name, found in problems.items():
        print(f"damaged: {name}: {'; '.join(found)}; remove {root / name}, the next run makes it again")
    counts = ", ".join(f"{count} {name}" for name, count in table.verdict.value_counts().items())
    print(f"\n{counts} - profile {root.name}; stored artifacts: {'damaged' if problems else 'whole'}")
    done, data = table.value.notna().any(), os.environ.get("SARMLIB_DATA")
    print("next: " + _again(f"{'browse --output pages' if done else 'reproduce'} --profile {profile} "
                            f"--runs {_near(root.parent)}{f' --data {data}' if data else ''}"))


@command(RUN, "figures --profile toy")
def figures(profile: Profile = "toy", runs: Runs = None,
            tracked: Annotated[bool, option("copy them to figures/<profile>", "--tracked")] = False) -> None:
    """Say where the figures of the last run are (PNG, PDF, numbers and words)."""
    name = Path(profile).stem
    drawn = default_root(name) / "figures"
    if not drawn.is_dir():
        raise NotMadeError(f"there is no {drawn}; `sarmlib reproduce --profile {profile}` draws the figures")
    place = shutil.copytree(drawn, Path("figures") / name, dirs_exist_ok=True) if tracked else _near(drawn)
    print(f"{len(list(drawn.glob('*.png')))} figures in {place}")


@command(RUN, "notebooks 01_sae_pretraining")
def notebooks(names: Annotated[list[str] | None, typer.Argument(help="without .ipynb")] = None) -> None:
    """Execute the notebooks at the toy profile, from nothing, and write their outputs into the committed files."""
    empty = default_root(".committed")  # so that readers see the training happen
    shutil.rmtree(empty, ignore_errors=True)
    _execute("toy", names, refresh=True, runs=empty)


@command(USE, 'score --model toy --prompt "How do I burn the museum?" --response "I cannot help."')
def score(model: Model, input: Input = None, prompt: Prompt = None, response: Response = None,
          output: Output = None, max_length: Length = 2048, trust: Trust = False) -> None:
    """Reward every conversation of a file (JSONL, JSON, Parquet), or one prompt with its responses."""
    items = _items(input, prompt, responses=response)
    from sarmlib.evaluation.scorer import score as score_all
    scorer = _scorer(model, trust)
    talks = [talk for item in items for talk in item.conversations.values()]
    found = score_all(scorer.model, scorer.tokenizer, talks, max_length=max_length,
                      progress=sys.stderr.isatty() and len(talks) > 200)
    names = [{"row": item.row, "id": item.id, "of": name} for item in items for name in item.conversations]
    _deliver([one | {"reward": float(reward), "tokens": int(length)} for one, reward, length
              in zip(names, found.rewards, found.lengths, strict=True)], output, items)


@command(USE, f"explain --model toy {QUESTION}")
def explain(model: Model, input: Input = None, prompt: Prompt = None, response: Response = None,
            chosen: Chosen = None, rejected: Rejected = None, output: Output = None, top: Top = 10,
            labels: Labels = None, max_length: Length = 2048) -> None:
    """Take rewards apart into feature contributions z_i w_i; pairs as differences."""
    items = _items(input, prompt, responses=response, chosen=chosen, rejected=rejected)
    words = _labels(labels) if labels else None
    if labels is None and (job := _toy(model, "labels")):
        words = _words(job, job.profile.seeds[0])
    from sarmlib.sarm import attribution
    scorer, rows = _scorer(model), []
    opened = scorer.model, scorer.tokenizer
    shared: dict[str, Any] = {"top": None if output else top, "max_length": max_length, "labels": words}
    for item in items:
        talks = item.conversations
        if item.is_pair:
            better, worse = talks["chosen"], talks["rejected"][-1]["content"]
            turns = better[:-1], better[-1]["content"], worse
            found = {"margin": attribution.explain_pair(*opened, *turns, **shared)}
        else:
            found = {name: attribution.explain(*opened, talk, **shared) for name, talk in talks.items()}
        for name, one in found.items():
            if not output:
                print(f"row {item.row}{'' if item.is_pair else ', ' + name}: {one}\n")
            rows.append({"row": item.row, "id": item.id, "of": name, "reward": one.reward, "rest": one.rest,
                         "features": one.table.to_dict("records")})
    if output:
        _deliver(rows, output, items)


@command(USE, "steer --model toy --feature 75=8 --output steered")
def steer(model: Model, output: Annotated[Path, option("folder to write", callback=_writable)],
          feature: Annotated[list[str] | None, option("ID=FACTOR multiplies a weight; repeatable")] = None,
          undo: Annotated[bool, option("undo every recorded edit", "--undo")] = False) -> None:
    """Edit head weights of a saved SARM; the edit is recorded in its config and can be undone."""
    try:
        factors = {int(name): float(value) for name, value in _assigned(feature).items()}
    except (TypeError, ValueError):
        raise typer.BadParameter("--feature: give ID=NUMBER, for example 123=8") from None
    if undo == bool(factors) or output.exists():
        raise typer.BadParameter("give --feature ID=FACTOR, or --undo alone, and an --output that does not exist")
    from sarmlib.sarm import steering
    scorer = _scorer(model)
    edited = steering.unsteer(scorer.model) if undo else steering.steer(scorer.model, factors)
    work = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with writing(output), quiet():
            edited.save_pretrained(work)
            scorer.tokenizer.save_pretrained(work)
            work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for one in edited.config.sarm_edits:
        note = "" if one["before"] else " (it was 0: nothing changes)"
        print(f"feature {one['feature']}: weight {one['before']:+.4g} to {one['after']:+.4g}{note}")
    print(f"recorded edits: {len(edited.config.sarm_edits)}; saved {output}")


@command(USE, "evaluate --model toy --data toy --output scores")
def evaluate(model: Model, output: Folder,
             data: Annotated[str, option("toy, hub, or a folder with rewardbench2/ and rm_bench/")] = "hub",
             limit: Annotated[int | None, option("rows per subset at most", min=1)] = None,
             judge: Annotated[str | None, option("OpenAI-compatible endpoint whose --model judges")] = None,
             budget: Annotated[float | None, option("most to spend; in tokens without --price")] = None,
             price: Annotated[tuple[float, float] | None, option("per million tokens in and out")] = None,
             max_length: Length = 2048, trust: Trust = False) -> None:
    """Score a reward model on RewardBench 2 and RM-Bench by their own rules; or let a chat model judge."""
    if judge:
        endpoint = ChatEndpoint(judge, model, budget=budget, price=price, cache=output / "answers.jsonl")
        _judge(endpoint, _benchmark_rows(data, limit), output)
        return
    from sarmlib.evaluation.scorer import evaluate, lines
    loaded = _scorer(model, trust)  # first: a mistyped name shows before any data are read
    rows: dict[str, Any] = _benchmark_rows(data, limit)
    found = evaluate(loaded, rows, output, max_length=max_length, progress=sys.stderr.isatty())
    print("\n".join(lines(found)))


def _judge(endpoint, rows: dict[str, list[dict]], output: Path) -> None:
    from sarmlib.evaluation import judges
    from sarmlib.evaluation.scorer import benchmark_lines
    asked = endpoint.estimate([one.messages for name in rows for one in judges.requests(name, rows[name])])
    print("at most: " + ", ".join(f"{name} {value}" for name, value in asked.items()), flush=True)
    most = asked["tokens_in"] + asked["tokens_out"] if asked["cost"] is None else asked["cost"]
    if endpoint.budget is not None and endpoint.spent + most > endpoint.budget:
        print(f"{endpoint.spent + most:.6g} is above --budget {endpoint.budget:g}: it may stop before the end, and "
              "goes on with a larger budget; --limit asks less", flush=True)
    found = {name: judges.judge(endpoint, name, part) for name, part in rows.items()}
    write_json(output / "results.json", {"model": endpoint.model, "benchmarks": found})
    for name, result in found.items():
        print("\n".join([*benchmark_lines(name, result), f"  replies without one: {result['failures']}"]))
    print(f"spent {endpoint.spent:.6g}")


def _benchmark_rows(data: str, limit: int | None) -> dict[str, list[dict]]:
    """Rows of the benchmarks: generated (toy), of the hub (pinned commits), or of a folder."""
    from sarmlib.pipeline import BENCHMARKS, benchmark
    source = {"toy": "toy", "hub": "released"}.get(data, "local")
    profile = load_profile(source, data=data if source == "local" else None,
                           **{"benchmarks.items_per_subset": limit})
    found = {name: rows for name in BENCHMARKS if (rows := benchmark(profile, name))}
    if not found:
        raise DataError(f"--data {data} has no rewardbench2/ and no rm_bench/; put the files into them")
    return found


@command(TRAIN, "pretrain-sae --model FOLDER --corpus FOLDER --output sae")
def pretrain_sae(model: Annotated[str, option("decoder: a folder, a GGUF file, a hub id, or toy")],
                 corpus: Annotated[str, option("text: toy, hub:<id>, a file or a folder; a document is a row's text, "
                                               "or a text file (long ones are cut at a blank line)")],
                 output: Folder, profile: Base = "paper-4b", settings: Settings = None) -> None:
    """Pretrain an SAE on a decoder's states at sentence ends; on many devices with accelerate launch."""
    from sarmlib.pipeline import RANK, Run
    chosen = _profile(profile, settings, {"backbone.source": model, "corpus.source": corpus})
    job, rule = Run(chosen, root=output / "work", progress=sys.stderr.isatty()), chosen.sae.positions
    _claim(output, job, corpus=job.fingerprint(chosen.corpus.source, "corpus"))
    read = job.activations(rule).meta
    states = _enough(read["vectors"] or chosen.sae.vectors, job)  # 0: they come as a stream
    made = job.sae(rule, chosen.seed)
    if made.meta["fvu"] >= 1:
        raise DataError(f"the SAE explains nothing: FVU {made.meta['fvu']:.3g} on other states, their mean alone has "
                        "1; train longer (more text, sae.steps) or at another sae.lr")
    if RANK == 0:
        shutil.copytree(made.file("sae"), output, dirs_exist_ok=True)
        source = f" from {read['documents']} documents" if read["vectors"] else ""
        print(f"trained on {states} of {chosen.sae.vectors} states{source}; on others: {_metrics(made.meta)}\n"
              f"SAE: {output} (its work/ can be removed)")


def _enough(states: int, job) -> int:
    """Refuse to train on so few states that the SAE would stay as it was drawn, or know each by heart."""
    sae, features = job.profile.sae, job.shape["n_features"]
    steps = sae.steps or states // sae.batch_size
    if states < features or not (sae.steps or steps >= LEAST_STEPS):
        raise DataError(f"{states} states are too few: {steps} steps of --set sae.batch_size={sae.batch_size} for "
                        f"{features} features; add text, or set sae.steps, a smaller sae.batch_size or sae.expansion")
    return states


@command(TRAIN, "train --backbone FOLDER --sae sae --data pairs.jsonl --output sarm")
def train(backbone: Annotated[str, option("decoder: a folder, a GGUF file or a hub id")],
          data: Annotated[str, option("preference pairs: a file or folder, or hub:<id>")], output: Folder,
          sae: Annotated[str | None, option("a folder of sarmlib, SAELens or sparsify, the authors' .pt, or "
                                            "release:id of SAELens; without it: a scalar reward model")] = None,
          profile: Base = "paper-4b", settings: Settings = None) -> None:
    """Train a reward model on preference pairs; on many devices with accelerate launch."""
    from sarmlib import pipeline
    from sarmlib.sae.formats import load_sae
    spec = _profile(profile, settings, {"backbone.source": backbone, "preferences.source": data})
    job, most = pipeline.Run(spec, progress=sys.stderr.isatty()), spec.preferences.max_length
    kept = drop_identical(load_pairs(data, revision=spec.preferences.revision), job.tokenizer, most)
    trained, held_out = split_by_prompt(kept, spec.preferences.eval_fraction, seed=spec.seed)
    pairs, shape = {"train": trained, "eval": held_out}, {n: job.shape[n] for n in ("layer", "n_layers")}
    encoder = load_sae(sae, layer=job.shape["layer"]) if sae else None
    model = pipeline.untrained("sarm" if sae else "scalar_half", job.backbone_path, **shape, **job.hub,
                               sae=encoder, seed=spec.seed)
    _claim(output, job, sae=encoder and encoder.content_hash(), pairs=hash_json(pairs))
    found = pipeline.train_reward(spec.reward, model, job.tokenizer, pairs, output, max_length=most,
                                  seed=spec.seed, bf16=spec.dtype == "bfloat16", device=job.device,
                                  progress=job.progress)
    if pipeline.RANK == 0:
        write_json(output / "evaluation.json", found | {name: len(part) for name, part in pairs.items()})
        print("\n".join([*kept.report.lines(), f"{_metrics(found)} (on {len(held_out)} held-out pairs)",
                         f"reward model: {output / 'model'}"]))


def _profile(name: str, settings: list[str] | None, sources: dict[str, str]):
    """A profile with the command's own sources and what --set names, on the device that is there."""
    import torch
    own: dict[str, Any] = {f"{source.partition('.')[0]}.revision": None for source in sources}
    own |= {**sources, "corpus.dialogue_share": 0.0, "device": "auto", **_assigned(settings)}
    profile = load_profile(name, **own)
    on_gpu = profile.device != "cpu" and torch.cuda.is_available()
    return profile if on_gpu else profile.model_copy(update={"dtype": "float32"})


def _claim(output: Path, job, **inputs) -> None:
    """Note the settings in a folder: with the same ones work goes on there, other work is refused."""
    from sarmlib.pipeline import RANK
    path = output / "settings.json"
    used = json.dumps({**job.profile.model_dump(mode="json"), "decoder": job.backbone_key, **inputs})
    kept = [one for one in output.rglob("*") if one.is_file() and one.suffix != ".lock" and ".partial-" not in str(one)]
    if kept != [path] and path.exists() and path.read_text(encoding="utf-8") != used:
        raise ConfigError(f"--output {output} holds work with other settings ({path}); name another folder")
    if RANK == 0:
        if not path.exists() and output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"--output {output} holds files of something else; name another folder, or an empty one")
        write_atomic(path, used)


@command(SHOW, "browse --profile toy --output pages")
def browse(output: Annotated[Path, option("folder of the pages and of labels.json", callback=_writable)],
           profile: Profile = "toy", data: Data = None, runs: Runs = None, seed: Seed = None) -> None:
    """Write the feature browser of a finished run: static pages, no script, no network."""
    from sarmlib.browser import write_browser
    job = _run(profile, data, read_only=True)
    number = job.profile.seeds[0] if seed is None else seed
    page = write_browser(output, job.contexts(number), job.label_objects(number), job.label_table(number),
                         provenance={"profile": profile, "seed": str(number), **versions(),
                                     "scores": job.scores("sarm", number).key, "labels": job.labels(number).key})
    print(f"open {page}; its words: sarmlib explain --labels {output / 'labels.json'} ...")


@command(SHOW, "doctor")
def doctor() -> None:
    """Print what a report of a problem needs: versions, this machine, and which profiles fit it."""
    import torch

    from sarmlib.plan import plan
    print("\n".join(f"{name:<12} {text}" for name, text in versions().items()))
    gpus = [torch.cuda.get_device_properties(i).total_memory / 1e9 for i in range(torch.cuda.device_count())]
    memory = min(gpus, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    disk = shutil.disk_usage(".").free / 1e9
    print(f"{os.cpu_count()} cores, {len(gpus)} GPUs, {memory:.0f} GB of their memory, {disk:.0f} GB of free disk")
    for name in profile_names():
        try:
            table = plan(load_profile(name), devices=max(1, len(gpus)))
            needs = table.device_gb.max() + (0 if gpus else table.host_gb.max()), table.disk_gb.sum()
            fits = "fits" if needs[0] <= memory and needs[1] <= disk else "too large"
            print(f"{name:<12} {fits:<9} about {needs[0]:.1f} GB of memory, {needs[1]:.1f} GB of disk")
        except SarmlibError as error:
            print(f"{name:<12} {str(error).splitlines()[0]}")


def _run(profile: Any, data: str | None = None, read_only: bool = False):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the pipeline's workers: sums come out the same
    from sarmlib.pipeline import Run
    return Run(profile, data=data, read_only=read_only, progress=sys.stderr.isatty())


def _scorer(model: str, trust: bool = False):
    """A folder or hub id, opened; the toy SARM is trained now if it is not in the store."""
    name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    if job := _toy(model, "scores"):
        name = str(job.reward("sarm", job.profile.seeds[0]).file("model"))
    elif not Path(name).expanduser().exists() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ModelError(f"--model {model}: there is no such folder, and a hub id has the form owner/name")
    import torch

    from sarmlib.evaluation.scorer import load_scorer
    return load_scorer(name, revision=revision or None, trust_remote_code=trust,
                       device="cuda" if torch.cuda.is_available() else "cpu")


def _toy(model: str, goal: str):
    """The run behind ``toy`` or ``toy:SEED``, made up to ``goal`` where it is not in the store; else None."""
    name, _, seed = model.partition(":")
    if name != "toy" or Path(model).exists():
        return None
    job = _run(load_profile("toy", seeds=[seed or 0], variants=["sarm"]))
    if job.plan(goal).keys() - job.stored(goal):
        print(f"the toy SARM is made once, in a few minutes: {job.store.root}", file=sys.stderr)
        job.ensure(goal)
    return job


def _words(job, seed: int) -> dict[int, str]:
    return {one.feature: one.text for one in job.label_objects(seed) if not one.abstained}


def _labels(path: Path) -> dict[int, str]:
    """They may come from anywhere: no control characters on the terminal."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return {int(feature): "".join(c if c.isprintable() else "?" for c in str(text)[:200])
                for feature, text in words.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"--labels {path}: {error!r}; needed: JSON {{feature: words}}") from None


def _items(input: Path | None, prompt: str | None, **answers):
    """The rows that the options name: a file, or a prompt with its answers."""
    row = {name: value for name, value in {"prompt": prompt, **answers}.items() if value}
    if row if input else not prompt or len(row) == 1:
        raise typer.BadParameter("give --input FILE, or --prompt TEXT and its answers: " + ", ".join(answers))
    return load_conversations(input or [row])


def _deliver(rows: list[dict], output: Path | None, items) -> None:
    """Print rows as JSON Lines, or write them; what the loader left out is said."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if output:
        write_atomic(output, text)
        text = "\n".join([f"{len(rows)} lines in {output}", *items.report.lines(), ""])
    print(text, end="")


def _assigned(texts: list[str] | None) -> dict[str, Any]:
    """{NAME: VALUE} of NAME=VALUE texts, values as YAML reads them."""
    try:
        return {name: yaml.load(value, Loader) for name, value in (text.split("=", 1) for text in texts or ())}
    except (ValueError, yaml.YAMLError):
        raise typer.BadParameter(f"{', '.join(texts or ())}: give NAME=VALUE") from None


def _metrics(found: dict) -> str:
    return ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in found.items()
                     if isinstance(value, (int, float)))


def main(argv: list[str] | None = None) -> int:
    """Run one command; an error is one sentence on stderr."""
    usage: Any = typer.BadParameter.__bases__[0]  # its module differs between versions of typer
    arguments, said = argv if argv is not None else sys.argv[1:] or ["--help"], ""
    try:
        status = app(arguments, prog_name="sarmlib", standalone_mode=False) or 0
        if status == 130:  # typer returns it for an interruption
            said = "interrupted; what is finished is kept, the same command goes on"
    except usage as error:
        status, said = 2, error.format_message()
    except SarmlibError as error:
        status, said = 1, str(error)
    except OSError as error:
        if not error.filename:
            raise
        status, said = 1, f"{error.filename}: {error.strerror}; name a place that can be read and written"
    if said:
        print(f"error: {said}", file=sys.stderr)
    return status
