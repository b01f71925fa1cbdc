"""Stages: a profile in, artifacts out.  Notebooks and the command line call nothing else to train or score.

    backbone -> activations -> sae -> reward -> scores -> labels     (activations and SAEs per position rule)
    preferences --------------------^             ^
    benchmarks -----------------------------------+

Every stage is a method of :class:`Run` that returns an artifact from the content-addressed store, made only
when absent.  ``Run.ensure`` makes many, each as a single-thread process beside the others: on a small machine two
processes are faster than two threads.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from scipy.sparse import csr_array
from tqdm import tqdm

from .artifacts import Artifact, Store, code_version, default_root, hash_file, hash_json, write_atomic
from .errors import ConfigError, DataError, NotMadeError
from .profiles import Profile, load_profile

HELD_OUT = 4096
"""Activation vectors kept from the end of the corpus to evaluate an SAE on."""
SAE_OF_VARIANT = {"sarm": "sentence_end", "token_sae": "every", "random_encoder": None}
TOY = ("sarmlib.data.toyworld.lexicon", "sarmlib.data.toyworld.grammar", "sarmlib.data.toyworld.datasets")
CODE = {  # modules whose source decides a stage's result
    "preferences": ("sarmlib.data.preferences", "sarmlib.data.files", "sarmlib.data.local", *TOY),
    "benchmarks": ("sarmlib.data.benchmarks", "sarmlib.data.files", "sarmlib.data.local", *TOY),
    "activations": ("sarmlib.extractor", "sarmlib.backbone", "sarmlib.chat", "sarmlib.data.corpora", *TOY),
    "sae": ("sarmlib.sae",),
    "reward": ("sarmlib.sarm.model", "sarmlib.sarm.training", "sarmlib.backbone", "sarmlib.chat", "sarmlib.sae.model"),
    "scores": ("sarmlib.evaluation.scoring", "sarmlib.sarm.model", "sarmlib.chat"),
    "labels": ("sarmlib.interpretation",),
}


@dataclass(frozen=True)
class Scored:
    """Benchmark scores of one reward model, and its features at the reward position."""

    rewardbench2: list[dict]
    rm_bench: list[dict]
    units: pd.DataFrame
    """One line per response: benchmark, row, slot, prompt_id, response_id, domain, label, style, length, reward, text,
    prompt_text, concepts (toy world only)."""
    z: csr_array | None
    """Features [units, M]; None for a model without an encoder."""

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
        self.progress = progress
        self._scored: dict[tuple[str, int], Scored] = {}
        self._memo: dict[tuple, Any] = {}

    # -- inputs ------------------------------------------------------------------------------------------------

    @cached_property
    def local(self):
        """What the user's folder holds (profiles with ``data`` sources)."""
        from .data.local import discover

        if not self.profile.data:
            raise ConfigError(f"profile {self.profile.name!r} reads a folder of yours: name it with DATA=<folder> "
                              "(make) or --data <folder>")
        return discover(self.profile.data)

    @cached_property
    def backbone_path(self) -> str:
        """Folder or hub id of the pretrained decoder."""
        source = self.profile.backbone.source
        if source == "toy":
            from .data.toyworld.pretrain import BACKBONE_DIR
            return str(BACKBONE_DIR)
        return str(self.local.backbone) if source == "data" else source

    @cached_property
    def tokenizer(self):
        from .backbone import load_tokenizer
        spec = self.profile.backbone
        return load_tokenizer(self.backbone_path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)

    @cached_property
    def config(self):
        from transformers import AutoConfig

        from .backbone import _from_hub
        spec = self.profile.backbone
        return _from_hub(AutoConfig, self.backbone_path, revision=spec.revision,
                         trust_remote_code=spec.trust_remote_code)

    @cached_property
    def shape(self) -> dict[str, int]:
        """d_model, n_layers, layer (l), n_features (M) and k of this run."""
        from .backbone import cut_config, n_layers
        d, sae = self.config.hidden_size, self.profile.sae
        return {"d_model": d, "n_layers": n_layers(self.config),
                "layer": n_layers(cut_config(self.config, self.profile.backbone.layer)),
                "n_features": sae.n_features(d), "k": sae.k(d)}

    @cached_property
    def device(self) -> str:
        wanted = self.profile.device
        return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted

    @cached_property
    def backbone_key(self) -> str:
        """Hash of the checkpoint's files, or of id and revision when it lies on the hub."""
        folder = Path(self.backbone_path)
        if not folder.is_dir():
            return hash_json([self.backbone_path, self.profile.backbone.revision])[:16]
        files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json")]
        return hash_json({p.name: hash_file(p) for p in files})[:16]

    def check_hub(self) -> None:
        """Can everything this profile wants from the hub be had?  Asked before the first minute is spent.

        Raises ConfigError when labels want an endpoint that is not named, OfflineError without network, ModelError or
        DataError for what the hub refuses (name, commit, gate).
        """
        spec, local = self.profile, ("toy", "data")
        if spec.backbone.source not in local and not Path(spec.backbone.source).is_dir():
            _ = self.config, self.tokenizer  # small files; a gated model is refused here
        for source, revision in ((spec.preferences.source, spec.preferences.revision),
                                 (spec.benchmarks.rewardbench2, spec.benchmarks.rewardbench2_revision),
                                 (spec.benchmarks.rm_bench, spec.benchmarks.rm_bench_revision),
                                 (spec.corpus.source, spec.corpus.revision)):
            if source not in local and not Path(source).exists():
                from .data.files import check_access
                check_access(source.removeprefix("hub:"), revision)
        if spec.interpretation.explainer == "llm":
            self._endpoint()

    def texts(self, seed: int = 0) -> Iterator[str | list[int]]:
        """The SAE's corpus: documents, and among them (``corpus.dialogue_share``) conversations of training pairs."""
        spec = self.profile.corpus
        if spec.source == "toy":
            from .data.toyworld.datasets import corpus
            return corpus(spec.documents or 10**9, seed=f"sae-{seed}")
        from .data.corpora import iter_corpus
        if spec.source == "data":
            documents = self.local.documents(seed)
        else:
            documents = iter_corpus(_source(spec.source), text_field=spec.text_field, revision=spec.revision, seed=seed)
        if spec.dialogue_share:
            documents = _mix(documents, self._dialogues(), spec.dialogue_share, seed)
        return itertools.islice(documents, spec.documents)

    def _dialogues(self) -> Iterator[list[int]]:
        from .chat import encode_conversation
        for pair in itertools.cycle(self.pairs(self.profile.seed)["train"]):
            for answer in (pair["chosen"], pair["rejected"]):
                messages = [*pair["prompt"], {"role": "assistant", "content": answer}]
                yield encode_conversation(self.tokenizer, messages, self.profile.preferences.max_length)

    # -- stages ------------------------------------------------------------------------------------------------

    def preferences(self, seed: int) -> Artifact:
        """Training and evaluation pairs (train.jsonl, eval.jsonl) and a report of what was read and dropped."""
        spec = self.profile.preferences
        settings = {**asdict(spec), "seed": seed, "data": self._fingerprint(spec.source, "pairs")}
        return self.store.get_or_make("preferences", settings, {"benchmarks": self.benchmarks().key},
                                      lambda folder: self._make_preferences(folder, seed), CODE["preferences"])

    def _make_preferences(self, folder: Path, seed: int) -> dict:
        from .data.preferences import drop_contaminated, load_pairs, split_by_prompt
        spec = self.profile.preferences
        if spec.source == "toy":
            from .data.toyworld.datasets import preference_pairs
            train = load_pairs(preference_pairs(spec.train_pairs, seed, label_noise=spec.label_noise))
            held = load_pairs(preference_pairs(spec.eval_pairs, seed, label_noise=0.0, split="eval"))
            report = {"label_noise": spec.label_noise}
        else:
            loaded = load_pairs(self.local.pairs if spec.source == "data" else _source(spec.source),
                                revision=spec.revision)
            prompts = [row["prompt"] for part in self.benchmark_rows().values() for row in part]
            pairs = drop_contaminated(loaded, prompts)
            train, held = split_by_prompt(pairs, spec.eval_fraction, seed=self.profile.seed)
            train, held = _draw(train, spec.train_pairs, seed), _draw(held, spec.eval_pairs, self.profile.seed)
            report = asdict(pairs.report)
        _write_jsonl(folder / "train.jsonl", train)
        _write_jsonl(folder / "eval.jsonl", held)
        return {**report, "train": len(train), "eval": len(held)}

    def pairs(self, seed: int) -> dict[str, list[dict]]:
        """``{"train": [...], "eval": [...]}`` of :meth:`preferences`."""
        artifact = self.preferences(seed)
        return {name: _read_jsonl(artifact.file(f"{name}.jsonl")) for name in ("train", "eval")}

    def benchmarks(self) -> Artifact:
        """The rows of both benchmarks as they are scored."""
        spec = self.profile.benchmarks
        settings = {"rewardbench2": spec.rewardbench2, "rm_bench": spec.rm_bench, "items": spec.items_per_subset,
                    "revisions": [spec.rewardbench2_revision, spec.rm_bench_revision], "seed": self.profile.seed,
                    "data": [self._fingerprint(spec.rewardbench2, "rewardbench2"),
                             self._fingerprint(spec.rm_bench, "rm_bench")]}
        return self.store.get_or_make("benchmarks", settings, {}, self._make_benchmarks, CODE["benchmarks"])

    def _make_benchmarks(self, folder: Path) -> dict:
        spec, seed = self.profile.benchmarks, self.profile.seed
        rows = {}
        for name, source, revision in (("rewardbench2", spec.rewardbench2, spec.rewardbench2_revision),
                                       ("rm_bench", spec.rm_bench, spec.rm_bench_revision)):
            if source == "toy":
                from .data.toyworld import datasets as toy
                rows[name] = getattr(toy, name)(spec.items_per_subset, seed)
                continue
            from .data import benchmarks as real
            where = getattr(self.local, name) if source == "data" else _source(source)
            if where is None:
                rows[name] = []
                continue
            loaded = getattr(real, f"load_{name}")(where, revision=revision)
            rows[name] = _limit(loaded, "subset" if name == "rewardbench2" else "domain", spec.items_per_subset, seed)
        for name, part in rows.items():
            _write_jsonl(folder / f"{name}.jsonl", part)
        return {name: len(part) for name, part in rows.items()}

    def benchmark_rows(self) -> dict[str, list[dict]]:
        """``{"rewardbench2": rows, "rm_bench": rows}``."""
        artifact = self.benchmarks()
        return {name: _read_jsonl(artifact.file(f"{name}.jsonl")) for name in ("rewardbench2", "rm_bench")}

    def activations(self, positions: str) -> Artifact:
        """Hidden states after layer l at ``positions``: train [N, d] and held_out [4096, d] float32."""
        sae, corpus = self.profile.sae, self.profile.corpus
        settings = {"positions": positions, "vectors": sae.vectors, "layer": self.shape["layer"], **asdict(corpus),
                    "seed": self.profile.seed, "dtype": self.profile.dtype,
                    "data": self._fingerprint(corpus.source, "corpora")}
        inputs = {"backbone": self.backbone_key}
        if getattr(corpus, "dialogue_share", 0):
            inputs["preferences"] = self.preferences(self.profile.seed).key
        return self.store.get_or_make("activations", settings, inputs, lambda f: self._make_activations(f, positions),
                                      CODE["activations"])

    def _make_activations(self, folder: Path, positions: str) -> dict:
        from .backbone import load_backbone
        from .extractor import ActivationExtractor
        spec, corpus = self.profile.backbone, self.profile.corpus
        backbone = load_backbone(self.backbone_path, self.shape["layer"], revision=spec.revision,
                                 dtype=getattr(torch, self.profile.dtype), trust_remote_code=spec.trust_remote_code)
        extractor = ActivationExtractor(backbone.to(self.device), self.tokenizer, positions, window=corpus.window,
                                        batch_size=corpus.batch_size, device=self.device)
        wanted = self.profile.sae.vectors + HELD_OUT
        x = extractor.collect(self.texts(self.profile.seed), wanted, progress=self.progress).float().numpy()
        if len(x) < 100:
            raise DataError(f"the corpus gave {len(x)} vectors at {positions!r} positions; 100 or more are needed")
        kept = min(HELD_OUT, len(x) // 10)
        save_arrays({"train": x[:-kept], "held_out": x[-kept:]}, folder / "activations.safetensors")
        return {**extractor.stats.summary(), "vectors": len(x) - kept, "held_out": kept}

    def sae(self, positions: str, seed: int) -> Artifact:
        """A trained SAE (``sae/``), its log and its metrics on held-out states."""
        source = self.activations(positions)
        settings = {**asdict(self.profile.sae), "positions": positions, "seed": seed, **self.shape}
        settings.pop("vectors")
        return self.store.get_or_make("sae", settings, {"activations": source.key},
                                      lambda folder: self._make_sae(folder, source, seed), CODE["sae"], resumable=True)

    def _make_sae(self, folder: Path, source: Artifact, seed: int) -> dict:
        from .sae.training import SAETrainConfig, evaluate_sae, train_sae
        spec, shape = self.profile.sae, self.shape
        arrays = load_arrays(source.file("activations.safetensors"))
        x, held_out = torch.from_numpy(arrays["train"]), torch.from_numpy(arrays["held_out"])
        config = SAETrainConfig(
            lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), batch_size=spec.batch_size, auxk_coef=spec.auxk_coef,
            renorm_every=spec.renorm_every, dead_after=spec.dead_after, steps=spec.steps, seed=seed)
        trained, log = train_sae(x, config, d_model=shape["d_model"], n_features=shape["n_features"], k=shape["k"],
                                 encoder_bias=spec.encoder_bias, relu=spec.relu, device=self.device,
                                 resume_dir=folder / "checkpoint", progress=self.progress)
        trained.save(folder / "sae")
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        write_atomic(folder / "log.json", json.dumps(log))
        return evaluate_sae(trained, held_out)

    def load_sae(self, positions: str, seed: int):
        """The trained :class:`TopKSAE`."""
        from .sae.model import TopKSAE
        return TopKSAE.load(self.sae(positions, seed).file("sae"))

    def reward(self, variant: str, seed: int) -> Artifact:
        """A trained reward model (``model/``), its training log and its accuracy on held-out pairs.

        Variants: ``sarm``, ``token_sae``, ``random_encoder`` (Table 2), ``scalar_half``, ``scalar_full``.
        """
        inputs = {"backbone": self.backbone_key, "preferences": self.preferences(seed).key}
        positions = SAE_OF_VARIANT.get(variant)
        if positions:
            inputs["sae"] = self.sae(positions, seed).key
        settings = {"variant": variant, "seed": seed, "reward": asdict(self.profile.reward), **self.shape,
                    "dtype": self.profile.dtype, "max_length": self.profile.preferences.max_length}
        return self.store.get_or_make("reward", settings, inputs, lambda f: self._make_reward(f, variant, seed),
                                      CODE["reward"])

    def _untrained(self, variant: str, seed: int):
        from .sarm.model import SarmForSequenceClassification, ScalarRewardModel
        shape, dtype = self.shape, getattr(torch, self.profile.dtype)
        torch.manual_seed(seed)
        if variant in SAE_OF_VARIANT:
            positions = SAE_OF_VARIANT[variant]
            if positions:
                return SarmForSequenceClassification.from_backbone_and_sae(
                    self.backbone_path, self.load_sae(positions, seed), shape["layer"], dtype=dtype)
            return SarmForSequenceClassification.from_backbone_with_random_encoder(
                self.backbone_path, shape["layer"], n_features=shape["n_features"], k=shape["k"], seed=seed,
                dtype=dtype)
        depth = {"scalar_half": shape["layer"], "scalar_full": shape["n_layers"]}[variant]
        return ScalarRewardModel.from_backbone(self.backbone_path, depth, dtype=dtype)

    def _make_reward(self, folder: Path, variant: str, seed: int) -> dict:
        from .sarm.training import RewardTrainConfig, RewardTrainer
        spec, pairs = self.profile.reward, self.pairs(seed)
        config = RewardTrainConfig(
            lr=spec.lr, head_lr=spec.head_lr, epochs=spec.epochs, batch_size=spec.batch_size,
            micro_batch_size=spec.micro_batch_size, warmup_ratio=spec.warmup_ratio, weight_decay=spec.weight_decay,
            scheduler=spec.scheduler, gradient_checkpointing=spec.gradient_checkpointing,
            max_length=self.profile.preferences.max_length, seed=seed, use_cpu=self.device == "cpu")
        model = self._untrained(variant, seed)
        trainer = RewardTrainer(model, self.tokenizer, pairs["train"], pairs["eval"], config, progress=self.progress)
        trainer.train()
        metrics = trainer.evaluate()
        model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        write_atomic(folder / "log.json", json.dumps(trainer.state.log_history))
        return metrics

    def load_reward(self, variant: str, seed: int):
        """The trained reward model of a variant."""
        from .sarm.model import SarmForSequenceClassification, ScalarRewardModel
        kind = SarmForSequenceClassification if variant in SAE_OF_VARIANT else ScalarRewardModel
        return kind.from_pretrained(self.reward(variant, seed).file("model")).eval()

    def scores(self, variant: str, seed: int) -> Artifact:
        """Both benchmarks scored by one model; features at the reward position where it has any."""
        inputs = {"reward": self.reward(variant, seed).key, "benchmarks": self.benchmarks().key}
        spec = self.profile.benchmarks
        settings = {"max_length": spec.max_length}
        return self.store.get_or_make("scores", settings, inputs, lambda f: self._make_scores(f, variant, seed),
                                      CODE["scores"])

    def _make_scores(self, folder: Path, variant: str, seed: int) -> dict:
        from .evaluation.scoring import score_rewardbench2, score_rm_bench
        spec, rows = self.profile.benchmarks, self.benchmark_rows()
        model = self.load_reward(variant, seed).to(self.device)
        wanted = variant in SAE_OF_VARIANT
        arrays: dict[str, np.ndarray] = {}
        for name, scorer in (("rewardbench2", score_rewardbench2), ("rm_bench", score_rm_bench)):
            if not rows[name]:
                continue
            scored, scores = scorer(model, self.tokenizer, rows[name], max_length=spec.max_length,
                                    batch_tokens=spec.batch_tokens, features=wanted, progress=self.progress)
            arrays[f"{name}.rewards"], arrays[f"{name}.lengths"] = scores.rewards, scores.lengths
            if wanted:
                z = scores.features
                arrays |= {f"{name}.data": z.data, f"{name}.indices": z.indices, f"{name}.indptr": z.indptr,
                           f"{name}.shape": np.array(z.shape)}
        save_arrays(arrays, folder / "scores.safetensors")
        return {"truncation": spec.max_length}

    def scored(self, variant: str, seed: int) -> Scored:
        """Scores joined to the benchmark rows: scored rows for the benchmark's scorer, units and z for analysis.

        Checked and read once per Run: a notebook asks for the same scores dozens of times."""
        if (variant, seed) not in self._scored:
            self._scored[variant, seed] = self._read_scored(variant, seed)
        return self._scored[variant, seed]

    def _read_scored(self, variant: str, seed: int) -> Scored:
        arrays = load_arrays(self.scores(variant, seed).file("scores.safetensors"))
        rows, frames, blocks, scored = self.benchmark_rows(), [], [], {}
        for name in ("rewardbench2", "rm_bench"):
            scored[name] = []
            if f"{name}.rewards" not in arrays:
                continue
            units = benchmark_units(name, rows[name])
            units["reward"], units["length"] = arrays[f"{name}.rewards"], arrays[f"{name}.lengths"]
            frames.append(units)
            scored[name] = join_scores(name, rows[name], arrays[f"{name}.rewards"])
            if f"{name}.data" in arrays:
                parts = tuple(arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
                blocks.append(csr_array(parts, shape=tuple(arrays[f"{name}.shape"])))
        from scipy.sparse import vstack
        z = csr_array(vstack(blocks)) if blocks else None
        return Scored(scored["rewardbench2"], scored["rm_bench"], pd.concat(frames, ignore_index=True), z)

    def states(self, variant: str, seed: int) -> np.ndarray:
        """What the encoder reads: the state x_last after layer l of every RM-Bench response, float32 [n, d].

        Not stored, because only the comparison with a neuron basis wants it; computed once per Run."""
        key = ("states", variant, seed)
        if key not in self._memo:
            from .sarm.controls import reward_states
            frame, _ = self.scored(variant, seed).part("rm_bench")
            self._memo[key] = reward_states(
                self.load_reward(variant, seed).to(self.device), self.tokenizer, conversations(frame),
                max_length=self.profile.benchmarks.max_length)
        return self._memo[key]

    def head(self, variant: str, seed: int) -> np.ndarray:
        """w [M] float64: the linear head of a trained variant."""
        with safe_open(self.reward(variant, seed).file("model/model.safetensors"), "numpy") as weights:
            return weights.get_tensor("score.weight")[0].astype(np.float64)

    def contexts(self, seed: int, variant: str = "sarm"):
        """RM-Bench responses and their features at the reward position, split by prompt (all claims about RQ1)."""
        from .interpretation.contexts import Contexts
        units, z = self.scored(variant, seed).part("rm_bench")
        return Contexts(z, units, w=self.head(variant, seed), seed=self.profile.seed)

    def labels(self, seed: int) -> Artifact:
        """Keyword labels of the features that move the reward most, and how they do on held-out prompts."""
        settings = {"seed": seed, **asdict(self.profile.interpretation), "bootstrap": self.profile.steering.bootstrap,
                    "judges": ["explainer's", "tfidf"]}
        if self.profile.interpretation.explainer == "llm":
            settings["model"] = os.environ.get("SARMLIB_LLM_MODEL")
        return self.store.get_or_make("labels", settings, {"scores": self.scores("sarm", seed).key},
                                      lambda folder: self._make_labels(folder, seed), CODE["labels"])

    def _explainer(self, seed: int):
        """The keyword explainer; its vocabulary also serves the judges.  Made once per Run."""
        from .interpretation.explainers import KeywordExplainer
        spec = self.profile.interpretation
        if ("explainer", seed) not in self._memo:
            self._memo["explainer", seed] = KeywordExplainer(
                self.contexts(seed), permutations=spec.permutations, top=spec.top_keywords, seed=seed)
        return self._memo["explainer", seed]

    def vocabulary(self, seed: int):
        """Terms of the explain split (:class:`Vocabulary`), as the keyword judge reads them."""
        return self._explainer(seed).vocabulary

    def _endpoint(self):
        from .endpoint import from_environment
        return from_environment(self.store.root / "answers.jsonl")

    def _make_labels(self, folder: Path, seed: int) -> dict:
        from .interpretation.judges import KeywordJudge, TfidfJudge, held_out_auroc, judge_labels
        from .interpretation.llm import LLMExplainer, LLMJudge
        spec, contexts = self.profile.interpretation, self.contexts(seed)
        features = label_candidates(contexts.features(), spec.features)
        if spec.explainer == "llm":
            endpoint = self._endpoint()
            explainer, judge, also = LLMExplainer(endpoint, contexts, self_grade=True), LLMJudge(endpoint), ()
        else:
            explainer, also = self._explainer(seed), ("matched", "neighbour")
            judge = KeywordJudge(explainer.vocabulary)
        labels = explainer.explain_all(features.feature)
        judged = judge_labels(contexts, labels, judge, q=spec.fdr, n_boot=self.profile.steering.bootstrap, also=also,
                              seed=seed)
        # the same sample by a judge that made no label: for words of a model, one that costs nothing
        other = TfidfJudge(self.vocabulary(seed))
        judged["auroc_tfidf"] = [held_out_auroc(contexts, label, other, seed=seed) for label in labels]
        table = features.merge(judged, on="feature", how="left")
        write_atomic(folder / "labels.json", table.to_json(orient="records"))
        write_atomic(folder / "explanations.json", json.dumps([asdict(label) for label in labels]))
        return {"labelled": len(labels), "reliable": int(judged.reliable.sum()),
                "abstained": sum(label.abstained for label in labels)}

    def label_table(self, seed: int) -> pd.DataFrame:
        """One row per labelled feature: its statistics (``Contexts.features``) and its label's (``judge_labels``)."""
        return pd.DataFrame(self.labels(seed).json("labels.json"))

    def label_objects(self, seed: int) -> list:
        """The labels themselves (:class:`Label`), with their evidence."""
        from .interpretation.explainers import Label
        return [Label(**{**row, "evidence": tuple(row["evidence"])})
                for row in self.labels(seed).json("explanations.json")]

    # -- many at once ------------------------------------------------------------------------------------------

    def plan(self, goal: str) -> list[tuple[str, tuple, list[int]]]:
        """Jobs (method, arguments, indices of jobs it waits for) that make everything up to ``goal``."""
        if goal not in ("sae", "scores", "labels"):
            raise ConfigError(f"goal {goal!r} is not a stage; choose sae, scores or labels")
        jobs: list[tuple[str, tuple, list[int]]] = [("benchmarks", (), [])]
        variants, seeds, data, saes = self.profile.variants, self.profile.seeds, {}, {}
        for seed in dict.fromkeys((self.profile.seed, *seeds)):
            data[seed] = len(jobs)
            jobs.append(("preferences", (seed,), [0]))
        for positions in dict.fromkeys(SAE_OF_VARIANT[v] for v in variants if SAE_OF_VARIANT.get(v)):
            extracted = len(jobs)
            jobs.append(("activations", (positions,), [data[self.profile.seed]]))
            for seed in seeds:
                saes[positions, seed] = len(jobs)
                jobs.append(("sae", (positions, seed), [extracted]))
        if goal == "sae":
            return jobs
        for variant, seed in itertools.product(sorted(variants, key=lambda v: v in SAE_OF_VARIANT), seeds):
            wait_for = [data[seed]] + ([saes[SAE_OF_VARIANT[variant], seed]] if SAE_OF_VARIANT.get(variant) else [])
            jobs.append(("scores", (variant, seed), wait_for))
        if goal == "labels":
            if "sarm" not in variants:
                raise ConfigError(f"labels are of the features of variant 'sarm', which variants = {variants!r} lacks")
            scored = {job[1]: number for number, job in enumerate(jobs) if job[0] == "scores"}
            jobs += [("labels", (seed,), [scored["sarm", seed]]) for seed in seeds]
        return jobs

    def ensure(self, goal: str = "scores") -> pd.DataFrame:
        """Make everything up to ``goal``, ``profile.workers`` processes at a time; one row per job, with seconds."""
        jobs = self.plan(goal)
        cached, done = Run(self.profile, root=self.store.root, progress=False, read_only=True), {}
        for number, (method, arguments, _) in enumerate(jobs):
            try:
                done[number] = _report(getattr(cached, method)(*arguments), 0.0)
            except NotMadeError:
                pass
        pending, running = {n: job for n, job in enumerate(jobs) if n not in done}, {}
        with tqdm(total=len(jobs), initial=len(done), desc=f"{self.profile.name} profile, up to {goal}", unit="job",
                  disable=not self.progress) as bar, _pool(self.profile.workers) as pool:
            while pending or running:
                for number in [n for n, job in pending.items() if all(d in done for d in job[2])]:
                    method, arguments, _ = pending.pop(number)
                    running[pool.submit(_work, self.profile, self.store.root, method, arguments)] = number
                for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                    number = running.pop(future)
                    done[number] = future.result()
                    bar.update()
                    bar.set_postfix_str(" ".join(map(str, (jobs[number][0], *jobs[number][1]))))
        names = [{"stage": method, "job": " ".join(map(str, arguments))} for method, arguments, _ in jobs]
        return pd.DataFrame([{**name, **done[n]} for n, name in enumerate(names)])

    def stage_times(self) -> pd.DataFrame:
        """Seconds of work and peak memory per stage, from the manifests of artifacts of the present code and inputs."""
        found = [json.loads((p / "manifest.json").read_text()) for p in self.store.artifacts()]
        stale = {m["key"] for m in found if m["code"] != code_version(CODE[m["stage"]])}
        while more := {m["key"] for m in found if stale & set(m["inputs"].values())} - stale:
            stale |= more
        manifests = [m for m in found if m["key"] not in stale]
        frame = pd.DataFrame([{"stage": m["stage"], "seconds": m["wall_s"], "peak_mib": m["peak_rss_mib"]}
                              for m in manifests])
        grouped = frame.groupby("stage", sort=False)
        return grouped.agg(artifacts=("seconds", "size"), seconds=("seconds", "sum"), peak_mib=("peak_mib", "max"))

    def _fingerprint(self, source: str, kind: str) -> Any:
        """Content hash of the local files a source names; None for the toy world and the hub."""
        if source == "data":
            found = getattr(self.local, kind)
            paths = found if isinstance(found, (list, tuple)) else [found]
        elif source != "toy" and Path(source).exists():
            paths = [source]
        else:
            return None
        return [_hash_tree(Path(path)) for path in paths if path is not None]


def benchmark_units(name: str, rows: list[dict]) -> pd.DataFrame:
    """One line per response, in scoring order (chosen then rejected of each row)."""
    lines = []
    for number, row in enumerate(rows):
        truth = (row.get("additional_metadata") or {}).get("concepts")
        answers = [("chosen", i, a) for i, a in enumerate(row["chosen"])]
        answers += [("rejected", i, a) for i, a in enumerate(row["rejected"])]
        for slot, (label, index, text) in enumerate(answers):
            lines.append({
                "benchmark": name, "row": number, "slot": slot, "label": label,
                "prompt_id": f"{name}/{number}", "response_id": f"{name}/{number}/{slot}",
                "domain": row["subset"] if name == "rewardbench2" else row.get("domain", "all"),
                "style": ("concise", "detailed", "markdown")[index] if name == "rm_bench" else None,
                "text": text, "prompt_text": row["prompt"], "concepts": tuple(truth[slot]) if truth else (),
            })
    return pd.DataFrame(lines)


def conversations(units: pd.DataFrame) -> list[list[dict]]:
    """The responses of ``benchmark_units`` as conversations of two turns."""
    return [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            for prompt, text in zip(units.prompt_text, units.text, strict=True)]


def join_scores(name: str, rows: list[dict], rewards: np.ndarray) -> list[dict]:
    """Benchmark rows with ``scores`` (RewardBench 2) or ``score_chosen`` and ``score_rejected`` (RM-Bench)."""
    out, start = [], 0
    for row in rows:
        chosen = len(row["chosen"])
        values = rewards[start:start + chosen + len(row["rejected"])].tolist()
        start += len(values)
        if name == "rewardbench2":
            out.append({**row, "scores": values})
        else:
            out.append({**row, "score_chosen": values[:chosen], "score_rejected": values[chosen:]})
    return out


def label_candidates(features: pd.DataFrame, count: int) -> pd.DataFrame:
    """Up to ``count`` features that can be tested (neither dead, rare nor dense): half of them those with w > 0, half
    with w < 0, in each the largest standard deviation of w_i z_i (|w| alone sits at the optimiser's step bound)."""
    usual = features[features.kind == "usual"].sort_values("contribution_sd", ascending=False, kind="stable")
    return pd.concat([usual[usual.w > 0].head(count // 2), usual[usual.w < 0].head(count // 2)], ignore_index=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    """Spawned single-thread workers (a fork of a process that has used torch threads may hang)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers; they would go on, unseen, and hold their locks."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(profile: Profile, root: Path, method: str, arguments: tuple) -> dict:
    start = time.perf_counter()
    artifact = getattr(Run(profile, root=root, progress=False), method)(*arguments)
    return _report(artifact, time.perf_counter() - start)


def _report(artifact: Artifact, seconds: float) -> dict:
    return {"key": artifact.key, "seconds": round(seconds, 1), "made": artifact.fresh}


def _mix(documents: Iterator, dialogues: Iterator, share: float, seed: int) -> Iterator:
    rng = np.random.default_rng(seed)
    for document in documents:
        yield document
        while rng.random() < share:
            yield next(dialogues)


def _source(name: str) -> str:
    """A path as it is; anything else is a hub id, which the loaders know by its prefix."""
    return name if Path(name).exists() or name.startswith("hub:") else f"hub:{name}"


def _draw(items: list, count: int | None, seed: int) -> list:
    """``count`` items drawn without replacement, in drawn order; all of them (shuffled) when there are fewer."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order[:count]]


def _limit(rows: list[dict], group: str, count: int | None, seed: int) -> list[dict]:
    """At most ``count`` rows per group, drawn with a seed, in their own order; Ties couples stay whole."""
    if count is None:
        return rows
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.get(group, "all"), []).append(index)
    rng = np.random.default_rng(seed)
    kept = []
    for name, members in groups.items():
        couples: dict[str, list[int]] = {}
        for i in members:
            couples.setdefault(str(rows[i]["id"]).partition(":")[2] if name.lower() == "ties" else str(i), []).append(i)
        order = list(couples.values())
        drawn = [i for n in rng.permutation(len(order)) for i in order[n]]
        kept += drawn[: count - count % 2 if name.lower() == "ties" else count]
    return [rows[i] for i in sorted(kept)]


def _hash_tree(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name if path.is_file() else p.relative_to(path).as_posix(): hash_file(p) for p in files}


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_jsonl(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")  # not splitlines: a text may hold U+2028 or U+0085
    return [json.loads(line) for line in text.split("\n") if line]
