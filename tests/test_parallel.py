"""Several processes as one training: they learn what one would learn, and none waits for another that failed."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import parallel
import process
import pytest
import torch

import runs
from conftest import ROOT, forked, run, tiny_flags, without_seconds

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")  # a start of Python takes seconds


def alike(rows, others, tolerance=1e-5):
    """Whether two logs differ in seconds and rounding alone."""
    def close(one, other):
        if isinstance(one, (list, dict)):
            keys = one.keys() if isinstance(one, dict) else range(len(one))
            return len(one) == len(other) and all(close(one[key], other[key]) for key in keys)
        return one == other or isinstance(one, float) and one == pytest.approx(other, rel=tolerance, abs=tolerance)

    return close(without_seconds(rows), without_seconds(others))


@pytest.fixture(autouse=True)
def one_thread():
    """In this process too, as in the forked ones, so that they round alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model, flags", [
    ("tiny_model", {"algorithm": "ddpo-is", "learn-steps": 1}), ("tiny_sdxl", {"algorithm": "rwr", "batch-size": 3}),
    ("tiny_flow", {"algorithm": "nft", "batch-size": 3}), ("tiny_sd3", {"lora-rank": 2, "kl-weight": 1})],
    ids=["ddpo-is", "rwr", "nft", "lora"])
def test_two_processes_learn_what_one_learns(model, flags, own_reward, request):
    # A large epsilon: else AdamW makes a whole step of a gradient that is rounding and nothing else.
    flags = tiny_flags(request.getfixturevalue(model), epochs=3, reward=own_reward("redness"), **flags, **{"adam-epsilon": 1e-4},
                       watch=[own_reward("is_cat"), own_reward("letters")])
    one = run(*flags, "--name", "one")
    codes, (told, silence) = forked(2, *flags, "--name", "two")
    two = runs.read_rows(Path("runs/two"))
    assert codes == [0, 0] and not silence and len(two) == 4
    assert alike(one, two), (one[-1], two[-1])
    states = [torch.load(f"runs/{name}/checkpoint/state.pt", weights_only=True)["weights"] for name in ("one", "two")]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])


def test_a_run_begun_in_two_processes_goes_on_in_one_and_in_four(tiny_model):
    flags = {"eval-prompts": 4, "updates-per-epoch": 1}
    whole = run(*tiny_flags(tiny_model, name="whole", epochs=3, **flags))
    assert forked(2, *tiny_flags(tiny_model, epochs=1, **flags))[0] == [0, 0]
    run("--resume", "runs/r", "--epochs", 2)
    assert forked(4, "--resume", "runs/r", "--epochs", 3)[0] == [0] * 4
    assert alike(whole, runs.read_rows(Path("runs/r")))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_that_fails_in_one_process_ends_all_in_one_line_with_the_state_saved(rank, tiny_model):
    Path("own.py").write_text(f"import os\ncalls = 0\ndef reward(images, prompts):\n    global calls\n    calls += 1\n"
                              f"    if calls == 4 and os.environ['RANK'] == '{rank}': raise RuntimeError('the judge went home')\n"
                              "    return images.mean((1, 2, 3))\n")
    codes, (told, silence) = forked(2, *tiny_flags(tiny_model, epochs=3, reward="own.py:reward"))
    assert codes == [2, 2] and not silence
    who = "process 1: " if rank else ""
    assert (f"train.py: {who}the reward reward failed: RuntimeError: the judge went home (own.py, line 6); the state after 1 epochs is "
            "saved; go on with: python train.py --resume runs/r") in told and "Traceback" not in told
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] == 1


def test_a_signal_waits_until_an_exchange_is_over():
    process.stop_on_signals()
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with process.signals_held():
            signal.raise_signal(signal.SIGTERM)
            steps.append("the exchange goes on")
        steps.append("never reached")
    assert steps == ["the exchange goes on"]


@pytest.mark.parametrize("number, rank, codes, message", [
    (signal.SIGINT, 0, [130, 2], "train.py: interrupted; the state after"),
    (signal.SIGTERM, 1, [2, 130], "train.py: process 1: interrupted; the state after"),
    (signal.SIGKILL, 1, [2, -9], "train.py: another process is gone: ")])
def test_a_signal_to_one_process_ends_all_with_the_state_saved(number, rank, codes, message, tiny_model):
    ended, (told, _) = forked(2, *tiny_flags(tiny_model, epochs=10_000), send=(number, rank, "runs/r"))
    assert ended == codes and message in told and "python train.py --resume runs/r" in told and "Traceback" not in told
    assert runs.load_checkpoint(Path("runs/r"))["epoch"] >= 1


def test_a_mistake_in_several_processes_is_told_once(tiny_model):
    for flags, message in ((["--reward", "beauty"], "no reward 'beauty'"), (["--samples-per-epoch", 5, "--images-per-prompt", 1, "--updates-per-epoch", 1, "--stats-buffer", 8],
                           "--samples-per-epoch 5 does not divide into equal shares for 2 processes")):
        codes, (told, silence) = forked(2, *tiny_flags(tiny_model), *flags)
        assert codes == [2, 2] and not silence and message in told and len(told.splitlines()) == 1
    codes, (told, *_) = forked(4, *tiny_flags(tiny_model))
    assert codes == [2] * 4 and "4 processes are too many: an update has 2 images to share, an evaluation 3 prompts" in told
    assert not Path("runs").exists()


def test_a_world_without_torchrun_is_refused_and_one_process_is_none(tiny_model, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(*tiny_flags(tiny_model), code=2)
    assert "WORLD_SIZE is 2, but RANK is not set: start several processes with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel.start()
    assert parallel.size() == 1 and parallel.is_first() and parallel.my_parts(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_the_command_of_the_readme_trains(tiny_model):
    flags = tiny_flags(tiny_model, epochs=1)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py"), *flags],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "cpu in 2 processes, fp32" in done.stdout and done.stdout.count("fixed prompts after 4 reward queries") == 1


def test_a_process_that_fails_while_another_still_loads_leaves_no_folder_that_blocks_the_name(tiny_model):
    Path("p.py").write_text("import os, time\nif os.environ['RANK'] == '1': raise RuntimeError('no such judge here')\n"
                            "def reward(images, prompts): return images.mean((1, 2, 3))\n")
    codes, (told, silence) = forked(2, *tiny_flags(tiny_model, reward="p.py:reward"))
    assert codes == [2, 2] and "process 1: " in told and "no such judge here" in told and not silence and "Traceback" not in told
    assert not Path("runs/r").exists()
