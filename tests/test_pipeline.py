"""The pipeline in miniature: what is made, found again, made anew, planned, streamed, and read back in order."""

import itertools
import json
import random
import re
import shutil
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sarmlib import pipeline
from sarmlib.data.toyworld import datasets
from sarmlib.errors import ConfigError, DataError
from sarmlib.evaluation.scorer import score
from sarmlib.pipeline import BENCHMARKS, NO_PAIRS, Run
from sarmlib.profiles import VARIANTS, load_profile
from sarmlib.sae import training
from sarmlib.store import Artifact, hash_file, write_atomic
from tests.fake_llm import FakeLLM
from tests.miniature import miniature, save_backbone

pytestmark = pytest.mark.filterwarnings("ignore:asked for .* states")  # the user's corpus is small


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


def test_an_sae_is_trained_from_the_extractors_states_and_is_the_one_inside_the_model(run):
    vectors = run.vectors("sentence_end")
    expected = pipeline._extractor(run, "sentence_end").collect(run.texts(0), 600 + pipeline.HELD_OUT)
    assert torch.equal(torch.cat([vectors["train"], vectors["held_out"]]), expected) and len(vectors["train"]) == 600
    sae, artifact = run.load_sae("sentence_end", 0), run.sae("sentence_end", 0)
    assert (sae.W_enc.shape, sae.k) == ((64, 16), 8) and not artifact.fresh
    assert 0 < artifact.meta["fvu"] < 2 and artifact.meta["l0"] <= 8
    assert artifact.json("log.json")[-1]["step"] == 20 and not (artifact.path / "checkpoint").exists()
    assert sae.content_hash() == run.load_reward("sarm", 0).sae.content_hash()


@pytest.mark.parametrize("variant", ["sarm", "random_encoder", "scalar_full"])
def test_reward_models_are_trained_saved_and_loaded(run, variant):
    artifact, model = run.reward(variant, 0), run.load_reward(variant, 0)
    assert 0 <= artifact.meta["eval_accuracy"] <= 1 and not model.training
    assert not list(artifact.path.glob("checkpoints*")) and not (artifact.path / "model/training_args.bin").exists()
    weights = model.score.weight[0].detach().double().numpy()
    np.testing.assert_array_equal(run.head(variant, 0), weights)
    assert np.abs(weights).max() > 0
    assert model.model.config.num_hidden_layers == {"sarm": 1, "random_encoder": 1, "scalar_full": 3}[variant]


def test_what_is_made_is_found_again_and_labels_are_of_the_features_that_move_most(run):
    table = Run(run.profile, root=run.store.root, read_only=True).label_table(0)
    assert {"feature", "w", "label", "auroc"} <= set(table) and len(table) <= 6
    assert set(table.kind) <= {"usual"} and (table.w > 0).sum() <= 3 and (table.w < 0).sum() <= 3


def stage_keys(run, monkeypatch) -> dict[str, str]:
    """Keys of all stages of a run without making anything."""
    monkeypatch.setattr(run.store, "get_or_make", lambda stage, settings, inputs, make, **_:
                        Artifact(Path(stage, "key"), run.store.key(stage, settings, inputs, make), {}))
    calls = {"benchmarks": (), "preferences": (0,), "activations": ("sentence_end",), "sae": ("sentence_end", 0),
             "reward": ("sarm", 0)}
    return {name: getattr(run, name)(*arguments).key for name, arguments in calls.items()}


@pytest.mark.parametrize("changed, value, other", [
    ("sae.lr", 1e-3, {"sae", "reward"}),
    ("reward.lr", 1e-3, {"reward"}),
    ("preferences.label_noise", 0.3, {"preferences", "reward"}),
    ("corpus.window", 64, {"activations", "sae", "reward"}),
    ("corpus.budget_gb", 0, {"activations", "sae", "reward"}),
    ("benchmarks.items_per_subset", 4, {"benchmarks", "preferences", "reward"}),
    ("workers", 5, set()),
])
def test_a_changed_setting_changes_the_keys_it_should(backbone, monkeypatch, changed, value, other):
    one, two = (stage_keys(Run(miniature(backbone, **extra), progress=False), monkeypatch)
                for extra in ({}, {changed: value}))
    assert {stage for stage in one if one[stage] != two[stage]} == other


def test_seeds_variants_positions_and_backbones_have_keys_of_their_own(backbone, monkeypatch, tmp_path):
    run = Run(miniature(backbone), progress=False)
    other = Run(miniature(save_backbone(tmp_path, seed=1)), progress=False)
    assert other.backbone_key != run.backbone_key
    stage_keys(run, monkeypatch)
    keys = [run.reward(variant, seed).key for variant in VARIANTS for seed in (0, 1)]
    keys += [run.sae(rule, seed).key for rule in ("sentence_end", "every") for seed in (0, 1)]
    keys += [run.activations(rule).key for rule in ("sentence_end", "every")]
    assert len(set(keys)) == len(keys)


def test_scored_units_are_in_the_order_of_their_texts_and_rows_carry_their_rewards(run):
    scored, rows = run.scored("sarm", 0), run.benchmark_rows()
    assert len(scored.units) == sum(len(r["chosen"]) + len(r["rejected"]) for part in rows.values() for r in part)
    assert scored.units.response_id.is_unique and scored.z.shape == (len(scored.units), 64)
    picked = scored.units.sample(12, random_state=0)
    again = score(run.load_reward("sarm", 0), run.tokenizer, pipeline.conversations(picked), max_length=128,
                  features=True)
    np.testing.assert_allclose(again.rewards, picked.reward, atol=1e-5)
    np.testing.assert_array_equal(again.lengths, picked.length)
    np.testing.assert_allclose(again.features.toarray(), scored.z[picked.index.to_numpy()].toarray(), atol=1e-4)
    for unit in picked.itertuples():
        row = rows[unit.benchmark][unit.row]
        assert (row["chosen"] + row["rejected"])[unit.slot] == unit.text and row["prompt"] == unit.prompt_text
        assert unit.label == ("chosen" if unit.slot < len(row["chosen"]) else "rejected")
        assert list(unit.concepts) == row["additional_metadata"]["concepts"][unit.slot]
    for name in BENCHMARKS:
        units, z = scored.part(name)
        assert set(units.benchmark) == {name} and list(units.index) == list(range(len(units)))
        np.testing.assert_allclose(z @ run.head("sarm", 0), units.reward, atol=1e-5)
        for number, row in enumerate(getattr(scored, name)):
            values = row["scores"] if name == "rewardbench2" else row["score_chosen"] + row["score_rejected"]
            assert values == units[units.row == number].reward.tolist()
    assert run.scored("scalar_full", 0).z is None and run.scored("sarm", 0) is scored
    states = run.states("sarm", 0)  # what the encoder reads, of RM-Bench, the last of both
    assert states.shape == (len(units), 16) and run.states("sarm", 0) is states
    code = run.load_sae("sentence_end", 0).encode(torch.from_numpy(states[:20])).to_csr()
    np.testing.assert_allclose(code.toarray(), z[:20].toarray(), atol=1e-4)


def test_limits_keep_ties_together_and_can_name_one_group():
    rows = datasets.rewardbench2(4, 0, ties=12)
    kept = pipeline._limit(rows, "subset", 6, 0)
    ties = [row["id"].partition(":") for row in kept if row["subset"] == "Ties"]
    assert len(ties) == 6 and len({number for _, _, number in ties}) == 3
    lacking = pipeline._limit(rows, "subset", (("Safety", 1),), 0)
    assert sum(row["subset"] == "Safety" for row in lacking) == 1 and len(lacking) == len(rows) - 3


def test_states_above_the_budget_are_streamed_and_the_held_out_ones_come_first(backbone, tmp_path):
    run = Run(miniature(backbone, corpus__budget_gb=0, sae__steps=None), root=tmp_path, progress=False)
    vectors, meta = run.vectors("sentence_end"), run.activations("sentence_end").meta
    assert [len(part) for part in vectors.values()] == [0, pipeline.HELD_OUT]
    artifact = run.sae("sentence_end", 0)
    assert artifact.json("log.json")[-1]["step"] == 600 // 64 and 0 < artifact.meta["fvu"] < 2
    texts = list(itertools.islice(run.texts(0), meta["documents"]))
    expected = pipeline._extractor(run, "sentence_end").collect(texts, pipeline.HELD_OUT)
    assert torch.equal(vectors["held_out"], expected)


def test_a_killed_training_on_a_stream_does_not_start_its_extraction_again(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SAETrainConfig", partial(training.SAETrainConfig, checkpoint_every=2))
    monkeypatch.setattr(training, "BUFFER", 128)
    monkeypatch.setattr(pipeline, "_ahead", iter)  # so that what is computed is what is used
    steps, forwards = training._Trainer.train_step, []
    forward = pipeline.ActivationExtractor._forward
    monkeypatch.setattr(pipeline.ActivationExtractor, "_forward", lambda *one: forwards.append(1) or forward(*one))

    def killed(trainer, batch):
        if trainer.step == 7:
            raise KeyboardInterrupt
        return steps(trainer, batch)

    found = {}
    for name in ("whole", "killed"):
        small = {"corpus__window": 32, "corpus__batch_size": 1, "sae__steps": None}
        run = Run(miniature(backbone, corpus__budget_gb=0, **small), root=tmp_path / name)
        run.activations("sentence_end")
        if name == "killed":
            with monkeypatch.context() as death, pytest.raises(KeyboardInterrupt):
                death.setattr(training._Trainer, "train_step", killed)
                run.sae("sentence_end", 0)
        forwards.clear()
        found[name] = run.load_sae("sentence_end", 0).content_hash(), len(forwards)
    assert found["killed"][0] == found["whole"][0] and found["killed"][1] < found["whole"][1] / 2


def test_states_are_computed_while_the_last_ones_are_used():
    third, fourth = threading.Event(), threading.Event()

    def states():
        yield from ("first", "next!")
        third.set()
        yield "third"
        fourth.set()
        raise DataError("bad text")

    items = pipeline._ahead(states(), rows=10)
    assert next(items) == "first" and third.wait(10) and not fourth.wait(0.1)  # two of five rows, and no further
    with pytest.raises(DataError, match="bad text"):
        assert list(items) == ["next!", "third"]
    items = pipeline._ahead(iter(["a", "b", "c"]))
    assert next(items) == "a" and items.close() is None  # which waits for its thread
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_plan_puts_every_job_after_those_it_waits_for(backbone, tmp_path):
    run = Run(miniature(backbone, seeds=[1, 2]), progress=False)
    jobs = run.plan("labels")
    order = list(jobs)
    assert all(order.index(before) < order.index(job) for job, waits in jobs.items() for before in waits)
    assert len(jobs) == 1 + 2 + 2 * (1 + 2) + 2 + 5 * 2 + 2
    for variant in NO_PAIRS:  # the decoder itself, once
        assert jobs["scores", variant, run.profile.seed] == [("benchmarks",)]
    assert jobs["sae", "every", 2] == [("activations", "every")] and jobs["labels", 2] == [("scores", "sarm", 2)]
    assert jobs["scores", "sarm", 1] == [("preferences", 1), ("sae", "sentence_end", 1)]
    assert {name for name, *_ in run.plan("sae")} == {"benchmarks", "preferences", "activations", "sae"}
    with pytest.raises(ConfigError, match=r"goal 'reward'.*sae, scores or labels"):
        run.plan("reward")
    released = Run("released", root=tmp_path, progress=False).ensure("scores")  # plans nothing
    assert released.empty and list(released) == ["jobs", "made", "job seconds"]


@pytest.mark.parametrize("variant", ["sarm", "scalar_half"])
def test_a_variant_that_the_profile_lacks_is_never_trained(backbone, variant):
    run = Run(miniature(backbone, variants=[variant]), progress=False)
    extracted = ["activations", "sae"] if variant == "sarm" else []
    stages = ["benchmarks", "preferences", *extracted, *["scores"] * 3]  # those of the decoder itself are the first two
    assert [name for name, *_ in run.plan("scores")] == stages
    for absent in set(VARIANTS) - {variant}:
        with pytest.raises(ConfigError, match=f"has no variant '{absent}'"):
            run.reward(absent, 0)
    if variant != "sarm":
        with pytest.raises(ConfigError, match="sarm"):
            run.plan("labels")


def jsonl(path, rows):
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DATA folder: RM-Bench without math, RewardBench 2 with Safety alone, one contaminated pair, one that is
    identical once it is cut."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    save_backbone(folder / "backbone")
    pairs = [{k: row[k] for k in ("chosen", "rejected")} for row in datasets.preference_pairs(150, 0)]
    pairs[3]["chosen"][1]["content"] = "You see oars there,\u2028and also\u0085 sails."
    best = [row for row in datasets.rewardbench2(10, 0, ties=0) if row["subset"] == "Safety"]
    long = " and".join(["you see oars there"] * 200)
    for question, yes, no in ((best[0]["prompt"], "Yes.", "No."), ("What do you see?", f"Yes {long}", f"No {long}")):
        user = {"role": "user", "content": question}
        pairs += [{"chosen": [user, {"role": "assistant", "content": yes}],
                   "rejected": [user, {"role": "assistant", "content": no}]}]
    jsonl(folder / "pairs" / "pairs.jsonl", pairs)
    rows = datasets.rm_bench(10, 0)
    for domain in {row["domain"] for row in rows} - {"math"}:
        part = [{k: row[k] for k in ("id", "prompt", "chosen", "rejected")} for row in rows if row["domain"] == domain]
        write_atomic(folder / "rm_bench" / f"{domain}_filtered.json", json.dumps(part))
    jsonl(folder / "rewardbench2" / "safety.jsonl", [{k: v for k, v in row.items() if k != "additional_metadata"}
                                                     for row in best])
    prose = [" ".join(datasets._prose_document(rng).removeprefix("<bos>") for _ in range(8)) for _ in range(60)]
    jsonl(folder / "corpus" / "pages.jsonl", [{"text": text} for text in prose])
    return folder


def local_run(folder, root, **overrides):
    settings = {"seeds": [0], "variants": ["sarm"], "device": "cpu", "sae.steps": 15, "sae.vectors": 400,
                "sae.batch_size": 64, "sae.expansion": 4, "preferences.train_pairs": 30, "preferences.eval_pairs": 8,
                "preferences.max_length": 256, "benchmarks.items_per_subset": 10, "corpus.window": 64, **overrides}
    return Run(load_profile("local", data=folder, **settings), root=root, progress=False)


@pytest.fixture(scope="module")
def beside(folder, tmp_path_factory):
    """The folder's run by two worker processes, and what ``ensure`` reported."""
    run = local_run(folder, tmp_path_factory.mktemp("beside"), workers=2)
    return run, run.ensure("scores")


def test_a_folder_of_your_own_runs_end_to_end(beside, folder):
    run, table = beside
    assert list(table.index) == ["benchmarks", "preferences", "activations", "sae", "scores"]
    scored = run.scored("sarm", 0)
    assert {row["subset"] for row in scored.rewardbench2} == {"Safety"} and len(scored.rewardbench2) == 10
    domains = Counter(row["domain"] for row in scored.rm_bench)
    assert domains == {"chat": 10, "code": 10, "safety-refuse": 5, "safety-response": 5}
    assert all(concepts == () for concepts in scored.units.concepts)
    report = run.preferences(0).meta
    asked = {row["prompt"] for rows in run.benchmark_rows().values() for row in rows}
    lines = (folder / "pairs" / "pairs.jsonl").read_text().splitlines()
    lost = sum(json.loads(line)["chosen"][0]["content"] in asked for line in lines)
    assert report["dropped"]["prompt in a benchmark"] == lost > 0 and sum(report["dropped"].values()) == lost + 1
    assert report["read"] == 152 and report["kept"] == 151 - lost and (report["train"], report["eval"]) == (30, 8)


def test_ensure_in_processes_equals_this_process(beside, folder, tmp_path):
    run, table = beside
    assert (table.made == table.jobs).all() and table.jobs["scores"] == 3 and table["job seconds"].dtype == int
    here = local_run(folder, tmp_path)
    one, other = here.scores("sarm", 0), run.scores("sarm", 0)
    assert one.key == other.key and one.fresh and not other.fresh
    assert hash_file(one.file("scores.safetensors")) == hash_file(other.file("scores.safetensors"))
    again = run.ensure("scores")
    assert not again.made.any() and (again["job seconds"] == 0).all() and list(again.jobs) == list(table.jobs)


def test_rows_and_pairs_are_drawn_as_the_profile_says(folder, tmp_path):
    run = local_run(folder, tmp_path, **{"benchmarks.items_per_subset": 3})
    assert [len(run.benchmark_rows()[name]) for name in BENCHMARKS] == [3, 12]
    zero, one = run.pairs(0), run.pairs(1)
    assert zero["eval"] == one["eval"] and zero["train"] != one["train"]
    prompts = [{pair["prompt"][0]["content"] for pair in zero[side]} for side in ("train", "eval")]
    assert not prompts[0] & prompts[1]
    short = local_run(folder, tmp_path, **{"preferences.longest": 40}).preferences(0).meta
    assert 0 < short["dropped"]["longer than 40 tokens"] < 150 and short["kept"] + sum(short["dropped"].values()) == 152
    everything = local_run(folder, tmp_path, **{"preferences.train_pairs": 500, "preferences.eval_pairs": 500})
    texts = [pair["chosen"] for part in everything.pairs(0).values() for pair in part]
    assert len(texts) == everything.preferences(0).meta["kept"]
    assert any("\u2028" in text and "\u0085" in text for text in texts)


def test_changed_data_are_noticed(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = stage_keys(local_run(copy, tmp_path / "runs"), monkeypatch)
    with (copy / "corpus" / "pages.jsonl").open("a") as handle:
        handle.write('{"text": "One more line."}\n')
    after = stage_keys(local_run(copy, tmp_path / "runs"), monkeypatch)
    assert before["activations"] != after["activations"] and before["sae"] != after["sae"]
    assert before["benchmarks"] == after["benchmarks"] and before["preferences"] == after["preferences"]


def test_dialogues_of_training_pairs_can_be_mixed_into_the_corpus(folder, tmp_path):
    run = local_run(folder, tmp_path, **{"corpus.dialogue_share": 0.5})
    dialogues = [text for text in itertools.islice(run.texts(0), 60) if not isinstance(text, str)]
    assert 15 < len(dialogues) < 45 and all(ids[-1] == run.tokenizer.eos_token_id for ids in dialogues)
    pair = run.pairs(0)["train"][0]
    talk = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
    assert run.tokenizer.decode(dialogues[0]) == run.tokenizer.apply_chat_template(talk, tokenize=False)


def test_a_folder_that_lacks_something_says_what(folder, tmp_path):
    lacking = tmp_path / "lacking"
    shutil.copytree(folder, lacking)
    shutil.rmtree(lacking / "rm_bench")
    assert local_run(lacking, tmp_path / "runs").benchmark_rows()["rm_bench"] == []
    shutil.rmtree(lacking / "rewardbench2")
    with pytest.raises(DataError, match="holds no benchmark; put RewardBench 2 into"):
        local_run(lacking, tmp_path / "runs").benchmarks()
    shutil.rmtree(lacking / "backbone")
    with pytest.raises(DataError, match=r"no folder backbone/; it needs backbone/ \(a decoder"):
        _ = local_run(lacking, tmp_path / "runs").backbone_path


def test_a_chat_model_labels_in_the_pipeline_and_its_cache_serves_the_next_run(backbone, run, tmp_path, monkeypatch):
    def reply(messages):
        word = re.search(r"ACTIVATION 10[^\n]*\n(\w+)", messages[1]["content"])
        return json.dumps({"pattern": f"the word {word[1]}", "found": True, "consistency": 4} if word else {"match": 5})

    def spoken():
        return Run(miniature(backbone, interpretation__explainer="llm"), root=tmp_path / "runs", progress=False)

    shutil.copytree(run.store.root, tmp_path / "runs")
    monkeypatch.delenv("SARMLIB_LLM_URL", raising=False)
    with pytest.raises(ConfigError, match="SARMLIB_LLM_URL"):
        spoken().check_hub()
    with FakeLLM(("500",), reply) as server:
        for name, value in (("URL", server.url), ("MODEL", "fake"), ("BUDGET", "1e6")):
            monkeypatch.setenv(f"SARMLIB_LLM_{name}", value)
        spoken().check_hub()
        labels, key, asked = spoken().label_objects(0), spoken().labels(0).key, sum(server.answered.values())
        assert {label.kind for label in labels} == {"llm"} and asked > 0
        shutil.rmtree(tmp_path / "runs/labels")
        assert spoken().label_objects(0) == labels and sum(server.answered.values()) == asked
        monkeypatch.setenv("SARMLIB_LLM_MODEL", "another")
        assert spoken().labels(0).key != key
