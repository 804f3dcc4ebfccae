"""What a run leaves, survives and refuses: its log and images, kills, moves, other processes, mistakes."""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, forked, run, tiny_flags, without_seconds
from support import run_folder, settings

GO_ON = "go on from the last checkpoint with: python train.py --resume runs/r"


def told(text):
    """The lines of stderr, without progress bars."""
    return [line for line in re.split("[\r\n]", text) if line.strip() and "%|" not in line]


def refused(capsys, *flags):
    """The one line of a command that is refused."""
    capsys.readouterr()
    run(*flags, code=2)
    line, = told(capsys.readouterr().err)
    return line


def state(name):
    return run_folder.load_checkpoint(Path("runs") / name)


def unet(folder):
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def same(one, other):
    """Whether two dicts of tensors are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- What a run leaves ----

def test_the_log_the_images_and_the_last_line_of_a_run(tiny_model, own_reward, capsys):
    watch = [own_reward(name) for name in ("is_cat", "unknown", "brightness")]
    flags = {"epochs": 3, "reward": own_reward("redness"), "watch": watch, "eval-every": 2}
    rows = run(*tiny_flags(tiny_model, **flags))
    assert [(row["epoch"], row["reward_queries"]) for row in rows] == [(0, 0), (1, 4), (2, 8), (3, 12)]
    assert [row["eval_reward_mean"] is None for row in rows] == [False, True, False, False]
    learned = {*train.TRAINING_METRICS} - {"denoising_error", "kl_pretrained"}  # of RWR, and of --kl-weight
    assert all(rows[0][name] is None and all(np.isfinite(row[name]) for row in rows[1:]) for name in learned)
    notes = [[text, text.upper()] for text in ("a cat", "a raccoon", "a turtle")]
    assert [[text, note] for text, _, note in rows[0]["eval_notes"]] == notes
    assert rows[1]["watched"] is None and rows[2]["watched"]["unknown"] is None
    before, after = (f"{row['watched']['brightness']:.2f} lux" for row in (rows[0], rows[-1]))
    start, end = (f"{row['eval_reward_mean']:.3g}" for row in (rows[0], rows[-1]))
    outcome = capsys.readouterr().out.splitlines()[-1]
    assert outcome.startswith(f"redness: {start} -> {end} (")
    assert " on 3 fixed prompts after 12 reward queries, 0 min " in outcome
    assert outcome.endswith(f"is_cat 100 % -> 100 %, unknown - -> -, brightness {before} -> {after}")
    left = {str(path.relative_to("runs/r")) for path in Path("runs/r").rglob("*") if path.is_file()}
    assert {"config.json", "log.jsonl", "index.html", "progress.gif", "curve.png", "checkpoint.pt", "lock",
            "model/model_index.json", *(f"samples/epoch_000{k}.png" for k in (0, 2, 3))} <= left
    assert not [name for name in left if "new-" in name]


def test_watching_and_how_often_one_evaluates_change_nothing(tiny_model, own_reward):
    def training(name, **flags):
        rows = run(*tiny_flags(tiny_model, name=name, reward=own_reward("shuffled"), **flags))
        return [[row[name] for name in train.TRAINING_METRICS if "seconds" not in name] for row in rows]

    # Both rewards draw from Python's own generator.
    assert training("a", watch="none") == training("b", watch=own_reward("noise"), **{"eval-every": 2})


# ---- Killed, interrupted, resumed ----

@pytest.mark.parametrize("rank", [0, 2], ids=["weights", "lora"])
@pytest.mark.parametrize("model, algorithm", [("tiny_model", "ddpo-is"), ("tiny_flow", "rwr")])
def test_a_run_killed_at_random_moments_equals_one_never_stopped(
        model, algorithm, rank, own_reward, request):
    reward = own_reward("shuffled")  # it draws from Python's own generator
    flags = tiny_flags(request.getfixturevalue(model), algorithm=algorithm, epochs=5, reward=reward,
                       **{"lora-rank": rank, "eval-every": 2, "checkpoint-every": 2})
    whole = run(*flags, "--name", "whole")
    epoch = sum(whole[-1][name] for name in whole[-1] if name.startswith("seconds"))
    for rows, start in ((1, flags), (2, ["--resume", "runs/r"])):
        moment = random.uniform(0, 1.5 * epoch)
        codes, _ = forked(1, *start, send=(signal.SIGKILL, rows, moment))
        assert codes == [-9], f"it was over {moment} s after row {rows}"
    assert without_seconds(run("--resume", "runs/r")) == without_seconds(whole)
    assert same(state("r")["weights"], state("whole")["weights"])
    assert state("r")["statistics"] == state("whole")["statistics"]
    for image in run_folder.sample_files(Path("runs/whole")):
        assert image.read_bytes() == Path("runs/r/samples", image.name).read_bytes()


def test_a_kill_between_log_and_checkpoint_or_amid_a_line_or_before_the_model_does_no_harm(tiny_model):
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=3))
    run(*tiny_flags(tiny_model))
    with open("runs/r/log.jsonl", "a") as log:
        log.write('{"epoch": 3, "reward_mean": 0.0}\n{"epoch": 4, "rew')
    Path("runs/r/samples/epoch_0003.png").write_bytes(b"half an image")
    assert without_seconds(run("--resume", "runs/r", "--epochs", 3)) == without_seconds(whole)
    shutil.rmtree("runs/r/model")
    assert without_seconds(run("--resume", "runs/r")) == without_seconds(whole)
    assert same(unet("runs/r/model"), unet("runs/whole/model"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_ctrl_c_and_sigterm_end_a_run_with_130_and_say_how_to_go_on(number, tiny_model):
    codes, (text,) = forked(1, *tiny_flags(tiny_model, epochs=10_000), send=(number, 3, 0))
    assert codes == [130] and "Traceback" not in text and text.endswith(f"KeyboardInterrupt; {GO_ON}\n")
    assert state("r")["epoch"] >= 1


def test_a_run_ends_where_a_watched_reward_has_fallen_with_the_weights_before(tiny_model, capsys):
    Path("own.py").write_text("""
asked = []
def fades(images, prompts):  # at the third evaluation of each of two runs
    asked.append(prompts)
    return [70.0 if len(asked) in (3, 6) else 80.0] * len(images)
""")
    flags = {"epochs": 6, "watch": "own.py:fades", "eval-every": 2}
    rows = run(*tiny_flags(tiny_model, **flags), "--stop-below", "fades=75")
    assert len(rows) == 5  # the log tells of the fall
    message, outcome = capsys.readouterr().out.splitlines()[-2:]
    assert message == "stopped after epoch 4: fades 70 is below 75; the weights are those of epoch 2"
    assert "after 8 reward queries" in outcome and outcome.endswith("watched: fades 80 -> 80")
    run(*tiny_flags(tiny_model, **{**flags, "name": "parts", "epochs": 2}))
    assert same(unet("runs/r/model"), before := unet("runs/parts/model"))
    # A resumed run with a share of the start as its limit ends the same. Without a limit it goes on.
    parts = run("--resume", "runs/parts", "--epochs", 6, "--stop-below", "fades=90%")
    assert "fades 70 is below 72; the weights are those of epoch 2\n" in capsys.readouterr().out
    assert without_seconds(parts) == without_seconds(rows) and same(unet("runs/parts/model"), before)
    assert len(run("--resume", "runs/parts", "--stop-below", "none")) == 7


# ---- What only shows must not end a run ----

WATCHED = """
asked = []
def remote(images, prompts):
    asked.append(prompts)
    if len(asked) in FAILS: raise ConnectionError("the scoring server does not answer")
    return [80.0 if len(asked) < 4 else 70.0] * len(images)
"""


def test_a_watched_reward_or_a_picture_that_fails_is_told_once_and_the_run_goes_on(
        tiny_model, monkeypatch, capsys):
    Path("own.py").write_text(WATCHED.replace("FAILS", "(1, 3)"))
    monkeypatch.setattr(run_folder, "draw_grid", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(run_folder, "titled", lambda *_: 1 / 0)
    rows = run(*tiny_flags(tiny_model, epochs=3, watch="own.py:remote"), "--stop-below", "remote=90%")
    assert [row["watched"]["remote"] for row in rows] == [None, 80, None, 70]
    out, lines = capsys.readouterr()
    failed, zero = "failed, the run goes on:", "ZeroDivisionError: division by zero"
    wait = "remote is not known, so --stop-below lets the run go on"
    assert told(lines) == [
        f"remote {failed} ConnectionError: the scoring server does not answer",
        f"the pictures {failed} {zero}", wait, f"curve.png {failed} {zero}", wait]
    assert "stopped after epoch 3: remote 70 is below 72; the weights are those of epoch 2" in out


def test_a_trained_reward_that_fails_ends_the_run(tiny_model):
    Path("own.py").write_text(WATCHED.replace("FAILS", "(4,)"))
    with pytest.raises(ConnectionError):
        run(*tiny_flags(tiny_model, reward="own.py:remote"))
    assert state("r")["epoch"] == 1 and len(run("--resume", "runs/r")) == 3


def test_a_run_trains_in_a_thread_and_whatever_a_notebook_says_of_matplotlib(tiny_model, monkeypatch):
    codes, flags = [], tiny_flags(tiny_model, epochs=1)
    thread = threading.Thread(target=lambda: codes.append(train.main(list(map(str, flags)))))
    thread.start(), thread.join()
    assert codes == [0] and Path("runs/r/curve.png").exists()
    code = "from support.run_folder import new_figure; new_figure(2, 2).savefig('a.png')"
    env = {**os.environ, "MPLBACKEND": "module://nowhere", "PYTHONPATH": str(ROOT)}
    assert not subprocess.run([sys.executable, "-c", code], env=env).returncode


# ---- Refused: one line, exit code 2, nothing lost ----

@pytest.mark.parametrize("flags, message", [
    (["--watch", "own.py:nothing"], "has no function 'nothing'"),
    (["--model", "nobody/nothing"], "Internet connection is on"),
    (["--name", "taken", "--model", "nowhere"], "runs/taken exists: choose another --name"),
    (["--resume", "runs/nothing"], "runs/nothing is no run"),
    (["--resume", "runs/taken"], "is no run: it has no checkpoint.pt")], ids=str)
def test_a_mistake_is_one_line_and_makes_nothing(flags, message, tiny_model, own_reward, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("runs/taken").mkdir(parents=True)
    line = refused(capsys, "--model", tiny_model, "--device", "cpu", *flags)
    assert line.startswith("train.py: ") and message in line
    assert [path.name for path in Path("runs").iterdir()] == ["taken"]


def test_a_finished_run_goes_on_with_more_epochs_and_with_its_own_settings_alone(tiny_model, capsys):
    run(*tiny_flags(tiny_model))
    finished = "runs/r has done 2 epochs: give a larger --epochs to go on"
    assert finished in refused(capsys, "--resume", "runs/r")
    assert finished in refused(capsys, "--resume", "runs/r", "--epochs", 1)
    assert "--seed: not with --resume; only " in refused(capsys, "--resume", "runs/r", "--seed", 1)
    assert Path("runs/r/model").exists() and state("r")["epoch"] == 2
    assert len(run("--resume", "runs/r", "--epochs", 3, "--micro-batch", 1, "--sample-batch", 2)) == 4
    assert '"micro_batch": 1,' in Path("runs/r/config.json").read_text()


def test_a_run_that_another_process_trains_is_refused_until_that_is_dead(tiny_model, capsys):
    run(*tiny_flags(tiny_model, epochs=1))
    lock = ("import fcntl; file = open('runs/r/lock', 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('held', flush=True); input()")
    holder = subprocess.Popen([sys.executable, "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    line = refused(capsys, "--resume", "runs/r", "--epochs", 2)
    assert "runs/r is being trained by another process" in line and Path("runs/r/model").exists()
    holder.kill()
    holder.wait()
    assert len(run("--resume", "runs/r", "--epochs", 2)) == 3


def test_a_run_that_was_moved_with_its_project_goes_on(tiny_model, own_reward, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, "old/models/tiny")
    Path("old/p.txt").write_text("a cat\na dog\n")
    shutil.copy("own.py", "old")
    monkeypatch.setattr(settings, "ROOT", tmp_path / "old")
    monkeypatch.chdir("old")
    run(*tiny_flags("models/tiny", prompts="p.txt", reward="own.py:redness", watch="own.py:letters"))
    assert str(tmp_path) not in Path("runs/r/config.json").read_text()
    monkeypatch.setattr(settings, "ROOT", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    Path("old").rename("new")
    run("--resume", "new/runs/r", "--epochs", 3)
    assert len(run_folder.read_rows(Path("new/runs/r"))) == 4


def test_what_has_moved_is_given_by_its_flag_and_what_has_changed_is_told(tiny_model, own_reward, capsys):
    Path("p.txt").write_text("a cat\na dog\n")
    run(*tiny_flags(tiny_model, epochs=1, prompts="p.txt", reward=own_reward("redness"), watch="none"))
    Path("new").mkdir()
    files = [Path(name).rename(f"new/{name}") for name in ("p.txt", "own.py")]
    assert "p.txt" in refused(capsys, "--resume", "runs/r", "--epochs", 2)
    moved = ["--prompts", "new/p.txt", "--reward", "new/own.py:redness"]
    assert len(run("--resume", "runs/r", "--epochs", 2, *moved)) == 3
    assert not told(capsys.readouterr().err)
    for file in files:
        file.write_text(file.read_text() + "\n")
    assert len(run("--resume", "runs/r", "--epochs", 3)) == 4  # the new places are kept
    lines = told(capsys.readouterr().err)
    assert lines == [f"{file.name} has changed since the checkpoint of runs/r" for file in files]
