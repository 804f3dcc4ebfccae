"""The schedule of a denoising chain: how much image and how much noise is in x_t at each timestep, and how much noise a step adds.

A noised latent is x_t = a x_0 + b eps, in diffusion as in flow matching. A chain is made from the scheduler that the model was published
with. What sampling.py could not score is refused here.
"""
import math
from dataclasses import dataclass

import torch

from process import notify


@dataclass(frozen=True)
class Schedule:
    """The T timesteps of a chain, in the order in which they are visited, and what the step at each of them needs."""
    timesteps: torch.Tensor  # (T,) as the network is told them, decreasing: int64, or fp32 with flow matching
    a: torch.Tensor          # (T,) fp32: x_t = a x_0 + b eps
    b: torch.Tensor          # (T,) fp32
    a_prev: torch.Tensor     # (T,) fp32, of x_{t-1}
    b_prev: torch.Tensor     # (T,) fp32
    sigma: torch.Tensor      # (T,) fp32, > 0, but 0 in the last step if that ends at the clean image
    prediction_type: str     # what the network predicts: "epsilon", "v_prediction", "sample" or "flow"

    @property
    def actions(self):
        """A: how many steps, from the first on, are actions."""
        return len(self.sigma) - int(self.sigma[-1] == 0)


# ---- Noise: how much is in x_t, and how much a step adds ----

def is_flow(scheduler):
    """Whether a scheduler is that of a flow-matching model. Those of diffusion have betas."""
    return "beta_schedule" not in scheduler.config


def prediction_type_of(scheduler):
    """What the network of a scheduler's model predicts: see Schedule."""
    return "flow" if is_flow(scheduler) else scheduler.config.prediction_type


def coefficients(scheduler, t):
    """a and b (N,), fp64, of x_t = a x_0 + b eps at the network's timesteps t (N,)."""
    if is_flow(scheduler):
        s = t.double() / scheduler.config.num_train_timesteps
        return 1 - s, s
    alpha_bar = scheduler.alphas_cumprod.to(t.device)[t].double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def training_timesteps(scheduler):
    """The timesteps (1000,) that the network was trained with, each as often as the others: int64, or fp32 with flow matching."""
    N = scheduler.config.num_train_timesteps
    if not is_flow(scheduler):
        return torch.arange(N)
    s, shift = torch.arange(1, N + 1) / N, scheduler.config.shift
    return N * shift * s / (1 + (shift - 1) * s)  # as the scheduler shifts the noise levels that it draws with


def ddim_sigma(a, b, a_prev, b_prev, eta):
    """eta times the deviation of the forward process's posterior (Song et al. 2021, equation 16, for any a and b)."""
    rho = a * b_prev / (a_prev * b)
    return eta * b_prev * (1 - rho**2).clamp(min=0).sqrt()


def cps_sigma(a, b, a_prev, b_prev, eta):
    """Coefficients-preserving sampling (Wang and Yu 2025, arXiv 2509.05952): x_{t-1} has new noise alone at eta = 1."""
    return b_prev * math.sin(eta * math.pi / 2)


NOISES = {"ddim": ddim_sigma, "cps": cps_sigma}


# ---- The chain ----

def chain_schedule(scheduler, steps, eta, device="cpu", scored=True, noise="ddim"):
    """The chain of `steps` steps over the timesteps of a diffusers DDIMScheduler or FlowMatchEulerDiscreteScheduler.

    x_{t-1} belongs to the next entry of `scheduler.timesteps`. After the last one it is the clean image, or what diffusion's
    `final_alpha_cumprod` says. (diffusers' own DDIM step takes t - 1000 // steps, which is often another timestep under "trailing" and
    "linspace" spacing.) A last step to the clean image itself has no noise. It is drawn, but it is no action: like the decoder it belongs
    to the environment.
    scored: False for a chain that is only drawn; eta may then be 0. noise: which sigma, one of NOISES.
    Raises ValueError if another step is not a Gaussian with a density; each message says why.
    """
    config, flow = scheduler.config, is_flow(scheduler)
    if not (0 < eta <= 1 or not scored and eta == 0):
        raise ValueError(f"eta is {eta:g}, but must be in {'(' if scored else '['}0, 1]: at 0 the sampler is deterministic, so "
                         "its actions have no log-probability, and above 1 a variance would be negative")
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"{steps} sampling steps: must be from 1 to {config.num_train_timesteps}")
    (refuse_flow if flow else refuse_diffusion)(scheduler)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.cpu() if flow else scheduler.timesteps.cpu().long()
    if timesteps.max() > config.num_train_timesteps - (not flow):
        raise ValueError(f"{steps} sampling steps: with this schedule's offset and spacing the first would be timestep "
                         f"{timesteps.max()}, but the model knows none above {config.num_train_timesteps - 1}; take fewer")
    if len(timesteps) != steps:  # diffusers' "trailing" rounds so for a few numbers, such as 61
        raise ValueError(f"{steps} sampling steps: with this schedule's spacing diffusers makes {len(timesteps)} of them; take one more")
    a, b = coefficients(scheduler, timesteps)
    ends = torch.ones(()).double() if flow else scheduler.final_alpha_cumprod.double().sqrt()
    a_prev, b_prev = torch.cat([a[1:], ends.reshape(1)]), torch.cat([b[1:], (1 - ends**2).sqrt().reshape(1)])
    sigma = NOISES[noise](a, b, a_prev, b_prev, eta)                         # (T,)
    no_action = (b_prev == 0) & (torch.arange(1, steps + 1) == steps)
    for t, s, signal, free in zip(timesteps.tolist(), sigma.tolist(), a.tolist(), no_action.tolist()):
        if scored and not s > 0 and not free:
            raise ValueError(f"sigma is 0 at timestep {t:g}: the step is deterministic and has no log-probability. Stable "
                             "Diffusion's schedule (steps_offset 1, set_alpha_to_one False) has no such step")
        if signal == 0 and config.get("prediction_type") == "epsilon":
            raise ValueError(f"alpha_bar is 0 at timestep {t}: a predicted epsilon does not determine x_0 there")
    if scored and no_action.all():
        raise ValueError("1 sampling step goes to the clean image without noise, so there is no action to learn from: take 2 or more")
    tensors = (tensor.to(device) for tensor in (timesteps, *(values.float() for values in (a, b, a_prev, b_prev, sigma))))
    return Schedule(*tensors, prediction_type_of(scheduler))


def refuse_diffusion(scheduler):
    """Raise ValueError if the settings of a DDIMScheduler make another step than ours."""
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction type {config.prediction_type!r}: must be epsilon, v_prediction or sample")
    if config.clip_sample or config.thresholding:
        raise ValueError("the scheduler clips its prediction of x_0 (clip_sample or thresholding): the mean of the policy "
                         "would not be the one that is scored; set both to False")
    if len(scheduler.alphas_cumprod) != config.num_train_timesteps or not scheduler.alphas_cumprod.isfinite().all():
        raise ValueError(f"the scheduler's betas are not those of {config.num_train_timesteps} timesteps of noise")


def refuse_flow(scheduler):
    """Raise ValueError if the settings of a FlowMatchEulerDiscreteScheduler make another chain than ours."""
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if scheduler.config[name]:
            raise ValueError(f"the scheduler has {name}, whose noise levels we do not know; set it to False")


def scheduler_with_density(model, scheduler, steps):
    """The model's own scheduler if chain_schedule takes it, else a DDIMScheduler with the settings of Stable Diffusion's sampler.

    The betas and the prediction type belong to the model, which was trained with them. Spacing, offset and final alpha belong to
    the sampler that it was saved with (Euler a, DPM++, ...), and may be exchanged. It is said if they are. Raises ValueError.
    """
    steps = max(steps, 2)  # a single step may have no action, whatever the settings
    try:
        chain_schedule(scheduler, steps, 1.0)
        return scheduler
    except ValueError:
        if is_flow(scheduler):
            raise
        spacing = "trailing" if scheduler.config.rescale_betas_zero_snr else "leading"  # the first step must be at alpha_bar = 0
        ours = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False,
                                           thresholding=False)
        chain_schedule(ours, steps, 1.0)
    notify(f"model {model}: its sampler's settings give a chain without a density; Stable Diffusion's are taken "
           f"(timestep_spacing {spacing}, steps_offset 1, set_alpha_to_one False)")
    return ours
