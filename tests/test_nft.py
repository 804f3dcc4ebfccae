"""DiffusionNFT: its formula, its old policy, and that it follows the reward."""
import pytest
import torch

import baselines_rwr
import sampling
from beyond import diffusion_nft
from conftest import learner, load_policy, rng


def test_the_loss_of_nft_is_that_of_its_formula_and_an_average_image_changes_nothing():
    old, target = torch.randn(2, 3, 4, 2, 2, generator=rng())
    v, r, b = old + 0.1 * torch.randn(old.shape, generator=rng(1)), torch.tensor([1.0, 0.25, 0.5]), 0.7
    loss, _ = diffusion_nft.nft_loss(v, old, target, r, b)
    good, bad = (((old + sign * b * (v - old) - target) ** 2).mean((1, 2, 3)) for sign in (1, -1))
    torch.testing.assert_close(loss, (r * good + (1 - r) * bad).mean())
    start = old.clone().requires_grad_()
    diffusion_nft.nft_loss(start, old, target, r, b)[0].backward()
    gradient = 2 * b * (2 * r - 1)[:, None, None, None] * (old - target) / old.numel()
    torch.testing.assert_close(start.grad, gradient)
    assert (start.grad[2] == 0).all()
    assert diffusion_nft.nft_preferences(torch.tensor([-3.0, -1, 0, 0.5, 2])).tolist() == [0, 0, 0.5, 0.75, 1]


@pytest.mark.parametrize("rank", [0, 2])
def test_nft_compares_with_the_weights_that_drew_the_images_all_the_epoch(tiny_model, monkeypatch, rank):
    seen, loss = [], diffusion_nft.nft_loss
    monkeypatch.setattr(diffusion_nft, "nft_loss", lambda *given: seen.append(given[:2]) or loss(*given))
    policy = load_policy(tiny_model, 4, 1.0, 5.0, lora_rank=rank)
    trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain=False)
    noise, t = torch.randn(8, 4, 8, 8, generator=rng(1)), torch.full((8,), 300)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: t)
    monkeypatch.setattr(baselines_rwr, "reshuffled_passes", lambda *_: torch.arange(8).expand(3, 8))
    diffusion_nft.nft_update(policy, trajectory, torch.rand(8, generator=rng()),
                             **learner(policy, 1e-2, nft_strength=1.0))
    (v, old), (later, still_old), (latest, _) = seen
    assert v.requires_grad and not old.requires_grad
    assert torch.equal(v, old) and torch.equal(old, still_old)
    assert min((later - old).abs().max(), (latest - old).abs().max()) > 1e-6
