"""The denoising chain as a Markov decision process (paper, section 4.3): schedule, step, drawing, scoring.

    MDP                    diffusion
    state                  (prompt c, timestep t, latent x_t)
    action                 x_{t-1}, the next, less noisy latent; x_prev, named for its smaller index
    policy                 p_theta(x_{t-1} | x_t, c) = Normal(mu_theta(x_t, c, t), sigma_t^2 I): DDIM, eta > 0
    reward                 r(x_0, c) after the last step, 0 before

One step covers diffusion and flow matching, since in both a noised latent is x_t = a_t x_0 + b_t eps:

                           diffusion                        flow matching
    a_t, b_t               sqrt(abar_t), sqrt(1 - abar_t)   1 - s_t, s_t: the noise level s falls from 1 to 0
    network's prediction   eps, x_0, or v = a eps - b x_0   v = eps - x_0
    timestep t             999 to 0                         1000 s_t

(abar is alpha_bar.) The prediction says which x_0 and eps are in x_t. Then, with a' and b' those of x_{t-1},

    mean = a' x_0 + sqrt(b'^2 - sigma^2) eps,   sigma = eta b' sqrt(1 - rho^2),   rho = a b' / (a' b)

With the coefficients of diffusion this is DDIM. At eta = 1 it is the posterior of the forward process in
both. At eta = 0 it is the deterministic step, DDIM's or Euler's. A last step to the clean image (b' = 0) has
no noise. It is drawn but it is no action: like the decoder it belongs to the environment.

Time runs as in diffusion: x_T is noise, x_0 is the image. A step is its index k in the chain: step 0 goes
from x_T to x_{T-1}. The policy is written once, in `p_mean_sigma`, guidance included: `rollout` draws from it
and `score` scores with it, under the same autocast and with the denoiser in eval mode. Otherwise the first
update would have a ratio other than 1. The prediction and the decoding are the pipeline's own: policy.py.

B images, T denoising steps, A of them actions (T, or T - 1 if the last has no noise), N images that go
through the network together. D... is the shape of a latent: (C, H, W), or (tokens, channels) of FLUX.
"""
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from support import processes

# ---- The schedule: how much image and how much noise is in x_t, and how much noise a step adds ----

@dataclass(frozen=True)
class Schedule:
    """The T timesteps of a chain, in the order in which they are visited, and what its steps need."""
    timesteps: torch.Tensor  # (T,) as the network is told them, decreasing: int64, or fp32 with flow matching
    a: torch.Tensor          # (T + 1,) fp32: x_t = a x_0 + b eps; the last entry is that of the chain's end
    b: torch.Tensor          # (T + 1,) fp32
    sigma: torch.Tensor      # (T,) fp32, > 0, but 0 in the last step if that ends at the clean image
    prediction_type: str     # what the network predicts: "epsilon", "v_prediction", "sample" or "flow"

    @property
    def actions(self):
        """A: how many steps, from the first on, are actions."""
        return len(self.sigma) - int(self.sigma[-1] == 0)


def make_schedule(timesteps, a, b, prediction_type, eta, noise="ddim", scored=True):
    """The Schedule of a chain of timesteps (T,), with a and b (T + 1,) in fp64.

    noise: which sigma, one of NOISES. scored: False for a chain that is only drawn; eta may then be 0.
    ValueError if a step has no density, so that it could not be scored.
    """
    if not (0 < eta <= 1 or not scored and eta == 0):
        raise ValueError(f"eta is {eta:g}, but must be in (0, 1]: at 0 the sampler is deterministic, so its "
                         "actions have no log-probability; above 1 a variance would be negative")
    sigma = NOISES[noise](a[:-1], b[:-1], a[1:], b[1:], eta)                 # (T,)
    without = [k for k in range(len(sigma)) if not sigma[k] > 0]
    if scored and without and (without != [len(sigma) - 1] or b[-1] > 0):
        raise ValueError(f"sigma is 0 at timestep {timesteps[without[0]]:g}: it has no log-probability")
    if scored and len(without) == len(sigma):
        raise ValueError("1 sampling step has no noise, so there is no action to learn from: take 2 or more")
    a, b, sigma = (values.float().to(timesteps.device) for values in (a, b, sigma))
    return Schedule(timesteps, a, b, sigma, prediction_type)


def ddim_sigma(a, b, a_prev, b_prev, eta):
    """eta times the deviation of the forward process's posterior (Song et al. 2021, equation 16)."""
    rho = a * b_prev / (a_prev * b)
    return eta * b_prev * (1 - rho**2).clamp(min=0).sqrt()


def cps_sigma(a, b, a_prev, b_prev, eta):
    """Coefficients-preserving sampling (Wang and Yu 2025, arXiv 2509.05952): at eta = 1 all noise is new."""
    return b_prev * math.sin(eta * math.pi / 2)


NOISES = {"ddim": ddim_sigma, "cps": cps_sigma}


# ---- The step ----

def mean_sigma(x_t, prediction, k, schedule):
    """Mean (N, D...) and deviation, a scalar, of x_{t-1} in step k (Song et al. 2021, equation 12, any a, b).

    x_t and the network's prediction: (N, D...) fp32.
    """
    a, b, a_prev, b_prev = schedule.a[k], schedule.b[k], schedule.a[k + 1], schedule.b[k + 1]
    sigma = schedule.sigma[k]
    x_0, eps = x_0_and_eps(x_t, prediction, a, b, schedule.prediction_type)
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
    targets = {"epsilon": eps, "v_prediction": a * eps - b * x_0, "flow": eps - x_0, "sample": x_0}
    return targets[prediction_type]


def log_prob(x_prev, mean, sigma):
    """log p(x_{t-1} | x_t, c) of Normal(mean, sigma^2 I), per latent dimension: (N, D...) -> (N,).

    This is the mean over the D dimensions, as in the authors' code, and not the sum. So a ratio of densities
    is the D-th root of the true one, and the clip range is per dimension, too: with Stable Diffusion's D =
    16,384 a range of 1e-4 lets the true ratio move by a factor of 5.
    """
    density = -(x_prev - mean) ** 2 / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def gaussian_kl(mean, mean_reference, sigma):
    """KL(Normal(mean, sigma^2 I) || Normal(mean_reference, sigma^2 I)) per dimension: (N, D...) -> (N,)."""
    return ((mean - mean_reference) ** 2 / (2 * sigma**2)).flatten(1).mean(1)


# ---- The policy ----

def p_mean_sigma(policy, x_t, k, prompts):
    """The policy p_theta(x_{t-1} | x_t, c) in step k for N latents and N texts: mean (N, D...) and sigma.

    Guidance is part of the policy, in learning as in sampling: without it an update would score another
    policy than the one that drew the images.
    """
    schedule = policy.schedule
    return mean_sigma(x_t, policy.predict(x_t, schedule.timesteps[k], prompts), k, schedule)


@dataclass(frozen=True)
class Trajectory:
    """B recorded chains, in fp32: a latent rounded to half precision is not the action that was scored."""
    latents: torch.Tensor    # (B, T + 1, D...) fp32, from x_T to x_0; without the chain (B, 1, D...)
    log_probs: torch.Tensor  # (B, A) fp32, under the policy that drew them; without the chain (B, 0)
    prompts: tuple           # B texts

    def __post_init__(self):
        assert self.latents.dtype == self.log_probs.dtype == torch.float32, "a trajectory is kept in fp32"

    @property
    def x_0(self):
        """The final latents (B, D...), which policy.decode turns into images."""
        return self.latents[:, -1]


@torch.no_grad()
def rollout(policy, prompts, rng, batch_size, keep_chain=True, title="sampling"):
    """Draw one chain for each of B prompts. Returns the Trajectory; policy.decode turns its x_0 into images.

    rng is a CPU generator, the only source of noise. batch_size: how many at a time, or the settings that say
    it (sample_batch), which changes rounding only: each image has noise of its own. Without keep_chain only
    x_0 is kept: memory does not grow with T, and the trajectory cannot be scored. title: of the progress bar.
    FloatingPointError if a latent is not finite.
    """
    B, T, A = len(prompts), len(policy.schedule.timesteps), policy.schedule.actions
    rngs = generators(rng, B)
    latents = torch.zeros((B, T + 1 if keep_chain else 1, *policy.latent_shape), device=policy.device)
    log_probs = torch.zeros((B, A if keep_chain else 0), device=policy.device)
    mine = processes.share(B)
    with tqdm(desc=title, total=(mine.stop - mine.start) * T, leave=False, disable=None) as bar:
        for part in processes.parts(mine, batch_size, "sample_batch"):
            with part as batch:
                own = [rng.clone_state() for rng in rngs[batch]]  # a part that comes again has the same
                x_t = latents[batch, 0] = noise(policy, own)                             # x_T ~ Normal(0, I)
                for k in range(T):
                    mean, sigma = p_mean_sigma(policy, x_t, k, prompts[batch])
                    x_prev = mean + sigma * noise(policy, own)                           # x_{t-1} ~ p_theta
                    if keep_chain:
                        latents[batch, k + 1] = x_prev
                    if keep_chain and k < A:
                        log_probs[batch, k] = log_prob(x_prev, mean, sigma)
                    x_t = x_prev
                    bar.update(len(x_t))
                if not x_t.isfinite().all():  # found here, and not after 10,000 images
                    raise FloatingPointError("a latent is not finite")
                latents[batch, -1] = x_t
    processes.add_up([latents, log_probs])
    return Trajectory(latents, log_probs, tuple(prompts))


def generators(rng, count):
    """`count` generators, one for each image's noise, which so does not depend on batch_size."""
    seeds = torch.randint(2**62, (count,), generator=rng).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(policy, rngs):
    """Standard normal latents (N, D...), one from each generator."""
    return torch.stack([torch.randn(policy.latent_shape, generator=rng) for rng in rngs]).to(policy.device)


def score(policy, trajectory, images, k):
    """The recorded actions of step k: log p_theta(x_{t-1} | x_t, c) (N,), KL to the reference (N,).

    images (N,): which chains. Both results are fp32. log p carries a gradient, and so does the KL; without a
    reference that is 0. The recorded x_{t-1} is scored, never a new one: the policy gradient asks how likely
    the weights make the action that was taken.
    """
    prompts = [trajectory.prompts[i] for i in images.tolist()]
    x_t, x_prev = trajectory.latents[images, k], trajectory.latents[images, k + 1]
    mean, sigma = p_mean_sigma(policy, x_t, k, prompts)                    # where grad log p_theta comes from
    if policy.reference is None:
        return log_prob(x_prev, mean, sigma), torch.zeros(len(images), device=policy.device)
    with torch.no_grad(), policy.with_weights(policy.reference):
        mean_reference, _ = p_mean_sigma(policy, x_t, k, prompts)
    return log_prob(x_prev, mean, sigma), gaussian_kl(mean, mean_reference, sigma)
