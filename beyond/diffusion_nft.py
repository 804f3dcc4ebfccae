"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): a newer method than the paper, in the shape of RWR.

    v+ = b v_theta + (1 - b) v_old,   v- = (1 + b) v_old - b v_theta
    minimise   L = E[ r ||x_0(v+) - x_0||^2 / w+  +  (1 - r) ||x_0(v-) - x_0||^2 / w- ] / b,   x_0 ~ p_old

A good image, with r near 1, pulls v+ towards itself. A bad one, with r near 0, pulls v- and so pushes v_theta
away. v_old draws the images. It is an average of the weights that lags behind: a checkpoint has it.

Loss, weights w, preferences r and average are those of its code (NVlabs/DiffusionNFT, train_nft_sd3.py, with
decay_type 1). The norms are means. The loss is multiplied by SATURATION, which the clipped norm sees.

Where we depart from that code:
 1. It draws and trains without guidance. Ours has the policy's guidance, in the loss --training-guidance;
    --guidance-scale 1 is its.
 2. It draws by a deterministic solver of second order, and evaluates by 40 steps of Euler. Ours has the chain
    of the other algorithms.
 3. An epoch of its makes one or two updates. An image is in one of them, at all timesteps of the
    sampler but one. Ours makes config.updates_per_epoch of config.batch_size images, in reshuffled passes,
    each image at one of these timesteps. So v_old, which waits for the epoch's end, is further behind.
 4. It adds 1e-4 ||v_theta - v_pretrained||^2. We do not.
 5. It evaluates and saves an average of v_theta over the updates (decay up to 0.9). We take v_theta itself.
 6. Its v is a flow's. Ours is any prediction, since x_0 depends linearly on it. x_0 moves with a flow's v by
    the noise level s <= 1, with an epsilon by b / a: there the noisiest steps teach most.
 7. It trains LoRA alone, and each of its tasks has its own b, decay_type and steps. Ours trains any weights.
"""
import torch

from baselines_rwr import fine_tune, per_prompt
from sampling import x_0_and_eps

SATURATION = 5  # deviations from the prompt's mean at which an image is entirely good, or bad


def nft_preferences(prompts, rewards):
    """B prompts, B rewards -> r (B,) fp32 in [0, 1]: 1/2 at the mean of its prompt's images in the epoch.

    0 and 1 are SATURATION deviations of the whole epoch's rewards away, as in Flow-GRPO. 1e-4 is added to the
    deviation, in the reward's unit.
    """
    rewards = torch.as_tensor(rewards).double()
    baseline = per_prompt(prompts, rewards, lambda own: own.mean().expand(len(own)))
    advantages = (rewards - baseline) / (rewards.std(correction=0) + 1e-4)
    return (0.5 + (advantages / SATURATION).clamp(-1, 1) / 2).float()


def nft_loss(prediction, old_prediction, x_0, preferences, strength):
    """x_0 (N, D...) as v_theta and v_old predict it, x_0, r (N,) -> scalar loss, info. strength: b.

    At v_theta = v_old the gradient is proportional to 2 r - 1: an average image changes nothing. RWR, which
    has positive weights alone, re-trains the policy on it.
    """
    change = strength * (prediction - old_prediction)
    positive, negative = (adaptive_error(old_prediction + sign * change - x_0) for sign in (1, -1))
    loss = (preferences * positive + (1 - preferences) * negative).mean() / strength
    return SATURATION * loss, {"denoising_error": ((prediction.detach() - x_0) ** 2).mean()}


def adaptive_error(error):
    """Error (N, D...) -> its mean square by its mean absolute value, which carries no gradient: (N,).

    The error of x_0 is largest where x_t is noisiest. Divided so, these timesteps teach less alone.
    """
    weight = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return (error**2).flatten(1).mean(1) / weight


def nft_update(policy, trajectory, preferences, learner, rng, config):
    """One epoch of DiffusionNFT, as rwr_update. preferences: r (B,). Also read: config.nft_strength.

    At its end v_old, learner.old, moves towards the weights: by 1 - 0.001 learner.updates, at least by half.
    """
    old = learner.old = learner.old or policy.weights()
    preferences = preferences.to(policy.device)

    def loss_of(policy, images, noised, x_0, _, a, b):
        def predicted():
            prediction = policy.predict(*noised)
            return x_0_and_eps(noised[0], prediction, a, b, policy.schedule.prediction_type)[0]

        with torch.no_grad(), policy.with_weights(old):
            old_prediction = predicted()
        return nft_loss(predicted(), old_prediction, x_0, preferences[images], config.nft_strength)

    levels = policy.schedule.timesteps, policy.schedule.a[:-1], policy.schedule.b[:-1]
    rows = torch.arange(len(preferences))
    info = fine_tune(policy, trajectory, rows, learner, rng, config, loss_of, levels)
    decay = min(0.001 * learner.updates, 0.5)
    for name, weight in policy.trained.items():
        old[name].lerp_(weight.detach(), 1 - decay)
    return info
