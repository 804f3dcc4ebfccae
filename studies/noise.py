"""Random numbers as a reward: what training changes when there is nothing to learn. A control of compare.py.

    python train.py --reward studies/noise.py:noise
"""
import torch


def noise(images, prompts):
    """A number of mean 0 and deviation 1 for each of B images, whatever it shows: (B,)."""
    return torch.randn(len(images))  # of the global generator, which a run seeds from its seed and the epoch
