"""Several processes as one training: they learn what one learns, and the first alone writes and speaks."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, forked, rounded, run, tiny_flags, without_seconds
from support import processes, run_folder


@pytest.mark.parametrize("model, flags", [
    ("tiny_model", {"learn-steps": 1}), ("tiny_sd3", {"lora-rank": 2, "kl-weight": 1}),
    ("tiny_sdxl", {"algorithm": "rwr", "batch-size": 3}),
    ("tiny_flow", {"algorithm": "nft", "batch-size": 3})], ids=["ddpo-is", "lora", "rwr", "nft"])
def test_two_processes_learn_what_one_learns_and_the_first_alone_writes(model, flags, own_reward, request):
    # A large epsilon: else AdamW makes a whole step of a gradient that is rounding and nothing else.
    flags = tiny_flags(request.getfixturevalue(model), reward=own_reward("redness"),
                       watch=[own_reward("is_cat"), own_reward("letters")], **flags, **{"adam-epsilon": 1e-4})
    one = run(*flags, "--name", "one")
    codes, (_, silence) = forked(2, *flags, "--name", "two")
    assert codes == [0, 0] and not silence and not Path("out_1").read_text()
    assert without_seconds(run_folder.read_rows(Path("runs/two"))) == rounded(without_seconds(one))
    of_one, of_two = (run_folder.load_checkpoint(Path("runs") / name)["weights"] for name in ("one", "two"))
    assert all(torch.allclose(of_two[name], weight, atol=1e-5) for name, weight in of_one.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_says_why_and_the_other_does_not_go_on_without_it(rank, tiny_model):
    Path("own.py").write_text(f"""
import os
asked = []
def reward(images, prompts):
    asked.append(prompts)
    if len(asked) == 4 and os.environ["RANK"] == "{rank}": raise RuntimeError("the judge went home")
    return images.mean((1, 2, 3))
""")
    codes, told = forked(2, *tiny_flags(tiny_model, epochs=3, reward="own.py:reward"))
    assert codes == [1, 1] and told[rank].endswith("RuntimeError: the judge went home\n")
    assert "--resume runs/r" in told[0] and run_folder.load_checkpoint(Path("runs/r"))["epoch"] == 1


def test_a_watched_reward_that_fails_in_one_process_lets_all_go_on(tiny_model):
    Path("own.py").write_text("""
import os
def watched(images, prompts):
    if os.environ.get("RANK") == "1": raise ConnectionError
    return [1.0] * len(images)
""")
    flags = tiny_flags(tiny_model, watch="own.py:watched", **{"stop-below": "watched=90%"})
    codes, told = forked(2, *flags)
    rows = run_folder.read_rows(Path("runs/r"))
    assert codes == [0, 0] and [row["watched"] for row in rows] == [{"watched": None}] * 3
    assert told[0].count("watched is not known, so --stop-below lets the run go on") == 3
    assert told[0].count("watched failed, the run goes on: ConnectionError: ") == 1  # in the other process


def test_a_mistake_in_several_processes_is_told_once(tiny_model):
    for name, value, message in (("reward", "beauty", "no reward"), ("eval-prompts", 1, "are too many for"),
                                 ("samples-per-epoch", 2, "are too many for 1 images")):
        codes, (told, silence) = forked(2, *tiny_flags(tiny_model, **{name: value}))
        assert codes == [2, 2] and not silence and message in told and len(told.splitlines()) == 1
        assert not Path("runs").exists()


def test_the_command_of_the_readme_trains_quietly_in_a_folder_of_the_next_number(tiny_model):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    Path("runs/compressibility-ddpo-is-1").mkdir(parents=True)
    done = subprocess.run([*torchrun, ROOT / "train.py", *tiny_flags(tiny_model, epochs=1, name="")],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not [line for line in done.stderr.splitlines() if line and "%|" not in line], done.stderr
    _, described, _, last = done.stdout.splitlines()
    assert "processes: 2" in described and "after 4 reward queries" in last and done.returncode == 0
    assert Path("runs/compressibility-ddpo-is-2/model/model_index.json").exists()


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_another_launcher_are_told_of_torchrun(name, monkeypatch, capsys):
    for variables, told in (({name: "2"}, 1), ({name: "1"}, 0), ({name: "2", "WORLD_SIZE": "1"}, 0)):
        with monkeypatch.context() as patched:
            for one, value in variables.items():
                patched.setenv(one, value)
            processes.start()
        line = capsys.readouterr().err
        assert line.count("start them with torchrun") == len(line.splitlines()) == told
