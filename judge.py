"""The independent judge of the embedded model's pictures: which of the 75 animals, and how many (1 to 4).

A small convolutional network with two outputs, trained by pretrain.py on drawn scenes alone and shipped as
assets/emoji_judge.safetensors. It never trains a policy: it is what tells whether a reward was earned or gamed.
"""
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from prompts import COMMON_ANIMALS, UNSEEN_ANIMALS, counted

ANIMALS = COMMON_ANIMALS + UNSEEN_ANIMALS  # class k of the first output
SIZE = 64  # pixels
MAX_NUMBER = 4  # the second output's class k means k + 1 animals
ASKED = {counted(animal, number): (animal, number) for animal in ANIMALS for number in range(1, MAX_NUMBER + 1)}  # "two cats"
WEIGHTS = Path(__file__).parent / "assets" / "emoji_judge.safetensors"


def _conv(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [0, 1] -> logits of the animal (B, 75) and of the number (B, 4)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(           # (B,   3, 64, 64)
            _conv(3, 32, 2), _conv(32, 32, 1),   # (B,  32, 32, 32)
            _conv(32, 64, 2), _conv(64, 64, 1),  # (B,  64, 16, 16)
            _conv(64, 128, 2), _conv(128, 128, 1), _conv(128, 128, 1))  # (B, 128, 8, 8)
        self.animal = nn.Linear(256, len(ANIMALS))
        self.number = nn.Linear(256, MAX_NUMBER)

    def forward(self, images):
        features = self.features(images - 0.5)
        # The maximum finds the animal wherever it stands; the mean is what counting needs.
        pooled = torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1)
        return self.animal(pooled), self.number(pooled)


def load_judge(path=WEIGHTS, device="cpu"):
    """The shipped judge, in evaluation mode, fp32."""
    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return judge.eval().to(device)


@torch.no_grad()
def name_animals(judge, images):
    """What the judge sees in images (B, 3, 64, 64), float in [0, 1]: a list of B animals and a list of B numbers."""
    device = next(judge.parameters()).device
    animals, numbers = judge(images.to(device, torch.float32))
    return [ANIMALS[k] for k in animals.argmax(1).tolist()], (numbers.argmax(1) + 1).tolist()


def right_animals(images, texts):
    """Whether the judge names, in each of B images (B, 3, 64, 64), the animal that the texts, "a cat" or "two cats", ask for,
    and whether it counts as many: B bools each.

    (None, None) where it cannot tell: pictures of another size, or another prompt among them.
    """
    if images.shape[-2:] != (SIZE, SIZE) or not all(text in ASKED for text in texts):
        return None, None
    asked = [ASKED[text] for text in texts]
    named, numbers = name_animals(load_judge(), images)
    return ([name == animal for name, (animal, _) in zip(named, asked)],
            [count == number for count, (_, number) in zip(numbers, asked)])


def shares_right(images, texts):
    """For the log: the shares of pictures with the right animal and with the right number; None where it cannot tell."""
    return {name: None if right is None else sum(right) / len(right)
            for name, right in zip(("eval_named", "eval_counted"), right_animals(images, texts))}
