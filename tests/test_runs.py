"""What a run survives and what it refuses: mistakes, kills, other processes, moves, full disks, changed files, faulty models."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import process
import pytest
import settings
import torch
from safetensors.torch import load_file

import evaluate
import runs
import train
from conftest import ROOT, edit_weights, forked, run, tiny_flags, without_seconds


def told(capsys):
    """The lines on stderr, without progress bars."""
    return [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.strip() and "epoch/s" not in line]


def scaled(factor):
    return lambda weights: {name: weight * factor for name, weight in weights.items()}


# ---- Resumed, interrupted ----

@pytest.mark.parametrize("model, algorithm", [("tiny_model", "ddpo-is"), ("tiny_flow", "rwr")])
def test_a_resumed_run_equals_one_never_stopped(model, algorithm, own_reward, with_drawings, request):
    model, flags = request.getfixturevalue(model), dict(algorithm=algorithm, reward=own_reward("shuffled"), **{"eval-every": 2})
    whole = run(*tiny_flags(model, name="whole", epochs=3, **flags))
    run(*tiny_flags(model, name="parts", epochs=2, **flags))
    parts = run("--resume", "runs/parts", "--epochs", 3)
    assert without_seconds(whole) == without_seconds(parts)
    one, two = (torch.load(f"runs/{name}/checkpoint/state.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    assert one["statistics"] == two["statistics"] and one["reward_rngs"]["shuffled"]["python"] == two["reward_rngs"]["shuffled"]["python"]
    assert (Path("runs/whole/progress.png").read_bytes() == Path("runs/parts/progress.png").read_bytes())


def test_an_interrupted_epoch_is_undone_saved_and_resumed_bit_for_bit(tiny_model, own_reward, monkeypatch, capsys):
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=3))
    calls, evaluate = [], train.evaluate_fixed

    def interrupted_once(experiment, *args):  # at its worst: weights already updated, row not yet written
        calls.append(experiment.epoch)
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        return evaluate(experiment, *args)

    monkeypatch.setattr(train, "evaluate_fixed", interrupted_once)
    stopped = run(*tiny_flags(tiny_model, name="parts", epochs=3), code=130)
    assert [row["epoch"] for row in stopped] == [0, 1]
    assert "after 1 epochs is saved" in (told := capsys.readouterr().err) and "--resume runs/parts" in told
    assert without_seconds(run("--resume", "runs/parts")) == without_seconds(whole)


def test_a_run_ends_where_a_watched_reward_has_fallen_with_the_weights_of_the_evaluation_before(tiny_model, capsys):
    Path("watched.py").write_text("""
from pathlib import Path
def fades(images, prompts):
    calls = Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else "")
    return [80.0 - 10 * (len(calls.read_text()) == 2)] * len(images)
""")
    rows = run(*tiny_flags(tiny_model, name="stops", epochs=3, watch="watched.py:fades", **{"stop-below": "fades=90%"}))
    assert len(rows) == 3  # the log tells of the fall
    told = capsys.readouterr().out
    assert "stopped after epoch 2 and 8 reward queries: fades 70 is below 72; the weights are those of epoch 1" in told
    assert "after 4 reward queries" in told and "watched: fades 80 -> 80" in told
    run(*tiny_flags(tiny_model, name="short", epochs=1, watch="none"))
    stopped, short = (load_file(f"runs/{name}/model/unet/diffusion_pytorch_model.safetensors") for name in ("stops", "short"))
    assert all(torch.equal(stopped[name], short[name]) for name in short)
    Path("calls").write_text(".")  # it can go on, from the weights that it has kept, and end again, or never
    assert len(run("--resume", "runs/stops", "--stop-below", "fades=79")) == 3 and "weights are those of epoch 1" in capsys.readouterr().out
    assert len(run("--resume", "runs/stops", "--stop-below", "none")) == 4


def test_a_run_is_not_begun_or_continued_with_a_limit_that_has_been_passed_or_cannot_be_seen(tiny_model, capsys):
    Path("watched.py").write_text("def low(images, prompts): return [0.4] * len(images)\nlow.unit = '%'\n"
                                  "def blind(images, prompts): return [float('nan')] * len(images)\n")
    for limit, watched, message in (("low=0.5", "low", "before any training, low 40 % is below 50 %"),
                                    ("blind=0.5", "blind", "it can judge none of the fixed prompts")):
        run(*tiny_flags(tiny_model, name="".join(filter(str.isalnum, limit)), watch=f"watched.py:{watched}", **{"stop-below": limit}),
            code=2)
        assert message in capsys.readouterr().err
    run(*tiny_flags(tiny_model, name="r", epochs=1, watch="watched.py:low"))
    run("--resume", "runs/r", "--epochs", 2, "--stop-below", "low=0.5", code=2)
    assert "low 40 % is below 50 % at epoch 1" in capsys.readouterr().err
    interrupted = tiny_flags(tiny_model, name="i", epochs=3, watch="watched.py:low", **{"eval-every": 3})
    Path("own.py").write_text("n = 0\ndef f(images, prompts):\n    global n\n    n += 1\n    if n == 4: raise KeyboardInterrupt\n"
                              "    return images.mean((1, 2, 3))\n")
    run(*interrupted, "--reward", "own.py:f", code=130)
    run("--resume", "runs/i", "--stop-below", "low=0.1", code=2)
    assert "of epoch 2, which was not evaluated" in capsys.readouterr().err
    assert len(run("--resume", "runs/i", "--epochs", 2)) == 3 and Path("runs/i/model").exists()  # a run may also be ended early
    assert "after 0 reward queries" in capsys.readouterr().out.splitlines()[-1]  # the last that was evaluated


# ---- Bad input: one clear line, exit code 2, nothing lost ----


def test_help_explains_every_flag(capsys):
    run("--help", code=0)
    told = capsys.readouterr().out
    assert all(f"--{item.name.replace('_', '-')} " in told for item in fields(settings.Config)) and "animal=90%:" in " ".join(told.split())


@pytest.mark.parametrize("flags, message", [
    (["--reward", "beauty"], "no reward 'beauty': choose compressibility, incompressibility"),
    (["--reward-model", "x"], "--reward-model is read by aesthetic, pickscore, hpsv2, imagereward, alignment, counting, not by"),
    (["--reward", "pickscore", "--aesthetic-head", "x"], "--aesthetic-head is read by aesthetic, not by pickscore"),
    (["--reward", "alignment", "--bert-baseline", "1"], "--bert-baseline 1: must be in [0, 1)"),
    (["--watch", "beauty"], "no reward 'beauty'"),
    (["--watch", "own.py:nothing"], "has no function 'nothing'"),
    (["--watch", "compressibility"], "--watch compressibility: it is the reward that is trained"),
    (["--watch", "own.py:words", "--watch", "own.py:words"], "--watch words: two watched rewards have this name"),
    (["--watch", "pickscore", "--watch", "hpsv2", "--reward-model", "x"], "--reward-model could be for pickscore and hpsv2"),
    (["--reward", "own.py:f", "--watch", "other.py:f"], "--watch f: the trained reward has this name, too"),
    (["--watch", "counting", "--prompts", "objects"], "choose --prompts two_to_eight_animals"),
    (["--reward", "counting", "--prompts", "objects"], "choose --prompts two_to_eight_animals"),
    (["--reward", "nothing.py:f"], "no reward file"),
    (["--reward", "own.py:nothing"], "has no function 'nothing'"),
    (["--reward", "typo.py:f"], "cannot be loaded: SyntaxError"),
    (["--reward", "prompts.txt:f"], "is not a Python file"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--algorithm", "ppo"], "invalid choice: 'ppo'"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--prompts", "nothing.txt"], "neither a prompt set (common_animals, emoji_animals, imagenet_animals"),
    (["--prompts", "empty.txt"], "is empty"),
    (["--prompts", "binary.txt"], "is not UTF-8"),
    (["--model", "nobody/nothing"], "model 'nobody/nothing': "),
    (["--model", "bare"], "no file named model_index.json"),
    (["--model", "truncated"], "Unable to load weights"),
    (["--samples-per-epoch", "40", "--updates-per-epoch", "6"], "--samples-per-epoch 40 does not divide into --updates-per-epoch 6"),
    (["--images-per-prompt", "1"], "compares an image with itself alone: give --stats-buffer 16"),
    (["--algorithm", "ddpo-sf", "--updates-per-epoch", "2"], "ddpo-sf takes one update"),
    (["--training-guidance", "1"], "--training-guidance is read by rwr, rwr-sparse, nft, not by ddpo-is"),
    (["--algorithm", "rwr", "--kl-weight", "1"], "--kl-weight is read by ddpo-is, ddpo-sf, not by rwr"),
    (["--algorithm", "rwr-sparse", "--percentile", "1"], "--percentile 1: must be below 1"),
    (["--algorithm", "rwr", "--beta", "-1"], "--beta -1.0: must be a non-negative number"),
    (["--skip-last-steps", "10"], "--skip-last-steps 10 leaves none of --sampling-steps 10"),
    (["--algorithm", "nft", "--baseline", "none"], "--baseline none: nft asks whether"),
    (["--stop-below", "animal=1", "--stop-below", "animal=90%"], "--stop-below animal=90%: animal has a limit already"),
    (["--stop-below", "animal=0.9", "--checkpoint-every", "2"], "--stop-below saves checkpoints at evaluations"),
    (["--stop-below", "animal"], "--stop-below animal: must be as animal=0.9"),
    (["--stop-below", "beauty=1"], "--stop-below beauty: it is not watched; watched are animal, number"),
    (["--images-per-prompt", "5"], "--samples-per-epoch 64 does not divide into --images-per-prompt 5"),
    (["--learn-steps", "9"], "--learn-steps 9: only 8 steps are learned from"),
    (["--eval-steps", "2000"], "2000 cannot be larger than"),
    (["--sampling-steps", "1000"], "index 1000 is out of bounds"),
    (["--guidance-scale", "0.6"], "guidance weight 0.6: most pipelines guide only above 1"),
    (["--algorithm", "rwr", "--training-guidance", "0.5"], "guidance weight 0.5: most pipelines"),
    (["--lora-alpha", "8"], "--lora-alpha 8 goes with --lora-rank"),
    (["--call", "{"], "--call {: it is not JSON"),
    (["--prediction-type", "noise"], "--prediction-type noise: choose epsilon, v_prediction or sample"),
    (["--baseline", "value"], "invalid choice: 'value'"),
    (["--epochs", "0"], "--epochs 0: must be a positive number"),
    (["--learning-rate", "-1"], "--learning-rate -1.0: must be a positive number"),
    (["--clip-range", "nan"], "--clip-range nan: must be a positive number"),
    (["--epochs", "many"], "invalid int value: 'many'"),
    (["--eta", "0"], "--eta 0.0: must be a positive number"),
    (["--eta", "2"], "eta is 2, but must be in (0, 1]"),
    (["--sampling-steps", "2000"], "2000 cannot be larger than"),
    (["--name", "a/b"], "must be a plain name"),
    (["--name", "taken", "--model", "nowhere"], "exists: choose another --name, or continue it with --resume"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    (["--device", "cuda"], "torch sees no GPU"),
    (["--resume", "runs/nothing"], "is not the folder of a run"),
    (["--resume", "runs/taken"], "has no checkpoint yet")], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_gives_one_clear_line_and_makes_nothing(flags, message, tiny_model, own_reward, capsys, monkeypatch):
    own_reward("f")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("typo.py").write_text("def f(:")
    Path("prompts.txt").write_text("a cat\n")
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("bare").mkdir()
    shutil.copytree(tiny_model, "truncated")
    Path("truncated/unet/diffusion_pytorch_model.safetensors").write_bytes(b"short")
    Path("runs/taken").mkdir(parents=True)
    runs.save_settings(Path("runs/taken"), asdict(settings.build_config({})))
    run(*(flags if "--model" in flags else ["--model", tiny_model, *flags]) if "--resume" not in flags else flags, code=2)
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("train.py: ") and message in told[0]
    assert [path.name for path in Path("runs").iterdir()] == ["taken"]


@pytest.mark.parametrize("function, message", [
    ("nan", "returned nan for image 0 ('a cat')"), ("inf", "returned inf for image 0"),
    ("wrong_shape", "returned shape (3, 3, 16, 16) for 3 images; (3,) was expected"),
    ("words", "returned list, not numbers"), ("broken", "failed: KeyError: 'weights'"),
    ("fails_later", "failed: RuntimeError: the judge went home")])
def test_a_reward_that_breaks_stops_the_run_with_its_state_saved(function, message, tiny_model, own_reward, capsys):
    run(*tiny_flags(tiny_model, reward=own_reward(function)), code=2)
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and "the state after 0 epochs is saved" in told
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] == -1  # the pretrained weights are told of again


def test_a_watched_reward_that_breaks_stops_the_run_too(tiny_model, own_reward, capsys):
    run(*tiny_flags(tiny_model, watch=own_reward("broken")), code=2)
    assert "the reward broken failed: KeyError: 'weights' (own.py, line 21); the state after 0 epochs is saved" in capsys.readouterr().err


def test_ctrl_c_inside_a_reward_saves_too(tiny_model, own_reward, capsys):
    run(*tiny_flags(tiny_model, reward=own_reward("interrupts")), code=130)
    assert "interrupted; the state after 0 epochs is saved" in capsys.readouterr().err


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny_model, capsys):
    run(*tiny_flags(tiny_model))
    checkpoint, config = Path("runs/r/checkpoint/state.pt"), Path("runs/r/config.json")
    good, settings = checkpoint.read_bytes(), config.read_text()
    checkpoint.write_bytes(good[:1000])
    run("--resume", "runs/r", "--epochs", 3, code=2)
    assert "is damaged" in capsys.readouterr().err
    checkpoint.write_bytes(good)
    config.write_text(settings.replace('"clip_range": 0.', '"clip_range": 1.'))
    run("--resume", "runs/r", "--epochs", 3, code=2)
    assert "belongs to other settings: config.json differs in clip_range" in capsys.readouterr().err
    config.write_text(settings)
    run("--resume", "runs/r", code=2)
    assert "has done all its 2 epochs: give a larger --epochs" in capsys.readouterr().err
    run("--resume", "runs/r", "--epochs", 1, code=2)
    assert "has done 2 epochs already" in capsys.readouterr().err
    run("--resume", "runs/r", "--seed", 1, "--epochs", 3, code=2)
    assert "may be given with it (see --help), not --seed" in capsys.readouterr().err
    config.write_text(settings.replace('"watch"', '"judge"'))
    run("--resume", "runs/r", "--epochs", 3, code=2)
    assert "is of another version: it differs in judge, watch" in capsys.readouterr().err
    config.write_text(settings)
    assert len(run("--resume", "runs/r", "--epochs", 3)) == 4  # nothing of the above did harm


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_loses_no_checkpoint(tiny_model, own_reward):
    # In its second epoch the reward sees to it that no file can grow beyond 50 kB: as torch and safetensors meet a full disk.
    codes, (told,) = forked(1, *tiny_flags(tiny_model, reward=own_reward("fills_the_disk"), epochs=3))
    assert codes == [2] and "Traceback" not in told, told
    assert "could not be written: " in told and "the state after 1 epochs is saved" in told
    assert not list(Path("runs/r").rglob("new-*"))
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] == 1
    Path("room").touch()
    assert [row["epoch"] for row in run("--resume", "runs/r")] == [0, 1, 2, 3]


def test_a_kill_between_log_and_checkpoint_or_amid_a_line_does_no_harm(tiny_model):
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=3))
    run(*tiny_flags(tiny_model, name="parts", epochs=2))
    with open("runs/parts/log.jsonl", "a") as log:
        log.write(json.dumps({"epoch": 3, "reward_mean": 0.0}) + "\n" + '{"epoch": 4, "rew')
    Path("runs/parts/samples/epoch_0003.png").write_bytes(b"half an image")
    assert without_seconds(run("--resume", "runs/parts", "--epochs", 3)) == without_seconds(whole)


def test_an_unwritable_folder_is_one_clear_line(tiny_model, capsys):
    Path("runs").write_text("a file stands where the folder should be")
    run(*tiny_flags(tiny_model), code=2)
    told = capsys.readouterr().err
    assert "runs" in told and len(told.strip().splitlines()) == 1


# ---- The command line, as typed ----


def command(*flags):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, flags)], capture_output=True, text=True, timeout=100)


def test_the_command_trains_quietly_and_ends_with_the_outcome():
    done = command("--reward", "compressibility", "--epochs", 1, "--samples-per-epoch", 8, "--sampling-steps", 3,
                   "--eval-prompts", 3)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("compressibility: ") and " kB (" in last and "on 3 fixed prompts after 8 reward queries" in last
    assert len(done.stdout.splitlines()) == 4
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith("compressibility:") for line in bars), "only our own bar reaches the terminal"
    assert Path("runs/compressibility-ddpo-is-1/model/model_index.json").exists()


def test_the_command_answers_a_mistake_in_one_line():
    done = command("--epochs", "-3")
    assert done.returncode == 2 and not done.stdout and "--epochs -3" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_saves_and_says_how_to_resume(tiny_model):
    codes, (told,) = forked(1, *tiny_flags(tiny_model, epochs=10_000), send=(signal.SIGINT, 0, "runs/r"))
    assert codes == [130] and "Traceback" not in told and "python train.py --resume runs/r" in told
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] >= 1


# ---- One run, one process ----

HOLDER = "import sys, runs; from pathlib import Path; lock = runs.lock_run(Path(sys.argv[1])); print('held', flush=True); input()"


def test_a_run_that_another_process_trains_is_refused_until_that_is_dead(tiny_model, capsys):
    run(*tiny_flags(tiny_model, epochs=1))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, "runs/r"], env={**os.environ, "PYTHONPATH": str(ROOT)},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    capsys.readouterr()
    run("--resume", "runs/r", "--epochs", 2, code=2)
    line, = told(capsys)
    assert f"runs/r is being trained by another process (process {holder.pid} on " in line
    holder.kill()
    holder.wait()
    assert [row["epoch"] for row in run("--resume", "runs/r", "--epochs", 2)] == [0, 1, 2]


def test_unnamed_runs_that_start_at_the_same_moment_never_share_a_folder():
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: runs.create_run(Path("runs"), "", "stem"), range(64)))
    assert len(set(folders)) == 64
    with pytest.raises(ValueError, match="the run runs/stem-1 exists: choose another --name"):
        runs.create_run(Path("runs"), "stem-1", "stem")


# ---- Moved, or changed ----

def test_a_run_and_its_project_can_be_moved(tmp_path, monkeypatch):
    own = ROOT / "emoji" / "judge.py"
    config = settings.build_config({"reward": f"{own}:animal", "watch": [f"{own}:number"], "reward_model": ""})
    (tmp_path / "run").mkdir()
    runs.save_settings(tmp_path / "run", settings.saved_settings(tmp_path / "run", config))
    assert str(ROOT) not in (tmp_path / "run" / "config.json").read_text()
    assert settings.load_config(tmp_path / "run") == config
    monkeypatch.setattr(settings, "ROOT", Path("/new"))  # where the clone has been moved to
    moved = settings.load_config(tmp_path / "run")
    assert (moved.model, moved.reward, moved.watch) == (
        "/new/emoji/model", "/new/emoji/judge.py:animal", ("/new/emoji/judge.py:number",))


def test_a_prompt_file_inside_the_run_moves_with_it(tiny_model):
    Path("p.txt").write_text("a cat\na dog\n")
    run(*tiny_flags(tiny_model, epochs=1, prompts="p.txt"))
    shutil.move("p.txt", "runs/r/p.txt")
    run("--resume", "runs/r", "--epochs", 2, "--prompts", "runs/r/p.txt")
    assert '"prompts": "{run}/p.txt"' in Path("runs/r/config.json").read_text()
    Path("runs/r").rename("runs/renamed")
    assert settings.load_config(Path("runs/renamed")).prompts == str(Path("runs/renamed/p.txt").resolve())


def test_what_has_moved_is_taken_from_where_it_is_said_to_be_now_if_it_is_the_same(tiny_model, own_reward, tmp_path, capsys):
    shutil.copytree(tiny_model, "old")
    Path("p.txt").write_text("a cat\na dog\n")
    run(*tiny_flags("old", epochs=1, prompts="p.txt", reward=own_reward("redness")))
    for old, new in (("old", "new"), ("p.txt", "q.txt"), ("own.py", "mine.py")):
        Path(old).rename(new)
    moved = ["--model", "new", "--prompts", "q.txt", "--reward", "mine.py:redness"]
    capsys.readouterr()
    run("--resume", "runs/r", "--epochs", 2, code=2)
    assert "no prompts" in told(capsys)[0]
    assert len(run("--resume", "runs/r", "--epochs", 2, *moved)) == 3
    Path("again").symlink_to("new")
    run("--resume", "runs/r", "--epochs", 3)  # the new places are kept
    assert evaluate.main(["runs/r", "--images", "2", "--base", "again"]) == 0
    Path("other.py").write_text(Path("mine.py").read_text() + "#")
    for changed, flags in (("prompts", ["--prompts", "dpok"]), ("reward redness", ["--reward", "other.py:redness"])):
        capsys.readouterr()
        run("--resume", "runs/r", "--epochs", 4, *flags, code=2)
        line, = told(capsys)
        assert f"runs/r began with another state of the {changed} than" in line


@pytest.mark.parametrize("file, changed", [("p.txt", "prompts"), ("own.py", "reward redness"), ("watched.py", "reward letters")])
def test_a_file_that_changed_since_the_run_began_is_refused_by_name(file, changed, tiny_model, own_reward, capsys):
    shutil.copy("own.py", "watched.py")
    Path("p.txt").write_text("a cat\na dog\n")
    run(*tiny_flags(tiny_model, epochs=1, prompts="p.txt", reward=own_reward("redness"), watch="watched.py:letters"))
    Path(file).write_text(Path(file).read_text() + "\n# an owl\n")
    capsys.readouterr()
    run("--resume", "runs/r", "--epochs", 3, code=2)
    line, = told(capsys)
    assert f"began with another state of the {changed} than" in line and file in line
    assert len(runs.read_rows(Path("runs/r"))) == 2 and Path("runs/r/model").exists()


# ---- Signals, terminals, disks ----

@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])  # Ctrl-C: test_ddpo.py
def test_each_signal_that_ends_a_job_saves_and_says_how_to_go_on(name, tiny_model, capsys):
    Path("sends.py").write_text(f"import os, signal\ndef reward(images, prompts):\n    if len(images) == 4 and not "
                                f"os.path.exists('sent'):\n        open('sent', 'w')\n        os.kill(os.getpid(), signal.{name})\n"
                                "    return images.mean((1, 2, 3))\n")
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # a background job may ignore it
    run(*tiny_flags(tiny_model, reward="sends.py:reward", epochs=1), code=130)
    signal.signal(getattr(signal, name), before)
    assert "interrupted; the state after 0 epochs is saved; go on with: python train.py --resume runs/r" in told(capsys)[-1]
    assert len(run("--resume", "runs/r")) == 2


def test_a_signal_that_is_ignored_as_under_nohup_stays_ignored(tiny_model):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(*tiny_flags(tiny_model, epochs=1))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_a_reward_started_ends_at_a_kill_as_it_would_elsewhere():
    process.stop_on_signals()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"ready")
        time.sleep(60)
        os._exit(0)
    os.read(read, 5)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


@pytest.mark.parametrize("stream, code, epoch", [("stdout", 0, 1), ("stderr", 2, -1)])
def test_without_a_reader_of_its_results_a_run_goes_on_and_without_a_terminal_it_is_saved(stream, code, epoch, tiny_model, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, stream, os.fdopen(write, "w", buffering=1))
    run(*tiny_flags(tiny_model, epochs=1), code=code)
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] == epoch


def test_on_a_full_disk_no_run_begins(tiny_model, monkeypatch, capsys):
    Path("full").mkdir()
    Path("full/new-state.pt").symlink_to("/dev/full")  # where each write fails as on a full disk
    monkeypatch.setattr(runs, "checkpoint_file", lambda folder: Path("full/state.pt"))
    run(*tiny_flags(tiny_model), code=2)
    line, = told(capsys)
    assert "No space left on device" in line and not Path("runs/r").exists()


def test_ctrl_c_while_the_checkpoint_is_written_is_ctrl_c_and_the_earlier_one_stays(tiny_model, monkeypatch):
    def cut_short(state, file):  # as torch does in the middle of its zip file
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 530432 vs 530324")

    experiment = train.new_run(settings.parse(tiny_flags(tiny_model, epochs=1), ""))
    before = runs.checkpoint_file(experiment.folder).read_bytes()
    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        experiment.save()
    assert runs.checkpoint_file(experiment.folder).read_bytes() == before


def test_a_checkpoint_is_written_without_a_copy_of_the_weights(tiny_model):
    experiment = train.new_run(settings.parse(tiny_flags(tiny_model), ""))
    state, weights = experiment.state_dict()["weights"], experiment.policy.trained
    assert all(state[name].data_ptr() == weight.data_ptr() for name, weight in weights.items()) and state


def test_a_log_that_is_gone_is_not_taken_for_a_run_that_never_began(tiny_model, capsys):
    run(*tiny_flags(tiny_model, epochs=1))
    Path("runs/r/log.jsonl").unlink()
    capsys.readouterr()
    run("--resume", "runs/r", "--epochs", 2, code=2)
    line, = told(capsys)
    assert "the log of runs/r lacks epochs up to 1: put log.jsonl back" in line


def test_settings_that_are_edited_or_damaged_while_a_run_trains_do_not_become_its_own(tiny_model):
    Path("edits.py").write_text("def reward(images, prompts):\n    with open('runs/r/config.json', 'w') as file: file.write('{')\n"
                                "    return images.mean((1, 2, 3))\n")
    run(*tiny_flags(tiny_model, epochs=1, reward="edits.py:reward"))
    state = torch.load("runs/r/checkpoint/state.pt", weights_only=True)
    assert state["epoch"] == 1 and state["settings"]["learning_rate"] == 2e-4


def test_a_run_that_cannot_write_its_settings_leaves_no_folder_that_blocks_its_name(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(runs, "save_settings", lambda *_: open("/dev/full", "w").write("x" * 10**6))
    run(*tiny_flags(tiny_model), code=2)
    assert "No space left" in told(capsys)[0] and not Path("runs/r").exists()


def test_files_of_other_names_among_the_images_end_in_no_traceback(tiny_model):
    run(*tiny_flags(tiny_model, epochs=1))
    Path("runs/r/samples/epoch_final (1).png").touch()
    run("--resume", "runs/r", "--epochs", 2)


def test_evaluate_prints_its_table_where_it_cannot_write_its_image(tiny_model, tmp_path, capsys):
    run(*tiny_flags(tiny_model, epochs=1))
    (tmp_path / "new-out.png").symlink_to("/dev/full")
    assert evaluate.main(["runs/r", "--output", "out.png"]) == 2
    printed = capsys.readouterr()
    assert "out.png could not be written: No space left on device" in printed.err and "| runs/r | compressibility" in printed.out


# ---- What goes wrong in the numbers ----

@pytest.mark.parametrize("part, what", [("vae", "an image"), ("unet", "a latent"), ("text_encoder", "a latent")])
def test_a_pretrained_model_that_draws_nan_is_told_as_that(part, what, tiny_model, capsys):
    shutil.copytree(tiny_model, "broken")
    edit_weights(Path("broken") / part, scaled(float("inf")))
    run(*tiny_flags("broken"), code=2)
    nothing = "" if part == "vae" else ", and nothing was learned yet: it is the pretrained model"  # a VAE is tried when it is loaded
    assert f"{what} is not finite{nothing}" in told(capsys)[-1]


def test_nan_after_learning_blames_the_step(tiny_model, capsys):
    run(*tiny_flags(tiny_model, **{"learning-rate": 1e30}), code=2)
    line = told(capsys)[-1]
    assert "not finite: start a new run with a smaller --learning-rate" in line and "--resume" not in line


def test_settings_of_memory_and_speed_may_change_on_the_way(tiny_model, monkeypatch, capsys):
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=3))
    with monkeypatch.context() as patch:
        patch.setitem(train.UPDATES, "ddpo-is", (lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()), True))
        run(*tiny_flags(tiny_model, epochs=3), code=2)
    assert "a smaller --micro-batch or --sample-batch needs less" in (line := told(capsys)[-1]) and "--resume runs/r" in line
    rows = run("--resume", "runs/r", "--micro-batch", 1, "--sample-batch", 2, "--gradient-checkpointing")
    assert [row["reward_mean"] for row in rows[1:]] == pytest.approx([row["reward_mean"] for row in whole[1:]], rel=1e-5)
    config = settings.load_config(Path("runs/r"))
    assert (config.micro_batch, config.sample_batch, config.gradient_checkpointing) == (1, 2, True)


def test_a_run_that_goes_on_elsewhere_takes_the_optimizer_of_that_device(tiny_model):
    run(*tiny_flags(tiny_model, epochs=1))
    path = Path("runs/r/checkpoint/state.pt")
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][0]["fused"] = True  # as on a GPU
    torch.save(state, path)
    assert train.resume(Path("runs/r"), {"epochs": 2}).optimizer.param_groups[0]["fused"] is False


# ---- Devices ----

@pytest.mark.parametrize("name, gpus, message", [
    ("cuda:7", 2, "torch sees only 2 of them"), ("cuda", 0, "torch sees no GPU; use --device cpu"), ("tpu", 0, "choose auto, cpu"),
    ("meta", 0, "choose auto, cpu"), ("mps", 0, "--device mps"), ("cpu:1", 0, "--device cpu:1")])
def test_a_device_that_torch_does_not_have_is_refused(name, gpus, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message):
        settings.check_device(name)


def test_a_second_gpu_and_mps_are_taken_where_torch_has_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        settings.check_device(name)
    settings.check(settings.Config(device="cuda:1"))  # in fp16, the default
    with pytest.raises(ValueError, match="fp16 needs a GPU with CUDA"):
        settings.check(settings.Config(device="mps"))
