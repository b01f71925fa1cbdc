"""The stages in miniature: what is made, found again, made anew, planned, and read back in the right order."""

import dataclasses
import itertools
import json
import random
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from sarmlib import stages
from sarmlib.artifacts import hash_file
from sarmlib.data.toyworld import datasets
from sarmlib.errors import ConfigError, NotMadeError
from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.evaluation.scoring import score_conversations
from sarmlib.profiles import VARIANTS, load_profile
from sarmlib.sae.model import TopKSAE
from sarmlib.stages import Run
from tests.fake_llm import FakeLLM
from tests.miniature import miniature, save_backbone
from tests.tiny import conversation

pytestmark = pytest.mark.filterwarnings("ignore:asked for .* states")  # the local corpus is small
BOTH = ("rewardbench2", "rm_bench")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    """One seed of SARM and of two baselines, trained in this process."""
    run = Run(miniature(backbone), root=tmp_path_factory.mktemp("runs"), progress=False)
    for variant in ("sarm", "random_encoder", "scalar_full"):
        run.scores(variant, 0)
    run.labels(0)
    return run


# -- single stages ---------------------------------------------------------------------------------------------------

def test_shape_follows_the_profile(run):
    assert run.shape == {"d_model": 16, "n_layers": 3, "layer": 1, "n_features": 64, "k": 8}
    assert run.device == "cpu"


def test_inputs_have_the_asked_sizes(run):
    pairs, rows = run.pairs(0), run.benchmark_rows()
    assert {name: len(part) for name, part in pairs.items()} == {"train": 24, "eval": 24}
    assert all(pair["prompt"][-1]["role"] == "user" for part in pairs.values() for pair in part)
    assert rows == {"rewardbench2": datasets.rewardbench2(8, 0), "rm_bench": datasets.rm_bench(8, 0)}
    arrays = load_file(run.activations("sentence_end").file("activations.safetensors"))
    assert arrays["train"].shape[1] == 16 and len(arrays["train"]) >= 600 and len(arrays["held_out"]) > 0
    assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in arrays.values())


def test_sae_is_trained_from_the_activations(run):
    sae, artifact = run.load_sae("sentence_end", 0), run.sae("sentence_end", 0)
    assert (sae.W_enc.shape, sae.k) == ((64, 16), 8) and not artifact.fresh
    assert 0 < artifact.meta["fvu"] < 2 and artifact.meta["l0"] <= 8
    log = artifact.json("log.json")
    assert log[-1]["step"] == 20 and not (artifact.path / "checkpoint").exists()


def test_rewards_have_a_model_a_tokenizer_a_log_and_an_accuracy(run):
    for variant in ("sarm", "random_encoder", "scalar_full"):
        artifact = run.reward(variant, 0)
        assert 0 <= artifact.meta["eval_accuracy"] <= 1
        assert any("eval_accuracy" in entry for entry in artifact.json("log.json"))
        assert artifact.file("model/tokenizer.json").exists()
        depth = run.load_reward(variant, 0).config.backbone_config
        depth = depth["num_hidden_layers"] if isinstance(depth, dict) else depth.num_hidden_layers
        assert depth == (3 if variant == "scalar_full" else 1)


def test_head_is_the_models_head(run):
    w = run.head("sarm", 0)
    assert w.shape == (64,) and w.dtype == np.float64 and np.abs(w).max() > 0
    np.testing.assert_array_equal(w, run.load_reward("sarm", 0).score.weight[0].detach().double().numpy())


def test_everything_is_found_on_the_second_call(run):
    fresh = Run(run.profile, root=run.store.root, progress=False, read_only=True)
    for artifact in (fresh.benchmarks(), fresh.preferences(0), fresh.activations("sentence_end"),
                     fresh.sae("sentence_end", 0), fresh.reward("sarm", 0), fresh.scores("sarm", 0), fresh.labels(0)):
        assert artifact.fresh is False
    table = fresh.label_table(0)
    assert {"feature", "w", "label", "auroc", "auroc_tfidf"} <= set(table) and len(table) <= 6
    assert set(stages.label_candidates(run.contexts(0).features(), 6).feature) == set(table.feature)


def test_first_call_makes(run, backbone, tmp_path):
    other = Run(miniature(backbone), root=tmp_path, progress=False)
    assert other.benchmarks().fresh and not other.benchmarks().fresh
    assert other.benchmarks().key == run.benchmarks().key


def test_read_only_makes_nothing(run, tmp_path):
    empty = Run(run.profile, root=tmp_path / "runs", progress=False, read_only=True)
    for call in (lambda: empty.benchmarks(), lambda: empty.scores("sarm", 0), lambda: empty.labels(0)):
        with pytest.raises(NotMadeError, match="has not been made"):
            call()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changed, same, other", [
    ("sae.lr", ("activations", "preferences", "benchmarks"), ("sae", "reward")),
    ("reward.lr", ("activations", "sae", "preferences"), ("reward",)),
    ("preferences.label_noise", ("activations", "sae", "benchmarks"), ("preferences", "reward")),
    ("corpus.window", ("preferences", "benchmarks"), ("activations", "sae", "reward")),
    ("benchmarks.items_per_subset", ("activations", "sae"), ("benchmarks",)),
    ("steering.bootstrap", ("activations", "sae", "preferences", "benchmarks", "reward"), ()),
    ("workers", ("activations", "sae", "preferences", "benchmarks", "reward"), ()),
])
def test_a_changed_setting_changes_the_keys_it_should(run, backbone, monkeypatch, changed, same, other):
    values = {"sae.lr": 1e-3, "reward.lr": 1e-3, "preferences.label_noise": 0.3, "corpus.window": 64,
              "benchmarks.items_per_subset": 4, "steering.bootstrap": 9, "workers": 5}
    keys = [stage_keys(Run(miniature(backbone, **extra), progress=False), monkeypatch)
            for extra in ({}, {changed: values[changed]})]
    for stage in same:
        assert keys[0][stage] == keys[1][stage], stage
    for stage in other:
        assert keys[0][stage] != keys[1][stage], stage


def stage_keys(run, monkeypatch):
    """Keys of all stages of a run without making anything."""
    class Named:
        meta = {}

        def __init__(self, key):
            self.key = key

    monkeypatch.setattr(run.store, "get_or_make", lambda stage, settings, inputs, make, code=(), **_:
                        Named(run.store.key(stage, settings, inputs, code)))
    calls = {"benchmarks": (), "preferences": (0,), "activations": ("sentence_end",), "sae": ("sentence_end", 0),
             "reward": ("sarm", 0)}
    return {name: getattr(run, name)(*arguments).key for name, arguments in calls.items()}


def test_seeds_variants_and_positions_have_keys_of_their_own(run, backbone, monkeypatch):
    run = Run(miniature(backbone), progress=False)
    stage_keys(run, monkeypatch)
    keys = [run.reward(variant, seed).key for variant in VARIANTS for seed in (0, 1)]
    keys += [run.sae(rule, seed).key for rule in ("sentence_end", "every") for seed in (0, 1)]
    keys += [run.activations(rule).key for rule in ("sentence_end", "every")]
    assert len(set(keys)) == len(keys)


def test_another_backbone_gives_another_key(run, tmp_path):
    other = Run(miniature(save_backbone(tmp_path, seed=1)), progress=False)
    assert other.backbone_key != run.backbone_key and other.benchmarks().key == run.benchmarks().key


# -- scores joined to rows -------------------------------------------------------------------------------------------

def test_scored_units_are_in_the_order_of_their_texts(run):
    scored, rows = run.scored("sarm", 0), run.benchmark_rows()
    assert len(scored.units) == sum(len(r["chosen"]) + len(r["rejected"]) for part in rows.values() for r in part)
    assert scored.units.response_id.is_unique and scored.z.shape == (len(scored.units), 64)
    model = run.load_reward("sarm", 0)
    picked = scored.units.sample(12, random_state=0)
    talks = [conversation(u.prompt_text, u.text) for u in picked.itertuples()]
    again = score_conversations(model, run.tokenizer, talks, max_length=128, features=True)
    np.testing.assert_allclose(again.rewards, picked.reward, atol=1e-5)
    np.testing.assert_array_equal(again.lengths, picked.length)
    np.testing.assert_allclose(again.features.toarray(), scored.z[picked.index.to_numpy()].toarray(), atol=1e-4)
    for unit in picked.itertuples():
        row = rows[unit.benchmark][unit.row]
        answers = row["chosen"] + row["rejected"]
        assert answers[unit.slot] == unit.text and row["prompt"] == unit.prompt_text
        assert unit.label == ("chosen" if unit.slot < len(row["chosen"]) else "rejected")
        assert list(unit.concepts) == row["additional_metadata"]["concepts"][unit.slot]
        if unit.benchmark == "rm_bench":
            assert unit.style == ("concise", "detailed", "markdown")[unit.slot % 3] and unit.domain == row["domain"]


def test_scored_rows_carry_the_rewards_of_their_units(run):
    scored = run.scored("scalar_full", 0)
    assert scored.z is None
    for name in BOTH:
        units, z = scored.part(name)
        assert z is None and list(units.index) == list(range(len(units)))
        for number, row in enumerate(getattr(scored, name)):
            mine = units[units.row == number]
            if name == "rewardbench2":
                assert row["scores"] == mine.reward.tolist() and len(row["scores"]) == row["total_completions"]
            else:
                assert row["score_chosen"] == mine[mine.label == "chosen"].reward.tolist()
                assert row["score_rejected"] == mine[mine.label == "rejected"].reward.tolist()
    assert rewardbench2.score(scored.rewardbench2)["overall"] is not None
    assert 0 <= rm_bench.score(scored.rm_bench)["total_avg_acc"] <= 1


def test_part_cuts_units_and_features_alike(run):
    scored = run.scored("sarm", 0)
    parts = {name: scored.part(name) for name in BOTH}
    assert sum(len(units) for units, _ in parts.values()) == len(scored.units)
    for name, (units, z) in parts.items():
        assert set(units.benchmark) == {name} and z.shape[0] == len(units)
        np.testing.assert_allclose(z @ run.head("sarm", 0), units.reward, atol=1e-5)


def test_join_scores_by_hand():
    rows = [{"chosen": ["a"], "rejected": ["b", "c"]}, {"chosen": ["d", "e"], "rejected": ["f"]}]
    joined = stages.join_scores("rewardbench2", rows, np.arange(6.0))
    assert [row["scores"] for row in joined] == [[0, 1, 2], [3, 4, 5]]
    joined = stages.join_scores("rm_bench", rows, np.arange(6.0))
    assert joined[1]["score_chosen"] == [3, 4] and joined[1]["score_rejected"] == [5] and "scores" not in rows[0]


# -- many at once ----------------------------------------------------------------------------------------------------

def test_plan_puts_every_job_after_those_it_waits_for(backbone):
    run = Run(miniature(backbone, seeds=[1, 2]), progress=False)
    jobs = run.plan("labels")
    assert all(all(before < number for before in job[2]) for number, job in enumerate(jobs))
    found = {(name, *arguments): {(jobs[n][0], *jobs[n][1]) for n in waits} for name, arguments, waits in jobs}
    assert len(found) == len(jobs) == 1 + 3 + 2 * (1 + 2) + 5 * 2 + 2
    assert found["preferences", 0] == {("benchmarks",)}  # the first seed's pairs may be part of the SAE's corpus
    assert found["sae", "every", 2] == {("activations", "every")}
    assert found["scores", "sarm", 1] == {("preferences", 1), ("sae", "sentence_end", 1)}
    assert found["scores", "scalar_half", 2] == {("preferences", 2)}
    assert found["labels", 2] == {("scores", "sarm", 2)}
    assert {name for name, *_ in run.plan("sae")} == {"benchmarks", "preferences", "activations", "sae"}
    assert {name for name, *_ in run.plan("scores")} == {"benchmarks", "preferences", "activations", "sae", "scores"}
    with pytest.raises(ConfigError, match="goal 'reward'.*sae, scores or labels"):
        run.plan("reward")


def test_plan_leaves_out_what_no_variant_needs(backbone):
    run = Run(miniature(backbone, variants=["scalar_half"]), progress=False)
    assert [name for name, *_ in run.plan("scores")] == ["benchmarks", "preferences", "scores"]
    with pytest.raises(ConfigError, match="sarm"):
        run.plan("labels")


def test_stage_times_add_up_the_manifests(run):
    times = run.stage_times()
    assert times.loc["reward", "artifacts"] == 3 and times.loc["benchmarks", "artifacts"] == 1
    assert (times.seconds >= 0).all() and (times.peak_mib > 50).all()
    manifests = [json.loads(p.read_text()) for p in run.store.root.glob("reward/*/manifest.json")]
    assert times.loc["reward", "seconds"] == pytest.approx(sum(m["wall_s"] for m in manifests))


# -- your own folder -------------------------------------------------------------------------------------------------

def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs, both benchmarks, prose and a decoder, as a user might have them; RM-Bench without math, RewardBench 2
    with Safety alone."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    save_backbone(folder / "decoder")
    pairs = [{k: row[k] for k in ("chosen", "rejected")} for row in datasets.preference_pairs(150, 0)]
    odd = "You see oars there,\u2028and also\u0085 sails."
    pairs[3]["chosen"][1]["content"] = odd
    rows = datasets.rm_bench(10, 0)
    best = [row for row in datasets.rewardbench2(10, 0, ties=0) if row["subset"] == "Safety"]
    leaked = {"role": "user", "content": best[0]["prompt"]}
    pairs += [{"chosen": [leaked, {"role": "assistant", "content": "Yes."}],
               "rejected": [leaked, {"role": "assistant", "content": "No."}]}]
    jsonl(folder / "votes" / "pairs.jsonl", pairs)
    for domain in {row["domain"] for row in rows} - {"math"}:
        part = [{k: row[k] for k in ("id", "prompt", "chosen", "rejected")} for row in rows if row["domain"] == domain]
        (folder / "rm" / f"{domain}_filtered.json").parent.mkdir(exist_ok=True)
        (folder / "rm" / f"{domain}_filtered.json").write_text(json.dumps(part))
    jsonl(folder / "rb2" / "safety.jsonl", [{k: v for k, v in row.items() if k != "additional_metadata"}
                                            for row in best])
    prose = [" ".join(datasets._prose_document(rng).removeprefix("<bos>") for _ in range(8)) for _ in range(60)]
    (folder / "prose.txt").write_text("\n\n".join(prose))
    jsonl(folder / "pages.jsonl", [{"text": text} for text in prose])
    return folder


def local_profile(folder, **overrides):
    settings = {"seeds": [0], "variants": ["sarm", "scalar_half"], "device": "cpu", "sae.steps": 15, "sae.vectors": 400,
                "sae.batch_size": 64, "sae.expansion": 4, "preferences.train_pairs": 30, "preferences.eval_pairs": 8,
                "benchmarks.items_per_subset": 10, "corpus.window": 64, "interpretation.features": 4, **overrides}
    return load_profile("local", data=folder, **settings)


@pytest.fixture(scope="module")
def beside(folder, tmp_path_factory):
    """The folder's run by two worker processes, and what ``ensure`` reported."""
    run = Run(local_profile(folder, workers=2), root=tmp_path_factory.mktemp("beside"), progress=False)
    return run, run.ensure("scores")


def test_a_folder_of_your_own_runs_end_to_end(beside):
    run, table = beside
    assert set(table.stage) == {"benchmarks", "preferences", "activations", "sae", "scores"}
    scored = run.scored("sarm", 0)
    assert {row["subset"] for row in scored.rewardbench2} == {"Safety"} and len(scored.rewardbench2) == 10
    domains = [row["domain"] for row in scored.rm_bench]
    counts = {domain: domains.count(domain) for domain in domains}
    assert counts == {"chat": 10, "code": 10, "safety-refuse": 5, "safety-response": 5}
    assert all(concepts == () for concepts in scored.units.concepts)
    np.testing.assert_allclose(scored.z @ run.head("sarm", 0), scored.units.reward, atol=1e-5)
    report = run.preferences(0).meta
    assert report["dropped"] == {"prompt in a benchmark": 1} and report["train"] == 30 and report["eval"] == 8


def test_ensure_in_processes_equals_this_process(beside, folder, tmp_path):
    run, table = beside
    assert list(table.columns) == ["stage", "job", "key", "seconds", "made"] and table.made.all()
    assert list(table.stage) == [name for name, *_ in run.plan("scores")]
    here = Run(local_profile(folder), root=tmp_path, progress=False)
    made = [getattr(here, name)(*arguments) for name, arguments, _ in here.plan("scores")]
    assert [artifact.key for artifact in made] == table.key.tolist()
    for variant in ("sarm", "scalar_half"):
        one, other = here.scores(variant, 0), run.scores(variant, 0)
        assert hash_file(one.file("scores.safetensors")) == hash_file(other.file("scores.safetensors"))
    again = run.ensure("scores")
    assert not again.made.any() and (again.seconds == 0).all() and again.key.tolist() == table.key.tolist()


def test_rows_are_limited_per_subset_and_domain(folder, tmp_path):
    rows = Run(local_profile(folder, **{"benchmarks.items_per_subset": 3}), root=tmp_path,
               progress=False).benchmark_rows()
    assert [len(rows[name]) for name in BOTH] == [3, 12]


def test_line_separators_inside_a_text_do_not_break_a_stored_file(folder, tmp_path):
    run = Run(local_profile(folder, **{"preferences.train_pairs": 500, "preferences.eval_pairs": 500}), root=tmp_path,
              progress=False)
    pairs = run.pairs(0)
    texts = [pair["chosen"] for part in pairs.values() for pair in part]
    assert len(texts) == 150 and any("\u2028" in text and "\u0085" in text for text in texts)


def test_pairs_of_a_folder_are_split_by_prompt_and_drawn_by_seed(folder, tmp_path):
    run = Run(local_profile(folder), root=tmp_path, progress=False)
    zero, one = run.pairs(0), run.pairs(1)
    assert zero["eval"] == one["eval"] and zero["train"] != one["train"]
    prompts = [{pair["prompt"][0]["content"] for pair in zero[side]} for side in ("train", "eval")]
    assert not prompts[0] & prompts[1]


def test_changed_data_are_noticed(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = stage_keys(Run(local_profile(copy), root=tmp_path / "runs", progress=False), monkeypatch)
    with (copy / "prose.txt").open("a") as handle:
        handle.write("\n\nOne more line.")
    after = stage_keys(Run(local_profile(copy), root=tmp_path / "runs", progress=False), monkeypatch)
    assert before["activations"] != after["activations"] and before["sae"] != after["sae"]
    assert before["benchmarks"] == after["benchmarks"] and before["preferences"] == after["preferences"]


def test_dialogues_of_training_pairs_can_be_mixed_into_the_corpus(folder, tmp_path):
    run = Run(local_profile(folder, **{"corpus.dialogue_share": 0.5}), root=tmp_path, progress=False)
    texts = list(itertools.islice(run.texts(0), 60))
    dialogues = [text for text in texts if not isinstance(text, str)]
    assert 15 < len(dialogues) < 45 and all(ids[-1] == run.tokenizer.eos_token_id for ids in dialogues)
    trained = {run.tokenizer.apply_chat_template([*p["prompt"], {"role": "assistant", "content": p[side]}],
                                                 tokenize=False) for p in run.pairs(0)["train"]
               for side in ("chosen", "rejected")}
    assert run.tokenizer.decode(dialogues[0]) in trained


def test_ties_keep_their_partners_when_rows_are_limited():
    rows = datasets.rewardbench2(4, 0, ties=12)
    kept = stages._limit(rows, "subset", 6, 0)
    ties = [row["id"].partition(":") for row in kept if row["subset"] == "Ties"]
    assert len(ties) == 6 and len({number for _, _, number in ties}) == 3
    assert sum(row["subset"] == "Safety" for row in kept) == 4 and kept == [row for row in rows if row in kept]


def test_local_without_a_folder_names_the_cure(monkeypatch, folder, tmp_path):
    monkeypatch.delenv("SARMLIB_DATA", raising=False)
    with pytest.raises(ConfigError, match="DATA=folder"):
        Run("local")
    with pytest.raises(ConfigError, match="does not exist"):
        Run("local", data=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="DATA="):
        _ = Run(dataclasses.replace(local_profile(folder), data=None)).local
    with pytest.raises(ConfigError, match="reads no data folder"):
        Run("toy", data=str(folder))


def test_a_saved_sae_is_the_one_inside_the_model(run):
    sae = TopKSAE.load(run.sae("sentence_end", 0).file("sae"))
    assert sae.content_hash() == run.load_reward("sarm", 0).sae.content_hash()


def test_a_chat_model_labels_in_the_pipeline_and_its_cache_serves_the_next_run(backbone, run, tmp_path, monkeypatch):
    def reply(messages):
        word = re.search(r"ACTIVATION 10>>>\n(\w+)", messages[1]["content"])
        return json.dumps({"pattern": f"the word {word[1]}", "found": True, "consistency": 4} if word else {"match": 5})

    names = ("SARMLIB_LLM_URL", "SARMLIB_LLM_MODEL", "SARMLIB_LLM_BUDGET")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(run.store.root, tmp_path / "runs")
    profile = miniature(backbone, interpretation__explainer="llm")
    spoken = Run(profile, root=tmp_path / "runs", progress=False)
    with pytest.raises(ConfigError, match="SARMLIB_LLM_URL, SARMLIB_LLM_MODEL, SARMLIB_LLM_BUDGET is not set"):
        spoken.check_hub()
    with FakeLLM(("500",), reply) as server:
        for name, value in zip(names, (server.url, "fake", "1e6"), strict=True):
            monkeypatch.setenv(name, value)
        spoken.check_hub()
        labels, table = spoken.label_objects(0), spoken.label_table(0)
        asked = sum(server.answered.values())
        assert {label.kind for label in labels} == {"llm"} and asked > 0 and max(server.answered.values()) == 1
        shutil.rmtree(tmp_path / "runs/labels")
        again = Run(profile, root=tmp_path / "runs", progress=False)
        assert again.label_objects(0) == labels and sum(server.answered.values()) == asked
        key = again.labels(0).key
        monkeypatch.setenv("SARMLIB_LLM_MODEL", "another")
        assert Run(profile, root=tmp_path / "runs", progress=False).labels(0).key != key
    assert len(table) == len(labels)
    monkeypatch.setenv("SARMLIB_LLM_BUDGET", "much")
    with pytest.raises(ConfigError, match="SARMLIB_LLM_BUDGET='much'"):
        spoken.check_hub()
