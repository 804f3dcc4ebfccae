"""The card that a trained model has for the hub."""
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from conftest import run, tiny_flags


@pytest.mark.parametrize("rank", [0, 2], ids=["weights", "lora"])
def test_a_card_says_what_was_trained_and_its_lines_draw_an_image(rank, tiny_model, own_reward):
    rows = run(*tiny_flags(tiny_model, watch=own_reward("is_cat"), **{"lora-rank": rank, "sd-guidance": 3}))
    folder = Path("runs/r/model").resolve()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert {"ddpo-is", "reinforcement-learning"} <= set(card.data.tags)
    assert card.data.base_model is None and ("lora" in card.data.tags) == bool(rank)  # a folder has none
    before, after = (f"{-row['eval_reward_mean']:.2f} kB" for row in (rows[0], rows[-1]))
    assert f"| compressibility | {before} | {after} |" in card.text
    assert "| is_cat (measured, not trained on) | 100 %" in card.text
    assert " 8 judged images" in card.text and ("--merge" in card.text) == bool(rank)
    code = "\n".join(re.findall("^    (.*)$", card.text, re.MULTILINE)).replace("NAME", str(folder))
    code = code.replace("BASE", str(tiny_model))
    assert len(code.splitlines()) == 3 + bool(rank)
    exec(code, {})
    assert Image.open("image.png").size[0] > 1
