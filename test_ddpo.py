"""The claims of this repository, each by its name: oracles first, then invariances, then it learns, then the command line.

    pytest test_ddpo.py        # CPU, no network, under two minutes
"""
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import (AutoProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig,
                          CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

import baselines_rwr
import benchmark
import compare
import ddpo
import evaluate
import judge
import pretrain
import prompts
import rewards
import runs
import sampling
import settings
import train
import variance

HERE = Path(__file__).resolve().parent
EMOJI, EMOJI_VLM = HERE / "assets" / "emoji", HERE / "assets" / "emoji_vlm"
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                        set_alpha_to_one=False, clip_sample=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random pipeline of Stable Diffusion's architecture and its sampler, PNDM: 8 x 8 latents."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=16))
    scheduler = PNDMScheduler(skip_prk_steps=True, **{k: v for k, v in STABLE_DIFFUSION.items() if k != "clip_sample"})
    folder = tmp_path_factory.mktemp("models") / "tiny"
    StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_policy(tiny_model):
    return sampling.load_policy(tiny_model, steps=4, eta=1.0, guidance_scale=5.0)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def learner(policy, learning_rate=1e-3, **changes):
    """What ddpo_update and rwr_update take beside a trajectory and advantages or weights."""
    config = SimpleNamespace(**{"updates_per_epoch": 2, "micro_batch": 8, "clip_range": 1e-2, "max_grad_norm": 1.0,
                                "kl_weight": 0.0, "skip_last_steps": 0, "batch_size": 8, "guided_training": True, **changes})
    optimizer = torch.optim.AdamW(policy.unet.parameters(), lr=learning_rate)
    return dict(optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False), rng=rng(), config=config)


def weights(policy):
    return {name: weight.detach().clone() for name, weight in policy.unet.state_dict().items()}


# ---- Oracles: diffusers, torch.distributions, closed forms ----

SCHEDULES = [dict(), dict(steps_offset=3), dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"),
             dict(timestep_spacing="trailing"), dict(timestep_spacing="trailing", beta_schedule="linear")]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("change", SCHEDULES, ids=str)
@pytest.mark.parametrize("steps", [7, 30, 50])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_step_equals_diffusers_or_the_closed_form(prediction_type, change, steps, eta):
    scheduler = DDIMScheduler(**{**STABLE_DIFFUSION, "prediction_type": prediction_type, **change})
    schedule = sampling.ddim_schedule(scheduler, steps, eta)
    x_t, prediction, noise = torch.randn((3, steps, 4, 8, 8), generator=rng())
    batched, sigmas = sampling.ddim_mean_sigma(x_t, prediction, schedule.timesteps, schedule)  # every t in one batch
    following = torch.cat([schedule.timesteps[1:], torch.tensor([-1])])
    compared = 0
    for k, (t, t_next) in enumerate(zip(schedule.timesteps.tolist(), following.tolist())):
        mean, sigma = sampling.ddim_mean_sigma(x_t[k:k + 1], prediction[k:k + 1], schedule.timesteps[k:k + 1], schedule)
        torch.testing.assert_close(batched[k:k + 1], mean)
        torch.testing.assert_close(sigmas[k:k + 1], sigma)
        steps_to = t - 1000 // steps
        if steps_to == t_next or (steps_to < 0 and t_next == -1):
            compared += 1
            theirs, theirs_mean = (scheduler.step(prediction[k:k + 1], t, x_t[k:k + 1], eta=eta, variance_noise=n).prev_sample
                                   for n in (noise[k:k + 1], torch.zeros(1, 4, 8, 8)))
            torch.testing.assert_close(mean, theirs_mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sigma * noise[k:k + 1], theirs - theirs_mean, rtol=1e-4, atol=1e-5)
        else:  # Song et al. 2021, equations 12 and 16, in double precision
            a = scheduler.alphas_cumprod[t].double()
            b = (scheduler.alphas_cumprod[t_next] if t_next >= 0 else scheduler.final_alpha_cumprod).double()
            s = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
            x, p = x_t[k:k + 1].double(), prediction[k:k + 1].double()
            x_0 = {"epsilon": (x - (1 - a).sqrt() * p) / a.sqrt(), "sample": p,
                   "v_prediction": a.sqrt() * x - (1 - a).sqrt() * p}[prediction_type]
            eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
            torch.testing.assert_close(mean.double(), b.sqrt() * x_0 + (1 - b - s**2).sqrt() * eps, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sigma.double().flatten(), s.reshape(1), rtol=1e-3, atol=1e-6)
    # Under "trailing" at 30 steps, diffusers steps to another timestep than the next at 10 of 29.
    assert compared == steps or change.get("timestep_spacing") == "trailing" and steps in (7, 30)


@pytest.mark.parametrize("change, steps, eta, message", [
    (dict(set_alpha_to_one=True), 50, 1.0, "sigma is 0 at timestep 1"), (dict(steps_offset=0), 50, 1.0, "sigma is 0"),
    (dict(set_alpha_to_one=True, timestep_spacing="trailing"), 10, 1.0, "sigma is 0"),
    (dict(timestep_spacing="linspace"), 50, 1.0, "sigma is 0"), (dict(), 50, 0.0, "eta"), (dict(), 50, -1.0, "eta"),
    (dict(), 50, 1.5, "eta"), (dict(clip_sample=True), 50, 1.0, "clip_sample"), (dict(thresholding=True), 50, 1.0, "clip"),
    (dict(), 0, 1.0, "sampling steps"), (dict(), 1001, 1.0, "sampling steps"),
    (dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10, 1.0, "alpha_bar is 0")])
def test_degenerate_schedules_are_refused(change, steps, eta, message):
    with pytest.raises(ValueError, match=message):
        sampling.ddim_schedule(DDIMScheduler(**{**STABLE_DIFFUSION, **change}), steps, eta)


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
    conditional, unconditional = sampling.encode_prompts(tiny_policy, ["a cat", "an ant"])
    with torch.no_grad():
        cond = tiny_policy.unet(x_t, t, conditional).sample
        uncond = tiny_policy.unet(x_t, t, unconditional.repeat(2, 1, 1)).sample
        guided = sampling.predict(tiny_policy, x_t, t, (conditional, unconditional))
        plain = sampling.predict(replace(tiny_policy, guidance_scale=1.0), x_t, t, (conditional, unconditional))
    torch.testing.assert_close(guided, uncond + 5 * (cond - uncond))
    torch.testing.assert_close(plain, cond)


def test_at_ratio_one_both_estimators_have_the_same_gradient():
    old, advantages = torch.randn((2, 64), generator=rng())
    gradients = []
    for loss in (ddpo.score_function_loss, ddpo.clipped_loss):
        log_probs = old.clone().requires_grad_()
        loss(log_probs, old, advantages, 0.1)[0].backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0], -advantages / 64)


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1, 0.8, True), (1, 1.0, True), (1, 1.2, False), (-1, 0.8, False), (-1, 1.0, True), (-1, 1.2, True)])
def test_clip_stops_the_gradient_only_where_the_move_already_went_far_enough(advantage, ratio, moves):
    log_probs = torch.tensor([ratio]).log().requires_grad_()
    loss, info = ddpo.clipped_loss(log_probs, torch.zeros(1), torch.tensor([float(advantage)]), 0.1)
    loss.backward()
    assert log_probs.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-6)
    assert (info["clip_fraction_low"], info["clip_fraction_high"]) == (ratio < 0.9, ratio > 1.1)


def test_score_function_gradient_agrees_with_the_closed_form_of_a_gaussian_policy():
    # x ~ Normal(mu, 1), r(x) = -(x - 3)^2: J = -(mu - 3)^2 - 1, dJ/dmu = -2 (mu - 3) = 4 at mu = 1.
    mu, samples = torch.tensor(1.0, requires_grad=True), 200_000
    x = 1.0 + torch.randn(samples, generator=rng())
    reward = -(x - 3) ** 2
    baseline = -5.0  # J at mu = 1; any constant leaves the mean where it is
    per_sample = (reward - baseline) * (x - 1.0)
    log_probs = sampling.log_prob(x.view(-1, 1, 1, 1), mu.expand(samples, 1, 1, 1), torch.ones(samples, 1, 1, 1))
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
    own_a, own_b = np.array([2, 5, 0]), np.array([3, 6, 0])  # appended first; the buffer dropped the oldest of "a"
    np.testing.assert_allclose(advantages, [(5 - own_a.mean()) / own_a.std(), -3 / own_b.std(), -own_a.mean() / own_a.std()],
                               rtol=1e-6)
    assert share == 1


@pytest.mark.parametrize("values", [[1, 2, 3, 5], np.array([1, 2, 3, 5]), torch.tensor([1, 2, 3, 5])], ids=type)
def test_integer_rewards_are_not_truncated_and_advantages_are_float32(values):
    advantages, _ = ddpo.PromptStatistics(32, 16, 10).advantages("abcd", values)
    assert advantages.dtype == torch.float32
    np.testing.assert_allclose(advantages, (np.array([1, 2, 3, 5]) - 2.75) / np.std([1, 2, 3, 5]), rtol=1e-6)


def test_equal_rewards_give_zero_and_outliers_are_clipped():
    statistics = ddpo.PromptStatistics(32, 16, clip=2)
    assert statistics.advantages("ab", torch.full((2,), 0.1))[0].tolist() == [0, 0]
    assert statistics.advantages("ab" * 20, torch.full((40,), 0.1))[0].tolist() == [0] * 40
    assert ddpo.PromptStatistics(32, 16, 2).advantages("abcdefghij", [0] * 9 + [9])[0].max() == 2


def test_statistics_survive_a_checkpoint():
    one, two = (ddpo.PromptStatistics(4, 2, 10) for _ in range(2))
    one.advantages("aab", [1, 2, 3])
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    after = [statistics.advantages("aaabb", [5, 3, 1, 2, 7]) for statistics in (one, two)]
    assert after[0][0].tolist() == after[1][0].tolist() and after[0][1] == after[1][1] == 1


def test_other_baselines_are_the_batch_alone_or_nothing():
    prompts, values = ["a"] * 4 + ["b"] * 4, np.arange(8.0)
    advantages = {name: ddpo.PromptStatistics(4, 2, 100, name).advantages(prompts, values)[0] for name in ddpo.BASELINES}
    np.testing.assert_allclose(advantages["batch"], (values - 3.5) / values.std(), rtol=1e-6)
    np.testing.assert_allclose(advantages["none"], values)
    bare, _ = ddpo.PromptStatistics(4, 2, 10.0, "none").advantages(["a"] * 2, [-80.0, -50.0])
    assert bare.tolist() == [-80, -50]  # the clip is of whitened rewards: at 10 these would be equal
    np.testing.assert_allclose(advantages["prompt"][:4], advantages["prompt"][4:])


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
    torch.testing.assert_close(baselines_rwr.rwr_weights(prompts, values, 1e4), torch.tensor([0.0, 3, 0, 0, 2]))


def test_sparse_weights_keep_the_top_fraction_of_each_prompt():
    prompts = ["a"] * 20 + ["b"] * 4
    weights = baselines_rwr.sparse_weights(prompts, [*range(20), 900, 903, 901, 902], percentile=0.9)
    assert weights.tolist() == [0] * 18 + [10, 10] + [0, 4, 0, 0]  # of fewer than ten: the best one
    assert baselines_rwr.sparse_weights(prompts, range(24), 0.0).tolist() == [1] * 24
    assert baselines_rwr.sparse_weights(["a"] * 4, [1, 7, 7, 7], 0.5).tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])


@pytest.mark.parametrize("weigh", [baselines_rwr.rwr_weights, baselines_rwr.sparse_weights])
def test_where_nothing_can_be_compared_all_weights_are_one(weigh):
    assert weigh(["a", "b", "b", "b"], [3.0, 0.1, 0.1, 0.1], 0.9).tolist() == [1] * 4


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_uniform_weights_without_guidance_are_the_plain_denoising_loss(tiny_policy, kind):
    tiny_policy.pipeline.scheduler.register_to_config(prediction_type=kind)
    policy = replace(tiny_policy, guidance_scale=1.0, schedule=replace(tiny_policy.schedule, prediction_type=kind))
    trajectory, _ = sampling.rollout(policy, ["a cat", "a dog", "an ant"], rng(), 3, keep_chain=False)
    noise, t, rows = torch.randn(3, 4, 8, 8, generator=rng(1)), torch.tensor([3, 500, 999]), torch.arange(3)
    with torch.no_grad():
        ours, _ = baselines_rwr.weighted_denoising_loss(
            *baselines_rwr.predict_and_target(policy, trajectory, rows, noise, t), torch.ones(3))
        # As in diffusers' train_text_to_image.py.
        pipeline, x_0 = policy.pipeline, trajectory.latents[:, 0]
        x_t = pipeline.scheduler.add_noise(x_0, noise, t)
        ids = pipeline.tokenizer(list(trajectory.prompts), padding="max_length", return_tensors="pt").input_ids
        target = {"epsilon": noise, "v_prediction": pipeline.scheduler.get_velocity(x_0, noise, t), "sample": x_0}[kind]
        plain = torch.nn.functional.mse_loss(pipeline.unet(x_t, t, pipeline.text_encoder(ids)[0]).sample, target)
    torch.testing.assert_close(ours, plain)


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
        policy = sampling.load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory, _ = sampling.rollout(policy, ["a cat", "a dog"] * 4, rng(), 8, keep_chain=False)
        trajectory.latents[[0, 5]] += noise
        extras = learner(policy, micro_batch=micro_batch, max_grad_norm=1e9)
        extras["optimizer"] = torch.optim.SGD(policy.unet.parameters(), lr=0.1)
        info = baselines_rwr.rwr_update(policy, trajectory, torch.tensor([0.0, 1, 2, 1, 1, 0, 2, 1]), **extras)
        results.append((weights(policy), info))
    for other, info in results[1:]:
        assert info == pytest.approx(results[0][1], rel=1e-3)
        for name, weight in results[0][0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_training_without_guidance_is_another_loss(tiny_model):
    losses = []
    for guided in (True, False):
        policy = sampling.load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory, _ = sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain=False)
        losses.append(baselines_rwr.rwr_update(policy, trajectory, torch.ones(8),
                                               **learner(policy, guided_training=guided))["denoising_error"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


class PeakMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest number of bytes that the tensors made in it held at a time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size


def test_without_chain_memory_does_not_grow_with_the_number_of_steps(tiny_model):
    peaks = {}
    for steps, keep_chain in itertools.product((10, 80), (False, True)):
        policy = sampling.load_policy(tiny_model, steps, 1.0, 5.0)
        with PeakMemory() as memory:
            sampling.rollout(policy, ["a cat"] * 8, rng(), 8, keep_chain)
        peaks[steps, keep_chain] = memory.peak
    chain = 8 * 70 * (4 * 8 * 8 + 1) * 4  # bytes of 70 more latents and log-probs of 8 images
    assert peaks[80, False] - peaks[10, False] < 0.02 * chain
    assert peaks[80, True] - peaks[10, True] > chain


# ---- Which steps are learned from ----

@pytest.mark.parametrize("steps, share", [(5, 0.95), (10, 0.86), (50, 0.49)])
def test_of_few_steps_the_last_but_one_carries_most_of_the_gradients_variance(steps, share):
    """By the closed form: with c = d mean / d eps, a step's score for eps is c / sigma times unit noise: variance (c / sigma)^2."""
    schedule = sampling.ddim_schedule(DDIMScheduler(**STABLE_DIFFUSION), steps, 1.0)
    zero, one = torch.zeros(2, steps, 1, 1, 1) + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    (mean_zero, sigma), (mean_one, _) = (
        sampling.ddim_mean_sigma(zero, eps, schedule.timesteps, schedule) for eps in (zero, one))
    variance_of_step = (((mean_one - mean_zero) / sigma) ** 2).flatten()
    assert variance_of_step[-2] / variance_of_step.sum() == pytest.approx(share, abs=0.01)


def test_skipped_steps_do_not_count_in_an_update(tiny_model):
    results = []
    for change in (0.0, 1.0):
        policy = sampling.load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory, _ = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
        trajectory.latents[:, 3:] += change  # what steps 2 and 3 did; step 1 led to state 2
        ddpo.ddpo_update(policy, trajectory, torch.randn(8, generator=rng()), loss=ddpo.clipped_loss,
                         **learner(policy, skip_last_steps=2))
        results.append(weights(policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---- The chain and its scoring ----

@pytest.mark.parametrize("micro_batch", [1, 7, 60])
def test_ratio_is_one_for_every_pair_before_the_first_update(micro_batch):
    config = settings.build_config({})
    policy = sampling.load_policy(EMOJI, config.sampling_steps, config.eta, config.guidance_scale)
    trajectory, _ = sampling.rollout(policy, ["a cat", "two dogs"] * 3, rng(), batch_size=4)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(config.sampling_steps))
    with torch.no_grad():
        scored = torch.cat([sampling.score(policy, trajectory, *part.T)[0] for part in pairs.split(micro_batch)])
    ratio = (scored - trajectory.log_probs.flatten()).exp()
    assert (ratio - 1).abs().max() <= 2e-6


def test_first_update_reports_a_ratio_of_one_and_the_second_has_moved(tiny_policy):
    trajectory, _ = sampling.rollout(tiny_policy, ["a cat"] * 8, rng(), 8)
    info = ddpo.ddpo_update(tiny_policy, trajectory, torch.randn(8, generator=rng()), loss=ddpo.clipped_loss,
                            **learner(tiny_policy))
    assert info["ratio_deviation"] <= 2e-6
    assert info["ratio_mean"] != 1 and info["grad_norm"] > 0


def test_bf16_autocast_keeps_the_ratio_within_a_thousandth_even_at_unequal_batch_sizes(tiny_model):
    policy = sampling.load_policy(tiny_model, 4, 1.0, 5.0, precision="bf16")
    trajectory, _ = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(4))
    with torch.no_grad():
        scored = torch.cat([sampling.score(policy, trajectory, *part.T)[0] for part in pairs.split(3)])
    assert trajectory.latents.dtype == scored.dtype == torch.float32
    assert ((scored - trajectory.log_probs.flatten()).exp() - 1).abs().max() < 1e-3


def test_the_kl_penalty_is_zero_at_the_pretrained_policy_and_pulls_back_to_it(tiny_model):
    kls = {}
    for weight in (0.0, 100.0):
        policy = sampling.load_policy(tiny_model, 4, 1.0, 5.0, keep_reference=True)
        trajectory, _ = sampling.rollout(policy, ["a cat"] * 8, rng(), 8)
        extras = learner(policy, kl_weight=weight, updates_per_epoch=1)
        kls[weight] = [ddpo.ddpo_update(policy, trajectory, torch.randn(8, generator=rng(k)), loss=ddpo.clipped_loss,
                                        **extras)["kl_pretrained"] for k in range(8)]
        assert all(not weight.requires_grad for weight in policy.reference.unet.parameters())
    assert kls[0.0][0] == kls[100.0][0] == 0
    assert 0 < kls[100.0][-1] < kls[0.0][-1] / 2


def test_pairs_keep_their_own_latents_and_prompts_when_shuffled(tiny_policy):
    trajectory, _ = sampling.rollout(tiny_policy, ["a cat", "an ant", "two dogs", "a bee"], rng(), 4)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    pairs = pairs[torch.randperm(len(pairs), generator=rng())]
    scored, _ = sampling.score(tiny_policy, trajectory, *pairs.T)
    torch.testing.assert_close(scored, trajectory.log_probs[pairs[:, 0], pairs[:, 1]], rtol=0, atol=2e-6)
    wrong, _ = sampling.score(tiny_policy, replace(trajectory, prompts=trajectory.prompts[::-1]), *pairs.T)
    assert (wrong - scored).abs().min() > 0  # so the line above does notice whose prompt is whose


@pytest.mark.parametrize("loss", [ddpo.score_function_loss, ddpo.clipped_loss])
def test_micro_batch_does_not_change_an_update(tiny_model, loss):
    results = []
    for micro_batch in (1, 8, 7, 1000):
        policy = sampling.load_policy(tiny_model, 4, 1.0, 5.0)
        trajectory, _ = sampling.rollout(policy, ["a cat", "a dog"] * 4, rng(), 8)
        # SGD: AdamW divides by the gradient's size and would blow rounding of near-zero gradients up.
        extras = learner(policy, micro_batch=micro_batch, updates_per_epoch=2, max_grad_norm=1e9)
        extras["optimizer"] = torch.optim.SGD(policy.unet.parameters(), lr=0.1)
        info = ddpo.ddpo_update(policy, trajectory, torch.randn(8, generator=rng()), loss=loss, **extras)
        results.append((weights(policy), info))
    for other, info in results[1:]:
        for name, weight in results[0][0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)
        assert info["grad_norm"] == pytest.approx(results[0][1]["grad_norm"], rel=1e-3)
        assert info["approx_kl"] == pytest.approx(results[0][1]["approx_kl"], rel=1e-2, abs=1e-6)


def test_update_equals_a_plain_loop_over_images_and_steps(tiny_model):
    one, two = (sampling.load_policy(tiny_model, 3, 1.0, 5.0) for _ in range(2))
    trajectory, _ = sampling.rollout(one, ["a cat", "a dog"], rng(), 2)
    advantages = torch.tensor([1.0, -2.0])
    extras = learner(one, updates_per_epoch=1)
    # SGD: AdamW would hide a wrong scale.
    extras["optimizer"], optimizer = (torch.optim.SGD(policy.unet.parameters(), lr=0.1) for policy in (one, two))
    before = weights(one)
    ddpo.ddpo_update(one, trajectory, advantages, loss=ddpo.clipped_loss, **extras)
    total = 0
    for i, k in itertools.product(range(2), range(3)):
        log_prob, _ = sampling.score(two, trajectory, torch.tensor([i]), torch.tensor([k]))
        total = total - advantages[i] * (log_prob - trajectory.log_probs[i, k]).exp().sum() / 6
    total.backward()
    torch.nn.utils.clip_grad_norm_(two.unet.parameters(), 1.0)
    optimizer.step()
    apart, moved = (sum((a - b).abs().sum() for a, b in zip(weights(one).values(), other.values()))
                    for other in (weights(two), before))
    assert 0 < moved and apart < 1e-3 * moved


def test_images_do_not_depend_on_how_many_are_drawn_at_a_time(tiny_policy):
    texts = ["a cat", "a dog", "an ant", "a bee", "a fox"]
    (whole, images), (parts, same) = (sampling.rollout(tiny_policy, texts, rng(), size) for size in (5, 2))
    torch.testing.assert_close(whole.latents, parts.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images, same, rtol=1e-4, atol=1e-5)
    assert images.shape == (5, 3, 16, 16) and 0 <= images.min() and images.max() <= 1


def test_without_chain_only_x_0_is_kept_and_it_is_the_same(tiny_policy):
    (chain, images), (last, same) = (
        sampling.rollout(tiny_policy, ["a cat"] * 2, rng(), 2, keep_chain=keep) for keep in (True, False))
    assert chain.latents.shape == (2, 5, 4, 8, 8) and last.latents.shape == (2, 1, 4, 8, 8)
    assert torch.equal(chain.latents[:, -1], last.latents[:, -1]) and torch.equal(images, same)


def test_rollout_equals_diffusers_own_pipeline(tiny_policy):
    _, ours = sampling.rollout(tiny_policy, ["a cat"], rng(), 1)
    theirs = drawn_by_diffusers(tiny_policy.pipeline, "a cat", first_noise(rng(), images=1, states=5))
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-4)


def first_noise(rng, images, states):
    """The noise (1, T + 1, 4, 8, 8) of the first of so many images of a rollout."""
    seed = torch.randint(2**62, (images,), generator=rng)[0].item()
    return torch.randn((1, states, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def drawn_by_diffusers(pipeline, prompt, noise):
    """One image (1, H, W, 3) by diffusers' pipeline from noise (1, T + 1, C, H, W): it draws its own inside its step."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.step = partial(_step_with_noise, pipeline.scheduler.step, iter(noise[:, 1:].unbind(1)))
    return pipeline(prompt, num_inference_steps=noise.shape[1] - 1, guidance_scale=5.0, eta=1.0, latents=noise[:, 0],
                    output_type="np").images


def _step_with_noise(step, noise, *args, eta=1.0, generator=None, **kwargs):
    return step(*args, eta=eta, variance_noise=next(noise), **kwargs)


def test_any_pipeline_loads_in_fp32_with_its_own_schedule_as_ddim(tiny_model, tmp_path):
    half = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(tiny_model).to(dtype=torch.float16).save_pretrained(half)
    policy = sampling.load_policy(half, 10, 1.0, 5.0)
    scheduler = policy.pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler) and not scheduler.config.clip_sample
    assert (scheduler.config.beta_start, scheduler.config.steps_offset) == (0.00085, 1)
    parts = (policy.unet, policy.pipeline.vae, policy.pipeline.text_encoder)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    assert not any(part.training for part in parts)
    assert all(weight.requires_grad for weight in policy.unet.parameters())
    assert not any(weight.requires_grad for part in parts[1:] for weight in part.parameters())


# ---- Rewards and prompts ----

def test_a_noisy_picture_is_a_larger_jpeg_than_a_flat_one_and_a_batch_is_its_rows():
    images = torch.rand((8, 3, 64, 64), generator=rng())
    images[0] = 0.5
    reward = rewards.load_reward("compressibility")
    values, notes = reward(images, [prompts.Prompt("x")] * 8)
    assert values.dtype == torch.float32 and values.shape == (8,) and notes == [""] * 8
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
    assert [prompts.plural(noun) for noun in ("cat", "mouse", "fox", "butterfly", "monkey", "wolf", "goose", "sheep", "octopus",
                                              "fly")] == ["cats", "mice", "foxes", "butterflies", "monkeys", "wolves", "geese",
                                                          "sheep", "octopuses", "flies"]
    assert prompts.counted("mouse", 3) == "three mice" and prompts.counted("ant", 1) == "an ant"


def test_prompt_sets_are_the_papers():
    common = [prompt.text for prompt in prompts.load_prompts("common_animals")]
    assert len(common) == len(set(common)) == 45 and {"a cat", "an ant", "a kangaroo"} <= set(common)
    imagenet = [prompt.text for prompt in prompts.load_prompts("imagenet_animals")]
    assert len(imagenet) == 398 and (imagenet[0], imagenet[-1]) == ("tench", "puffer")
    activities = [prompt.text for prompt in prompts.load_prompts("animal_activities")]
    assert len(activities) == 135 and {"a cat riding a bike", "an ant playing chess"} <= set(activities)
    assert [len(prompts.load_prompts(f"two_to_{number}_animals")) for number in ("eight", "four")] == [7 * 45, 3 * 45]
    assert [prompt.text for prompt in prompts.load_prompts("dpok")][1] == "four wolves in the park"
    assert {"A painting of an ant"} < {prompt.text for prompt in prompts.load_prompts("painted_animals")}
    for name, size in (("unseen_animals", 38), ("unseen_emoji_animals", 30), ("objects", 50)):
        unseen = [prompt.text for prompt in prompts.load_prompts(name)]
        assert len(unseen) == len(set(unseen)) == size and not set(unseen) & set(common)


def test_counting_prompts_bring_their_questions_and_every_right_answer():
    mice = {prompt.text: prompt.questions for prompt in prompts.load_prompts("two_to_four_animals")}["three mice"]
    assert [answers for _, answers in mice] == [("three", "3"), ("mouse", "mice")]
    assert all("?" in question for question, _ in mice) and prompts.load_prompts("common_animals")[0].questions == ()


def test_the_prompt_sets_are_listed_with_examples():
    told = subprocess.run([sys.executable, str(HERE / "prompts.py")], capture_output=True, text=True, check=True).stdout
    assert "two_to_four_animals: 135, as 'two cats'" in told
    assert all(f"{name}: " in told for name in prompts.PROMPT_SETS)


LAYERS = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
TINY_CLIP = dict(projection_dim=24, vision_config=dict(image_size=32, patch_size=8, **LAYERS), text_config=LAYERS)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a random CLIP of 32 x 32 pixels, its image processor and the embedded model's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip"
    benchmark.random_clip(folder, TINY_CLIP)
    return folder


@pytest.fixture(scope="session")
def tiny_head(tmp_path_factory):
    """The aesthetic head's weights under the published file's names, for embeddings of 24 numbers."""
    torch.manual_seed(1)
    sizes = {0: (1024, 24), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    head = {f"layers.{k}.weight": torch.randn(shape) / shape[1]**0.5 for k, shape in sizes.items()}
    head |= {f"layers.{k}.bias": torch.randn(shape[0]) for k, shape in sizes.items()}
    path = tmp_path_factory.mktemp("models") / "head.pth"
    torch.save(head, path)
    save_file(head, path.with_suffix(".safetensors"))
    return path


PICTURES = torch.rand(3, 3, 40, 40, generator=rng(7))


def test_the_aesthetic_reward_is_a_linear_chain_on_the_normalised_clip_embedding(tiny_clip, tiny_head):
    reward = rewards.load_reward("aesthetic", reward_model=str(tiny_clip), aesthetic_head=str(tiny_head))
    values, _ = reward(PICTURES, [prompts.Prompt("a cat")] * 3)
    clip, processor = CLIPModel.from_pretrained(tiny_clip), CLIPImageProcessorPil.from_pretrained(tiny_clip)
    pixels = processor([rewards.to_pil(picture) for picture in PICTURES], return_tensors="pt").pixel_values
    with torch.no_grad():
        x = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        x, head = x / x.norm(dim=1, keepdim=True), torch.load(tiny_head)
        for k in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{k}.weight"].T + head[f"layers.{k}.bias"]
    torch.testing.assert_close(values, x.squeeze(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(values, reward(PICTURES, [prompts.Prompt("a dog")] * 3)[0])  # no dropout, and no look at the prompt
    same = rewards.load_reward("aesthetic", reward_model=str(tiny_clip),
                               aesthetic_head=str(tiny_head.with_suffix(".safetensors")))
    assert torch.equal(values, same(PICTURES, [prompts.Prompt("a cat")] * 3)[0])


def test_pil_bytes_and_floats_look_the_same_to_clip(tiny_clip):
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    pictures = [rewards.to_pil(picture) for picture in PICTURES]
    bytes_ = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    seen = [rewards.preprocess(processor, images) for images in (pictures, bytes_, PICTURES)]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].std() > 0.3  # scaled down once, not twice


def test_pickscore_is_the_cosine_of_clips_own_forward(tiny_clip, monkeypatch):
    texts = [prompts.Prompt(text) for text in ("a cat", "two dogs", "an ant")]
    reward = rewards.load_reward("pickscore", reward_model=str(tiny_clip))
    values, _ = reward(PICTURES, texts)
    clip, processor = CLIPModel.from_pretrained(tiny_clip), CLIPImageProcessorPil.from_pretrained(tiny_clip)
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)([prompt.text for prompt in texts], padding="max_length", max_length=77,
                                                      return_tensors="pt")
    pixels = processor([rewards.to_pil(picture) for picture in PICTURES], return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = clip(**tokens, pixel_values=pixels).logits_per_image.diag() / clip.logit_scale.exp()
    torch.testing.assert_close(values, theirs, rtol=1e-4, atol=1e-6)
    new = CLIPModel.get_image_features  # older versions of transformers return the tensor itself
    monkeypatch.setattr(CLIPModel, "get_image_features", lambda self, pixels: new(self, pixels).pooler_output)
    assert torch.equal(reward(PICTURES, texts)[0], values)


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory):
    """A folder with a random model of LLaVA's architecture, 32 x 32 pixels, its processor and a tokenizer of a few words."""
    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", *"user : assistant ? . how many animals are in this image what animal "
             "is a an one two three four cat cats dog dogs happening answer concisely going on".split()]
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
                                        eos_token="</s>", additional_special_tokens=["<image>"])
    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    network = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **layers), image_token_index=4,
        text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0, bos_token_id=2,
                                eos_token_id=3, **layers)))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("models") / "vlm"
    LlavaProcessor(image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1).save_pretrained(folder)
    network.save_pretrained(folder)
    return folder


def test_imagereward_is_that_of_the_package_image_reward(tiny_vlm, tmp_path):
    weights = load_file(HERE / "oracles" / "imagereward.safetensors")
    pixels, tokens, mask = (weights.pop(name) for name in ("pixels", "tokens", "mask"))
    AutoTokenizer.from_pretrained(tiny_vlm).save_pretrained(tmp_path)
    torch.save({name: weight.float() for name, weight in weights.items()}, tmp_path / "ImageReward.pt")
    reward = rewards.ImageReward("cpu", str(tmp_path))
    with torch.no_grad():
        ours = reward.score(pixels, tokens, mask)
    theirs = json.loads((HERE / "oracles" / "imagereward.json").read_text())["scores"]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5) and max(theirs) - min(theirs) > 0.05
    texts = [prompts.Prompt(text) for text in ("two cats", "a dog", "a cat")]
    values, _ = rewards.load_reward("imagereward", reward_model=str(tmp_path))(PICTURES, texts)
    alone, _ = rewards.load_reward("imagereward", reward_model=str(tmp_path))(PICTURES[1:2], texts[1:2])
    assert values[1].item() == pytest.approx(alone.item(), abs=1e-5) and len(set(values.tolist())) == 3
    del weights["blip.visual_encoder.norm.bias"]
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="do not fit.*post_layernorm.bias"):
        rewards.load_reward("imagereward", reward_model=str(tmp_path))


def test_hpsv2_is_that_of_the_package_hpsv2(tiny_clip, tmp_path):
    weights = load_file(HERE / "oracles" / "hpsv2.safetensors")
    pixels, tokens = weights.pop("pixels"), weights.pop("tokens")
    weights = {name: weight.float() for name, weight in weights.items()}
    layers = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    layers["hidden_act"] = "gelu"
    CLIPConfig(projection_dim=24, vision_config=dict(image_size=32, patch_size=8, **layers), text_config=dict(
        vocab_size=60, max_position_embeddings=16, eos_token_id=59, **layers)).save_pretrained(tmp_path)
    for part in (CLIPImageProcessorPil.from_pretrained(tiny_clip), CLIPTokenizer.from_pretrained(tiny_clip)):
        part.save_pretrained(tmp_path)
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2_compressed.pt")
    clip = rewards.HPSv2("cpu", str(tmp_path)).clip
    with torch.no_grad():
        images, texts = map(rewards.pooled, (clip.get_image_features(pixels), clip.get_text_features(tokens)))
    theirs = json.loads((HERE / "oracles" / "hpsv2.json").read_text())["scores"]
    assert torch.cosine_similarity(images, texts).tolist() == pytest.approx(theirs, abs=1e-5)
    assert max(theirs) - min(theirs) > 0.1


def test_networks_saved_in_half_precision_are_used_in_full(tiny_clip, tmp_path):
    CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil.from_pretrained(tiny_clip).save_pretrained(tmp_path / "clip")
    assert rewards.load_clip(str(tmp_path / "clip"), "cpu")[1].dtype == torch.float32
    CLIPTextModel.from_pretrained(EMOJI / "text_encoder").half().save_pretrained(tmp_path / "bert")
    CLIPTokenizer.from_pretrained(EMOJI / "tokenizer").save_pretrained(tmp_path / "bert")
    assert rewards.BertRecall("cpu", str(tmp_path / "bert")).encoder.dtype == torch.float32


def test_a_vlm_is_asked_in_its_own_form(tiny_vlm, tmp_path):
    llava = rewards.VLM("cpu", str(tiny_vlm))
    with_template = AutoProcessor.from_pretrained(tiny_vlm, backend="pil")
    with_template.chat_template = (
        "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}<image>\n"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}")
    assert rewards.dialogue(with_template, "how many?") == rewards.dialogue(llava.processor, "how many?")
    shutil.copytree(tiny_vlm, tmp_path / "vlm")
    with_template.chat_template = "<s>" + with_template.chat_template  # a template may write the beginning itself
    with_template.save_pretrained(tmp_path / "vlm")
    other = rewards.VLM("cpu", str(tmp_path / "vlm"))
    assert rewards.dialogue(other.processor, "how many?").startswith("<s>USER: <image>")
    assert len(other.answer(PICTURES[:1], ["how many?"])) == 1


def test_a_vlm_answers_the_same_whatever_it_is_asked_beside_it(tiny_vlm):
    vlm = rewards.VLM("cpu", str(tiny_vlm))
    questions = ["what is happening in this image?", "how many animals?", "what animal is in this image? answer concisely."]
    together = vlm.answer(PICTURES, questions)
    alone = [vlm.answer(PICTURES[k:k + 1], [question])[0] for k, question in enumerate(questions)]
    assert together == alone and all(together)
    assert vlm.answer(PICTURES.repeat(4, 1, 1, 1), questions * 4) == together * 4  # more than go through at a time
    text = rewards.dialogue(vlm.processor, "what?")
    tokens = vlm.processor(images=[rewards.to_pil(PICTURES[0])], text=[text], return_tensors="pt")
    assert (tokens.input_ids == 4).sum() == 16  # one for each 8 x 8 patch


def test_bertscore_recall_knows_three_cats_from_two_cats_and_from_three_dogs():
    recall = rewards.BertRecall("cpu", str(EMOJI))
    answers = ["three cats", "two cats", "three dogs", "four owls", ""]
    same, *others, empty = recall(answers, ["three cats"] * 5).tolist()
    assert same == pytest.approx(1, abs=1e-5) and max(others) < 0.95 and empty == 0
    assert recall(["an ant", *answers], ["two ants", *["three cats"] * 5])[1:].tolist() == pytest.approx([same, *others, empty])
    rescaled = rewards.BertRecall("cpu", str(EMOJI), baseline=0.5)(answers[:2], ["three cats"] * 2)
    assert rescaled.tolist() == pytest.approx([1, 2 * (others[0] - 0.5)], abs=1e-5)


def test_bertscore_recall_is_that_of_the_package_bert_score():
    cases = json.loads((HERE / "oracles" / "bert_score_recall.json").read_text())["cases"]
    answers, references, theirs = zip(*cases)
    ours = rewards.BertRecall("cpu", str(EMOJI))(list(answers), list(references))
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5) and len(cases) == 21


def test_alignment_is_the_recall_of_what_the_vlm_says(tiny_vlm, monkeypatch):
    asked = []
    monkeypatch.setattr(rewards.VLM, "answer", lambda self, images, questions: asked.extend(questions) or ["two cats"] * 3)
    texts = [prompts.Prompt(text) for text in ("two cats", "a dog", "two cats")]
    for wording, reference in (("paper", "{}"), ("code", "The image contains {}")):
        reward = rewards.load_reward("alignment", reward_model=str(tiny_vlm), bert_model=str(EMOJI), wording=wording)
        values, notes = reward(PICTURES, texts)
        recall = rewards.BertRecall("cpu", str(EMOJI))
        torch.testing.assert_close(values, recall(["two cats"] * 3, [reference.format(prompt.text) for prompt in texts]))
        assert notes == ["two cats"] * 3 and values[0] == values[2] != values[1]
    assert set(asked) == {"What is happening in this image?", "Answer concisely: what is going on in this image?"}


def test_counting_marks_each_answer_right_or_wrong_by_the_prompts_own_words(tiny_vlm, monkeypatch):
    answers = {"How many animals are in this image?": ["Three.", "2", "There are fourteen"],
               "What animal is in this image?": ["a cat", "dogs", "A mouse"]}
    monkeypatch.setattr(rewards.VLM, "answer", lambda self, images, asked: [answers[question].pop(0) for question in asked])
    sets = {prompt.text: prompt for prompt in prompts.load_prompts("two_to_four_animals")}
    values, notes = rewards.load_reward("counting", reward_model=str(tiny_vlm))(
        PICTURES, [sets[text] for text in ("three cats", "two cats", "four mice")])
    assert values.tolist() == [1, 0.5, 0.5] and notes == ["Three. / a cat", "2 / dogs", "There are fourteen / A mouse"]


@pytest.mark.parametrize("name", rewards.LEARNED)
def test_a_learned_reward_that_cannot_be_had_is_told_before_anything_is_made(name, tmp_path, capsys):
    assert train.main(["--reward", name, "--reward-model", str(tmp_path), "--prompts", "two_to_four_animals"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "reward model" in told and "its files cannot be loaded" in told and not Path("runs").exists()


def test_a_run_trains_on_a_learned_reward(tiny_model, tiny_clip, tiny_head, capsys):
    assert train.main(["--reward", "aesthetic", "--reward-model", str(tiny_clip), "--aesthetic-head", str(tiny_head), "--model",
                       str(tiny_model), "--epochs", "1", "--samples-per-epoch", "4", "--updates-per-epoch", "2",
                       "--sampling-steps", "4", "--eval-prompts", "9"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("aesthetic: ")


# ---- The embedded model, and learning ----

def test_the_embedded_model_draws_with_plain_diffusers():
    pipeline = StableDiffusionPipeline.from_pretrained(EMOJI)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a frog", "two pandas"], num_inference_steps=10, eta=1.0, guidance_scale=5.0, generator=rng(),
                      output_type="np").images
    assert images.shape == (2, 64, 64, 3) and images.std() > 0.05
    assert sum(f.stat().st_size for f in EMOJI.rglob("*") if f.is_file()) < 12e6


def test_the_embedded_vlm_says_what_the_embedded_model_drew():
    config = settings.build_config({"reward": "alignment", "guidance_scale": 5.0, "sampling_steps": 10, "eval_prompts": 27})
    chosen, images = train.draw_fixed(train.policy_of(config), prompts.load_prompts(config.prompts), config)
    reward = train.reward_of(config)
    values, answers = reward(images, chosen)
    assert sum(answer == prompt.text for answer, prompt in zip(answers, chosen)) >= 24
    others, same_answers = reward(images, chosen[13:] + chosen[:13])  # other animals, in other numbers
    assert values.mean() > 0.95 > others.mean() + 0.2 and same_answers == answers  # it does not see the prompt
    marks, notes = train.reward_of(evaluate.with_reward(config, "counting", SimpleNamespace(
        **dict.fromkeys(settings.REWARD_OWNERS))))(images, chosen)
    assert marks.mean() > 0.9 and all(note.split(" / ")[0] in prompts.NUMBER_WORDS for note in notes)
    assert sum(f.stat().st_size for f in EMOJI_VLM.rglob("*") if f.is_file()) < 8e6


def test_the_check_uses_the_presets_steps_and_guidance():
    args = pretrain.parse([])
    config = settings.build_config({})
    assert (args.sampling_steps, args.guidance_scale) == (config.sampling_steps, config.guidance_scale)


REDNESS = """
import random
def redness(images, prompts):
    values = (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
    return values, [prompt.upper() for prompt in prompts]
def shuffled(images, prompts):
    values = redness(images, prompts)[0].tolist()
    random.shuffle(values)
    return values
def nan(images, prompts): return images.mean((1, 2, 3)) * float("nan")
def wrong_shape(images, prompts): return images
def words(images, prompts): return prompts
def broken(images, prompts): raise KeyError("weights")
def fails_later(images, prompts):
    if len(images) == 4: raise RuntimeError("the judge went home")
    return images.mean((1, 2, 3))
queries = 0
def fills_the_disk(images, prompts):
    global queries
    queries += len(images)
    if queries > 3 + 4 + 3:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return images.mean((1, 2, 3))
def interrupts(images, prompts):
    if len(images) == 4: raise KeyboardInterrupt
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def own_reward(tmp_path):
    (tmp_path / "own.py").write_text(REDNESS)
    return "own.py:{}".format


def run(*flags, code=0):
    """train.py in this process. Returns the run's log."""
    try:
        returned = train.main([str(flag) for flag in flags])
    except SystemExit as stop:
        returned = stop.code
    assert returned == code
    folders = sorted(Path("runs").glob("*"), key=lambda folder: folder.stat().st_mtime)
    return runs.read_rows(folders[-1]) if folders else []


def tiny_flags(tiny_model, **changes):
    flags = {"model": tiny_model, "epochs": 2, "samples-per-epoch": 4, "updates-per-epoch": 2, "sampling-steps": 3,
             "eval-prompts": 3, "eval-every": 1, "checkpoint-every": 1, "name": "r", **changes}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


FOUR = ["a cat", "a dog", "a frog", "a pig"]


def redness(images):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def drawn_redness(policy):
    """Of 48 images of fixed prompts and noise."""
    return redness(sampling.rollout(policy, FOUR * 12, rng(7), 48, keep_chain=False)[1])


def gain(before, after):
    """Mean of the paired differences, and its standard error."""
    return (after - before).mean().item(), ((after - before).std() / len(before) ** 0.5).item()


def test_it_learns_on_the_embedded_model_and_not_from_shuffled_rewards():
    gains, dealer = {}, rng(1)
    for shuffled in (False, True):
        policy = sampling.load_policy(EMOJI, steps=5, eta=1.0, guidance_scale=1.0)
        extras = learner(policy, 1e-4, updates_per_epoch=8, micro_batch=64, clip_range=2e-3, skip_last_steps=2)
        statistics, before = ddpo.PromptStatistics(16, 8, 10), drawn_redness(policy)
        for _ in range(4):
            trajectory, images = sampling.rollout(policy, FOUR * 16, extras["rng"], 64)
            values = redness(images)
            if shuffled:
                values = values[torch.randperm(64, generator=dealer)]
            advantages, _ = statistics.advantages(FOUR * 16, values)
            ddpo.ddpo_update(policy, trajectory, advantages, loss=ddpo.clipped_loss, **extras)
        gains[shuffled] = gain(before, drawn_redness(policy))
    (learned, error), (chance, _) = gains[False], gains[True]
    assert learned > 5 * error
    assert abs(chance) < learned / 2  # noise moves the pictures too, but less, and anywhere


def test_rwr_learns_on_the_embedded_model_in_one_round():
    """Against the control that a round without a reward is: its pictures change, too."""
    policy = sampling.load_policy(EMOJI, steps=5, eta=1.0, guidance_scale=1.0)
    trajectory, images = sampling.rollout(policy, FOUR * 24, rng(), 48, keep_chain=False)
    start, red = policy.unet.state_dict(), {}
    start = {name: weight.clone() for name, weight in start.items()}
    for beta in (0, 60):
        policy.unet.load_state_dict(start)
        extras = learner(policy, 2e-4, updates_per_epoch=10, batch_size=24, micro_batch=24)
        baselines_rwr.rwr_update(policy, trajectory, baselines_rwr.rwr_weights(FOUR * 24, redness(images), beta), **extras)
        red[beta] = drawn_redness(policy)
    learned, error = gain(red[0], red[60])
    assert learned > 5 * error


def test_a_saved_model_draws_with_plain_diffusers_what_the_policy_drew(tiny_model):
    rows = run(*tiny_flags(tiny_model, **{"learning-rate": 1e-2}))
    pipeline = StableDiffusionPipeline.from_pretrained("runs/r/model")
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    reloaded = sampling.load_policy("runs/r/model", 3, 1.0, 5.0)
    state = torch.load("runs/r/checkpoint/state.pt", weights_only=True)
    for name, weight in reloaded.unet.state_dict().items():
        assert torch.equal(weight, state["unet"][name])
    fixed = [prompts.common_animals()[k * 45 // 3] for k in range(3)]
    _, images = sampling.rollout(reloaded, [prompt.text for prompt in fixed], rng(train.EVAL_SEED), 3)
    np.testing.assert_allclose(images[:1].permute(0, 2, 3, 1).numpy(), drawn_by_diffusers(
        pipeline, "a cat", first_noise(rng(train.EVAL_SEED), images=3, states=4)), atol=1e-4)
    values, _ = rewards.load_reward("compressibility")(images, fixed)
    assert values.mean().item() == pytest.approx(rows[-1]["eval_reward_mean"], abs=1e-6)


def test_a_run_logs_every_epoch_and_leaves_its_pictures(tiny_model, own_reward, capsys):
    rows = run(*tiny_flags(tiny_model, reward=own_reward("redness"), epochs=3, **{"eval-every": 2}))
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [row["reward_queries"] for row in rows] == [0, 4, 8, 12]
    assert [row["eval_reward_mean"] is None for row in rows] == [False, True, False, False]
    assert rows[0]["loss"] is None and all(
        np.isfinite(row[name]) for row in rows[1:] for name in train.TRAINING_FIGURES if name != "denoising_error")
    assert {"reward_mean", "reward_std", "seconds_sample", "seconds_reward", "seconds_learn", "loss", "approx_kl",
            "ratio_mean", "clip_fraction_low", "clip_fraction_high", "grad_norm", "ratio_deviation"} <= set(rows[1])
    assert all(row["ratio_deviation"] <= 2e-6 for row in rows[1:])
    assert [(text, note) for text, _, note in rows[0]["eval_notes"]] == [
        ("a cat", "A CAT"), ("a raccoon", "A RACCOON"), ("a turtle", "A TURTLE")]
    left = {str(path.relative_to("runs/r")) for path in Path("runs/r").rglob("*") if path.is_file()}
    assert {"config.json", "log.jsonl", "progress.png", "curve.png", "checkpoint/state.pt", "model/model_index.json",
            "samples/epoch_0000.png", "samples/epoch_0002.png", "samples/epoch_0003.png"} <= left
    assert not [name for name in left if "new-" in name]
    assert capsys.readouterr().out.splitlines()[-1].startswith("redness: ")


def without_seconds(rows):
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def test_same_seed_same_log_and_another_seed_the_same_evaluation_noise(tiny_model):
    one, two, other = (run(*tiny_flags(tiny_model, name=name, seed=seed)) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert without_seconds(one) == without_seconds(two)
    assert one[1]["reward_mean"] != other[1]["reward_mean"] and one[0]["eval_reward_mean"] == other[0]["eval_reward_mean"]


@pytest.mark.parametrize("algorithm", ["ddpo-is", "ddpo-sf", "rwr"])
def test_a_resumed_run_equals_one_never_stopped(tiny_model, own_reward, algorithm):
    updates = {"updates-per-epoch": 1 if algorithm == "ddpo-sf" else 2}
    flags = dict(algorithm=algorithm, **updates, reward=own_reward("shuffled"))
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=4, **flags))
    run(*tiny_flags(tiny_model, name="parts", epochs=2, **flags))
    parts = run("--resume", "runs/parts", "--epochs", 4)
    assert without_seconds(whole) == without_seconds(parts)
    one, two = (torch.load(f"runs/{name}/checkpoint/state.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one["unet"][name], two["unet"][name]) for name in one["unet"])
    assert one["statistics"] == two["statistics"] and one["global_rngs"]["python"] == two["global_rngs"]["python"]
    assert (Path("runs/whole/progress.png").read_bytes() == Path("runs/parts/progress.png").read_bytes())


def test_an_interrupted_epoch_is_undone_saved_and_resumed_bit_for_bit(tiny_model, own_reward, monkeypatch, capsys):
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=3))
    calls, evaluate = [], train.evaluate_fixed

    def interrupted_once(experiment, *args):  # at its worst: weights already updated, row not yet written
        calls.append(experiment.epoch)
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        return evaluate(experiment, *args)

    monkeypatch.setattr(train, "evaluate_fixed", interrupted_once)
    stopped = run(*tiny_flags(tiny_model, name="parts", epochs=3, **{"checkpoint-every": 100}), code=130)
    assert [row["epoch"] for row in stopped] == [0, 1]
    assert "after 1 epochs is saved" in (told := capsys.readouterr().err) and "--resume runs/parts" in told
    assert without_seconds(run("--resume", "runs/parts")) == without_seconds(whole)


def test_a_flag_stands_above_the_preset_above_the_algorithm_above_the_paper():
    paper = settings.build_config({"preset": "paper", "precision": "fp32"})
    assert (paper.learning_rate, paper.clip_range, paper.sampling_steps, paper.guidance_scale) == (1e-5, 1e-4, 50, 5.0)
    assert (paper.samples_per_epoch, paper.updates_per_epoch, paper.weight_decay, paper.max_grad_norm) == (256, 4, 1e-4, 1.0)
    assert (paper.stats_buffer, paper.stats_min_count, paper.advantage_clip, paper.prompts) == (32, 16, 10, "imagenet_animals")
    assert settings.build_config({"preset": "paper", "precision": "fp32", "algorithm": "ddpo-sf"}).updates_per_epoch == 1
    for algorithm in ("rwr", "rwr-sparse"):
        rwr = settings.build_config({"preset": "paper", "precision": "fp32", "algorithm": algorithm})
        assert (rwr.samples_per_epoch, rwr.updates_per_epoch, rwr.batch_size) == (10_000, 400, 128)
        assert (rwr.beta, rwr.percentile, rwr.guided_training) == (0.2, 0.9, True)
    assert settings.build_config({}).model == str(EMOJI) and settings.build_config({}).prompts == "common_animals"
    assert settings.build_config({"prompts": ""}).prompts == "common_animals"
    assert settings.build_config({"sampling_steps": 7}).sampling_steps == 7
    for reward in ("alignment", "counting"):  # what the preset says for a reward stands above what it says for all
        asked = settings.build_config({"reward": reward, "guidance_scale": 2.0})
        assert (asked.reward_model, asked.prompts) == (str(EMOJI_VLM), "two_to_four_animals")
        assert (asked.sampling_steps, asked.guidance_scale, asked.samples_per_epoch) == (4, 2.0, 256)
    assert settings.build_config({"reward": "alignment", "preset": "paper", "precision": "fp32"}).reward_model == ""
    assert settings.build_config({"sampling_steps": 2, "algorithm": "rwr"}).skip_last_steps == 2  # which RWR does not read


# ---- evaluate.py ----

def test_evaluate_compares_two_models_on_the_same_prompts_and_noise(tiny_model, tiny_policy, tiny_clip, capsys):
    assert train.main(tiny_flags(tiny_model, name="r", epochs=1)) == 0
    capsys.readouterr()
    ask = ["--prompts", "unseen_emoji_animals", "--images", "6"]
    assert evaluate.main(["runs/r", *ask, "--reward", "compressibility", "--reward", "incompressibility"]) == 0
    header, _, small, large = [row.split(" | ") for row in capsys.readouterr().out.splitlines()]
    assert small[1:4] == ["compressibility", "unseen_emoji_animals", "6"] and small[4:6] == large[4:6]
    assert "±" in small[6] and int(small[7][:-1]) + int(large[7][:-1]) <= 101 and Path("runs/r/before_after.png").exists()
    shutil.copytree(tiny_model, "same")  # no run, a model: against the preset's, here the same
    config = settings.build_config({"model": str(tiny_model), "sampling_steps": 4, "eval_prompts": 6})
    images = [train.draw_fixed(train.policy_of(config, model), prompts.load_prompts("objects"), config)[1]
              for model in (None, "same")]
    assert torch.equal(*images)
    assert evaluate.main(["runs/r", *ask, "--eta", "0", "--sampling-steps", "3", "--clip", str(tiny_clip)]) == 0
    told = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert 0 < float(told[-2]) < 2


def test_a_rewards_options_are_those_asked_for_or_the_runs_or_the_presets():
    flags = dict.fromkeys(settings.REWARD_OWNERS)
    run = settings.build_config({"reward": "alignment", "bert_baseline": 0.5})
    assert evaluate.with_reward(run, "alignment", SimpleNamespace(**flags)).bert_baseline == 0.5
    other = evaluate.with_reward(settings.build_config({}), "alignment", SimpleNamespace(**flags))
    assert (other.reward_model, other.wording, other.bert_model) == (str(EMOJI_VLM), "paper", str(EMOJI))
    asked = evaluate.with_reward(run, "counting", SimpleNamespace(**{**flags, "reward_model": "x", "bert_baseline": 0.1}))
    assert (asked.reward_model, asked.bert_baseline, asked.bert_model) == ("x", 0.0, "")  # counting reads no BERTScore
    paper = settings.build_config({"preset": "paper", "precision": "fp32"})
    assert evaluate.with_reward(paper, "alignment", SimpleNamespace(**flags)).reward_model == ""


def test_the_judge_marks_animal_and_number_and_knows_which_prompts_it_can_judge(monkeypatch):
    monkeypatch.setattr(judge, "name_animals", lambda network, images: (["cat", "mouse", "owl"], [2, 3, 1]))
    images = torch.rand(3, 3, 64, 64)
    assert judge.right_animals(images, ["two cats", "two mice", "a bee"]) == ([True, True, False], [True, False, True])
    assert judge.shares_right(images, ["two cats"] * 3) == {"eval_named": 1 / 3, "eval_counted": 1 / 3}
    cannot = {"eval_named": None, "eval_counted": None}
    assert judge.shares_right(images, ["five cats"] * 3) == judge.shares_right(images[:, :, :32], ["a cat"] * 3) == cannot
    before, after = ([True, True, False], [True, False, False]), ([True, False, True], [True, True, True])
    assert evaluate.judged([before, after]) == ["2 of 3", "1 (50%)", "1 -> 3", "1 -> 2"]
    assert evaluate.judged([(None, None)] * 2) == ["-"] * 4


def test_variety_and_gain_by_hand_made_cases(tiny_clip):
    images = torch.stack([torch.zeros(3, 40, 40), torch.ones(3, 40, 40), torch.ones(3, 40, 40)])
    assert evaluate.variety(images, None) == pytest.approx(2 / 3)  # distances 1, 1 and 0
    clip = rewards.load_clip(str(tiny_clip), "cpu")
    x, y, _ = (rewards.image_embeddings(clip[1], rewards.preprocess(clip[0], images)))
    assert evaluate.variety(images, clip) == pytest.approx(2 / 3 * (1 - torch.cosine_similarity(x, y, dim=0).item()), abs=1e-5)
    before, after = torch.tensor([-2.0, -3.0]), torch.tensor([-1.0, -2.0])
    assert evaluate.with_interval("compressibility", before) == "2.50 ± 0.98 kB"  # 1.96 sqrt(1/2) / sqrt(2)
    assert evaluate.gain("compressibility", before, after) == "-1.00 ± 0 kB (+40%)"  # smaller, which is what is rewarded
    assert evaluate.gain("counting", torch.zeros(4), torch.tensor([0.0, 1.0, 0.0, 1.0])) == "0.5 ± 0.57"
    assert evaluate.with_interval("aesthetic", torch.tensor([5.0])) == "5"


def test_a_sampler_without_noise_is_diffusers_own_and_cannot_be_scored(tiny_model):
    policy = sampling.load_policy(tiny_model, steps=5, eta=0, guidance_scale=5.0, scored=False)
    _, images = sampling.rollout(policy, ["a cat", "a dog"], rng(), 2, keep_chain=False)
    pipeline = policy.pipeline
    pipeline.set_progress_bar_config(disable=True)
    seeds = torch.randint(2**62, (2,), generator=rng()).tolist()
    x_T = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    theirs = pipeline(["a cat", "a dog"], num_inference_steps=5, eta=0.0, guidance_scale=5.0, latents=x_T,
                      output_type="pt").images
    torch.testing.assert_close(images, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="deterministic"):
        sampling.load_policy(tiny_model, steps=5, eta=0, guidance_scale=5.0)


@pytest.mark.parametrize("flags, message", [
    (["runs/nothing"], "it is neither a folder here nor reachable"), (["runs/r", "--images", "0"], "--images 0: must be"),
    (["runs/r", "--prompts", "nothing"], "no prompts 'nothing'"), (["runs/r", "--reward", "beauty"], "no reward 'beauty'"),
    (["runs/r", "--reward", "counting"], "choose --prompts two_to_eight_animals"), (["runs/r"], "has no model/ yet")])
def test_evaluate_answers_a_mistake_in_one_line(flags, message, tiny_model, capsys):
    runs.create_run(train.RUNS, "r", "", asdict(settings.build_config({"model": str(tiny_model)})))
    if len(flags) > 1:
        shutil.copytree(tiny_model, "runs/r/model")
    assert evaluate.main(flags) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and len(told) == 1


# ---- compare.py ----

def line(label, seed, queries, rewards, named=None):
    return {"label": label, "seed": seed, "folder": "nothing", "command": "python train.py",
            "commit": "c", "machine": "m", "minutes": 1.0, "updates": 2, "rows": [
                {"reward_queries": q, "eval_reward_mean": r, "eval_named": n}
                for q, r, n in zip(queries, rewards, named or [1.0] * len(queries))]}


def test_intervals_areas_and_queries_to_a_reward_by_hand_made_cases():
    assert compare.interval([1, 2, 3]) == pytest.approx((2, 4.30 / 3**0.5), rel=1e-3)
    assert compare.interval([5])[0] == 5 and np.isnan(compare.interval([5])[1])
    one = line("a", 0, [0, 100, 300], [-2.0, -1.0, -1.0])
    # The first 100 queries were spent on the start's policy, whatever came of them.
    assert compare.area(one) == pytest.approx((-2 * 100 - 200) / 300)
    assert compare.queries_to(one, 0.25) == 100 and compare.queries_to(one, 0.0) == 0
    assert np.isnan(compare.queries_to(line("a", 0, [0, 9], [0.0, 1.0]), 0.1))  # no share of a start of 0
    assert np.isnan(compare.queries_to(one, 0.9))
    skipped = {**one, "rows": [*one["rows"], {"reward_queries": 400, "eval_reward_mean": None, "eval_named": None}]}
    assert compare.area(skipped) == compare.area(one)
    between = {**one, "rows": [one["rows"][0], {"reward_queries": 50, "eval_reward_mean": None}, *one["rows"][1:]]}
    assert compare.area(between) == pytest.approx((-2 * 50 - 1.5 * 50 - 200) / 300)  # an epoch without an evaluation
    assert compare.queries_to(between, 0.25) == 50


def test_rwr_is_also_measured_against_the_same_rounds_without_a_reward():
    def runs_of(label, algorithm, *ends):
        return [{**line(label, seed, [0, 9], [-2.0, end]), "settings": {"algorithm": algorithm}} for seed, end in enumerate(ends)]

    groups = compare.by_label([*runs_of("rwr", "rwr", -1.0, -1.2), *runs_of("ddpo-is", "ddpo-is", -1.0),
                               *runs_of("no reward", "rwr", -1.6, -1.6)])
    assert compare.beyond_no_reward("rwr", groups["rwr"], groups) == pytest.approx([30, 20])
    assert not compare.beyond_no_reward("ddpo-is", groups["ddpo-is"], groups)
    assert not compare.beyond_no_reward("no reward", groups["no reward"], groups)
    groups["rwr, no reward"] = runs_of("rwr, no reward", "rwr", -1.8)
    assert compare.beyond_no_reward("rwr", groups["rwr"], groups) == pytest.approx([40])


def test_a_drift_that_both_rewards_share_cancels():
    """The size falls by 40 % for both; what the reward does beside is 10 % each way."""
    small, large = ([line("rwr", seed, [0, 9], [start, end]) for seed in (0, 1)] for start, end in ((-2.0, -1.0), (2.0, 1.4)))
    rows = compare.without_drift([*small, line("no reward", 0, [0, 9], [-2.0, -1.2])], large).splitlines()
    assert rows[2:] == ["| rwr | 2 | 10.0 ± 0.0 |"]  # of the other there is but one


def test_a_comparison_trains_what_no_study_has_and_reports_all(tiny_model, tmp_path, monkeypatch, capsys):
    tiny = {"model": str(tiny_model), "samples_per_epoch": 4, "sampling_steps": 3, "eval_prompts": 9, "updates_per_epoch": 1}
    monkeypatch.setitem(compare.ABLATIONS, "tiny", (8, {"one": tiny, "two": {**tiny, "baseline": "none"}}))
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    finish = compare.finish
    _, done = compare.plans(SimpleNamespace(sweep=False, ablation="tiny", seeds=1), {"reward": "compressibility"})
    folder, shared = tmp_path / "results" / "compressibility", settings.shared_settings(done.config)
    two = {**line("two", 0, [0, 4, 8], [-2.0, -1.0, -0.5]), "settings": shared}
    runs.append_line(folder / "tiny.jsonl", {**two, "settings": {**shared, "epochs": 9}})  # of other settings: not this one
    runs.append_line(folder / "other.jsonl", {**two, "label": "as another study calls it"})
    with open(folder / "tiny.jsonl", "a") as file:
        file.write('{"label": "cut sho')  # by a kill
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 0
    told = capsys.readouterr().out
    assert "| two | 1 | 2.00 | 0.50 | 75.0 | - |" in told and "| one | 1 |" in told
    assert [path.name[:-7] for path in Path("runs").iterdir()] == ["tiny-compressibility-one-seed0"]
    assert {"tiny.jsonl", "tiny.md", "tiny.png"} <= {path.name for path in folder.iterdir()}
    monkeypatch.setattr(compare, "finish", lambda *args: pytest.fail("nothing is missing"))
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 0
    assert capsys.readouterr().out == told
    monkeypatch.setattr(compare, "finish", finish)
    assert [row["label"] for row in runs.read_lines(folder / "tiny.jsonl")] == ["two", "two", "one"]


def test_a_comparison_goes_on_where_it_was_killed_and_without_a_run_that_fails(tiny_model, tmp_path, monkeypatch, capsys):
    tiny = {"model": str(tiny_model), "samples_per_epoch": 4, "sampling_steps": 3, "eval_prompts": 9, "updates_per_epoch": 1}
    monkeypatch.setitem(compare.ABLATIONS, "tiny", (8, {"bad": {**tiny, "learning_rate": 1e30}, "half": tiny, "begun": {
        **tiny, "baseline": "none"}}))
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    _, half, begun = compare.plans(SimpleNamespace(sweep=False, ablation="tiny", seeds=1), {"reward": "compressibility"})
    assert train.main([*half.arguments, "--name", half.name]) == 0
    whole = runs.read_rows(train.RUNS / half.name)
    shutil.rmtree(train.RUNS / half.name)
    assert train.main([*half.arguments, "--name", half.name, "--epochs", "1"]) == 0  # as if stopped after one epoch
    shutil.rmtree(train.RUNS / half.name / "model")
    settings_file = train.RUNS / half.name / "config.json"
    settings_file.write_text(settings_file.read_text().replace('"epochs": 1', '"epochs": 2'))
    runs.create_run(train.RUNS, begun.name, "", {})  # killed before its first checkpoint

    def in_this_process(arguments, folder, show):  # three more processes would take their time
        if train.main(arguments):
            raise ValueError(f"{folder} stopped")

    monkeypatch.setattr(compare, "_train", in_this_process)
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 2
    told = capsys.readouterr().err
    assert "1 of 3 runs failed" in told and "not finite" in told
    lines = runs.read_lines(tmp_path / "results" / "compressibility" / "tiny.jsonl")
    assert [line["label"] for line in lines] == ["half", "begun"]
    assert lines[0]["rows"][-1]["eval_reward_mean"] == whole[-1]["eval_reward_mean"] and "begun earlier" in lines[0]["commit"]


def test_each_preset_is_among_the_settings_of_the_sweep():
    own = {"ddpo-is": ("clip_range", "updates_per_epoch"), "ddpo-sf": ("samples_per_epoch",), "rwr": ("beta",),
           "rwr-sparse": ("percentile",)}
    for algorithm, names in own.items():
        names = ("learning_rate", *names)
        preset, *tried = [tuple(getattr(settings.build_config({"algorithm": algorithm, **flags}), name) for name in names)
                          for flags in ({}, *compare.SWEEP[algorithm])]
        assert preset in tried


@pytest.mark.parametrize("reward", ["compressibility", "alignment"])
def test_every_planned_run_is_one_that_train_accepts_at_the_same_number_of_queries(reward):
    for options in ({"sweep": True}, *({"ablation": name} for name in compare.ABLATIONS), {}, {"algorithms": ["ddpo-is"]}):
        args = SimpleNamespace(**{"sweep": False, "ablation": None, "algorithms": None, "seeds": 2, "queries": compare.QUERIES,
                                  **options})
        planned = compare.plans(args, {"reward": reward})
        assert len({planned_run.name for planned_run in planned}) == len(planned)
        assert len({planned_run.queries for planned_run in planned}) == 1
        for planned_run in planned:  # raises ValueError where train.py would
            settings.build_config(settings.parse(planned_run.arguments, ""))


def test_signal_to_noise_is_that_of_a_known_gaussian():
    noise = np.random.default_rng(0).standard_normal(2000)
    snr, error = variance.jackknife(0.2 + 2 * noise, batch=64)
    assert snr == pytest.approx(0.1 * 8, abs=3 * error) and error == pytest.approx((64 / 2000) ** 0.5, rel=0.05)


def test_projected_scores_add_up_to_the_gradient_of_ddpo_sf_along_the_direction(tiny_model, tiny_policy):
    trained, noise = sampling.load_policy(tiny_model, steps=4, eta=1.0, guidance_scale=5.0), rng()
    with torch.no_grad():
        for weight in trained.unet.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=noise)
    u = variance.direction(tiny_policy, trained)
    assert sum(part.square().sum() for part in u).item() == pytest.approx(1, rel=1e-4)
    trajectory, _ = sampling.rollout(tiny_policy, ["a cat", "a dog", "an ant"], rng(), 3)
    advantages, extras = torch.tensor([1.0, -2.0, 0.5]), learner(tiny_policy)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    ddpo.accumulate([pairs], lambda part: ddpo.surrogate(
        tiny_policy, trajectory, advantages, part, ddpo.score_function_loss, extras["config"]),
        extras["scaler"], SimpleNamespace(update=lambda n: None))
    along = sum((weight.grad * part).sum() for weight, part in zip(tiny_policy.unet.parameters(), u)).item()
    projected = variance.projected_scores(tiny_policy, trajectory, torch.arange(4), u)
    assert -(advantages.numpy() @ projected) / 3 == pytest.approx(along, rel=1e-3)


def test_the_variance_is_measured_for_each_number_of_steps_once(tiny_model, tiny_policy, tmp_path, monkeypatch):
    with torch.no_grad():
        tiny_policy.unet.conv_out.weight.add_(0.1)
    tiny_policy.pipeline.save_pretrained(tmp_path / "run" / "model")

    def measure(*steps):
        return variance.measure_variance(tmp_path, "the command", tmp_path / "run", {"commit": "c"}, steps, images=4, pool=2,
                                         model=str(tiny_model))

    three = measure(3).splitlines()[-1]
    assert three.startswith("| 3 | ") and three.count("±") == 6
    assert measure(3, 4).splitlines()[-2] == three and len(runs.read_lines(tmp_path / "variance.jsonl")) == 2
    monkeypatch.setattr(variance, "measure_steps", lambda *args: pytest.fail("nothing is missing"))
    assert measure(3, 4).splitlines()[-2] == three and (tmp_path / "variance.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--seeds", "0"], "--seeds 0"), (["--queries", "100"], "--queries 100 does not divide"),
    (["--sweep", "--queries", "64"], "--queries is of the comparison"), (["--reward", "beauty"], "no reward 'beauty'")])
def test_compare_answers_a_mistake_in_one_line_and_makes_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    assert compare.main(flags) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0] and not (tmp_path / "results").exists()


def test_the_benchmark_measures_what_train_does(tiny_model, capsys):
    for algorithm in ("ddpo-is", "rwr"):
        assert benchmark.main(["--model", str(tiny_model), "--images", "3", "--algorithm", algorithm]) == 0
    told = capsys.readouterr().out.splitlines()
    assert float(told[4].split("|")[6]) < 5e-6 and [row for row in told if row.startswith("| fp32 |")]
    assert benchmark.main(["--images", "0"]) == 2 and "--images: must be at least 1" in capsys.readouterr().err


def test_the_benchmark_of_rewards_goes_through_their_real_loading_code(monkeypatch, capsys):
    wide = {**LAYERS, "hidden_size": 64, "intermediate_size": 64}
    monkeypatch.setattr(benchmark, "CLIP_L", TINY_CLIP)
    monkeypatch.setattr(benchmark, "CLIP_H", TINY_CLIP)
    monkeypatch.setattr(benchmark, "BLIP", (dict(image_size=32, patch_size=8, **wide),
                                            dict(encoder_hidden_size=64, vocab_size=900, **wide)))
    monkeypatch.setattr(benchmark, "LLAVA", dict(TINY_CLIP, text_config=dict(vocab_size=200, **LAYERS)))
    monkeypatch.setattr(benchmark, "DEBERTA", dict(benchmark.DEBERTA, vocab_size=900, **LAYERS))
    names = list(benchmark.RANDOM_REWARDS)
    assert benchmark.main(["--reward", *names, "--images", "3"]) == 0
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == names and all(float(row[2]) > 0 for row in rows)
    assert set(names) == set(rewards.LEARNED) - {"hpsv2"}  # whose network is pickscore's
    assert benchmark.main(["--reward", "aesthetic", "--precision", "fp32"]) == 2
    assert "--precision is not of --reward" in capsys.readouterr().err


# ---- Bad input: one clear line, exit code 2, nothing lost ----

@pytest.mark.parametrize("flags, message", [
    (["--reward", "beauty"], "no reward 'beauty': choose compressibility, incompressibility"),
    (["--reward-model", "x"], "--reward-model is not of compressibility, but of aesthetic, pickscore, hpsv2"),
    (["--reward", "pickscore", "--aesthetic-head", "x"], "--aesthetic-head is not of pickscore, but of aesthetic"),
    (["--reward", "counting", "--prompts", "objects"], "choose --prompts two_to_eight_animals"),
    (["--reward", "nothing.py:f"], "no reward file"),
    (["--reward", "own.py:nothing"], "has no function 'nothing'"),
    (["--reward", "typo.py:f"], "cannot be loaded: SyntaxError"),
    (["--reward", "prompts.txt:f"], "is not a Python file"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--algorithm", "ppo"], "invalid choice: 'ppo'"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--prompts", "nothing.txt"], "neither a prompt set (common_animals, imagenet_animals, painted_animals"),
    (["--prompts", "empty.txt"], "is empty"),
    (["--prompts", "binary.txt"], "is not UTF-8"),
    (["--model", "nobody/nothing"], "neither a folder here nor reachable on the hub"),
    (["--model", "bare"], "no Stable Diffusion pipeline: it has no model_index.json, unet"),
    (["--model", "truncated"], "its files cannot be loaded"),
    (["--samples-per-epoch", "10"], "--samples-per-epoch 10 does not divide into --updates-per-epoch 8"),
    (["--algorithm", "ddpo-sf", "--updates-per-epoch", "2"], "ddpo-sf takes one update"),
    (["--no-guided-training"], "--guided-training is not of ddpo-is, but of rwr, rwr-sparse"),
    (["--algorithm", "rwr", "--kl-weight", "1"], "--kl-weight is not of rwr, but of ddpo-is, ddpo-sf"),
    (["--algorithm", "rwr-sparse", "--percentile", "1"], "--percentile 1: must be below 1"),
    (["--algorithm", "rwr", "--beta", "-1"], "--beta -1.0: must be a non-negative number"),
    (["--skip-last-steps", "10"], "--skip-last-steps 10 leaves none of --sampling-steps 10"),
    (["--sampling-steps", "1000"], "of which the model knows none above 999; take fewer"),
    (["--baseline", "value"], "invalid choice: 'value'"),
    (["--epochs", "0"], "--epochs 0: must be a positive number"),
    (["--learning-rate", "-1"], "--learning-rate -1.0: must be a positive number"),
    (["--clip-range", "nan"], "--clip-range nan: must be a positive number"),
    (["--epochs", "many"], "invalid int value: 'many'"),
    (["--eta", "0"], "--eta 0.0: must be a positive number"),
    (["--eta", "2"], "eta is 2, but must be in (0, 1]"),
    (["--sampling-steps", "2000"], "2000 sampling steps: must be from 1 to 1000"),
    (["--name", "a/b"], "must be a plain name"),
    (["--name", "taken"], "exists: choose another --name, or continue it with --resume"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    (["--device", "cuda"], "no GPU is to be seen"),
    (["--resume", "runs/nothing"], "is no run"),
    (["--resume", "runs/taken"], "has no checkpoint yet")], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_gives_one_clear_line_and_makes_nothing(flags, message, tiny_model, own_reward, capsys, monkeypatch):
    own_reward("f")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("typo.py").write_text("def f(:")
    Path("prompts.txt").write_text("a cat\n")
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("bare").mkdir()
    shutil.copytree(tiny_model, "truncated")
    Path("truncated/unet/diffusion_pytorch_model.safetensors").write_bytes(b"short")
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/config.json").write_text("{}")
    run(*(flags if "--model" in flags else ["--model", tiny_model, *flags]) if "--resume" not in flags else flags, code=2)
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("train.py: ") and message in told[0]
    assert [path.name for path in Path("runs").iterdir()] == ["taken"]


@pytest.mark.parametrize("function, message", [
    ("nan", "returned nan for image 0"), ("wrong_shape", "returned shape (3, 3, 16, 16) for 3 images; (3,) was expected"),
    ("words", "returned list, not numbers"), ("broken", "failed: KeyError: 'weights'"),
    ("fails_later", "failed: RuntimeError: the judge went home")])
def test_a_reward_that_breaks_stops_the_run_with_its_state_saved(function, message, tiny_model, own_reward, capsys):
    run(*tiny_flags(tiny_model, reward=own_reward(function)), code=2)
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and "the state after 0 epochs is saved" in told
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] == 0


def test_ctrl_c_inside_a_reward_saves_too(tiny_model, own_reward, capsys):
    run(*tiny_flags(tiny_model, reward=own_reward("interrupts")), code=130)
    assert "interrupted; the state after 0 epochs is saved" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_stops_before_any_weight_is_touched(tiny_model, monkeypatch, capsys):
    monkeypatch.setitem(train.UPDATES, "ddpo-is", (partial(
        ddpo.ddpo_update, loss=lambda *tensors: (tensors[0].sum() * float("inf"), ddpo.ratio_info(*tensors[:2], 0.1))), True))
    run(*tiny_flags(tiny_model), code=2)
    assert "the gradient is not finite" in capsys.readouterr().err
    policy = sampling.load_policy(tiny_model, 3, 1.0, 5.0)
    start, extras = weights(policy), learner(policy)
    for weight in policy.unet.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(FloatingPointError):
        ddpo.optimizer_step(policy.unet, extras["optimizer"], extras["scaler"], 1.0)
    assert all(torch.equal(weight, start[name]) for name, weight in policy.unet.state_dict().items())


def test_an_image_that_is_not_finite_is_no_black_picture(tiny_policy):
    with torch.no_grad():
        tiny_policy.pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="image is not finite"):
        sampling.rollout(tiny_policy, ["a cat"], rng(), 1)


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny_model, capsys):
    run(*tiny_flags(tiny_model))
    checkpoint, config = Path("runs/r/checkpoint/state.pt"), Path("runs/r/config.json")
    good, settings = checkpoint.read_bytes(), config.read_text()
    checkpoint.write_bytes(good[:1000])
    run("--resume", "runs/r", "--epochs", 3, code=2)
    assert "is damaged" in capsys.readouterr().err
    checkpoint.write_bytes(good)
    config.write_text(settings.replace('"clip_range": 0.', '"clip_range": 1.'))
    run("--resume", "runs/r", "--epochs", 3, code=2)
    assert "is of another config: config.json differs in clip_range" in capsys.readouterr().err
    config.write_text(settings)
    run("--resume", "runs/r", code=2)
    assert "has done all its 2 epochs: give a larger --epochs" in capsys.readouterr().err
    run("--resume", "runs/r", "--epochs", 1, code=2)
    assert "can only be made longer" in capsys.readouterr().err
    run("--resume", "runs/r", "--seed", 1, "--epochs", 3, code=2)
    assert "only --epochs beside it, not --seed" in capsys.readouterr().err
    assert len(run("--resume", "runs/r", "--epochs", 3)) == 4  # nothing of the above did harm


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_loses_no_checkpoint(tiny_model, own_reward):
    # In its second epoch the reward sees to it that no file can grow beyond 50 kB: as torch and safetensors meet a full disk.
    done = command(*tiny_flags(tiny_model, reward=own_reward("fills_the_disk"), epochs=3))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "state.pt could not be written" in done.stderr and "an earlier checkpoint is unharmed" in done.stderr
    assert not list(Path("runs/r").rglob("new-*"))
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] == 1
    Path("own.py").write_text(REDNESS.replace("resource.setrlimit", "print"))  # room again
    assert [row["epoch"] for row in run("--resume", "runs/r")] == [0, 1, 2, 3]


def test_a_kill_between_log_and_checkpoint_or_amid_a_line_does_no_harm(tiny_model):
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=3))
    run(*tiny_flags(tiny_model, name="parts", epochs=2))
    with open("runs/parts/log.jsonl", "a") as log:
        log.write(json.dumps({"epoch": 3, "reward_mean": 0.0}) + "\n" + '{"epoch": 4, "rew')
    Path("runs/parts/samples/epoch_0003.png").write_bytes(b"half a picture")
    assert without_seconds(run("--resume", "runs/parts", "--epochs", 3)) == without_seconds(whole)


def test_an_unwritable_folder_is_one_clear_line(tiny_model, capsys):
    Path("runs").write_text("a file stands where the folder should be")
    run(*tiny_flags(tiny_model), code=2)
    told = capsys.readouterr().err
    assert "runs" in told and len(told.strip().splitlines()) == 1


# ---- The command line, as typed ----

def command(*flags):
    return subprocess.run([sys.executable, str(HERE / "train.py"), *map(str, flags)], capture_output=True, text=True, timeout=100)


def test_the_command_trains_quietly_and_ends_with_the_outcome():
    done = command("--reward", "compressibility", "--epochs", 1, "--samples-per-epoch", 8, "--sampling-steps", 3,
                   "--eval-prompts", 3)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("compressibility: ") and " kB (" in last and "on 3 fixed prompts after 8 reward queries" in last
    assert len(done.stdout.splitlines()) == 4
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith("compressibility:") for line in bars), "only our own bar reaches the terminal"
    assert Path("runs/compressibility-ddpo-is-1/model/model_index.json").exists()


@pytest.mark.parametrize("flags, message", [(["--reward", "beauty"], "no reward 'beauty'"), (["--epochs", "-3"], "--epochs -3")])
def test_the_command_answers_a_mistake_in_one_line(flags, message):
    done = command(*flags)
    assert done.returncode == 2 and not done.stdout and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_on_the_command_line_saves_and_says_how_to_resume(tiny_model):
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *tiny_flags(tiny_model, epochs=10_000, **{"checkpoint-every": 10_000})],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = Path("runs/r/log.jsonl")
    for _ in range(600):
        if log.exists() and len(log.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told and "python train.py --resume runs/r" in told
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] >= 1


# ---- The README ----

def test_every_function_the_readme_names_stands_where_its_link_points():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text(encoding="utf-8"))
    assert len(links) >= 6
    for name, file, line in links:
        assert re.match(rf"(def|class) {name}\b", (HERE / file).read_text(encoding="utf-8").splitlines()[int(line) - 1])
