"""The claims of the method, each by its name. Read as a list, they are the specification.

    pytest test_ddpo.py        # on a CPU, without network: about a minute
    pytest                     # the other test files, too
"""
import hashlib
import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import mse_loss
from torch.testing import assert_close

import baselines_rwr
import ddpo
import prompts
import rewards
import sampling
import train
from conftest import EMOJI, ROOT, STABLE_DIFFUSION, learner, load_policy, rng, run, tiny_flags, weights
from support.schedulers import chain_levels, plain_scheduler, training_levels

# ---- Oracles: the authors' own code, diffusers, torch.distributions, closed forms ----

# Its "source" fields say which code of the authors it is.
AUTHORS = json.loads((ROOT / "oracles" / "authors_oracle.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def ddim(**changes):
    """Stable Diffusion's scheduler, with changes."""
    return DDIMScheduler(**{**STABLE_DIFFUSION, **changes})


def schedule_of(scheduler, steps, eta, **options):
    """The Schedule of a chain over a scheduler's own timesteps."""
    scheduler.set_timesteps(steps)
    kind, *_ = training_levels(scheduler)
    levels = chain_levels(scheduler, scheduler.timesteps)
    return sampling.make_schedule(scheduler.timesteps, *levels, kind, eta, **options)


def with_predictions(policy, uncond, cond, guidance_scale):
    """The policy with a U-Net that predicts just this (N, C, H, W), and that guidance."""
    policy = policy.with_guidance(guidance_scale)
    policy.denoiser.forward = lambda x_t, *_, **__: (torch.cat([uncond, cond])[-len(x_t):],)
    policy.copies_of_timesteps = 2 if guidance_scale > 1 else 1
    return policy


def test_the_authors_step_and_log_prob():
    oracle = AUTHORS["step"]
    for steps, timesteps in oracle["timesteps"].items():
        scheduler = DDIMScheduler(**oracle["scheduler"], clip_sample=False)
        schedule = schedule_of(scheduler, int(steps), oracle["eta"])
        assert schedule.timesteps.tolist() == timesteps
        for case in oracle["cases"]:
            given, theirs = case["inputs"], case["outputs"]
            if given["steps"] == int(steps):
                x_t, eps, new = (tensor(given[name]) for name in ("x_t", "eps", "noise"))
                mean, sigma = sampling.mean_sigma(x_t, eps, timesteps.index(given["timestep"]), schedule)
                assert_close(mean, tensor(theirs["mean"]), rtol=1e-5, atol=1e-5)
                assert sigma.item() == pytest.approx(theirs["sigma"], rel=1e-5, abs=1e-7)
                assert_close(mean + sigma * new, tensor(theirs["x_prev"]), rtol=1e-5, atol=1e-5)
                log_prob = sampling.log_prob(tensor(theirs["x_prev"]), tensor(theirs["mean"]), sigma)
                assert_close(log_prob, tensor(theirs["log_prob"]), rtol=1e-4, atol=1e-4)


def test_the_authors_clipped_loss_and_its_gradient():
    for case in AUTHORS["clipped_loss"]["pairs"].values():
        given, theirs = case["inputs"], case["outputs"]
        log_probs, old = tensor(given["log_probs"]).requires_grad_(), tensor(given["old_log_probs"])
        advantages = tensor(given["advantages"]).clamp(-10, 10)
        loss, info = ddpo.clipped_loss(log_probs, old, advantages, given["clip_range"])
        loss.backward()
        assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
        assert info["clip_fraction_low"] + info["clip_fraction_high"] == pytest.approx(theirs["clipfrac"])
        assert_close(log_probs.grad, tensor(theirs["grad_log_probs"]), rtol=1e-5, atol=1e-8)


def test_the_authors_guided_loss_and_its_gradient_by_both_predictions(tiny_policy):
    given, theirs = (AUTHORS["clipped_loss"]["guided"][part] for part in ("inputs", "outputs"))
    scheduler = DDIMScheduler(**given["scheduler"], clip_sample=False)
    schedule = schedule_of(scheduler, given["steps"], given["eta"])
    cond, uncond = (tensor(given[name]).requires_grad_() for name in ("cond", "uncond"))
    log_probs, timesteps = [], schedule.timesteps.tolist()
    for i, t in enumerate(given["timesteps"]):
        policy = with_predictions(tiny_policy, uncond[i:i + 1], cond[i:i + 1], given["guidance_scale"])
        policy.schedule, x_t = schedule, tensor(given["x_t"])[i:i + 1]
        mean, sigma = sampling.p_mean_sigma(policy, x_t, timesteps.index(t), ["a cat"])
        log_probs.append(sampling.log_prob(tensor(given["x_prev"])[i:i + 1], mean, sigma))
    log_probs, old = torch.cat(log_probs), tensor(given["old_log_probs"])
    loss, info = ddpo.clipped_loss(log_probs, old, tensor(given["advantages"]), given["clip_range"])
    loss.backward()
    assert_close(log_probs, tensor(theirs["log_probs"]), rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-4)
    assert info["clip_fraction_low"] + info["clip_fraction_high"] == pytest.approx(theirs["clipfrac"])
    for prediction, name in ((cond, "grad_cond"), (uncond, "grad_uncond")):
        scale = tensor(theirs[name]).abs().max().item()
        assert_close(prediction.grad, tensor(theirs[name]), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("buffer", [32, 16])
def test_the_authors_advantages(buffer):
    given, outputs = AUTHORS["advantages"]["inputs"], AUTHORS["advantages"]["outputs"][f"buffer_{buffer}"]
    statistics = ddpo.PromptStatistics(buffer, given["min_count"], clip=10)
    for texts, values, theirs in zip(given["prompts"], given["rewards"], outputs):
        np.testing.assert_allclose(statistics.advantages(texts, values)[0], theirs, atol=1e-6)


def test_the_authors_rwr_weights_and_kept_samples():
    given, sparse = AUTHORS["rwr"]["weights"]["inputs"], AUTHORS["rwr"]["sparse"]
    ours = baselines_rwr.rwr_weights(given["prompts"], given["rewards"], given["beta"])
    np.testing.assert_allclose(ours, AUTHORS["rwr"]["weights"]["outputs"]["weights"], rtol=1e-6)
    for values, kept in zip(sparse["inputs"]["rewards"], sparse["outputs"]["kept"]):
        ours = baselines_rwr.sparse_weights(["a"] * len(values), values, sparse["inputs"]["percentile"])
        assert ours.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("kind", ["guided", "plain"])
def test_the_authors_rwr_loss_and_its_gradient(kind, tiny_policy):
    given, theirs = AUTHORS["rwr"]["loss"]["inputs"], AUTHORS["rwr"]["loss"]["outputs"]
    cond, uncond = (tensor(given[name]).requires_grad_() for name in ("cond", "uncond"))
    policy = with_predictions(tiny_policy, uncond, cond, given["guidance_scale"] if kind == "guided" else 1.0)
    x_0, eps, t = tensor(given["x_0"]), tensor(given["noise"]), torch.tensor(given["t"])
    _, _, a, b = training_levels(DDIMScheduler(**given["scheduler"]))
    a, b = (values[t].view(-1, 1, 1, 1) for values in (a, b))
    x_t, target = a * x_0 + b * eps, sampling.target_of(x_0, eps, a, b, "epsilon")
    assert_close(x_t, tensor(theirs["x_t"]), rtol=1e-5, atol=1e-6)
    prediction = policy.predict(x_t, t, ["a cat"] * len(x_0))
    loss, _ = baselines_rwr.weighted_denoising_loss(prediction, target, tensor(given["weights"]))
    loss.backward()
    assert loss.item() == pytest.approx(theirs[kind]["loss"], rel=1e-5)
    assert_close(cond.grad, tensor(theirs[kind]["grad_cond"]), rtol=1e-4, atol=1e-7)
    if kind == "guided":
        assert_close(uncond.grad, tensor(theirs[kind]["grad_uncond"]), rtol=1e-4, atol=1e-7)


def test_the_authors_jpeg_sizes():
    grid, theirs = dict(zip("cyx", np.mgrid[:3, :72, :100])), AUTHORS["jpeg"]["outputs"]
    images = torch.stack([torch.from_numpy(eval(formula, grid).astype(np.float32) / 1023)
                          for formula in AUTHORS["jpeg"]["inputs"]["formulas"]])
    assert [np.asarray(rewards.to_pil(image)).sum(dtype=int) for image in images] == theirs["sum_rounded"]
    for name, sign in (("compressibility", -1), ("incompressibility", 1)):
        values, _ = rewards.load_reward(name)(images, ["x"] * len(images))
        assert (sign * 1000 * values).tolist() == pytest.approx(theirs["bytes_rounded"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("change", [
    {}, dict(steps_offset=3), dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"),
    dict(timestep_spacing="trailing"), dict(timestep_spacing="trailing", beta_schedule="linear")], ids=str)
def test_step_equals_diffusers_and_the_closed_form(prediction_type, change):
    for steps, eta in ((7, 1.0), (30, 0.3), (50, 1.0)):
        scheduler = ddim(prediction_type=prediction_type, **change)
        schedule, compared = schedule_of(scheduler, steps, eta), 0
        x, p, new = noise(3, steps, 1, 4, 8, 8)
        for k, (t, t_next) in enumerate(itertools.pairwise([*schedule.timesteps.tolist(), -1])):
            mean, sigma = sampling.mean_sigma(x[k], p[k], k, schedule)
            if t - 1000 // steps == t_next or max(t - 1000 // steps, t_next) < 0:
                compared += 1
                theirs, theirs_mean = (scheduler.step(p[k], t, x[k], eta=eta, variance_noise=n).prev_sample
                                       for n in (new[k], torch.zeros(1, 4, 8, 8)))
                # Their sigma of the last step has four digits.
                assert_close(mean, theirs_mean, rtol=1e-5, atol=1e-4)
                assert_close(sigma * new[k], theirs - theirs_mean, rtol=1e-4, atol=1e-5)
            # Song et al. 2021, equations 12 and 16, in double precision
            a = scheduler.alphas_cumprod[t].double()
            b = (scheduler.alphas_cumprod[t_next] if t_next >= 0 else scheduler.final_alpha_cumprod).double()
            s = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
            x_t, said = x[k].double(), p[k].double()
            x_0 = {"epsilon": (x_t - (1 - a).sqrt() * said) / a.sqrt(), "sample": said,
                   "v_prediction": a.sqrt() * x_t - (1 - a).sqrt() * said}[prediction_type]
            eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
            expected = b.sqrt() * x_0 + (1 - b - s**2).sqrt() * eps
            assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)
            assert_close(sigma.double(), s, rtol=1e-6, atol=0)
        # Under "trailing" at 30 steps, diffusers steps to another timestep than the next at 10 of 29.
        assert compared == steps or "timestep_spacing" in change and steps in (7, 30)


@pytest.mark.parametrize("change, steps, eta, message", [
    (dict(steps_offset=0), 50, 1.0, "sigma is 0 at timestep 0"), ({}, 50, 0.0, "eta"), ({}, 50, 1.5, "eta"),
    (dict(set_alpha_to_one=True), 1, 1.0, "no action to learn from"), ({}, 50, -1.0, "eta"),
    (dict(timestep_spacing="linspace"), 50, 1.0, "sigma is 0")])
def test_a_degenerate_schedule_is_refused_and_no_models_scheduler_makes_one(change, steps, eta, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(ddim(**change), steps, eta)
    scheduler = plain_scheduler(ddim(**change, clip_sample=True, thresholding=True))
    assert schedule_of(scheduler, 50, 1.0).actions == 50
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_last_step_without_noise_is_drawn_but_is_no_action(spacing, tiny_policy):
    schedule = schedule_of(ddim(set_alpha_to_one=True, timestep_spacing=spacing), 4, 1.0)
    assert (schedule.sigma > 0).tolist() == [True] * 3 + [False] and schedule.b[-1] == 0
    x_0, eps = noise(2, 1, 4, 8, 8)
    assert_close(sampling.mean_sigma(schedule.a[3] * x_0 + schedule.b[3] * eps, eps, 3, schedule)[0], x_0)
    tiny_policy.schedule = schedule
    trajectory = sampling.rollout(tiny_policy, ["a cat"] * 2, rng(), 2)
    assert trajectory.latents.shape[1] == 5 and trajectory.log_probs.shape == (2, 3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_the_step_of_flow_matching_is_diffusers_euler_step(shift):
    theirs, (x_t, v) = FlowMatchEulerDiscreteScheduler(shift=shift), noise(2, 1, 4, 8, 8)
    schedule = schedule_of(FlowMatchEulerDiscreteScheduler(shift=shift), 10, 0.0, scored=False)
    theirs.set_timesteps(10)
    assert torch.equal(schedule.timesteps, theirs.timesteps) and schedule.a[0] == 0 and schedule.b[-1] == 0
    for k, t in enumerate(theirs.timesteps):
        mean, sigma = sampling.mean_sigma(x_t, v, k, schedule)
        assert_close(mean, theirs.step(v, t, x_t).prev_sample, rtol=1e-5, atol=1e-5)
        assert sigma == 0


def test_at_eta_one_the_step_of_flow_matching_is_the_posterior_of_the_forward_process():
    """x_t = (a / a') x_prev + noise, and x_prev = a' x_0 + b' eps: Bayes' rule for two Gaussians."""
    schedule = schedule_of(FlowMatchEulerDiscreteScheduler(), 8, 1.0)
    x_0, x_t = noise(2, 8).double()
    a, b = schedule.a.double(), schedule.b.double()
    a, b, a_prev, b_prev = a[:-1], b[:-1], a[1:], b[1:]
    slope, variance = a / a_prev, b**2 - (a * b_prev / a_prev) ** 2
    precision = slope**2 / variance + 1 / b_prev**2
    expected = (slope * x_t / variance + a_prev * x_0 / b_prev**2) / precision
    v = (x_t - x_0) / b  # the prediction that says this x_0
    for k in range(7):
        mean, sigma = sampling.mean_sigma(x_t[k:k + 1].float(), v[k:k + 1].float(), k, schedule)
        assert_close(mean.double(), expected[k:k + 1], rtol=1e-4, atol=1e-5)
        assert_close(sigma.double(), precision[k] ** -0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheduler", [ddim(), FlowMatchEulerDiscreteScheduler()], ids=["diffusion", "flow"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_coefficients_preserving_sampling_turns_the_noise_by_an_angle(scheduler, eta):
    """Wang and Yu 2025: x_prev = a' x_0 + b' (cos(eta pi / 2) eps + sin(eta pi / 2) new noise)."""
    schedule, (x_0, eps) = schedule_of(scheduler, 8, eta, noise="cps"), noise(2, 8, 4, 8, 8)
    for k in range(8):
        a, b, a_prev, b_prev = schedule.a[k], schedule.b[k], schedule.a[k + 1], schedule.b[k + 1]
        prediction = sampling.target_of(x_0, eps, a, b, schedule.prediction_type)
        mean, sigma = sampling.mean_sigma(a * x_0 + b * eps, prediction, k, schedule)
        expected = a_prev * x_0 + b_prev * np.cos(eta * np.pi / 2) * eps
        assert_close(mean, expected, rtol=1e-4, atol=1e-4)
        assert_close(sigma, b_prev * np.sin(eta * np.pi / 2), rtol=1e-5, atol=1e-7)


def test_log_prob_and_kl_are_those_of_torch_distributions_per_dimension():
    x_prev, mean = noise(2, 5, 4, 8, 8)
    sigma = torch.rand((5, 1, 1, 1), generator=rng()) + 0.01
    one, other = Normal(mean, sigma), Normal(x_prev, sigma)
    assert_close(sampling.log_prob(x_prev, mean, sigma), one.log_prob(x_prev).mean((1, 2, 3)))
    assert_close(sampling.gaussian_kl(mean, x_prev, sigma), kl_divergence(one, other).mean((1, 2, 3)))


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1, 0.8, True), (1, 1.0, True), (1, 1.2, False), (-1, 0.8, False), (-1, 1.0, True), (-1, 1.2, True)])
def test_clipping_stops_the_gradient_only_outside_the_clip_range(advantage, ratio, moves):
    log_probs = torch.tensor([ratio]).log().requires_grad_()
    loss, info = ddpo.clipped_loss(log_probs, torch.zeros(1), torch.tensor([float(advantage)]), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-min(advantage * ratio, advantage * min(max(ratio, 0.9), 1.1)))
    assert log_probs.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-6)
    assert (info["clip_fraction_low"], info["clip_fraction_high"]) == (ratio < 0.9, ratio > 1.1)


def test_at_ratio_one_both_estimators_have_the_closed_forms_gradient_of_a_gaussian_policy():
    # x ~ Normal(mu, 1), r(x) = -(x - 3)^2: J = -(mu - 3)^2 - 1, dJ/dmu = -2 (mu - 3) = 4 at mu = 1.
    mu, samples = torch.tensor(1.0, requires_grad=True), 200_000
    x = 1.0 + noise(samples)
    advantages = -(x - 3) ** 2 + 5  # the baseline is J at mu = 1; any constant leaves the mean where it is
    standard_error = (advantages * (x - 1.0)).std() / samples**0.5
    for loss in (ddpo.score_function_loss, ddpo.clipped_loss):
        log_probs = sampling.log_prob(x.view(-1, 1, 1, 1), mu.expand(samples, 1, 1, 1), torch.ones(()))
        value, _ = loss(log_probs, log_probs.detach(), advantages, 0.1)
        assert abs(-torch.autograd.grad(value, mu)[0] - 4) < 4 * standard_error < 4 * 0.05


# ---- Rewards into advantages ----

def test_a_prompt_with_enough_rewards_uses_its_own_statistics_and_another_the_batch():
    statistics, batch = ddpo.PromptStatistics(buffer=3, min_count=3, clip=10), np.array([1.0, 2.0, 3.0, 6.0])
    advantages, share = statistics.advantages("aabb", batch)
    np.testing.assert_allclose(advantages, (batch - 3) / batch.std(), rtol=1e-6)
    assert share == 0
    advantages, share = statistics.advantages("aba", [5.0, 0.0, 0.0])
    a, b = np.array([2, 5, 0]), np.array([3, 6, 0])  # appended first; the buffer dropped the oldest of "a"
    expected = [(5 - a.mean()) / a.std(), -3 / b.std(), -a.mean() / a.std()]
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)
    assert share == 1


@pytest.mark.parametrize("values, expected", [
    ([1, 2] * 2, [-1, 1] * 2), ([1e-6, 2e-6] * 2, [-1, 1] * 2), ([1e6, 1e6 + 0.5] * 2, [-1, 1] * 2),
    ([0.1] * 4, [0] * 4), ([1, 1 + 2**-23] * 2, [0] * 4), ([1, 1 + 1e-6] * 2, [-1, 1] * 2),
    ([0] * 9 + [9], [-1 / 3] * 9 + [2])],
    ids=["integers", "small unit", "large offset", "equal", "equal in float32", "not equal", "clipped"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_advantages_are_rewards_whitened_in_any_unit_and_0_if_equal(kind, values, expected, monkeypatch):
    """Neighbours in float32 are equal: a network may round so. The authors' floor of 1e-6 under the deviation
    would make rewards in a small unit count less."""
    monkeypatch.setitem(rewards.REWARDS, "given", lambda images, prompts: kind(values))
    kept, _ = rewards.load_reward("given")(torch.rand(len(values), 3, 8, 8), ["a"] * len(values))
    advantages, own = ddpo.PromptStatistics(32, 16, clip=2).advantages("abcdefghij"[:len(values)], kept)
    assert advantages.dtype == torch.float32 and own == 0
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)


@pytest.mark.parametrize("buffer", [1, 3])
def test_a_prompts_statistics_hold_all_its_rewards_of_the_epoch(buffer):
    """So a buffer of 1 compares the images of a prompt with each other alone, as GRPO does, whatever earlier
    epochs brought. The last rewards alone would shift all advantages."""
    statistics = ddpo.PromptStatistics(buffer, min_count=buffer, clip=10)
    for epoch in range(2):
        groups = np.random.default_rng(epoch).normal(size=(2, 4)) + 100 * epoch
        advantages, own = statistics.advantages("aaaabbbb", groups.flatten())
        expected = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
        assert own == 1 and advantages.tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-5)
    few, _ = statistics.advantages("a", [102.0])  # fewer than the buffer: the last three, as always
    last = np.array([*groups[0], 102])[-buffer:]
    assert few.item() == pytest.approx(0 if buffer == 1 else (102 - last.mean()) / last.std())


def test_other_baselines_are_the_batch_alone_or_nothing():
    values = np.arange(8.0)
    own, batch, none = (ddpo.PromptStatistics(4, 2, 2, name).advantages("aaaabbbb", values)[0]
                        for name in ("prompt", "batch", "none"))
    np.testing.assert_allclose(batch, (values - 3.5) / values.std(), rtol=1e-6)
    np.testing.assert_allclose(none, values)  # not clipped: the clip is of whitened rewards
    np.testing.assert_allclose(own[:4], own[4:])


# ---- The chain and its scoring ----

@torch.no_grad()
@pytest.mark.parametrize("precision, tolerance", [("fp32", 2e-6), ("bf16", 1e-3)])
def test_ratio_is_one_for_every_image_and_step_at_any_batch_size(precision, tolerance, tiny_model):
    model = EMOJI if precision == "fp32" else tiny_model
    policy = load_policy(model, 10, 1.0, 3.0, precision=precision)
    trajectory = sampling.rollout(policy, ["a cat", "two dogs"] * 2, rng(), batch_size=3)
    for k, size in itertools.product(range(10), (1, 3, 4)):
        parts = torch.arange(4).split(size)
        scored = torch.cat([sampling.score(policy, trajectory, part, k)[0] for part in parts])
        assert trajectory.latents.dtype == scored.dtype == torch.float32
        assert ((scored - trajectory.log_probs[:, k]).exp() - 1).abs().max() <= tolerance


@pytest.mark.parametrize("noise", sampling.NOISES)
def test_images_keep_their_own_latents_and_prompts_when_shuffled(either_model, noise):
    policy = load_policy(either_model, 4, 0.7, 5.0, noise=noise)
    trajectory = sampling.rollout(policy, ["a cat", "an ant", "two dogs", "a bee"], rng(), 4)
    actions = {"epsilon": 4, "flow": 3}[policy.schedule.prediction_type]
    assert policy.schedule.actions == actions and trajectory.log_probs.shape == (4, actions)
    # The last action of flow matching ends at a noise level of 0.004, so its log p shows any rounding of x.
    tolerance, order = 2e-6 if actions == 4 else 1e-4, torch.tensor([2, 0, 3, 1])
    other = replace(trajectory, prompts=trajectory.prompts[::-1])
    for k in range(actions):
        scored, _ = sampling.score(policy, trajectory, order, k)
        assert_close(scored, trajectory.log_probs[order, k], rtol=0, atol=tolerance)
        assert (sampling.score(policy, other, order, k)[0] - scored).abs().min() > 0  # prompts do count


def test_images_depend_neither_on_how_many_are_drawn_at_a_time_nor_on_whether_the_chain_is_kept(tiny_policy):
    texts = ["a cat", "a dog", "an ant", "a bee", "a fox"]
    whole, parts, last = (sampling.rollout(tiny_policy, texts, rng(), size, keep_chain)
                          for size, keep_chain in ((5, True), (2, True), (5, False)))
    assert_close(whole.latents, parts.latents, rtol=1e-4, atol=1e-5)
    assert whole.latents.shape == (5, 5, 4, 8, 8) and last.log_probs.shape == (5, 0)
    assert torch.equal(whole.x_0, last.x_0) and torch.equal(whole.x_0, whole.latents[:, -1])
    # Without the chain memory does not grow with the number of steps: x_0 is no view of a chain.
    assert last.latents.untyped_storage().nbytes() == 5 * 4 * 8 * 8 * 4
    images = tiny_policy.decode(whole.x_0)
    assert images.shape == (5, 3, 16, 16) and 0 <= images.min() and images.max() <= 1
    with pytest.raises(FloatingPointError, match="an image is not finite"):  # it would look like a black one
        tiny_policy.decode(whole.x_0 * float("nan"))


def drawn_by_diffusers(pipeline, prompt, steps, seed, images):
    """The first image (1, H, W, 3) of a rollout of so many images, by diffusers' pipeline from its noise."""
    seed = torch.randint(2**62, (images,), generator=rng(seed))[0].item()
    x_T, *others = noise(steps + 1, 1, 4, 8, 8, seed=seed)
    others, step = iter(others), pipeline.scheduler.step

    def step_with_noise(*args, eta=1.0, generator=None, **options):
        return step(*args, eta=eta, variance_noise=next(others), **options)

    pipeline.scheduler.step = step_with_noise
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, num_inference_steps=steps, guidance_scale=5.0, eta=1.0, latents=x_T,
                    output_type="np").images


# ---- DDPO's update ----

def distance(some, others):
    """Of two policies' weights: the sum of their absolute differences."""
    return sum((one - other).abs().sum() for one, other in zip(some.values(), others.values()))


def test_update_equals_a_plain_loop_over_images_and_steps(either_model):
    one, two = (load_policy(either_model, 3, 1.0, 5.0) for _ in range(2))
    trajectory, advantages = sampling.rollout(one, ["a cat", "a dog"], rng(), 2), torch.tensor([1.0, -2.0])
    before, actions, total = weights(one), two.schedule.actions, 0
    extras = learner(one, sgd=0.1, updates_per_epoch=1)
    info = ddpo.ddpo_update(one, trajectory, advantages, loss=ddpo.clipped_loss, **extras)
    for i, k in itertools.product(range(2), range(actions)):
        log_prob, _ = sampling.score(two, trajectory, torch.tensor([i]), k)
        total = total - advantages[i] * (log_prob - trajectory.log_probs[i, k]).exp().sum() / (2 * actions)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(two.denoiser.parameters(), 1.0).item()
    torch.optim.SGD(two.denoiser.parameters(), lr=0.1).step()
    assert norm > 1 and info["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert distance(weights(one), weights(two)) < 1e-3 * distance(before, weights(one))


@pytest.mark.parametrize("loss", [ddpo.score_function_loss, ddpo.clipped_loss])
def test_micro_batch_does_not_change_an_update_whose_first_ratio_is_one(tiny_model, loss):
    results = []
    for micro_batch in (3, 1000):  # of 4 images
        policy = load_policy(tiny_model, 4, 1.0, 5.0)
        start, trajectory = weights(policy), sampling.rollout(policy, ["a cat", "a dog"] * 4, rng(), 8)
        # SGD: AdamW divides by the gradient's size and would blow rounding of near-zero gradients up.
        extras = learner(policy, sgd=0.1, micro_batch=micro_batch, max_grad_norm=1e9)
        info = ddpo.ddpo_update(policy, trajectory, noise(8), loss=loss, **extras)
        assert info["ratio_deviation"] <= 2e-6 < abs(info["ratio_mean"] - 1)  # the second update has moved
        results.append((weights(policy), info))
    (one, info), (other, other_info) = results
    assert 0 < distance(start, other) and distance(one, other) < 1e-4 * distance(start, other)
    assert other_info["grad_norm"] == pytest.approx(info["grad_norm"], rel=1e-3)
    assert other_info["approx_kl"] == pytest.approx(info["approx_kl"], rel=1e-2, abs=1e-6)


def test_the_last_but_one_step_has_most_of_the_gradients_variance_and_dpoks_code_weighs_steps_otherwise():
    """With c = d mean / d eps, a step's score for eps is c / sigma times unit noise. So its variance is
    (c / sigma)^2. The KL of a difference d in eps is (c / sigma)^2 / 2 times d^2. DPOK's code takes d^2."""
    for steps, share in ((5, 0.95), (10, 0.86), (20, 0.73), (50, 0.49)):
        schedule, eps = schedule_of(ddim(), steps, 1.0), torch.tensor(1.0)
        c = torch.stack([sampling.mean_sigma(0 * eps, eps, k, schedule)[0] for k in range(steps)])
        variance = (c / schedule.sigma) ** 2
        assert variance[-2] / variance.sum() == pytest.approx(share, abs=0.01)
    kl = variance / 2
    assert (kl.median().item(), kl[-2].item()) == pytest.approx((0.088, 5.36), rel=0.01)
    for steps, share in ((10, 0.92), (50, 0.74)):
        policy, of_weights = load_policy(EMOJI, steps, 1.0, 3.0), torch.zeros(steps)
        trajectory = sampling.rollout(policy, ["a cat", "a dog", "a fox"], rng(), 3)
        for image, k in itertools.product(range(3), range(steps)):
            log_p, _ = sampling.score(policy, trajectory, torch.tensor([image]), k)
            gradients = torch.autograd.grad(log_p, list(policy.trained.values()))
            of_weights[k] += sum((gradient**2).sum() for gradient in gradients)
        assert of_weights[-2] / of_weights.sum() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("to_one, skipped, learned", [
    (False, 0, 4), (False, 1, 3), (True, 0, 3), (True, 2, 2)])  # to one: the last of 4 steps is no action
def test_an_update_learns_from_all_actions_but_the_skipped_or_from_some_drawn_evenly(
        to_one, skipped, learned, tiny_policy, monkeypatch):  # evenly: so the gradient is unbiased
    def record(policy, trajectory, advantages, k, loss, config, images):
        counts[images, k] += 1
        return torch.zeros((), requires_grad=True) * 0, {"ratio_deviation": torch.zeros(())}

    monkeypatch.setattr(ddpo, "surrogate", record)
    monkeypatch.setattr(ddpo.Learner, "clipped_step", lambda _: {"grad_norm": 1.0, "skipped_updates": 0})
    tiny_policy.schedule = schedule_of(ddim(set_alpha_to_one=to_one), 4, 1.0)
    trajectory = sampling.rollout(tiny_policy, ["a cat"] * 8, rng(), 8)
    for learn_steps, epochs in ((0, 1), (1, 300)):
        counts = torch.zeros(8, 4)
        extras = learner(tiny_policy, skip_last_steps=skipped, learn_steps=learn_steps, updates_per_epoch=1)
        for epoch in range(epochs):
            ddpo.ddpo_update(tiny_policy, trajectory, torch.ones(8), loss=ddpo.clipped_loss, **extras)
            assert (counts == counts[0]).all()  # the same steps of each image
            assert counts[0].sum() == (epoch + 1) * (learn_steps or learned)
        often, p = counts[0] / epochs, (learn_steps or learned) / learned
        assert (often[learned:] == 0).all()
        assert (often[:learned] - p).abs().max() <= 4 * (p * (1 - p) / epochs) ** 0.5  # four standard errors


def test_the_kl_penalty_is_zero_at_the_pretrained_policy_and_pulls_back_to_it(tiny_model):
    kls = {}
    for weight in (0.0, 100.0):
        policy = load_policy(tiny_model, 3, kl_weight=1.0)
        trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
        extras = learner(policy, kl_weight=weight, updates_per_epoch=1)
        kls[weight] = [ddpo.ddpo_update(policy, trajectory, noise(8, seed=k), loss=ddpo.clipped_loss,
                                        **extras)["kl_pretrained"] for k in range(4)]
        assert all(not weight.requires_grad for weight in policy.reference.values())
    assert kls[0.0][0] == kls[100.0][0] == 0
    assert 0 < kls[100.0][-1] < kls[0.0][-1] / 2


def stepped(trainer, gradient):
    """Take a step in which each entry of the gradient is that. Returns whether weights moved, and info."""
    before, scale = [*map(torch.clone, trainer.weights)], trainer.scaler.scale(torch.ones(())).item()
    for weight in trainer.weights:
        weight.grad = torch.full_like(weight, gradient * scale)
    try:
        info = trainer.clipped_step()
    except FloatingPointError as error:
        info = str(error)
    return any(not torch.equal(*pair) for pair in zip(before, trainer.weights)), info


def test_a_gradient_that_is_not_finite_moves_no_weight_and_fp16s_scaler_goes_on(tiny_policy):
    moved, info = stepped(learner(tiny_policy)["learner"], float("nan"))
    assert not moved and "the gradient is not finite" in info
    trainer = learner(tiny_policy, precision="fp16")["learner"]
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 4.0})
    size = sum(weight.numel() for weight in trainer.weights) ** 0.5
    for gradient, scale in ((1.0, 4), (float("inf"), 2), (1.0, 2)):
        moved, info = stepped(trainer, gradient)
        assert moved == (gradient == 1) == (not info["skipped_updates"])
        assert trainer.scaler.get_scale() == scale and (not moved or info["grad_norm"] == pytest.approx(size))
    *_, (moved, info) = [stepped(trainer, float("inf")) for _ in range(3)]
    assert not moved and "the gradient is not finite" in info  # at any scale: it trains nothing


# ---- Reward-weighted regression ----

@pytest.mark.parametrize("texts, values, beta, expected", [
    ("ababb", [1, 5, 2, 5, 6], np.log(2), [2 / 3, 3 / 4, 4 / 3, 3 / 4, 3 / 2]),  # 1 : 2, and 1 : 1 : 2
    ("aaabb", [0.1, 0.3, 0.2, -1e4, 1e4], 0.0, [1] * 5), ("abbb", [3.0, 0.1, 0.1, 0.1], 0.9, [1] * 4),
    ("aaabb", [0.1, 0.3, 0.2, -1e4, 1e4], 1e4, [0, 3, 0, 0, 2])],
    ids=["by hand", "beta 0: plain fine-tuning", "equal or alone", "large beta: the best sample"])
def test_rwr_weights_are_a_softmax_per_prompt_that_averages_one(texts, values, beta, expected):
    weights = baselines_rwr.rwr_weights(texts, values, beta)
    assert_close(weights, tensor(expected), rtol=1e-6, atol=0)
    # Per prompt, not global: what another prompt gets does not matter.
    apart = [value + 100 * (text == "b") for text, value in zip(texts, values)]
    assert_close(baselines_rwr.rwr_weights(texts, apart, beta), weights)


@pytest.mark.parametrize("texts, values, percentile, expected", [
    ("a" * 20, range(20), 0.9, [0] * 18 + [10, 10]), ("abbbb", [7, 900, 903, 901, 902], 0.9, [1, 0, 4, 0, 0]),
    ("abab", range(4), 0.0, [1] * 4), ("aaaa", [1, 7, 7, 7], 0.5, [0, 4 / 3, 4 / 3, 4 / 3]),
    ("abbb", [3.0, 0.1, 0.1, 0.1], 0.9, [1] * 4)],
    ids=["by hand", "of fewer than ten: the best", "0: plain fine-tuning", "ties stay", "equal or alone"])
def test_sparse_weights_keep_the_top_fraction_of_each_prompt(texts, values, percentile, expected):
    assert baselines_rwr.sparse_weights(texts, values, percentile).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_uniform_weights_without_guidance_are_the_plain_loss_of_pretraining(tiny_model, tiny_flow, kind):
    model, kind = (tiny_flow, "") if kind == "flow" else (tiny_model, kind)
    policy = load_policy(model, 4, 1.0, 1.0, prediction_type=kind)
    trajectory = sampling.rollout(policy, ["a cat", "a dog", "an ant"], rng(), 3, keep_chain=False)
    info = baselines_rwr.rwr_update(policy, trajectory, torch.ones(3),
                                    **learner(policy, 0.0, updates_per_epoch=1, batch_size=3))
    order, eps = torch.randperm(3, generator=(again := rng())), torch.randn(3, 4, 8, 8, generator=again)
    t, pipeline, x_0 = torch.randint(1000, (3,), generator=again), policy.pipeline, trajectory.x_0[order]
    if kind:  # as in diffusers' train_text_to_image.py
        x_t = pipeline.scheduler.add_noise(x_0, eps, t)
        velocity = pipeline.scheduler.get_velocity(x_0, eps, t)
        target = {"epsilon": eps, "v_prediction": velocity, "sample": x_0}[kind]
    else:
        s = FlowMatchEulerDiscreteScheduler(shift=2.0).sigmas.flip(0)[t]  # of training, the smallest first
        t, s = 1000 * s, s.view(3, 1, 1, 1)
        x_t, target = (1 - s) * x_0 + s * eps, eps - x_0
    states, _ = pipeline.encode_prompt([trajectory.prompts[i] for i in order], "cpu", 1, False)
    with torch.no_grad():
        plain = mse_loss(pipeline.unet(x_t, t, states).sample, target).item()
    assert info["loss"] == pytest.approx(plain, rel=1e-5 if kind else 1e-4)
    assert info["denoising_error"] == pytest.approx(info["loss"], rel=1e-6)


def test_rwr_draws_from_reshuffled_passes_over_the_kept_samples():
    batches = baselines_rwr.reshuffled_passes(torch.tensor([3, 5, 8]), batches=4, batch_size=5, rng=rng())
    assert batches.shape == (4, 5)
    assert sorted(torch.unique(batches, return_counts=True)[1].tolist()) == [6, 7, 7]
    for start in range(0, 18, 3):  # each pass holds each sample once
        assert sorted(batches.flatten()[start:start + 3].tolist()) == [3, 5, 8]


def test_micro_batch_does_not_change_a_round_of_rwr_and_images_of_weight_zero_do_not_count(tiny_model):
    results = []
    for micro_batch, change in ((8, 0), (3, 9)):
        policy = load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory = sampling.rollout(policy, ["a cat", "a dog"] * 4, rng(), 8, keep_chain=False)
        trajectory.latents[[0, 5]] += change
        extras = learner(policy, sgd=0.1, micro_batch=micro_batch, max_grad_norm=1e9)
        info = baselines_rwr.rwr_update(policy, trajectory, tensor([0, 1, 2, 1, 1, 0, 2, 1]), **extras)
        results.append((weights(policy), info))
    (one, info), (other, other_info) = results
    assert other_info == pytest.approx(info, rel=1e-3)
    assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_the_loss_is_guided_as_the_sampling_is_or_as_it_is_told(tiny_model):
    policy, losses = load_policy(tiny_model, 2, 1.0, 5.0), []
    trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain=False)
    for guidance in (0.0, 5.0, 3.0, 1.0):
        extras = learner(policy, 0.0, training_guidance=guidance, updates_per_epoch=1)
        losses.append(baselines_rwr.rwr_update(policy, trajectory, torch.ones(8), **extras)["loss"])
    assert losses[0] == losses[1] and len(set(losses)) == 3


# ---- Prompts ----

def texts_of(name, sha=""):
    """The texts of a set, whose checksum must be this."""
    texts = [prompt.text for prompt in prompts.load_prompts(name)]
    assert hashlib.sha1("\n".join(texts).encode()).hexdigest().startswith(sha)
    return texts


def test_prompt_sets_are_the_papers():
    # The 45 are assets/common_animals.txt of the authors' JAX code, line by line; the labels the first 398
    # lines of imagenet_classes.txt of their PyTorch port.
    animals, labels = texts_of("common_animals", "347b5a44"), texts_of("imagenet_animals", "9eab5418")
    assert len(animals) == 45 and len(labels) == 398 and labels[0] == "tench, Tinca tinca"
    nouns = texts_of("emoji_animals")
    assert nouns == [f"{'an' if animal == 'ant' else 'a'} {animal}" for animal in animals]
    assert texts_of("painted_animals") == [f"A painting of {noun}" for noun in nouns]
    assert texts_of("animal_activities") == [f"{noun} {activity}" for noun in nouns for activity in (
        "riding a bike", "playing chess", "washing dishes")]  # section 5.3
    assert "; ".join(texts_of("dpok")) == (
        "a green colored rabbit; four wolves in the park; a dog and a cat; a dog on the moon")
    counted = texts_of("two_to_eight_animals")
    assert counted == [prompts.with_number(animal, number) for number in range(2, 9) for animal in animals]
    assert texts_of("two_to_four_animals") == counted[:3 * 45]
    assert {"two cats", "three mice", "four foxes", "five butterflies", "six monkeys", "seven wolves",
            "eight geese", "two sheep", "three flies"} <= {*counted}


def test_unseen_prompts_are_not_in_training_and_counting_prompts_bring_their_questions():
    # Our own lists; results were measured on them.
    for name, size, sha in (("unseen_animals", 38, "13ef429f"), ("unseen_emoji_animals", 30, "9c7b304c"),
                            ("objects", 50, "6c2e27ff")):
        texts = {*texts_of(name, sha)}
        assert len(texts) == size and texts.isdisjoint(texts_of("common_animals") + texts_of("emoji_animals"))
    mice = {prompt.text: prompt for prompt in prompts.load_prompts("two_to_four_animals")}["three mice"]
    assert mice.questions == (("How many animals are in this image?", ("three", "3")),
                              ("What animal is in this image?", ("mouse", "mice")))
    assert prompts.load_prompts("common_animals")[0].questions == ()


def test_no_prompt_comes_twice_in_an_epoch_before_each_has_come_once():
    for n, count in ((45, 8), (4, 4), (4, 10)):
        asked = SimpleNamespace(samples_per_epoch=2 * count, images_per_prompt=2)
        drawn = [train.draw_prompts(list(range(n)), asked, rng(seed)) for seed in range(300)]
        for chosen in drawn:
            assert chosen[::2] == chosen[1::2]  # as many images share a prompt as are asked for, side by side
            counts = np.bincount(chosen[::2], minlength=n)
            assert counts.sum() == count and counts.max() - counts.min() <= 1
        often = np.bincount(np.concatenate(drawn), minlength=n) / 600  # each prompt as often as the others
        assert np.abs(often - count / n).max() < 4.5 * (count / n / 300) ** 0.5


# ---- It learns ----

FOUR = ["a cat", "a dog", "a frog", "a pig"]


def redness(images):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def drawn_redness(policy):
    """Of 16 images of fixed prompts and noise."""
    return redness(policy.decode(sampling.rollout(policy, FOUR * 4, rng(7), 16, keep_chain=False).x_0))


def gain(before, after):
    """Mean of the paired differences, and its standard error."""
    return (after - before).mean().item(), ((after - before).std() / len(before) ** 0.5).item()


def test_it_learns_on_the_toy_model_and_not_from_shuffled_rewards():
    policy, gains, dealer = load_policy(EMOJI, 4, 1.0, 1.0), {}, rng(1)
    start, before = policy.weights(), drawn_redness(policy)
    for shuffled in (False, True):
        policy.denoiser.load_state_dict(start)
        extras = learner(policy, 2e-4, updates_per_epoch=1, micro_batch=32, skip_last_steps=2)
        statistics = ddpo.PromptStatistics(16, 8, 10)
        for _ in range(3):
            trajectory = sampling.rollout(policy, FOUR * 8, extras["rng"], 32)
            values = redness(policy.decode(trajectory.x_0))
            if shuffled:
                values = values[torch.randperm(32, generator=dealer)]
            advantages, _ = statistics.advantages(trajectory.prompts, values)
            ddpo.ddpo_update(policy, trajectory, advantages, loss=ddpo.clipped_loss, **extras)
        gains[shuffled] = gain(before, drawn_redness(policy))
    (learned, error), (chance, _) = gains[False], gains[True]
    assert learned > 5 * error and abs(chance) < learned / 2  # noise moves the images too, but less


def test_rwr_learns_on_the_toy_model_in_one_round():
    """From each prompt's best image, against a round without a reward: that changes the images, too."""
    policy = load_policy(EMOJI, 4, 1.0, 1.0)
    start, red = policy.weights(), {}
    trajectory = sampling.rollout(policy, FOUR * 8, rng(), 32, keep_chain=False)
    values = redness(policy.decode(trajectory.x_0))
    for percentile in (0, 0.9):
        policy.denoiser.load_state_dict(start)
        extras = learner(policy, 3e-4, updates_per_epoch=10, batch_size=16, micro_batch=16)
        chosen = baselines_rwr.sparse_weights(trajectory.prompts, values, percentile)
        baselines_rwr.rwr_update(policy, trajectory, chosen, **extras)
        red[percentile] = drawn_redness(policy)
    learned, error = gain(red[0], red[0.9])
    assert learned > 5 * error


# ---- A run ----

def test_a_saved_model_draws_with_plain_diffusers_what_the_policy_drew(tiny_model):
    rows = run(*tiny_flags(tiny_model, **{"learning-rate": 1e-2, "guidance-scale": 5}))
    pipeline = StableDiffusionPipeline.from_pretrained("runs/r/model")
    pipeline.scheduler = plain_scheduler(pipeline.scheduler)  # it was saved with that of the published model
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    reloaded = load_policy("runs/r/model", 3, 1.0, 5.0)
    assert_close(weights(reloaded), torch.load("runs/r/checkpoint.pt", weights_only=True)["weights"],
                 rtol=0, atol=0)
    fixed = [prompts.load_prompts("emoji_animals")[k * 45 // 3] for k in range(3)]
    drawn = sampling.rollout(reloaded, [prompt.text for prompt in fixed], rng(train.EVAL_SEED), 3)
    images = reloaded.decode(drawn.x_0)
    theirs = drawn_by_diffusers(pipeline, "a cat", 3, train.EVAL_SEED, images=3)
    np.testing.assert_allclose(images[:1].permute(0, 2, 3, 1), theirs, atol=1e-4)
    values, _ = rewards.load_reward("compressibility")(images, fixed)
    assert values.mean().item() == pytest.approx(rows[-1]["eval_reward_mean"], abs=1e-6)


def test_a_run_follows_its_seed_and_its_evaluations_one_noise_and_their_own_steps(tiny_model, own_reward):
    flags = dict(reward=own_reward("redness"), epochs=1)
    one, six, other = (run(*tiny_flags(tiny_model, name=f"{steps}-{seed}", seed=seed, **flags,
                                       **{"eval-steps": steps})) for steps, seed in ((0, 3), (6, 3), (0, 4)))
    for name in train.TRAINING_METRICS:
        assert "seconds" in name or one[1][name] == six[1][name]
    assert one[1]["reward_mean"] != other[1]["reward_mean"]
    assert six[0]["eval_reward_mean"] != one[0]["eval_reward_mean"] == other[0]["eval_reward_mean"]
    policy, animals = load_policy(tiny_model, 6, sd_guidance=3.0), prompts.load_prompts("emoji_animals")
    _, images = train.draw_fixed(policy, animals, SimpleNamespace(eval_prompts=3, sample_batch=3))
    assert six[0]["eval_reward_mean"] == pytest.approx(redness(images).mean().item(), rel=1e-4)


def test_each_image_is_judged_by_its_own_prompt_however_many_are_judged_at_a_time(tiny_policy):
    trajectory = sampling.rollout(tiny_policy, texts_of("emoji_animals")[:8], rng(), 8, keep_chain=False)
    reward = rewards.Reward(
        "own", lambda images, given: (images.mean((1, 2, 3)), [p.text for p in given]), at_once=3)
    drawn, clock = prompts.load_prompts("emoji_animals")[:8], train.Clock(tiny_policy.device)
    values, notes = train.judge(tiny_policy, reward, trajectory, drawn, clock)
    assert_close(values.float(), tiny_policy.decode(trajectory.x_0).mean((1, 2, 3)))
    assert (*notes,) == trajectory.prompts


# ---- The tour and the README ----

def test_the_tours_cells_run_and_are_committed_with_their_outputs():
    cells = [cell for cell in json.loads((ROOT / "tour.ipynb").read_text())["cells"]
             if cell["cell_type"] == "code"]
    shown = [cell for cell in cells if re.search(r"^ *(show|print)\(", "".join(cell["source"]), re.MULTILINE)]
    assert len(shown) == 7 and all(cell["outputs"] for cell in shown)
    before, code = "\n\n".join("".join(cell["source"]) for cell in cells).split("IMAGES, UPDATES = 16, 20\n")
    exec(f"{before}IMAGES, UPDATES = 4, 2\n{code}", names := {})
    assert names["after"].shape == (4, 3, 64, 64) and (names["after_one"] != 0).any()


def test_what_a_readme_links_to_is_there_with_the_function_that_it_names():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("[eso]*/**/*.md")):  # emoji, studies, oracles
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"
        for name, file in re.findall(r"\[`(\w+)`\]\(([\w/.]+\.py)\)", text):
            code = (page.parent / file).read_text(encoding="utf-8")
            assert re.search(rf"^(    )?(def|class) {name}\b|^    {name}: ", code, re.MULTILINE), name
