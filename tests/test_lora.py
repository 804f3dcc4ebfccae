"""LoRA: adapters alone train, begin as nothing, are saved as plain diffusers loads them, and cost little."""
import json
from pathlib import Path

import diffusers
import pytest
import settings
import torch
from safetensors import safe_open

import evaluate
import sampling
import train
from conftest import rng, run, tiny_flags, without_seconds
from policy import PRECISIONS, load_lora, load_policy


def moved(policy, seed=1):
    """The policy, with adapters that are no longer 0."""
    with torch.no_grad():
        for name, weight in policy.trained.items():
            weight.add_(torch.randn(weight.shape, generator=rng(seed)), alpha=0.3)
    return policy


def lora(model, **options):
    return load_policy(model, 4, 1.0, 5.0, lora_rank=4, **options)


def test_adapters_alone_train_and_begin_as_the_pretrained_policy(tiny_model):
    policy, pretrained = lora(tiny_model), load_policy(tiny_model, 4, 1.0, 5.0)
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
    for k in range(4):
        log_probs, _ = sampling.score(policy, trajectory, torch.arange(2), k)
        assert torch.allclose(log_probs, trajectory.log_probs[:, k], atol=2e-6 if precision == "fp32" else 2e-3)
    frozen = policy.denoiser.conv_in, policy.pipeline.text_encoder.get_input_embeddings()
    assert {network.weight.dtype for network in frozen} == {PRECISIONS[precision]}
    assert policy.decode(trajectory.x_0).dtype == torch.float32
    assert {weight.dtype for weight in policy.trained.values()} == {torch.float32}


def test_the_reference_of_the_kl_is_the_pretrained_unet(tiny_model):
    policy, pretrained = moved(lora(tiny_model, keep_reference=True)), load_policy(tiny_model, 4, 1.0, 5.0)
    state = torch.randn(2, 4, 8, 8, generator=rng()), policy.schedule.timesteps[1], ["a cat", "a dog"]
    with torch.no_grad():
        before = policy.predict(*state)
        with policy.with_weights(policy.reference):
            reference = policy.predict(*state)
        want, after = pretrained.predict(*state), policy.predict(*state)
    assert torch.equal(reference, want) and torch.equal(before, after) and not torch.equal(before, want)
    trajectory = sampling.rollout(policy, ["a cat"], rng(), 1)
    log_probs, kl = sampling.score(policy, trajectory, torch.tensor([0]), 1)
    (log_probs + kl).sum().backward()
    assert kl > 0 and all(weight.grad is not None for weight in policy.trained.values())


@pytest.mark.parametrize("alpha", [0, 8])
def test_plain_diffusers_predicts_what_the_policy_predicts_with_its_alpha_too(tiny_model, alpha):
    policy = moved(lora(tiny_model, lora_alpha=alpha))
    policy.save("saved")
    assert [path.name for path in Path("saved").iterdir()] == ["pytorch_lora_weights.safetensors"]
    with safe_open("saved/pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"]) == (4, alpha or 4)  # without these another alpha would be guessed
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights("saved")
    loaded = load_policy(tiny_model, 4, 1.0, 5.0, trains=False)
    load_lora(loaded, "saved")
    x, t, states = torch.randn(2, 4, 8, 8, generator=rng(2)), torch.tensor([5, 700]), pipeline.encode_prompt(["a cat"] * 2, "cpu", 1, False)[0]
    with torch.no_grad():
        want, *others = (unet(x, t, states).sample for unet in (policy.denoiser, pipeline.unet, loaded.denoiser))
    assert all(torch.equal(one, want) for one in others)


def test_a_resumed_lora_run_equals_one_never_stopped_trains_and_keeps_little(tiny_model, own_reward):
    flags = {"lora-rank": 2, "reward": own_reward("redness"), "checkpoint-every": 1}
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=2, **flags))
    run(*tiny_flags(tiny_model, name="parts", epochs=1, **flags))
    stopped = torch.load("runs/parts/checkpoint/state.pt", weights_only=True)["weights"]
    assert without_seconds(run("--resume", "runs/parts", "--epochs", 2)) == without_seconds(whole)
    one, two = (torch.load(f"runs/{name}/checkpoint/state.pt", weights_only=True)["weights"] for name in ("whole", "parts"))
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
    lora(tiny_model).save("saved")
    run(*tiny_flags("saved"), code=2)
    assert "it is a LoRA, not a whole model: give the model that it was trained beside" in capsys.readouterr().err


def test_the_default_learning_rate_follows_the_mode_and_that_of_the_other_is_told(tiny_model, capsys):
    rates = [settings.build_config({"preset": preset, "precision": "fp32"}).learning_rate for preset in ("paper", "lora", "sdxl", "flow")]
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


def test_adapters_of_another_model_are_refused_and_so_is_lora_where_diffusers_has_none(tiny_model, tiny_sd3):
    lora(tiny_sd3).save("saved")
    with pytest.raises(ValueError, match="LoRA 'saved': "):
        load_lora(load_policy(tiny_model, 4, trains=False), "saved")
