"""The denoising chain as a Markov decision process (paper, section 4.3): its step, drawing chains, scoring them.

    MDP                    diffusion
    state s_t              (prompt c, timestep t, latent x_t)
    action a_t             x_{t-1}, the next, less noisy latent. RL calls it next; we call it x_prev, as diffusion does.
    policy pi(a_t | s_t)   p_theta(x_{t-1} | x_t, c) = Normal(mu_theta(x_t, c, t), sigma_t^2 I): DDIM with eta > 0
    reward                 r(x_0, c) after the last step, 0 before

One step covers diffusion and flow matching, since in both a noised latent is x_t = a_t x_0 + b_t eps:

                           diffusion                        flow matching
    a_t, b_t               sqrt(ab_t), sqrt(1 - ab_t)       1 - s_t, s_t: the noise level s falls from 1 to 0
    network's prediction   eps, x_0, or v = a eps - b x_0   v = eps - x_0
    timestep t             999 to 0                         1000 s_t

(ab is alpha_bar.) The prediction says which x_0 and eps are in x_t. Then, with a' and b' those of x_{t-1},

    mean = a' x_0 + sqrt(b'^2 - sigma^2) eps,   sigma = eta b' sqrt(1 - rho^2),   rho = a b' / (a' b)

With the coefficients of diffusion this is DDIM. At eta = 1 it is the posterior of the forward process in both. At eta = 0 it is the
deterministic step, DDIM's or Euler's. A last step to the clean image (b' = 0) has no noise. It is drawn but it is no action: like the
decoder it belongs to the environment. schedules.py makes the coefficients and sigma.

Time runs as in diffusion: x_T is noise, x_0 is the image. The policy is written once, in `p_mean_sigma`, guidance included:
`rollout` draws from it and `score` scores with it, under the same autocast and with the denoiser in eval mode. Otherwise the first
update would have a ratio other than 1, and the estimators of ddpo.py would belong to another policy than the one that drew.

B images, T denoising steps, A of them actions (T, or T - 1 if the last has no noise), N (image, step) pairs, latents of (C, H, W).
"""
import math
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import parallel
from models import (PRECISIONS, WithWeights, add_lora, architecture_of, autocast, denoiser_of, encode_prompts, latent_shape, networks_of,
                    vae_precision)
from pipelines import identity_of, load_pipeline
from schedules import Schedule, chain_schedule, scheduler_with_density


@dataclass(frozen=True)
class Trajectory:
    """B recorded chains, in fp32: a latent that is rounded to half precision is not the action that was scored."""
    latents: torch.Tensor    # (B, T + 1, C, H, W) fp32, from x_T to x_0; without the chain (B, 1, C, H, W), x_0 alone
    log_probs: torch.Tensor  # (B, A) fp32, of the A actions under the policy that drew them; without the chain (B, 0)
    timesteps: torch.Tensor  # (T,) as in Schedule
    prompts: tuple           # B texts

    def __post_init__(self):
        B, states = self.latents.shape[:2]
        assert len(self.prompts) == B, f"{len(self.prompts)} prompts for {B} chains"
        assert self.log_probs.shape in ((B, states - 1), (B, states - 2)), f"log_probs {tuple(self.log_probs.shape)}, {states} states"
        assert states in (1, len(self.timesteps) + 1), f"{states} states, {len(self.timesteps)} timesteps"
        assert self.latents.dtype == self.log_probs.dtype == torch.float32, "a trajectory is kept in fp32"

    @property
    def x_0(self):
        """The final latents (B, C, H, W), which models.decode turns into images."""
        return self.latents[:, -1]


@dataclass(frozen=True)
class Policy:
    """A text-to-image pipeline as a policy. Only weights of its denoiser (U-Net or transformer) train: all, or LoRA's."""
    pipeline: object          # of diffusers; see models.ARCHITECTURES
    schedule: Schedule
    guidance_scale: float     # w; at 1 the conditional prediction alone
    precision: str            # of the autocast of U-Net and VAE; weights that train, latents and the step's arithmetic are fp32
    reference: object = None  # the pretrained policy, a frozen_copy, for a penalty on the KL to it
    pretrained: str = ""      # a hash of the model before training: pipelines.identity_of
    frozen: object = None     # a WithWeights of the denoiser, in a frozen_copy

    @property
    def denoiser(self):
        return self.frozen or denoiser_of(self.pipeline)

    @property
    def device(self):
        return denoiser_of(self.pipeline).device

    @property
    def trained(self):
        """name -> weight, of those that train."""
        return {name: weight for name, weight in self.denoiser.named_parameters() if weight.requires_grad}


def load_policy(model, steps, eta, guidance_scale, device="cpu", precision="fp32", scored=True, clip_skip=0, height=0, width=0,
                t5=True, noise="ddim", **training):
    """A pipeline by hub name, folder or file, as a policy with a chain of `steps` steps.

    eta, noise, scored: see chain_schedule. guidance_scale, precision: see Policy. device: as torch names it.
    clip_skip, height, width, t5: see pipelines.load_pipeline. training: see as_policy. Raises ValueError, in one line, if the model is
    refused or if its schedule is.
    """
    pipeline = load_pipeline(model, device, precision, clip_skip, height, width, t5)
    pipeline.scheduler = scheduler_with_density(model, pipeline.scheduler, steps)
    schedule = chain_schedule(pipeline.scheduler, steps, eta, device, scored, noise)
    return as_policy(Policy(pipeline, schedule, float(guidance_scale), precision, pretrained=identity_of(pipeline)), **training)


def as_policy(policy, keep_reference=False, lora_rank=0, seed=0, gradient_checkpointing=False, compiled=False):
    """A pretrained policy, made ready to train.

    keep_reference: policy.reference becomes a frozen_copy. lora_rank: adapters of that rank train alone (see models.add_lora), 0: all
    weights of the denoiser do. seed: of the adapters. gradient_checkpointing:
    compute activations twice instead of keeping them. compiled: by torch.compile, for sampling and for learning.
    """
    pipeline, precision = policy.pipeline, policy.precision
    if lora_rank:
        for network in networks_of(pipeline):  # what does not train needs no more
            network.to(PRECISIONS[vae_precision(pipeline, precision) if network is pipeline.vae else precision])
        add_lora(pipeline, lora_rank, seed)
    else:
        policy.denoiser.requires_grad_(True)
    if keep_reference:
        policy = replace(policy, reference=frozen_copy(policy))
    if gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    if compiled:
        policy.denoiser.compile()
    return policy


def frozen_copy(policy):
    """The policy as it is now, whatever is learned later. It costs a copy of the weights that train: all, or LoRA's alone."""
    return replace(policy, frozen=WithWeights(policy.denoiser, policy.trained))


def with_steps(policy, steps, eta, noise):
    """The same policy, network and all, with a chain of another number of steps to be drawn. Raises ValueError: see chain_schedule."""
    return replace(policy, schedule=chain_schedule(policy.pipeline.scheduler, steps, eta, policy.device, False, noise))


# ---- The step ----

def mean_sigma(x_t, prediction, t, schedule):
    """Mean and standard deviation of x_{t-1} given x_t (Song et al. 2021, equation 12, for any a and b).

    x_t and the network's prediction: (N, C, H, W) fp32. t: (N,) timesteps of the schedule, which may all differ.
    Returns mean (N, C, H, W) and sigma (N, 1, 1, 1).
    """
    matches = schedule.timesteps == t[:, None]                               # (N, T)
    assert matches.any(1).all(), "t holds a timestep that is not in the schedule"
    row = matches.int().argmax(1)                                            # (N,)
    a, b, a_prev, b_prev, sigma = (values[row, None, None, None] for values in (
        schedule.a, schedule.b, schedule.a_prev, schedule.b_prev, schedule.sigma))
    x_0, eps = x_0_and_eps(x_t, prediction, a, b, schedule.prediction_type)  # (N, C, H, W) each
    return a_prev * x_0 + (b_prev**2 - sigma**2).clamp(min=0).sqrt() * eps, sigma


def x_0_and_eps(x_t, prediction, a, b, prediction_type):
    """The image and the noise of which x_t = a x_0 + b eps, as the network's prediction says."""
    if prediction_type == "epsilon":
        return (x_t - b * prediction) / a, prediction
    if prediction_type == "v_prediction":
        return a * x_t - b * prediction, a * prediction + b * x_t
    if prediction_type == "flow":
        return x_t - b * prediction, x_t + a * prediction
    return prediction, (x_t - a * prediction) / b  # "sample"


def target_of(x_0, eps, a, b, prediction_type):
    """What the network should predict from x_t = a x_0 + b eps: the inverse of x_0_and_eps."""
    return {"epsilon": eps, "v_prediction": a * eps - b * x_0, "flow": eps - x_0, "sample": x_0}[prediction_type]


def log_prob(x_prev, mean, sigma):
    """log p(x_{t-1} | x_t, c) of Normal(mean, sigma^2 I), per latent dimension: (N, C, H, W) -> (N,).

    This is the mean over the D = C H W dimensions, as in the authors' code, and not the sum. So a ratio of densities is the D-th
    root of the true one. The sum's ratio would be 0 or infinite after the smallest step (D = 16,384 in Stable Diffusion). The
    clip range is per dimension too: 1e-4 there lets the true density ratio move by a factor of 5.
    """
    density = -(x_prev - mean) ** 2 / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.mean((1, 2, 3))


def gaussian_kl(mean, mean_reference, sigma):
    """KL(Normal(mean, sigma^2 I) || Normal(mean_reference, sigma^2 I)), per latent dimension: (N, C, H, W) -> (N,)."""
    return ((mean - mean_reference) ** 2 / (2 * sigma**2)).mean((1, 2, 3))


# ---- The policy ----

def predict(policy, x_t, t, prompt_states):
    """The denoiser's prediction with classifier-free guidance (Ho and Salimans 2021): (N, C, H, W) fp32.

    Guidance is part of the policy, in learning as in sampling. An update without it would score another policy than the one
    that drew the images. (For sparse RWR the paper saw performance fall after the first round without it, appendix E.1.)
    """
    conditional, unconditional = prompt_states                               # tuples of tensors of N rows, and of one
    w, call = policy.guidance_scale, architecture_of(policy.pipeline).predict
    with autocast(policy.device, policy.precision):
        if w == 1:
            return call(policy.pipeline, policy.denoiser, x_t, t, conditional).float()
        both = tuple(torch.cat([empty.expand_as(states), states]) for states, empty in zip(conditional, unconditional))
        uncond, cond = call(policy.pipeline, policy.denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
    return uncond + w * (cond - uncond)


def p_mean_sigma(policy, x_t, t, prompt_states):
    """The policy p_theta(x_{t-1} | x_t, c): mean (N, C, H, W) and sigma (N, 1, 1, 1), for N states at any timesteps."""
    return mean_sigma(x_t, predict(policy, x_t, t, prompt_states), t, policy.schedule)


@torch.no_grad()
def rollout(policy, prompts, rng, batch_size, keep_chain=True, title="sampling"):
    """Draw one chain for each of B prompts. Returns the Trajectory; models.decode turns its x_0 into images.

    rng is a CPU generator, the only source of noise. batch_size is a knob of memory: each image has noise of its own, whatever
    it is. Without keep_chain only x_0 is kept: memory does not grow with T, and the trajectory cannot be scored. title: of the
    progress bar. Raises FloatingPointError if a latent is not finite.
    """
    B, T = len(prompts), len(policy.schedule.timesteps)
    rngs = generators(rng, B)
    latents = torch.zeros((B, T + 1 if keep_chain else 1, *latent_shape(policy.pipeline)), device=policy.device)
    log_probs = torch.zeros((B, policy.schedule.actions if keep_chain else 0), device=policy.device)
    batches = parallel.my_parts(B, batch_size)
    with tqdm(desc=title, total=len(batches) * T, leave=False, disable=None) as bar:
        for batch in batches:
            draw_chains(policy, prompts[batch], rngs[batch], latents[batch], log_probs[batch], bar)
    parallel.add_up([latents, log_probs])
    return Trajectory(latents, log_probs, policy.schedule.timesteps, tuple(prompts))


def generators(rng, count):
    """`count` generators of noise, one for each image, seeded from the CPU generator rng.

    They make the noise of an image independent of batch_size, and let us draw it step by step: that of a whole chain is as large as
    the chain.
    """
    return [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (count,), generator=rng).tolist()]


def noise(policy, rngs):
    """Standard normal latents (N, C, H, W), one from each generator."""
    return torch.stack([torch.randn(latent_shape(policy.pipeline), generator=rng) for rng in rngs]).to(policy.device)


def draw_chains(policy, prompts, rngs, latents, log_probs, bar):
    """Draw N chains, one for each prompt and generator, and write them into latents (N, T + 1 or 1, ...) and log_probs (N, A or 0)."""
    keep_chain = latents.shape[1] > 1
    prompt_states = encode_prompts(policy.pipeline, prompts)
    x_t = latents[:, 0] = noise(policy, rngs)                                            # x_T ~ Normal(0, I)
    for k, t in enumerate(policy.schedule.timesteps):
        mean, sigma = p_mean_sigma(policy, x_t, t.expand(len(prompts)), prompt_states)
        x_prev = mean + sigma * noise(policy, rngs)
        if keep_chain:
            latents[:, k + 1] = x_prev
        if k < log_probs.shape[1]:
            log_probs[:, k] = log_prob(x_prev, mean, sigma)
        x_t = x_prev
        bar.update()
    if not x_t.isfinite().all():  # found here, and not after 10,000 images
        raise FloatingPointError("a latent is not finite")
    latents[:, -1] = x_t


def score(policy, trajectory, images, steps):
    """N recorded actions under the current weights: log p_theta(x_{t-1} | x_t, c) (N,), and the KL to policy.reference (N,).

    images, steps (N,) are the pairs: image i at step k, where 0 is the first step, T -> T - 1. Both results are fp32. log p
    carries a gradient, and so does the KL if there is a reference; else the KL is 0 and costs nothing. The recorded x_{t-1} is
    scored, never a new one: the policy gradient asks how likely the weights make the action that was taken.
    """
    prompt_states = encode_prompts(policy.pipeline, [trajectory.prompts[i] for i in images.tolist()])
    images, steps = images.to(policy.device), steps.to(policy.device)
    x_t, x_prev, t = trajectory.latents[images, steps], trajectory.latents[images, steps + 1], trajectory.timesteps[steps]
    mean, sigma = p_mean_sigma(policy, x_t, t, prompt_states)
    if policy.reference is None:
        return log_prob(x_prev, mean, sigma), torch.zeros_like(sigma.flatten())
    with torch.no_grad():
        mean_reference, _ = p_mean_sigma(policy.reference, x_t, t, prompt_states)
    return log_prob(x_prev, mean, sigma), gaussian_kl(mean, mean_reference, sigma)
