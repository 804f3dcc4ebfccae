"""beyond/universal_guidance.py: universal guidance, against a plain loop and the policy's own chain."""
import pytest
import torch

import rewards
import sampling
from beyond.universal_guidance import guided_rollout
from conftest import load_policy, rng

GREEN = """
def green(images, prompts): return 10 * (images[:, 1] - images[:, ::2].mean(1)).mean((1, 2))
green.differentiable = True
"""
TEXTS = ["a cat", "two dogs", "an ant"]
STILL = dict(eta=0.0, guidance_scale=3.0, scored=False, trains=False)  # a policy without noise


@pytest.fixture
def green(tmp_path):
    (tmp_path / "green.py").write_text(GREEN)
    return rewards.load_reward(f"{tmp_path}/green.py:green")


def test_without_a_scale_it_is_the_policys_own_chain_and_pure_noise_is_not_guided(either_model, green):
    policy = load_policy(either_model, 4, **STILL)
    plain, guided = (guided_rollout(policy, TEXTS, green, rng(), 2, scale) for scale in (0.0, 3.0))
    own = sampling.rollout(policy, TEXTS, rng(), 3, keep_chain=False).x_0
    torch.testing.assert_close(plain, own, rtol=1e-5, atol=1e-5)
    assert (green(policy.decode(guided), TEXTS)[0] > green(policy.decode(plain), TEXTS)[0]).all()
    first = policy.with_chain(1, 0.0, scored=False)  # a flow's first step is from pure noise
    plain, guided = (guided_rollout(first, TEXTS, green, rng(), 3, scale) for scale in (0.0, 3.0))
    assert torch.equal(plain, guided) == (first.schedule.a[0] == 0) == (either_model.name == "flow")


def test_it_is_algorithm_1_written_as_a_plain_loop(tiny_model, green):
    policy, g, k, m, rate = load_policy(tiny_model, 4, **STILL), 3.0, 2, 2, 0.5
    ours = guided_rollout(policy, TEXTS[:2], green, rng(), 2, g, k, m, rate)
    states, empty = policy.pipeline.encode_prompt(TEXTS[:2], "cpu", 1, True)
    unet, vae, scheduler = (getattr(policy.pipeline, name) for name in ("unet", "vae", "scheduler"))
    scheduler.set_timesteps(4)
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod]

    def loss(z_0):
        image = (vae.decode(z_0 / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return -10 * (image[0, 1] - (image[0, 0] + image[0, 2]) / 2).mean()

    for i, noise in enumerate(sampling.generators(rng(), 2)):  # one image at a time
        z = torch.randn((1, 4, 8, 8), generator=noise)
        for t, ab, ab_prev in zip(scheduler.timesteps, alphas, alphas[1:]):
            for turn in range(k):
                z = z.detach().requires_grad_()
                e_u, e_c = (unet(z, t, text).sample for text in (empty[:1], states[i:i + 1]))
                e = e_u + 3 * (e_c - e_u)
                forward = torch.autograd.grad(loss((z - (1 - ab) ** 0.5 * e) / ab ** 0.5), z)[0]
                e = (e + g * (1 - ab) ** 0.5 * forward).detach()
                z_0, D = (z.detach() - (1 - ab) ** 0.5 * e) / ab ** 0.5, torch.zeros(1, 4, 8, 8)
                for _ in range(m):
                    D.requires_grad_()
                    D = (D - rate * torch.autograd.grad(loss(z_0 + D), D)[0]).detach()
                e = e - (ab / (1 - ab)) ** 0.5 * D
                z_0 = (z.detach() - (1 - ab) ** 0.5 * e) / ab ** 0.5
                z = ab_prev ** 0.5 * z_0 + (1 - ab_prev) ** 0.5 * e
                if turn < k - 1:
                    again = (1 - ab / ab_prev) ** 0.5 * torch.randn((1, 4, 8, 8), generator=noise)
                    z = (ab / ab_prev) ** 0.5 * z + again
        torch.testing.assert_close(ours[i:i + 1], z, rtol=1e-4, atol=1e-4)


def test_a_reward_without_a_gradient_is_refused(tiny_model):
    policy, reward = load_policy(tiny_model, 2, **STILL), rewards.load_reward("compressibility")
    with pytest.raises(ValueError, match="the reward compressibility has no gradient"):
        guided_rollout(policy, TEXTS, reward, rng(), 3, scale=1.0)
