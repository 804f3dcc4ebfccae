"""The embedded model, its judge and its VLM: they do what their cards say."""
import numpy as np
import pytest
import settings
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import prompts
import train
from conftest import EMOJI, EMOJI_FLOW, EMOJI_VLM, rng
from emoji import judge, pretrain
from policy import load_policy
from rewards import load_reward


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("model", [EMOJI, EMOJI_FLOW], ids=["diffusion", "flow"])
def test_the_embedded_models_draw_what_they_are_asked_with_plain_diffusers(model):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    asked = [(animal, 1) for animal in judge.ANIMALS[::3]] + [(animal, 2 + k % 3) for k, animal in enumerate(judge.ANIMALS[1::8])]
    images = pipeline([prompts.with_number(*pair) for pair in asked], num_inference_steps=10, eta=1.0, guidance_scale=3.0,
                      generator=rng(), output_type="pt").images
    with torch.no_grad():
        seen = judge.name_animals(judge.load_judge(judge.WEIGHTS), images)
    right = np.array([[one == other for one, other in zip(pair, said)] for pair, said in zip(asked, seen)])
    assert images.shape == (35, 3, 64, 64) and (right.mean(0) >= 0.95).all(), right.mean(0)
    assert size(model) < 12e6


def test_the_embedded_vlm_and_the_judge_see_what_the_embedded_model_drew():
    config = settings.build_config({"reward": "alignment", "guidance_scale": 5.0, "sampling_steps": 10, "eval_prompts": 27})
    chosen, images = train.draw_fixed(train.policy_of(config), prompts.load_prompts(config.prompts), config)

    def reward(name, asked=chosen):
        return load_reward(name, nan_allowed=name in config.watch, **settings.reward_options(config, name))(images, asked)

    values, answers = reward("alignment")
    assert sum(answer == prompt.text for answer, prompt in zip(answers, chosen)) >= 24
    others, same_answers = reward("alignment", chosen[13:] + chosen[:13])  # other animals, in other numbers
    assert values.mean() > 0.95 > others.mean() + 0.2 and same_answers == answers  # it does not see the prompt
    marks, notes = reward("counting")
    assert marks.mean() > 0.9 and all(note.split(" / ")[0] in prompts.NUMBER_WORDS for note in notes)
    animal, number = (reward(name)[0] for name in config.watch)
    assert animal.mean() > 0.9 and number.mean() > 0.9 and {*animal.tolist(), *number.tolist()} <= {0, 1}
    assert reward(config.watch[0], chosen[13:] + chosen[:13])[0].mean() < 0.1
    assert size(EMOJI_VLM) < 8e6


def test_the_judge_marks_animal_and_number_and_knows_what_it_can_judge(monkeypatch):
    monkeypatch.setattr(judge, "name_animals", lambda network, images: [("cat", 2), ("mouse", 3), ("owl", 1), ("cat", 1)])
    images, texts = torch.rand(4, 3, 64, 64), ["two cats", "two mice", "five cats", "cat"]
    seen = {function: [str(mark) for mark in function(images, texts)] for function in (
        judge.animal, judge.number, judge.animal_and_number)}
    assert seen == {judge.animal: ["1.0", "1.0", "nan", "1.0"], judge.number: ["1.0", "0.0", "nan", "1.0"],
                    judge.animal_and_number: ["1.0", "0.0", "nan", "1.0"]}
    assert [str(mark) for mark in judge.animal(images[:, :, :32], texts)] == ["nan"] * 4
    assert {function.unit for function in seen} == {"%"}


def test_the_judges_animals_are_those_of_the_prompt_sets():
    assert judge.ANIMALS == prompts.COMMON_ANIMALS + prompts.UNSEEN_EMOJI_ANIMALS  # class k of its first output


def test_the_check_uses_the_presets_steps_and_guidance():
    args = pretrain.parse([])
    config = settings.build_config({})
    assert (args.sampling_steps, args.guidance_scale) == (config.sampling_steps, settings.usual_guidance(config))
    assert (args.output, args.vlm_output) == (EMOJI, EMOJI_VLM)


def test_the_frechet_distance_is_that_of_its_formula():
    random = np.random.default_rng(0)
    features = random.normal(size=(50, 4)) @ random.normal(size=(4, 4))
    assert pretrain.frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    # C' = 4 C, so that C + C' - 2 (C C')^1/2 = C
    assert pretrain.frechet_distance(features, 2 * features + 3) == pytest.approx(
        ((features.mean(0) + 3) ** 2).sum() + np.cov(features, rowvar=False).trace())
    others = random.normal(size=(40, 4)) @ random.normal(size=(4, 4))
    covariances = [np.cov(part, rowvar=False) for part in (features, others)]
    expected = ((features.mean(0) - others.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * np.sqrt(
        np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    assert pretrain.frechet_distance(features, others) == pytest.approx(expected)


@pytest.mark.parametrize("flags, message", [
    (["--vlm", "--vlm-steps", "0"], "--vlm-steps 0: must be at least 1"), (["--denoiser-steps", "0"], "--denoiser-steps 0: must be at least 1"),
    (["--start", str(EMOJI), "--judge-steps", "-1"], "--judge-steps -1: must be at least 0"), (["--scenes", "32"], "--scenes 32"),
    (["--denoiser-batch", "0"], "--denoiser-batch 0: must be at least 1"), (["--flow", "--scenes", "100"], "--scenes 100: a step takes 512"),
    (["--flow", "--flow-steps", "0"], "--flow-steps 0: must be at least 1"), (["--vlm", "--start", str(EMOJI)], "--start is not for --vlm"),
    (["--check", "--output", "nowhere"], "there is no nowhere/model_index.json"), (["--start", "nowhere"], "no model is there")])
def test_pretraining_answers_a_mistake_in_one_line_before_it_trains(flags, message):
    with pytest.raises(SystemExit, match=message):
        pretrain.refuse_mistakes(pretrain.parse(["--font", str(EMOJI / "model_index.json"), *flags]))


def test_each_pass_over_the_scenes_takes_every_one_once_in_a_new_order():
    scenes = np.array([3, 5, 5, 7, 11, 13])  # 5 is drawn twice
    passes = [[pretrain.batch(scenes, step, 2)[0].tolist() for step in (first, first + 1, first + 2)] for first in (0, 3, 6)]
    assert all(sorted(sum(steps, [])) == scenes.tolist() for steps in passes)
    assert passes[0] != passes[1] != passes[2] and pretrain.batch(scenes, 1, 2)[0].tolist() == passes[0][1]


def test_a_training_can_start_from_a_models_weights():
    args = pretrain.parse(["--start", str(EMOJI)])
    network = pretrain.begun(args, unet=pretrain.new_unet())["unet"]
    saved = load_file(EMOJI / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, saved[name].float()) for name, weight in network.state_dict().items())


def test_a_network_of_zero_steps_is_that_of_the_start(tmp_path):
    args = pretrain.parse(["--start", str(EMOJI), "--judge-steps", "0", "--autoencoder-steps", "0", "--work", str(tmp_path)])
    kept, vae = pretrain.train_judge(None, None, None, args), pretrain.train_autoencoder([], args)
    assert not any(network.training for network in (kept, vae)) and not list(tmp_path.iterdir())
    for network, file in ((kept, judge.WEIGHTS), (vae, EMOJI / "vae" / "diffusion_pytorch_model.safetensors")):
        saved = load_file(file)
        assert all(torch.equal(weight, saved[name].to(weight.dtype)) for name, weight in network.state_dict().items())


def test_the_flow_model_begins_with_the_diffusion_models_weights_and_plain_diffusers_draws_it(tmp_path, monkeypatch):
    scenes = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8), np.arange(8), np.arange(8) % 4 + 1
    monkeypatch.setattr(pretrain, "load_pool", lambda args: scenes)
    args = pretrain.parse(["--flow", "--flow-steps", "1", "--denoiser-batch", "8", "--work", str(tmp_path), "--output", str(tmp_path / "flow"), "--device", "cpu"])
    pretrain.remake_flow(args)
    policy, diffusion = (load_policy(model, 10, 1.0, 3.0) for model in (tmp_path / "flow", EMOJI))
    assert policy.schedule.prediction_type == "flow" and policy.schedule.actions == 9
    moved = max((one - other).abs().max() for one, other in zip(policy.trained.values(), diffusion.trained.values()))
    assert 0 < moved < 1e-2  # one step of a learning rate that warms up
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "flow")
    assert pipeline("a cat", num_inference_steps=2).images[0].size == (64, 64)
