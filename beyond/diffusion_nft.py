"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): a newer method than the paper, in the shape of RWR.

Where we depart from its paper:
 1. It samples and trains without guidance. Ours has the policy's guidance (or --training-guidance) in both
    predictions; --guidance-scale 1 is the paper's.
 2. Its v_old is a moving average of the policy. Ours is the policy that drew the epoch's images.
 3. Its code divides each squared error by the mean absolute error. Ours are plain.
"""
import torch

from baselines_rwr import fine_tune


def nft_preferences(advantages):
    """Advantages (B,) -> r (B,) in [0, 1]: 1/2 for an average image, 0 or 1 one deviation away or more."""
    return (1 + advantages.clamp(-1, 1)) / 2


def nft_loss(prediction, old_prediction, target, preferences, strength):
    """Three (N, D...) and r (N,) -> scalar loss, info: DiffusionNFT's (Zheng et al. 2025).

    A good image pulls v+ = v_old + b (v - v_old) towards its target, a bad one v- = v_old - b (v - v_old). b
    is the strength. At v = v_old the gradient is 2 b (2 r - 1) (v_old - target): an average image, with
    r = 1/2, changes nothing. RWR, which has positive weights alone, re-trains the policy on it.
    """
    change = strength * (prediction - old_prediction)
    errors = (old_prediction + sign * change - target for sign in (1, -1))
    positive, negative = ((error**2).flatten(1).mean(1) for error in errors)
    loss = (preferences * positive + (1 - preferences) * negative).mean()
    return loss, {"denoising_error": ((prediction.detach() - target) ** 2).mean()}


def nft_update(policy, trajectory, advantages, learner, rng, config):
    """One epoch of DiffusionNFT, as rwr_update. advantages: (B,). Also read: config.nft_strength."""
    preferences = nft_preferences(advantages).to(policy.device)
    old = policy.weights()  # v_old: a copy of what trains

    def loss_of(policy, images, noised, target):
        with torch.no_grad(), policy.with_weights(old):
            old_prediction = policy.predict(*noised)
        return nft_loss(policy.predict(*noised), old_prediction, target, preferences[images],
                        config.nft_strength)

    return fine_tune(policy, trajectory, torch.arange(len(preferences)), learner, rng, config, loss_of)
