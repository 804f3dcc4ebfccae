"""Reward-weighted regression (paper, section 4.2): what DDPO is compared with, in the same call shape.

    minimise     L = E[ w(x_0, c) ||eps - eps_theta(x_t, c, t)||^2 ],   x_0 ~ p_old, t uniform, x_t = x_0 noised by eps to t
    RWR          w(x_0, c) = exp(beta r(x_0, c)) / Z
    sparse RWR   w(x_0, c) = 1[r(x_0, c) >= C]

The policy is fine-tuned on its own images by the denoising loss. Each image is weighted by its reward. Only (x_0, c) is needed,
not the chain: the denoising loss is an upper bound on -log p(x_0 | c), so a smaller loss makes the image more likely. The paper
calls an epoch of RWR a round. With one round it is the algorithm of earlier work (Lee et al. 2023). More rounds interleave sampling
and training.

Where we depart from these lines:
 1. Weights are per prompt, as the paper says (D.3). In the authors' code this is true of RWR on aesthetic quality. Their RWR on
    JPEG size takes one softmax over all samples.
 2. The weights of a prompt's samples average 1, in both forms: beta and the percentile decide which samples count, not how large
    the loss is. The authors scale their softmax in the same way. In their sparse version every kept sample has the weight 1. In
    ours a prompt counts as often as it was drawn, however many of its samples are kept.
 3. eps_theta is the guided prediction, as in the paper's appendix E.1. config.guided_training False takes the plain one.
 4. The norm is a mean over the latent dimensions, a constant factor.
 5. x_0 is the chain's own. The authors decode it, save the image, and encode that again.
"""
import math
from dataclasses import replace

import torch
from tqdm import tqdm

from ddpo import accumulate, optimizer_step, summary
from models import encode_prompts
from sampling import predict


# ---- Rewards into weights ----

def rwr_weights(prompts, rewards, beta):
    """B prompts and B rewards -> weights (B,) fp32: the softmax of beta r over each prompt's n samples, times n.

    beta multiplies the reward in its own unit. It is an inverse temperature, though the authors' code calls it a temperature.
    At 0 all weights are 1, plain fine-tuning. At a large beta only a prompt's best sample counts. A prompt with one sample, or
    with equal rewards, has weights of 1.
    """
    return weights_per_prompt(prompts, rewards, lambda r: torch.softmax(beta * r, 0) * len(r))


def sparse_weights(prompts, rewards, percentile):
    """B prompts and B rewards -> weights (B,) fp32: equal for each prompt's rewards >= C, else 0; their average is 1.

    C is the prompt's own percentile, in [0, 1), interpolated linearly between neighbours. So the best sample is always kept,
    alone if a prompt has fewer than ten and the percentile is 0.9. Ties stay together: a prompt with one sample, or with equal
    rewards, keeps all. At 0 all weights are 1, plain fine-tuning.
    """
    def weights(r):
        kept = (r >= r.quantile(percentile)).double()
        return kept / kept.mean()

    return weights_per_prompt(prompts, rewards, weights)


def weights_per_prompt(prompts, rewards, weights_of):
    """B prompts and B rewards -> weights (B,) fp32; weights_of(rewards (n,) of one prompt) gives those of a prompt."""
    rewards = torch.as_tensor(rewards).cpu().double()
    assert rewards.shape == (len(prompts),), f"{tuple(rewards.shape)} rewards for {len(prompts)} prompts"
    weights = torch.empty_like(rewards)
    rows = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    for group in rows.values():
        weights[group] = weights_of(rewards[group])
    return weights.float()


# ---- The loss ----

def weighted_denoising_loss(prediction, target, weights):
    """Two (N, C, H, W) and weights (N,) -> scalar loss, info. With weights of 1 and no guidance it is the loss of pretraining.

    denoising_error  the mean error before weighting. Healthy: about constant.
    """
    errors = ((prediction - target) ** 2).mean((1, 2, 3))                    # (N,)
    return (weights * errors).mean(), {"denoising_error": errors.detach().mean()}  # section 4.2


# ---- One epoch of learning ----

def rwr_update(policy, trajectory, weights, optimizer, scaler, rng, config):
    """One epoch of learning (a round): config.updates_per_epoch optimizer steps on the final latents x_0. Returns info.

    weights: (B,). rng: a CPU generator, which draws order, timesteps and noise. An update takes config.batch_size images, from
    reshuffled passes over those with a weight above 0. Each is noised to one timestep, drawn uniformly from the model's training
    timesteps. The loss is their mean. Also read: config.micro_batch, which cannot change the result but in rounding,
    guided_training, max_grad_norm. The info holds means over all updates, except skipped_updates, a count.
    Raises FloatingPointError, before the optimizer steps, if a gradient is not finite. (Under fp16 the scaler skips the step.)
    """
    x_0 = trajectory.x_0                                                     # (B, C, H, W)
    assert weights.shape == (len(x_0),), f"{tuple(weights.shape)} weights for {len(x_0)} images"
    kept = weights.nonzero().flatten()
    # Images of weight 0 are never drawn, so the weights of the others must average 1.
    weights = (weights / weights[kept].mean()).to(policy.device)
    if not config.guided_training:
        policy = replace(policy, guidance_scale=1.0)
    timesteps = policy.pipeline.scheduler.config.num_train_timesteps
    infos, steps = [], []
    with tqdm(desc="learning", total=config.updates_per_epoch * config.batch_size, leave=False, disable=None) as bar:
        for images in reshuffled_passes(kept, config.updates_per_epoch, config.batch_size, rng):
            noise = torch.randn((len(images), *x_0.shape[1:]), generator=rng)
            t = torch.randint(timesteps, (len(images),), generator=rng)
            infos.append(accumulate(torch.arange(len(images)), config.micro_batch, lambda part: regression(
                policy, trajectory, weights, images[part], noise[part], t[part]), scaler, bar))
            steps.append(optimizer_step(policy.unet, optimizer, scaler, config.max_grad_norm))
    return summary(infos, steps)


def reshuffled_passes(rows, batches, batch_size, rng):
    """`batches` batches of `batch_size` rows: (batches, batch_size). How often two rows come differs by at most one."""
    passes = math.ceil(batches * batch_size / len(rows))
    order = torch.cat([rows[torch.randperm(len(rows), generator=rng)] for _ in range(passes)])
    return order[:batches * batch_size].view(batches, batch_size)


def regression(policy, trajectory, weights, images, noise, t):
    """The weighted loss of N images. Returns loss, info.

    weights (B,) of all images; images (N,) their indices; noise (N, C, H, W), which noises them to timesteps t (N,).
    """
    prediction, target = predict_and_target(policy, trajectory, images, noise, t)
    return weighted_denoising_loss(prediction, target, weights[images])


def predict_and_target(policy, trajectory, images, noise, t):
    """The U-Net's prediction for the noised x_0 of those images at timesteps t, and what it should have been: (N, C, H, W) each."""
    scheduler, prediction_type = policy.pipeline.scheduler, policy.schedule.prediction_type
    x_0, noise, t = trajectory.x_0[images], noise.to(policy.device), t.to(policy.device)
    x_t = scheduler.add_noise(x_0, noise, t)
    prompt_states = encode_prompts(policy.pipeline, [trajectory.prompts[image] for image in images.tolist()])
    # Guided, as the paper trains it. After unguided rounds the guided samples drift (appendix E.1).
    prediction = predict(policy, x_t, t, prompt_states)
    target = {"epsilon": noise, "sample": x_0}.get(prediction_type)
    return prediction, scheduler.get_velocity(x_0, noise, t) if target is None else target
