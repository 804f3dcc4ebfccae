"""DiffusionNFT: its code's loss, its old policy, and what a checkpoint keeps of it."""
from pathlib import Path

import numpy as np
import pytest
import torch

import sampling
import train
from beyond import diffusion_nft
from conftest import learner, load_policy, rng, run, tiny_flags
from policy import Policy
from support.run_folder import load_checkpoint


def their_loss(v, old, x_0_of, x_0, advantages, b):
    """The policy loss of NVlabs/DiffusionNFT, train_nft_sd3.py, where x_0_of(v) is x_t - t v."""
    r = (advantages.clamp(-5, 5) / 5 / 2 + 0.5).clamp(0, 1)
    losses = []
    for mixed in (b * v + (1 - b) * old, (1 + b) * old - b * v):
        predicted = x_0_of(mixed)
        factor = (predicted.double() - x_0.double()).abs().mean((1, 2, 3), keepdim=True)
        factor = factor.clip(min=1e-5).detach()
        losses.append(((predicted - x_0) ** 2 / factor).mean((1, 2, 3)))
    return (5 * (r * losses[0] / b + (1 - r) * losses[1] / b)).mean()


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("b", [1.0, 0.1])
def test_the_loss_and_its_gradient_on_v_are_those_of_its_code(b, kind):
    old, x_0, eps = torch.randn(3, 4, 4, 8, 8, generator=rng())
    v = (old + 0.1 * torch.randn(old.shape, generator=rng(1))).requires_grad_()
    t = torch.tensor([0.02, 0.3, 0.7, 0.98]).view(-1, 1, 1, 1)
    advantages, x_t = torch.tensor([6.0, -1.0, 0.0, -7.0]), (1 - t) * x_0 + t * eps

    def x_0_of(prediction):
        return sampling.x_0_and_eps(x_t, prediction, 1 - t, t, kind)[0]

    theirs = their_loss(v, old, (lambda v: x_t - t * v) if kind == "flow" else x_0_of, x_0, advantages, b)
    r = 0.5 + (advantages / 5).clamp(-1, 1) / 2
    ours, _ = diffusion_nft.nft_loss(x_0_of(v), x_0_of(old), x_0, r, b)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, v)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    start = x_0_of(old).requires_grad_()
    diffusion_nft.nft_loss(start, start.detach(), x_0, r, b)[0].backward()
    assert (start.grad[2] == 0).all()  # an average image changes nothing
    assert (start.grad[[0, 1, 3]].flatten(1) != 0).all()


def test_preferences_are_those_of_its_code_and_equal_rewards_prefer_nothing():
    prompts, rewards = ["a", "a", "a", "b", "b"] * 8, torch.randn(40, generator=rng()).double() * 3
    rewards[7] = 100
    own = {prompt: np.mean([r for p, r in zip(prompts, rewards.tolist()) if p == prompt]) for prompt in "ab"}
    centred = torch.tensor([r - own[p] for p, r in zip(prompts, rewards.tolist())])
    advantages = centred / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(diffusion_nft.nft_preferences(prompts, rewards).double(),
                               (advantages.clamp(-5, 5) / 5 / 2 + 0.5), rtol=0, atol=1e-6)
    assert diffusion_nft.nft_preferences(prompts, rewards)[7] == 1
    equal = torch.full((40,), 1234.567, dtype=torch.float64)
    torch.testing.assert_close(diffusion_nft.nft_preferences(prompts, equal), torch.full((40,), 0.5))


@pytest.mark.parametrize("rank", [0, 2])
def test_an_epoch_learns_against_one_v_old_at_the_samplers_timesteps_and_then_v_old_follows(
        tiny_model, monkeypatch, rank):
    losses, asked, loss, predict = [], [], diffusion_nft.nft_loss, Policy.predict
    monkeypatch.setattr(diffusion_nft, "nft_loss", lambda *given: losses.append(given) or loss(*given))
    monkeypatch.setattr(Policy, "predict", lambda *given: asked.append(given[1:3]) or predict(*given))
    policy = load_policy(tiny_model, 4, 1.0, 5.0, lora_rank=rank)
    assert policy.copies_of_timesteps and losses == []  # asked once, by calls of its own
    trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain=False)
    given = learner(policy, 1e-2, nft_strength=1.0, updates_per_epoch=3, training_guidance=2.0)
    before, preferences = policy.weights(), torch.rand(8, generator=rng())
    asked.clear()
    diffusion_nft.nft_update(policy, trajectory, preferences, **given)
    first, *others = losses
    assert first[0].requires_grad and not first[1].requires_grad and torch.equal(*first[:2])
    assert all((v - old).abs().max() > 1e-6 for v, old, *_ in others)
    schedule, noise = policy.schedule, []
    for (_, _, x_0, r, _), (x_t, t) in zip(losses, asked[-6::2], strict=True):
        rows = [next(k for k in range(8) if torch.equal(trajectory.x_0[k], one)) for one in x_0]
        assert torch.equal(r, preferences[rows])
        steps = [schedule.timesteps.tolist().index(level) for level in t.tolist()]
        a, b = (values[steps].view(-1, 1, 1, 1) for values in (schedule.a, schedule.b))
        noise.append((x_t - a * x_0) / b)
    assert torch.cat(noise).std() == pytest.approx(1, abs=0.03)
    now, old = policy.weights(), given["learner"].old  # decay_type 1: after 3 updates, 0.003
    for name in now:
        torch.testing.assert_close(old[name], 0.003 * before[name] + 0.997 * now[name], rtol=1e-5, atol=1e-7)
    given["learner"].updates = 999  # at most a half
    diffusion_nft.nft_update(policy, trajectory, preferences, **given)
    later = policy.weights()
    for name in now:
        torch.testing.assert_close(given["learner"].old[name], (0.003 * before[name] + 0.997 * now[name]) / 2
                                   + later[name] / 2, rtol=1e-5, atol=1e-6)


def test_v_old_draws_the_images_and_a_checkpoint_keeps_it(tiny_model, monkeypatch):
    drawn, rollout = [], train.rollout

    def seen(policy, *given, **options):
        drawn.append({name: weight.clone() for name, weight in policy.trained.items()})
        return rollout(policy, *given, **options)

    flags = tiny_flags(tiny_model, **{"algorithm": "nft", "batch-size": 4, "epochs": 1, "eval-every": 9})
    run(*flags)
    state = load_checkpoint(Path("runs/r"))
    monkeypatch.setattr(train, "rollout", seen)
    run("--resume", "runs/r", "--epochs", 2)
    old = state["learner"]["old"]
    assert all(torch.equal(drawn[0][name], old[name]) for name in old)  # the epoch's images
    assert any(not torch.equal(drawn[0][name], state["weights"][name]) for name in old)
    assert load_checkpoint(Path("runs/r"))["learner"]["updates"] == 4
    # The evaluation's are of the weights that train.
    assert all(torch.equal(drawn[1][name], weight)
               for name, weight in load_checkpoint(Path("runs/r"))["weights"].items())
