"""What a tracker gets to see. Fakes replace the packages: they are not needed to train."""
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from conftest import run, tiny_flags


def fake(monkeypatch, name, **contents):
    """A module in place of a package."""
    module = ModuleType(name)
    module.__dict__.update(contents, __spec__=ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_gets_the_logs_figures_and_the_fixed_prompts_and_goes_on(
        name, tiny_model, own_reward, monkeypatch):
    given, shown, images = [], {}, {}

    def begin(*folder, **options):
        given.append({**options, "folder": folder})
        return SimpleNamespace(
            flush=lambda: None, define_metric=lambda *names, step_metric: given[-1].update(axis=step_metric),
            add_scalar=lambda figure, value, step: shown.setdefault(step, {}).update({figure: value}),
            add_image=lambda title, image, step, dataformats: images.update({step: title}),
            log=lambda row: shown.update({row["epoch"]: row}) or images.update(
                {row["epoch"]: title for title in row if title == "fixed prompts"}))

    fake(monkeypatch, "tensorboard")
    fake(monkeypatch, "torch.utils.tensorboard", SummaryWriter=begin)
    fake(monkeypatch, "wandb", init=begin, Image=lambda image: Path(image.filename))
    flags = {"watch": own_reward("letters"), "tracker": name, "eval-every": 2}
    rows = run(*tiny_flags(tiny_model, epochs=3, **flags)) + run("--resume", "runs/r", "--epochs", 4)[4:]
    assert images == dict.fromkeys((0, 2, 3, 4), "fixed prompts") and list(shown) == [0, 1, 2, 3, 4]
    for row in rows:
        for figure in ("eval_reward_mean", "reward_mean", "loss", "reward_queries", "seconds_learn"):
            assert shown[row["epoch"]].get(figure) == row[figure]
    assert shown[4]["watched/letters"] == rows[4]["watched"]["letters"]
    one, two = given
    if name == "wandb":
        assert one["axis"] == "epoch" and one["config"]["algorithm"] == "ddpo-is" and one["name"] == "r"
        assert one["id"] == two["id"] and two["resume"] == "allow"
    else:
        assert (one["purge_step"], two["purge_step"]) == (0, 4)


def test_a_tracker_that_dies_is_told_once_and_the_run_goes_on(tiny_model, monkeypatch, capsys):
    shown = []

    def log(row):
        shown.append(row)
        if len(shown) > 2:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    fake(monkeypatch, "wandb", Image=lambda image: None, init=lambda project, **_: shown.append(project) or (
        SimpleNamespace(log=log, define_metric=lambda *_, **__: None)))
    assert len(run(*tiny_flags(tiny_model, epochs=3, tracker="wandb"))) == 4 and shown[0] == "mine"
    assert capsys.readouterr().err.count("--tracker failed, the run goes on: ConnectionResetError") == 1
