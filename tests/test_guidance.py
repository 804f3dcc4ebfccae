"""baselines_guidance.py: universal guidance, against a plain loop and the policy's own chain."""
import pytest
import torch
from baselines_guidance import guided_rollout

import rewards
import sampling
from conftest import EMOJI, rng
from policy import load_policy

GREEN = """
def green(images, prompts): return 10 * (images[:, 1] - images[:, ::2].mean(1)).mean((1, 2))
green.differentiable = True
def rounded(images, prompts): return green(images, prompts).tolist()
rounded.differentiable = True
def quiet(images, prompts): return green(images, prompts)
"""
TEXTS = ["a cat", "two dogs", "an ant"]


@pytest.fixture
def green(tmp_path):
    (tmp_path / "green.py").write_text(GREEN)
    return rewards.load_reward("green.py:green")


@pytest.fixture
def still_policy(tiny_model):
    """A policy without noise: DDIM with eta 0."""
    return load_policy(tiny_model, steps=4, eta=0.0, guidance_scale=3.0, scored=False)


def test_without_a_scale_it_is_the_policys_own_chain(still_policy, green):
    ours = guided_rollout(still_policy, TEXTS, green, rng(), 2, scale=0.0)
    torch.testing.assert_close(ours, sampling.rollout(still_policy, TEXTS, rng(), 3, keep_chain=False).x_0, rtol=1e-5, atol=1e-5)


def test_it_is_algorithm_1_written_as_a_plain_loop(still_policy, green):
    g, k, m, rate = 3.0, 2, 2, 0.5
    ours = guided_rollout(still_policy, TEXTS[:2], green, rng(), 2, g, k, m, rate)
    states, empty = still_policy.pipeline.encode_prompt(TEXTS[:2], "cpu", 1, True)
    unet, vae, scheduler = (getattr(still_policy.pipeline, name) for name in ("unet", "vae", "scheduler"))
    for i, noise in enumerate(sampling.generators(rng(), 2)):  # one image at a time
        def draw():
            return torch.randn((1, 4, 8, 8), generator=noise)

        def loss(z_0):
            image = (vae.decode(z_0 / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
            return -10 * (image[0, 1] - (image[0, 0] + image[0, 2]) / 2).mean()

        scheduler.set_timesteps(4)
        z = draw()
        timesteps = scheduler.timesteps.tolist()
        for t, t_prev in zip(timesteps, [*timesteps[1:], None]):
            ab = scheduler.alphas_cumprod[t]
            ab_prev = scheduler.final_alpha_cumprod if t_prev is None else scheduler.alphas_cumprod[t_prev]
            for turn in range(k):
                z = z.detach().requires_grad_()
                e_u, e_c = (unet(z, t, text).sample for text in (empty[:1], states[i:i + 1]))
                e = e_u + 3 * (e_c - e_u)
                z_0 = (z - (1 - ab) ** 0.5 * e) / ab ** 0.5
                e = (e + g * (1 - ab) ** 0.5 * torch.autograd.grad(loss(z_0), z)[0]).detach()
                z_0, D = (z.detach() - (1 - ab) ** 0.5 * e) / ab ** 0.5, torch.zeros(1, 4, 8, 8)
                for _ in range(m):
                    D = D.detach().requires_grad_()
                    D = D - rate * torch.autograd.grad(loss(z_0 + D), D)[0]
                e = e - (ab / (1 - ab)) ** 0.5 * D.detach()
                z_0 = (z.detach() - (1 - ab) ** 0.5 * e) / ab ** 0.5
                z_prev = ab_prev ** 0.5 * z_0 + (1 - ab_prev) ** 0.5 * e
                z = z_prev if turn == k - 1 else (ab / ab_prev) ** 0.5 * z_prev + (1 - ab / ab_prev) ** 0.5 * draw()
        torch.testing.assert_close(ours[i:i + 1], z, rtol=1e-4, atol=1e-4)


def test_guided_images_have_more_reward_and_their_animals_stay(green):
    policy = load_policy(EMOJI, steps=10, eta=0.0, guidance_scale=3.0, scored=False)
    texts = ["a wolf", "a cat", "a frog", "a horse"] * 2
    plain, guided = (policy.decode(guided_rollout(policy, texts, green, rng(), 8, scale)) for scale in (0.0, 5.0))
    assert (green(guided, texts)[0] > green(plain, texts)[0]).all()
    animal = rewards.load_reward(f"{EMOJI.parent / 'judge.py'}:animal")
    assert animal(guided, texts)[0].mean() > 0.7


def test_a_reward_without_a_gradient_is_refused_in_one_line(still_policy, green):
    for name in ("compressibility", "green.py:quiet"):
        with pytest.raises(ValueError, match="has none: aesthetic has one"):
            guided_rollout(still_policy, TEXTS, rewards.load_reward(name), rng(), 2, scale=1.0)
        with pytest.raises(rewards.RewardError, match="is not differentiable"):
            rewards.load_reward(name).with_gradient(torch.rand(3, 3, 8, 8), TEXTS)
    with pytest.raises(rewards.RewardError, match="rounded says that it is differentiable, but its values have no gradient"):
        guided_rollout(still_policy, TEXTS, rewards.load_reward("green.py:rounded"), rng(), 2, scale=1.0)


def test_a_chain_that_begins_at_pure_noise_is_guided_from_its_second_step_on(tiny_flow, green):
    policy = load_policy(tiny_flow, steps=4, eta=0.0, guidance_scale=3.0, scored=False)
    assert policy.schedule.a[0] == 0
    plain, guided = (guided_rollout(policy, TEXTS, green, rng(), 3, scale) for scale in (0.0, 3.0))
    torch.testing.assert_close(plain, sampling.rollout(policy, TEXTS, rng(), 3, keep_chain=False).x_0, rtol=1e-5, atol=1e-5)
    first = policy.with_chain(1, 0.0, scored=False)  # its only step is the first
    assert torch.equal(*(guided_rollout(first, TEXTS, green, rng(), 3, scale) for scale in (0.0, 3.0)))
    images, before = policy.decode(guided), policy.decode(plain)
    assert guided.isfinite().all() and (green(images, TEXTS)[0] > green(before, TEXTS)[0]).all()
