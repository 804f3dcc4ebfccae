"""The DDPO estimators (paper, section 4.3): rewards and recorded chains into policy updates.

    DDPO-SF   grad J = E[ sum_t                  grad log p_theta(x_{t-1} | x_t, c) r(x_0, c) ]
    DDPO-IS   grad J = E[ sum_t  p_theta / p_old grad log p_theta(x_{t-1} | x_t, c) r(x_0, c) ],  clipped

Where we depart from these two lines. The authors' code does 1 to 3, too.
 1. r becomes an advantage: it is whitened per prompt (D.3). A baseline makes the variance smaller; a
    constant one would not bias the gradient.
 2. log p is the mean over the D latent dimensions, so p_theta / p_old is its D-th root (sampling.log_prob).
    The sum over t becomes a mean: a constant factor, which AdamW does not see, but the clipped norm does.
 3. Advantages are clipped, so that one lucky image cannot rule the update.
 4. Equal rewards give an advantage of 0 (see whiten). The authors divide by the deviation + 1e-6.
 5. The last steps of the chain can be left out (skip_last_steps; the emoji preset leaves out two). The
    gradient of a step's log p with respect to epsilon is noise of size c / sigma, where c = d mean / d
    epsilon. The last step but one has a large c at a tiny sigma: it makes 86 % of this gradient's variance at
    T = 10, 49 % at T = 50, and of the toy model's weights 92 and 74 % (`pytest test_ddpo.py -k
    last_but_one`). Leaving them out is biased, and pays: studies/results/README.md, "More reward per
    second".
 6. The KL to the pretrained policy can be penalised (kl_weight, from DPOK; see surrogate).
 7. A prompt's statistics hold all its rewards of the epoch, however small the buffer is. With a buffer of 1
    and several images of a prompt in an epoch (images_per_prompt) they are the group's mean and deviation, as
    in GRPO. (Flow-GRPO and DiffusionNFT divide by the deviation of the whole epoch.)
 8. The ratio is not centred. log p_theta / p_old has the mean -(mu - mu_old)^2 / (2 sigma^2): as the policy
    moves, the ratio falls, and at a negative advantage the clip's low side bounds the KL. GRPO-Guard (arXiv
    2510.22319) adds the mean back in. It was tried with one seed, without a gain (commit a7984f9).
 9. An update may learn from some of the steps, drawn at random (learn_steps). It does not bias the gradient.
"""
import copy
from collections import Counter
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from sampling import score
from support import processes

# ---- The two losses ----

def score_function_loss(log_probs, old_log_probs, advantages, clip_range):
    """DDPO-SF, REINFORCE: three (N,) tensors -> scalar loss, info. Right only where theta = theta_old.

    clip_range is read by the info alone.
    """
    loss = -(advantages * log_probs).mean()                                  # section 4.3, DDPO_SF
    return loss, ratio_info(log_probs, old_log_probs, clip_range)


def clipped_loss(log_probs, old_log_probs, advantages, clip_range):
    """DDPO-IS, PPO's clipped surrogate: three (N,) -> scalar loss, info. Why it is not centred: 8 above."""
    ratio = (log_probs - old_log_probs).exp()                                # p_theta / p_old, per dimension
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()   # section 4.3; PPO, equation 7
    return loss, ratio_info(log_probs, old_log_probs, clip_range)


@torch.no_grad()
def ratio_info(log_probs, old_log_probs, clip_range):
    """How far the policy has moved from the one that sampled: figures over N images at a step, per dimension.

    approx_kl           mean of log p_old - log p_theta. Healthy: small, positive, falling over the epochs. If
                        it grows, lower the learning rate.
    ratio_mean          mean of p_theta / p_old. Healthy: a little below 1.
    clip_fraction_low   share of images with a ratio below 1 - clip_range.
    clip_fraction_high  share of images with a ratio above 1 + clip_range.
    ratio_deviation     largest |ratio - 1|. The log has that of an epoch's first update: rounding alone, 2e-6
                        at most for the toy model in fp32 on a CPU (`pytest test_ddpo.py -k ratio_is_one`).
                        If it is far larger, learning scores another policy than the one that sampled.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    return {"approx_kl": -log_ratio.mean(), "ratio_mean": ratio.mean(),
            "clip_fraction_low": (ratio < 1 - clip_range).float().mean(),
            "clip_fraction_high": (ratio > 1 + clip_range).float().mean(),
            "ratio_deviation": (ratio - 1).abs().max()}


# ---- Rewards into advantages ----

class PromptStatistics:
    """Rewards -> advantages, by running mean and deviation per prompt (D.3, and the authors' code).

    Each prompt keeps its last `buffer` rewards, but never fewer than it got in this epoch. (The authors keep
    32, their PyTorch port 16 for the JPEG tasks.) A prompt with fewer than `min_count` rewards takes the
    whole batch's statistics. For ablations the baseline may be "batch", the batch's for all, or "none", the
    bare rewards.
    """

    def __init__(self, buffer, min_count, clip, baseline="prompt"):
        self.buffer, self.min_count, self.clip, self.baseline = buffer, min_count, clip, baseline
        self.rewards = {}  # prompt -> its last rewards, the newest last

    def advantages(self, prompts, rewards):
        """B prompts, B rewards -> advantages (B,) fp32, and the share of images with statistics of their own.

        The rewards are appended first, then whitened with the population's standard deviation, then clipped.
        """
        rewards = np.asarray(rewards, np.float64)
        if self.baseline == "none":
            return torch.tensor(rewards, dtype=torch.float32), 0.0  # the clip is in standard deviations
        for prompt, reward in zip(prompts, rewards):
            self.rewards.setdefault(prompt, []).append(float(reward))
        for prompt, count in Counter(prompts).items():
            del self.rewards[prompt][:-max(count, self.buffer)]
        enough = self.min_count if self.baseline == "prompt" else np.inf
        has_own = [len(self.rewards[prompt]) >= enough for prompt in prompts]
        groups = [np.array(self.rewards[prompt]) if own else rewards for prompt, own in zip(prompts, has_own)]
        advantages = torch.tensor([whiten(reward, group) for reward, group in zip(rewards, groups)]).float()
        return advantages.clamp(-self.clip, self.clip), float(np.mean(has_own))


def whiten(reward, group):
    """How many standard deviations of its group (n,) float64 a reward lies above the group's mean.

    0 if the rewards are equal up to rounding: float32's, if all are numbers of float32, else float64's. The
    usual floor of 1e-6 under the deviation would turn rounding into advantages, and would shrink those of
    rewards that truly differ by little.
    """
    rounding = 2e-7 if (group == group.astype(np.float32)).all() else 1e-14
    deviation = group.std()
    return 0.0 if deviation <= rounding * np.abs(group).max() else (reward - group.mean()) / deviation


# ---- One epoch of learning ----

def ddpo_update(policy, trajectory, advantages, learner, rng, config, loss):
    """One epoch of learning: config.updates_per_epoch optimizer steps on the recorded chains. Returns info.

    advantages: (B,). learner: a Learner of the policy. rng: a CPU generator, which deals the images to the
    updates. loss: one of the two above. An update takes B / updates images. It learns from each at all steps
    but the last config.skip_last_steps, or at config.learn_steps of these, at random, the same for all. Its
    loss is the mean over these images and steps. info: see summary; ratio_deviation: of the first update.
    """
    B, actions = trajectory.log_probs.shape
    assert advantages.shape == (B,), f"{tuple(advantages.shape)} advantages for {B} images"
    advantages, infos = advantages.to(policy.device), []
    learned = min(actions, len(policy.schedule.timesteps) - config.skip_last_steps)
    for images in torch.randperm(B, generator=rng).view(config.updates_per_epoch, -1):
        steps = torch.randperm(learned, generator=rng)[:config.learn_steps or learned].tolist()
        losses = [partial(surrogate, policy, trajectory, advantages, k, loss, config) for k in steps]
        infos.append(learner.step(images, losses))
    return {**summary(infos), "ratio_deviation": infos[0]["ratio_deviation"]}


def surrogate(policy, trajectory, advantages, k, loss, config, images):
    """The loss of N images (N,) at step k under the current weights. Returns loss, info.

    With config.kl_weight the KL to the pretrained policy is added, in closed form, as the mean over images
    and dimensions (DPOK, equation 9). DPOK's own code adds the squared difference of the guided predictions
    instead. At T = 50 the KL is 0.09 of that at the median step, and 5.4 times that at the last step but one
    (`pytest test_ddpo.py -k dpok`). So a weight from DPOK's code means something else here.
    """
    log_probs, kl = score(policy, trajectory, images, k)                   # where grad log p_theta comes from
    value, info = loss(log_probs, trajectory.log_probs[images, k], advantages[images], config.clip_range)
    value = value + config.kl_weight * kl.mean()
    return value, {**({"kl_pretrained": kl.detach().mean()} if policy.reference else {}), **info}


def summary(infos):
    """The infos of an epoch's updates -> the epoch's figures: means, and a count of skipped steps.

    loss             minus the surrogate (RWR: the weighted denoising loss). DDPO's stays around 0.
    kl_pretrained    with --kl-weight: KL to the pretrained policy, per step, dimension. Healthy: levels off.
    grad_norm        norm of the gradient before clipping. Healthy: of one order of magnitude throughout.
    skipped_updates  steps that the fp16 scaler skipped. Healthy: a few in the first epochs, then 0.
    """
    norms = [info["grad_norm"] for info in infos if np.isfinite(info["grad_norm"])]  # a skipped step's is not
    return {**{name: float(np.mean([info[name] for info in infos])) for name in infos[0]},
            "grad_norm": float(np.mean(norms)) if norms else None,
            "skipped_updates": sum(info["skipped_updates"] for info in infos)}


class Learner:
    """Optimizer steps on the weights that train: AdamW, micro-batches, fp16's scaler. It knows no epoch.

    config.micro_batch: the most rows at a time (support/processes.py). updates: how many so far. old: name ->
    weight, of those that draw the next images, if they are others: DiffusionNFT's.
    """

    def __init__(self, policy, config):
        self.weights = list(policy.trained.values())
        # On a GPU torch's default would need one more copy of the weights: 3.4 GB of Stable Diffusion.
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon, weight_decay=config.weight_decay, foreach=False)
        # By default the scale grows only after 2,000 good steps. The paper's DDPO-IS run has 784.
        half = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(policy.device.type, growth_interval=100, enabled=half)
        self.config, self.denoiser, self.updates, self.old = config, policy.denoiser, 0, {}

    def step(self, rows, losses):
        """One optimizer step. Returns info, with grad_norm and skipped_updates.

        rows: (n,) indices. losses: functions of some of the rows -> their mean loss, info. What is minimised
        is the mean over all rows and losses. FloatingPointError, before the step, if the gradient is not
        finite. (Under fp16 the scaler skips the step.)
        """
        at_one = partial(processes.use_checkpointing, self.config, self.denoiser)
        for attempt in processes.attempts(self.config, "micro_batch", at_one):
            with attempt:
                info = self.accumulate(rows, losses)
        whole = {}
        for one in processes.gathered([{name: value.item() for name, value in info.items()}]):
            add_info(whole, one, 1)
        return {**whole, **self.clipped_step()}

    def accumulate(self, rows, losses):
        """The gradient of this process's share of the rows, from zero on. Returns its share of the info."""
        self.optimizer.zero_grad(set_to_none=True)
        info, parts = {}, rows[processes.share(len(rows))].split(self.config.micro_batch)
        with tqdm(desc="learning", total=len(parts) * len(losses), leave=False, disable=None) as bar:
            for part in parts:
                for loss_of in losses:
                    loss, figures = loss_of(part)
                    share = len(part) / len(rows) / len(losses)
                    self.scaler.scale(loss * share).backward()
                    add_info(info, {"loss": loss.detach(), **figures}, share)
                    bar.update()
        return info

    def clipped_step(self):
        """Add up the processes' gradients, unscale once, clip the norm, step."""
        processes.add_up([weight.grad for weight in self.weights if weight.grad is not None])
        self.scaler.unscale_(self.optimizer)  # after the sum: if one process has an inf, all skip the step
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm).item()
        scale = self.scaler.get_scale()
        if not np.isfinite(norm) and (not self.scaler.is_enabled() or scale < 1):  # it began at 65,536
            raise FloatingPointError("the gradient is not finite: a smaller --learning-rate may help")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # its memory is the next images'
        self.updates += 1
        return {"grad_norm": norm, "skipped_updates": int(self.scaler.get_scale() < scale)}

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "updates": self.updates, "old": self.old}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # its memory is the file's
        self.scaler.load_state_dict(state["scaler"])
        self.updates, device = state["updates"], self.weights[0].device
        self.old = {name: weight.to(device, copy=True) for name, weight in state["old"].items()}


def add_info(total, info, share):
    """Add a part's figures to those of its update: weighted means, except ratio_deviation, a maximum."""
    for name, value in info.items():
        if name == "ratio_deviation":
            total[name] = max(value, total.get(name, value))
        else:
            total[name] = total.get(name, 0) + share * value
