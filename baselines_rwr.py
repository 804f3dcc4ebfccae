"""Reward-weighted regression (paper, section 4.2): what DDPO is compared with, in the same call shape.

    minimise     L = E[ w(x_0, c) ||eps - eps_theta(x_t, c, t)||^2 ],   x_0 ~ p_old, t uniform, x_t = x_0 noised by eps to t
    RWR          w(x_0, c) = exp(beta r(x_0, c)) / Z
    sparse RWR   w(x_0, c) = 1[r(x_0, c) >= C] / Z

The policy is fine-tuned on its own pictures by the denoising loss, each weighted by its reward. Only (x_0, c) is needed, not
the chain: denoising is one step here, and the weighted loss stands for the likelihood it bounds. One epoch is a round; one
round is the single-round algorithm of earlier work (Lee et al. 2023), more interleave sampling and training.

Where we depart from these lines, as the authors' code does:
 1. Z is such that the weights of a prompt's samples average 1: beta and the percentile do not change the size of the loss,
    only who has a say in it.
 2. eps_theta is the guided prediction, as in the paper's appendix E.1; config.guided_training False takes the plain one.
 3. The norm is a mean over the latent dimensions, a constant factor.
"""
import math
from dataclasses import replace

import torch
from tqdm import tqdm

from ddpo import accumulate, optimizer_step, summary
from sampling import encode_prompts, predict


def rwr_weights(prompts, rewards, beta):
    """B prompts and B rewards -> weights (B,) fp32: the softmax of beta r over each prompt's n samples, times n.

    beta multiplies the reward, in its own unit (an inverse temperature, whatever the authors' code calls it). At 0 all
    weights are 1, plain fine-tuning; at a large beta a prompt's best sample has them all. A prompt with one sample, or with
    equal rewards, has nothing to compare: its weights are 1.
    """
    return per_prompt(prompts, rewards, lambda r: torch.softmax(beta * r, 0) * len(r))


def sparse_weights(prompts, rewards, percentile):
    """B prompts and B rewards -> weights (B,) fp32: equal among each prompt's rewards >= C, else 0; of average 1.

    C is the prompt's own percentile (in [0, 1), between neighbours by linear interpolation). So the best sample is always
    kept, alone if a prompt has fewer than ten and the percentile is 0.9, and ties stay together: a prompt with one
    sample, or with equal rewards, keeps all. At 0 all weights are 1, plain fine-tuning.
    """
    def weights(r):
        kept = (r >= r.quantile(percentile)).double()
        return kept / kept.mean()

    return per_prompt(prompts, rewards, weights)


def per_prompt(prompts, rewards, weigh):
    """B prompts and B rewards -> weights (B,) fp32, which weigh(rewards (n,) of one prompt) gives for each prompt."""
    rewards = torch.as_tensor(rewards).cpu().double()
    assert rewards.shape == (len(prompts),), f"{tuple(rewards.shape)} rewards for {len(prompts)} prompts"
    weights = torch.empty_like(rewards)
    rows = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    for group in rows.values():
        weights[group] = weigh(rewards[group])
    return weights.float()


def weighted_denoising_loss(prediction, target, weights):
    """Two (N, C, H, W) and weights (N,) -> scalar loss, info. With weights of 1, unguided, it is the loss of pretraining."""
    errors = ((prediction - target) ** 2).mean((1, 2, 3))                    # (N,)
    return (weights * errors).mean(), {"denoising_error": errors.detach().mean()}  # section 4.2


def rwr_update(policy, trajectory, weights, optimizer, scaler, rng, config):
    """One round of learning: config.updates_per_epoch optimizer steps on the final latents x_0. Returns info.

    weights (B,); rng a CPU generator, which draws order, timesteps and noise. An update sees config.batch_size images,
    from reshuffled passes over those of a weight above 0, each at one timestep of all that the model was trained on, and
    its loss is their mean. Also read from config: micro_batch, which cannot change the result but in rounding,
    guided_training, max_grad_norm. In the info stand means over all updates, except skipped_updates, a count.
    Raises FloatingPointError, before the optimizer steps on it, if a gradient is not finite (under fp16 the scaler skips).
    """
    x_0 = trajectory.latents[:, -1]                                          # (B, C, H, W)
    assert weights.shape == (len(x_0),), f"{tuple(weights.shape)} weights for {len(x_0)} images"
    kept = weights.nonzero().flatten()
    # Drawn from the kept alone, images of weight 0 are not missed if the others' weights average 1.
    weights = (weights / weights[kept].mean()).to(policy.device)
    if not config.guided_training:
        policy = replace(policy, guidance_scale=1.0)
    scheduler = policy.pipeline.scheduler
    infos, steps = [], []
    with tqdm(desc="learning", total=config.updates_per_epoch * config.batch_size, leave=False, disable=None) as bar:
        for images in reshuffled_passes(kept, config.updates_per_epoch, config.batch_size, rng):
            noise = torch.randn((len(images), *x_0.shape[1:]), generator=rng)
            t = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=rng)
            parts = torch.arange(len(images)).split(config.micro_batch)
            infos.append(accumulate(parts, lambda part: regression(
                policy, trajectory, weights, images[part], noise[part], t[part]), scaler, bar))
            steps.append(optimizer_step(policy.unet, optimizer, scaler, config.max_grad_norm))
    return summary(infos, steps)


def regression(policy, trajectory, weights, rows, noise, t):
    """The weighted loss of those N rows, noised by `noise` (N, C, H, W) to timesteps t (N,). Returns loss, info."""
    prediction, target = predict_and_target(policy, trajectory, rows, noise, t)
    return weighted_denoising_loss(prediction, target, weights[rows])


def reshuffled_passes(rows, batches, batch_size, rng):
    """`batches` batches of `batch_size` of the rows, (batches, batch_size), each seen as often as any other, give or take 1."""
    passes = math.ceil(batches * batch_size / len(rows))
    order = torch.cat([rows[torch.randperm(len(rows), generator=rng)] for _ in range(passes)])
    return order[:batches * batch_size].view(batches, batch_size)


def predict_and_target(policy, trajectory, rows, noise, t):
    """The U-Net's prediction for the noised x_0 of those rows at timesteps t, and what it should have been."""
    scheduler, kind = policy.pipeline.scheduler, policy.schedule.prediction_type
    x_0, noise, t = trajectory.latents[rows, -1], noise.to(policy.device), t.to(policy.device)
    x_t = scheduler.add_noise(x_0, noise, t)
    prompt_states = encode_prompts(policy, [trajectory.prompts[row] for row in rows.tolist()])
    # The guided prediction, as the paper trains it: unguided rounds leave a policy whose guided samples drift (appendix E.1).
    prediction = predict(policy, x_t, t, prompt_states)
    target = {"epsilon": noise, "sample": x_0}.get(kind)
    return prediction, scheduler.get_velocity(x_0, noise, t) if target is None else target
