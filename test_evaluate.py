"""evaluate.py: before and after, on any prompts and rewards."""
IMPORTS


def test_evaluate_compares_two_models_on_the_same_prompts_and_noise(tiny_model, tiny_policy, tiny_clip, capsys):
    assert train.main(tiny_flags(tiny_model, name="r", epochs=1)) == 0
    capsys.readouterr()
    ask = ["--prompts", "unseen_emoji_animals", "--images", "6"]
    assert evaluate.main(["runs/r", *ask, "--reward", "compressibility", "--reward", "incompressibility"]) == 0
    header, _, small, large = [row.split(" | ") for row in capsys.readouterr().out.splitlines()]
    assert small[1:4] == ["compressibility", "unseen_emoji_animals", "6"] and small[4:6] == large[4:6]
    assert "±" in small[6] and int(small[7][:-1]) + int(large[7][:-1]) <= 101 and Path("runs/r/before_after.png").exists()
    shutil.copytree(tiny_model, "same")  # no run, a model: against the preset's, here the same
    config = settings.build_config({"model": str(tiny_model), "sampling_steps": 4, "eval_prompts": 6})
    images = [train.draw_fixed(train.policy_of(config, model), prompts.load_prompts("objects"), config)[1]
              for model in (None, "same")]
    assert torch.equal(*images)
    assert evaluate.main(["runs/r", *ask, "--eta", "0", "--sampling-steps", "3", "--clip", str(tiny_clip)]) == 0
    told = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert 0 < float(told[-2]) < 2


def test_a_rewards_options_are_those_asked_for_or_the_runs_or_the_presets():
    flags = dict.fromkeys(settings.REWARD_OWNERS)
    run = settings.build_config({"reward": "alignment", "bert_baseline": 0.5})
    assert evaluate.with_reward(run, "alignment", SimpleNamespace(**flags)).bert_baseline == 0.5
    other = evaluate.with_reward(settings.build_config({}), "alignment", SimpleNamespace(**flags))
    assert (other.reward_model, other.wording, other.bert_model) == (str(EMOJI_VLM), "paper", str(EMOJI))
    asked = evaluate.with_reward(run, "counting", SimpleNamespace(**{**flags, "reward_model": "x", "bert_baseline": 0.1}))
    assert (asked.reward_model, asked.bert_baseline, asked.bert_model) == ("x", 0.0, "")  # counting reads no BERTScore
    paper = settings.build_config({"preset": "paper", "precision": "fp32"})
    assert evaluate.with_reward(paper, "alignment", SimpleNamespace(**flags)).reward_model == ""


def test_variety_and_gain_by_hand_made_cases(tiny_clip):
    images = torch.stack([torch.zeros(3, 40, 40), torch.ones(3, 40, 40), torch.ones(3, 40, 40)])
    assert evaluate.variety(images, None) == pytest.approx(2 / 3)  # distances 1, 1 and 0
    clip = models.load_clip(str(tiny_clip), "cpu", "CLIP")
    x, y, _ = (models.image_embeddings(clip[1], models.clip_pixels(clip[0], images)))
    assert evaluate.variety(images, clip) == pytest.approx(2 / 3 * (1 - torch.cosine_similarity(x, y, dim=0).item()), abs=1e-5)
    before, after = torch.tensor([-2.0, -3.0]), torch.tensor([-1.0, -2.0])
    assert evaluate.with_interval("compressibility", before) == "2.50 ± 0.98 kB"  # 1.96 sqrt(1/2) / sqrt(2)
    assert evaluate.gain("compressibility", before, after) == "-1.00 ± 0 kB (+40%)"  # smaller, which is what is rewarded
    assert evaluate.gain("counting", torch.zeros(4), torch.tensor([0.0, 1.0, 0.0, 1.0])) == "0.5 ± 0.57"
    assert evaluate.with_interval("aesthetic", torch.tensor([5.0])) == "5"


@pytest.mark.parametrize("flags, message", [
    (["runs/nothing"], "it is neither a folder here nor reachable"), (["runs/r", "--images", "0"], "--images 0: must be"),
    (["runs/r", "--prompts", "nothing"], "no prompts 'nothing'"), (["runs/r", "--reward", "beauty"], "no reward 'beauty'"),
    (["runs/r", "--reward", "counting"], "choose --prompts two_to_eight_animals"), (["runs/r"], "has no model/ yet")])
def test_evaluate_answers_a_mistake_in_one_line(flags, message, tiny_model, capsys):
    runs.create_run(train.RUNS, "r", "", asdict(settings.build_config({"model": str(tiny_model)})))
    if len(flags) > 1:
        shutil.copytree(tiny_model, "runs/r/model")
    assert evaluate.main(flags) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and len(told) == 1
