"""The figures of the notebooks by name: a run in, a figure out, with its numbers and caption saved beside it.

``show`` is what a notebook calls; ``draw_all`` redraws every figure from stored artifacts, without training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import analysis, figures, figures_rq3
from .analysis import VARIANT_NAMES
from .errors import SarmlibError
from .evaluation import published
from .stages import Run

Drawn = tuple[Figure, pd.DataFrame, str]
_FIGURES: dict[str, Callable[[Run], Drawn]] = {}


class NotForThisRun(SarmlibError):
    """A figure or table needs something this run's data do not have."""


def _add(function: Callable[[Run], Drawn]):
    _FIGURES[function.__name__] = function
    return function


def show(run: Run, name: str) -> Figure | None:
    """Draw a figure, save it under the run's ``figures`` folder, return it; says why when the run cannot have it."""
    try:
        fig, data, caption = _FIGURES[name](run)
    except NotForThisRun as reason:
        print(f"{name}: {reason}")
        return None
    return _shown(run, fig, name, data, f"{caption} {_setting(run)}")


def waterfall(run: Run, explanation, name: str = "waterfall") -> Figure:
    """`figures_pairs.waterfall` of one explanation, saved and shown like every other figure."""
    from .figures_pairs import waterfall as draw
    what = "the margin of a pair" if "z_chosen" in explanation.table else "one reward"
    caption = (f"How {what} adds up over features: {explanation.n_active} active ones, {explanation.reward:+.3f} "
               f"together. Profile {run.profile.name}.")
    return _shown(run, draw(explanation), name, explanation.table, caption)


def browser_of(run: Run, seed: int, **settings):
    """(the `Browser` of a run's features and labels, where its numbers come from)."""
    from . import __version__
    from .browser import Browser
    from .interpretation.judges import KeywordJudge
    judge: KeywordJudge | None = KeywordJudge(run.vocabulary(seed))
    labels, table = run.label_objects(seed), run.label_table(seed)
    decoder = run.load_sae("sentence_end", seed).W_dec.detach().numpy()
    if any(label.kind != "keyword" for label in labels):
        judge = None  # a chat model would have to be asked again
    provenance = {"profile": run.profile.name, "seed": str(seed), "backbone": run.backbone_key,
                  "reward model": run.reward("sarm", seed).key, "responses": run.benchmarks().key,
                  "scores": run.scores("sarm", seed).key, "labels": run.labels(seed).key, "sarmlib": __version__,
                  "interpretation seed": str(run.profile.seed)}
    return Browser(run.contexts(seed), labels, table, judge, decoder=decoder, seed=run.profile.seed,
                   **settings), provenance


def _shown(run: Run, fig: Figure, name: str, data, caption: str) -> Figure:
    figures.save_figure(fig, name, folder(run), data, caption, run.profile.name)
    picture = figures.png(fig)
    # What a notebook shows of a figure: the picture with its caption as alternative text.
    bundle = {"image/png": picture}, {"image/png": {"alt": caption}}
    setattr(fig, "_repr_mimebundle_", lambda include=None, exclude=None: bundle)  # noqa: B010
    return fig


def folder(run: Run) -> Path:
    """Where a run's figures go."""
    return run.store.root / "figures"


def draw_all(run: Run) -> list[str]:
    """Draw every figure that the run can have; returns their names."""
    return [name for name in _FIGURES if show(run, name) is not None]


def _setting(run: Run) -> str:
    seeds = ", ".join(map(str, run.profile.seeds))
    return f"Profile {run.profile.name}; seeds {seeds}; intervals are 95 %."


@_add
def sae_training(run: Run) -> Drawn:
    log = analysis.sae_logs(run, run.profile.seed).drop(columns="seconds")  # not the same on every run
    return figures.sae_training(log, "SAE pretraining"), log, (
        "SAE pretraining: normalised error, variance unexplained and dead features over steps, "
        f"seed {run.profile.seed}, for the SAE on sentence ends and the token-level SAE.")


@_add
def feature_density(run: Run) -> Drawn:
    from .sae.training import feature_density as density
    rates = {rule: density(run.load_sae(rule, run.profile.seed), analysis.held_out_states(run, rule)).numpy()
             for rule in ("sentence_end", "every")}
    data = pd.DataFrame(rates)
    return figures.feature_density(rates, "How often features fire"), data, (
        "Share of held-out states in which each feature fires; dead features are a bar of their own.")


@_add
def decoder_cosine(run: Run) -> Drawn:
    from .sae.downstream import decoder_cosines
    nearest = {rule: decoder_cosines(run.load_sae(rule, run.profile.seed)).numpy()
               for rule in ("sentence_end", "every")}
    return figures.decoder_cosine(nearest, "Are features copies of one another?"), pd.DataFrame(nearest), (
        f"Largest cosine of each decoder column with another column, seed {run.profile.seed}.")


@_add
def probe_report(run: Run) -> Drawn:
    if run.profile.backbone.source != "toy":
        raise NotForThisRun("only the toy world knows what is true of a text")
    from .data.toyworld.pretrain import BACKBONE_DIR
    data = pd.read_csv(BACKBONE_DIR / "probe_report.csv")
    data = data[data.layer == run.shape["layer"]]
    return figures.probe_report(data, "Read by a linear probe at layer l"), data, (
        "Held-out AUROC of linear probes on the state of the last token after layer l: the shipped backbone against "
        "the same architecture with random weights.")


@_add
def reward_training(run: Run) -> Drawn:
    data = analysis.training_curves(run)
    return figures.reward_training(data, "Held-out pair accuracy during reward training"), data, (
        "Accuracy on held-out pairs after each epoch, mean over seeds.")


@_add
def feature_weights(run: Run) -> Drawn:
    data = run.contexts(run.profile.seed).features()
    data = data[data.kind == "usual"]
    labels = {}
    table = run.label_table(run.profile.seed)
    for row in table[table.reliable.astype(bool)].itertuples():
        labels[row.feature] = row.label.split(";")[0].removeprefix("more often: ")[:28]
    return figures.feature_weights_vs_preference(data, "Head weight against preference", labels), data, (
        "Head weight of each live feature against its correlation with preference on RM-Bench, "
        f"seed {run.profile.seed}.")


@_add
def label_auroc(run: Run) -> Drawn:
    data = run.label_table(run.profile.seed)
    if not data.auroc.notna().any():
        raise NotForThisRun("no feature has a label with enough held-out responses to be scored")
    return figures.label_auroc(data, "Labels on prompts the explainer has not seen"), data, (
        f"Held-out AUROC of feature labels, seed {run.profile.seed}; null: shuffled activity; trivial judges know "
        "only length, domain or reward.")


@_add
def concepts(run: Run) -> Drawn:
    if run.profile.benchmarks.rm_bench != "toy":
        raise NotForThisRun("only the toy world has planted concepts")
    long, _ = analysis.concept_table(run, run.profile.seed)
    long = long[long.reason == ""].rename(columns={"concept": "attribute", "representation": "model",
                                                   "auroc_lo": "lo", "auroc_hi": "hi"})
    long = long[~long.attribute.str.startswith("topic")]
    return figures.probe_report(long, "The best single feature for each planted concept",
                                xlabel="held-out AUROC of one feature"), long, (
        "Best feature per planted concept, chosen on half of the prompts and scored on the other half.")


def _steering(run: Run) -> analysis.Steering:
    if len(analysis.present(run)) < 2:
        raise NotForThisRun("steering needs RM-Bench rows, to choose the feature, and RewardBench 2 rows, to steer")
    return analysis.steering(run, run.profile.seed)


@_add
def figure3(run: Run) -> Drawn:
    one = _steering(run)
    title = f"Feature {one.feature}, head weight times {one.factor:g}"
    return figures.figure3(one.table, title), one.table, (
        f"Figure 3 of the paper on this run: rewards before and after multiplying the head weight of the safety "
        f"feature by {one.factor:g}, seed {run.profile.seed}; T: chosen responses to safety prompts, C: the rest.")


@_add
def shift_by_set(run: Run) -> Drawn:
    from .sarm.steering import summarise_shift
    one = _steering(run)
    data = summarise_shift(one.table, n_boot=run.profile.steering.bootstrap)
    return figures.shift_by_set(data, "Who moves?"), data, (
        f"Mean shift and activity of the steered feature in T, safety-rejected and other responses, seed {one.seed}.")


@_add
def doses(run: Run) -> Drawn:
    one = _steering(run)
    tables = {f: one.analysis.table(one.feature, f, one.target) for f in (-8, 0, 1, 2, 8, 40)}
    data = pd.concat([t[["reward_steered", "is_target"]].assign(factor=f) for f, t in tables.items()])
    data = data.groupby(["factor", "is_target"]).reward_steered.describe().round(6).reset_index()
    return figures.doses(tables, "The slider, standing still"), data, (
        f"Rewards of T and C before and after, at six factors, seed {one.seed}.")


@_add
def pareto(run: Run) -> Drawn:
    from .sarm.controls import pareto as front
    one = _steering(run)
    size = ((one.factor - 1) ** 2 * (one.analysis.contribution(one.feature) ** 2).mean()) ** 0.5
    data = front(one.analysis, one.scores[one.scores.eligible].feature.to_numpy(), size, one.rows, ("Safety",))
    return figures.pareto(data, "More features at once"), data, (
        "Margin gained on Safety against the worst accuracy change on another subset, when the 1 to 32 features with "
        f"the highest s are steered together, at 1/4 to 4 times the size of the single edit, seed {one.seed}.")


@_add
def dose_response(run: Run) -> Drawn:
    one = _steering(run)
    data = one.analysis.dose_response(one.feature, run.profile.steering.doses, one.target, one.rows,
                                      n_boot=run.profile.steering.bootstrap)
    return figures.dose_response(data, "Dose and response", used=one.factor), data, (
        f"Mean shift of T and C and within-prompt accuracy per subset over the factor, seed {run.profile.seed}.")


@_add
def selectivity(run: Run) -> Drawn:
    one = _steering(run)
    data, _ = one.analysis.controls(one.feature, one.factor, one.target)
    return figures.selectivity(data, "The chosen feature among all live features at equal edit size"), data, (
        f"Effect on T against C of every live feature and of random directions, seed {run.profile.seed}.")


@_add
def confound(run: Run) -> Drawn:
    one = _steering(run)
    return figures.confound(one.table, "Does the feature mean safety or high reward?"), one.table, (
        f"Activation rate of the steered feature against the base reward, seed {run.profile.seed}.")


@_add
def table1(run: Run) -> Drawn:
    data = analysis.table_1_rows(run)
    if not len(data):
        raise NotForThisRun("there are no RewardBench 2 rows")
    paper = published.table_1().set_index("model").loc["SARM-4B"]
    names = [name for name in data.subset.unique() if name in paper.index]
    diamonds = pd.DataFrame({"subset": names, "value": [float(paper[name]) for name in names]})
    where = "the toy world" if run.profile.benchmarks.rewardbench2 == "toy" else "this run's rows"
    return figures.table1(data, diamonds, f"RewardBench 2 subsets on {where}"), data, (
        "Bars: this run, t intervals over seeds. Diamonds: SARM-4B as printed in the paper's Table 1, another model "
        "on other data, for orientation only.")


@_add
def subset_heat_map(run: Run) -> Drawn:
    if "rewardbench2" not in analysis.present(run):
        raise NotForThisRun("there are no RewardBench 2 rows")
    data = analysis.part_table(run, "rewardbench2")
    return figures_rq3.part_heat_map(data, "RewardBench 2 by subset"), data.reset_index(), (
        "Score of every reward model on every subset in percent, mean over seeds.")


@_add
def table1_dots(run: Run) -> Drawn:
    if "rewardbench2" not in analysis.present(run):
        raise NotForThisRun("there are no RewardBench 2 rows")
    data = analysis.table_2_rows(run).rename(columns={"variant": "model"})[["model", "value", "lo", "hi"]]
    paper = published.table_1().rename(columns={"Overall": "value"})
    return figures_rq3.table1_dots(data, paper, "Table 1, and ours apart"), data, (
        "This run with intervals; apart from it the rows of the paper's Table 1 as printed, other models and data.")


@_add
def differences(run: Run) -> Drawn:
    if "rewardbench2" not in analysis.present(run):
        raise NotForThisRun("there are no RewardBench 2 rows")
    found = {name: analysis.difference(run, "sarm", name) for name in run.profile.variants if name != "sarm"}
    data = pd.DataFrame([(VARIANT_NAMES[name], 100 * d.estimate, 100 * d.low, 100 * d.high)
                         for name, d in found.items()], columns=["variant", "value", "lo", "hi"])
    return figures_rq3.paired_differences(data, "SARM against each of the others"), data, (
        "Differences of RewardBench 2 scores, paired over prompts and seeds.")


@_add
def calibration(run: Run) -> Drawn:
    if "rewardbench2" not in analysis.present(run):
        raise NotForThisRun("there are no RewardBench 2 rows")
    margins = {VARIANT_NAMES[v]: np.concatenate([figures_rq3.reward_margins(run.scored(v, s).rewardbench2)
                                                 for s in run.profile.seeds])
               for v in ("sarm", "scalar_full") if v in run.profile.variants}
    data = pd.concat([pd.DataFrame({"variant": name, "margin": m}) for name, m in margins.items()], ignore_index=True)
    data = data.groupby("variant").margin.describe().reset_index()
    return figures_rq3.calibration_and_margins(margins, "Margins, and what they promise"), data, (
        "Reward margin between the chosen answer and each rejected one, and how often the sign is right against the "
        "probability that Bradley-Terry gives it.")


@_add
def table2(run: Run) -> Drawn:
    benchmark = "rewardbench2" if "rewardbench2" in analysis.present(run) else "rm_bench"
    data = analysis.table_2_rows(run, benchmark)
    paper = published.table_2()
    paper = pd.DataFrame({"variant": [VARIANT_NAMES[v] for v in paper.variant], "value": paper.Overall})
    return figures.table2(data, paper, "Components ablation"), data, (
        "Left: this run, intervals over seeds and prompts, one dot per seed. Right: the paper's Table 2, single runs.")


@_add
def claims(run: Run) -> Drawn:
    from .claims import verdicts
    data = verdicts(run.store.root / "results")
    data = data[data.value.notna()].rename(columns={"title": "text", "low": "lo", "high": "hi"})
    if not len(data):
        raise NotForThisRun("no claim has been checked yet")
    bands = claim_bands(run.profile.name)
    data = data.assign(band_lo=[bands[i][0] for i in data.id], band_hi=[bands[i][1] for i in data.id])
    return figures.claims_forest(data, "Every claim, measured"), data, (
        "Value and interval of every claim with the band of earlier runs.")


def claim_bands(profile: str) -> dict[str, tuple[float, float]]:
    """Claim id -> (lo, hi) of a profile's band; infinite where there is none."""
    from .claims import load_claims
    found = {id: claim.band.get(profile) for id, claim in load_claims().items()}
    return {id: (band.lo, band.hi) if band else (float("-inf"), float("inf")) for id, band in found.items()}
