"""evaluate.py: before and after, on any prompts and rewards."""
from pathlib import Path

import pytest
import torch

import evaluate
import rewards
import train
from conftest import run, tiny_flags


def table(capsys, *flags):
    """The cells of evaluate.py's rows."""
    capsys.readouterr()
    assert evaluate.main(["runs/r", *flags]) == 0
    return [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 2], ids=["weights", "lora"])
def test_on_a_runs_own_prompts_before_and_after_are_what_its_log_says_to_the_last_bit(
        rank, precision, tiny_model, own_reward, capsys, monkeypatch):
    drawn, draw = [], train.draw_fixed
    for module in (train, evaluate):
        monkeypatch.setattr(module, "draw_fixed", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    flags = {"learning-rate": 1e-2, "lora-rank": rank, "precision": precision,
             "reward": own_reward("redness")}
    rows = run(*tiny_flags(tiny_model, epochs=1, watch="none", **flags))
    logged = [rewards.display(row["eval_reward_mean"], (1, "")) for row in rows]
    assert [cell.partition(" ±")[0] for cell in table(capsys)[0][4:6]] == logged and logged[0] != logged[1]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(drawn[:2], drawn[2:], strict=True))


def test_other_prompts_rewards_and_chains_may_be_asked_for(tiny_model, own_reward, capsys):
    watch = [own_reward("is_cat"), own_reward("brightness")]
    run(*tiny_flags(tiny_model, watch=watch, **{"learning-rate": 1e-2}))
    other = ["--prompts", "emoji_animals", "--images", "6"]
    assert [row[1] for row in table(capsys, *other, "--reward", watch[1])] == ["brightness", "is_cat"]  # once
    small, large, cat, brightness = table(capsys, *other, "--reward", "compressibility", "--reward",
                                          "incompressibility")  # the watched ones come last
    assert small[1:4] == ["compressibility", "emoji_animals", "6"] and "±" in small[6]
    assert small[4:6] == large[4:6] and int(small[7][:-1]) + int(large[7][:-1]) <= 101
    assert cat[1] == "is_cat" and cat[4:8] == ["100 %", "100 %", "0 %", "0%"]  # of the one that it can judge
    assert brightness[1] == "brightness" and " lux" in brightness[4] and "of the start" in brightness[6]
    noises = [table(capsys, *other, "--sampling-steps", "4", "--eta", eta)[0][4] for eta in "01"]
    assert noises[0] != noises[1] and Path("runs/r/before_after.png").exists()


def test_means_intervals_and_shares_by_hand_made_cases():
    kilobytes, share, nan = rewards.unit_of("compressibility"), (100, "%"), float("nan")
    before, after, change, improved = evaluate.reward_cells(*torch.tensor([[-2.0, -3], [-1, -2]]), kilobytes)
    assert (before, after) == ("2.50 ± 0.98 kB", "1.50 ± 0.98 kB")  # 1.96 sqrt(1/2) / sqrt(2)
    assert change == "-1.00 ± 0 kB (-40% of the start)" and improved == "100%"  # smaller is what is rewarded
    half = torch.tensor([[0.0] * 4, [0.0, 1.0] * 2])
    assert evaluate.reward_cells(*half, share)[1:] == ["50 ± 57 %", "50 ± 57 %", "50%"]
    judged = torch.tensor([[1.0, nan, 0.0], [1.0, 1.0, nan]])
    assert evaluate.reward_cells(*judged, share) == ["100 %", "100 %", "0 %", "0%"]
    assert evaluate.reward_cells(judged[:, 1] * nan, judged[:, 1] * nan, share) == ["-"] * 4
