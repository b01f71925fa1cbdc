import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sarmlib.errors import ConfigError, DataError
from sarmlib.evaluation.statistics import auroc
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import KeywordExplainer, Label
from sarmlib.interpretation.human import HumanJudge, write_sheet
from sarmlib.interpretation.judges import (
    KeywordJudge,
    TfidfJudge,
    auroc_bootstrap,
    average_precision,
    balanced_accuracy,
    correlation,
    held_out_auroc,
    held_out_sample,
    judge_labels,
    trivial_scores,
)
from tests.planted import APPLE, GOOD, LONG, SORRY, planted_world


@pytest.fixture(scope="module")
def world():
    z, index, w, _ = planted_world()
    contexts = Contexts(z, index, w)
    explainer = KeywordExplainer(contexts)
    return contexts, explainer, KeywordJudge(explainer.vocabulary)


@pytest.fixture(scope="module")
def judged(world):
    contexts, explainer, judge = world
    return judge_labels(contexts, explainer.explain_all(range(12)), judge, n_boot=500).set_index("feature")


def test_the_planted_keyword_is_reliable_on_unseen_prompts(judged):
    row = judged.loc[APPLE]
    assert row["auroc"] > 0.95 and row["reliable"] and row["verdict"] == "reliable"
    assert row["auroc_lo"] <= row["auroc"] <= row["auroc_hi"] and row["balanced_accuracy"] > 0.9
    assert row["lift"] > 0.2 and row["q_value"] >= row["p_value"]


def test_a_label_no_better_than_length_is_not_reliable(judged):
    row = judged.loc[LONG]
    assert row["auroc"] > 0.9 and not row["reliable"] and row["verdict"] == "not reliable: no better than length"


def test_a_label_no_better_than_the_reward_is_not_reliable(world):
    contexts, _, judge = world

    class Oracle:  # knows quality only as well as the reward does
        def score(self, label, units):
            return units["reward"].to_numpy()

    row = judge_labels(contexts, [Label(GOOD, "high quality", {"x": 1.0})], Oracle(), n_boot=300).iloc[0]
    assert row["auroc"] > 0.8 and row["best_trivial"] == "reward" and not row["reliable"]


def test_too_few_positives_get_no_score(judged):
    row = judged.loc[SORRY]
    assert row["n_pos"] < 30 and np.isnan(row["auroc"]) and "positives held out" in row["verdict"]


def test_abstentions_stay_in_the_table(judged):
    silent = judged[judged["verdict"].str.startswith("abstained")]
    assert len(judged) == 12 and len(silent) >= 5 and silent["auroc"].isna().all() and not silent["reliable"].any()


def test_a_wrong_label_scores_a_half_and_is_not_reliable(world):
    contexts, explainer, judge = world
    swapped = Label(APPLE, "wrong", {"w3": 2.0, "w40": 1.0, "w51": 1.0})
    row = judge_labels(contexts, [swapped], judge, n_boot=300).iloc[0]
    assert abs(row["auroc"] - 0.5) < 0.12 and not row["reliable"] and "shuffled" in row["verdict"]


def test_extra_and_missing_terms_cost_auroc(world):
    contexts, explainer, judge = world
    exact, extra, missing = (Label(APPLE, "", weights) for weights in (
        {"apple": 5.0}, {"apple": 5.0, "w3": 5.0, "w7": 5.0, "w9": 5.0}, {"pear": 5.0}))
    scores = judge_labels(contexts, [exact, extra, missing], judge, n_boot=100)["auroc"]
    assert scores[0] > scores[1] + 0.02 > scores[2] and scores[2] == pytest.approx(0.5)


def test_shuffled_activity_gives_a_half():
    z, index, _, _ = planted_world()
    rng = np.random.default_rng(0)
    shuffled = sparse.csr_array(np.column_stack([rng.permutation(z[:, [APPLE]].toarray().ravel()) for _ in range(15)]))
    contexts = Contexts(shuffled, index)
    explainer = KeywordExplainer(contexts)
    labels = [Label(i, "apple", {"apple": 1.0}) for i in range(15)]
    table = judge_labels(contexts, labels, KeywordJudge(explainer.vocabulary), n_boot=300)
    assert abs(table["auroc"].mean() - 0.5) < 0.03 and table["reliable"].sum() == 0
    assert (table["auroc_lo"] < 0.5).mean() > 0.8


def test_scores_come_from_the_test_split_alone(world):
    contexts, _, judge = world
    rows, positive = held_out_sample(contexts, APPLE)
    assert set(contexts.split[rows]) == {"test"}
    explained = set(contexts.index["prompt_id"][contexts.rows("explain")])
    assert not explained & set(contexts.index["prompt_id"][rows])
    assert ((contexts.activation(APPLE)[rows] != 0) == positive).all() and positive.sum() <= 100

    class Spy:
        seen = set()

        def score(self, label, units):
            self.seen |= set(units["prompt_id"])
            return judge.score(label, units)

    judge_labels(contexts, [Label(APPLE, "", {"apple": 1.0})], Spy(), n_boot=50)
    assert Spy.seen and not Spy.seen & explained


def test_a_leaking_split_is_refused(world):
    contexts, explainer, judge = world
    leaky = Contexts(contexts.z, contexts.index)
    leaky.split = np.where(np.arange(len(leaky.split)) % 2, "explain", "test")
    with pytest.raises(DataError, match="split by prompt"):
        judge_labels(leaky, [explainer.explain(APPLE)], judge)


def test_matched_negatives_answer_the_same_prompts(world):
    contexts, _, _ = world
    rows, positive = held_out_sample(contexts, SORRY, negatives="matched")
    prompt = contexts.prompt[rows]
    assert set(prompt[~positive]) <= set(prompt[positive])
    rows, positive = held_out_sample(contexts, SORRY, negatives="random")
    assert not set(contexts.prompt[rows][~positive]) <= set(contexts.prompt[rows][positive])
    with pytest.raises(ConfigError, match="negatives"):
        held_out_sample(contexts, SORRY, negatives="hard")


def test_a_judge_that_fails_is_not_scored_as_zero(world):
    contexts, _, _ = world

    class Broken:
        def score(self, label, units):
            return np.where(np.arange(len(units)) % 2, np.nan, 1.0)

    row = judge_labels(contexts, [Label(APPLE, "", {"a": 1.0})], Broken(), n_boot=50).iloc[0]
    assert "the judge failed on" in row["verdict"] and np.isnan(row["auroc"])


def test_cluster_bootstrap_against_plain_resampling():
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(40), 4)
    positive = rng.random(160) < 0.4
    score = np.round(positive + rng.normal(size=160) + np.repeat(rng.normal(size=40), 4), 1)  # with ties
    fast = auroc_bootstrap(score, positive, prompt, 2000, np.random.default_rng(1))
    plain, draw = [], np.random.default_rng(2)
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(prompt == p) for p in draw.integers(40, size=40)])
        plain.append(auroc(score[rows][positive[rows]], score[rows][~positive[rows]]))
    assert fast.mean() == pytest.approx(np.mean(plain), abs=0.01)
    assert fast.std() == pytest.approx(np.std(plain), rel=0.15)
    one_each = auroc_bootstrap(score, positive, np.zeros(160), 3, np.random.default_rng(0))  # one cluster: the sample
    assert one_each == pytest.approx(auroc(score[positive], score[~positive]))


def test_trivial_judges_learn_their_direction_on_the_explain_split():
    train = pd.DataFrame({"length": [1.0, 2, 3, 4], "reward": [4.0, 3, 2, 1], "domain": ["a", "a", "b", "b"]})
    active = np.array([False, False, True, True])
    scores = trivial_scores(train, active, pd.DataFrame({"length": [5.0, 6], "reward": [1.0, 2], "domain": ["b", "z"]}))
    assert scores["length"].tolist() == [5, 6] and scores["reward"].tolist() == [-1, -2]
    assert scores["domain"].tolist() == [1.0, 0.5]  # an unknown domain gets the overall share


def test_balanced_accuracy_uses_the_threshold_of_the_tune_sample():
    y = np.array([False, False, True, True])
    assert balanced_accuracy(np.array([0, 1, 2, 3.0]), y, np.array([0, 5, 1.9, 5]), y) == pytest.approx(0.5)
    assert np.isnan(balanced_accuracy(np.zeros(2), np.zeros(2, bool), np.zeros(2), np.array([True, False])))


def test_no_labels_is_an_error(world):
    with pytest.raises(DataError, match="no labels"):
        judge_labels(world[0], [], world[2])


def test_average_precision_by_hand():
    score, positive = np.array([3.0, 2, 2, 1]), np.array([True, True, False, False])
    # cut at 3: R=1/2, P=1; cut at 2: R=1, fall-out 1/2, so P = .5/(.5+.25); at prevalence one half
    assert average_precision(score, positive, 0.5) == pytest.approx(0.5 * 1 + 0.5 * (0.5 / 0.75))
    assert average_precision(np.zeros(4), positive, 0.2) == pytest.approx(0.2)  # knows nothing: the prevalence
    assert average_precision(score, positive, 0.01) < average_precision(score, positive, 0.5)


def test_precision_and_correlation_are_those_of_the_whole_split_not_of_the_balanced_sample():
    rng = np.random.default_rng(0)
    z = np.where(rng.random(4000) < 0.05, rng.gamma(3, 1, 4000), 0)
    score = z + rng.normal(size=4000)
    positive = z > 0
    kept = np.sort(np.r_[np.flatnonzero(positive), rng.permutation(np.flatnonzero(~positive))[:200]])
    share = positive.mean()
    full = average_precision(score, positive, share)
    assert average_precision(score[kept], positive[kept], share) == pytest.approx(full, abs=0.05)
    assert correlation(score[kept], z[kept], positive[kept], share) == pytest.approx(np.corrcoef(score, z)[0, 1],
                                                                                     abs=0.05)
    assert np.corrcoef(score[kept], z[kept])[0, 1] > np.corrcoef(score, z)[0, 1] + 0.1
    assert np.isnan(correlation(np.ones(4), np.arange(4.0), np.arange(4) > 1, 0.5))


def test_missing_and_extra_labels_cost_precision_and_correlation(world):
    """Oikarinen et al. 2025: a measure must fall when half of a label's meaning is taken away, and when some is added.
    """
    contexts, _, judge = world
    either = contexts.index["text"].str.contains(r"\bw3\b") | contexts.index["text"].str.contains("apple")
    both = Contexts(sparse.csr_array(either.to_numpy(float)[:, None]), contexts.index)
    exact = Label(0, "", {"apple": 5.0, "w3": 5.0})
    missing = Label(0, "", {"apple": 5.0})
    extra = Label(0, "", {"apple": 5.0, "w3": 5.0, "w7": 5.0, "w9": 5.0, "w11": 5.0})
    table = judge_labels(both, [exact, missing, extra], judge, n_boot=50)
    for column in ("auprc", "correlation_z"):
        assert table[column][0] > max(table[column][1], table[column][2]) + 0.05, column


def test_neighbour_negatives_fire_for_a_neighbour(world):
    contexts, _, _ = world
    near = contexts.neighbours(APPLE, 5)
    rows, positive = held_out_sample(contexts, APPLE, negatives="neighbour")
    assert len(near) == 5 and APPLE not in set(near.feature) and near.jaccard.is_monotonic_decreasing
    assert np.any([contexts.activation(f)[rows[~positive]] for f in near.feature], axis=0).all()
    explain = contexts.rows("explain")
    a, b = (contexts.activation(f)[explain] != 0 for f in (APPLE, near.feature[0]))
    assert near.jaccard[0] == pytest.approx((a & b).sum() / (a | b).sum()) and near.both[0] == (a & b).sum()
    assert held_out_sample(contexts, 79, negatives="neighbour")[0].size == 0  # a dead feature has no neighbours


def test_other_negatives_are_reported_beside_the_first(world):
    contexts, explainer, judge = world
    table = judge_labels(contexts, explainer.explain_all([SORRY, APPLE]), judge, n_boot=50,
                         also=("matched", "neighbour")).set_index("feature")
    assert table.loc[APPLE, "auroc_matched"] > 0.9 and table.loc[APPLE, "auroc_neighbour"] > 0.9
    wrong = judge_labels(contexts, [Label(APPLE, "", {"w3": 1.0})], judge, n_boot=50, also=("neighbour",)).iloc[0]
    assert wrong["auroc_neighbour"] < 0.65


def test_one_auroc_without_the_rest_is_the_tables_own(world):
    contexts, explainer, judge = world
    labels = explainer.explain_all([APPLE, SORRY, 7])  # scored, too few positives, abstained
    table = judge_labels(contexts, labels, judge, n_boot=20)
    np.testing.assert_array_equal([held_out_auroc(contexts, one, judge) for one in labels], table["auroc"])
    assert table["auroc"].isna().tolist() == [False, True, True]
    assert [one.abstained for one in labels] == [False, False, True]


def test_tfidf_reads_any_label(world):
    contexts, explainer, _ = world
    judge = TfidfJudge(explainer.vocabulary)
    written = Label(APPLE, "Responses about an apple", kind="llm")
    table = judge_labels(contexts, [written, explainer.explain(APPLE), Label(APPLE, "zebra", kind="llm")], judge,
                         n_boot=100)
    assert (table["auroc"][:2] > 0.95).all() and table["auroc"][2] == pytest.approx(0.5)


def test_a_sheet_goes_out_blind_and_comes_back_as_a_judge(world, tmp_path):
    contexts, _, _ = world
    index = contexts.index.copy()
    apples = index["text"].str.contains("apple")
    index.loc[apples, "text"] = '=HYPERLINK("x") "quoted", and\nlines ' + index["text"]
    contexts = Contexts(contexts.z, index)
    labels = [Label(APPLE, "about apples"), Label(7, "no label", reason="nothing")]
    n = write_sheet(tmp_path / "sheet.csv", contexts, labels, n_per_class=40)
    sheet = pd.read_csv(tmp_path / "sheet.csv", dtype=str, keep_default_na=False)
    assert len(sheet) == n == 80 and list(sheet.columns) == ["item", "label", "response", "matches"]
    assert not sheet["response"].str.startswith("=").any() and set(sheet["label"]) == {"about apples"}
    first = sheet["response"].str.contains("apple").iloc[:20]
    assert first.any() and not first.all()  # shuffled: the order tells nothing
    sheet["matches"] = ["yes" if "apple" in text else "0" for text in sheet["response"]]
    sheet.to_csv(tmp_path / "filled.csv", index=False)
    judge = HumanJudge(tmp_path / "filled.csv")
    row = judge_labels(contexts, labels, judge, n_boot=50, n_per_class=40).iloc[0]
    assert row["auroc"] > 0.95 and row["n_pos"] == 40
    blank = sheet.assign(matches="")
    blank.to_csv(tmp_path / "blank.csv", index=False)
    assert "judge failed" in judge_labels(contexts, labels, HumanJudge(tmp_path / "blank.csv"), n_boot=50,
                                          n_per_class=40).iloc[0]["verdict"]
    sheet.loc[3, "matches"] = "perhaps"
    sheet.to_csv(tmp_path / "odd.csv", index=False)
    with pytest.raises(DataError, match="line .*perhaps"):
        HumanJudge(tmp_path / "odd.csv")
    with pytest.raises(DataError, match="nothing to ask"):
        write_sheet(tmp_path / "x.csv", contexts, labels[1:])
