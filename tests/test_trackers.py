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


def test_tensorboard_gets_the_logs_figures_and_the_fixed_prompts_and_a_resumed_run_goes_on(
        tiny_model, own_reward, monkeypatch):
    calls = []

    def writer(folder, purge_step):
        calls.append((str(folder), purge_step))
        return SimpleNamespace(add_scalar=lambda *call: calls.append(call), flush=lambda: None,
                               add_image=lambda name, image, *where, **_: calls.append((name, *where)))

    fake(monkeypatch, "tensorboard")
    fake(monkeypatch, "torch.utils.tensorboard", SummaryWriter=writer)
    flags = {"watch": own_reward("letters"), "tracker": "tensorboard", "eval-every": 2}
    rows = run(*tiny_flags(tiny_model, epochs=3, **flags))
    assert calls[0] == ("runs/r/tensorboard", 0)
    for row in rows:
        for name in ("eval_reward_mean", "reward_mean", "loss", "reward_queries", "seconds_learn"):
            assert ((name, row[name], row["epoch"]) in calls) == (row[name] is not None)
    assert ("watched/letters", rows[-1]["watched"]["letters"], 3) in calls
    images = [call for call in calls if call[0] == "fixed prompts"]
    assert images == [("fixed prompts", step) for step in (0, 2, 3)]
    run("--resume", "runs/r", "--epochs", 4)
    assert ("runs/r/tensorboard", 4) in calls and calls[-1][-1] == 4


def test_wandb_gets_them_and_the_settings_in_one_call_an_epoch_and_goes_on(tiny_model, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(log=calls.append, define_metric=lambda *names, **axis: calls.append(axis))

    fake(monkeypatch, "wandb", init=init, Image=lambda image: Path(image.filename))
    rows = run(*tiny_flags(tiny_model, tracker="wandb", **{"eval-every": 2}))
    options, axis, *figures = calls
    assert options["name"] == "r" and options["config"]["algorithm"] == "ddpo-is"
    assert axis == {"step_metric": "epoch"} and [shown["epoch"] for shown in figures] == [0, 1, 2]
    assert [shown.get("loss") for shown in figures[1:]] == [row["loss"] for row in rows[1:]]
    first, none, last = (shown.get("fixed prompts") for shown in figures)
    assert (first.name, none, last.name) == ("epoch_0000.png", None, "epoch_0002.png")
    run("--resume", "runs/r", "--epochs", 3)
    assert calls[5]["id"] == options["id"] and calls[5]["resume"] == "allow" and calls[-1]["epoch"] == 3


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_is_refused_and_changes_nothing(name, tiny_model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    run(*tiny_flags(tiny_model, epochs=1))
    before = {path: path.stat().st_mtime_ns for path in Path("runs/r").rglob("*")}
    capsys.readouterr()
    run("--resume", "runs/r", "--epochs", 2, "--tracker", name, code=2)
    assert capsys.readouterr().err == f"train.py: --tracker {name} needs a package: pip install {name}\n"
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs/r").rglob("*")}
