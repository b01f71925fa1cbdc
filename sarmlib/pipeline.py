"""The pipeline: a profile in, artifacts out.  Notebooks and the command line call nothing else to train or score.

    backbone -> activations -> sae -> reward -> scores -> labels     (activations and SAEs per position rule)
    preferences --------------------^             ^
    benchmarks -----------------------------------+

A stage is a method of :class:`Run`; a module-level function ``_make_<stage>`` makes it when it is absent.  These
functions hold all that decides a result: an artifact's key hashes the source they reach.
"""

import functools
import itertools
import json
import os
import shutil
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array, vstack
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, ProgressCallback

from sarmlib import plan
from sarmlib.backbone import cut_config, load_backbone, load_tokenizer, n_layers
from sarmlib.chat import check_vocabulary, encode_conversations
from sarmlib.data import benchmarks as loaders
from sarmlib.data import pairs as preference
from sarmlib.data.rows import iter_rows
from sarmlib.data.text import iter_texts
from sarmlib.data.toyworld import datasets as toy
from sarmlib.data.toyworld.lexicon import VERDICTS, WORDS
from sarmlib.endpoint import from_environment
from sarmlib.errors import ConfigError, DataError, NotMadeError
from sarmlib.evaluation.readout import BLAME, PRAISE, read_out, vocabulary_readout
from sarmlib.evaluation.scorer import answers, score, score_rows
from sarmlib.extractor import ActivationExtractor
from sarmlib.hub import check_access, from_hub, quiet, weights_from_hub
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import KeywordExplainer, Label
from sarmlib.interpretation.judges import KeywordJudge, judge_labels
from sarmlib.interpretation.llm import LLMExplainer, LLMJudge
from sarmlib.jobs import run_jobs
from sarmlib.profiles import Profile, load_profile
from sarmlib.sae.quality import evaluate_sae
from sarmlib.sae.topk import TopKSAE
from sarmlib.sae.training import BUFFER, SAETrainConfig, train_sae
from sarmlib.sarm.model import SarmForSequenceClassification, ScalarRewardModel
from sarmlib.store import Artifact, Store, default_root, hash_json, hash_tree, write_atomic

HELD_OUT = 4096  # activation vectors kept apart to evaluate an SAE on
SAE_OF_VARIANT = {"sarm": "sentence_end", "token_sae": "every", "random_encoder": None}
"""Position rule of the SAE inside each variant that has an encoder; None: no SAE is trained for it."""
NO_PAIRS = {"no_pairs": "layer", "no_pairs_whole": "n_layers"}
"""Variants that are the decoder itself, and the entry of `Run.shape` that says how many of its layers are read."""
BENCHMARKS = ("rewardbench2", "rm_bench")
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # of ``accelerate launch``


@dataclass(frozen=True)
class Scored:
    """Benchmark scores of one reward model, and its features at the reward position."""

    rewardbench2: list[dict]
    rm_bench: list[dict]
    units: pd.DataFrame  # one line per response: the columns of benchmark_units, reward, and length in tokens
    z: csr_array | None  # [units, M]; None for a model without an encoder

    def part(self, benchmark: str) -> tuple[pd.DataFrame, csr_array | None]:
        """Units and features of one benchmark ("rewardbench2" or "rm_bench"), index reset."""
        rows = np.flatnonzero(self.units.benchmark == benchmark)
        return self.units.iloc[rows].reset_index(drop=True), None if self.z is None else self.z[rows]


class Run:
    """A profile bound to a store.  ``data`` is the user's folder for profiles whose sources are ``data``."""

    def __init__(self, profile: Profile | str = "toy", *, data: str | None = None, root: Path | str | None = None,
                 progress: bool = True, read_only: bool = False):
        self.profile = load_profile(profile, data=data) if isinstance(profile, str) else profile
        self.store = Store(root or default_root(self.profile.name), read_only=read_only)
        self.progress = progress and RANK == 0
        self.hub = self.profile.backbone.model_dump(include={"revision", "trust_remote_code"})
        for name in ("scored", "states", "explainer", "fingerprint"):  # a notebook asks for them dozens of times
            setattr(self, name, functools.cache(getattr(self, name)))

    @cached_property
    def backbone_path(self) -> str:
        """Folder, GGUF file or hub id of the pretrained decoder."""
        return plan.backbone_path(self.profile)

    @cached_property
    def tokenizer(self):
        """The decoder's tokenizer."""
        tokenizer = load_tokenizer(self.backbone_path, **self.hub)
        check_vocabulary(from_hub(AutoConfig, self.backbone_path, **self.hub), tokenizer)
        return tokenizer

    @cached_property
    def shape(self) -> dict[str, int]:
        """d_model, n_layers, layer (l), n_features (M) and k of this run."""
        config, sae = from_hub(AutoConfig, self.backbone_path, **self.hub), self.profile.sae
        d, layer = config.hidden_size, n_layers(cut_config(config, self.profile.backbone.layer))
        return {"d_model": d, "n_layers": n_layers(config), "layer": layer, "n_features": sae.n_features(d),
                "k": sae.k(d)}

    @cached_property
    def device(self) -> str:
        """Where models run: the profile's device, or this process's own GPU under ``accelerate launch``."""
        wanted = self.profile.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if wanted == "cuda" and WORLD > 1 else wanted

    @cached_property
    def backbone_key(self) -> str:
        """Hash of the checkpoint's files, or of id and revision when it lies on the hub."""
        path = self.backbone_path
        return hash_json(hash_tree(path) if Path(path).exists() else [path, self.hub["revision"]])[:16]

    def check_hub(self) -> None:
        """Ask, before the first minute is spent, for all that lies elsewhere: the hub's files and the endpoint.

        Raises ConfigError (no endpoint is named), OfflineError, ModelError or DataError (the hub refuses).
        """
        if _is_remote(self.backbone_path):
            _ = self.shape, self.tokenizer  # small files; a gated model is refused here
        spec, tests = self.profile, self.profile.benchmarks
        wanted = {tests.rewardbench2: tests.rewardbench2_revision, tests.rm_bench: tests.rm_bench_revision}
        if spec.variants:
            wanted |= {part.source: part.revision for part in (spec.preferences, spec.corpus)}
            if spec.interpretation.explainer == "llm":
                self.endpoint()
        for source, revision in wanted.items():
            if _is_remote(source):
                check_access(source.removeprefix("hub:"), revision, repo_type="dataset")

    def endpoint(self):
        """The chat model that labels features, from the environment; its answers are kept beside the artifacts."""
        return from_environment(self.store.root / "answers.jsonl")

    def texts(self, seed: int = 0) -> Iterator[str | list[int]]:
        """The SAE's corpus: documents, among them ``corpus.dialogue_share`` conversations of training pairs."""
        return _texts(self, seed)

    def preferences(self, seed: int) -> Artifact:
        """Training and evaluation pairs (train.jsonl, eval.jsonl) and a report of what was read and dropped."""
        spec = self.profile.preferences
        settings = {**spec.model_dump(), "data": self.fingerprint(spec.source, "pairs"),
                    "backbone": self.backbone_key}  # for its tokenizer
        return self._get(_make_preferences, (seed,), settings, self.benchmarks())

    def benchmarks(self) -> Artifact:
        """The rows of both benchmarks as they are scored."""
        spec = self.profile.benchmarks
        settings = {**spec.model_dump(exclude={"max_length"}), "seed": self.profile.seed,
                    "data": [self.fingerprint(getattr(spec, name), name) for name in BENCHMARKS]}
        return self._get(_make_benchmarks, (), settings)

    def activations(self, positions: str) -> Artifact:
        """Hidden states after layer l at ``positions``, float32: those to train on, then 4096 held-out ones.

        Above ``corpus.budget_gb`` only held-out ones are kept, of the first documents; the SAE is then trained on
        those of all further documents as they are computed.
        """
        spec, corpus, layer = self.profile, self.profile.corpus, self.shape["layer"]
        kept = (spec.sae.vectors + HELD_OUT) * self.shape["d_model"] * 4 <= corpus.budget_gb * 1e9
        settings = {**corpus.model_dump(exclude={"budget_gb"}), "vectors": spec.sae.vectors, "layer": layer,
                    "seed": spec.seed, "dtype": spec.dtype, "data": self.fingerprint(corpus.source, "corpus"),
                    "backbone": self.backbone_key}
        dialogues = [self.preferences(spec.seed)] if corpus.dialogue_share else []
        return self._get(_make_activations, (positions, kept), settings, *dialogues, shared=True, resumes=False)

    def sae(self, positions: str, seed: int) -> Artifact:
        """A trained SAE (``sae/``), its log and its metrics on held-out states."""
        settings = {**self.profile.sae.model_dump(exclude={"vectors"}), **self.shape}
        return self._get(_make_sae, (positions, seed), settings, self.activations(positions), shared=True)

    def reward(self, variant: str, seed: int) -> Artifact:
        """A trained reward model (``model/``), its log and held-out accuracy; ConfigError for an unknown variant."""
        spec, positions = self.profile, SAE_OF_VARIANT.get(variant)
        if variant not in spec.variants:
            raise ConfigError(f"profile {spec.name!r} has no variant {variant!r}; its variants: "
                              f"{', '.join(spec.variants) or 'none'}")
        settings = {**spec.reward.model_dump(), **self.shape, "dtype": spec.dtype,
                    "max_length": spec.preferences.max_length, "backbone": self.backbone_key}
        inputs = [self.preferences(seed)] + ([self.sae(positions, seed)] if positions else [])
        return self._get(_make_reward, (variant, seed), settings, *inputs, shared=True)

    def scores(self, variant: str, seed: int) -> Artifact:
        """Both benchmarks scored by one model; features at the reward position where it has any.

        Variants of `NO_PAIRS` are the decoder itself, read out by its vocabulary (`evaluation.readout`), for any seed.
        """
        settings: dict[str, Any] = {"max_length": self.profile.benchmarks.max_length}
        if variant in NO_PAIRS:
            settings |= {"dtype": self.profile.dtype, "backbone": self.backbone_key}
            return self._get(_make_no_pairs, (self.shape[NO_PAIRS[variant]],), settings, self.benchmarks())
        return self._get(_make_scores, (variant, seed), settings, self.reward(variant, seed), self.benchmarks())

    def labels(self, seed: int) -> Artifact:
        """Labels of the features that move the reward most, and how they do on held-out prompts."""
        spec = self.profile.interpretation
        settings = {**spec.model_dump(), "bootstrap": self.profile.steering.bootstrap}
        if spec.explainer == "llm":
            settings["model"] = os.environ.get("SARMLIB_LLM_MODEL")
        return self._get(_make_labels, (seed,), settings, self.scores("sarm", seed))

    def pairs(self, seed: int) -> dict[str, list[dict]]:
        """``{"train": [...], "eval": [...]}`` of :meth:`preferences`."""
        return _read_rows(self.preferences(seed), "train", "eval")

    def benchmark_rows(self) -> dict[str, list[dict]]:
        """``{"rewardbench2": rows, "rm_bench": rows}``."""
        return _read_rows(self.benchmarks(), *BENCHMARKS)

    def vectors(self, positions: str) -> dict[str, Any]:
        """``{"train": [N, d], "held_out": [n, d]}`` of :meth:`activations`, memory-mapped; N = 0 if streamed."""
        made, width = self.activations(positions), self.shape["d_model"]
        sizes = {"train": made.meta["vectors"], "held_out": made.meta["held_out"]}
        states = torch.from_file(str(made.file("states.f32")), size=sum(sizes.values()) * width)
        return dict(zip(sizes, states.view(-1, width).split(list(sizes.values())), strict=True))

    def load_sae(self, positions: str, seed: int) -> TopKSAE:
        """The trained SAE."""
        return TopKSAE.load(self.sae(positions, seed).file("sae"))

    def load_reward(self, variant: str, seed: int):
        """The trained reward model of a variant, in the profile's number format."""
        kind = SarmForSequenceClassification if variant in SAE_OF_VARIANT else ScalarRewardModel
        folder = self.reward(variant, seed).file("model")
        return kind.from_pretrained(folder, dtype=getattr(torch, self.profile.dtype)).eval()

    def scored(self, variant: str, seed: int) -> Scored:
        """Scores joined to the benchmark rows: scored rows for their scorers, units and z for analysis."""
        arrays = load_file(self.scores(variant, seed).file("scores.safetensors"))
        rows = self.benchmark_rows()
        units = pd.concat([benchmark_units(name, part) for name, part in rows.items() if part], ignore_index=True)
        units["reward"], units["length"] = arrays["rewards"], arrays["lengths"]
        values = units.groupby(["benchmark", "row"]).reward.agg(list)
        best = [{**row, "scores": values["rewardbench2", i]} for i, row in enumerate(rows["rewardbench2"])]
        pairs = [{**row, "score_chosen": values["rm_bench", i][:3], "score_rejected": values["rm_bench", i][3:]}
                 for i, row in enumerate(rows["rm_bench"])]
        parts = tuple(arrays.get(name) for name in ("data", "indices", "indptr"))
        return Scored(best, pairs, units, csr_array(parts, shape=arrays["shape"]) if "shape" in arrays else None)

    def states(self, variant: str, seed: int) -> np.ndarray:
        """The state after layer l, which the encoder reads, of every RM-Bench response: float32 [n, d]."""
        units, _ = self.scored(variant, seed).part("rm_bench")
        model = self.load_reward(variant, seed).to(self.device)
        return score(model, self.tokenizer, conversations(units), states=True,
                     max_length=self.profile.benchmarks.max_length).states

    def head(self, variant: str, seed: int) -> np.ndarray:
        """w [M] float64: the linear head of a trained variant."""
        with safe_open(self.reward(variant, seed).file("model/model.safetensors"), "pt") as weights:
            return weights.get_tensor("score.weight")[0].double().numpy()

    def contexts(self, seed: int) -> Contexts:
        """RM-Bench responses and SARM's features at their reward positions, split by prompt (RQ1)."""
        units, z = self.scored("sarm", seed).part("rm_bench")
        return Contexts(z, units, w=self.head("sarm", seed), seed=self.profile.seed)

    def explainer(self, seed: int) -> KeywordExplainer:
        """The keyword explainer; its ``vocabulary`` also serves the keyword judge."""
        spec = self.profile.interpretation
        return KeywordExplainer(self.contexts(seed), permutations=spec.permutations, top=spec.top_keywords, seed=seed)

    def label_table(self, seed: int) -> pd.DataFrame:
        """One row per labelled feature: ``Contexts.features`` and ``judge_labels`` side by side."""
        return pd.DataFrame(self.labels(seed).json("labels.json"))

    def label_objects(self, seed: int) -> list[Label]:
        """The labels themselves, with their evidence."""
        rows = self.labels(seed).json("explanations.json")
        return [Label(**{**row, "evidence": tuple(row["evidence"])}) for row in rows]

    def plan(self, goal: str) -> dict[tuple, list[tuple]]:
        """Jobs (method, arguments...) that make everything up to ``goal``, each with the jobs it waits for."""
        if goal not in ("sae", "scores", "labels"):
            raise ConfigError(f"goal {goal!r} is not a stage; choose sae, scores or labels")
        variants, seeds = self.profile.variants, self.profile.seeds
        if not variants:
            return {}
        if goal == "labels" and "sarm" not in variants:
            raise ConfigError(f"labels are of the features of variant 'sarm', which variants = {variants!r} lacks")
        mixed = [self.profile.seed] if self.profile.corpus.dialogue_share else []
        jobs: dict[tuple, list[tuple]] = {("benchmarks",): []}
        jobs |= {("preferences", seed): [("benchmarks",)] for seed in dict.fromkeys((*mixed, *seeds))}
        for rule in dict.fromkeys(filter(None, map(SAE_OF_VARIANT.get, variants))):
            jobs["activations", rule] = [("preferences", seed) for seed in mixed]
            jobs |= {("sae", rule, seed): [("activations", rule)] for seed in seeds}
        if goal != "sae":
            jobs |= {("scores", variant, self.profile.seed): [("benchmarks",)] for variant in NO_PAIRS}
            for variant, seed in itertools.product(sorted(variants, key=lambda v: v in SAE_OF_VARIANT), seeds):
                rule = SAE_OF_VARIANT.get(variant)
                jobs["scores", variant, seed] = [("preferences", seed)] + ([("sae", rule, seed)] if rule else [])
        if goal == "labels":
            jobs |= {("labels", seed): [("scores", "sarm", seed)] for seed in seeds}
        return jobs

    def ensure(self, goal: str = "scores") -> pd.DataFrame:
        """Make everything up to ``goal``, ``profile.workers`` processes at a time.

        Each job is a process with one thread: on a small machine two processes are faster than two threads.
        Returns one row per stage: its jobs, how many had to be made, and their seconds, added up.
        """
        jobs, made = self.plan(goal), self.stored(goal)
        title = f"{self.profile.name} profile, up to {goal}" if self.progress else None
        seconds = run_jobs(jobs, made, partial(_work, self.profile, self.store.root), self.profile.workers, title)
        rows = [(job[0], 1, job in seconds, seconds.get(job, 0.0)) for job in jobs]
        table = pd.DataFrame(rows, columns=["stage", "jobs", "made", "job seconds"])
        return table.groupby("stage", sort=False).sum().round().astype(int)

    def stored(self, goal: str) -> set[tuple]:
        """The jobs of ``plan(goal)`` whose artifacts are in the store."""
        stored, found = Run(self.profile, root=self.store.root, progress=False, read_only=True), set()
        for job in self.plan(goal):
            with suppress(NotMadeError):
                getattr(stored, job[0])(*job[1:])
                found.add(job)
        return found

    def fingerprint(self, source: str, kind: str) -> Any:
        """Hashes of the local files that a source names (of the toy world: of its words); None for the hub."""
        where = WORDS if source == "toy" else None if _is_remote(source) else _place(self.profile, source, kind)
        return where and hash_tree(where)

    def _get(self, make, arguments: tuple, settings: dict, *inputs: Artifact, shared=False, resumes=True) -> Artifact:
        """The artifact that ``make(self, *arguments, folder)`` makes of ``inputs``.

        ``shared``: all processes of an ``accelerate launch`` make it together (the first one keeps the store, and calls
        the others when there is something to make); if it ``resumes``, they go on after a kill.
        """
        stage, together, resumes = make.__name__.removeprefix("_make_"), shared and WORLD > 1, shared and resumes
        if together:
            PartialState(cpu=self.profile.device == "cpu")
        make = (_Lead if together and RANK == 0 else partial)(make, self, *arguments)
        while together and RANK and (folder := _broadcast(None)):
            make(Path(folder))
        keys = {one.path.parent.name: one.key for one in inputs}
        made = self.store.get_or_make(stage, {**settings, "arguments": arguments}, keys, make, resumable=resumes)
        if together and RANK == 0:
            _broadcast(None)
        return made


class _Lead(partial):
    """A stage's work in the first process of several, which tells the others where to work with it."""

    def __call__(self, folder: Path) -> dict:
        _broadcast(str(folder))
        return super().__call__(folder)


def _broadcast(value: Any) -> Any:
    """The first process's value, in all of them."""
    return broadcast_object_list([value])[0]


def _accelerator(run) -> Accelerator | None:
    return Accelerator(cpu=run.profile.device == "cpu") if WORLD > 1 else None


def _work(profile: Profile, root: Path, job: tuple) -> None:
    getattr(Run(profile, root=root), job[0])(*job[1:])


def pretrain_sae(spec, activations, folder: Path, *, d_model: int, seed: int = 0, device: str = "cpu",
                 held_out=None, progress: bool = True, accelerator=None) -> dict[str, float]:
    """Train a TopK SAE by ``spec``, a profile's ``sae`` section; writes ``folder/sae`` and ``folder/log.json``.

    ``activations``: [N, d], or a function that returns a stream of [n, d] (see ``train_sae``).  A killed training
    goes on from ``folder/checkpoint``.  Returns the metrics of ``evaluate_sae`` on ``held_out`` [n, d].
    """
    names = {"lr", "betas", "batch_size", "auxk_coef", "renorm_every", "dead_after", "steps"}
    config = SAETrainConfig(**spec.model_dump(include=names), seed=seed,
                            matmul_dtype="bfloat16" if device.startswith("cuda") else "float32")
    sae, log = train_sae(activations, config, d_model=d_model, n_features=spec.n_features(d_model),
                         k=spec.k(d_model), encoder_bias=spec.encoder_bias, relu=spec.relu, device=device,
                         resume_dir=folder / "checkpoint", accelerator=accelerator, progress=progress)
    if RANK:
        return {}
    sae.save(folder / "sae")
    write_atomic(folder / "log.json", json.dumps(log))
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return {} if held_out is None else evaluate_sae(sae, held_out)


def untrained(variant: str, backbone: str, *, layer: int, n_layers: int, sae=None, n_features: int | None = None,
              k: int | None = None, seed: int = 0, **hub):
    """A reward model of a variant before training: the decoder ``backbone`` (a path) and a head at zero.

    ``sae``: of ``sarm`` and ``token_sae``; ``random_encoder`` takes ``n_features`` and ``k``; ``hub``: as ``Run.hub``.
    """
    hub["dtype"] = torch.float32
    torch.manual_seed(seed)
    if variant == "random_encoder":
        return SarmForSequenceClassification.from_backbone_with_random_encoder(
            backbone, layer, n_features=n_features, k=k, seed=seed, **hub)
    if variant in SAE_OF_VARIANT:
        return SarmForSequenceClassification.from_backbone_and_sae(backbone, sae, layer, **hub)
    return ScalarRewardModel.from_backbone(backbone, {"scalar_half": layer, "scalar_full": n_layers}[variant], **hub)


def train_reward(spec, model, tokenizer, pairs: dict[str, list[dict]], folder: Path, *, max_length: int,
                 seed: int = 0, device: str = "cpu", bf16: bool = False, progress: bool = False) -> dict[str, float]:
    """Train a reward model by ``spec``, a profile's ``reward`` section; writes ``folder/model`` and ``log.json``.

    ``pairs``: ``{"train": [...], "eval": [...]}``; ``bf16``: products in bfloat16 (the weights are float32).
    A killed training goes on from ``folder/checkpoints``.  Returns the metrics on the ``eval`` pairs, if any.
    """
    from sarmlib.sarm.training import RewardTrainConfig, RewardTrainer
    config = RewardTrainConfig(**spec.model_dump(), max_length=max_length, seed=seed, bf16=bf16,
                               use_cpu=device == "cpu", save_every=25)
    trainer = RewardTrainer(model, tokenizer, pairs["train"], pairs["eval"] or None, config, folder / "checkpoints")
    if progress:
        trainer.add_callback(_Bar)
    trainer.train(resume="auto")
    metrics = trainer.evaluate() if pairs["eval"] else {}
    with quiet():
        trainer.save_model(str(folder / "model"))  # every process takes part: weights in shards are gathered
    if trainer.is_world_process_zero():
        (folder / "model" / "training_args.bin").unlink(missing_ok=True)
        write_atomic(folder / "log.json", json.dumps(trainer.log_history))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return metrics


class _Bar(ProgressCallback):
    """The Trainer's bar alone: its log is kept in ``log.json``."""

    def on_log(self, *args, **kwargs) -> None:
        pass


def _make_preferences(run, seed: int, folder: Path) -> dict:
    spec = run.profile.preferences
    if spec.source == "toy":
        train = toy.preference_pairs(spec.train_pairs or 1000, seed, label_noise=spec.label_noise)
        held = toy.preference_pairs(spec.eval_pairs, seed, label_noise=0.0, split="eval")
        train, held = preference.load_pairs(train), preference.load_pairs(held)
        report = {"label_noise": spec.label_noise}
    else:
        found = preference.load_pairs(_place(run.profile, spec.source, "pairs"), revision=spec.revision)
        asked = [row["prompt"] for rows in run.benchmark_rows().values() for row in rows]
        found = preference.drop_contaminated(found, asked)
        found = preference.drop_identical(found, run.tokenizer, spec.max_length, spec.longest)
        train, held = preference.split_by_prompt(found, spec.eval_fraction, seed=run.profile.seed)
        train, held = _draw(train, spec.train_pairs, seed), _draw(held, spec.eval_pairs, run.profile.seed)
        report = asdict(found.report)
    return {**report, **_write_rows(folder, train=train, eval=held)}


def _make_benchmarks(run, folder: Path) -> dict:
    rows = {name: benchmark(run.profile, name) for name in BENCHMARKS}
    if not any(rows.values()):
        raise DataError(f"{run.profile.data} holds no benchmark; put RewardBench 2 into rewardbench2/ or RM-Bench "
                        "into rm_bench/ there")
    return _write_rows(folder, **rows)


def benchmark(profile: Profile, name: str) -> list[dict]:
    """Rows of one benchmark; none when the user's folder lacks it."""
    spec = profile.benchmarks
    source = getattr(spec, name)
    if source == "toy":
        return getattr(toy, name)(spec.items_per_subset or 200, profile.seed)
    if (where := _place(profile, source, name)) is None:
        return []
    rows = getattr(loaders, f"load_{name}")(where, revision=getattr(spec, f"{name}_revision"))
    return _limit(rows, "subset" if name == "rewardbench2" else "domain", spec.items_per_subset, profile.seed)


def _texts(run, seed: int) -> Iterator[str | list[int]]:
    spec = run.profile.corpus
    if spec.source == "toy":
        return toy.corpus(spec.documents or 10**9, seed=f"sae-{seed}")
    documents = iter_texts(_place(run.profile, spec.source, "corpus"), revision=spec.revision, seed=seed)
    return itertools.islice(_mixed(documents, _dialogues(run), spec.dialogue_share, seed), spec.documents)


def _mixed(documents: Iterator[str], dialogues: Iterator[list[int]], share: float, seed: int) -> Iterator:
    """Documents, and between them dialogues: ``share`` of all."""
    rng = np.random.default_rng(seed)
    for document in documents:
        yield document
        while rng.random() < share:
            yield next(dialogues)


def _dialogues(run) -> Iterator[list[int]]:
    """Conversations of training pairs as token ids, again and again."""
    for pair in itertools.cycle(run.pairs(run.profile.seed)["train"]):
        sides = preference.conversations(pair)
        yield from encode_conversations(run.tokenizer, sides, run.profile.preferences.max_length)


def _extractor(run, positions: str) -> ActivationExtractor:
    spec, dtype = run.profile.corpus, getattr(torch, run.profile.dtype)
    backbone = load_backbone(run.backbone_path, run.shape["layer"], dtype=dtype, **run.hub)
    return ActivationExtractor(backbone, run.tokenizer, positions, spec.window, spec.batch_size, run.device)


def _make_activations(run, positions: str, kept: bool, folder: Path) -> dict:
    extractor, read, count = _extractor(run, positions), itertools.count(), 0
    documents = (text for text, _ in zip(_texts(run, run.profile.seed), read, strict=False))
    wanted = HELD_OUT + (run.profile.sae.vectors if kept else 0)
    bar = tqdm(total=wanted, disable=not run.progress, desc="activations", leave=False,  # no estimate: text may end
               bar_format="{l_bar}{bar}| {n_fmt} of at most {total_fmt} states, {elapsed}")
    with open(os.devnull if RANK else folder / "states.f32", "wb") as file, bar:
        for states in _vectors(extractor, documents, wanted, _accelerator(run) if kept else None):
            file.write(states.cpu().numpy().tobytes())  # as they come: at no time are all in memory
            bar.update(len(states))
            count += len(states)
    if count < 100:
        raise DataError(f"the corpus gave {count} vectors; 100 or more are needed: add text")
    if count < wanted:
        warnings.warn(f"asked for {wanted} states, the corpus gave {count}", stacklevel=2)
    train = min(run.profile.sae.vectors, count - min(HELD_OUT, count // 10)) if kept else 0
    return {**extractor.stats.summary(), "documents": next(read), "vectors": train, "held_out": count - train}


def _ahead(items: Iterator, rows: int = BUFFER // 2) -> Iterator:
    """The same tensors; while the caller uses one, a thread makes about ``rows`` rows of the next ones."""
    if (first := next(items, None)) is None:
        return
    worker = ThreadPoolExecutor(1)
    waiting = deque(worker.submit(next, items, None) for _ in range(max(1, rows // len(first))))
    try:
        yield first
        while (item := waiting.popleft().result()) is not None:
            waiting.append(worker.submit(next, items, None))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)


def _vectors(extractor, documents: Iterator, vectors: int, accelerator=None, skip=0, through=iter) -> Iterator:
    """States [n, d] after the first ``skip`` tensors; of several processes each reads documents of its own, and all get
    the states of all."""
    if accelerator is None:
        yield from through(extractor.iter_activations(documents, vectors, skip))
        return
    mine = through(extractor.iter_activations(itertools.islice(documents, RANK, None, WORLD), None, skip))
    nothing = torch.zeros(0, extractor.backbone.config.hidden_size, device=accelerator.device)
    while vectors > 0:
        states = next(mine, nothing)
        counts = accelerator.gather(torch.tensor([len(states)], device=states.device)).tolist()
        if not any(counts):
            return
        padded = accelerator.gather(accelerator.pad_across_processes(states, dim=0))
        parts = padded.view(len(counts), max(counts), -1)
        together = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        yield together[:vectors]
        vectors -= len(together)


def _make_sae(run, positions: str, seed: int, folder: Path) -> dict:
    accelerator, spec, states = _accelerator(run), run.profile.sae, run.vectors(positions)
    read = run.activations(positions).meta["documents"]
    activations = states["train"]
    if not len(activations):
        extractor, steps = _extractor(run, positions), max(1, spec.vectors // spec.batch_size)
        spec = spec.model_copy(update={"steps": spec.steps or steps})  # a known length: for log and progress

        def activations(tensors=0, vectors=0):  # after so many of them, computed while the SAE trains
            documents = itertools.islice(_texts(run, run.profile.seed), read, None)
            return _vectors(extractor, documents, spec.vectors - vectors, accelerator, tensors, _ahead)
    return pretrain_sae(spec, activations, folder, d_model=run.shape["d_model"], seed=seed, device=run.device,
                        held_out=states["held_out"], progress=run.progress, accelerator=accelerator)


def _make_reward(run, variant: str, seed: int, folder: Path) -> dict:
    spec, rule = run.profile, SAE_OF_VARIANT.get(variant)
    shape = {name: run.shape[name] for name in ("layer", "n_layers", "n_features", "k")}
    model = untrained(variant, run.backbone_path, sae=run.load_sae(rule, seed) if rule else None, seed=seed,
                      **shape, **run.hub)
    return train_reward(spec.reward, model, run.tokenizer, run.pairs(seed), folder, seed=seed,
                        max_length=spec.preferences.max_length, device=run.device,
                        bf16=spec.dtype == "bfloat16", progress=run.progress)


def _make_scores(run, variant: str, seed: int, folder: Path) -> dict:
    spec, encodes = run.profile.benchmarks, variant in SAE_OF_VARIANT
    model = run.load_reward(variant, seed).to(run.device)
    found = [score_rows(model, run.tokenizer, rows, max_length=spec.max_length, features=encodes,
                        progress=run.progress)[1] for rows in run.benchmark_rows().values() if rows]
    arrays = {name: np.concatenate([getattr(one, name) for one in found]) for name in ("rewards", "lengths")}
    if encodes:
        z = vstack([one.features for one in found], format="csr")
        arrays |= {"data": z.data, "indices": z.indices, "indptr": z.indptr, "shape": np.array(z.shape)}
    save_file(arrays, folder / "scores.safetensors")
    return {"max_length": spec.max_length}


def _make_no_pairs(run, layer: int, folder: Path) -> dict:
    spec, path, rows = run.profile.benchmarks, run.backbone_path, run.benchmark_rows()
    config = cut_config(from_hub(AutoConfig, path, **run.hub), layer)
    whole, _ = weights_from_hub(AutoModelForCausalLM, path, config=config, **run.hub)  # up to that layer, and the head
    unembedding = whole.get_output_embeddings().weight.detach().float().numpy()
    model = ScalarRewardModel.from_backbone(load_backbone(whole, layer, keep_final_norm=True))
    model = model.to(run.device, getattr(torch, run.profile.dtype))
    found = {name: score_rows(model, run.tokenizer, part, max_length=spec.max_length, states=True,
                              progress=run.progress)[1] for name, part in rows.items() if part}
    states = np.concatenate([one.states for one in found.values()])
    rewards, meta = np.zeros(len(states)), {}
    if rows["rm_bench"]:
        words = ([VERDICTS[0]], [VERDICTS[1]]) if spec.rm_bench == "toy" else (PRAISE, BLAME)
        ids = [[run.tokenizer.encode(" " + word, add_special_tokens=False)[0] for word in side] for side in words]
        favoured, against, accuracy = vocabulary_readout(found["rm_bench"].states, unembedding, *ids)
        rewards = read_out(states, unembedding, favoured, against)
        meta = {name: run.tokenizer.convert_ids_to_tokens(tokens.tolist())
                for name, tokens in (("favoured", favoured), ("against", against))} | {"rm_bench_accuracy": accuracy}
    lengths = np.concatenate([one.lengths for one in found.values()])
    save_file({"rewards": rewards, "lengths": lengths}, folder / "scores.safetensors")
    return {"max_length": spec.max_length, **meta}


def _make_labels(run, seed: int, folder: Path) -> dict:
    spec, contexts = run.profile.interpretation, run.contexts(seed)
    table = contexts.features()
    table = table[table.kind == "usual"].sort_values("contribution_sd", ascending=False, kind="stable")
    half = spec.features // 2  # |w| alone sits at the optimiser's bound, so the largest sd of w_i z_i
    table = pd.concat([table[table.w > 0].head(half), table[table.w < 0].head(half)], ignore_index=True)
    if spec.explainer == "llm":
        endpoint = run.endpoint()
        explainer, judge, also = LLMExplainer(endpoint, contexts, seed=seed), LLMJudge(endpoint), ()
    else:
        explainer, also = run.explainer(seed), ("matched", "neighbour")
        judge = KeywordJudge(explainer.vocabulary)
    labels = explainer.explain_all(table.feature)
    judged = judge_labels(contexts, labels, judge, q=spec.fdr, n_boot=run.profile.steering.bootstrap, also=also,
                          seed=seed)
    table = table.merge(judged, on="feature", how="left")
    write_atomic(folder / "labels.json", table.to_json(orient="records"))
    write_atomic(folder / "explanations.json", json.dumps([asdict(label) for label in labels]))
    return {"labelled": len(labels), "reliable": int(judged.reliable.sum()),
            "abstained": sum(label.abstained for label in labels)}


def benchmark_units(name: str, rows: list[dict]) -> pd.DataFrame:
    """One line per response in scoring order: benchmark, row, slot, label (chosen or rejected), prompt_id,
    response_id, domain, style (RM-Bench), text, prompt_text, concepts (toy world)."""
    lines = []
    for number, row in enumerate(rows):
        truth = (row.get("additional_metadata") or {}).get("concepts")
        for slot, text in enumerate(answers(row)):
            lines.append({
                "benchmark": name, "row": number, "slot": slot,
                "label": "chosen" if slot < len(row["chosen"]) else "rejected",
                "prompt_id": f"{name}/{number}", "response_id": f"{name}/{number}/{slot}",
                "domain": row["subset"] if name == "rewardbench2" else row.get("domain", "all"),
                "style": ("concise", "detailed", "markdown")[slot % 3] if name == "rm_bench" else None,
                "text": text, "prompt_text": row["prompt"], "concepts": tuple(truth[slot]) if truth else (),
            })
    return pd.DataFrame(lines)


def conversations(units: pd.DataFrame) -> list[list[dict]]:
    """The responses of ``benchmark_units`` as conversations of two turns."""
    return [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            for prompt, text in zip(units.prompt_text, units.text, strict=True)]


def _is_remote(source: str) -> bool:
    return source not in ("toy", "data") and not Path(source).exists()


def _place(profile, source: str, kind: str) -> str | Path | None:
    """Where a source lies: a folder of DATA, a path as it is, or a hub id, which loaders know by its prefix."""
    if source == "data":
        return profile.folder(kind)
    return f"hub:{source.removeprefix('hub:')}" if _is_remote(source) else source


def _draw(items: list, count: int | None, seed: int) -> list:
    """``count`` items drawn without replacement, in drawn order; all of them (shuffled) when there are fewer."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order[:count]]


def _limit(rows: list[dict], group: str, most: int | tuple | None, seed: int) -> list[dict]:
    """At most ``most`` rows per group (a tuple: of the groups that it names), drawn; Ties couples stay whole."""
    groups: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        name = row.get(group, "all")
        couple = str(row["id"]).partition(":")[2] if name.lower() == "ties" else str(i)
        groups[name][couple].append(i)
    counts = dict(most) if isinstance(most, tuple) else dict.fromkeys(groups, most)
    rng, kept = np.random.default_rng(seed), []
    for name, couples in groups.items():
        order, size = list(couples.values()), counts.get(name)
        drawn = [i for n in rng.permutation(len(order)) for i in order[n]]
        if size is not None and name.lower() == "ties":
            size -= size % 2
        kept += drawn[:size]
    return [rows[i] for i in sorted(kept)]


def _write_rows(folder: Path, **parts: list[dict]) -> dict[str, int]:
    for name, rows in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomic(folder / f"{name}.jsonl", "".join(lines))
    return {name: len(rows) for name, rows in parts.items()}


def _read_rows(artifact: Artifact, *names: str) -> dict[str, list[Any]]:
    return {name: list(iter_rows(artifact.file(f"{name}.jsonl"))) for name in names}
