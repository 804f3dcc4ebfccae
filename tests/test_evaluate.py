"""evaluate.py: before and after, on any prompts and rewards."""
import shutil
from pathlib import Path

import networks
import pytest
import settings
import torch

import evaluate
import prompts
import rewards
import runs
import train
from conftest import tiny_flags


def table(told):
    """The rows of a table in Markdown, less its head."""
    return [row.strip("| ").split(" | ") for row in told.splitlines()[2:]]


def test_evaluate_compares_two_models_on_the_same_prompts_and_noise(tiny_model, tiny_clip, own_reward, monkeypatch, capsys):
    watch = [own_reward("is_cat"), own_reward("brightness")]
    assert train.main(tiny_flags(tiny_model, reward=own_reward("redness"), epochs=1, watch=watch, **{"learning-rate": 1e-2})) == 0
    capsys.readouterr()
    assert evaluate.main(["runs/r"]) == 0  # on the run's own prompts it finds what the run's log says
    before, after = (rewards.display(row["eval_reward_mean"], (1, "")) for row in runs.read_rows(Path("runs/r")))
    cells = table(capsys.readouterr().out)[0]
    assert before != after and cells[4].startswith(f"{before} ±") and cells[5].startswith(f"{after} ±")
    ask = ["--prompts", "emoji_animals", "--images", "6"]
    assert evaluate.main(["runs/r", *ask, "--reward", own_reward("brightness")]) == 0
    assert [row[1] for row in table(capsys.readouterr().out)] == ["brightness", "is_cat"]  # each once
    assert evaluate.main(["runs/r", *ask, "--reward", "compressibility", "--reward", "incompressibility"]) == 0
    small, large, cat, brightness = table(capsys.readouterr().out)  # the watched rewards come after those that were asked for
    assert small[1:4] == ["compressibility", "emoji_animals", "6"] and small[4:6] == large[4:6]
    assert "±" in small[6] and int(small[7][:-1]) + int(large[7][:-1]) <= 101 and Path("runs/r/before_after.png").exists()
    assert cat[1] == "is_cat" and cat[4:8] == ["100 %", "100 %", "0 %", "0%"]  # of the one image that it can judge
    assert brightness[1] == "brightness" and brightness[4].endswith(" lux") and "%)" in brightness[6]
    shutil.copytree(tiny_model, "same")  # no run, a model: against the preset's, here the same
    config = settings.build_config({"model": str(tiny_model), "sampling_steps": 4, "eval_prompts": 6})
    images = [train.draw_fixed(train.policy_of(config, model), prompts.load_prompts("objects"), config)[1]
              for model in (None, "same")]
    assert torch.equal(*images)
    saved = Path("runs/r/config.json")  # a run that was compiled is drawn where there is no compiler
    saved.write_text(saved.read_text().replace('"compile": false', '"compile": true'))
    monkeypatch.setattr(settings.shutil, "which", lambda name: None)
    assert evaluate.main(["runs/r", *ask, "--eta", "0", "--sampling-steps", "3", "--clip", str(tiny_clip)]) == 0
    assert settings.load_config(Path("runs/r")).compile
    assert 0 < float(table(capsys.readouterr().out)[-1][-2]) < 2


def test_a_reward_that_can_judge_no_image_is_shown_as_a_dash(own_reward, capsys):
    values = torch.full((3,), float("nan"))
    assert evaluate.reward_cells(values, values, (100, "%")) == ["-"] * 4
    some = torch.tensor([1.0, float("nan"), 0.0])
    assert evaluate.reward_cells(some, torch.tensor([1.0, 1.0, float("nan")]), (100, "%")) == ["100 %", "100 %", "0 %", "0%"]


def test_a_rewards_options_are_those_asked_for_or_the_runs_or_the_presets(monkeypatch):
    monkeypatch.setattr(evaluate, "load_reward", lambda name, device, nan_allowed, **options: (nan_allowed, options))
    run = settings.build_config({"reward": "alignment", "bert_baseline": 0.5})
    loaded, asked = {}, {"bert_baseline": 0.1}
    for given, baseline in (({}, 0.5), (asked, 0.1)):
        nan_allowed, options = evaluate.reward_for(run, "alignment", given, loaded)
        assert nan_allowed and options["bert_baseline"] == baseline
    assert "bert_baseline" not in evaluate.reward_for(run, "counting", asked, loaded)[1]
    assert len(loaded) == 3 and evaluate.reward_for(run, "counting", asked, loaded) is loaded[list(loaded)[2]]  # loaded once


def test_variety_and_gain_by_hand_made_cases(tiny_clip):
    images = torch.stack([torch.zeros(3, 40, 40), torch.ones(3, 40, 40), torch.ones(3, 40, 40)])
    assert evaluate.variety(images, None) == pytest.approx(2 / 3)  # distances 1, 1 and 0
    clip = networks.load_clip(str(tiny_clip), "cpu", "CLIP")
    x, y, _ = (networks.image_embeddings(clip[1], networks.clip_pixels(clip[0], images)))
    assert evaluate.variety(images, clip) == pytest.approx(2 / 3 * (1 - torch.cosine_similarity(x, y, dim=0).item()), abs=1e-5)
    kilobytes = rewards.UNITS["compressibility"]
    before, after, change, improved = evaluate.reward_cells(torch.tensor([-2.0, -3.0]), torch.tensor([-1.0, -2.0]), kilobytes)
    assert (before, after) == ("2.50 ± 0.98 kB", "1.50 ± 0.98 kB")  # 1.96 sqrt(1/2) / sqrt(2)
    assert (change, improved) == ("-1.00 ± 0 kB (-40%)", "100%")  # smaller, which is what is rewarded
    shares = torch.zeros(4), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert evaluate.reward_cells(*shares, (100, "%"))[1:] == ["50 ± 57 %", "50 ± 57 %", "50%"]
    assert evaluate.reward_cells(*shares, (1, ""))[1:] == ["0.5 ± 0.57", "0.5 ± 0.57", "50%"]
    assert evaluate.with_interval(torch.tensor([5.0]), (1, "")) == "5"


@pytest.mark.parametrize("flags, message", [
    (["runs/nothing"], "model 'runs/nothing': "), (["runs/r", "--images", "0"], "--images 0: must be"),
    (["runs/r", "--sampling-steps", "0"], "--sampling-steps 0: must be"),
    (["runs/r", "--prompts", "nothing"], "no prompts 'nothing'"), (["runs/r", "--reward", "beauty"], "no reward 'beauty'"),
    (["runs/r", "--reward", "counting"], "choose --prompts two_to_eight_animals"), (["runs/r"], "has no model/ yet"),
    (["runs/r", "--bert-model", "x"], "--bert-model is read by alignment, not by compressibility"),
    (["runs/r", "runs/r", "--output", "x.png"], "--output is for one model")])
def test_evaluate_answers_a_mistake_in_one_line(flags, message, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = runs.create_run(train.RUNS, "r", "")
    runs.save_settings(folder, settings.saved_settings(folder, settings.build_config({"model": str(tiny_model)})))
    if len(flags) > 1:
        shutil.copytree(tiny_model, "runs/r/model")
    assert evaluate.main(flags) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and len(told) == 1
