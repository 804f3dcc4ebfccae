"""A reward of random numbers: what training changes when there is nothing to learn. The control of the alignment study.

    python train.py --reward studies/noise.py:noise
"""
import torch


def noise(images, prompts):
    """A number of mean 0 and deviation 1 for each image, whatever it shows. images (B, 3, H, W); returns (B,)."""
    return torch.randn(len(images))  # of the global generator, whose state a run saves
