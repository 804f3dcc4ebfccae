"""The toy model, its judge and its VLM: they do what their cards say."""
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import prompts
import train
from conftest import EMOJI, EMOJI_FLOW, EMOJI_VLM, rng
from emoji import judge
from rewards import load_reward
from support.settings import build_config, reward_options


@pytest.mark.parametrize("model", [EMOJI, EMOJI_FLOW], ids=["diffusion", "flow"])
def test_the_toy_models_draw_what_they_are_asked_with_plain_diffusers(model):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    asked = [(name, 1) for name in judge.ANIMALS[::3]]
    asked += [(name, 2 + k % 3) for k, name in enumerate(judge.ANIMALS[1::8])]
    images = pipeline([prompts.with_number(*pair) for pair in asked], num_inference_steps=10, eta=1.0,
                      guidance_scale=3.0, generator=rng(), output_type="pt").images
    seen = judge.name_animals(judge.load_judge(judge.WEIGHTS), images)
    right = np.array([[one == other for one, other in zip(pair, said)] for pair, said in zip(asked, seen)])
    assert images.shape == (35, 3, 64, 64) and (right.mean(0) >= 0.95).all()
    assert sum(file.stat().st_size for file in model.rglob("*")) < 12e6


def test_the_vlm_and_the_judge_see_what_the_toy_model_drew():
    config = build_config(dict(reward="alignment", guidance_scale=5.0, sampling_steps=10, eval_prompts=27))
    chosen, images = train.draw_fixed(train.load_policy(config), prompts.load_prompts(config.prompts), config)

    alignment, counting, animal, number = (load_reward(name, **reward_options(config, name))
                                           for name in ("alignment", "counting", *config.watch))
    shifted = chosen[13:] + chosen[:13]  # other animals, in other numbers
    (values, answers), (others, same_answers) = (alignment(images, asked) for asked in (chosen, shifted))
    assert values.mean() > 0.95 > others.mean() + 0.2
    assert same_answers == answers  # the VLM does not see the prompt
    assert sum(answer == prompt.text for answer, prompt in zip(answers, chosen)) >= 24
    marks, notes = counting(images, chosen)
    assert marks.mean() > 0.9 and all(note.split(" / ")[0] in prompts.NUMBER_WORDS for note in notes)
    for right in (animal(images, chosen)[0], number(images, chosen)[0], 1 - animal(images, shifted)[0]):
        assert right.mean() > 0.9 and {*right.tolist()} <= {0, 1}
    assert sum(file.stat().st_size for file in EMOJI_VLM.iterdir()) < 8e6


def test_the_judge_marks_animal_and_number_and_knows_what_it_can_judge(monkeypatch):
    seen = [("cat", 2), ("mouse", 3), ("owl", 1), ("cat", 1)]
    monkeypatch.setattr(judge, "name_animals", lambda network, images: seen)
    images, texts = torch.rand(4, 3, 64, 64), ["two cats", "two mice", "five cats", "cat"]
    for function, want in ((judge.animal, "1.0 1.0 nan 1.0"), (judge.number, "1.0 0.0 nan 1.0"),
                           (judge.animal_and_number, "1.0 0.0 nan 1.0")):
        assert " ".join(map(str, function(images, texts))) == want and function.unit == "%"
    assert [str(mark) for mark in judge.animal(images[:, :, :32], texts)] == ["nan"] * 4
    assert judge.ANIMALS == prompts.COMMON_ANIMALS + prompts.UNSEEN_EMOJI_ANIMALS  # class k of its output
