"""Settings: what the rules choose, what a flag overrides, what is refused."""
import inspect
import itertools
import json

import pytest

import prompts
import rewards
import sampling
import train
from conftest import EMOJI, EMOJI_VLM, ROOT
from support import loading, settings
from support.settings import Config, build_config


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
    sets = {"aesthetic": "common_animals", "incompressibility": "imagenet_animals", "imagereward": "dpok",
            "alignment": "animal_activities", "counting": "two_to_eight_animals"}
    assert {reward: paper(reward=reward).prompts for reward in sets} == sets
    for algorithm in settings.RWR:
        rwr = paper(algorithm=algorithm)
        assert (rwr.samples_per_epoch, rwr.updates_per_epoch, rwr.batch_size) == (10_000, 400, 128)
        assert (rwr.beta, rwr.percentile, rwr.training_guidance) == (0.2, 0.9, 0)


def test_every_preset_algorithm_and_reward_has_its_settings(monkeypatch):
    """presets.json: setting -> value, or words -> value. Words name presets, algorithms, rewards; rank-4 is
    --lora-rank 4, "*" all others."""
    monkeypatch.setattr(settings, "check", lambda config: None)  # fp16 on a CPU
    table = json.loads((ROOT / "tests" / "presets.json").read_text())
    for preset, algorithm, reward, rank in itertools.product(
            settings.PRESETS, settings.ALGORITHMS, (*rewards.REWARDS, "own.py:own"), (0, 4)):
        flags = dict(preset=preset, algorithm=algorithm, reward=reward, device="cpu")
        expected, words = {**flags}, {preset, algorithm, reward, f"rank-{rank}"}
        for name, value in table.items():
            while isinstance(value, dict):
                value = value[next((key for key in value if words & {*key.split()}), "*")]
            expected[name] = value
        config = build_config(flags | ({"lora_rank": rank} if rank else {}))
        assert settings.saved_settings(config) == expected, words


@pytest.mark.parametrize("flags, expected", [
    (dict(lora_rank=4, learning_rate=1e-3), dict(learning_rate=1e-3)), (dict(epochs=7), dict(epochs=7)),
    (dict(algorithm="rwr"), dict(training_guidance=1.4)),  # it goes with the rule's guidance
    (dict(algorithm="rwr", guidance_scale=2.0), dict(training_guidance=0, guidance_scale=2))], ids=str)
def test_a_flag_stands_above_the_rules(flags, expected):
    assert vars(build_config(flags)).items() >= expected.items()


def test_a_watched_reward_finds_its_options_as_a_trained_one_does():
    def options(name, **flags):
        return settings.reward_options(build_config({"precision": "fp32", **flags}), name)

    toy = {"reward_model": str(EMOJI_VLM), "wording": "paper", "bert_model": str(EMOJI), "bert_baseline": 0.0}
    assert options("alignment", reward="alignment") == options("alignment", watch=["alignment"]) == toy
    assert options("alignment") == toy  # neither trained nor watched, as in evaluate.py: the rules'
    assert options("alignment", watch=["alignment"], wording="code") == {**toy, "wording": "code"}
    assert options("alignment", preset="paper")["reward_model"] == ""
    flags = dict(reward="aesthetic", watch=["pickscore"], reward_model="x")
    assert options("pickscore", **flags) == {"reward_model": "x"}


def test_the_choices_of_the_settings_are_the_tables_of_the_code():
    def choices(name):
        return set(Config.__dataclass_fields__[name].metadata["choices"])

    assert choices("noise") == set(sampling.NOISES) and choices("precision") == set(loading.PRECISIONS)
    assert choices("algorithm") == set(train.ALGORITHMS)
    assert choices("wording") == set(rewards.Alignment.WORDINGS)
    assert {*settings.LEARNED, "ocr"} == set(rewards.LEARNED)  # which has no options
    for name, kind in rewards.LEARNED.items():
        assert settings.options_of(name) == list(inspect.signature(kind).parameters)[1:]
    for where, what in settings.RULES:
        asked = where.get("reward", ())
        assert {*([asked] if isinstance(asked, str) else asked)} <= {*rewards.REWARDS}
        assert what.get("prompts", "dpok") in prompts.PROMPT_SETS


@pytest.mark.parametrize("flags, told", [
    ("--algorithm rwr --clip-range 1", "--clip-range is read by ddpo-is, not by rwr"),
    ("--percentile 1", "not by ddpo-is"), ("--bert-model x", "--bert-model is read by alignment alone"),
    ("--clip-range -1", "must be above 0"), ("--eta 0 --reward compressibility", "must be above 0"),
    ("--learn-steps 9", "too few to learn from"), ("--skip-last-steps 10", "too few to learn from"),
    ("--samples-per-epoch 60", "does not divide"), ("--updates-per-epoch 3", "divide into --updates"),
    ("--algorithm ddpo-sf --updates-per-epoch 2", "ddpo-sf takes one"),
    ("--images-per-prompt 1", "compares an image with itself"),
    ("--stats-min-count 9", "more than --stats-buffer"), ("--lora-alpha 4", "goes with --lora-rank"),
    ("--precision fp16 --device cpu", "needs CUDA"), ("--device tpu", "--device 'tpu'"),
    ("--precision bf16 --compile --device cpu", "needs CUDA"), ("--noise x", "invalid choice"),
    ("--call []x", "--call '[]x': "), ("--call [1]", "--call '[1]': "),
    ("--name a/b", "must be a plain name"), ('--call {"guidance_scale":1} --guidance-scale 5', "both say it"),
    ("--watch none --stop-below animal=0.9", "of a watched reward"), ("--unknown 1", "unrecognized"),
    ("--stop-below animal", "must be as animal=0.9"), ("--reward x", "no reward 'x': choose compressibility"),
    ("--reward x.py:f", "no reward file"), ("--prompts x", "no prompts 'x'"), ("--epochs x", "invalid int"),
    ("--reward counting --prompts dpok", "counting needs questions"), ("--reward ocr", "ocr needs texts"),
    ("--tracker wandb", "pip install"),
    ("--watch pickscore --watch pickscore", "two rewards have one name")])
def test_a_mistake_on_the_command_line_is_one_line_and_loses_nothing(flags, told, capsys):
    assert train.main(flags.split()) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: ") and told in line


def test_the_help_tells_of_every_setting(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    told = capsys.readouterr().out
    assert all(settings.flag_of(name) in told for name in Config.__dataclass_fields__) and "%" in told
