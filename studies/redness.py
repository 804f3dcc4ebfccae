"""A reward with a gradient that a person can see: how red an image is.

Why this one: every pixel has a gradient, no network computes it that could be fooled, and an image can turn
red while its animal stays.

    python train.py --reward studies/redness.py:redness --stop-below animal=90%
"""


def redness(images, prompts):
    """(B, 3, H, W) in [0, 1] -> (B,): red less the mean of green and blue, averaged over pixels; -1 to 1."""
    red, green, blue = images.unbind(1)
    return (red - (green + blue) / 2).mean((1, 2))


redness.differentiable = True  # for studies/guidance.py
