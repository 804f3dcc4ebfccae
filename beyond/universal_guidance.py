"""Universal guidance (Bansal et al. 2023, arXiv 2302.07121; the paper's appendix B): DDPO's rival.

Nothing is trained. The sampler itself follows the gradient of the reward. At each timestep, k times:

    e      = e_u + w (e_c - e_u)                                the policy's prediction
    e     += g b grad_z l(z_0),   l(z_0) = -r(decode(z_0), c)   forward guidance, through U-Net and VAE
    e     -= (a / b) D                                          backward guidance, through the VAE, if m > 0
    z_prev = a' z_0 + b' e                                      the chain's step with eta = 0
    z      = (a / a') z_prev + sqrt(b^2 - (a b' / a')^2) noise  self-recurrence, to the same timestep

a and b are those of x_t = a x_0 + b eps, a' and b' those of x_{t-1} (sampling.py); in diffusion b = sqrt(1 -
alpha_bar), as the paper writes it. In each line z_0 = (z - b e) / a, with e as it is by then. D, by which z_0
moves, is found by m steps of gradient descent on l(z_0 + D) from D = 0. The k-th pass goes on with z_prev.

What DDPO pays once, in training, this pays for each picture: 2 k passes of the U-Net and their gradients at
each step. JPEG size and a VLM's answers have no gradient.
"""
import torch
from tqdm import tqdm

from sampling import generators, noise, x_0_and_eps

FP16_SCALE = 1024  # of a gradient on its way back: that of a mean over all pixels is too small for fp16


def guided_rollout(policy, prompts, reward, rng, batch_size, scale, recurrences=1, backward_steps=0,
                   backward_rate=1.0):
    """Draw one image for each of B prompts by universal guidance. Returns x_0 (B, D...), fp32.

    reward: a rewards.Reward with a gradient. rng, batch_size: as in sampling.rollout, which draws the same
    images at eta 0 if nothing guides. scale: g >= 0, per unit of the reward. recurrences: k. backward_steps:
    m; backward_rate: their step size. prompts: prompts.Prompt or texts. A chain that begins at pure noise, as
    flow matching's, is guided from its second step on. FloatingPointError if a latent is not finite.
    """
    rngs = generators(rng, len(prompts))
    parts = [slice(first, first + batch_size) for first in range(0, len(prompts), batch_size)]
    return torch.cat([guided_chains(policy, prompts[part], reward, rngs[part], scale, recurrences,
                                    backward_steps, backward_rate)
                      for part in tqdm(parts, desc="guided sampling", leave=False, disable=None)])


def guided_chains(policy, prompts, reward, rngs, scale, recurrences, backward_steps, backward_rate):
    """The final latents of N images, one for each prompt and generator."""
    def loss(z_0):
        return -reward.with_gradient(policy.decode_with_gradient(z_0), prompts).sum()

    texts = [getattr(prompt, "text", prompt) for prompt in prompts]
    schedule, z = policy.schedule, noise(policy, rngs)
    for k in range(len(schedule.timesteps)):
        a, b, a_prev, b_prev = schedule.a[k], schedule.b[k], schedule.a[k + 1], schedule.b[k + 1]
        guides = bool(a > 0)  # pure noise, at which a flow begins, says nothing of the image
        for passes_left in reversed(range(recurrences if guides else 1)):
            z_0, e = guided_prediction(policy, z, k, texts, loss, scale * guides, backward_steps * guides,
                                       backward_rate)
            z = z_prev = a_prev * z_0 + b_prev * e
            if passes_left:
                again = (b**2 - (a * b_prev / a_prev) ** 2).clamp(min=0).sqrt()
                z = a / a_prev * z_prev + again * noise(policy, rngs)
    if not z.isfinite().all():
        raise FloatingPointError("a latent is not finite: try a smaller scale")
    return z


def guided_prediction(policy, z, k, texts, loss, scale, backward_steps, backward_rate):
    """The image and the noise in z = a x_0 + b eps (N, D...) of step k, moved to a smaller loss(z_0)."""
    schedule, a, b = policy.schedule, policy.schedule.a[k], policy.schedule.b[k]
    z.requires_grad_(scale > 0)
    with torch.set_grad_enabled(scale > 0):
        prediction = policy.predict(z, schedule.timesteps[k], texts)
        z_0, e = x_0_and_eps(z, prediction, a, b, schedule.prediction_type)
        if scale:
            e = e + scale * b * gradient(loss(z_0), z, policy.precision)
            z_0 = (z - b * e) / a
    z_0, e, shift = z_0.detach(), e.detach(), torch.zeros_like(z_0)
    for _ in range(backward_steps):
        step = gradient(loss(z_0 + shift.requires_grad_()), shift, policy.precision)
        shift = shift.detach() - backward_rate * step
    return z_0 + shift, e - a / b * shift


def gradient(loss, z, precision):
    """The gradient of the loss with respect to z. FloatingPointError if it is not finite."""
    grow = FP16_SCALE if precision == "fp16" else 1
    result, = torch.autograd.grad(grow * loss, z)
    if not result.isfinite().all():
        raise FloatingPointError("the reward's gradient is not finite; in fp16 try --precision bf16 or fp32")
    return result / grow
