"""From a run's artifacts to the quantities that the claims are about; every function is a few lines over the stages.

Numbers over seeds come as :class:`Interval`: over seeds alone for a quantity of one model, over seeds and prompts
where two variants are compared on the same prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .errors import ConfigError, DataError, OfflineError
from .evaluation import rewardbench2, rm_bench
from .evaluation.statistics import Interval, auroc, bootstrap_ci, paired_difference, seeds_and_prompts_ci, seeds_ci
from .sarm.steering import (
    SteeringAnalysis,
    feature_scores,
    matched_difference,
    rank_stability,
    rows_from_index,
    steer,
    summarise_shift,
)
from .stages import SAE_OF_VARIANT, Run, conversations

VARIANT_NAMES = {
    "sarm": "SARM", "token_sae": "token-level SAE", "random_encoder": "random encoder",
    "scalar_half": "scalar, half depth", "scalar_full": "scalar, full depth",
}
SCORERS = {"rewardbench2": rewardbench2, "rm_bench": rm_bench}


# -- benchmarks (RQ3) ------------------------------------------------------------------------------------------------

def present(run: Run) -> list[str]:
    """The benchmarks this run has rows of."""
    return [name for name, rows in run.benchmark_rows().items() if rows]


def score_table(run: Run) -> pd.DataFrame:
    """Long table variant, seed, benchmark, part, value in [0, 1].

    ``overall`` is the mean over the subsets or domains that are present; a missing one is in no mean, and
    :func:`missing_parts` names it.
    """
    lines = []
    for variant in run.profile.variants:
        for seed in run.profile.seeds:
            scored = run.scored(variant, seed)
            if scored.rewardbench2:
                result = rewardbench2.score(scored.rewardbench2)
                parts = {**result["subsets"], "overall": result["mean_of_present_subsets"]}
                lines += [(variant, seed, "rewardbench2", part, value) for part, value in parts.items()]
            if scored.rm_bench:
                result = rm_bench.score_present(scored.rm_bench)
                parts = {name: result[name] for name in rm_bench.DOMAINS if result[name] is not None}
                levels = pd.DataFrame(result["per_domain"]).T.mean()
                parts |= {"overall": float(np.mean(list(parts.values()))), **levels}
                lines += [(variant, seed, "rm_bench", part, value) for part, value in parts.items()]
    return pd.DataFrame(lines, columns=["variant", "seed", "benchmark", "part", "value"])


def missing_parts(run: Run) -> dict[str, list[str]]:
    """Subsets and domains without rows, per benchmark: no overall score of the real benchmark exists then."""
    rows = run.benchmark_rows()
    subsets = {row["subset"] for row in rows["rewardbench2"]}
    domains = {name for row in rows["rm_bench"] for name in rm_bench.DOMAINS if row["domain"].startswith(name)}
    return {"rewardbench2": [s for s in rewardbench2.SUBSETS if s not in subsets],
            "rm_bench": [d for d in rm_bench.DOMAINS if d not in domains]}


def units(run: Run, variant: str, benchmark: str) -> tuple[np.ndarray, list[str]]:
    """Value of every prompt per seed, [seeds, units], and the stratum (subset or domain) of each unit."""
    scorer, rows = SCORERS[benchmark], [getattr(run.scored(variant, seed), benchmark) for seed in run.profile.seeds]
    if not rows[0]:
        raise DataError(f"this run has no rows of {benchmark}")
    found = [scorer.units(part) for part in rows]
    return np.array([[value for _, _, value in one] for one in found]), [stratum for stratum, _, _ in found[0]]


def overall(run: Run, variant: str, benchmark: str = "rewardbench2") -> Interval:
    """Mean over subsets with its 95 % interval over seeds and prompts (prompts alone with one seed)."""
    values, strata = units(run, variant, benchmark)
    return seeds_and_prompts_ci(values, strata=strata) if len(values) > 1 else bootstrap_ci(values[0], strata=strata)


def difference(run: Run, a: str, b: str, benchmark: str = "rewardbench2", blind: bool = False) -> Interval:
    """Overall score of variant ``a`` minus that of ``b``, paired over prompts and seeds.

    ``blind`` gives every response of ``a`` the same reward: the control."""
    (x, strata), (y, _) = units(run, a, benchmark), units(run, b, benchmark)
    if blind:
        rows = [{**row, **{name: [0.0] * len(value) for name, value in row.items() if name.startswith("score")}}
                for row in getattr(run.scored(a, run.profile.seeds[0]), benchmark)]
        x = np.tile([value for _, _, value in SCORERS[benchmark].units(rows)], (len(x), 1))
    return paired_difference(x, y, strata=strata) if len(x) > 1 else paired_difference(x[0], y[0], strata=strata)


def against_chance(run: Run) -> pd.DataFrame:
    """Is a variant told from chance?  Overall score with interval (percent), what guessing gets, and the verdict.

    Guessing: 1/n in best of n and 0 in Ties (a constant reward under RewardBench 2's rule), a half in RM-Bench."""
    lines = []
    for benchmark in present(run):
        rows = getattr(run.scored(run.profile.variants[0], run.profile.seeds[0]), benchmark)
        chance = 0.5
        if benchmark == "rewardbench2":
            equal = [{**row, "scores": [0.0] * len(row["scores"])} for row in rows]
            chance = rewardbench2.score(equal)["mean_of_present_subsets"]
        for variant in run.profile.variants:
            interval = overall(run, variant, benchmark)
            above = "above chance" if interval.low > chance else "below chance"
            told = interval.low > chance or interval.high < chance
            lines.append((benchmark, VARIANT_NAMES[variant], 100 * interval.estimate, 100 * interval.low,
                          100 * interval.high, 100 * chance, above if told else "not told from chance"))
    return pd.DataFrame(lines, columns=["benchmark", "variant", "score", "low", "high", "chance", "verdict"])


def variant_table(run: Run) -> pd.DataFrame:
    """One row per variant: held-out pair accuracy and both overall scores, each mean and standard error over seeds."""
    scores, lines = score_table(run), []
    for variant in run.profile.variants:
        row = {"variant": VARIANT_NAMES[variant]}
        values = {"pairs": [run.reward(variant, s).meta["eval_accuracy"] for s in run.profile.seeds]}
        for name in present(run):
            part = scores[(scores.variant == variant) & (scores.benchmark == name) & (scores.part == "overall")]
            values[name] = part.value.to_numpy()
        for name, value in values.items():
            row[name] = float(np.mean(value))
            row[f"{name}_se"] = float(np.std(value, ddof=1) / np.sqrt(len(value))) if len(value) > 1 else np.nan
        lines.append(row)
    return pd.DataFrame(lines)


def part_table(run: Run, benchmark: str) -> pd.DataFrame:
    """Mean over seeds (percent) per variant and subset or domain, wide; columns in the benchmark's order."""
    scores = score_table(run)
    scores = scores[scores.benchmark == benchmark]
    wide = scores.pivot_table(index="variant", columns="part", values="value", sort=False) * 100
    order = ["overall", *[c for c in dict.fromkeys(scores.part) if c != "overall"]]
    return wide.loc[list(run.profile.variants), order].rename(index=VARIANT_NAMES)


def table_1_rows(run: Run) -> pd.DataFrame:
    """Figure data of Table 1: model, subset, value, lo, hi (percent; t interval over seeds) of SARM and scalar RM."""
    scores, lines = score_table(run), []
    shown = [v for v in ("sarm", "scalar_full") if v in run.profile.variants]
    for (variant, part), group in scores[scores.benchmark == "rewardbench2"].groupby(["variant", "part"], sort=False):
        if variant in shown:
            lines.append({"model": VARIANT_NAMES[variant], "subset": part.capitalize() if part == "overall" else part,
                          **_percent(group.value)})
    return pd.DataFrame(lines)


def table_2_rows(run: Run, benchmark: str = "rewardbench2") -> pd.DataFrame:
    """Figure data of Table 2: variant, value, lo, hi (percent), points (one per seed)."""
    scores, lines = score_table(run), []
    chosen = scores[(scores.benchmark == benchmark) & (scores.part == "overall")]
    for variant in run.profile.variants:
        interval, values = overall(run, variant, benchmark), chosen[chosen.variant == variant].value
        lines.append({"variant": VARIANT_NAMES[variant], "value": 100 * interval.estimate,
                      "lo": max(0.0, 100 * interval.low), "hi": min(100.0, 100 * interval.high),
                      "points": (100 * values).tolist()})
    return pd.DataFrame(lines)


def _percent(values) -> dict[str, float]:
    if len(values) < 2:
        return {"value": 100 * float(values.iloc[0])}
    interval = seed_interval(values, 0.0, 1.0)
    return {"value": 100 * interval.estimate, "lo": 100 * interval.low, "hi": 100 * interval.high}


def training_curves(run: Run) -> pd.DataFrame:
    """Held-out pair accuracy after each epoch: variant, seed, step (pairs seen), accuracy."""
    lines, batch = [], run.profile.reward.batch_size
    for variant in run.profile.variants:
        for seed in run.profile.seeds:
            entries = {e["step"]: e["eval_accuracy"] for e in run.reward(variant, seed).json("log.json")
                       if "eval_accuracy" in e}
            lines += [(VARIANT_NAMES[variant], seed, step * batch, value) for step, value in entries.items()]
    return pd.DataFrame(lines, columns=["variant", "seed", "step", "accuracy"])


# -- the SAE and the reward (equations 4, 7-9) -----------------------------------------------------------------------

def sae_table(run: Run) -> pd.DataFrame:
    """Metrics of every SAE of the run on held-out states of its own kind of position, one row per rule and seed."""
    rules = dict.fromkeys(SAE_OF_VARIANT[v] for v in run.profile.variants if SAE_OF_VARIANT.get(v))
    return pd.DataFrame([{"positions": rule, "seed": seed, **run.sae(rule, seed).meta}
                         for rule in rules for seed in run.profile.seeds])


def sae_logs(run: Run, seed: int) -> pd.DataFrame:
    """Training logs of one seed's SAEs, with a ``run`` column that names the position rule."""
    rules = dict.fromkeys(SAE_OF_VARIANT[v] for v in run.profile.variants if SAE_OF_VARIANT.get(v))
    return pd.concat([pd.DataFrame(run.sae(rule, seed).json("log.json")).assign(run=rule) for rule in rules])


def held_out_states(run: Run, positions: str = "sentence_end") -> torch.Tensor:
    """The held-out activation vectors [4096, d]."""
    from safetensors.torch import load_file
    return load_file(run.activations(positions).file("activations.safetensors"))["held_out"]


def reward_sum_error(run: Run, seed: int, drop_feature: bool = False) -> float:
    """Largest |r - sum_i w_i z_i| over all benchmark responses (equation 9), relative to the largest |r|.

    ``drop_feature`` leaves the feature with the largest total contribution out of the sum: the control."""
    scored, w = run.scored("sarm", seed), run.head("sarm", seed)
    if drop_feature:
        w = w.copy()
        w[np.argmax(np.abs(np.asarray(abs(scored.z).sum(axis=0)).ravel() * w))] = 0
    reward = scored.units.reward.to_numpy()
    return float(np.abs(reward - scored.z @ w).max() / np.abs(reward).max())


def changed_sae_tensors(run: Run, seed: int, positions: str = "sentence_end") -> int:
    """Tensors of the SAE inside the trained SARM that differ, in any bit, from the pretrained SAE.

    ``positions="every"`` compares with the token-level SAE instead: the control."""
    before, after = run.load_sae(positions, seed).state_dict(), run.load_reward("sarm", seed).sae.state_dict()
    return sum(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def pair_accuracy(run: Run, variant: str, seed: int, shuffled: bool = False) -> float:
    """Share of held-out pairs whose chosen answer gets the higher reward (a tie counts half).

    ``shuffled`` swaps chosen and rejected in a random half of the pairs: the control."""
    from .evaluation.scoring import score_conversations
    held = run.pairs(seed)["eval"]
    talks = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}]
             for side in ("chosen", "rejected") for pair in held]
    rewards = score_conversations(run.load_reward(variant, seed), run.tokenizer, talks,
                                  max_length=run.profile.preferences.max_length).rewards
    margin = rewards[: len(held)] - rewards[len(held):]
    if shuffled:
        margin = margin * np.random.default_rng(seed).permutation(np.resize([1, -1], len(margin)))
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def downstream_table(run: Run, documents: int = 100) -> pd.DataFrame:
    """What the SAEs cost the decoder they were trained on, at their own positions: next-token loss with the state as it
    is (ce), through the SAE (ce_sae) and as zeros (ce_zero), and loss_recovered, on documents of another seed."""
    from itertools import islice

    from transformers import AutoModelForCausalLM

    from .backbone import _from_hub, _quiet_loading
    from .sae.downstream import loss_recovered
    spec = run.profile.backbone
    with _quiet_loading():
        model = _from_hub(AutoModelForCausalLM, run.backbone_path, revision=spec.revision,
                          trust_remote_code=spec.trust_remote_code).to(run.device).eval()
    texts = list(islice(run.texts(run.profile.seed + 1), documents))
    return pd.DataFrame([{"positions": rule, **loss_recovered(
        model, run.tokenizer, run.load_sae(rule, run.profile.seed).to(run.device), run.shape["layer"], texts, rule)}
        for rule in ("sentence_end", "every")])


def untrained_sae_fvu(run: Run) -> float:
    """FVU on the same held-out states of an SAE that was never trained: the control of the trained one."""
    from .sae.model import TopKSAE
    from .sae.training import evaluate_sae
    shape = run.shape
    sae = TopKSAE(shape["d_model"], shape["n_features"], shape["k"], generator=torch.Generator().manual_seed(0))
    return evaluate_sae(sae, held_out_states(run))["fvu"]


def decoder_norm_error(run: Run, seed: int, stretch: float = 1.0) -> float:
    """Largest distance of a decoder column's length from 1; ``stretch`` lengthens one column: the control."""
    norms = run.load_sae("sentence_end", seed).W_dec.detach().norm(dim=1)
    norms[0] *= stretch
    return float((norms - 1).abs().max())


def seed_interval(values, low: float = -np.inf, high: float = np.inf) -> Interval | None:
    """Mean and 95 % t interval over seeds, cut at the ends of the quantity's own range; None with a single seed."""
    if len(values) < 2:
        return None
    interval = seeds_ci(np.asarray(values, float))
    return interval._replace(low=max(interval.low, low), high=min(interval.high, high))


# -- features (RQ1) --------------------------------------------------------------------------------------------------

def weight_preference_auroc(features: pd.DataFrame, w: np.ndarray | None = None) -> float:
    """AUROC of the head weight for features that go with preferred against dispreferred responses (live, not rare).

    ``w`` replaces the weights (the control: weights of shuffled features)."""
    usual = features[(features.kind == "usual") & features.preference_corr.notna()]
    weight = usual.w.to_numpy() if w is None else np.asarray(w)[usual.feature]
    positive = usual.preference_corr.to_numpy() > 0
    if positive.all() or not positive.any():
        raise DataError("features correlate with preference in one direction only; nothing to compare")
    return float(auroc(weight[positive], weight[~positive]))


def shuffled_weight_auroc(run: Run) -> float:
    """:func:`weight_preference_auroc` with the head weights shuffled, mean over seeds: the control."""
    found = []
    for seed in run.profile.seeds:
        features = run.contexts(seed).features()
        usual = (features.kind == "usual").to_numpy()
        w = features.w.to_numpy(copy=True)
        w[usual] = np.random.default_rng(seed).permutation(w[usual])
        found.append(weight_preference_auroc(features, w))
    return float(np.mean(found))


def label_score(run: Run, seed: int, column: str = "auroc") -> float:
    """Mean held-out AUROC of a seed's scored labels; NaN when none could be scored.

    ``column="auroc_other_label"`` scores each feature by another feature's label: the control."""
    values = run.label_table(seed)[column].astype(float)
    return float(values.mean())


def case_studies(run: Run, seed: int, n: int = 3) -> pd.DataFrame:
    """The ``n`` labelled features on each side that move the reward most (sd of w z): positive ones have w > 0 and
    fire more on chosen answers, negative ones the reverse; features whose two signs disagree are in neither.

    Columns: side, feature, w, preference_corr, contribution_sd, rate, label, auroc, auroc_lo, verdict."""
    table = run.label_table(seed).sort_values("contribution_sd", ascending=False, kind="stable")
    parts = [(side, table[(sign * table.w > 0) & (sign * table.preference_corr > 0)].head(n))
             for side, sign in (("positive", 1), ("negative", -1))]
    columns = ["side", "feature", "w", "preference_corr", "contribution_sd", "rate", "label", "auroc", "auroc_lo",
               "verdict"]
    return pd.concat([part.assign(side=side) for side, part in parts])[columns].reset_index(drop=True)


def sentence_table(run: Run, seed: int, features, answers: int = 600, per_decile: int = 1) -> pd.DataFrame:
    """``sentences.sentence_contexts`` on the first ``answers`` RM-Bench responses: the view of the paper's figure."""
    from .interpretation.sentences import sentence_contexts
    frame, _ = run.scored("sarm", seed).part("rm_bench")
    return sentence_contexts(run.load_reward("sarm", seed), run.tokenizer, conversations(frame[:answers]), features,
                             per_decile=per_decile, max_length=run.profile.benchmarks.max_length, seed=seed)


def concept_summary(run: Run) -> pd.DataFrame:
    """``concept_table``'s summary per representation, mean over seeds: concepts, found (held-out AUROC of 0.9 or more),
    found_min and found_max over seeds, mean AUROC and F1."""
    parts = pd.concat([concept_table(run, seed)[1].assign(seed=seed) for seed in run.profile.seeds])
    found = parts.groupby("representation", sort=False).agg(
        concepts=("n_concepts", "first"), found=("n_found", "mean"), found_min=("n_found", "min"),
        found_max=("n_found", "max"), auroc=("mean_auroc", "mean"), f1=("mean_f1", "mean"))
    return found.reset_index()


STATE, LABELS = "state coordinates", "keyword labels"


def concept_table(run: Run, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Toy world: planted concepts against the best single feature of SARM, of the random encoder, of the token-level
    SAE, the best coordinate of SARM's hidden state (either sign: a neuron has none), and the best keyword label's
    score of the text (which reads words, not activations).

    Returns (one row per concept and representation, summary); see ``ground_truth.compare_representations``."""
    from .interpretation.ground_truth import compare_representations
    if ("concepts", seed) in run._memo:
        return run._memo["concepts", seed]
    shown = [v for v in SAE_OF_VARIANT if v in run.profile.variants]
    frame, concepts = _planted(run, seed)
    found: dict[str, Any] = {VARIANT_NAMES[v]: run.scored(v, seed).part("rm_bench")[1] for v in shown}
    found |= {STATE: run.states("sarm", seed), LABELS: label_scores(run, seed)}
    if not found[LABELS].nnz:
        del found[LABELS]  # every label abstained
    run._memo["concepts", seed] = compare_representations(found, concepts, frame.prompt_id, signed=(STATE,))
    return run._memo["concepts", seed]


def concept_null(run: Run, seed: int, times: int = 20) -> Interval:
    """``ground_truth.shuffled_concepts`` of SARM's features: mean, and where 95 % of the shuffles lie."""
    from .interpretation.ground_truth import shuffled_concepts
    frame, concepts = _planted(run, seed)
    found = shuffled_concepts(run.scored("sarm", seed).part("rm_bench")[1], concepts, frame.prompt_id, times=times,
                              seed=seed)
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(found.mean()), float(low), float(high), 0.95, "quantiles over shuffles", times)


def _planted(run: Run, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    frame, _ = run.scored("sarm", seed).part("rm_bench")
    names = sorted({name for row in frame.concepts for name in row})
    if not names:
        raise ConfigError(f"profile {run.profile.name!r} has no planted concepts; only the toy world knows its truth")
    return frame, pd.DataFrame({name: [name in row for row in frame.concepts] for name in names})


def label_scores(run: Run, seed: int):
    """What each feature's keyword label says about every RM-Bench response: csr [n, M], in the label's column."""
    from scipy import sparse

    from .interpretation.judges import KeywordJudge
    contexts, judge = run.contexts(seed), KeywordJudge(run.vocabulary(seed))
    scores = sparse.lil_array(contexts.z.shape)
    for label in run.label_objects(seed):
        if label.weights:
            scores[:, [label.feature]] = judge.score(label, contexts.index)[:, None]
    return scores.tocsr()


# -- steering (RQ2) --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Steering:
    """One seed's steering experiment on RewardBench 2, after choosing a feature on RM-Bench safety."""

    seed: int
    feature: int
    factor: float
    scores: pd.DataFrame
    """Feature scores s on RM-Bench safety, best first."""
    stability: dict
    analysis: SteeringAnalysis
    target: np.ndarray
    """True for T: chosen responses to safety prompts."""
    rows: pd.DataFrame
    units: pd.DataFrame
    selection: tuple[Any, Any]
    """z of the chosen and rejected RM-Bench responses that the feature was chosen on."""
    dropped: int
    """RM-Bench safety prompts left out of the selection because RewardBench 2 asks them too, or nearly."""

    @property
    def table(self) -> pd.DataFrame:
        """reward, reward_steered, active, is_target, group, category of every response."""
        return self.analysis.table(self.feature, self.factor, self.target, category=self.category)

    @property
    def category(self) -> np.ndarray:
        """T, safety rejected, or not safety."""
        safety = (self.units.domain == "Safety").to_numpy()
        return np.select([self.target, safety], ["T", "safety, rejected"], "not safety")

    def shifts(self, factor: float | None = None, feature: int | None = None) -> tuple[float, float]:
        """Mean reward change of T and of C in standard deviations of all rewards before steering."""
        change = ((self.factor if factor is None else factor) - 1) * self.analysis.contribution(
            self.feature if feature is None else feature)
        change = change / self.analysis.rewards.std()
        return float(change[self.target].mean()), float(change[~self.target].mean())


    def shuffled_difference(self, draws: int = 100) -> float:
        """T minus C, in sd of rewards, when T is a random set of the same size (mean of ``draws``): the control."""
        rng = np.random.default_rng(self.seed)
        change = (self.factor - 1) * self.analysis.contribution(self.feature) / self.analysis.rewards.std()
        sets = [rng.permutation(self.target) for _ in range(draws)]
        return float(np.mean([change[drawn].mean() - change[~drawn].mean() for drawn in sets]))


def steering(run: Run, seed: int, factor: float | None = None) -> Steering:
    """Choose the safety feature with the highest s on RM-Bench's safety domains, and steer it on RewardBench 2."""
    scored, w = run.scored("sarm", seed), run.head("sarm", seed)
    (rm_units, rm_z), (rb_units, rb_z) = scored.part("rm_bench"), scored.part("rewardbench2")
    safety = rm_units.domain.str.startswith("safety").to_numpy()
    repeated = _asked_in(rm_units[safety], rb_units[rb_units.domain == "Safety"])
    safety = safety & ~rm_units.prompt_id.isin(repeated).to_numpy()
    if not safety.any():
        raise DataError("RewardBench 2 asks every safety prompt of RM-Bench; no prompt is left to choose a feature on")
    chosen = np.flatnonzero(safety & (rm_units.label == "chosen"))
    rejected = np.flatnonzero(safety & (rm_units.label == "rejected"))
    groups = rm_units.prompt_id.to_numpy()[chosen]
    scores = feature_scores(rm_z[chosen], rm_z[rejected])
    stability = rank_stability(rm_z[chosen], rm_z[rejected], groups=groups, n_boot=100)
    target = ((rb_units.domain == "Safety") & (rb_units.label == "chosen")).to_numpy()
    analysis = SteeringAnalysis(rb_z, rb_units.reward.to_numpy(), w, rb_units.prompt_id.to_numpy())
    return Steering(seed, int(scores.feature.iloc[0]), run.profile.steering.factor if factor is None else factor,
                    scores, stability, analysis, target, rows_from_index(rb_units), rb_units,
                    (rm_z[chosen], rm_z[rejected]), len(repeated))


def _asked_in(units: pd.DataFrame, others: pd.DataFrame) -> set[str]:
    """Ids of the prompts of ``units`` that ``others`` ask too, exactly or nearly (``drop_contaminated``)."""
    from .data.preferences import drop_contaminated
    prompts = units.drop_duplicates("prompt_id")
    asked = [{"id": one.prompt_id, "prompt": [{"role": "user", "content": one.prompt_text}]}
             for one in prompts.itertuples()]
    kept = drop_contaminated(asked, others.prompt_text.unique())
    return set(prompts.prompt_id) - {one["id"] for one in kept}


def selection_table(run: Run, seed: int) -> pd.DataFrame:
    """Which feature each score would choose on RM-Bench safety, and how sure it is.

    Columns: score, feature, s, w, top1_frequency, top_jaccard, fires_in_T and fires_in_C (shares on RewardBench 2).
    The scores are ``feature_scores``' methods, the paper's with the released shrinkage over all M features, and
    SAFER's (summed over all sentence ends)."""
    one = steering(run, seed)
    (pos, neg), found = one.selection, []
    for name, settings in {"paper": {}, "paper, shrunk over all M": {"shrinkage": "all"},
                           **{m: {"method": m} for m in ("frequency", "pair_mean", "t", "auroc")}}.items():
        found.append((name, feature_scores(pos, neg, **settings), rank_stability(pos, neg, n_boot=50, **settings)))
    pos, neg = safer_features(run, seed)
    found.append(("SAFER, all sentence ends", feature_scores(pos, neg), rank_stability(pos, neg, n_boot=50)))
    lines = []
    for name, scores, stability in found:
        feature = int(scores.feature.iloc[0])
        active = one.analysis.activation(feature) != 0
        lines.append({"score": name, "feature": feature, "s": scores.s.iloc[0], "w": one.analysis.w[feature],
                      "top1_frequency": stability["top1_frequency"], "top_jaccard": stability["top_jaccard"],
                      "fires_in_T": active[one.target].mean(), "fires_in_C": active[~one.target].mean()})
    return pd.DataFrame(lines)


def safer_features(run: Run, seed: int) -> tuple[Any, Any]:
    """Features summed over all sentence ends of the chosen and rejected RM-Bench safety answers (csr [n, M] each)."""
    from .sarm.controls import sentence_end_features
    units = run.scored("sarm", seed).part("rm_bench")[0]
    rb_units = run.scored("sarm", seed).part("rewardbench2")[0]
    units = units[units.domain.str.startswith("safety")]
    units = units[~units.prompt_id.isin(_asked_in(units, rb_units[rb_units.domain == "Safety"]))]
    model, found = run.load_reward("sarm", seed), []
    for label in ("chosen", "rejected"):
        talks = conversations(units[units.label == label])
        found.append(sentence_end_features(model, run.tokenizer, talks, max_length=run.profile.benchmarks.max_length))
    return found[0], found[1]


def control_table(run: Run, one: Steering) -> pd.DataFrame:
    """The edit against others of the same size (``controls.compare_edits``): directions learned on the same prompts,
    a stretch of high rewards, length."""
    from .sarm.controls import compare_edits, control_edits, selection_directions
    changes = control_edits(one.analysis, one.feature, one.factor, selection_directions(*one.selection),
                            one.units.length.to_numpy())
    return compare_edits(one.analysis, changes, one.target, one.rows, target_subsets=("Safety",))


def chance_table(one: Steering, n_perm: int = 1000) -> pd.DataFrame:
    """``controls.max_t``: which features move T more than C beyond what any other prompts would show."""
    from .sarm.controls import max_t
    return max_t(one.analysis, one.target, (one.units.label == "chosen").to_numpy(), n_perm=n_perm, seed=one.seed)


def feature_meaning(one: Steering) -> pd.DataFrame:
    """Planted concepts (toy world; empty elsewhere) by how selectively the chosen feature fires in them.

    Columns: concept, n, rate_with and rate_without (share of answers in which the feature is active), difference."""
    active = one.analysis.activation(one.feature) != 0
    lines = []
    for name in sorted({name for row in one.units.concepts for name in row}):
        true = np.array([name in row for row in one.units.concepts])
        if true.any() and not true.all():
            lines.append((name, int(true.sum()), active[true].mean(), active[~true].mean()))
    table = pd.DataFrame(lines, columns=["concept", "n", "rate_with", "rate_without"])
    table["difference"] = table.rate_with - table.rate_without
    return table.sort_values("difference", ascending=False, ignore_index=True)


def steering_table(run: Run) -> pd.DataFrame:
    """One row per seed: the feature, its s, w, stability, activity, the shifts of T and C (sd of rewards), their
    difference at equal base reward, and how often a random direction or another feature does at least as much."""
    lines = []
    for seed in run.profile.seeds:
        one = steering(run, seed)
        shifts = summarise_shift(one.table, n_boot=run.profile.steering.bootstrap).set_index("set")
        t, c = one.shifts()
        matched = matched_difference(one.table, n_boot=run.profile.steering.bootstrap)
        spread = one.analysis.rewards.std()
        _, rank = one.analysis.controls(one.feature, one.factor, one.target)
        lines.append({"seed": seed, "feature": one.feature, "s": one.scores.s.iloc[0],
                      "w": one.analysis.w[one.feature], "top1_frequency": one.stability["top1_frequency"],
                      "active_T": shifts.share_active["T"], "active_C": shifts.share_active["C"],
                      "shift_T": t, "shift_C": c, "T_minus_C": t - c,
                      **{f"matched_{k}": matched[v] / spread for k, v in (("T_minus_C", "difference"), ("lo", "lo"),
                                                                          ("hi", "hi"))},
                      "p_random": rank["matched_did_p_random"], "p_live": rank["matched_did_p_live"]})
    return pd.DataFrame(lines)


def steered_forward(run: Run, one: Steering, n: int = 400, add: float = 0.0) -> dict[str, float]:
    """Score ``n`` responses with the model before and after the edit: largest change among inactive responses, and
    largest difference between the forward pass and the closed form r + (c - 1) w_i z_i.

    ``add`` adds a constant to every steered reward, as adding to an inactive latent would (the control)."""
    from .evaluation.scoring import score_conversations
    model = run.load_reward("sarm", one.seed)
    edited = steer(model, {one.feature: one.factor})
    rows = np.random.default_rng(one.seed).permutation(len(one.units))[:n]
    talks = conversations(one.units.iloc[rows])
    before, after = (score_conversations(one_model, run.tokenizer, talks,
                                         max_length=run.profile.benchmarks.max_length).rewards
                     for one_model in (model, edited))
    after, expected = after + add, one.analysis.steered({one.feature: one.factor})[rows]
    inactive = one.analysis.activation(one.feature)[rows] == 0
    return {"inactive_change": float(np.abs(after - before)[inactive].max(initial=0.0)),
            "n_inactive": int(inactive.sum()), "closed_form_error": float(np.abs(after - expected).max())}


def released_checkpoint(run: Run) -> tuple[Path, str]:
    """(folder, sentence): a checkpoint in the authors' layout, and which one it is.

    With profile ``released`` the authors' own, from the hub (OfflineError at once where it cannot be reached).  With
    any other the run's first SARM, written as the authors write theirs, so that the same cells run without a network.
    """
    from .sarm.released import save_official
    source = run.profile.backbone.source
    if run.profile.name == "released":
        if not Path(source).is_dir():
            from huggingface_hub import snapshot_download

            from .backbone import _hub_reachable
            if not _hub_reachable():
                raise OfflineError(f"the released checkpoint {source!r} lies on the hub, which cannot be reached; set "
                                   "backbone.source to a downloaded folder in a copy of the profile")
            source = snapshot_download(source, revision=run.profile.backbone.revision,
                                       allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        return Path(source), "the authors' released SARM-4B"
    folder = run.store.root / "released"
    save_official(run.load_reward("sarm", run.profile.seed), folder)
    run.tokenizer.save_pretrained(folder)
    return folder, f"the SARM of profile {run.profile.name}, in the authors' layout (not the authors' weights)"
