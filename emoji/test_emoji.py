"""The embedded model, its judge and its VLM: they do what their cards say."""
IMPORTS


def test_the_embedded_model_draws_with_plain_diffusers():
    pipeline = StableDiffusionPipeline.from_pretrained(EMOJI)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a frog", "two pandas"], num_inference_steps=10, eta=1.0, guidance_scale=5.0, generator=rng(),
                      output_type="np").images
    assert images.shape == (2, 64, 64, 3) and images.std() > 0.05
    assert sum(f.stat().st_size for f in EMOJI.rglob("*") if f.is_file()) < 12e6


def test_the_embedded_vlm_says_what_the_embedded_model_drew():
    config = settings.build_config({"reward": "alignment", "guidance_scale": 5.0, "sampling_steps": 10, "eval_prompts": 27})
    chosen, images = train.draw_fixed(train.policy_of(config), prompts.load_prompts(config.prompts), config)
    reward = train.reward_of(config)
    values, answers = reward(images, chosen)
    assert sum(answer == prompt.text for answer, prompt in zip(answers, chosen)) >= 24
    others, same_answers = reward(images, chosen[13:] + chosen[:13])  # other animals, in other numbers
    assert values.mean() > 0.95 > others.mean() + 0.2 and same_answers == answers  # it does not see the prompt
    marks, notes = train.reward_of(evaluate.with_reward(config, "counting", SimpleNamespace(
        **dict.fromkeys(settings.REWARD_OWNERS))))(images, chosen)
    assert marks.mean() > 0.9 and all(note.split(" / ")[0] in prompts.NUMBER_WORDS for note in notes)
    assert sum(f.stat().st_size for f in EMOJI_VLM.rglob("*") if f.is_file()) < 8e6


def test_the_check_uses_the_presets_steps_and_guidance():
    args = pretrain.parse([])
    config = settings.build_config({})
    assert (args.sampling_steps, args.guidance_scale) == (config.sampling_steps, config.guidance_scale)


def test_the_judge_marks_animal_and_number_and_knows_which_prompts_it_can_judge(monkeypatch):
    monkeypatch.setattr(judge, "name_animals", lambda network, images: (["cat", "mouse", "owl"], [2, 3, 1]))
    images = torch.rand(3, 3, 64, 64)
    assert judge.right_animals(images, ["two cats", "two mice", "a bee"]) == ([True, True, False], [True, False, True])
    assert judge.shares_right(images, ["two cats"] * 3) == {"eval_named": 1 / 3, "eval_counted": 1 / 3}
    cannot = {"eval_named": None, "eval_counted": None}
    assert judge.shares_right(images, ["five cats"] * 3) == judge.shares_right(images[:, :, :32], ["a cat"] * 3) == cannot
    before, after = ([True, True, False], [True, False, False]), ([True, False, True], [True, True, True])
    assert evaluate.judged([before, after]) == ["2 of 3", "1 (50%)", "1 -> 3", "1 -> 2"]
    assert evaluate.judged([(None, None)] * 2) == ["-"] * 4
