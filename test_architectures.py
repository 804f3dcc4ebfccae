"""The claims hold for every architecture: tiny random pipelines, through the real loading code."""
import shutil

import diffusers
import pytest
import torch

import baselines_rwr
import ddpo
import models
import pipelines
import sampling
from conftest import learner, rng, run, tiny_flags, weights

TEXTS = ["a cat", "two dogs"]
PIPELINES = {"tiny_sdxl": diffusers.StableDiffusionXLPipeline, "tiny_sd3": diffusers.StableDiffusion3Pipeline}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_without_noise_our_pictures_are_those_of_diffusers_own_pipeline(name, guidance, request):
    folder = request.getfixturevalue(name)
    policy = sampling.load_policy(folder, 4, 0.0, guidance, scored=False)
    images = models.decode(policy.pipeline, sampling.rollout(policy, TEXTS, rng(), 2, keep_chain=False).x_0)
    theirs = PIPELINES[name].from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    if name == "tiny_sdxl":
        theirs.scheduler = policy.pipeline.scheduler  # Euler's steps are DDIM's, but its timesteps are other ones
    x_T = torch.stack([torch.randn(models.latent_shape(policy.pipeline), generator=one) for one in sampling.generators(rng(), 2)])
    size = models.image_size(policy.pipeline)
    drawn = theirs(TEXTS, num_inference_steps=4, guidance_scale=guidance, latents=x_T, height=size[0], width=size[1], output_type="pt").images
    torch.testing.assert_close(images, drawn, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_first_update_has_a_ratio_of_one_and_the_second_has_moved(other_model, lora_rank):
    policy = sampling.load_policy(other_model, 4, 1.0, 5.0, lora_rank=lora_rank, keep_reference=True)
    trajectory = sampling.rollout(policy, TEXTS * 4, rng(), 8)
    extras = learner(policy, 1e-3, kl_weight=1.0, skip_last_steps=2)
    infos = [ddpo.ddpo_update(policy, trajectory, torch.randn(8, generator=rng()), loss=ddpo.clipped_loss, **extras) for _ in range(2)]
    assert infos[0]["ratio_deviation"] <= 5e-6 and infos[1]["ratio_deviation"] > 1e-5
    assert infos[1]["kl_pretrained"] > infos[0]["kl_pretrained"] >= 0
    state = trajectory.latents[:2, 1], trajectory.timesteps[:1].expand(2), models.encode_prompts(policy.pipeline, TEXTS)
    with torch.no_grad():
        now, reference, pretrained = (sampling.predict(one, *state) for one in (
            policy, policy.reference, sampling.load_policy(other_model, 4, 1.0, 5.0)))
    assert torch.equal(reference, pretrained) and not torch.equal(now, pretrained)


def test_micro_batches_change_nothing(other_model):
    moved, start = [], weights(sampling.load_policy(other_model, 4, 1.0, 5.0))
    for micro_batch in (3, 100):
        policy = sampling.load_policy(other_model, 4, 1.0, 5.0)
        trajectory = sampling.rollout(policy, TEXTS * 2, rng(), 4)
        extras = learner(policy, micro_batch=micro_batch, max_grad_norm=1e9, skip_last_steps=2)
        extras["optimizer"] = torch.optim.SGD(policy.denoiser.parameters(), lr=0.1)
        for loss in (ddpo.clipped_loss, ddpo.score_function_loss):
            ddpo.ddpo_update(policy, trajectory, torch.randn(4, generator=rng()), loss=loss, **extras)
        baselines_rwr.rwr_update(policy, trajectory, torch.ones(4), **extras)
        moved.append(weights(policy))
    size = max((moved[0][name] - start[name]).abs().max() for name in start)
    assert size > 0 and max((moved[0][name] - moved[1][name]).abs().max() for name in start) < 1e-3 * size


@pytest.mark.parametrize("model, rank", [("tiny_flow", 0), ("tiny_sdxl", 2), ("tiny_sd3", 0), ("tiny_sd3", 2)])
def test_a_run_is_resumed_and_saved_for_plain_diffusers(model, rank, request):
    other_model = request.getfixturevalue(model)
    flags = {"guidance-scale": 3, "lora-rank": rank, "learning-rate": 1e-3, "precision": "bf16", "noise": "cps"}
    whole = run(*tiny_flags(other_model, name="whole", **flags))
    run(*tiny_flags(other_model, name="parts", **{**flags, "epochs": 1}))
    parts = run("--resume", "runs/parts", "--epochs", "2")
    assert [row["eval_reward_mean"] for row in whole] == [row["eval_reward_mean"] for row in parts]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(other_model if rank else "runs/whole/model", safety_checker=None)
    if rank:
        pipeline.load_lora_weights("runs/whole/model")
    trained = torch.load("runs/whole/checkpoint/state.pt", weights_only=True)["unet"]
    loaded = {name.replace("default_0", "default"): weight for name, weight in models.denoiser_of(pipeline).state_dict().items()}
    assert trained and all(torch.equal(loaded[name], weight) for name, weight in trained.items())
    pipeline.set_progress_bar_config(disable=True)
    size = models.image_size(pipelines.load_pipeline(other_model))
    assert pipeline("a cat", num_inference_steps=2, height=size[0], width=size[1]).images[0].size == size[::-1]


@pytest.mark.parametrize("name, options, message", [
    ("tiny_sd3", {"height": 24}, "Stable Diffusion 3 draws square images of at most 32 pixels"),
    ("tiny_sd3", {"width": 18, "height": 18}, "--height 18: must be a multiple of 4 pixels"),
    ("tiny_sdxl", {"clip_skip": 1}, "--clip-skip 1: it is for Stable Diffusion 1 and 2"),
    ("tiny_sdxl", {"t5": False}, "--no-t5: it is for Stable Diffusion 3; model .* is SDXL")])
def test_what_an_architecture_cannot_do_is_refused_in_one_line(name, options, message, request):
    with pytest.raises(ValueError, match=message):
        pipelines.load_pipeline(request.getfixturevalue(name), **options)


def test_a_part_that_is_missing_is_named(tiny_sd3, tmp_path):
    folder = shutil.copytree(tiny_sd3, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(ValueError, match="not of a Stable Diffusion 3 pipeline: it has no text_encoder_3"):
        pipelines.load_pipeline(folder)
    assert pipelines.load_pipeline(folder, t5=False).text_encoder_3 is None


def test_without_t5_stable_diffusion_3_is_what_diffusers_makes_of_it(tiny_sd3):
    pipeline = pipelines.load_pipeline(tiny_sd3, t5=False)
    assert pipeline.text_encoder_3 is None and pipeline.tokenizer_3 is None
    (states, pooled), _ = models.encode_prompts(pipeline, TEXTS)
    whole, _ = models.encode_prompts(pipelines.load_pipeline(tiny_sd3), TEXTS)
    clips = pipeline.tokenizer.model_max_length
    assert states.shape == whole[0].shape and torch.equal(pooled, whole[1]) and torch.equal(states[:, :clips], whole[0][:, :clips])
    assert (states[:, clips:] == 0).all() and (whole[0][:, clips:] != 0).any()
    assert pipelines.identity_of(pipeline) != pipelines.identity_of(pipelines.load_pipeline(tiny_sd3))
