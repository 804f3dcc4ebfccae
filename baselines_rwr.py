"""Reward-weighted regression (paper, section 4.2): what DDPO is compared with, in the same call shape.

    minimise     L = E[ w(x_0, c) ||eps - eps_theta(x_t, c, t)||^2 ],   x_0 ~ p_old, t uniform
    RWR          w(x_0, c) = exp(beta r(x_0, c)) / Z
    sparse RWR   w(x_0, c) = 1[r(x_0, c) >= C]

The policy is fine-tuned on its own images by the denoising loss. Each image is weighted by its reward. Only
(x_0, c) is needed, not the chain. With the ELBO's weights over t the loss would bound -log p(x_0 | c) from
above. With equal ones, as here and in pretraining, a smaller loss need not make the image more likely. The
paper calls an epoch of RWR a round. With one round it is the algorithm of earlier work (Lee et al. 2023).

Where we depart from these lines:
 1. Weights are per prompt, as the paper says (D.3). The authors' RWR on JPEG size takes one softmax over all
    samples, that on aesthetic quality does not.
 2. The weights of a prompt's samples average 1, in both forms: beta and the percentile decide which samples
    count, not how large the loss is. So do the authors' softmax weights. Their sparse weights are 1 for each
    sample kept; with ours a prompt counts as often as it was drawn, however many of its samples are kept.
 3. eps_theta is the guided prediction, as in the paper's appendix E.1 (config.training_guidance 1: plain).
 4. The norm is a mean over the latent dimensions, a constant factor.
 5. x_0 is the chain's own. The authors decode it, save the image, and encode that again.
"""
import math

import torch

from ddpo import summary
from sampling import target_of

LEVELS = 8  # noise levels of an update, where the network takes one timestep a call: each costs a call


# ---- Rewards into weights ----

def rwr_weights(prompts, rewards, beta):
    """B prompts and B rewards -> weights (B,): the softmax of beta r over each prompt's n samples, times n.

    beta multiplies the reward in its own unit: an inverse temperature. At 0 all weights are 1, plain
    fine-tuning. At a large beta only a prompt's best sample counts.
    """
    return per_prompt(prompts, rewards, lambda r: torch.softmax(beta * r, 0) * len(r)).float()


def sparse_weights(prompts, rewards, percentile):
    """B prompts and B rewards -> weights (B,): equal for each prompt's rewards >= C, else 0; average 1.

    C is the prompt's own percentile, in [0, 1), interpolated linearly between neighbours. So the best sample
    is always kept, alone if a prompt has at most ten and the percentile is 0.9. Equal rewards stay together.
    """
    def weights(r):
        kept = (r >= r.quantile(percentile)).double()
        return kept / kept.mean()

    return per_prompt(prompts, rewards, weights).float()


def per_prompt(prompts, rewards, values_of):
    """B prompts, B rewards -> values (B,) fp64. values_of: rewards (n,) of one prompt -> their values."""
    rewards = torch.as_tensor(rewards).cpu().double()
    assert rewards.shape == (len(prompts),), f"{tuple(rewards.shape)} rewards for {len(prompts)} prompts"
    values = torch.empty_like(rewards)
    rows = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    for group in rows.values():
        values[group] = values_of(rewards[group])
    return values


# ---- The loss ----

def weighted_denoising_loss(prediction, target, weights):
    """Two (N, D...) and weights (N,) -> loss, info. With weights of 1, unguided: that of pretraining.

    denoising_error  the mean error before weighting. Healthy: about constant.
    """
    errors = ((prediction - target) ** 2).flatten(1).mean(1)                 # (N,)
    return (weights * errors).mean(), {"denoising_error": errors.detach().mean()}  # section 4.2


# ---- One epoch of learning ----

def rwr_update(policy, trajectory, weights, learner, rng, config):
    """One epoch of learning (a round): config.updates_per_epoch optimizer steps on x_0. Returns info.

    weights: (B,). learner: a ddpo.Learner of the policy. rng: a CPU generator, which draws order, timesteps
    and noise. An update takes config.batch_size images, from reshuffled passes over those with a weight above
    0. Each is noised to one timestep, drawn uniformly from the model's training timesteps, with the shift
    that the chain has. (A network that takes one timestep a call, as Z-Image's, gets LEVELS of them an
    update.) The loss is their mean. Also read: config.training_guidance. info: see ddpo.summary.
    """
    assert weights.shape == (len(trajectory.x_0),), f"{len(weights)} weights, {len(trajectory.x_0)} images"
    kept = weights.nonzero().flatten()
    # Images of weight 0 are never drawn, so the weights of the others must average 1.
    weights = (weights / weights[kept].mean()).to(policy.device)

    def loss_of(policy, images, noised, x_0, eps, a, b):
        target = target_of(x_0, eps, a, b, policy.schedule.prediction_type)
        return weighted_denoising_loss(policy.predict(*noised), target, weights[images])

    return fine_tune(policy, trajectory, kept, learner, rng, config, loss_of, policy.training_levels)


def fine_tune(policy, trajectory, rows, learner, rng, config, loss_of, levels_of):
    """The optimizer steps of an epoch on the images `rows` of a trajectory, as rwr_update says. Returns info.

    loss_of(policy, images (N,), (x_t (N, D...), t (N,), N texts), x_0, eps (N, D...), a, b (N, 1...)) ->
    loss, info. levels_of: timesteps, a, b (n,): an image is noised to one of these.
    """
    if config.training_guidance:
        policy = policy.with_guidance(config.training_guidance)
    timesteps, a_of, b_of = levels_of
    infos, size = [], config.batch_size
    levels = size if policy.copies_of_timesteps else min(size, LEVELS)
    for images in reshuffled_passes(rows, config.updates_per_epoch, size, rng):
        noise = torch.randn((size, *policy.latent_shape), generator=rng)
        level = torch.randint(len(timesteps), (levels,), generator=rng)[torch.arange(size) * levels // size]

        def denoising_loss(part):
            x_0, eps = trajectory.x_0[images[part]], noise[part].to(policy.device)
            chosen = level[part].to(policy.device)
            a, b = (values[chosen].view(-1, *[1] * (x_0.dim() - 1)) for values in (a_of, b_of))
            prompts = [trajectory.prompts[image] for image in images[part].tolist()]
            noised = a * x_0 + b * eps, timesteps[chosen], prompts
            return loss_of(policy, images[part], noised, x_0, eps, a, b)

        infos.append(learner.step(torch.arange(size), [denoising_loss]))
    return summary(infos)


def reshuffled_passes(rows, batches, batch_size, rng):
    """`batches` batches of rows: (batches, batch_size). How often two rows come differs by at most one."""
    passes = math.ceil(batches * batch_size / len(rows))
    order = torch.cat([rows[torch.randperm(len(rows), generator=rng)] for _ in range(passes)])
    return order[:batches * batch_size].view(batches, batch_size)
