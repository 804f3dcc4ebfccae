"""The reward ocr, with its real networks if they are installed."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from beyond import ocr
from prompts import Prompt, load_prompts
from rewards import load_reward


def written(text, size, place, shape=(512, 512)):
    """An image (3, H, W) with that text on it."""
    image = Image.new("RGB", shape[::-1], "white")
    ImageDraw.Draw(image).text(place, text, fill="black", font_size=size)
    return torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255


def test_the_share_of_a_text_by_hand_made_cases():
    share = ocr.share_read
    assert share("Open Late", "OPENLATE now") == 1.0  # spaces, case and what is around do not count
    assert share("open", "opan") == share("open", "opn") == share("open", "oplen") == 0.75
    assert share("open", "") == share("open", "opan now") == 0.0 and np.isnan(share("", "open"))
    for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "")):
        assert ocr.edit_distance(*pair) == 3
    asked = [Prompt('A sign that says "No Swimming"'), Prompt("A “soft” quote"), Prompt("A sign"),
             Prompt('A sign that says "a"', metadata={"text": "B"})]
    assert [ocr.text_of(prompt) for prompt in asked] == ["No Swimming", "soft", "", "B"]
    assert all(ocr.text_of(prompt) for prompt in load_prompts("signs")) and len(load_prompts("signs")) == 100


def test_words_are_read_in_several_sizes_and_places_and_a_wrong_letter_costs_its_share():
    pytest.importorskip("rapidocr", reason="pip install rapidocr onnxruntime")
    reward = load_reward("ocr")
    cases = [("Hello World", 24, (40, 30)), ("Hello World", 60, (60, 400)), ("Night Express", 40, (150, 220)),
             ("Last Call", 90, (30, 200)), ("Laser in Use", 16, (300, 480))]
    images = torch.stack([written(*case) for case in cases])
    values, notes = reward(images, [Prompt(f'a sign that says "{text}"') for text, *_ in cases])
    assert values.tolist() == [1.0] * len(cases), notes
    near, _ = reward(images[:1], [Prompt('a sign that says "Hallo World"')])
    assert near.tolist() == pytest.approx([0.9])  # one of ten letters
    noise = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    assert reward(noise, [Prompt('a sign that says "Hello World"')])[0].tolist() == [0.0]
    with pytest.raises(ValueError, match="nan"):
        reward(noise, [Prompt("a sign")])


def test_without_its_packages_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match="pip install rapidocr onnxruntime"):
        load_reward("ocr")
