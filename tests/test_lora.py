"""LoRA: adapters alone train, begin as nothing, are saved as plain diffusers loads them, and cost little."""
import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open

import sampling
from conftest import load_policy, rng, run, tiny_flags
from support.loading import load_lora, save_pipeline


def lora(model, **options):
    return load_policy(model, 4, lora_rank=4, **options)


def moved(policy):
    """The policy, with adapters that are no longer 0."""
    with torch.no_grad():
        for weight in policy.trained.values():
            weight.add_(torch.randn(weight.shape, generator=rng(1)), alpha=0.3)
    return policy


def test_adapters_alone_train_from_their_seed_and_begin_as_the_pretrained_policy(tiny_model):
    before, pretrained = torch.get_rng_state(), load_policy(tiny_model, 4, trains=False)
    policy, again, other = (lora(tiny_model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)  # no other generator moves
    assert all(torch.equal(again.trained[name], weight) for name, weight in policy.trained.items())
    assert any(not torch.equal(other.trained[name], weight) for name, weight in policy.trained.items())
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in policy.trained}
    assert layers == {"to_q", "to_k", "to_v", "0"}  # to_out.0
    one, two, want = (sampling.rollout(drawn, ["a cat"], rng(), 1).latents
                      for drawn in (policy, moved(again), pretrained))
    assert torch.equal(one, want) and not torch.allclose(two, want, atol=1e-2)


@pytest.mark.parametrize("alpha", [0, 8])
def test_plain_diffusers_predicts_what_the_policy_predicts_with_its_alpha_too(tiny_model, alpha):
    policy = moved(lora(tiny_model, lora_alpha=alpha))
    save_pipeline(policy.pipeline, "saved")
    assert [path.name for path in Path("saved").iterdir()] == ["pytorch_lora_weights.safetensors"]
    with safe_open("saved/pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])  # else another alpha would be guessed
    assert (told["unet.r"], told["unet.lora_alpha"]) == (4, alpha or 4)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights("saved")
    loaded = load_policy(tiny_model, 4, trains=False)
    load_lora(loaded.pipeline, "saved")
    x, t = torch.randn(2, 4, 8, 8, generator=rng(2)), torch.tensor([5, 700])
    states, _ = pipeline.encode_prompt(["a cat"] * 2, "cpu", 1, False)
    with torch.no_grad():
        want = policy.denoiser(x, t, states).sample
        assert all(torch.equal(unet(x, t, states).sample, want) for unet in (pipeline.unet, loaded.denoiser))


def test_a_lora_is_not_taken_for_a_whole_model_nor_for_another_models(tiny_model, tiny_sd3, capsys):
    save_pipeline(lora(tiny_sd3).pipeline, "saved")
    with pytest.raises(ValueError, match="LoRA 'saved': "):
        load_lora(load_policy(tiny_model, 4, trains=False).pipeline, "saved")
    run(*tiny_flags("saved"), code=2)
    assert "it is a LoRA, not a whole model: give the model that it was trained" in capsys.readouterr().err
