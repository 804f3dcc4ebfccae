"""The judge of the bundled toy model's images: is the animal right, and is the number?

    # the emoji preset does this by itself
    python train.py --watch emoji/judge.py:animal --watch emoji/judge.py:number

It is a small convolutional network with two outputs: which of 75 animals, and how many (1 to 4). pretrain.py
trained it on drawn scenes alone. Its weights are judge.safetensors. It never trains a policy. It is watched.
It is no independent eye: it learned from the same scenes as the models, and names melted animals, too.
"""
import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from prompts import with_number

HERE = Path(__file__).resolve().parent
TABLE = json.loads((HERE / "animals.json").read_text(encoding="utf-8"))
EMOJI = {**TABLE["common_animals"], **TABLE["unseen_animals"]}  # animal -> its emoji
ANIMALS = list(EMOJI)  # class k of the first output
SIZE = 64  # pixels
MAX_NUMBER = 4  # class k of the second output means k + 1 animals
# What a prompt asks for: "cat", "a cat" -> (cat, 1); "two cats" -> (cat, 2).
MEANINGS = {animal: (animal, 1) for animal in ANIMALS} | {
    with_number(animal, count): (animal, count) for animal in ANIMALS for count in range(1, MAX_NUMBER + 1)}
WEIGHTS = HERE / "judge.safetensors"


# ---- The watched rewards ----

def animal(images, prompts):
    """1 where the image shows the animal that the prompt asks for, 0 where it does not.

    NaN where the judge cannot tell.
    """
    return marks(images, prompts, lambda seen, asked: seen[0] == asked[0])


def number(images, prompts):
    """1 where the image shows as many animals as the prompt asks for, 0 where it does not.

    NaN where the judge cannot tell.
    """
    return marks(images, prompts, lambda seen, asked: seen[1] == asked[1])


def animal_and_number(images, prompts):
    """1 where both are right."""
    return marks(images, prompts, lambda seen, asked: seen == asked)


animal.unit = number.unit = animal_and_number.unit = "%"


def marks(images, prompts, is_right):
    """1, 0 or NaN for each of B images (B, 3, H, W) and texts.

    is_right(seen, asked) compares two (animal, number).
    """
    if images.shape[-2:] != (SIZE, SIZE):
        return [float("nan")] * len(prompts)
    seen = name_animals(load_judge(), images)
    return [float(is_right(one, MEANINGS[text])) if text in MEANINGS else float("nan")
            for one, text in zip(seen, prompts)]


# ---- The network ----

class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [0, 1] -> logits of the animal (B, 75) and of the number (B, 4)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(         # (B,   3, 64, 64)
            conv(3, 32, 2), conv(32, 32, 1),   # (B,  32, 32, 32)
            conv(32, 64, 2), conv(64, 64, 1),  # (B,  64, 16, 16)
            conv(64, 128, 2), conv(128, 128, 1), conv(128, 128, 1))  # (B, 128, 8, 8)
        self.animal = nn.Linear(256, len(ANIMALS))
        self.number = nn.Linear(256, MAX_NUMBER)

    def pooled(self, images):
        """The features (B, 256) from which both outputs are read."""
        features = self.features(images - 0.5)
        # The maximum finds the animal wherever it stands. Counting needs the mean.
        return torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1)

    def forward(self, images):
        pooled = self.pooled(images)
        return self.animal(pooled), self.number(pooled)


def conv(inputs, outputs, stride):
    """A 3 x 3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@functools.cache
def load_judge(path=WEIGHTS, device="cpu"):
    """The judge with the weights of that file, in eval mode, fp32."""
    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return judge.eval().to(device)


@torch.no_grad()
def name_animals(judge, images):
    """What the judge sees in images (B, 3, 64, 64), float in [0, 1]: B pairs (animal, number)."""
    device = next(judge.parameters()).device
    animals, numbers = judge(images.to(device, torch.float32))
    return [(ANIMALS[k], n + 1) for k, n in zip(animals.argmax(1).tolist(), numbers.argmax(1).tolist())]
