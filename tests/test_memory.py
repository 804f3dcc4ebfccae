"""Out of memory: what was begun is done again with half the size, and nothing is counted twice."""
from pathlib import Path

import pytest
import torch

import ddpo
from conftest import forked, learner, load_policy, rng, rounded, run, tiny_flags, without_seconds
from policy import Policy
from sampling import rollout
from support import processes
from support.run_folder import load_checkpoint, read_rows

REWARD = """
import torch
def redness(images, prompts):
    if len(images) > 2: raise torch.OutOfMemoryError
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""


@pytest.fixture
def full(monkeypatch):
    """A GPU that takes so many images at a time: full(drawing=2, learning=1)."""
    def set_room(**room):
        predict, decode = Policy.predict, Policy.decode_with_gradient

        def predicted(policy, x_t, *given):
            result = predict(policy, x_t, *given)  # what the graph holds is lost
            if len(x_t) > room["learning" if torch.is_grad_enabled() else "drawing"]:
                raise torch.OutOfMemoryError
            return result

        def decoded(policy, x_0):
            if len(x_0) > 1:
                raise torch.OutOfMemoryError
            return decode(policy, x_0)

        monkeypatch.setattr(Policy, "predict", predicted)
        monkeypatch.setattr(Policy, "decode_with_gradient", decoded)
    return set_room


@pytest.mark.parametrize("algorithm, rel", [  # nft's two losses nearly cancel: a gradient moves by 4e-5
    ("ddpo-is", 1e-5), ("nft", 1e-4)])
def test_a_run_that_runs_out_of_memory_is_one_with_smaller_sizes(algorithm, rel, tiny_model, full, capsys):
    Path("own.py").write_text(REWARD)
    flags = {"adam-epsilon": 1e-4, "updates-per-epoch": 1, "eval-prompts": 4}
    flags |= {"batch-size": 4} if algorithm == "nft" else {}
    flags = tiny_flags(tiny_model, algorithm=algorithm, reward="own.py:redness", watch="none", **flags)
    small = run(*flags, "--sample-batch", 2, "--micro-batch", 1, "--name", "small")
    capsys.readouterr()
    full(drawing=2, learning=1)
    found = run(*flags, "--sample-batch", 16, "--micro-batch", 4)
    assert without_seconds(found) == rounded(without_seconds(small), rel)
    kept = load_checkpoint(Path("runs/r"))
    assert (kept["settings"]["sample_batch"], kept["settings"]["micro_batch"]) == (2, 1)
    for name, weight in load_checkpoint(Path("runs/small"))["weights"].items():
        torch.testing.assert_close(kept["weights"][name], weight, rtol=0, atol=1e-5)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("out of memory")]
    assert sorted(told) == sorted(f"out of memory with {name} {size}, on with {size // 2}" for name, size in (
        ("sample_batch", 4), ("micro_batch", 4), ("micro_batch", 2), ("at_once", 4), ("decode_batch", 4),
        ("decode_batch", 2)))
    assert len(run("--resume", "runs/r", "--epochs", 3)) == 4
    assert "sample_batch" not in capsys.readouterr().err  # it was kept


def test_at_one_image_learning_turns_to_checkpointing_and_then_says_what_would_help(
        tiny_model, full, capsys):
    full(drawing=2, learning=0)
    with pytest.raises(torch.OutOfMemoryError) as error:
        run(*tiny_flags(tiny_model))
    assert error.value.__notes__ == [f"micro_batch is 1; {processes.HELP}"]
    told = capsys.readouterr().err
    assert told.count("out of memory with micro_batch 1, on with gradient checkpointing\n") == 1
    assert load_checkpoint(Path("runs/r"))["epoch"] == -1


def test_an_update_that_runs_out_of_memory_midway_counts_nothing_twice(tiny_model):
    norms = []
    for fails_at in (None, 2, 3):  # the gradient of the parts before is there already
        policy = load_policy(tiny_model, 3)
        trajectory = rollout(policy, ["a cat"] * 8, rng(), 8)
        given, calls, loss = learner(policy, micro_batch=4, updates_per_epoch=1), [], ddpo.clipped_loss

        def once(*values):
            calls.append(values)
            if len(calls) == fails_at:
                raise torch.OutOfMemoryError
            return loss(*values)

        info = ddpo.ddpo_update(policy, trajectory, torch.arange(8.0), loss=once, **given)
        norms.append(info["grad_norm"])
        assert given["config"].micro_batch == (2 if fails_at else 4)
        assert all(weight.grad is None for weight in policy.trained.values())
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-4)


def test_one_of_two_processes_may_run_out_of_memory(tiny_model):
    Path("own.py").write_text("""
import os, torch
def redness(images, prompts):
    if os.environ.get("RANK") == "1" and len(images) > 1: raise torch.OutOfMemoryError
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
""")
    flags = tiny_flags(tiny_model, reward="own.py:redness", **{"adam-epsilon": 1e-4, "eval-prompts": 4})
    one = run(*flags, "--name", "one")
    codes, _ = forked(2, *flags)
    assert codes == [0, 0]
    assert without_seconds(read_rows(Path("runs/r"))) == rounded(without_seconds(one))


def test_parts_are_halved_until_they_fit_and_other_errors_pass():
    class Sizes:
        rows = 4

    seen, sizes = [], Sizes()
    for part in processes.parts(slice(2, 9), sizes, "rows"):
        with part as rows:
            seen.append(rows)
            if rows.stop - rows.start > 1 and rows.start > 2:
                raise torch.OutOfMemoryError
    assert seen == [slice(2, 6), slice(6, 9), *(slice(k, k + 1) for k in (6, 7, 8))]
    assert sizes.rows == 1
    for error in (ZeroDivisionError, torch.OutOfMemoryError):  # a number is not halved
        with pytest.raises(error):
            for part in processes.parts(slice(0, 2), 2, ""):
                with part:
                    raise error
