"""What a tracker gets to see. Fakes replace the packages: they are not needed to train."""
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from conftest import run, tiny_flags


@pytest.fixture
def tensorboard(monkeypatch):
    """A tensorboard that keeps what it is shown: [(folder, first step), (name, value or shape, step), ...]."""
    shown = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            shown.append((str(folder), purge_step))

        def add_scalar(self, name, value, step):
            shown.append((name, value, step))

        def add_image(self, name, image, step, dataformats):
            assert dataformats == "HWC"
            shown.append((name, image.shape[2], step))

        def flush(self):
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return shown


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that keeps what it is shown: [options of init, (figures, step), ...]."""
    shown = []

    def init(**options):
        shown.append(options)
        return SimpleNamespace(log=lambda figures: shown.append((figures, figures["epoch"])), define_metric=lambda *_, step_metric: None)

    module = ModuleType("wandb")
    module.init, module.Image, module.errors = init, Path, SimpleNamespace(Error=PermissionError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module, shown


def test_tensorboard_gets_the_logs_figures_and_the_fixed_prompts_and_a_resumed_run_goes_on(tiny_model, tensorboard, own_reward):
    rows = run(*tiny_flags(tiny_model, epochs=3, watch=own_reward("letters"), tracker="tensorboard", **{"eval-every": 2}))
    assert tensorboard[0] == ("runs/r/tensorboard", 0)
    assert [step for name, _, step in tensorboard[1:] if name == "reward_mean"] == [1, 2, 3]
    for row in rows:
        for name in ("eval_reward_mean", "loss", "grad_norm", "reward_queries", "seconds_learn"):
            assert ((name, row[name], row["epoch"]) in tensorboard) == (row[name] is not None)
    assert ("watched/letters", rows[-1]["watched"]["letters"], 3) in tensorboard
    assert [step for name, channels, step in tensorboard[1:] if name == "fixed prompts" and channels == 3] == [0, 2, 3]
    run("--resume", "runs/r", "--epochs", 4)
    assert ("runs/r/tensorboard", 4) in tensorboard and tensorboard[-1][-1] == 4


def test_wandb_gets_them_and_the_settings_in_one_call_an_epoch(tiny_model, wandb):
    _, shown = wandb
    rows = run(*tiny_flags(tiny_model, epochs=2, tracker="wandb", **{"eval-every": 2}))
    options, *calls = shown
    assert options["name"] == "r" and options["config"]["learning_rate"] == 2e-4 and options["config"]["reward"] == "compressibility"
    assert [step for _, step in calls] == [0, 1, 2] and calls[1][0]["reward_mean"] == rows[1]["reward_mean"]
    assert [str(figures.get("fixed prompts")) for figures, _ in calls] == ["runs/r/samples/epoch_0000.png", "None",
                                                                           "runs/r/samples/epoch_0002.png"]
    run("--resume", "runs/r", "--epochs", 3)
    assert shown[4]["id"] == options["id"] and shown[4]["resume"] == "allow"


def test_a_tracker_that_is_not_installed_or_not_logged_in_is_one_clear_line(tiny_model, wandb, monkeypatch, capsys):
    module, _ = wandb

    def refuse(**_):
        raise module.errors.Error("api_key not configured\n(no-tty)")

    monkeypatch.setattr(module, "init", refuse)
    run(*tiny_flags(tiny_model, tracker="wandb"), code=2)
    assert "--tracker wandb: api_key not configured (no-tty) (WANDB_MODE=offline needs no login)" in capsys.readouterr().err
    for name, package in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, package, None)
        run(*tiny_flags(tiny_model, tracker=name), code=2)
        line, = capsys.readouterr().err.splitlines()
        assert f"--tracker {name} needs a package that is not installed" in line and f"pip install {name}" in line
    run(*tiny_flags(tiny_model, tracker="mlflow"), code=2)
    assert "invalid choice: 'mlflow'" in capsys.readouterr().err and not Path("runs/r").exists()


def test_without_a_tracker_no_such_package_is_imported(tiny_model, tensorboard):
    run(*tiny_flags(tiny_model, epochs=1))
    assert not tensorboard


def test_a_resume_that_is_refused_for_its_tracker_changes_nothing(tiny_model, wandb, monkeypatch, capsys):
    run(*tiny_flags(tiny_model, epochs=1))
    before = {path: path.stat().st_mtime_ns for path in Path("runs/r").rglob("*") if path.is_file() and path.name != "lock"}
    monkeypatch.setitem(sys.modules, "wandb", None)
    run("--resume", "runs/r", "--epochs", 2, "--tracker", "wandb", code=2)
    assert "pip install wandb" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs/r").rglob("*") if path.is_file() and path.name != "lock"}
