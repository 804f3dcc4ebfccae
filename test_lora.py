"""LoRA: adapters alone train, begin as nothing, are saved as plain diffusers loads them, and cost little."""
import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open

import evaluate
import models
import sampling
import settings
import train
from conftest import rng, run, tiny_flags, without_seconds


def moved(policy, seed=1):
    """The policy, with adapters that are no longer 0."""
    with torch.no_grad():
        for name, weight in policy.trained.items():
            weight.add_(torch.randn(weight.shape, generator=rng(seed)), alpha=0.3)
    return policy


def lora(model, **options):
    return sampling.load_policy(model, 4, 1.0, 5.0, lora_rank=4, **options)


def test_adapters_alone_train_and_begin_as_the_pretrained_policy(tiny_model):
    policy, pretrained = lora(tiny_model), sampling.load_policy(tiny_model, 4, 1.0, 5.0)
    assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in policy.trained.items()) and policy.trained
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in policy.trained} == {"to_q", "to_k", "to_v", "0"}  # to_out.0
    drawn, want = (sampling.rollout(one, ["a cat"], rng(), 1).latents for one in (policy, pretrained))
    assert torch.equal(drawn, want)
    assert not torch.allclose(sampling.rollout(moved(policy), ["a cat"], rng(), 1).latents, want, atol=1e-2)


def test_adapters_are_drawn_from_the_seed_and_no_other_generator_moves(tiny_model):
    before = torch.get_rng_state()
    one, two, other = (lora(tiny_model, seed=seed).trained for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one) and any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ratio_is_one_and_what_does_not_train_is_kept_in_the_autocasts_precision(precision, tiny_model):
    policy = moved(lora(tiny_model, precision=precision))
    trajectory = sampling.rollout(policy, ["a cat", "a dog"], rng(), 2)
    images, steps = torch.cartesian_prod(torch.arange(2), torch.arange(4)).T
    log_probs, _ = sampling.score(policy, trajectory, images, steps)
    assert torch.allclose(log_probs, trajectory.log_probs.flatten(), atol=2e-6 if precision == "fp32" else 2e-3)
    frozen = policy.denoiser.conv_in, policy.pipeline.vae.decoder.conv_in, policy.pipeline.text_encoder.get_input_embeddings()
    assert {network.weight.dtype for network in frozen} == {models.PRECISIONS[precision]}
    assert models.decode(policy.pipeline, trajectory.x_0, precision).dtype == torch.float32
    assert {weight.dtype for weight in policy.trained.values()} == {torch.float32}


def test_the_reference_of_the_kl_is_the_pretrained_unet(tiny_model):
    policy, pretrained = moved(lora(tiny_model, keep_reference=True)), sampling.load_policy(tiny_model, 4, 1.0, 5.0)
    x_t, t = torch.randn(2, 4, 8, 8, generator=rng()), policy.schedule.timesteps[:2]
    states = models.encode_prompts(pretrained.pipeline, ["a cat", "a dog"])
    with torch.no_grad():
        before, reference, want, after = (sampling.predict(one, x_t, t, states) for one in (
            policy, policy.reference, pretrained, policy))
    assert torch.equal(reference, want) and torch.equal(before, after) and not torch.equal(before, want)
    trajectory = sampling.rollout(policy, ["a cat"], rng(), 1)
    log_probs, kl = sampling.score(policy, trajectory, torch.tensor([0]), torch.tensor([1]))
    (log_probs + kl).sum().backward()
    assert kl > 0 and all(weight.grad is not None for weight in policy.trained.values())


def test_plain_diffusers_draws_what_the_policy_drew(tiny_model):
    policy = moved(lora(tiny_model))
    models.save_pipeline(policy.pipeline, "saved")
    assert [path.name for path in Path("saved").iterdir()] == ["pytorch_lora_weights.safetensors"]
    with safe_open("saved/pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"]) == (4, 4)  # without these another alpha would be guessed
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights("saved")
    pipeline.scheduler = policy.pipeline.scheduler
    noise = torch.randn(1, 4, 8, 8, generator=rng())
    drawn = pipeline("a cat", latents=noise, num_inference_steps=4, eta=0.0, guidance_scale=5.0, output_type="latent").images
    silent = sampling.load_policy(tiny_model, 4, 0.0, 5.0, scored=False)
    models.load_lora(silent.pipeline, "saved")
    x_t, states = noise, models.encode_prompts(silent.pipeline, ["a cat"])
    with torch.no_grad():
        for t in silent.schedule.timesteps:
            x_t, _ = sampling.p_mean_sigma(silent, x_t, t.expand(1), states)
        x, t = torch.randn(2, 4, 8, 8, generator=rng(2)), torch.tensor([5, 700])
        one, two = (unet(x, t, states[0][0].expand(2, -1, -1)).sample for unet in (pipeline.unet, policy.denoiser))
    assert torch.equal(one, two) and torch.allclose(drawn, x_t, atol=1e-5)


def test_a_resumed_lora_run_equals_one_never_stopped_trains_and_keeps_little(tiny_model, own_reward):
    flags = {"lora-rank": 2, "reward": own_reward("redness"), "checkpoint-every": 1}
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=2, **flags))
    run(*tiny_flags(tiny_model, name="parts", epochs=1, **flags))
    stopped = torch.load("runs/parts/checkpoint/state.pt", weights_only=True)["unet"]
    assert without_seconds(run("--resume", "runs/parts", "--epochs", 2)) == without_seconds(whole)
    one, two = (torch.load(f"runs/{name}/checkpoint/state.pt", weights_only=True)["unet"] for name in ("whole", "parts"))
    assert all(".lora_" in name and torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(two[name], stopped[name]) for name in two)


def test_evaluate_takes_a_lora_run_and_its_folder_alone(tiny_model, capsys):
    run(*tiny_flags(tiny_model, epochs=1, precision="bf16", **{"lora-rank": 2, "learning-rate": 0.1}))
    capsys.readouterr()
    assert evaluate.main(["runs/r"]) == 0
    assert evaluate.main(["runs/r/model", "--base", str(tiny_model), "--images", "3", "--sampling-steps", "3", "--precision", "bf16"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "compressibility" in line]
    assert rows[0].split("|")[5:] == rows[1].split("|")[5:] and rows[0].split("|")[5] != rows[0].split("|")[6]


def test_a_lora_is_not_taken_for_a_whole_model(tiny_model, capsys):
    models.save_pipeline(lora(tiny_model).pipeline, "saved")
    run(*tiny_flags("saved"), code=2)
    assert "is a LoRA, not a whole model: give the model that it was trained beside" in capsys.readouterr().err


def test_the_default_learning_rate_follows_the_mode_and_that_of_the_other_is_told(tiny_model, capsys):
    rates = [settings.build_config({"preset": preset, "precision": "fp32"}).learning_rate for preset in ("paper", "lora", "sdxl", "sd3")]
    assert rates == [1e-5, 3e-4, 3e-4, 3e-4]
    assert settings.build_config({"lora_rank": 4}).learning_rate == 3e-3 and settings.build_config({}).learning_rate == 2e-4
    for rank, rate, message in ((2, 1e-5, "adapters learn next to nothing"), (0, 3e-4, "is LoRA's: with it all weights")):
        train.main([*tiny_flags(tiny_model, name=f"r{rank}", epochs=1), "--preset", "paper", "--precision", "fp32", "--reward",
                    "compressibility", "--lora-rank", str(rank), "--learning-rate", str(rate), "--eval-prompts", "3"])
        assert message in capsys.readouterr().out


def test_gradient_checkpointing_changes_memory_alone(tiny_model):
    plain = run(*tiny_flags(tiny_model, name="plain", epochs=1))
    less = run(*tiny_flags(tiny_model, name="less", epochs=1), "--gradient-checkpointing")
    assert without_seconds(less) == without_seconds(plain)
