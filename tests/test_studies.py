"""compare.py, report.py, variance.py, centred_ratio.py, benchmark.py, memory.py, guidance.py."""
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import settings
import torch
from baselines_guidance import guided_rollout
from torch._subclasses.fake_tensor import FakeTensorMode

import ddpo
import rewards
import runs
import sampling
import train
from conftest import EMOJI, LAYERS, ROOT, TINY_CLIP, learner, rng, run, tiny_flags, tiny_pipeline
from policy import load_policy
from studies import benchmark, centred_ratio, compare, guidance, memory, random_networks, report, variance

# ---- The comparison ----


def line(label, seed, queries, values, animal=None, algorithm="ddpo-is"):
    """A run's line in the results."""
    return {"label": label, "seed": seed, "folder": "nothing", "command": "python train.py",
            "commit": "c", "machine": "m", "minutes": 1.0, "updates": 2,
            "settings": {"algorithm": algorithm, "eval_prompts": 9}, "units": {"animal": [100, "%"], "number": [100, "%"]}, "rows": [
                {"reward_queries": q, "eval_reward_mean": r, "watched": {"animal": a}}
                for q, r, a in zip(queries, values, animal or [1.0] * len(queries))]}


def test_intervals_areas_and_queries_to_a_reward_by_hand_made_cases():
    assert report.interval([1, 2, 3]) == pytest.approx((2, 4.30 / 3**0.5), rel=1e-3)
    assert report.interval([5])[0] == 5 and np.isnan(report.interval([5])[1])
    one = line("a", 0, [0, 100, 300], [-2.0, -1.0, -1.0])
    # The first 100 queries were spent on the policy of the start, whatever they led to.
    assert report.mean_during_training(one) == pytest.approx((-2 * 100 - 200) / 300)
    assert report.queries_to(one, 0.25) == 100 and report.queries_to(one, 0.0) == 0
    assert np.isnan(report.queries_to(line("a", 0, [0, 9], [0.0, 1.0]), 0.1))  # no share of a start of 0
    assert np.isnan(report.queries_to(one, 0.9))
    skipped = {**one, "rows": [*one["rows"], {"reward_queries": 400, "eval_reward_mean": None, "watched": None}]}
    assert report.mean_during_training(skipped) == report.mean_during_training(one)
    between = {**one, "rows": [one["rows"][0], {"reward_queries": 50, "eval_reward_mean": None, "watched": None}, *one["rows"][1:]]}
    assert report.mean_during_training(between) == pytest.approx((-2 * 50 - 1.5 * 50 - 200) / 300)  # an epoch without an evaluation
    assert report.queries_to(between, 0.25) == 50


def test_the_gain_in_time_is_that_of_the_evaluation_before_the_watched_reward_fell():
    def gain(*animal):
        return report.gain_in_time(line("a", 0, [0, 4, 8, 12], [-2.0, -1.5, -1.0, -0.5], animal))

    assert gain(1.0, 0.9, 0.9, 0.9) == 75 and gain(1.0, 1.0, 0.8, 1.0) == 25 and gain(0.5, 0.4, 0.4, 0.4) == 0
    unknown = float("nan")  # a watched reward that can judge no image ends no run
    assert gain(*[unknown] * 4) == 75 and report.gain_in_time({**line("a", 0, [0, 4], [-2.0, -1.0]), "units": {}}) == 50


def test_runs_of_other_costs_are_compared_at_equal_queries_and_at_equal_unet_passes():
    chain = {"algorithm": "ddpo-is", "eval_prompts": 9, "guidance_scale": 5.0, "sampling_steps": 10, "skip_last_steps": 2, "kl_weight": 0.0}
    whole, one = ({**line(label, 0, [0, 100, queries], values), "settings": {**chain, "learn_steps": steps}}
                  for label, queries, values, steps in (("whole", 200, [-2.0, -1.5, -1.0], 0), ("one", 600, [-2.0, -1.9, -1.0], 1)))
    rwr = {**line("rwr", 0, [0, 100], [-2.0, -1.0]), "settings": {
        **chain, "algorithm": "rwr", "training_guidance": 1.0, "updates_per_epoch": 60, "batch_size": 32, "samples_per_epoch": 384}}
    # 10 guided steps forth; then 8 steps, or 1, forth and back; RWR: each image five times, unguided.
    assert list(map(report.passes_per_query, (whole, one, rwr))) == [20 + 2 * 3 * 8, 20 + 2 * 3, 20 + 3 * 5]
    head, _, *rows = [cells[2:-2].split(" | ") for cells in report.table([whole, one], (-1, "kB")).splitlines()]
    assert head[-2:] == ["gained (%) in 200 queries", "gained (%) in 13,600 U-Net passes"]
    assert [row[-2:] for row in rows] == [["50.0", "50.0"], [f"{5 + 45 / 5:.1f}", f"{5 + 45 * (13600 / 26 - 100) / 500:.1f}"]]
    assert "gained (%) in" not in report.table([whole], (-1, "kB"))


def test_a_watched_reward_has_a_column_in_its_unit():
    lines = [line("a", seed, [0, 9], [-2.0, -1.0], [1.0, end]) for seed, end in enumerate((0.9, 0.7))]
    head, _, row = [cells[2:-2].split(" | ") for cells in report.table(lines, (-1, "kB")).splitlines()]
    assert "number at the end (%)" not in head  # no run has this value
    assert dict(zip(head, row))["animal at the end (%)"] == f"80.0 ± {12.71 * 10:.1f}"
    assert dict(zip(head, row))["end (kB)"] == "1.00 ± 0.00" and dict(zip(head, row))["reward gained (%)"] == "50.0 ± 0.0"
    lines[0]["rows"][-1]["watched"]["animal"] = None
    row = report.table(lines, (-1, "kB")).splitlines()[-1][2:-2].split(" | ")
    assert dict(zip(head, row))["animal at the end (%)"] == "-"


def test_rwr_is_also_measured_against_the_same_rounds_without_a_reward():
    def runs_of(label, algorithm, *ends):
        return [line(label, seed, [0, 9], [-2.0, end], algorithm=algorithm) for seed, end in enumerate(ends)]

    groups = report.by_label([*runs_of("rwr", "rwr", -1.0, -1.2), *runs_of("ddpo-is", "ddpo-is", -1.0),
                              *runs_of("no reward", "rwr", -1.6, -1.6)])
    assert report.gain_over_control("rwr", groups["rwr"], groups) == pytest.approx([30, 20])
    assert not report.gain_over_control("ddpo-is", groups["ddpo-is"], groups)
    assert not report.gain_over_control("no reward", groups["no reward"], groups)
    groups["rwr, no reward"] = runs_of("rwr, no reward", "rwr", -1.8)
    assert report.gain_over_control("rwr", groups["rwr"], groups) == pytest.approx([40])


def test_a_drift_that_both_rewards_share_cancels():
    """The size falls by 40 % under both. What the reward adds is 10 % each way."""
    small, large = ([line("rwr", seed, [0, 9], [start, end]) for seed in (0, 1)] for start, end in ((-2.0, -1.0), (2.0, 1.4)))
    rows = report.without_drift([*small, line("no reward", 0, [0, 9], [-2.0, -1.2])], large).splitlines()
    assert rows[2:] == ["| rwr | 2 | 10.0 ± 0.0 | 10.0 ± 0.0 |"]  # the control was run on one of them only


def test_a_comparison_trains_what_no_study_has_and_reports_all(tiny_model, tmp_path, monkeypatch, capsys):
    tiny = {"model": str(tiny_model), "samples_per_epoch": 4, "images_per_prompt": 2, "sampling_steps": 3, "eval_prompts": 9, "updates_per_epoch": 1}
    monkeypatch.setitem(compare.ABLATIONS, "tiny", (8, {"one": tiny, "two": {**tiny, "baseline": "none"}}))
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    train_run = compare.train_run
    _, done = compare.planned_runs(compare.parse(["--ablation", "tiny", "--seeds", "1"]), {"reward": "compressibility"})
    folder, shared = tmp_path / "results" / "compressibility", settings.shared_settings(done.config)
    two = {**line("two", 0, [0, 4, 8], [-2.0, -1.0, -0.5], [1.0, 1.0, 0.5]), "settings": shared,
           "model": compare.hash_of_model(str(tiny_model))}
    runs.append_line(folder / "tiny.jsonl", {**two, "settings": {**shared, "epochs": 9}})  # of other settings: not this one
    runs.append_line(folder / "tiny.jsonl", {**two, "model": compare.hash_of_model(str(EMOJI))})  # of another model: neither
    runs.append_line(folder / "other.jsonl", {**two, "label": "as another study calls it"})
    with open(folder / "tiny.jsonl", "a") as file:
        file.write('{"label": "cut sho')  # by a kill
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 0
    told = capsys.readouterr().out
    assert "| two | 1 | 2.00 | 0.50 | 75.0 | 50.0 | - | 1.50 | 50.0 |" in told and "| one | 1 |" in told
    assert [path.name[:-7] for path in Path("runs").iterdir()] == ["tiny-compressibility-one-seed0"]
    assert {"tiny.jsonl", "tiny.md", "tiny.png"} <= {path.name for path in folder.iterdir()}
    monkeypatch.setattr(compare, "train_run", lambda *args: pytest.fail("nothing is missing"))
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 0
    assert capsys.readouterr().out == told
    monkeypatch.setattr(compare, "train_run", train_run)
    assert [row["label"] for row in runs.read_lines(folder / "tiny.jsonl")] == ["two", "two", "two", "one"]


def test_a_comparison_goes_on_where_it_was_killed_and_without_a_run_that_fails(tiny_model, tmp_path, monkeypatch, capsys):
    tiny = {"model": str(tiny_model), "samples_per_epoch": 4, "images_per_prompt": 2, "sampling_steps": 3, "eval_prompts": 9, "updates_per_epoch": 1}
    monkeypatch.setitem(compare.ABLATIONS, "tiny", (8, {"bad": {**tiny, "learning_rate": 1e30}, "half": tiny, "begun": {
        **tiny, "baseline": "none"}}))
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    _, half, begun = compare.planned_runs(compare.parse(["--ablation", "tiny", "--seeds", "1"]), {"reward": "compressibility"})
    assert train.main([*half.arguments, "--name", half.name]) == 0
    whole = runs.read_rows(train.RUNS / half.name)
    shutil.rmtree(train.RUNS / half.name)
    assert train.main([*half.arguments, "--name", half.name, "--epochs", "1"]) == 0  # as if stopped after one epoch
    shutil.rmtree(train.RUNS / half.name / "model")
    settings_file = train.RUNS / half.name / "config.json"
    settings_file.write_text(settings_file.read_text().replace('"epochs": 1', '"epochs": 2'))
    runs.create_run(train.RUNS, begun.name, "")  # killed before its first checkpoint

    def in_this_process(arguments, folder, show):  # three more processes would take their time
        if train.main(arguments):
            raise ValueError(f"{folder} stopped")

    monkeypatch.setattr(train, "stop_on_signals", lambda: None)  # only a main thread may ask for signals
    monkeypatch.setattr(compare, "train_in_a_process", in_this_process)
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 2
    told = capsys.readouterr().err
    assert "1 of 3 runs failed" in told and "not finite" in told
    lines = runs.read_lines(tmp_path / "results" / "compressibility" / "tiny.jsonl")
    assert [line["label"] for line in lines] == ["half", "begun"]
    assert lines[0]["rows"][-1]["eval_reward_mean"] == whole[-1]["eval_reward_mean"] and "begun earlier" in lines[0]["commit"]


def test_several_runs_are_trained_at_a_time_and_all_end_if_the_study_is_interrupted(tmp_path, monkeypatch):
    args = compare.parse(["--ablation", "baseline", "--seeds", "1"])
    planned, meet, ended = compare.planned_runs(args, {"reward": "compressibility"}), threading.Barrier(2, timeout=60), []

    def train_run(run, show):
        meet.wait()  # two are under way
        return {"label": run.label}

    monkeypatch.setattr(compare, "train_run", train_run)
    lines = compare.train_missing(planned[:2], tmp_path / "a.jsonl", jobs=2)
    assert {line["label"] for line in lines.values()} == {run.label for run in planned[:2]} and len(runs.read_lines(tmp_path / "a.jsonl")) == 2

    begun, meet = [], threading.Barrier(3, timeout=60)

    def endless(run, show):
        begun.append(run)
        meet.wait()
        try:
            while True:
                show(1)
        except KeyboardInterrupt:
            ended.append(run)
            raise

    def interrupted(*futures, **options):  # by Ctrl-C, once two are under way
        meet.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "wait", interrupted)
    monkeypatch.setattr(compare, "train_run", endless)
    with pytest.raises(KeyboardInterrupt):
        compare.train_missing(planned, tmp_path / "b.jsonl", jobs=2)
    assert set(begun) == set(ended) == set(planned[:2]) and not (tmp_path / "b.jsonl").exists()


def test_each_preset_is_among_the_settings_of_the_sweep():
    own = {"ddpo-is": ("clip_range", "updates_per_epoch"), "ddpo-sf": ("samples_per_epoch",), "rwr": ("beta",),
           "rwr-sparse": ("percentile",), "nft": ("samples_per_epoch", "updates_per_epoch", "batch_size")}
    for sweep, reward in ((compare.SWEEP, "compressibility"), (compare.VLM_SWEEP, "alignment")):
        for algorithm, names in own.items():
            names = ("learning_rate", *names)
            preset, *tried = [tuple(getattr(settings.build_config({"algorithm": algorithm, "reward": reward, **flags}), name) for name in names)
                              for flags in ({}, *sweep[algorithm])]
            assert preset in tried


def test_the_presets_guidance_in_rwrs_loss_goes_with_the_guidance_of_its_images():
    weight = [settings.build_config({"algorithm": "rwr", **flags}).training_guidance for flags in (
        {}, {"guidance_scale": 3.0}, {"guidance_scale": 5.0}, {"reward": "alignment"}, {"reward": "alignment", "guidance_scale": 2.0},
        {"reward": "alignment", "training_guidance": 0.5})]
    assert weight == [1.4, 1.4, 0, 1.0, 0, 0.5]


@pytest.mark.parametrize("reward", ["compressibility", "alignment"])
def test_every_planned_run_is_one_that_train_accepts_at_the_same_number_of_queries(reward):
    # That reward's preset has four steps, and no guidance.
    of_the_others = ("learn-steps", "sampling-steps", "guidance") if reward == "alignment" else ()
    for flags in (["--sweep"], *(["--seeds", "2", "--ablation", name] for name in compare.ABLATIONS if name not in of_the_others),
                  ["--seeds", "2"], ["--seeds", "2", "--algorithms", "ddpo-is"], ["--seeds", "2", "--twins"]):
        args = compare.parse(["--reward", reward, *flags])
        planned = compare.planned_runs(args, {"reward": reward})
        assert len({one.name for one in planned}) == len({one.key for one in planned}) == len(planned)
        assert len({one.queries for one in planned}) == 1 or args.ablation in ("learn-steps", "sampling-steps")
        for one in planned:  # raises ValueError where train.py would
            settings.build_config(settings.parse(one.arguments, ""))


@pytest.mark.parametrize("flags, message", [
    (["--seeds", "0"], "--seeds 0"), (["--jobs", "0"], "--jobs 0"), (["--twins", "--algorithms", "rwr"], "--twins and each ablation have their own"), (["--queries", "100"], "--queries 100 does not divide"),
    (["--sweep", "--queries", "64"], "--queries is for the comparison"), (["--reward", "beauty"], "no reward 'beauty'"),
    (["--watch", "beauty"], "no reward 'beauty'"), (["--reward", "none"], "no reward 'none'"), (["--drift", "--queries", "64"], "--queries is for the comparison"),
    (["--drift"], "30 of 30 runs are not done yet")])
def test_compare_answers_a_mistake_in_one_line_and_makes_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    assert compare.main(flags) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0] and not (tmp_path / "results").exists()


# ---- The variance ----


def test_signal_to_noise_is_that_of_a_known_gaussian():
    noise = np.random.default_rng(0).standard_normal(2000)
    snr, error = variance.jackknife(0.2 + 2 * noise, batch=64)
    assert snr == pytest.approx(0.1 * 8, abs=3 * error) and error == pytest.approx((64 / 2000) ** 0.5, rel=0.05)


def test_projected_scores_add_up_to_the_gradient_of_ddpo_sf_along_the_direction(tiny_model, tiny_policy):
    trained, noise = load_policy(tiny_model, steps=4, eta=1.0, guidance_scale=5.0), rng()
    with torch.no_grad():
        for weight in trained.denoiser.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=noise)
    u = variance.direction(tiny_policy, trained)
    assert sum(part.square().sum() for part in u).item() == pytest.approx(1, rel=1e-4)
    trajectory = sampling.rollout(tiny_policy, ["a cat", "a dog", "an ant"], rng(), 3)
    advantages, extras = torch.tensor([1.0, -2.0, 0.5]), learner(tiny_policy)
    for k in range(4):
        loss, _ = ddpo.surrogate(tiny_policy, trajectory, advantages, torch.arange(3), k, ddpo.score_function_loss, extras["config"])
        (loss / 4).backward()
    along = sum((weight.grad * part).sum() for weight, part in zip(tiny_policy.denoiser.parameters(), u)).item()
    projected = variance.projected_scores(tiny_policy, trajectory, torch.arange(4), u)
    assert -(advantages.numpy() @ projected) / 3 == pytest.approx(along, rel=1e-3)


def test_the_variance_is_measured_for_each_number_of_steps_once(tiny_model, tiny_policy, tmp_path, monkeypatch):
    with torch.no_grad():
        tiny_policy.denoiser.conv_out.weight.add_(0.1)
    tiny_policy.pipeline.save_pretrained(tmp_path / "run" / "model")

    def measure(*steps):
        return variance.measure_variance(tmp_path, "the command", tmp_path / "run", {"commit": "c"}, steps, images=4, pool=2,
                                         model=str(tiny_model))

    three = measure(3).splitlines()[-1]
    assert three.startswith("| 3 | ") and three.count("±") == 6
    assert measure(3, 4).splitlines()[-2] == three and len(runs.read_lines(tmp_path / "variance.jsonl")) == 2
    monkeypatch.setattr(variance, "measure_snr", lambda *args: pytest.fail("nothing is missing"))
    assert measure(3, 4).splitlines()[-2] == three and (tmp_path / "variance.png").exists()


# ---- The centred ratio ----


def test_a_centred_ratio_is_without_the_term_that_makes_it_fall(tiny_policy):
    trajectory = sampling.rollout(tiny_policy, ["a cat", "a dog"], rng(), 2)
    tiny_policy.reference = tiny_policy.weights()
    with torch.no_grad():
        for weight in tiny_policy.denoiser.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=rng())
        ratios = []
        for k in range(4):
            plain, centred = (scored(tiny_policy, trajectory, torch.arange(2), k)[0] - trajectory.log_probs[:, k] for scored in (
                sampling.score, centred_ratio.centred_score))
            state, x_prev = (trajectory.latents[:, k], k, trajectory.prompts), trajectory.latents[:, k + 1]
            mean, sigma = sampling.p_mean_sigma(tiny_policy, *state)
            with tiny_policy.with_weights(tiny_policy.reference):
                old_mean, _ = sampling.p_mean_sigma(tiny_policy, *state)
            torch.testing.assert_close(centred, ((x_prev - old_mean) * (mean - old_mean) / sigma**2).mean((1, 2, 3)), rtol=1e-3, atol=1e-6)
            ratios.append(torch.stack([plain, centred]))
    plain, centred = torch.stack(ratios, 1).flatten(1)
    assert (plain < centred).all() and plain.mean() < -2 * centred.mean().abs()


def test_a_centred_update_begins_at_a_ratio_of_one_and_leaves_the_method_as_it_was(tiny_policy):
    trajectory = sampling.rollout(tiny_policy, ["a cat", "a dog"], rng(), 2)
    info = centred_ratio.centred_update(tiny_policy, trajectory, torch.tensor([1.0, -1.0]), loss=ddpo.clipped_loss, **learner(tiny_policy))
    assert info["ratio_deviation"] < 1e-5 and info["kl_pretrained"] == 0 and ddpo.score is sampling.score


# ---- The benchmark ----


def test_the_benchmark_measures_what_train_does(tiny_model, capsys):
    for algorithm in ("ddpo-is", "rwr"):
        assert benchmark.main(["--model", str(tiny_model), "--images", "3", "--algorithm", algorithm]) == 0
    told = capsys.readouterr().out.splitlines()
    assert float(told[4].split("|")[6]) < 5e-6 and [row for row in told if row.startswith("| fp32 |")]
    assert benchmark.main(["--peak-tflops", "100", "--preset", "sdxl"]) == 2 and "--preset paper or lora" in capsys.readouterr().err
    assert benchmark.main(["--images", "0"]) == 2 and "--images: must be at least 1" in capsys.readouterr().err


def test_the_benchmark_of_rewards_goes_through_their_real_loading_code(monkeypatch, capsys):
    wide = {**LAYERS, "hidden_size": 64, "intermediate_size": 64}
    monkeypatch.setattr(random_networks, "CLIP_L", TINY_CLIP)
    monkeypatch.setattr(random_networks, "CLIP_H", TINY_CLIP)
    monkeypatch.setattr(random_networks, "BLIP", (dict(image_size=32, patch_size=8, **wide),
                                            dict(encoder_hidden_size=64, vocab_size=900, **wide)))
    monkeypatch.setattr(random_networks, "LLAVA", dict(TINY_CLIP, text_config=dict(vocab_size=200, **LAYERS)))
    monkeypatch.setattr(random_networks, "DEBERTA", dict(random_networks.DEBERTA, vocab_size=900, **LAYERS))
    names = list(random_networks.RANDOM_REWARDS)
    assert benchmark.main(["--reward", *names, "--images", "3"]) == 0
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == names and all(float(row[2]) > 0 for row in rows)
    assert set(names) == set(rewards.LEARNED) - {"hpsv2"}  # hpsv2 has the network of pickscore
    assert benchmark.main(["--reward", "aesthetic", "--precision", "fp32"]) == 2
    assert "--precision does not go with --reward" in capsys.readouterr().err


# ---- Memory, and a machine with a GPU ----

def test_a_counter_sees_what_lives_at_one_time():
    with FakeTensorMode(), memory.Counter() as counter:
        a = torch.zeros(1000)                    # 4,000 bytes
        b = (a + 1).view(10, 100)                # 8,000; a view is no new memory
        b += 1
        del a                                    # 4,000
        c = torch.cat([b, b]) * 2                # 4,000 + 2 x 8,000, of which one goes
    assert (counter.now, counter.peak) == (12_000, 20_000) and c.shape == (20, 100)


def test_counted_memory_is_that_of_the_weights_their_moments_and_the_activations(monkeypatch):
    _, encoding, _, side, options = memory.MODELS["Stable Diffusion 1.5"]
    monkeypatch.setitem(memory.MODELS, "Stable Diffusion 1.5", (
        tiny_pipeline, lambda n: tuple(state[:, :16, :16] for state in encoding(n)), 0.001, 16, options))
    config = settings.build_config({"preset": "paper", "precision": "bf16", "device": "cpu"})
    full = memory.counted(memory.epoch("Stable Diffusion 1.5", config, False, 4, (8, 16)))
    pipeline = tiny_pipeline()
    of_unet, of_vae = (sum(weight.numel() * 4 / 1e9 for weight in network.parameters()) for network in (pipeline.unet, pipeline.vae))
    chains = 256 * 51 * 256 * 4 / 1e9
    activations = 2 * (full["learning, micro-batch 16"] - full["learning, micro-batch 8"])  # of 16 images
    static = 4 * of_unet + of_vae + 0.002 + chains  # weights, gradients, two moments; a million weights of the text encoder in half precision
    assert full["learning, micro-batch 16"] - activations == pytest.approx(static, rel=0.1)
    assert 3 * of_unet + of_vae + chains < full["sampling"] < full["learning, micro-batch 8"]
    assert set(full) == {"the first update", "sampling", "decoding", "learning, micro-batch 8", "learning, micro-batch 16"}


@pytest.mark.parametrize("name", ["FLUX.1 dev", "Z-Image"])
def test_the_counted_models_have_the_size_that_they_are_known_for(name):
    make, encoding, *_ = memory.MODELS[name]
    with FakeTensorMode():
        pipeline = make()
        size = sum(weight.numel() for weight in pipeline.transformer.parameters()) / 1e9
        assert encoding(2)[0][0].shape[-1] == {"FLUX.1 dev": 4096, "Z-Image": 2560}[name]
    assert size == pytest.approx({"FLUX.1 dev": 11.9, "Z-Image": 6.15}[name], rel=0.01)


def test_the_hosts_memory_is_measured_and_nothing_is_left(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(memory, "write_stable_diffusion", lambda folder: shutil.copytree(tiny_model, folder))
    assert memory.main(["--host"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["loading the pipeline", "with the optimizer's moments", "saving 0.0 GB", "resuming"]
    assert all(0 < float(row[2]) < 24 for row in rows) and not Path("runs/memory-of-the-host").exists()


# ---- Universal guidance ----


def test_the_scale_is_that_of_the_most_reward_among_those_that_keep_the_watched_reward():
    assert guidance.chosen_scale({0.0: [0.1, 1.0], 1.0: [0.3, 0.95], 3.0: [0.4, 0.91], 9.0: [0.8, 0.5]}) == 3.0
    assert guidance.chosen_scale({0.0: [0.1], 1.0: [0.3], 9.0: [0.8]}) == 9.0
    assert guidance.chosen_scale({0.0: [0.1, -2.0], 1.0: [0.3, -2.1], 9.0: [0.8, -3.0]}) == 1.0
    assert guidance.chosen_scale({0.0: [0.1, float("nan")], 9.0: [0.8, float("nan")]}) == 9.0


def test_guidance_is_told_beside_the_base_model_and_the_trained_one(tiny_model, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(guidance, "guided_rollout", lambda *args, **settings: asked.append(
        (settings["scale"], settings["backward_steps"])) or guided_rollout(*args, **settings))
    red = f"{ROOT / 'studies' / 'redness.py'}:redness"
    run(*tiny_flags(tiny_model, name="red", reward=red, epochs=1))
    assert guidance.main(["runs/red", "--scales", "3", "--recurrences", "2", "--backward-steps", "1"]) == 0
    assert asked == [(0, 0), (3, 1), (3, 1)]  # without guidance there is none of either kind
    rows = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == rows[4] == ["", "redness", "animal", "number", "seconds a picture"]
    assert [row[0] for row in rows if "redness" not in row and row[0] != "---"] == [
        "g = 0", "g = 3", "base model", "universal guidance, g = 3, k = 2, m = 1", "ddpo-is, 4 queries"]
    assert float(rows[3][1].split(" ")[0]) > float(rows[2][1].split(" ")[0])  # more redness at the larger scale
    assert Path("runs/red/guidance.png").exists()
    run(*tiny_flags(tiny_model, name="small", epochs=1))
    for flags, message in ((["runs/small"], "needs the gradient of the reward, and compressibility has none"),
                           (["runs/nothing"], "is not the folder of a run"), (["runs/red", "--recurrences", "0"], "--recurrences 0"),
                           (["runs/red", "--scales", "nan"], "must be positive"), (["runs/red", "--precision", "fp8"], "invalid choice"), (["runs/red", "--device", "x"], "--device x")):
        assert guidance.main(flags) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("guidance.py")]
        assert len(told) == 1 and message in told[0]
