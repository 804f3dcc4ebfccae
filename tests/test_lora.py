"""LoRA: adapters alone train, begin as nothing, are saved as plain diffusers loads them, and cost little."""
import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import sampling
from conftest import load_policy, rng, run, tiny_flags
from support import run_folder
from support.loading import load_lora, save_pipeline

FILE = "saved/pytorch_lora_weights.safetensors"


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


@pytest.mark.parametrize("change", [
    "another model's", "without prefix", "of a transformer", "one less", "one more"])
def test_adapters_that_do_not_fit_or_not_all_are_refused(change, tiny_model, tiny_sd3):
    save_pipeline(lora(tiny_sd3 if change == "another model's" else tiny_model).pipeline, "saved")
    weights = load_file(FILE)
    first, *_ = weights
    save_file({"without prefix": {name.partition(".")[2]: weight for name, weight in weights.items()},
               "of a transformer": {f"transformer{name[4:]}": weight for name, weight in weights.items()},
               "one less": {name: weight for name, weight in weights.items() if name != first},
               "one more": {**weights, first.replace("attn1", "attn9"): weights[first].clone()}
               }.get(change, weights), FILE, {"format": "pt"})
    with pytest.raises(ValueError, match="LoRA 'saved': it does not fit this model: of .* the first is "):
        load_lora(load_policy(tiny_model, 4, trains=False).pipeline, "saved")


def test_a_folder_of_adapters_is_a_model_if_it_says_beside_which_it_was_trained(tiny_model, capsys):
    policy = moved(lora(tiny_model))
    save_pipeline(policy.pipeline, "saved")
    save_file(load_file(FILE), FILE, {"format": "pt"})  # no metadata
    run(*tiny_flags("saved"), code=2)
    assert "it is a LoRA, which does not say beside which model" in capsys.readouterr().err
    Path("saved/README.md").write_text(f"---\nbase_model: {tiny_model}\n---\n")
    save_pipeline(policy.pipeline, "told")
    edit = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}  # as older programs name them
    save_file({re.sub("|".join(edit), lambda old: edit[old[0]], name): weight
               for name, weight in load_file(FILE).items()}, FILE, {"format": "pt"})
    want = sampling.rollout(policy, ["a cat"], rng(), 1).x_0
    for folder in ("saved", "told"):
        one = load_policy(folder, 4)
        torch.testing.assert_close(sampling.rollout(one, ["a cat"], rng(), 1).x_0, want, rtol=0, atol=1e-4)
        assert one.trained.keys() == load_policy(tiny_model, 4).trained.keys()
    save_pipeline(lora("told").pipeline, "again")  # adapters beside a model of adapters
    again = load_policy("again", 4)
    torch.testing.assert_close(sampling.rollout(again, ["a cat"], rng(), 1).x_0, want, rtol=0, atol=1e-4)


def test_what_a_run_on_a_folder_of_adapters_began_from_is_that_folder_in_its_evaluation(tiny_model, capsys):
    save_pipeline(moved(lora(tiny_model)).pipeline, "saved")
    rows = run(*tiny_flags("saved", **{"learning-rate": 1e-9, "lora-rank": 2, "watch": "none"}))
    assert evaluate.main(["runs/r"]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert {cell.partition(" ")[0] for cell in cells[4:6]} == {f"{-rows[0]['eval_reward_mean']:.2f}"}


def test_a_runs_adapters_are_merged_into_a_pipeline_that_plain_diffusers_loads(tiny_model, capsys):
    run(*tiny_flags(tiny_model, **{"lora-rank": 2, "learning-rate": 1e-1}))
    checkpoint = run_folder.load_checkpoint(Path("runs/r"))  # as of a run on a GPU
    checkpoint["settings"].update(precision="fp16", device="cuda")
    torch.save(checkpoint, "runs/r/new.pt")
    Path("runs/r/new.pt").rename("runs/r/checkpoint.pt")
    run(*tiny_flags(tiny_model, name="whole", epochs=1))
    assert evaluate.main(["runs/r", "--merge", "merged"]) == 0
    assert evaluate.main(["runs/whole", "--merge", "no"]) == 2 and not Path("no").exists()
    assert evaluate.main(["runs/r", "--merge", "runs/r/model"]) == 2  # which stays as it is
    assert len([*Path("runs/r/model").iterdir()]) == 2  # weights and card
    one, two, base = (diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
                      for folder in ("merged", tiny_model, tiny_model))
    two.load_lora_weights("runs/r/model")
    assert type(one.scheduler) is type(base.scheduler)
    draw = dict(prompt="a cat", num_inference_steps=2, output_type="pt")
    merged, beside, before = (pipeline(**draw, generator=rng()).images for pipeline in (one, two, base))
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-3)
