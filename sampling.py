"""The denoising chain as a Markov decision process (paper, section 4.1): load a policy, roll it out, score its actions.

    MDP                    diffusion
    state s_t              (prompt c, timestep t, latent x_t)
    action a_t             x_{t-1}, the next, less noisy latent: `x_prev`, as diffusion calls it, which RL calls next
    policy pi(a_t | s_t)   p_theta(x_{t-1} | x_t, c) = Normal(mu_theta(x_t, c, t), sigma_t^2 I): DDIM with eta > 0

Time runs as in diffusion: x_T is noise and x_0 the picture, so x_{t-1} comes after x_t. The policy is written once, in
`p_mean_sigma`, guidance included: `rollout` draws from it and `score` scores with it, under the same autocast, the U-Net
always in eval(). Else the ratio of the first update would not be 1, and the estimators of ddpo.py would be of another
policy than the one that drew the pictures.

B images, T denoising steps, N (image, step) pairs, latents of (C, H, W).
"""
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import hub

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Schedule:
    """The T timesteps of a DDIM chain, in the order they are visited, and what the step at each of them needs."""
    timesteps: torch.Tensor       # (T,) int64, decreasing
    alpha_bar: torch.Tensor       # (T,) fp32, of x_t
    alpha_bar_prev: torch.Tensor  # (T,) fp32, of x_{t-1}
    sigma: torch.Tensor           # (T,) fp32, > 0
    prediction_type: str          # what the U-Net predicts: "epsilon", "v_prediction" or "sample"


@dataclass(frozen=True)
class Trajectory:
    """B recorded chains. Kept in fp32: a latent rounded to half precision is not the action that was scored."""
    latents: torch.Tensor    # (B, T + 1, C, H, W) fp32: x_T first, x_0 last; (B, 1, C, H, W), x_0 alone, without chain
    log_probs: torch.Tensor  # (B, T) fp32 of the policy that drew them; (B, 0) without chain
    timesteps: torch.Tensor  # (T,) int64
    prompts: tuple           # B texts

    def __post_init__(self):
        B, states = self.latents.shape[:2]
        assert len(self.prompts) == B, f"{len(self.prompts)} prompts for {B} chains"
        assert self.log_probs.shape == (B, states - 1), f"log_probs {tuple(self.log_probs.shape)}, {states} states"
        assert states in (1, len(self.timesteps) + 1), f"{states} states, {len(self.timesteps)} timesteps"
        assert self.latents.dtype == self.log_probs.dtype == torch.float32, "a trajectory is kept in fp32"


    @classmethod
    def join(cls, parts):
        """Chains of several rollouts over one schedule, as one trajectory."""
        if len(parts) == 1:
            return parts[0]
        latents, log_probs = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "log_probs"))
        return cls(latents, log_probs, parts[0].timesteps, sum((part.prompts for part in parts), ()))


@dataclass(frozen=True)
class Policy:
    """A text-to-image pipeline as a policy. Only the U-Net's weights train; VAE and text encoder are frozen."""
    pipeline: object       # diffusers' StableDiffusionPipeline: unet, vae, text_encoder, tokenizer
    schedule: Schedule
    guidance_scale: float  # w = 1 is the conditional prediction alone
    precision: str         # of the U-Net's autocast; the weights, the latents and the step's arithmetic stay fp32
    reference: object = None  # the pretrained policy, a frozen copy, where a penalty on the KL to it is asked for

    @property
    def unet(self):
        return self.pipeline.unet

    @property
    def device(self):
        return self.unet.device


def ddim_schedule(scheduler, steps, eta, device="cpu", scored=True):
    """The chain of `steps` steps over the schedule of a diffusers DDIMScheduler.

    x_{t-1} belongs to the next entry of `scheduler.timesteps`, and to `final_alpha_cumprod` after the last one. (diffusers'
    own step takes t - 1000 // steps instead, which under "trailing" and "linspace" spacing is often another timestep.)
    Raises ValueError where some step would not be a Gaussian with a density: see each message. Not scored, for drawing
    alone, eta may be 0.
    """
    config = scheduler.config
    if not (0 < eta <= 1 or not scored and eta == 0):
        raise ValueError(f"eta is {eta:g}, but must be in {'(' if scored else '['}0, 1]: at 0 the sampler is deterministic, so "
                         "its actions have no log-probability, and above 1 a variance would be negative")
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"{steps} sampling steps: must be from 1 to {config.num_train_timesteps}")
    if config.clip_sample or config.thresholding:
        raise ValueError("the scheduler clips its prediction of x_0 (clip_sample or thresholding): the mean of the policy "
                         "would not be the one that is scored; set both to False")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.cpu().long()
    if timesteps.max() >= config.num_train_timesteps:
        raise ValueError(f"{steps} sampling steps: with this schedule's offset and spacing the first would be timestep "
                         f"{timesteps.max()}, of which the model knows none above {config.num_train_timesteps - 1}; take fewer")
    alpha_bar = scheduler.alphas_cumprod[timesteps].float()
    alpha_bar_prev = torch.cat([alpha_bar[1:], scheduler.final_alpha_cumprod.float().reshape(1)])
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * variance.clamp(min=0).sqrt()                               # (T,)  DDIM, equation 16
    for t, s, a in zip(timesteps.tolist(), sigma.tolist(), alpha_bar.tolist()):
        if scored and not s > 0:
            raise ValueError(f"sigma is 0 at timestep {t}: the step is deterministic and has no log-probability. Stable "
                             "Diffusion's schedule (steps_offset 1, set_alpha_to_one False) has none such")
        if a == 0 and config.prediction_type == "epsilon":
            raise ValueError(f"alpha_bar is 0 at timestep {t}: x_0 cannot be had from a predicted epsilon")
    tensors = (tensor.to(device) for tensor in (timesteps, alpha_bar, alpha_bar_prev, sigma))
    return Schedule(*tensors, config.prediction_type)


def ddim_mean_sigma(x_t, prediction, t, schedule):
    """Mean and standard deviation of x_{t-1} given x_t (Song et al. 2021, equation 12).

    x_t and the U-Net's prediction (N, C, H, W) fp32; t (N,) timesteps of the schedule, which may all differ.
    Returns mean (N, C, H, W) and sigma (N, 1, 1, 1).
    """
    matches = schedule.timesteps == t[:, None]                               # (N, T)
    assert matches.any(1).all(), "t holds a timestep that is not in the schedule"
    row = matches.int().argmax(1)                                            # (N,)
    alpha_bar, alpha_bar_prev, sigma = (
        values[row, None, None, None] for values in (schedule.alpha_bar, schedule.alpha_bar_prev, schedule.sigma))
    if schedule.prediction_type == "epsilon":
        eps = prediction
        x_0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()        # (N, C, H, W)
    elif schedule.prediction_type == "v_prediction":
        eps = alpha_bar.sqrt() * prediction + (1 - alpha_bar).sqrt() * x_t
        x_0 = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * prediction
    elif schedule.prediction_type == "sample":
        eps = (x_t - alpha_bar.sqrt() * prediction) / (1 - alpha_bar).sqrt()
        x_0 = prediction
    else:
        raise ValueError(f"prediction type {schedule.prediction_type!r}: must be epsilon, v_prediction or sample")
    mean = alpha_bar_prev.sqrt() * x_0 + (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps
    return mean, sigma


def log_prob(x_prev, mean, sigma):
    """log p(x_{t-1} | x_t, c) of Normal(mean, sigma^2 I), per latent dimension: (N, C, H, W) -> (N,).

    The mean over the D = C H W dimensions, not their sum, as in the authors' code: a ratio of densities is then the D-th
    root of the true one. The sum's ratio would be 0 or infinite after the smallest step (D = 16,384 in Stable Diffusion).
    So the clip range is per dimension too: 1e-4 there lets the true density ratio move by a factor of 5.
    """
    density = -(x_prev - mean) ** 2 / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.mean((1, 2, 3))


def gaussian_kl(mean, mean_reference, sigma):
    """KL(Normal(mean, sigma^2 I) || Normal(mean_reference, sigma^2 I)), per latent dimension: (N, C, H, W) -> (N,)."""
    return ((mean - mean_reference) ** 2 / (2 * sigma**2)).mean((1, 2, 3))


def encode_prompts(policy, prompts):
    """B texts -> the text encoder's last hidden states (B, L, E) and those of the empty prompt (1, L, E)."""
    tokenizer, encoder = policy.pipeline.tokenizer, policy.pipeline.text_encoder
    ids = tokenizer([*prompts, ""], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                    return_tensors="pt").input_ids.to(policy.device)
    with torch.no_grad():
        states = encoder(ids)[0]
    return states[:-1], states[-1:]


def predict(policy, x_t, t, prompt_states):
    """The U-Net's prediction with classifier-free guidance (Ho and Salimans 2021): (N, C, H, W) fp32.

    Guidance belongs to the policy, in learning as in sampling: an unguided update scores another policy than the one that
    drew the pictures (and the paper saw performance fall after the first round without it).
    """
    conditional, unconditional = prompt_states                               # (N, L, E), (1, L, E)
    w = policy.guidance_scale
    with torch.autocast(policy.device.type, PRECISIONS[policy.precision], enabled=policy.precision != "fp32"):
        if w == 1:
            return policy.unet(x_t, t, conditional).sample.float()
        both = torch.cat([unconditional.expand_as(conditional), conditional])
        uncond, cond = policy.unet(torch.cat([x_t, x_t]), torch.cat([t, t]), both).sample.float().chunk(2)
    return uncond + w * (cond - uncond)


def p_mean_sigma(policy, x_t, t, prompt_states):
    """The policy p_theta(x_{t-1} | x_t, c): mean (N, C, H, W) and sigma (N, 1, 1, 1), for N states of any timesteps."""
    return ddim_mean_sigma(x_t, predict(policy, x_t, t, prompt_states), t, policy.schedule)


def rollout(policy, prompts, rng, batch_size, keep_chain=True, title="sampling"):
    """Draw one image for each of B prompts. Returns the Trajectory and the images (B, 3, H, W), fp32 in [0, 1].

    rng is a CPU generator, the only source of noise; batch_size is a knob of memory that leaves each image its own noise.
    Without keep_chain only x_0 is kept: memory does not grow with T, and the trajectory cannot be scored.
    Raises FloatingPointError if an image is not finite: as 8-bit pixels it would pass for a black one.
    """
    starts = range(0, len(prompts), batch_size)
    # A generator for each image, so that its noise does not depend on how many are drawn at a time, and is drawn when it is
    # needed: the noise of a whole chain at once would be as large as the chain.
    rngs = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (len(prompts),), generator=rng).tolist()]
    parts, images = [], []
    with tqdm(desc=title, total=len(starts) * len(policy.schedule.timesteps), leave=False, disable=None) as bar:
        for start in starts:
            batch = slice(start, start + batch_size)
            trajectory = _rollout_batch(policy, tuple(prompts[batch]), rngs[batch], keep_chain, bar)
            parts.append(trajectory)
            images.append(decode(policy, trajectory.latents[:, -1]))
    return Trajectory.join(parts), torch.cat(images)


@torch.no_grad()
def _rollout_batch(policy, prompts, rngs, keep_chain, bar):
    timesteps, unet = policy.schedule.timesteps, policy.unet
    shape = unet.config.in_channels, unet.config.sample_size, unet.config.sample_size

    def noise():
        return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(policy.device)

    prompt_states = encode_prompts(policy, prompts)
    x_t = noise()                                                            # x_T ~ Normal(0, I)
    latents, log_probs = [x_t], []
    for t in timesteps:
        mean, sigma = p_mean_sigma(policy, x_t, t.expand(len(prompts)), prompt_states)
        x_prev = mean + sigma * noise()
        if keep_chain:
            log_probs.append(log_prob(x_prev, mean, sigma))
            latents.append(x_prev)
        x_t = x_prev
        bar.update()
    if not keep_chain:
        return Trajectory(x_t[:, None], x_t.new_empty(len(prompts), 0), timesteps, prompts)
    return Trajectory(torch.stack(latents, 1), torch.stack(log_probs, 1), timesteps, prompts)


def score(policy, trajectory, images, steps):
    """N recorded actions under the current weights: log p_theta(x_{t-1} | x_t, c) (N,) and the KL to policy.reference (N,).

    images, steps (N,): the pairs, image i at step k (0 is the first, T -> T - 1). Both fp32, with gradient. The recorded
    x_{t-1} is scored, never a new one: the policy gradient asks how likely the weights make what was done. Without a
    reference the KL is 0, and costs nothing.
    """
    prompt_states = encode_prompts(policy, [trajectory.prompts[i] for i in images.tolist()])
    images, steps = images.to(policy.device), steps.to(policy.device)
    x_t, x_prev, t = trajectory.latents[images, steps], trajectory.latents[images, steps + 1], trajectory.timesteps[steps]
    mean, sigma = p_mean_sigma(policy, x_t, t, prompt_states)
    if policy.reference is None:
        return log_prob(x_prev, mean, sigma), torch.zeros_like(sigma.flatten())
    with torch.no_grad():
        mean_reference, _ = p_mean_sigma(policy.reference, x_t, t, prompt_states)
    return log_prob(x_prev, mean, sigma), gaussian_kl(mean, mean_reference, sigma)


@torch.no_grad()
def decode(policy, x_0):
    """Latents (B, C, H, W) -> images (B, 3, 8H, 8W in Stable Diffusion), fp32 in [0, 1]."""
    vae = policy.pipeline.vae
    with torch.autocast(policy.device.type, PRECISIONS[policy.precision], enabled=policy.precision != "fp32"):
        # A few at a time: at 512 x 512 pixels the decoder's activations are what takes most memory of all.
        images = torch.cat([vae.decode(part / vae.config.scaling_factor).sample.float() for part in x_0.split(8)])
    if not images.isfinite().all():
        raise FloatingPointError("an image is not finite: try --precision fp32, or a smaller --learning-rate")
    return (images / 2 + 0.5).clamp(0, 1)


def load_policy(model, steps, eta, guidance_scale, device="cpu", precision="fp32", keep_reference=False, scored=True):
    """A pipeline of Stable Diffusion's architecture, by folder or hub name, as a policy with an eta > 0 DDIM chain.

    With keep_reference, policy.reference is a frozen copy of it as it is now: one more U-Net in memory. Not scored, it may
    have eta 0, and can only be drawn from.
    Raises ValueError, in one line, if the model is not to be had, is of another architecture or has no usable schedule.
    """
    import diffusers
    hub.quiet()
    _refuse_incomplete_folder(Path(model))
    # Weights that train are fp32, whatever they were saved in; autocast does the rest.
    pipeline = hub.from_pretrained(diffusers.StableDiffusionPipeline, model, "model", dtype=torch.float32,
                                   safety_checker=None, requires_safety_checker=False)
    unet, vae, encoder = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
    if (unet.in_channels, unet.cross_attention_dim) != (vae.latent_channels, encoder.hidden_size) or unet.addition_embed_type:
        raise ValueError(f"model {str(model)!r} is no text-to-image model of Stable Diffusion 1 or 2's architecture: its U-Net "
                         "asks for more than a latent and a text")
    # Stable Diffusion ships another sampler; its betas and offsets are the model's, the step is ours.
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.scheduler = scheduler
    pipeline.to(device)
    if pipeline.unet.device.type == "cpu" and precision == "bf16":
        # torch's fused attention has no fast bf16 on a CPU: with it bf16 is hardly faster than fp32, without 1.6 times.
        pipeline.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.eval().requires_grad_(False)
    policy = Policy(pipeline, ddim_schedule(scheduler, steps, eta, device, scored), float(guidance_scale), precision)
    if keep_reference:
        frozen = copy.copy(pipeline)  # shares all but the U-Net
        frozen.unet = copy.deepcopy(pipeline.unet)
        policy = replace(policy, reference=replace(policy, pipeline=frozen))
    pipeline.unet.requires_grad_(True)
    return policy


def _refuse_incomplete_folder(folder):
    if not folder.is_dir():
        return
    parts = ["model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    missing = [part for part in parts if not (folder / part).exists()]
    if missing:
        raise ValueError(f"model {str(folder)!r} is a folder, but no Stable Diffusion pipeline: it has no "
                         + ", ".join(missing))
