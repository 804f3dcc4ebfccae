"""DiffusionNFT: its formula, its old policy, and that it follows the reward."""
import pytest
import torch

import baselines_rwr
import sampling
from beyond import diffusion_nft
from conftest import learner, rng
from policy import load_policy


def test_the_loss_of_nft_is_that_of_its_formula_and_an_average_image_changes_nothing():
    old, target = torch.randn(2, 3, 4, 2, 2, generator=rng())
    v, r, b = old + 0.1 * torch.randn(old.shape, generator=rng(1)), torch.tensor([1.0, 0.25, 0.5]), 0.7
    loss, _ = diffusion_nft.nft_loss(v, old, target, r, b)
    expected = sum(r[i] * (((1 - b) * old + b * v - target)[i] ** 2).mean() + (1 - r[i]) * (
        ((1 + b) * old - b * v - target)[i] ** 2).mean() for i in range(3)) / 3
    torch.testing.assert_close(loss, expected)
    start = old.clone().requires_grad_()
    diffusion_nft.nft_loss(start, old, target, r, b)[0].backward()
    torch.testing.assert_close(start.grad, 2 * b * (2 * r - 1)[:, None, None, None] * (old - target)
                               / old.numel())
    assert (start.grad[2] == 0).all()
    assert diffusion_nft.nft_preferences(torch.tensor([-3.0, -1, 0, 0.5, 2])).tolist() == [0, 0, 0.5, 0.75, 1]


@pytest.mark.parametrize("rank", [0, 2])
def test_nft_compares_with_the_weights_that_drew_the_images_all_through_an_epoch(tiny_model, monkeypatch,
                                                                                 rank):
    seen, loss = [], diffusion_nft.nft_loss
    monkeypatch.setattr(diffusion_nft, "nft_loss", lambda v, old,
                        *rest: seen.append((v.detach(), old)) or loss(v, old, *rest))
    policy = load_policy(tiny_model, 4, 1.0, 5.0, lora_rank=rank)
    trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain=False)
    noise, t = torch.randn(8, 4, 8, 8, generator=rng(1)), torch.full((8,), 300)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: t)
    monkeypatch.setattr(baselines_rwr, "reshuffled_passes", lambda *_: torch.arange(8).expand(3, 8))
    diffusion_nft.nft_update(policy, trajectory, torch.rand(8, generator=rng()),
                             **learner(policy, 1e-2, nft_strength=1.0))
    (v, old), (later, still_old), (latest, _) = seen
    assert torch.equal(v, old) and torch.equal(old, still_old) and not old.requires_grad
    assert min((later - old).abs().max(), (latest - old).abs().max()) > 1e-6


def test_nft_follows_the_reward(tiny_model):
    """Its images become likelier the better they are: the denoising error of the good ones falls, that of the
    bad ones rises."""
    policy = load_policy(tiny_model, 4, 1.0, 5.0)
    trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain=False)
    noise, good = torch.randn(64, 4, 8, 8, generator=rng(1)), torch.arange(4).repeat(16)
    t = torch.randint(1000, (64,), generator=rng(2))
    a, b = (values[t].view(-1, 1, 1, 1) for values in policy.training_levels[1:])

    def errors():
        with torch.no_grad():
            return [(policy.predict(a * trajectory.x_0[rows] + b * noise, t, ["a cat"] * 64)
                     - noise).square().mean().item()
                    for rows in (good, good + 4)]

    before = errors()
    diffusion_nft.nft_update(policy, trajectory, torch.tensor([1.0] * 4 + [0.0] * 4),
                             **learner(policy, 1e-3, nft_strength=1.0, updates_per_epoch=10))
    after = errors()
    assert after[0] - before[0] < 0 < after[1] - before[1]
