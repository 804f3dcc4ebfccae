"""Rewards: images and prompts in, numbers out. They know nothing of the policy.

The contract, for every reward here and for your own:

    reward(images, prompts) -> values                or (values, notes)

    images   (B, 3, H, W) float32 in [0, 1], on the policy's device; any B
    prompts  B prompts.Prompt for the rewards of this file; B texts for a function of your own
    values   B numbers, higher is better; anything that torch.as_tensor takes
    notes    B strings, say what a judge answered: logged, and drawn under the pictures

To add one, write the function and name it in `REWARDS`.
"""
import importlib.util
import io
from pathlib import Path

import torch
from PIL import Image


class RewardError(Exception):
    """A reward broke the contract or failed; the message says how. The run stops, its state saved."""


def compressibility(images, prompts):
    """Minus the size of the image as a JPEG, in kB of 1,000 bytes (paper, section 5.1). About 0.1 ms for 64 x 64 pixels."""
    return [-jpeg_kilobytes(image) for image in images]


def incompressibility(images, prompts):
    """The size of the image as a JPEG, in kB of 1,000 bytes (paper, section 5.1)."""
    return [jpeg_kilobytes(image) for image in images]


def jpeg_kilobytes(image):
    """Size of one image (3, H, W) in [0, 1] as a JPEG, headers included.

    The recipe, of which each part moves the number: round (not truncate) to 8 bits; Pillow's encoder at quality 95, its
    default 4:2:0 chroma subsampling, default Huffman tables (no optimize), baseline (not progressive).
    """
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=95)
    return file.tell() / 1000


def to_pil(image):
    """(3, H, W) float in [0, 1] -> 8-bit RGB picture."""
    return Image.fromarray((image.float().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility}  # the next reward goes here
DEFAULT_PROMPTS = {"compressibility": "imagenet_animals", "incompressibility": "imagenet_animals"}  # the paper's
UNITS = {"compressibility": (-1, "kB"), "incompressibility": (1, "kB")}  # how a person reads the number: factor, unit


def display(name, value):
    """A reward as a person reads it: '1.72 kB' for a compressibility of -1.72."""
    factor, unit = UNITS.get(name, (1, ""))
    return f"{factor * value:.2f} {unit}" if unit else f"{value:.3g}"


def load_reward(name):
    """The function of a reward in REWARDS, or of 'path/to/file.py:function'. Raises ValueError if neither.

    What it returns fulfils the contract in full: (values (B,) float32 on the CPU, list of B notes), or raises RewardError.
    """
    if name in REWARDS:
        return _checked(REWARDS[name], name)
    path, _, function = name.rpartition(":")
    if not path:
        raise ValueError(f"no reward {name!r}: choose {', '.join(REWARDS)}, or your own as path/to/file.py:function")
    own = _load_function(Path(path), function)
    return _checked(lambda images, prompts: own(images, [prompt.text for prompt in prompts]), name)


def _load_function(path, function):
    if not path.is_file():
        raise ValueError(f"no reward file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ValueError(f"the reward file {str(path)!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"the reward file {str(path)!r} cannot be loaded: {_one_line(error)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"the reward file {str(path)!r} has no function {function!r}")
    return getattr(module, function)


def _checked(reward, name):
    def checked(images, prompts):
        try:
            result = reward(images, prompts)
        except Exception as error:
            raise RewardError(f"the reward {name} failed: {_one_line(error)}") from error
        has_notes = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], (list, tuple))
        values, notes = result if has_notes else (result, [""] * len(images))
        try:
            values = torch.as_tensor(values).detach().to("cpu", torch.float32)
        except Exception as error:
            raise RewardError(f"the reward {name} returned {type(values).__name__}, not numbers") from error
        if values.shape != (len(images),):
            raise RewardError(f"the reward {name} returned shape {tuple(values.shape)} for {len(images)} images; "
                              f"({len(images)},) was expected")
        if not values.isfinite().all():
            bad = (~values.isfinite()).nonzero()[0].item()
            raise RewardError(f"the reward {name} returned {values[bad].item()} for image {bad} "
                              f"({prompts[bad].text!r})")
        if len(notes) != len(images):
            raise RewardError(f"the reward {name} returned {len(notes)} notes for {len(images)} images")
        return values, [str(note) for note in notes]

    return checked


def _one_line(error):
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
