"""The DDPO estimators (paper, section 4.3): rewards and recorded chains into policy updates.

    DDPO-SF   grad J = E[ sum_t                  grad log p_theta(x_{t-1} | x_t, c) r(x_0, c) ]
    DDPO-IS   grad J = E[ sum_t  p_theta / p_old grad log p_theta(x_{t-1} | x_t, c) r(x_0, c) ],   PPO's clip as trust region

Where we depart from these two lines, 1 to 3 as the authors' code does:
 1. r becomes an advantage: whitened per prompt. A constant baseline leaves the gradient unbiased and shrinks its variance.
 2. log p is the mean over the D latent dimensions (sampling.log_prob says why): p_theta / p_old becomes its D-th root, and
    the clip range one per dimension. The sum over t becomes a mean, a constant factor, to which AdamW is blind.
 3. Advantages are clipped, so that one lucky image cannot own an update.
 4. On request, the last steps of the chain are not learned from (skip_last_steps), or the KL to the pretrained policy is
    penalised (kl_weight, from DPOK).
"""
from collections import deque

import numpy as np
import torch
from tqdm import tqdm

from sampling import score

BASELINES = ("prompt", "batch", "none")


def score_function_loss(log_probs, old_log_probs, advantages, clip_range):
    """DDPO-SF, REINFORCE: three (N,) tensors -> scalar loss, info. Its gradient is right at theta = theta_old only."""
    loss = -(advantages * log_probs).mean()                                  # section 4.3, DDPO_SF
    return loss, ratio_info(log_probs, old_log_probs, clip_range)


def clipped_loss(log_probs, old_log_probs, advantages, clip_range):
    """DDPO-IS, PPO's clipped surrogate: three (N,) tensors -> scalar loss, info."""
    ratio = (log_probs - old_log_probs).exp()                                # (N,)  p_theta / p_old, per dimension
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()   # section 4.3, DDPO_IS; PPO, equation 7
    return loss, ratio_info(log_probs, old_log_probs, clip_range)


@torch.no_grad()
def ratio_info(log_probs, old_log_probs, clip_range):
    """How far the policy has moved from the one that sampled: means over N pairs, per latent dimension; see the README."""
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    return {"approx_kl": -log_ratio.mean(), "ratio_mean": ratio.mean(),
            "clip_fraction_low": (ratio < 1 - clip_range).float().mean(),
            "clip_fraction_high": (ratio > 1 + clip_range).float().mean(),
            "ratio_deviation": (ratio - 1).abs().max()}


class PromptStatistics:
    """Rewards -> advantages, by running mean and standard deviation per prompt (paper, appendix D.3).

    Each prompt keeps its last `buffer` rewards. A prompt with fewer than `min_count` of them borrows the statistics of the
    whole batch: with more prompts than images an epoch, most do so for many epochs (logged as `own_statistics`).
    For ablations the baseline may also be "batch", the batch's statistics for all, or "none", the bare rewards.
    """

    def __init__(self, buffer, min_count, clip, baseline="prompt"):
        self.buffer, self.min_count, self.clip, self.baseline = buffer, min_count, clip, baseline
        self.rewards = {}  # prompt -> deque of its last rewards

    def advantages(self, prompts, rewards):
        """B prompts and B rewards -> advantages (B,) fp32, clipped if whitened; the share of images with their prompt's own.

        Appends first, then normalises, with the population's standard deviation. Equal rewards give exactly 0.
        """
        rewards = np.asarray(rewards, np.float64)
        if self.baseline == "none":
            return torch.tensor(rewards, dtype=torch.float32), 0.0  # the clip is in standard deviations
        for prompt, reward in zip(prompts, rewards):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(float(reward))
        own = [self.baseline == "prompt" and len(self.rewards[prompt]) >= self.min_count for prompt in prompts]
        groups = [np.array(self.rewards[prompt]) if o else rewards for prompt, o in zip(prompts, own)]
        advantages = [whiten(reward, group) for reward, group in zip(rewards, groups)]
        return torch.tensor(advantages, dtype=torch.float32).clamp(-self.clip, self.clip), float(np.mean(own))

    def state_dict(self):
        return {prompt: list(rewards) for prompt, rewards in self.rewards.items()}

    def load_state_dict(self, state):
        self.rewards = {prompt: deque(rewards, maxlen=self.buffer) for prompt, rewards in state.items()}


def whiten(reward, group):
    """How many standard deviations of its group a reward lies above the group's mean; 0 if the group's rewards are equal."""
    # A floor under the deviation, as usual, would blow rounding errors of near-equal rewards up to advantages.
    spread = group.std()
    return 0.0 if spread <= 1e-6 * np.abs(group).max() else (reward - group.mean()) / spread


def ddpo_update(policy, trajectory, advantages, optimizer, scaler, rng, config, loss):
    """One epoch of learning: config.updates_per_epoch optimizer steps on the recorded chains. Returns info.

    advantages (B,); rng a CPU generator, which deals the images to the updates; loss one of the two above. An update sees
    B / updates images at all their T steps, less config.skip_last_steps, and its loss is the mean over those pairs. Also
    read from config: micro_batch, clip_range, kl_weight, max_grad_norm. In the info stand means over all pairs, except
    ratio_deviation, a maximum over the first update's, and skipped_updates, a count.
    Raises FloatingPointError, before the optimizer steps on it, if a gradient is not finite (under fp16 the scaler skips).
    """
    B, T = trajectory.log_probs.shape
    assert advantages.shape == (B,), f"{tuple(advantages.shape)} advantages for {B} images"
    advantages = advantages.to(policy.device)
    learned = T - config.skip_last_steps
    infos, steps = [], []
    with tqdm(desc="learning", total=B * learned, leave=False, disable=None) as bar:
        for group in torch.randperm(B, generator=rng).view(config.updates_per_epoch, -1):
            pairs = torch.cartesian_prod(group, torch.arange(learned))       # (N, 2): every image at every step
            pairs = pairs[torch.randperm(len(pairs), generator=rng)]
            infos.append(accumulate(pairs.split(config.micro_batch), lambda part: surrogate(
                policy, trajectory, advantages, part, loss, config), scaler, bar))
            steps.append(optimizer_step(policy.unet, optimizer, scaler, config.max_grad_norm))
    # Before the first step the policy is the one that sampled, so this is 0 up to rounding, or something is wrong.
    return {**summary(infos, steps), "ratio_deviation": infos[0]["ratio_deviation"].item()}


def surrogate(policy, trajectory, advantages, pairs, loss, config):
    """The loss of N (image, step) pairs (N, 2) under the current weights, with DPOK's penalty. Returns loss, info."""
    images, steps = pairs.T
    log_probs, kl = score(policy, trajectory, images, steps)                 # where grad log p_theta comes from
    value, info = loss(log_probs, trajectory.log_probs[images, steps], advantages[images], config.clip_range)
    value = value + config.kl_weight * kl.mean()                             # DPOK (Fan et al. 2023), equation 9
    return value, {"kl_pretrained": kl.detach().mean(), **info}


def accumulate(parts, loss_of, scaler, bar):
    """Add the gradient of the mean loss over all rows of the parts to the weights' own. Returns info, on the device.

    loss_of(part) -> loss, info is the mean over a part. How the rows are cut into parts, which go through the U-Net one at
    a time, is a knob of memory and speed (config.micro_batch) and cannot change the result but in rounding.
    """
    total, rows = {}, sum(len(part) for part in parts)
    for part in parts:
        loss, info = loss_of(part)
        share = len(part) / rows
        scaler.scale(loss * share).backward()
        add_info(total, {"loss": loss.detach(), **info}, share)
        bar.update(len(part))
    return total


def add_info(total, info, share):
    """Weigh a part's figures into those of its update: a mean, or a maximum for ratio_deviation."""
    for name, value in info.items():
        if name == "ratio_deviation":
            total[name] = torch.maximum(value, total.get(name, value))
        else:
            total[name] = total.get(name, 0) + share * value


def optimizer_step(unet, optimizer, scaler, max_grad_norm):
    """Unscale once, clip the gradient's norm, step. Returns the norm before clipping, and whether a step was taken."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), max_grad_norm).item()
    if not scaler.is_enabled() and not np.isfinite(norm):
        raise FloatingPointError("the gradient is not finite: try a smaller --learning-rate or --precision fp32")
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, scaler.get_scale() >= scale


def summary(infos, steps):
    """The updates' infos and optimizer steps as one epoch's figures: means, and the number of skipped steps."""
    finite = [norm for norm, _ in steps if np.isfinite(norm)]  # a skipped step's is not
    return {**{name: float(np.mean([info[name].item() for info in infos])) for name in infos[0]},
            "grad_norm": float(np.mean(finite)) if finite else None,
            "skipped_updates": sum(not stepped for _, stepped in steps)}
