"""Quantities of a run as tables: a notebook says ``table = results.x(run)``, then ``figures.x(table)``.

Intervals are over seeds for a quantity of one model, over seeds and prompts where variants are compared.
Every claim has a control, the same number of a broken version.
"""

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from sarmlib.data.pairs import drop_contaminated
from sarmlib.errors import DataError
from sarmlib.evaluation import published, rewardbench2, rm_bench
from sarmlib.evaluation.scorer import score
from sarmlib.evaluation.statistics import Interval, auroc, bootstrap_ci, seeds_and_prompts_ci, seeds_ci
from sarmlib.hub import check_access, hub_folder
from sarmlib.interpretation.ground_truth import match_concepts, shuffled_concepts
from sarmlib.interpretation.judges import MIN_POSITIVES, KeywordJudge
from sarmlib.pipeline import NO_PAIRS, SAE_OF_VARIANT, Run, conversations, train_reward
from sarmlib.plan import sizes
from sarmlib.sae.quality import evaluate_sae
from sarmlib.sae.topk import TopKSAE
from sarmlib.sae.training import SAETrainConfig, train_sae
from sarmlib.sarm import steering as lab
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.sarm.released import save_official

VARIANT_NAMES = {"sarm": "SARM", "token_sae": "token-level SAE", "random_encoder": "random encoder",
                 "scalar_half": "scalar, half depth", "scalar_full": "scalar, full depth",
                 "no_pairs": "decoder, no pairs", "no_pairs_whole": "whole decoder, no pairs"}
POSITION_NAMES = {"sentence_end": "sentence ends", "every": "all tokens"}


def seed_interval(values, low: float = -np.inf, high: float = np.inf) -> Interval | None:
    """Mean and 95 % t interval over seeds, cut at the quantity's own range; None with a single seed."""
    if len(values) < 2:
        return None
    found = seeds_ci(np.asarray(values, float))
    return found._replace(low=max(found.low, low), high=min(found.high, high))


def log_interval(values) -> Interval | None:
    """Geometric mean and its 95 % t interval over seeds, for factors and other positive numbers; `seed_interval` when
    one is not positive."""
    if len(values) < 2 or min(values) <= 0:
        return seed_interval(values)
    found = seeds_ci(np.log(np.asarray(values, float)))
    ends = np.exp(found[:3]).tolist()
    return found._replace(estimate=ends[0], low=ends[1], high=ends[2], method="t over seeds, of logarithms")


def sae_table(run: Run) -> pd.DataFrame:
    """Metrics of every SAE on held-out states of its own kind of position (``positions``, in words)."""
    return pd.DataFrame([{"positions": POSITION_NAMES[rule], "seed": seed, **run.sae(rule, seed).meta}
                         for rule in _position_rules(run) for seed in run.profile.seeds])


def sae_training(run: Run, seed: int) -> pd.DataFrame:
    """Training logs of one seed's SAEs; ``run`` names the positions in words."""
    return pd.DataFrame([{**row, "run": POSITION_NAMES[rule]} for rule in _position_rules(run)
                         for row in run.sae(rule, seed).json("log.json")])


def _position_rules(run: Run) -> list[str]:
    return list(dict.fromkeys(filter(None, map(SAE_OF_VARIANT.get, run.profile.variants))))


def untrained_sae_fvu(run: Run) -> float:
    """Variance left unexplained by an SAE that was never trained: the control."""
    sizes = [run.shape[name] for name in ("d_model", "n_features", "k")]
    sae = TopKSAE(*sizes, generator=torch.Generator().manual_seed(0))
    return evaluate_sae(sae, run.vectors("sentence_end")["held_out"])["fvu"]


def decoder_norm_drift(run: Run, seed: int) -> float:
    """Largest distance of a decoder column's length from 1 in the whole training, before it was brought back to 1."""
    return max(row["drift"] for row in run.sae("sentence_end", seed).json("log.json"))


def unnormalised_drift(run: Run, seed: int, steps: int = 500) -> float:
    """The same of an SAE whose columns are never brought back, after ``steps`` steps: the control."""
    shape: dict[str, Any] = {name: run.shape[name] for name in ("d_model", "n_features", "k")}
    config = SAETrainConfig(lr=run.profile.sae.lr, batch_size=run.profile.sae.batch_size, steps=steps, renorm_every=0,
                            seed=seed)
    return train_sae(run.vectors("sentence_end")["train"], config, **shape, progress=False)[1][-1]["drift"]


def reward_training(run: Run) -> pd.DataFrame:
    """Held-out pair accuracy of every variant and seed during training; ``step`` counts pairs seen."""
    table = pd.DataFrame([{"variant": VARIANT_NAMES[variant], "seed": seed, **row}
                          for variant in run.profile.variants for seed in run.profile.seeds
                          for row in run.reward(variant, seed).json("log.json")])
    table = table.assign(accuracy=table.eval_accuracy).dropna(subset="accuracy")
    table["step"] *= run.profile.reward.batch_size
    return table.drop_duplicates(["variant", "seed", "step"], keep="last")[["variant", "seed", "step", "accuracy"]]


def reward_sum_error(run: Run, seed: int, drop_feature: bool = False) -> float:
    """Largest |r - sum_i w_i z_i| of all benchmark responses, relative to the largest |r|; ``drop_feature``
    leaves the feature with the largest total contribution out: the control."""
    scored, w = run.scored("sarm", seed), run.head("sarm", seed).copy()
    if drop_feature:
        w[np.argmax(np.abs(np.asarray(abs(scored.z).sum(axis=0)).ravel() * w))] = 0
    reward = scored.units.reward.to_numpy()
    return float(np.abs(reward - scored.z @ w).max() / np.abs(reward).max())


def changed_sae_tensors(run: Run, seed: int, frozen: bool = True) -> int:
    """Tensors of the trained SARM's SAE that differ, in any bit, from those before; ``frozen`` False trains another
    SARM on 32 pairs, its encoder too: the control."""
    sae = run.load_sae("sentence_end", seed)
    model = run.load_reward("sarm", seed) if frozen else SarmForSequenceClassification.from_backbone_and_sae(
        run.backbone_path, sae, run.shape["layer"], frozen_sae=False, **run.hub)
    if not frozen:
        spec = run.profile.reward.model_copy(update={"batch_size": 4, "micro_batch_size": None})  # eight steps
        with TemporaryDirectory() as folder:
            train_reward(spec, model, run.tokenizer, {"train": run.pairs(seed)["train"][:32], "eval": []},
                         Path(folder), max_length=run.profile.preferences.max_length, seed=seed, device=run.device)
    after = model.sae.state_dict()
    return sum(not tensor.equal(after[name].cpu().to(tensor.dtype)) for name, tensor in sae.state_dict().items())


def pair_accuracy(run: Run, variant: str, seed: int, shuffled: bool = False) -> float:
    """Share of held-out pairs whose chosen answer gets the higher reward (a tie counts half); ``shuffled``
    swaps the answers of a random half of them: the control."""
    held, model = run.pairs(seed)["eval"], run.load_reward(variant, seed)
    talks = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}]
             for side in ("chosen", "rejected") for pair in held]
    rewards = score(model, run.tokenizer, talks, max_length=run.profile.preferences.max_length).rewards
    margin = rewards[: len(held)] - rewards[len(held):]
    if shuffled:
        margin = margin * np.random.default_rng(seed).permutation(np.resize([1, -1], len(margin)))
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def feature_table(run: Run, seed: int) -> pd.DataFrame:
    """Features that are neither dead, rare nor dense, with the label of those whose label is reliable."""
    features, labels = run.contexts(seed).features(), run.label_table(seed)
    words = labels[labels.reliable.astype(bool)].set_index("feature").label
    return features[features.kind == "usual"].assign(label=lambda table: table.feature.map(words))


def weight_preference_auroc(features: pd.DataFrame) -> float:
    """AUROC of the head weight for features that go with preferred against dispreferred responses."""
    usual = features[(features.kind == "usual") & features.preference_corr.notna()]
    positive = usual.preference_corr > 0
    return float(auroc(usual.w[positive], usual.w[~positive]))


def shuffled_weight_auroc(run: Run) -> float:
    """:func:`weight_preference_auroc` with weights shuffled among features, mean over seeds: the control."""
    found = []
    for seed in run.profile.seeds:
        usual = run.contexts(seed).features().query("kind == 'usual'")
        weights = np.random.default_rng(seed).permutation(usual.w)
        found.append(weight_preference_auroc(usual.assign(w=weights)))
    return float(np.mean(found))


def attributed(run: Run, tested: bool = True) -> pd.DataFrame:
    """Per seed, how much of the rewards on RM-Bench the labels account for.

    alive: features that fire there at all; share: of the sum of |w_i z_i| over all answers, that under reliable labels
    (share_harder: of these, under labels whose auroc_matched too exceeds null_95); top: answers whose largest |w_i z_i|
    has a reliable label.  Not ``tested``: every label counts, the control.
    """
    lines = []
    for seed in run.profile.seeds:
        labels, z = run.label_table(seed), run.scored("sarm", seed).part("rm_bench")[1]
        parts = abs(z.multiply(run.head("sarm", seed)[None])).tocsc()
        reliable = harder = labels.label.notna()
        if tested:
            reliable = labels.reliable.astype(bool)
            harder = reliable & (labels.auroc_matched.astype(float) > labels.null_95.astype(float))
        lines.append({
            "seed": seed, "alive": int((np.diff(parts.indptr) > 0).sum()), "labelled": len(labels),
            "reliable": int(reliable.sum()), "share": parts[:, labels.feature[reliable]].sum() / parts.sum(),
            "share_harder": parts[:, labels.feature[harder]].sum() / parts.sum(),
            "top": float(np.isin(parts.tocsr().argmax(axis=1), labels.feature[reliable]).mean())})
    return pd.DataFrame(lines)


def case_studies(run: Run, seed: int) -> pd.DataFrame:
    """The features that move rewards most: three with w > 0 that prefer chosen answers, three the reverse."""
    table = run.label_table(seed).sort_values("contribution_sd", ascending=False, kind="stable")
    table["side"] = (np.sign(table.w) + np.sign(table.preference_corr)).map({2: "positive", -2: "negative"})
    both = table.dropna(subset="side").groupby("side").head(3)
    both = both.sort_values("side", ascending=False, kind="stable", ignore_index=True)
    return both[["side", "feature", "w", "preference_corr", "contribution_sd", "rate", "label", "auroc",
                 "auroc_lo", "verdict"]]


def concept_table(run: Run, seed: int) -> pd.DataFrame:
    """Toy world: each planted concept against the best single feature, coordinate or label, held out."""
    contexts, judge = run.contexts(seed), KeywordJudge(run.explainer(seed).vocabulary)
    found: dict[str, Any] = {VARIANT_NAMES[variant]: run.scored(variant, seed).part("rm_bench")[1]
                             for variant in SAE_OF_VARIANT if variant in run.profile.variants}
    found["state coordinates"] = run.states("sarm", seed)
    labels = np.zeros(contexts.z.shape)
    for label in run.label_objects(seed):
        if label.weights:
            labels[:, label.feature] = judge.score(label, contexts.index)
    if labels.any():  # else every label abstained
        found["keyword labels"] = sparse.csr_array(labels)
    units = run.scored("sarm", seed).part("rm_bench")[0]
    parts = [match_concepts(z, _concepts(units), units.prompt_id, signed=name == "state coordinates")
             .assign(representation=name) for name, z in found.items()]
    return pd.concat(parts, ignore_index=True)


def concept_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per representation: concepts scored, those found with an AUROC of 0.9 or more, mean AUROC and F1."""
    table = table[table.reason == ""].assign(concepts=1, found=table.auroc >= 0.9)
    how = {"concepts": "sum", "found": "sum", "auroc": "mean", "f1": "mean"}
    return table.groupby("representation", sort=False, as_index=False).agg(how)


def concept_null(run: Run, seed: int) -> Interval:
    """Mean AUROC of :func:`concept_table` with concepts shuffled among prompts, and 95 % of 20 shuffles."""
    units, z = run.scored("sarm", seed).part("rm_bench")
    found = shuffled_concepts(z, _concepts(units), units.prompt_id, times=20, seed=seed)
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return Interval(float(found.mean()), low, high, 0.95, "quantiles over shuffles", len(found))


def _concepts(units: pd.DataFrame) -> pd.DataFrame:
    """Which planted concept is true of which response, [n, concepts]; none outside the toy world."""
    names = sorted({name for row in units.concepts for name in row})
    return pd.DataFrame({name: [name in row for row in units.concepts] for name in names})


@dataclasses.dataclass(frozen=True)
class Steering:
    """One seed's experiment: a feature chosen on RM-Bench's safety prompts and steered on RewardBench 2.

    scores: s of every feature; selection: z of the chosen and of the rejected responses it was chosen on;
    dropped: prompts left out of the choice because RewardBench 2 asks them too; target: True for T.
    """

    seed: int
    feature: int
    factor: float
    scores: pd.DataFrame
    selection: tuple[Any, Any]
    dropped: int
    units: pd.DataFrame
    rows: pd.DataFrame
    target: np.ndarray
    analysis: lab.SteeringAnalysis

    @property
    def active(self) -> np.ndarray:
        """Where the feature fires, of every response."""
        return self.analysis.activation(self.feature) != 0

    @property
    def table(self) -> pd.DataFrame:
        """Every response before and after: what Figure 3 draws."""
        safety = (self.units.domain == "Safety").to_numpy()
        category = np.select([self.target, safety], ["T", "safety, rejected"], "not safety")
        return self.analysis.table(self.feature, self.factor, self.target, category)

    def change(self, factor: float | None = None) -> np.ndarray:
        """Reward change of every response in standard deviations of all rewards before steering."""
        factor = self.factor if factor is None else factor
        return (factor - 1) * self.analysis.contribution(self.feature) / self.analysis.rewards.std()

    def shifts(self, factor: float | None = None) -> tuple[float, float]:
        """Mean change of T and of C."""
        change = self.change(factor)
        return float(change[self.target].mean()), float(change[~self.target].mean())

    def moved_elsewhere(self, every_weight: bool = False) -> float:
        """Mean absolute change of C, in the same unit; ``every_weight`` scales all head weights: the control."""
        change = self.change()
        if every_weight:
            change = (self.factor - 1) * (self.analysis.z @ self.analysis.w) / self.analysis.rewards.std()
        return float(np.abs(change[~self.target]).mean())

    def changed_choices(self, factor: float | None = None) -> np.ndarray:
        """1 for each safety prompt whose best answer becomes another one, else 0."""
        after = self.analysis.steered({self.feature: self.factor if factor is None else factor})
        rows = self.rows[self.rows.subset == "Safety"]
        return lab.best_of_n(self.analysis.rewards, after, rows.assign(subset=range(len(rows)))).changed.to_numpy(float)


def steering(run: Run, seed: int) -> Steering:
    """Choose the feature with the highest s on RM-Bench's safety prompts, and steer it on RewardBench 2."""
    scored = run.scored("sarm", seed)
    (asked, asked_z), (units, z) = scored.part("rm_bench"), scored.part("rewardbench2")
    if not len(asked) or not len(units):
        raise DataError("steering needs RM-Bench rows, to choose a feature, and RewardBench 2 rows, to steer")
    safety = asked.domain.str.startswith("safety").to_numpy()
    prompts = dict(zip(asked.prompt_id[safety], asked.prompt_text[safety], strict=True))
    pairs = [{"id": name, "prompt": [{"role": "user", "content": text}]} for name, text in prompts.items()]
    fresh = drop_contaminated(pairs, units.prompt_text[units.domain == "Safety"].unique())
    repeated = set(prompts) - {pair["id"] for pair in fresh}
    safety = safety & ~asked.prompt_id.isin(repeated).to_numpy()
    if not safety.any():
        raise DataError("RewardBench 2 asks every safety prompt of RM-Bench; no prompt is left to choose on")
    selection = tuple(asked_z[safety & (asked.label == side).to_numpy()] for side in ("chosen", "rejected"))
    scores = lab.feature_scores(*selection)
    return Steering(
        seed=seed, feature=int(scores.feature.iloc[0]), factor=run.profile.steering.factor, scores=scores,
        selection=selection, dropped=len(repeated), units=units, rows=lab.rows_from_index(units),
        target=((units.domain == "Safety") & (units.label == "chosen")).to_numpy(),
        analysis=lab.SteeringAnalysis(z, units.reward, run.head("sarm", seed), units.prompt_id))


def steering_table(run: Run) -> pd.DataFrame:
    """Per seed: the feature, where it is active, shifts in sd of rewards, and T - C at equal base reward."""
    lines = []
    for one in (steering(run, seed) for seed in run.profile.seeds):
        active, spread, (t, c) = one.active, one.analysis.rewards.std(), one.shifts()
        matched = lab.matched_difference(one.table, n_boot=run.profile.steering.bootstrap)
        lines.append({
            "seed": one.seed, "feature": one.feature, "s": one.scores.s[0], "w": one.analysis.w[one.feature],
            "active_T": active[one.target].mean(), "active_C": active[~one.target].mean(),
            "shift_T": t, "shift_C": c, "moved_C": one.moved_elsewhere(),
            "matched_T_minus_C": matched["difference"] / spread, "matched_lo": matched["lo"] / spread,
            "matched_hi": matched["hi"] / spread, "changed": one.changed_choices().mean(),
            "safety_rate": safety_rate(run, seed=one.seed, feature=one.feature)})
    return pd.DataFrame(lines)


def changed_interval(run: Run) -> Interval:
    """Share of safety prompts whose best answer changes under steering, over seeds and prompts."""
    values = np.array([steering(run, seed).changed_choices() for seed in run.profile.seeds])
    found = _interval(values, ["Safety"] * values.shape[1])
    return found._replace(low=max(found.low, 0), high=min(found.high, 1))


def safety_rate(run: Run, seed: int, feature: int | None = None) -> float:
    """How much more often a feature fires in RM-Bench's answers to safety prompts than in its other answers; None: the
    feature that fires least there, the control."""
    units, z = run.scored("sarm", seed).part("rm_bench")
    safety = units.domain.str.startswith("safety").to_numpy()
    if safety.all() or not safety.any():
        return float("nan")
    chosen = run.contexts(seed).features().query("kind == 'usual'").feature if feature is None else [feature]
    fires = z[:, chosen] != 0
    return float((fires[safety].mean(axis=0) - fires[~safety].mean(axis=0)).min())


def labels_elsewhere(run: Run, seed: int, others: bool = False) -> float:
    """Mean AUROC, on RewardBench 2's answers, of labels that were found on RM-Bench's, where 30 answers there have the
    feature and 30 have not.  ``others`` gives each feature the label of another one: the control."""
    units, z = run.scored("sarm", seed).part("rewardbench2")
    judge = KeywordJudge(run.explainer(seed).vocabulary)
    labels = [label for label in run.label_objects(seed) if label.weights]
    found = []
    for number, label in enumerate(labels):
        fires = z[:, [label.feature]].toarray()[:, 0] != 0
        if min(fires.sum(), (~fires).sum()) >= MIN_POSITIVES:
            value = judge.score(labels[number - 1] if others else label, units)
            found.append(auroc(value[fires], value[~fires]))
    return float(np.mean(found)) if found else float("nan")


def feature_meaning(one: Steering) -> pd.DataFrame:
    """Planted concepts (toy world only) by how much more often the chosen feature fires in them."""
    lines = [(name, true.sum(), one.active[true].mean() - one.active[~true].mean())
             for name, true in _concepts(one.units).items() if not true.all()]
    table = pd.DataFrame(lines, columns=["concept", "n", "difference"])
    return table.sort_values("difference", ascending=False, ignore_index=True)


def steering_title(run: Run, one: Steering) -> str:
    """What was steered, in words: the feature with its label, if the run has labels and it has one, else (toy
    world) the concept it fires in most, and the factor."""
    made = ("labels", one.seed) in run.stored("labels")
    labels = run.label_objects(one.seed) if made else []
    said = {label.feature: label.text for label in labels if not label.abstained}
    meaning = feature_meaning(one)
    if one.feature in said:
        terms = said[one.feature].removeprefix("more often: ").split("; less often: ")[0].split(", ")
        words = f" ({', '.join(terms[:3])})"
    else:
        words = f" (fires most in {meaning.concept[0].replace(':', ': ')})" if len(meaning) else ""
    return f"Steering feature {one.feature}{words} by a factor of {one.factor:g}"


def steered_forward(run: Run, one: Steering, encoder: bool = False) -> dict[str, float]:
    """400 responses scored with and without the edit: largest change of inactive ones, of any activation (relative to
    the largest one), and distance from the closed form.  ``encoder`` scales the encoder's row instead: the control."""
    model, factors = run.load_reward("sarm", one.seed), {one.feature: one.factor}
    rows = np.random.default_rng(one.seed).permutation(len(one.units))[:400]
    talks, length = conversations(one.units.iloc[rows]), run.profile.benchmarks.max_length
    edited = lab.steer(model, {} if encoder else factors)
    if encoder:
        edited.sae.W_enc.data[one.feature] *= one.factor
    before, after = (score(each, run.tokenizer, talks, max_length=length, features=True) for each in (model, edited))
    change = np.abs(after.rewards - before.rewards)
    inactive = before.features[:, [one.feature]].toarray()[:, 0] == 0  # in this pass: another one rounds differently
    return {"inactive_change": float(change[inactive].max(initial=0.0)),
            "activation_change": float(abs(after.features - before.features).max() / before.features.max()),
            "closed_form_error": float(np.abs(after.rewards - one.analysis.steered(factors)[rows]).max())}


def official_scores(target_file: str | Path, complement_file: str | Path) -> pd.DataFrame:
    """The authors' released scores of T and C, as :func:`table_from_scores` makes them.

    T holds the accepted answer of every safety prompt; a row of C whose id T has too is a rejected answer."""
    rows: list[dict] = []
    for path, target in ((target_file, True), (complement_file, False)):
        try:
            rows += [{"reward": row["reward"], "reward_steered": row["reward_steered"], "group": key,
                      "active": bool(row["activated_latents"]), "is_target": target}
                     for key, row in json.loads(Path(path).read_text(encoding="utf-8")).items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not in the authors' format (reward, reward_steered and "
                            f"activated_latents by id): {error!r}") from None
    frame = pd.DataFrame(rows)
    safety = frame.group.isin(frame.group[frame.is_target])
    category = np.select([frame.is_target, safety], ["T", "safety, rejected"], "not safety")
    return lab.table_from_scores(**frame, category=category)


def shuffled_official(table: pd.DataFrame, min_reward: float) -> float:
    """The matched difference of :func:`official_scores` when T is drawn at random: the control."""
    drawn = np.random.default_rng(0).permutation(table.is_target)
    return lab.matched_difference(table.assign(is_target=drawn), min_reward)["difference"]


def missing_parts(run: Run) -> dict[str, list[str]]:
    """Subsets and domains without rows: no overall score of the real benchmark exists then."""
    rows = run.benchmark_rows()
    found = {row["subset"] for row in rows["rewardbench2"]}
    found |= {row["domain"].split("-")[0] for row in rows["rm_bench"]}
    return {"rewardbench2": [name for name in rewardbench2.SUBSETS if name not in found],
            "rm_bench": [name for name in rm_bench.DOMAINS if name not in found]}


def score_table(run: Run) -> pd.DataFrame:
    """Scores in [0, 1] per variant, seed, benchmark and part; ``overall`` is over the parts present."""
    lines = [(variant, seed, name, part, value) for variant in _models(run)
             for seed in (run.profile.seeds if variant in run.profile.variants else [run.profile.seed])
             for name in _present(run)
             for part, value in _parts(name, getattr(run.scored(variant, seed), name)).items()]
    return pd.DataFrame(lines, columns=["variant", "seed", "benchmark", "part", "value"])


def _models(run: Run) -> list[str]:
    """The variants, and below them the decoder without a preference pair: what any of them has to beat."""
    return [*run.profile.variants, *NO_PAIRS]


def _present(run: Run) -> list[str]:
    return [name for name, rows in run.benchmark_rows().items() if rows]


def _parts(benchmark: str, rows: list[dict]) -> dict[str, float]:
    if benchmark == "rewardbench2":
        result = rewardbench2.score(rows)
        return {**result["subsets"], "overall": result["mean_of_present_subsets"]}
    levels = pd.DataFrame(rm_bench.score_present(rows)["per_domain"])  # difficulty x domain
    return {**levels.mean(), "overall": levels.mean().mean(), **levels.mean(axis=1)}


def part_table(run: Run, benchmark: str) -> pd.DataFrame:
    """Mean over seeds (percent) per variant and subset or domain, in the benchmark's order."""
    scores = score_table(run).query("benchmark == @benchmark")
    wide = scores.pivot_table(index="variant", columns="part", values="value", sort=False) * 100
    order = ["overall", *[part for part in scores.part.unique() if part != "overall"]]
    return wide.loc[_models(run), order].rename(index=VARIANT_NAMES)


def variant_table(run: Run) -> pd.DataFrame:
    """Held-out pair accuracy and overall scores of every variant, each mean and standard error over seeds."""
    scores, lines = score_table(run).query("part == 'overall'"), []
    for variant in _models(run):
        own, row = scores[scores.variant == variant], {"variant": VARIANT_NAMES[variant]}
        values = {name: own.value[own.benchmark == name] for name in _present(run)}
        accuracy = [run.reward(variant, seed).meta["eval_accuracy"] for seed in run.profile.seeds
                    if variant in run.profile.variants]
        for name, value in {"pairs": pd.Series(accuracy, dtype=float), **values}.items():
            row |= {name: value.mean(), f"{name}_se": value.sem()}
        lines.append(row)
    return pd.DataFrame(lines)


def units(run: Run, variant: str, benchmark: str, blind: bool = False) -> tuple[np.ndarray, list[str]]:
    """Value of every prompt per seed, [seeds, units], and the stratum (subset or domain) of each unit;
    ``blind`` gives every response the same reward."""
    values, scorer = [], rm_bench if benchmark == "rm_bench" else rewardbench2
    for seed in run.profile.seeds:
        rows = getattr(run.scored(variant, seed), benchmark)
        if blind:
            rows = [row | {name: [0.0] * len(row[name]) for name in row if name.startswith("score")} for row in rows]
        found = scorer.units(rows)
        values.append([value for *_, value in found])
    return np.array(values), [stratum for stratum, *_ in found]


def _interval(values: np.ndarray, strata: list[str], shares: bool = True) -> Interval:
    """Over seeds and prompts; over prompts alone with a single seed."""
    if len(values) > 1:
        return seeds_and_prompts_ci(values, strata=strata, shares=shares)
    return bootstrap_ci(values[0], strata=strata, shares=shares)


def overall(run: Run, variant: str, benchmark: str = "rewardbench2", blind: bool = False) -> Interval:
    """Mean over subsets, in percent, with its 95 % interval."""
    values, strata = units(run, variant, benchmark, blind)
    found = _interval(values, strata)
    return found._replace(estimate=100 * found.estimate, low=100 * max(found.low, 0), high=100 * min(found.high, 1))


def difference(run: Run, a: str, b: str, benchmark: str = "rewardbench2", blind: bool = False) -> Interval:
    """Score of variant ``a`` minus that of ``b``, in [-1, 1], paired over prompts and seeds; ``blind`` gives
    every response of ``a`` the same reward: the control."""
    (x, strata), (y, _) = units(run, a, benchmark, blind), units(run, b, benchmark)
    return _interval(x - y, strata, shares=False)


def null_difference(run: Run, benchmark: str = "rewardbench2") -> Interval:
    """The same between models of one kind and those of the next seed, where there is nothing to find: the control.  The
    last is not set against the first (the mean would be zero by construction); a single one is set against itself."""
    kind = "random_encoder" if "random_encoder" in run.profile.variants else "sarm"
    values, strata = units(run, kind, benchmark)
    return _interval(values[:-1] - values[1:] if len(values) > 1 else values - values, strata, shares=False)


def differences(run: Run) -> pd.DataFrame:
    """SARM minus every other variant on RewardBench 2, in percentage points."""
    gaps = [(VARIANT_NAMES[name], *(100 * np.array(difference(run, "sarm", name)[:3])))
            for name in _models(run) if name != "sarm"]
    return pd.DataFrame(gaps, columns=["variant", "value", "lo", "hi"])


def against_chance(run: Run) -> pd.DataFrame:
    """Is a variant told from guessing, which gets 1/n in best of n, 0 in Ties and a half in RM-Bench?"""
    lines = []
    for benchmark in _present(run):
        blind = overall(run, run.profile.variants[0], benchmark, blind=True).estimate
        chance = 50.0 if benchmark == "rm_bench" else blind
        for variant in _models(run):
            found = overall(run, variant, benchmark)
            side = np.select([found.low > chance, found.high < chance], ["above", "below"], "not told from")
            lines.append((benchmark, VARIANT_NAMES[variant], *found[:3], chance, f"{side} chance"))
    return pd.DataFrame(lines, columns=["benchmark", "variant", "score", "low", "high", "chance", "verdict"])


def size_ratio(run: Run, layer: int | None = None) -> float:
    """Parameters of SARM, as Table 1 counts them, over those of a reward model of full depth; ``layer`` keeps so many
    layers instead of l: the control."""
    sarm, whole = (sizes(run.profile.model_copy(update={"backbone": run.profile.backbone.model_copy(
        update={"layer": number})})) for number in (layer or run.shape["layer"], run.shape["n_layers"]))
    return sarm.total / (whole.embeddings + whole.layers)


def column_overlap(run: Run, seed: int, common: float = 0.0) -> float:
    """Mean |cosine| between the decoder columns of the features that fire on RM-Bench; ``common`` adds a direction that
    all share: the control."""
    alive = np.flatnonzero(np.diff(run.scored("sarm", seed).part("rm_bench")[1].tocsc().indptr))
    W = run.load_sae("sentence_end", seed).W_dec.detach()[alive]
    W = torch.nn.functional.normalize(W + common * W[:1], dim=1)
    return float((W @ W.T).abs().fill_diagonal_(0).sum() / (len(W) * (len(W) - 1)))


def table1(run: Run) -> pd.DataFrame:
    """The paper's Table 1: SARM and the full scalar model by subset (percent; no interval where all seeds agree), and
    SARM-4B's value there."""
    scores = score_table(run).query("benchmark == 'rewardbench2' and variant in ['sarm', 'scalar_full']")
    printed, lines = published.table_1().set_index("model").loc["SARM-4B"].rename({"Overall": "overall"}), []
    for (variant, part), group in scores.groupby(["variant", "part"], sort=False):
        _, low, high, *_ = (group.value.nunique() > 1 and seed_interval(100 * group.value, 0, 100)) or [np.nan] * 6
        lines.append((VARIANT_NAMES[variant], part, 100 * group.value.mean(), low, high, printed.get(part)))
    return pd.DataFrame(lines, columns=["model", "subset", "value", "lo", "hi", "paper"])


def table2(run: Run) -> pd.DataFrame:
    """The paper's Table 2: value and interval (percent), one point per seed, and the paper's value."""
    scores = score_table(run).query("benchmark == 'rewardbench2' and part == 'overall'")
    paper, lines = published.table_2().set_index("variant").Overall, []
    for variant in _models(run):
        points = (100 * scores.value[scores.variant == variant]).tolist()
        lines.append((VARIANT_NAMES[variant], *overall(run, variant)[:3], points, paper.get(variant, np.nan)))
    return pd.DataFrame(lines, columns=["variant", "value", "lo", "hi", "points", "paper"])


def released_checkpoint(run: Run) -> tuple[Path, str]:
    """A checkpoint in the authors' layout, and a sentence that says which: profile ``released`` has theirs,
    any other writes the run's SARM as they write theirs, so that the same cells run without a network."""
    if run.profile.name == "released":
        from huggingface_hub import snapshot_download
        folder, revision = Path(hub_folder(run.backbone_path)), run.profile.backbone.revision
        if not folder.is_dir():
            check_access(run.backbone_path, revision)
            wanted = ["*.json", "*.safetensors", "*.jinja"]
            folder = Path(snapshot_download(run.backbone_path, revision=revision, allow_patterns=wanted))
        return folder, "the authors' released SARM-4B"
    folder = run.store.root / "released"
    save_official(run.load_reward("sarm", run.profile.seed), folder)
    run.tokenizer.save_pretrained(folder)
    return folder, f"the SARM of profile {run.profile.name} in the authors' layout, not the authors' weights"
