"""Settings: what the rules choose, what a flag overrides, what is refused."""
import inspect

import pytest

import prompts
import rewards
import sampling
import train
from conftest import EMOJI, EMOJI_VLM, ROOT
from support import loading, settings
from support.settings import Config, build_config, parse


def paper(**flags):
    return build_config({"preset": "paper", "precision": "fp32", **flags})


def test_the_paper_preset_is_the_papers_tables():
    """Appendix D.1, D.2 and D.5; buffer, minimum count and advantage clip as in the authors' code."""
    c = paper()
    assert (c.model, c.sampling_steps, c.eta, c.sd_guidance) == ("CompVis/stable-diffusion-v1-4", 50, 1, 5)
    assert (c.learning_rate, c.clip_range, c.weight_decay, c.max_grad_norm) == (1e-5, 1e-4, 1e-4, 1)
    assert (c.adam_beta1, c.adam_beta2, c.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (c.samples_per_epoch, c.updates_per_epoch, c.skip_last_steps, c.kl_weight) == (256, 4, 0, 0)
    assert (c.stats_buffer, c.stats_min_count, c.advantage_clip) == (32, 16, 10)
    assert c.epochs * c.samples_per_epoch == pytest.approx(50_000, rel=0.01)
    for reward, prompt_set in (("aesthetic", "common_animals"), ("alignment", "animal_activities"),
                               ("imagereward", "dpok"), ("counting", "two_to_eight_animals"),
                               ("incompressibility", "imagenet_animals")):
        assert paper(reward=reward).prompts == prompt_set
    assert paper(algorithm="ddpo-sf").updates_per_epoch == 1
    for algorithm in settings.RWR:
        rwr = paper(algorithm=algorithm)
        assert (rwr.samples_per_epoch, rwr.updates_per_epoch, rwr.batch_size) == (10_000, 400, 128)
        assert (rwr.beta, rwr.percentile, rwr.training_guidance) == (0.2, 0.9, 0)


@pytest.mark.parametrize("asked, expected", [
    ({}, dict(epochs=8, learning_rate=2e-4, clip_range=2e-3, skip_last_steps=2, images_per_prompt=8,
              sd_guidance=3)),
    (dict(lora_rank=4), dict(learning_rate=3e-3, epochs=8)),
    (dict(lora_rank=4, learning_rate=1e-3), dict(learning_rate=1e-3)),
    (dict(algorithm="ddpo-sf"), dict(epochs=32, samples_per_epoch=16, updates_per_epoch=1,
                                     learning_rate=1e-4)),
    (dict(algorithm="rwr"), dict(epochs=4, samples_per_epoch=128, beta=60, training_guidance=1.4)),
    # The rule's goes with its guidance
    (dict(algorithm="rwr", guidance_scale=2.0), dict(training_guidance=0)),
    (dict(algorithm="nft"), dict(updates_per_epoch=10, batch_size=32, learning_rate=1e-4)),
    (dict(reward="alignment"), dict(sampling_steps=4, epochs=12, wording="paper", sd_guidance=1,
                                    eval_prompts=135)),
    (dict(reward="counting", algorithm="rwr-sparse"), dict(samples_per_epoch=768, learning_rate=2e-4)),
    (dict(reward="counting", algorithm="nft"), dict(epochs=4, updates_per_epoch=120, learning_rate=3e-4)),
    (dict(preset="lora"), dict(lora_rank=4, learning_rate=3e-4,
                               model="stable-diffusion-v1-5/stable-diffusion-v1-5")),
    (dict(preset="sdxl"), dict(lora_rank=32, stats_buffer=1, images_per_prompt=8, eval_steps=40)),
    (dict(preset="flow"), dict(lora_alpha=64, images_per_prompt=24, sampling_steps=10, height=512,
                               eval_steps=40))],
    ids=str)
def test_a_flag_stands_above_a_later_rule_above_an_earlier_one_above_the_paper(asked, expected):
    config = build_config({"precision": "fp32", **asked})
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_watched_reward_finds_its_options_as_a_trained_one_does():
    def options(name, **flags):
        return settings.reward_options(build_config({"precision": "fp32", **flags}), name)

    toy = {"reward_model": str(EMOJI_VLM), "wording": "paper", "bert_model": str(EMOJI), "bert_baseline": 0.0}
    assert options("alignment", reward="alignment") == options("alignment", watch=["alignment"]) == toy
    assert options("alignment") == toy  # neither trained nor watched, as in evaluate.py: the rules'
    assert options("alignment", watch=["alignment"], wording="code") == {**toy, "wording": "code"}
    assert options("alignment", preset="paper")["reward_model"] == ""
    assert options("pickscore", reward="aesthetic", watch=["pickscore"],
                   reward_model="x") == {"reward_model": "x"}


def test_watch_stands_for_all_that_the_rules_watch():
    animal, number = (f"{ROOT / 'emoji' / 'judge.py'}:{name}" for name in ("animal", "number"))
    assert build_config({}).watch == (animal, number) and paper().watch == ()
    assert build_config({"reward": animal}).watch == (number,)  # what is trained is not watched
    assert build_config(parse(["--watch", "pickscore", "--watch", animal], "")).watch == ("pickscore", animal)
    assert build_config({"watch": ["none"]}).watch == ()


def test_the_choices_of_the_settings_are_the_tables_of_the_code():
    def choices(name):
        return set(Config.__dataclass_fields__[name].metadata["choices"])

    assert choices("noise") == set(sampling.NOISES) and choices("precision") == set(loading.PRECISIONS)
    assert choices("algorithm") == set(train.ALGORITHMS)
    assert choices("wording") == set(rewards.Alignment.WORDINGS)
    assert set(settings.LEARNED) == set(rewards.LEARNED)
    for name, kind in rewards.LEARNED.items():
        assert settings.options_of(name) == list(inspect.signature(kind).parameters)[1:]
    assert {what["prompts"] for _, what in settings.RULES if "prompts" in what} <= set(prompts.PROMPT_SETS)


@pytest.mark.parametrize("flags, told", [
    ("--algorithm rwr --clip-range 1", "--clip-range is read by ddpo-is, not by rwr"),
    ("--bert-model x", "--bert-model is read by alignment alone"), ("--clip-range -1", "must be above 0"),
    ("--learn-steps 9", "too few to learn from"), ("--skip-last-steps 10", "too few to learn from"),
    ("--samples-per-epoch 60", "does not divide"), ("--updates-per-epoch 3", "equal shares"),
    ("--algorithm ddpo-sf --updates-per-epoch 2", "ddpo-sf takes one"), ("--percentile 1", "not by ddpo-is"),
    ("--images-per-prompt 1", "compares an image with itself"),
                                         ("--stats-min-count 9", "more than --stats-buffer"),
    ("--precision fp16 --device cpu", "needs a GPU"),
                                         ("--precision bf16 --compile --device cpu", "outer level"),
    ("--noise x", "invalid choice"), ("--device tpu", "--device tpu"),
                                         ("--call []x", "must be a JSON object"),
    ("--height 64 --call {\"height\":64}", "both say height"), ("--lora-alpha 4", "goes with --lora-rank"),
    ("--name a/b", "must be a plain name"), ("--watch none --stop-below animal=0.9", "of a watched reward"),
    ("--stop-below animal", "must be as animal=0.9"), ("--reward x", "no reward 'x'"),
                                         ("--reward x.py:f", "no reward file"),
    ("--prompts x", "no prompts 'x'"), ("--reward counting --prompts dpok", "counting needs questions"),
    ("--tracker wandb", "pip install wandb"), ("--eta 0 --reward compressibility", "must be above 0"),
    ("--watch pickscore --watch pickscore", "two rewards have one name"),
                                         ("--unknown 1", "unrecognized arguments"),
    ("--epochs x", "invalid int value")])
def test_a_mistake_on_the_command_line_is_one_line_and_loses_nothing(flags, told, capsys):
    assert train.main(flags.split()) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: ") and told in line


def test_the_help_tells_of_every_setting(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    told = capsys.readouterr().out
    assert all(settings.flag_of(name) in told for name in Config.__dataclass_fields__) and "%" in told
