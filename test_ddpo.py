"""The claims of the method and of a run, each by its name. Read as a list, they are the specification.

    pytest test_ddpo.py        # on a CPU, without network
    pytest                     # the other test files, too
"""
import hashlib
import itertools
import json
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

import baselines_rwr
import ddpo
import prompts
import rewards
import sampling
import train
from policy import Policy, load_policy
from support import settings
from support.schedulers import chain_levels, plain_scheduler, training_levels
from conftest import (EMOJI, ROOT, STABLE_DIFFUSION, learner, rng, run, tiny_flags, weights,
                      without_seconds)


# ---- Oracles: the authors' own code, diffusers, torch.distributions, closed forms ----

# Its "source" fields say which code it is
AUTHORS = json.loads((ROOT / "oracles" / "authors_oracle.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def schedule_of(scheduler, steps, eta, **options):
    """The Schedule of a chain over a scheduler's own timesteps."""
    scheduler.set_timesteps(steps)
    kind, *_ = training_levels(scheduler)
    return sampling.make_schedule(scheduler.timesteps, *chain_levels(scheduler, scheduler.timesteps), kind,
                                  eta, **options)


def with_predictions(policy, uncond, cond, guidance_scale):
    """The policy with a U-Net that predicts just this (N, C, H, W), and that guidance."""
    policy = policy.with_guidance(guidance_scale)
    policy.denoiser.forward = lambda x_t, *_, **__: (torch.cat([uncond, cond]) if len(x_t) == 2 * len(cond)
                                                     else cond,)
    policy.copies_of_timesteps = 2 if guidance_scale > 1 else 1
    return policy


def test_the_authors_step_and_log_prob():
    oracle = AUTHORS["step"]
    for steps, timesteps in oracle["timesteps"].items():
        schedule = schedule_of(DDIMScheduler(**oracle["scheduler"], clip_sample=False), int(steps),
                               oracle["eta"])
        assert schedule.timesteps.tolist() == timesteps
        for case in oracle["cases"]:
            given, theirs = case["inputs"], case["outputs"]
            if given["steps"] == int(steps):
                x_t, eps, noise = (tensor(given[name]) for name in ("x_t", "eps", "noise"))
                mean, sigma = sampling.mean_sigma(x_t, eps, timesteps.index(given["timestep"]), schedule)
                torch.testing.assert_close(mean, tensor(theirs["mean"]), rtol=1e-5, atol=1e-5)
                assert sigma.item() == pytest.approx(theirs["sigma"], rel=1e-5, abs=1e-7)
                torch.testing.assert_close(mean + sigma * noise, tensor(theirs["x_prev"]), rtol=1e-5,
                                           atol=1e-5)
                log_prob = sampling.log_prob(tensor(theirs["x_prev"]), tensor(theirs["mean"]), sigma)
                torch.testing.assert_close(log_prob, tensor(theirs["log_prob"]), rtol=1e-4, atol=1e-4)


def test_the_authors_clipped_loss_and_its_gradient():
    for case in AUTHORS["clipped_loss"]["pairs"].values():
        given, theirs = case["inputs"], case["outputs"]
        log_probs = tensor(given["log_probs"]).requires_grad_()
        loss, info = ddpo.clipped_loss(log_probs, tensor(given["old_log_probs"]),
                                       tensor(given["advantages"]).clamp(-10, 10),
                                       given["clip_range"])
        loss.backward()
        assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
        assert info["clip_fraction_low"] + info["clip_fraction_high"] == pytest.approx(theirs["clipfrac"])
        torch.testing.assert_close(log_probs.grad, tensor(theirs["grad_log_probs"]), rtol=1e-5, atol=1e-8)


def test_the_authors_guided_loss_and_its_gradient_by_both_predictions(tiny_policy):
    given, theirs = (AUTHORS["clipped_loss"]["guided"][part] for part in ("inputs", "outputs"))
    schedule = schedule_of(DDIMScheduler(**given["scheduler"], clip_sample=False), given["steps"],
                           given["eta"])
    cond, uncond = (tensor(given[name]).requires_grad_() for name in ("cond", "uncond"))
    log_probs, timesteps = [], schedule.timesteps.tolist()
    for i, (x_t, x_prev, t) in enumerate(zip(tensor(given["x_t"]), tensor(given["x_prev"]),
                                             given["timesteps"])):
        policy = with_predictions(tiny_policy, uncond[i:i + 1], cond[i:i + 1], given["guidance_scale"])
        policy.schedule = schedule
        mean, sigma = sampling.p_mean_sigma(policy, x_t[None], timesteps.index(t), ["a cat"])
        log_probs.append(sampling.log_prob(x_prev[None], mean, sigma))
    log_probs = torch.cat(log_probs)
    loss, info = ddpo.clipped_loss(log_probs, tensor(given["old_log_probs"]), tensor(given["advantages"]),
                                   given["clip_range"])
    loss.backward()
    torch.testing.assert_close(log_probs, tensor(theirs["log_probs"]), rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-4)
    assert info["clip_fraction_low"] + info["clip_fraction_high"] == pytest.approx(theirs["clipfrac"])
    for prediction, name in ((cond, "grad_cond"), (uncond, "grad_uncond")):
        scale = tensor(theirs[name]).abs().max().item()
        torch.testing.assert_close(prediction.grad, tensor(theirs[name]), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("buffer", [32, 16])
def test_the_authors_advantages(buffer):
    given = AUTHORS["advantages"]["inputs"]
    statistics = ddpo.PromptStatistics(buffer, given["min_count"], clip=10)
    outputs = AUTHORS["advantages"]["outputs"][f"buffer_{buffer}"]
    for texts, values, theirs in zip(given["prompts"], given["rewards"], outputs):
        np.testing.assert_allclose(statistics.advantages(texts, values)[0], theirs, atol=1e-6)


def test_the_authors_rwr_weights_and_kept_samples():
    weights, sparse = AUTHORS["rwr"]["weights"], AUTHORS["rwr"]["sparse"]
    given = weights["inputs"]
    np.testing.assert_allclose(baselines_rwr.rwr_weights(given["prompts"], given["rewards"], given["beta"]),
                               weights["outputs"]["weights"], rtol=1e-6)
    for values, kept in zip(sparse["inputs"]["rewards"], sparse["outputs"]["kept"]):
        ours = baselines_rwr.sparse_weights(["a"] * len(values), values, sparse["inputs"]["percentile"])
        assert ours.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("kind", ["guided", "plain"])
def test_the_authors_rwr_loss_and_its_gradient(kind, tiny_policy):
    given, theirs = AUTHORS["rwr"]["loss"]["inputs"], AUTHORS["rwr"]["loss"]["outputs"]
    scheduler = DDIMScheduler(**given["scheduler"])
    cond, uncond = (tensor(given[name]).requires_grad_() for name in ("cond", "uncond"))
    policy = with_predictions(tiny_policy, uncond, cond, given["guidance_scale"] if kind == "guided" else 1.0)
    x_0, noise, t = tensor(given["x_0"]), tensor(given["noise"]), torch.tensor(given["t"])
    _, _, a, b = training_levels(scheduler)
    a, b = (values[t].view(-1, 1, 1, 1) for values in (a, b))
    x_t, target = a * x_0 + b * noise, sampling.target_of(x_0, noise, a, b, "epsilon")
    torch.testing.assert_close(x_t, tensor(theirs["x_t"]), rtol=1e-5, atol=1e-6)
    prediction = policy.predict(x_t, t, ["a cat"] * len(x_0))
    loss, _ = baselines_rwr.weighted_denoising_loss(prediction, target, tensor(given["weights"]))
    loss.backward()
    assert loss.item() == pytest.approx(theirs[kind]["loss"], rel=1e-5)
    torch.testing.assert_close(cond.grad, tensor(theirs[kind]["grad_cond"]), rtol=1e-4, atol=1e-7)
    if kind == "guided":
        torch.testing.assert_close(uncond.grad, tensor(theirs[kind]["grad_uncond"]), rtol=1e-4, atol=1e-7)


def test_the_authors_jpeg_sizes():
    c, y, x = np.mgrid[:3, :72, :100]
    theirs = AUTHORS["jpeg"]["outputs"]
    for k, formula in enumerate(AUTHORS["jpeg"]["inputs"]["formulas"]):
        image = torch.from_numpy(eval(formula, {"c": c, "y": y, "x": x}).astype(np.float32) / 1023)
        assert np.asarray(rewards.to_pil(image)).sum(dtype=int) == theirs["sum_rounded"][k]
        assert 1000 * rewards.jpeg_kilobytes(image) == pytest.approx(theirs["bytes_rounded"][k])


SCHEDULES = [dict(), dict(steps_offset=3), dict(beta_schedule="linear"),
             dict(beta_schedule="squaredcos_cap_v2"),
             dict(timestep_spacing="trailing"), dict(timestep_spacing="trailing", beta_schedule="linear")]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("change", SCHEDULES, ids=str)
@pytest.mark.parametrize("steps, eta", [(7, 1.0), (30, 0.3), (50, 1.0)])
def test_step_equals_diffusers_or_the_closed_form(prediction_type, change, steps, eta):
    scheduler = DDIMScheduler(**{**STABLE_DIFFUSION, "prediction_type": prediction_type, **change})
    schedule = schedule_of(scheduler, steps, eta)
    x_t, prediction, noise = torch.randn((3, steps, 4, 8, 8), generator=rng())
    following = torch.cat([schedule.timesteps[1:], torch.tensor([-1])])
    compared = 0
    for k, (t, t_next) in enumerate(zip(schedule.timesteps.tolist(), following.tolist())):
        mean, sigma = sampling.mean_sigma(x_t[k:k + 1], prediction[k:k + 1], k, schedule)
        steps_to = t - 1000 // steps
        if steps_to == t_next or (steps_to < 0 and t_next == -1):
            compared += 1
            theirs, theirs_mean = (scheduler.step(prediction[k:k + 1], t, x_t[k:k + 1], eta=eta,
                                                  variance_noise=n).prev_sample
                                   for n in (noise[k:k + 1], torch.zeros(1, 4, 8, 8)))
            # Their sigma of the last step has four digits
            torch.testing.assert_close(mean, theirs_mean, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(sigma * noise[k:k + 1], theirs - theirs_mean, rtol=1e-4, atol=1e-5)
        # Song et al. 2021, equations 12 and 16, in double precision
        a = scheduler.alphas_cumprod[t].double()
        b = (scheduler.alphas_cumprod[t_next] if t_next >= 0 else scheduler.final_alpha_cumprod).double()
        s = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        x, p = x_t[k:k + 1].double(), prediction[k:k + 1].double()
        x_0 = {"epsilon": (x - (1 - a).sqrt() * p) / a.sqrt(), "sample": p,
               "v_prediction": a.sqrt() * x - (1 - a).sqrt() * p}[prediction_type]
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        torch.testing.assert_close(mean.double(), b.sqrt() * x_0 + (1 - b - s**2).sqrt() * eps, rtol=1e-5,
                                   atol=1e-5)
        torch.testing.assert_close(sigma.double(), s, rtol=1e-6, atol=0)
    # Under "trailing" at 30 steps, diffusers steps to another timestep than the next at 10 of 29.
    assert compared == steps or change.get("timestep_spacing") == "trailing" and steps in (7, 30)


@pytest.mark.parametrize("change, steps, eta, message", [
    (dict(steps_offset=0), 50, 1.0, "sigma is 0 at timestep 0"),
                                                         (dict(set_alpha_to_one=True), 1, 1.0,
                                                          "no action to learn from"),
    (dict(timestep_spacing="linspace"), 50, 1.0, "sigma is 0"), (dict(), 50, 0.0, "eta"),
                                                         (dict(), 50, -1.0, "eta"),
    (dict(), 50, 1.5, "eta")])
def test_degenerate_schedules_are_refused(change, steps, eta, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(DDIMScheduler(**{**STABLE_DIFFUSION, **change}), steps, eta)


def test_no_models_scheduler_clips_the_image_or_leaves_a_step_without_noise():
    for change in (dict(clip_sample=True), dict(thresholding=True), dict(steps_offset=0),
                   dict(timestep_spacing="linspace"),
                   dict(set_alpha_to_one=True)):
        scheduler = plain_scheduler(DDIMScheduler(**{**STABLE_DIFFUSION, **change}))
        assert not scheduler.config.clip_sample and not scheduler.config.thresholding
        assert schedule_of(scheduler, 50, 1.0).actions == 50


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_last_step_without_noise_is_drawn_but_is_no_action(spacing, tiny_policy):
    scheduler = DDIMScheduler(**{**STABLE_DIFFUSION, "set_alpha_to_one": True, "timestep_spacing": spacing})
    schedule = schedule_of(scheduler, 4, 1.0)
    assert (schedule.sigma[:3]
            > 0).all() and schedule.sigma[3] == schedule.b[4] == 0 and schedule.actions == 3
    x_t, prediction = torch.randn((2, 1, 4, 8, 8), generator=rng())
    mean, _ = sampling.mean_sigma(x_t, prediction, 3, schedule)
    torch.testing.assert_close(mean, sampling.x_0_and_eps(x_t, prediction, schedule.a[3], schedule.b[3],
                                                          "epsilon")[0])
    policy, policy.schedule = tiny_policy, schedule
    trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
    assert trajectory.latents.shape[1] == 5 and trajectory.log_probs.shape == (8, 3)
    seen = []
    def loss(log_probs, old, advantages, clip_range):
        seen.append(old)
        return ddpo.clipped_loss(log_probs, old, advantages, clip_range)
    for skipped, learned in ((0, 3), (1, 3), (2, 2)):
        seen.clear()
        ddpo.ddpo_update(policy, trajectory, torch.ones(8), loss=loss,
                         **learner(policy, 0.0, skip_last_steps=skipped))
        assert sorted(torch.cat(seen).tolist()) == sorted(trajectory.log_probs[:,
                                                                               :learned].flatten().tolist())


def flow(steps, eta, **settings):
    return schedule_of(FlowMatchEulerDiscreteScheduler(**settings), steps, eta, scored=eta > 0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_the_step_of_flow_matching_is_diffusers_euler_step(shift):
    schedule, theirs = flow(10, 0.0, shift=shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(10)
    x_t, v = torch.randn((2, 1, 4, 8, 8), generator=rng())
    assert torch.equal(schedule.timesteps, theirs.timesteps) and schedule.a[0] == 0 and schedule.b[-1] == 0
    for k, t in enumerate(theirs.timesteps):
        mean, sigma = sampling.mean_sigma(x_t, v, k, schedule)
        torch.testing.assert_close(mean, theirs.step(v, t, x_t).prev_sample, rtol=1e-5, atol=1e-5)
        assert sigma == 0


def test_at_eta_one_the_step_of_flow_matching_is_the_posterior_of_the_forward_process():
    """x_t = (a / a') x_prev + noise, and x_prev = a' x_0 + b' eps: Bayes' rule for two Gaussians, one
    dimension, double precision."""
    schedule = flow(8, 1.0)
    x_0, x_t = torch.randn((2, 8), generator=rng()).double()
    a, b = schedule.a.double(), schedule.b.double()
    a, b, a_prev, b_prev = a[:-1], b[:-1], a[1:], b[1:]
    slope, noise = a / a_prev, b**2 - (a * b_prev / a_prev) ** 2
    precision = slope**2 / noise + 1 / b_prev**2
    expected = (slope * x_t / noise + a_prev * x_0 / b_prev**2) / precision
    v = (x_t - x_0) / b  # the prediction that says this x_0
    for k in range(7):
        mean, sigma = sampling.mean_sigma(x_t[k:k + 1].float(), v[k:k + 1].float(), k, schedule)
        torch.testing.assert_close(mean.double(), expected[k:k + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sigma.double(), precision[k] ** -0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(**STABLE_DIFFUSION), FlowMatchEulerDiscreteScheduler()],
                         ids=["diffusion", "flow"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_coefficients_preserving_sampling_turns_the_noise_by_an_angle(scheduler, eta):
    """Wang and Yu 2025: x_prev = a' x_0 + b' (cos(eta pi / 2) eps + sin(eta pi / 2) new noise). At eta = 1
    nothing of eps is left."""
    schedule, (x_0, eps) = schedule_of(scheduler, 8, eta, noise="cps"), torch.randn((2, 8, 4, 8, 8),
                                                                                    generator=rng())
    for k in range(8):
        a, b, a_prev, b_prev = schedule.a[k], schedule.b[k], schedule.a[k + 1], schedule.b[k + 1]
        prediction = sampling.target_of(x_0, eps, a, b, schedule.prediction_type)
        mean, sigma = sampling.mean_sigma(a * x_0 + b * eps, prediction, k, schedule)
        torch.testing.assert_close(mean, a_prev * x_0 + b_prev * np.cos(eta * np.pi / 2) * eps, rtol=1e-4,
                                   atol=1e-4)
        torch.testing.assert_close(sigma, b_prev * np.sin(eta * np.pi / 2), rtol=1e-5, atol=1e-7)


def test_what_the_network_should_predict_is_what_says_the_image_and_the_noise():
    x_0, eps = torch.randn((2, 3, 4, 8, 8), generator=rng())
    for kind, a, b in (("epsilon", 0.6, 0.8), ("v_prediction", 0.6, 0.8), ("sample", 0.6, 0.8),
                       ("flow", 0.3, 0.7)):
        target = sampling.target_of(x_0, eps, a, b, kind)
        for said, true in zip(sampling.x_0_and_eps(a * x_0 + b * eps, target, a, b, kind), (x_0, eps)):
            torch.testing.assert_close(said, true, rtol=1e-4, atol=1e-5)


def test_log_prob_is_the_mean_over_dimensions_of_torch_distributions():
    x_prev, mean = torch.randn((2, 5, 4, 8, 8), generator=rng())
    sigma = torch.rand((5, 1, 1, 1), generator=rng()) + 0.01
    expected = torch.distributions.Normal(mean, sigma).log_prob(x_prev).mean((1, 2, 3))
    torch.testing.assert_close(sampling.log_prob(x_prev, mean, sigma), expected)


def test_kl_is_that_of_torch_distributions_per_dimension():
    mean, other = torch.randn(2, 3, 4, 8, 8, generator=rng())
    sigma = torch.rand(3, 1, 1, 1, generator=rng()) + 0.1
    Normal = torch.distributions.Normal
    oracle = torch.distributions.kl_divergence(Normal(mean, sigma), Normal(other, sigma)).mean((1, 2, 3))
    torch.testing.assert_close(sampling.gaussian_kl(mean, other, sigma), oracle)


def test_guided_prediction_equals_the_plain_formula(tiny_policy):
    x_t, t = torch.randn((2, 4, 8, 8), generator=rng()), torch.tensor([751, 1])
    cond, uncond = tiny_policy.pipeline.encode_prompt(["a cat", "an ant"], "cpu", 1, True)
    with torch.no_grad():
        cond, uncond = (tiny_policy.denoiser(x_t, t, states).sample for states in (cond, uncond))
        guided, plain = (tiny_policy.with_guidance(w).predict(x_t, t, ["a cat", "an ant"])
                         for w in (5.0, 1.0))
    torch.testing.assert_close(guided, uncond + 5 * (cond - uncond))
    torch.testing.assert_close(plain, cond)


def test_at_ratio_one_both_estimators_have_the_same_gradient():
    old, advantages = torch.randn((2, 64), generator=rng())
    for loss, value in ((ddpo.score_function_loss, -(advantages * old).mean()),
                        (ddpo.clipped_loss, -advantages.mean())):
        log_probs = old.clone().requires_grad_()
        ours, _ = loss(log_probs, old, advantages, 0.1)
        ours.backward()
        torch.testing.assert_close(ours, value)
        torch.testing.assert_close(log_probs.grad, -advantages / 64)


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1, 0.8, True), (1, 1.0, True), (1, 1.2, False), (-1, 0.8, False), (-1, 1.0, True), (-1, 1.2, True)])
def test_clipping_stops_the_gradient_only_outside_the_clip_range(advantage, ratio, moves):
    log_probs = torch.tensor([ratio]).log().requires_grad_()
    loss, info = ddpo.clipped_loss(log_probs, torch.zeros(1), torch.tensor([float(advantage)]), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-min(advantage * ratio, advantage * min(max(ratio, 0.9), 1.1)))
    assert log_probs.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-6)
    assert (info["clip_fraction_low"], info["clip_fraction_high"]) == (ratio < 0.9, ratio > 1.1)


def test_score_function_gradient_agrees_with_the_closed_form_of_a_gaussian_policy():
    # x ~ Normal(mu, 1), r(x) = -(x - 3)^2: J = -(mu - 3)^2 - 1, dJ/dmu = -2 (mu - 3) = 4 at mu = 1.
    mu, samples = torch.tensor(1.0, requires_grad=True), 200_000
    x = 1.0 + torch.randn(samples, generator=rng())
    reward = -(x - 3) ** 2
    baseline = -5.0  # J at mu = 1; any constant leaves the mean where it is
    per_sample = (reward - baseline) * (x - 1.0)
    log_probs = sampling.log_prob(x.view(-1, 1, 1, 1), mu.expand(samples, 1, 1, 1), torch.ones(()))
    loss, _ = ddpo.score_function_loss(log_probs, log_probs.detach(), reward - baseline, 0.1)
    loss.backward()
    standard_error = per_sample.std() / samples**0.5
    assert abs(-mu.grad - 4) < 4 * standard_error
    assert standard_error < 0.05


# ---- Rewards into advantages ----


def test_a_prompt_with_enough_rewards_uses_its_own_statistics_and_another_the_batch():
    statistics = ddpo.PromptStatistics(buffer=3, min_count=3, clip=10)
    advantages, share = statistics.advantages(["a", "a", "b", "b"], torch.tensor([1.0, 2.0, 3.0, 6.0]))
    batch = np.array([1, 2, 3, 6])
    np.testing.assert_allclose(advantages, (batch - 3) / batch.std(), rtol=1e-6)
    assert share == 0
    advantages, share = statistics.advantages(["a", "b", "a"], torch.tensor([5.0, 0.0, 0.0]))
    # Appended first; the buffer dropped the oldest of "a"
    own_a, own_b = np.array([2, 5, 0]), np.array([3, 6, 0])
    np.testing.assert_allclose(advantages, [(5 - own_a.mean()) / own_a.std(), -3 / own_b.std(),
                                            -own_a.mean() / own_a.std()],
                               rtol=1e-6)
    assert share == 1


@pytest.mark.parametrize("values", [[1, 2, 3, 5], np.array([1, 2, 3, 5]), torch.tensor([1, 2, 3, 5])],
                         ids=type)
def test_integer_rewards_are_not_truncated_and_advantages_are_float32(values):
    advantages, _ = ddpo.PromptStatistics(32, 16, 10).advantages("abcd", values)
    assert advantages.dtype == torch.float32
    np.testing.assert_allclose(advantages, (np.array([1, 2, 3, 5]) - 2.75) / np.std([1, 2, 3, 5]), rtol=1e-6)


def test_equal_rewards_give_zero_and_outliers_are_clipped():
    statistics = ddpo.PromptStatistics(32, 16, clip=2)
    assert statistics.advantages("ab", torch.full((2,), 0.1))[0].tolist() == [0, 0]
    assert statistics.advantages("ab" * 20, torch.full((40,), 0.1))[0].tolist() == [0] * 40
    assert ddpo.PromptStatistics(32, 16, 2).advantages("abcdefghij", [0] * 9 + [9])[0].max() == 2


@pytest.mark.parametrize("offset", [0.1, 1e6])
def test_only_the_rounding_of_float32_counts_as_equal(offset):
    """Rewards that a float32 network rounds one step up or down are equal; a deviation of half a millionth is
    not."""
    one_step = np.nextafter(np.float32(offset), np.float32(np.inf)) - np.float64(np.float32(offset))
    rounded = np.float64(np.float32(offset)) + one_step * np.array([0, 1, 0, 1])
    apart = offset * (1 + 5e-7 * np.array([-1, 1, -1, 1]))
    assert ddpo.PromptStatistics(32, 16, 10).advantages("abcd", rounded)[0].tolist() == [0] * 4
    assert ddpo.PromptStatistics(32, 16, 10).advantages("abcd",
                                                        apart)[0].tolist() == pytest.approx([-1, 1, -1, 1])


def test_advantages_do_not_depend_on_the_unit_of_the_reward():
    values = np.array([1.0, 2.0, 3.0, 5.0])
    large, small = (ddpo.PromptStatistics(32, 16, 10).advantages("abcd", scale * values)[0]
                    for scale in (1.0, 1e-6))
    # With a floor of 1e-6 under the deviation, the second would be 0.6 of the first
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("values", [[1e6, 1e6 + 0.5], np.array([1e6, 1e6 + 0.5]),
                                    torch.tensor([1e6, 1e6 + 0.5]).double()], ids=type)
def test_a_large_offset_loses_no_differences_on_the_way_from_reward_to_advantage(values, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "offset", lambda images, prompts: values)
    kept, _ = rewards.load_reward("offset")(torch.rand(2, 3, 8, 8), [prompts.Prompt("a")] * 2)
    assert kept.dtype == torch.float64 and (kept[1] - kept[0]).item() == 0.5
    assert ddpo.PromptStatistics(32, 16, 10).advantages("ab", kept)[0].tolist() == [-1, 1]


def test_a_prompts_statistics_hold_all_its_rewards_of_the_epoch():
    """With one prompt and a buffer of 3, the last three alone would shift all advantages."""
    statistics, values = ddpo.PromptStatistics(buffer=3, min_count=3, clip=10), np.arange(8.0)
    for _ in range(2):  # rewards of the epoch before do not count any more
        np.testing.assert_allclose(statistics.advantages(["a"] * 8, values)[0], (values - 3.5) / values.std(),
                                   rtol=1e-6)
    few, own = statistics.advantages(["a"], [9.0])  # fewer than the buffer: the last three, as always
    assert few.item() == pytest.approx((9 - 22 / 3) / np.std([6, 7, 9])) and own == 1


def test_with_a_buffer_of_one_the_images_of_a_prompt_are_compared_with_each_other_alone():
    """As in GRPO: whitened by the group's own mean and deviation, whatever earlier epochs brought."""
    statistics = ddpo.PromptStatistics(buffer=1, min_count=1, clip=10)
    for epoch in range(2):
        values = np.random.default_rng(epoch).normal(size=8) + 100 * epoch
        advantages, own = statistics.advantages("aaaabbbb", values)
        groups = values.reshape(2, 4)
        expected = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
        assert own == 1 and advantages.tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-5)


def test_evaluations_may_take_other_steps_than_training(tiny_model, own_reward):
    flags = dict(reward=own_reward("redness"), epochs=1)
    few, many, both = (
        run(*tiny_flags(tiny_model, name=name, **flags, **{"sampling-steps": steps, "eval-steps": evaluated}))
        for name, steps, evaluated in (("few", 3, 0), ("many", 6, 0), ("both", 3, 6)))
    assert both[0]["eval_reward_mean"] == many[0]["eval_reward_mean"] != few[0]["eval_reward_mean"]
    assert both[1]["reward_mean"] == few[1]["reward_mean"] != many[1]["reward_mean"]
    assert both[1]["loss"] == few[1]["loss"]


def test_no_prompt_comes_twice_in_an_epoch_before_each_has_come_once():
    for n, count in ((45, 8), (4, 4), (4, 10)):
        asked = SimpleNamespace(samples_per_epoch=count, images_per_prompt=1)
        drawn = [train.draw_prompts(list(range(n)), asked, rng(seed)) for seed in range(300)]
        for chosen in drawn:
            counts = [chosen.count(k) for k in range(n)]
            assert len(chosen) == count and max(counts) - min(counts) <= 1
        often = np.bincount(np.concatenate(drawn), minlength=n) / 300  # each prompt as often as the others
        assert np.abs(often - count / n).max() < 4.5 * (count / n / 300) ** 0.5


def test_as_many_images_of_an_epoch_share_a_prompt_as_are_asked_for(tiny_model, own_reward):
    rows = run(*tiny_flags(tiny_model, reward=own_reward("redness"),
                           **{"samples-per-epoch": 8, "images-per-prompt": 4}))
    drawn = [text for text, _, _ in rows[1]["notes"]]
    assert drawn == [drawn[0]] * 4 + [drawn[4]] * 4 and drawn[0] != drawn[4]


def test_other_baselines_are_the_batch_alone_or_nothing():
    prompts, values = ["a"] * 4 + ["b"] * 4, np.arange(8.0)
    advantages = {name: ddpo.PromptStatistics(4, 2, 100, name).advantages(prompts, values)[0]
                  for name in ("prompt", "batch", "none")}
    np.testing.assert_allclose(advantages["batch"], (values - 3.5) / values.std(), rtol=1e-6)
    np.testing.assert_allclose(advantages["none"], values)
    bare, _ = ddpo.PromptStatistics(4, 2, 10.0, "none").advantages(["a"] * 2, [-80.0, -50.0])
    assert bare.tolist() == [-80, -50]  # the clip is of whitened rewards: at 10 these would be equal
    np.testing.assert_allclose(advantages["prompt"][:4], advantages["prompt"][4:])


# ---- The chain and its scoring ----


@pytest.mark.parametrize("micro_batch", [1, 3, 40])
def test_ratio_is_one_for_every_image_and_step_before_the_first_update(micro_batch):
    config = settings.build_config({})
    policy = load_policy(EMOJI, config.sampling_steps, config.eta, 3.0)
    trajectory = sampling.rollout(policy, ["a cat", "two dogs"] * 2, rng(), batch_size=3)
    assert (scores(policy, trajectory, micro_batch) - trajectory.log_probs).exp().sub(1).abs().max() <= 2e-6


@torch.no_grad()
def scores(policy, trajectory, micro_batch):
    """log p of every recorded action (B, A), scored micro_batch images at a time."""
    B, A = trajectory.log_probs.shape
    return torch.stack([torch.cat([sampling.score(policy, trajectory, part, k)[0]
                                   for part in torch.arange(B).split(micro_batch)])
                        for k in range(A)], 1)


def test_first_update_reports_a_ratio_of_one_and_the_second_has_moved(tiny_policy):
    trajectory = sampling.rollout(tiny_policy, ["a cat"] * 8, rng(), 8)
    info = ddpo.ddpo_update(tiny_policy, trajectory, torch.randn(8, generator=rng()), loss=ddpo.clipped_loss,
                            **learner(tiny_policy))
    assert info["ratio_deviation"] <= 2e-6
    assert info["ratio_mean"] != 1 and info["grad_norm"] > 0


def test_bf16_autocast_keeps_the_ratio_within_a_thousandth_even_at_unequal_batch_sizes(tiny_model):
    policy = load_policy(tiny_model, 4, 1.0, 5.0, precision="bf16")
    trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
    scored = scores(policy, trajectory, 3)
    assert trajectory.latents.dtype == scored.dtype == torch.float32
    assert ((scored - trajectory.log_probs).exp() - 1).abs().max() < 1e-3


@pytest.mark.parametrize("noise", sampling.NOISES)
def test_images_keep_their_own_latents_and_prompts_when_shuffled(either_model, noise):
    policy = load_policy(either_model, 4, 0.7, 5.0, noise=noise)
    trajectory = sampling.rollout(policy, ["a cat", "an ant", "two dogs", "a bee"], rng(), 4)
    assert trajectory.log_probs.shape == (4, policy.schedule.actions)
    assert policy.schedule.actions == {"epsilon": 4, "flow": 3}[policy.schedule.prediction_type]
    # The last action of flow matching ends at a noise level of 0.004: a rounding of x_{t-1} is that much
    # larger in its log p.
    tolerance, order = 2e-6 if policy.schedule.actions == 4 else 1e-4, torch.tensor([2, 0, 3, 1])
    other = replace(trajectory, prompts=trajectory.prompts[::-1])
    for k in range(policy.schedule.actions):
        scored, _ = sampling.score(policy, trajectory, order, k)
        torch.testing.assert_close(scored, trajectory.log_probs[order, k], rtol=0, atol=tolerance)
        # So the line above does notice whose prompt is whose
        assert (sampling.score(policy, other, order, k)[0] - scored).abs().min() > 0


def test_images_do_not_depend_on_how_many_are_drawn_at_a_time(tiny_policy):
    texts = ["a cat", "a dog", "an ant", "a bee", "a fox"]
    whole, parts = (sampling.rollout(tiny_policy, texts, rng(), size) for size in (5, 2))
    torch.testing.assert_close(whole.latents, parts.latents, rtol=1e-4, atol=1e-5)
    images = tiny_policy.decode(whole.x_0)
    assert images.shape == (5, 3, 16, 16) and 0 <= images.min() and images.max() <= 1


def test_without_chain_only_x_0_is_kept_and_it_is_the_same(tiny_policy):
    chain, last = (sampling.rollout(tiny_policy, ["a cat"] * 2, rng(), 2, keep_chain=keep)
                   for keep in (True, False))
    assert chain.latents.shape == (2, 5, 4, 8, 8) and last.latents.shape == (2, 1, 4, 8, 8)
    assert torch.equal(chain.x_0, last.x_0) and torch.equal(chain.x_0, chain.latents[:, -1])


def test_rollout_equals_diffusers_own_pipeline(tiny_policy):
    ours = tiny_policy.decode(sampling.rollout(tiny_policy, ["a cat"], rng(), 1).x_0)
    theirs = drawn_by_diffusers(tiny_policy.pipeline, "a cat", first_noise(rng(), images=1, states=5))
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-4)


def test_a_sampler_without_noise_is_diffusers_own_and_cannot_be_scored(tiny_model):
    policy = load_policy(tiny_model, steps=5, eta=0, guidance_scale=5.0, scored=False)
    pipeline = policy.pipeline
    images = policy.decode(sampling.rollout(policy, ["a cat", "a dog"], rng(), 2, keep_chain=False).x_0)
    pipeline.set_progress_bar_config(disable=True)
    seeds = torch.randint(2**62, (2,), generator=rng()).tolist()
    x_T = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    theirs = pipeline(["a cat", "a dog"], num_inference_steps=5, eta=0.0, guidance_scale=5.0, latents=x_T,
                      output_type="pt").images
    torch.testing.assert_close(images, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="deterministic"):
        load_policy(tiny_model, steps=5, eta=0, guidance_scale=5.0)


def first_noise(rng, images, states):
    """The noise (1, T + 1, 4, 8, 8) of the first of so many images of a rollout."""
    seed = torch.randint(2**62, (images,), generator=rng)[0].item()
    return torch.randn((1, states, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def drawn_by_diffusers(pipeline, prompt, noise):
    """One image (1, H, W, 3) by diffusers' pipeline from noise (1, T + 1, C, H, W): it draws its own inside
    its step."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.step = partial(_step_with_noise, pipeline.scheduler.step, iter(noise[:, 1:].unbind(1)))
    return pipeline(prompt, num_inference_steps=noise.shape[1] - 1, guidance_scale=5.0, eta=1.0,
                    latents=noise[:, 0],
                    output_type="np").images


def _step_with_noise(step, noise, *args, eta=1.0, generator=None, **kwargs):
    return step(*args, eta=eta, variance_noise=next(noise), **kwargs)


def test_an_image_that_is_not_finite_is_refused_and_not_taken_for_a_black_one(tiny_policy):
    with torch.no_grad():
        tiny_policy.pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    trajectory = sampling.rollout(tiny_policy, ["a cat"], rng(), 1)
    with pytest.raises(FloatingPointError, match="image is not finite"):
        tiny_policy.decode(trajectory.x_0)


# ---- DDPO's update ----


def distance(some, others):
    """Of two policies' weights: the sum of their absolute differences."""
    return sum((one - other).abs().sum() for one, other in zip(some.values(), others.values()))


def test_update_equals_a_plain_loop_over_images_and_steps(either_model):
    one, two = (load_policy(either_model, 3, 1.0, 5.0) for _ in range(2))
    trajectory = sampling.rollout(one, ["a cat", "a dog"], rng(), 2)
    advantages = torch.tensor([1.0, -2.0])
    extras, optimizer = learner(one, sgd=0.1, updates_per_epoch=1), torch.optim.SGD(two.denoiser.parameters(),
                                                                                    lr=0.1)
    before = weights(one)
    ddpo.ddpo_update(one, trajectory, advantages, loss=ddpo.clipped_loss, **extras)
    total, actions = 0, two.schedule.actions
    for i, k in itertools.product(range(2), range(actions)):
        log_prob, _ = sampling.score(two, trajectory, torch.tensor([i]), k)
        total = total - advantages[i] * (log_prob - trajectory.log_probs[i, k]).exp().sum() / (2 * actions)
    total.backward()
    torch.nn.utils.clip_grad_norm_(two.denoiser.parameters(), 1.0)
    optimizer.step()
    assert 0 < distance(before, weights(one)) and distance(weights(one),
                                                           weights(two)) < 1e-3 * distance(before,
                                                                                           weights(one))


@pytest.mark.parametrize("loss", [ddpo.score_function_loss, ddpo.clipped_loss])
def test_micro_batch_does_not_change_an_update(tiny_model, loss):
    results, start = [], weights(load_policy(tiny_model, 4, 1.0, 5.0))
    for micro_batch in (1, 7, 1000):
        policy = load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory = sampling.rollout(policy, ["a cat", "a dog"] * 4, rng(), 8)
        # SGD: AdamW divides by the gradient's size and would blow rounding of near-zero gradients up.
        extras = learner(policy, sgd=0.1, micro_batch=micro_batch, updates_per_epoch=2, max_grad_norm=1e9)
        info = ddpo.ddpo_update(policy, trajectory, torch.randn(8, generator=rng()), loss=loss, **extras)
        results.append((weights(policy), info))
    for other, info in results[1:]:
        assert 0 < distance(start, other) and distance(results[0][0], other) < 1e-4 * distance(start, other)
        assert info["grad_norm"] == pytest.approx(results[0][1]["grad_norm"], rel=1e-3)
        assert info["approx_kl"] == pytest.approx(results[0][1]["approx_kl"], rel=1e-2, abs=1e-6)


def slope_over_sigma(steps):
    """c / sigma of each step (T,), where c = d mean / d eps."""
    schedule = schedule_of(DDIMScheduler(**STABLE_DIFFUSION), steps, 1.0)
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    return torch.stack([(sampling.mean_sigma(zero, one, k, schedule)[0]
                         - sampling.mean_sigma(zero, zero, k, schedule)[0]).squeeze()
                        / schedule.sigma[k] for k in range(steps)])


@pytest.mark.parametrize("steps, share", [(5, 0.95), (10, 0.86), (50, 0.49)])
def test_the_last_but_one_step_carries_most_of_the_gradients_variance(steps, share):
    """By the closed form: a step's score for eps is c / sigma times unit noise, so its variance is (c /
    sigma)^2."""
    variance_of_step = slope_over_sigma(steps) ** 2
    assert variance_of_step[-2] / variance_of_step.sum() == pytest.approx(share, abs=0.01)


def test_the_kl_and_the_squared_difference_of_dpoks_code_weigh_steps_differently():
    """By the closed form: the KL of a difference d in eps is (c / sigma)^2 / 2 times d^2. DPOK's code takes
    d^2."""
    kl = slope_over_sigma(50) ** 2 / 2
    assert (kl.median().item(), kl[-2].item()) == pytest.approx((0.088, 5.36), rel=0.01)


def test_skipped_steps_do_not_count_in_an_update(tiny_model):
    results = []
    for change in (0.0, 1.0):
        policy = load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
        trajectory.latents[:, 3:] += change  # what steps 2 and 3 did; step 1 led to state 2
        ddpo.ddpo_update(policy, trajectory, torch.randn(8, generator=rng()), loss=ddpo.clipped_loss,
                         **learner(policy, skip_last_steps=2))
        results.append(weights(policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_some_steps_of_an_update_are_drawn_evenly_so_that_the_gradient_is_unbiased(tiny_policy, monkeypatch):
    counts = torch.zeros(8, 4)

    def record(policy, trajectory, advantages, k, loss, config, images):
        counts[images, k] += 1
        return torch.zeros((), requires_grad=True) * 0, {"ratio_deviation": torch.zeros(())}

    monkeypatch.setattr(ddpo, "surrogate", record)
    monkeypatch.setattr(ddpo.Learner, "clipped_step", lambda _: {"grad_norm": 1.0, "skipped_updates": 0})
    trajectory = sampling.rollout(tiny_policy, ["a cat"] * 8, rng(), 8)
    extras = learner(tiny_policy, skip_last_steps=1, learn_steps=2, updates_per_epoch=1, micro_batch=3)
    for epoch in range(1, 301):
        ddpo.ddpo_update(tiny_policy, trajectory, torch.ones(8), loss=ddpo.clipped_loss, **extras)
        # Two steps, and the same ones of each image
        assert (counts.sum(1) == 2 * epoch).all() and (counts == counts[0]).all()
    assert (counts[:, 3] == 0).all()  # the skipped one
    assert (counts[0, :3] / 300 - 2 / 3).abs().max() < 4 * (2 / 9 / 300) ** 0.5  # four standard errors


def test_the_kl_penalty_is_zero_at_the_pretrained_policy_and_pulls_back_to_it(tiny_model):
    kls = {}
    for weight in (0.0, 100.0):
        policy = load_policy(tiny_model, 4, 1.0, 5.0, keep_reference=True)
        trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
        extras = learner(policy, kl_weight=weight, updates_per_epoch=1)
        kls[weight] = [ddpo.ddpo_update(policy, trajectory, torch.randn(8, generator=rng(k)),
                                        loss=ddpo.clipped_loss,
                                        **extras)["kl_pretrained"] for k in range(5)]
        assert all(not weight.requires_grad for weight in policy.reference.values())
    assert kls[0.0][0] == kls[100.0][0] == 0
    assert 0 < kls[100.0][-1] < kls[0.0][-1] / 2


def test_a_gradient_that_is_not_finite_stops_before_any_weight_is_touched(tiny_policy):
    start, trainer = weights(tiny_policy), learner(tiny_policy)["learner"]
    for weight in trainer.weights:
        weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        trainer.clipped_step()
    assert all(torch.equal(weight, start[name]) for name, weight in weights(tiny_policy).items())


@pytest.mark.parametrize("fused", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_the_fp16_scaler_skips_a_step_that_overflowed_and_lowers_its_scale(fused, tiny_policy):
    trainer = learner(tiny_policy)["learner"]
    trainer.optimizer = torch.optim.AdamW(trainer.weights, lr=1e-3, fused=fused)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(gradient):
        scale = trainer.scaler.scale(torch.ones(())).item()
        for weight in trainer.weights:
            weight.grad = torch.full_like(weight, gradient * scale)
        return scale, trainer.clipped_step()

    for gradient, steps in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = weights(tiny_policy)
        scale, info = step(gradient)
        moved = any(not torch.equal(weight, before[name]) for name, weight in weights(tiny_policy).items())
        assert moved == steps == (not info["skipped_updates"])
        assert trainer.scaler.get_scale() == (scale if steps else scale / 2)
        size = sum(weight.numel() for weight in trainer.weights) ** 0.5
        assert info["grad_norm"] == pytest.approx(size) or not steps
    with pytest.raises(FloatingPointError, match="not finite"):  # at any scale: it trains nothing
        for _ in range(4):
            step(float("inf"))


# ---- Reward-weighted regression ----


def test_rwr_weights_are_a_softmax_per_prompt_that_averages_one():
    prompts, values = ["a", "b", "a", "b", "b"], [1, 5, 2, 5, 6]  # integers, too
    weights = baselines_rwr.rwr_weights(prompts, values, beta=2.0)
    e = np.exp(2.0)
    np.testing.assert_allclose(weights[[0, 2]], np.array([1, e]) / (1 + e) * 2, rtol=1e-6)
    np.testing.assert_allclose(weights[[1, 3, 4]], np.array([1, 1, e]) / (2 + e) * 3, rtol=1e-6)
    # Per prompt, not global: what another prompt gets does not matter.
    torch.testing.assert_close(baselines_rwr.rwr_weights(prompts, [1, 105, 2, 105, 106], 2.0), weights)
    assert weights.dtype == torch.float32


def test_rwr_at_beta_zero_is_plain_fine_tuning_and_at_a_large_one_the_best_sample():
    prompts, values = ["a"] * 3 + ["b"] * 2, [0.1, 0.3, 0.2, -1e4, 1e4]
    assert baselines_rwr.rwr_weights(prompts, values, 0.0).tolist() == [1] * 5
    torch.testing.assert_close(baselines_rwr.rwr_weights(prompts, values, 1e4),
                               torch.tensor([0.0, 3, 0, 0, 2]))


def test_sparse_weights_keep_the_top_fraction_of_each_prompt():
    prompts = ["a"] * 20 + ["b"] * 4
    weights = baselines_rwr.sparse_weights(prompts, [*range(20), 900, 903, 901, 902], percentile=0.9)
    assert weights.tolist() == [0] * 18 + [10, 10] + [0, 4, 0, 0]  # of fewer than ten: the best one
    assert baselines_rwr.sparse_weights(prompts, range(24), 0.0).tolist() == [1] * 24
    assert baselines_rwr.sparse_weights(["a"] * 4, [1, 7, 7, 7],
                                        0.5).tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])


@pytest.mark.parametrize("weigh", [baselines_rwr.rwr_weights, baselines_rwr.sparse_weights])
def test_equal_rewards_or_a_single_sample_have_a_weight_of_one(weigh):
    assert weigh(["a", "b", "b", "b"], [3.0, 0.1, 0.1, 0.1], 0.9).tolist() == [1] * 4


def test_uniform_weights_without_guidance_are_the_plain_loss_of_flow_matching(tiny_flow):
    policy = load_policy(tiny_flow, 4, 1.0, 1.0)
    trajectory = sampling.rollout(policy, ["a cat", "a dog"] * 4, rng(), 8, keep_chain=False)
    info = baselines_rwr.rwr_update(policy, trajectory, torch.ones(8),
                                    **learner(policy, 0.0, updates_per_epoch=1))
    order, noise = torch.randperm(8, generator=(again := rng())), torch.randn(8, 4, 8, 8, generator=again)
    # Of training: 1,000, from the smallest
    sigmas = FlowMatchEulerDiscreteScheduler(shift=2.0).sigmas.flip(0)
    s = sigmas[torch.randint(1000, (8,), generator=again)].view(8, 1, 1, 1)
    x_0, (states, _) = trajectory.x_0[order], policy.pipeline.encode_prompt([trajectory.prompts[i]
                                                                             for i in order], "cpu", 1, False)
    with torch.no_grad():
        v = policy.denoiser((1 - s) * x_0 + s * noise, 1000 * s.flatten(), states).sample
    assert info["loss"] == pytest.approx(torch.nn.functional.mse_loss(v, noise - x_0).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_uniform_weights_without_guidance_are_the_plain_denoising_loss(tiny_model, kind):
    policy = load_policy(tiny_model, 4, 1.0, 1.0, prediction_type=kind)
    trajectory = sampling.rollout(policy, ["a cat", "a dog", "an ant"], rng(), 3, keep_chain=False)
    info = baselines_rwr.rwr_update(policy, trajectory, torch.ones(3),
                                    **learner(policy, 0.0, updates_per_epoch=1, batch_size=3))
    order, noise = torch.randperm(3, generator=(again := rng())), torch.randn(3, 4, 8, 8, generator=again)
    t = torch.randint(1000, (3,), generator=again)
    with torch.no_grad():  # As in diffusers' train_text_to_image.py.
        pipeline, x_0 = policy.pipeline, trajectory.x_0[order]
        x_t = pipeline.scheduler.add_noise(x_0, noise, t)
        ids = pipeline.tokenizer([trajectory.prompts[i] for i in order], padding="max_length",
                                 return_tensors="pt").input_ids
        target = {"epsilon": noise, "v_prediction": pipeline.scheduler.get_velocity(x_0, noise, t),
                  "sample": x_0}[kind]
        plain = torch.nn.functional.mse_loss(pipeline.unet(x_t, t, pipeline.text_encoder(ids)[0]).sample,
                                             target)
    assert info["loss"] == pytest.approx(plain.item(), rel=1e-5)


def test_the_weighted_loss_is_the_mean_of_weight_times_squared_error():
    prediction, target = torch.randn(2, 3, 4, 2, 2, generator=rng())
    loss, info = baselines_rwr.weighted_denoising_loss(prediction, target, torch.tensor([2.0, 0.0, 1.0]))
    errors = [((prediction[i] - target[i]) ** 2).mean() for i in range(3)]
    torch.testing.assert_close(loss, (2 * errors[0] + errors[2]) / 3)
    torch.testing.assert_close(info["denoising_error"], sum(errors) / 3)


def test_rwr_draws_from_reshuffled_passes_over_the_kept_samples():
    batches = baselines_rwr.reshuffled_passes(torch.tensor([3, 5, 8]), batches=4, batch_size=5, rng=rng())
    assert batches.shape == (4, 5)
    assert sorted(torch.unique(batches, return_counts=True)[1].tolist()) == [6, 7, 7]
    for start in range(0, 18, 3):  # each pass holds each sample once
        assert sorted(batches.flatten()[start:start + 3].tolist()) == [3, 5, 8]


def test_micro_batch_does_not_change_a_round_of_rwr_and_images_of_weight_zero_do_not_count(tiny_model):
    results = []
    for micro_batch, noise in ((1, 0), (8, 0), (3, 0), (8, 9)):
        policy = load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory = sampling.rollout(policy, ["a cat", "a dog"] * 4, rng(), 8, keep_chain=False)
        trajectory.latents[[0, 5]] += noise
        extras = learner(policy, sgd=0.1, micro_batch=micro_batch, max_grad_norm=1e9)
        info = baselines_rwr.rwr_update(policy, trajectory, torch.tensor([0.0, 1, 2, 1, 1, 0, 2, 1]),
                                        **extras)
        results.append((weights(policy), info))
    for other, info in results[1:]:
        assert info == pytest.approx(results[0][1], rel=1e-3)
        for name, weight in results[0][0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_the_loss_is_guided_as_the_sampling_is_or_as_it_is_told(tiny_model, monkeypatch):
    losses, scales, predict = [], [], Policy.predict
    monkeypatch.setattr(Policy, "predict", lambda policy, x_t, t, prompts: (
        scales.append(policy.guidance_scale) if len(x_t) == 8 and t.dim() else None)
                        or predict(policy, x_t, t, prompts))
    for guidance in (0.0, 3.0, 1.0):
        policy = load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory = sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain=False)
        losses.append(baselines_rwr.rwr_update(policy, trajectory, torch.ones(8),
                                               **learner(policy,
                                                         training_guidance=guidance))["denoising_error"])
    assert scales == [5.0, 5.0, 3.0, 3.0, 1.0, 1.0] and len({round(loss, 5) for loss in losses}) == 3


# ---- Rewards and prompts ----


def test_a_noisy_image_is_a_larger_jpeg_than_a_flat_one_and_a_batch_is_its_rows():
    images = torch.rand((8, 3, 64, 64), generator=rng())
    images[0] = 0.5
    reward = rewards.load_reward("compressibility")
    values, notes = reward(images, [prompts.Prompt("x")] * 8)
    assert values.dtype == torch.float64 and values.shape == (8,) and notes == [""] * 8
    assert values[0] > values[1:].max()
    for k in range(8):
        assert reward(images[k:k + 1], [prompts.Prompt("x")])[0].item() == values[k].item()
    opposite, _ = rewards.load_reward("incompressibility")(images, [prompts.Prompt("x")] * 8)
    assert torch.equal(opposite, -values)


def test_the_jpeg_recipe_is_pinned():
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    grain = torch.rand((3, 64, 64), generator=rng())
    assert [rewards.jpeg_kilobytes(image) for image in (ramp, grain)] == [1.159, 5.392]  # Pillow 13.0.0


def test_articles_and_plurals():
    assert [prompts.with_article(noun) for noun in ("cat", "ant", "owl")] == ["a cat", "an ant", "an owl"]
    assert [prompts.plural(noun) for noun in ("cat", "mouse", "fox", "butterfly", "monkey", "wolf", "goose",
                                              "sheep", "octopus",
                                              "fly")] == ["cats", "mice", "foxes", "butterflies", "monkeys",
                                                          "wolves", "geese",
                                                          "sheep", "octopuses", "flies"]
    assert prompts.with_number("mouse", 3) == "three mice" and prompts.with_number("ant", 1) == "an ant"


def texts_of(name):
    return [prompt.text for prompt in prompts.load_prompts(name)]


def checksum(texts):
    return hashlib.sha1("\n".join(texts).encode()).hexdigest()[:8]


def test_prompt_sets_are_the_papers():
    # The 45 are assets/common_animals.txt of the authors' JAX code, line by line; the labels the first 398
    # lines of imagenet_classes.txt of their PyTorch port.
    assert (len(texts_of("common_animals")), checksum(texts_of("common_animals"))) == (45, "347b5a44")
    assert (len(texts_of("imagenet_animals")), checksum(texts_of("imagenet_animals"))) == (398, "9eab5418")
    assert texts_of("imagenet_animals")[0] == "tench, Tinca tinca"
    assert texts_of("emoji_animals") == [prompts.with_article(animal)
                                         for animal in texts_of("common_animals")]
    assert texts_of("painted_animals") == [f"A painting of {text}" for text in texts_of("emoji_animals")]
    assert texts_of("animal_activities") == [f"{text} {activity}" for text in texts_of("emoji_animals")
                                             for activity in (
        "riding a bike", "playing chess", "washing dishes")]  # section 5.3
    assert texts_of("dpok") == ["a green colored rabbit", "four wolves in the park", "a dog and a cat",
                                "a dog on the moon"]
    for name, last in (("two_to_eight_animals", 8), ("two_to_four_animals", 4)):
        assert texts_of(name) == [prompts.with_number(animal, number) for number in range(2, last + 1)
                                  for animal in texts_of("common_animals")]


def test_unseen_prompts_are_not_in_training():
    for name, size in (("unseen_animals", 38), ("unseen_emoji_animals", 30), ("objects", 50)):
        assert len(set(texts_of(name))) == size and not set(texts_of(name)) & {
            *texts_of("common_animals"), *texts_of("emoji_animals")}
    # Our own lists; results were measured on them.
    assert [checksum(texts_of(name)) for name in ("unseen_animals", "unseen_emoji_animals", "objects")] == [
        "13ef429f", "9c7b304c", "6c2e27ff"]


def test_counting_prompts_bring_their_questions_and_every_right_answer():
    mice = {prompt.text: prompt.questions
            for prompt in prompts.load_prompts("two_to_four_animals")}["three mice"]
    assert [answers for _, answers in mice] == [("three", "3"), ("mouse", "mice")]
    assert [question for question, _ in mice] == ["How many animals are in this image?",
                                                  "What animal is in this image?"]
    assert prompts.load_prompts("common_animals")[0].questions == ()


# ---- It learns ----

FOUR = ["a cat", "a dog", "a frog", "a pig"]


def redness(images):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def drawn_redness(policy):
    """Of 24 images of fixed prompts and noise."""
    return redness(policy.decode(sampling.rollout(policy, FOUR * 6, rng(7), 24, keep_chain=False).x_0))


def gain(before, after):
    """Mean of the paired differences, and its standard error."""
    return (after - before).mean().item(), ((after - before).std() / len(before) ** 0.5).item()


def test_it_learns_on_the_toy_model_and_not_from_shuffled_rewards():
    gains, dealer = {}, rng(1)
    for shuffled in (False, True):
        policy = load_policy(EMOJI, steps=4, eta=1.0, guidance_scale=1.0)
        extras = learner(policy, 3e-4, updates_per_epoch=4, micro_batch=64, clip_range=2e-3,
                         skip_last_steps=2)
        statistics, before = ddpo.PromptStatistics(16, 8, 10), drawn_redness(policy)
        for _ in range(2):
            trajectory = sampling.rollout(policy, FOUR * 16, extras["rng"], 64)
            values = redness(policy.decode(trajectory.x_0))
            if shuffled:
                values = values[torch.randperm(64, generator=dealer)]
            advantages, _ = statistics.advantages(FOUR * 16, values)
            ddpo.ddpo_update(policy, trajectory, advantages, loss=ddpo.clipped_loss, **extras)
        gains[shuffled] = gain(before, drawn_redness(policy))
    (learned, error), (chance, _) = gains[False], gains[True]
    assert learned > 5 * error
    assert abs(chance) < learned / 2  # noise moves the images too, but less, and in any direction


def test_rwr_learns_on_the_toy_model_in_one_round():
    """Compared with a control: a round without a reward changes the images, too."""
    policy = load_policy(EMOJI, steps=5, eta=1.0, guidance_scale=1.0)
    trajectory = sampling.rollout(policy, FOUR * 24, rng(), 48, keep_chain=False)
    values = redness(policy.decode(trajectory.x_0))
    start, red = policy.denoiser.state_dict(), {}
    start = {name: weight.clone() for name, weight in start.items()}
    for beta in (0, 60):
        policy.denoiser.load_state_dict(start)
        extras = learner(policy, 2e-4, updates_per_epoch=10, batch_size=24, micro_batch=24)
        baselines_rwr.rwr_update(policy, trajectory, baselines_rwr.rwr_weights(FOUR * 24, values, beta),
                                 **extras)
        red[beta] = drawn_redness(policy)
    learned, error = gain(red[0], red[60])
    assert learned > 5 * error


# ---- A run ----


def test_a_saved_model_draws_with_plain_diffusers_what_the_policy_drew(tiny_model):
    rows = run(*tiny_flags(tiny_model, **{"learning-rate": 1e-2, "guidance-scale": 5}))
    # With the sampler that the model was published with
    pipeline = StableDiffusionPipeline.from_pretrained("runs/r/model")
    pipeline.scheduler = plain_scheduler(pipeline.scheduler)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    reloaded = load_policy("runs/r/model", 3, 1.0, 5.0)
    state = torch.load("runs/r/checkpoint.pt", weights_only=True)
    for name, weight in reloaded.denoiser.state_dict().items():
        assert torch.equal(weight, state["weights"][name])
    fixed = [prompts.emoji_animals()[k * 45 // 3] for k in range(3)]
    drawn = sampling.rollout(reloaded, [prompt.text for prompt in fixed], rng(train.EVAL_SEED), 3)
    images = reloaded.decode(drawn.x_0)
    np.testing.assert_allclose(images[:1].permute(0, 2, 3, 1).numpy(), drawn_by_diffusers(
        pipeline, "a cat", first_noise(rng(train.EVAL_SEED), images=3, states=4)), atol=1e-4)
    values, _ = rewards.load_reward("compressibility")(images, fixed)
    assert values.mean().item() == pytest.approx(rows[-1]["eval_reward_mean"], abs=1e-6)


def test_same_seed_same_log_and_another_seed_the_same_evaluation_noise(tiny_model):
    one, two, other = (run(*tiny_flags(tiny_model, name=name, seed=seed)) for name,
                       seed in (("a", 3), ("b", 3), ("c", 4)))
    assert without_seconds(one) == without_seconds(two)
    assert one[1]["reward_mean"] != other[1]["reward_mean"]
    assert one[0]["eval_reward_mean"] == other[0]["eval_reward_mean"]


def test_each_image_is_judged_by_its_own_prompt_however_many_are_judged_at_a_time(tiny_model, own_reward,
                                                                                  monkeypatch):
    whole = run(*tiny_flags(tiny_model, name="whole", reward=own_reward("letters")))
    monkeypatch.setattr(train, "IMAGES_AT_ONCE", 3)
    assert without_seconds(run(*tiny_flags(tiny_model, name="parts",
                                           reward=own_reward("letters")))) == without_seconds(whole)


# ---- The tour and the README ----

def test_the_tours_cells_run_and_are_committed_with_their_outputs():
    cells = [cell for cell in json.loads((ROOT / "tour.ipynb").read_text())["cells"]
             if cell["cell_type"] == "code"]
    shown = [cell for cell in cells if re.search(r"^ *(show|print)\(", "".join(cell["source"]), re.MULTILINE)]
    assert len(shown) == 7 and all(cell["outputs"] for cell in shown)
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    assert code.count("IMAGES, UPDATES = 16, 20\n") == 1
    names = {}
    exec(code.replace("IMAGES, UPDATES = 16, 20\n", "IMAGES, UPDATES = 8, 2\n"), names)
    assert names["after"].shape == (8, 3, 64, 64) and (names["after_one"] != 0).any()


def test_every_function_the_readme_names_stands_in_the_file_that_it_links_to():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) >= 6
    for name, file in links:
        assert re.search(rf"^(    )?(def|class) {name}\b|^    {name}: ",
                         (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_file_that_a_readme_links_to_is_there():
    for page in (*ROOT.glob("*.md"), *(page for room in ("emoji", "studies", "oracles")
                                       for page in (ROOT / room).rglob("*.md"))):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"
