"""The schedulers of diffusers: which one a chain needs, and the noise levels that it says."""
import copy

import numpy as np
import torch


def plain_scheduler(published):
    """The scheduler of a model's chain, DDIM's or flow matching's Euler's, with the model's own noise."""
    import diffusers
    # A model is published with any sampler. All settings are named, since each class has its own defaults.
    settings = {name: value for name, value in published.config.items() if not name.startswith("_")}
    if settings.get("prediction_type") == "flow_prediction" or "FlowMatch" in type(published).__name__:
        if settings.get("invert_sigmas"):
            raise ValueError("its scheduler has invert_sigmas, whose noise levels we do not know")
        shift = settings.get("flow_shift", settings.get("shift", 1.0))
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings, shift=shift)
    if "beta_schedule" not in settings:
        name = type(published).__name__
        raise ValueError(f"its scheduler is a {name}, which has neither betas nor flow matching")
    # Stable Diffusion's settings, with which each step has a density. But few-step models need "trailing".
    trailing = settings.get("timestep_spacing") == "trailing" or settings.get("rescale_betas_zero_snr")
    return diffusers.DDIMScheduler.from_config(
        settings, timestep_spacing="trailing" if trailing else "leading", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False, thresholding=False)


def chain_levels(scheduler, timesteps):
    """a and b (T + 1,), fp64, of x_t = a x_0 + b eps, in the chain that a scheduler has set."""
    if not hasattr(scheduler, "alphas_cumprod"):  # flow matching
        return 1 - scheduler.sigmas.double(), scheduler.sigmas.double()
    final = scheduler.final_alpha_cumprod.reshape(1)
    alpha_bar = torch.cat([scheduler.alphas_cumprod[timesteps.cpu()], final]).double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def training_levels(scheduler, mu=None):
    """What a model was trained with: prediction type, and timesteps, a, b (1000,) of x_t = a x_0 + b eps.

    With flow matching they are shifted as the chain is: by mu, or by the scheduler's own shift. Not each was
    trained as often: of Stable Diffusion 3 the middle ones were trained most (logit-normal).
    """
    N = scheduler.config.num_train_timesteps
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_bar = scheduler.alphas_cumprod.double()
        a, b = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        return scheduler.config.prediction_type, torch.arange(N), a, b
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / N, N), **({} if mu is None else {"mu": mu}))
    s = scheduler.sigmas[:-1].flip(0).double()
    return "flow", scheduler.timesteps.flip(0), (1 - s).float(), s.float()
