"""compare.py, report.py, guidance.py."""
import shutil
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

from conftest import run
from studies import compare, guidance, report
from support.run_folder import append_line, read_lines


def line(label, seed, queries, values, animal=None, **settings):
    """A run's line in the results. clip_skip: a setting that is gone."""
    rows = [{"reward_queries": q, "eval_reward_mean": r, "watched": r and {"animal": a}}
            for q, r, a in zip(queries, values, animal or [1.0] * len(queries))]
    return {"label": label, "seed": seed, "folder": "gone", "command": "", "commit": "c", "machine": "m",
            "minutes": 1.0, "updates": 2, "rows": rows, "units": {"animal": [100, "%"], "number": [100, "%"]},
            "settings": {"algorithm": "ddpo-is", "eval_prompts": 9, "clip_skip": 0, **settings}}


def table(lines):
    """Its rows as dicts, by the head's words."""
    head, _, *rows = [row[2:-2].split(" | ") for row in report.table(lines, (-1, "kB")).splitlines()]
    return [dict(zip(head, row)) for row in rows]


def test_intervals_areas_and_queries_to_a_reward_by_hand_made_cases():
    assert report.interval([1, 2, 3]) == pytest.approx((2, 4.30 / 3**0.5), rel=1e-3)
    one = line("a", 0, [0, 100, 300], [-2.0, -1.0, -1.0])
    # The first 100 queries were spent on the policy of the start, whatever they led to.
    assert report.mean_during_training(one) == pytest.approx((-2 * 100 - 200) / 300)
    assert report.queries_to(one, 0.25) == 100 and np.isnan(report.queries_to(one, 0.9))
    assert np.isnan(report.queries_to(line("a", 0, [0, 9], [0.0, 1.0]), 0.1))  # no share of a start of 0
    between = line("a", 0, [0, 50, 100, 300, 400], [-2.0, None, -1.0, -1.0, None])  # epochs unevaluated
    assert report.mean_during_training(between) == pytest.approx((-2 * 50 - 1.5 * 50 - 200) / 300)
    row, = table([line("a", seed, [0, 9], [-2.0, -1.0], [1.0, end]) for seed, end in enumerate((0.9, 0.7))])
    assert row["animal at the end (%)"] == f"80.0 ± {12.71 * 10:.1f}" and "number at the end (%)" not in row
    assert row["end (kB)"] == "1.00 ± 0.00" and row["reward gained (%)"] == "50.0 ± 0.0"
    assert "gain over control (%)" not in row
    rows = table([line(label, 0, [0, 9], [-2.0, end]) for label, end in (
        ("flow", -1.0), ("flow, cps", -1.0), ("flow, weights of 1", -1.5))])
    assert [row["gain over control (%)"] for row in rows] == ["25.0", "-", "-"]


def test_the_gain_in_time_is_that_of_the_evaluation_before_the_watched_reward_fell():
    def gain(*animal):
        return report.gain_in_time(line("a", 0, [0, 4, 8, 12], [-2.0, -1.5, -1.0, -0.5], animal))

    assert gain(1.0, 0.9, 0.9, 0.9) == 75 and gain(1.0, 1.0, 0.8, 1.0) == 25 and gain(0.5, 0.4, 0.4, 0.4) == 0
    assert gain(*[float("nan")] * 4) == 75  # a watched reward that can judge no image ends no run


def test_the_protocols_tables_by_hand_made_cases():
    small = [line(label, seed, [0, 4, 8], [-2.0, mid, end], animal) for label, seed, mid, end, animal in (
        ("rwr", 5, -1.9, -1.8, None), ("rwr", 6, -1.9, -1.6, None),
        ("ddpo-is", 5, -1.5, -1.0, [1.0, 0.9, 0.5]), ("ddpo-is", 6, -1.6, -1.4, None),
        ("ddpo-is, random numbers", 5, -2.0, -1.9, None), ("ddpo-is, random numbers", 6, -2.0, -2.0, None))]
    large = [line(label, seed, [0, 4, 8], [2.0, 2.2, end]) for label, seed, end in (
        ("rwr", 5, 2.2), ("rwr", 6, 2.4), ("ddpo-is", 5, 3.0), ("ddpo-is", 6, 3.0),
        ("ddpo-is, random numbers", 5, 1.9), ("ddpo-is, random numbers", 6, 2.0))]
    rows = report.comparison(small, large, 8).splitlines()
    head, _, rwr, ddpo, _ = [row[2:-2].split(" | ") for row in rows]
    rwr, ddpo = (dict(zip(head, row)) for row in (rwr, ddpo))
    assert rwr["gain (%): mean"].startswith("15.0 ±")  # of 10, 10 and 20, 20
    assert ddpo["gain (%): smaller"][:6] == "40.0 ±" and ddpo["in time (%): smaller"][:6] == "27.5 ±"
    # By seed 25 - 10 and 30 - 20, 50 - 10 and 50 - 20: means of both rewards 27.5 and 20.
    assert ddpo["in time, minus rwr: mean"] == f"23.8 ± {12.71 * 3.75:.1f}"
    # By seed 50 - 5 and 30 - 0.
    assert ddpo["gain, minus its control: smaller"] == f"37.5 ± {12.71 * 7.5:.1f}"
    assert rwr["gain, minus its control: smaller"] == "-"
    assert "ddpo-is | 2 | 22.5 ± 31.8 | 10.0 ± 0.0 | 16.3" in report.comparison(small, large, 4)
    *_, best, _, last = report.scores(small, large).splitlines()
    assert best.startswith("| ddpo-is | 38.8 | 25.0, 30.0 | 50.0, 50.0") and last.startswith("| rwr | 15.0 |")
    seen = [report.judged_by(one, "animal", -1) for one in small]
    assert seen[2]["rows"][-1]["eval_reward_mean"] == -0.5
    assert report.judged_by(small[0], "other")["rows"] == small[0]["rows"]
    figures = {name: partial(report.points_gained, name=name) for name in ("reward", "animal")}
    text = report.differences(small, "rwr", figures | {"queries": report.queries_to_a_fifth})
    assert text.splitlines()[2] == (f"| ddpo-is | 2 | 50.0 ± {12.71 * 30:.1f} | -25.0 ± {12.71 * 25:.1f} | "
                                    f"-4.0 ± 0.0 |")


def planned(*flags):
    """The runs that these flags of compare.py plan."""
    with patch.object(compare, "work", lambda args: runs.extend(compare.planned_runs(args))):
        runs = []
        assert compare.main(list(flags)) == 0
    return runs


def test_planned_runs_are_accepted_by_train_at_the_same_number_of_queries():
    assert " ".join(planned("--ablation", "clip-range", "--precision", "bf16")[0].words) == (
        "--reward compressibility --precision bf16 --clip-range 0.0005 --samples-per-epoch 64 --epochs 10 "
        "--eval-every 2 --seed 0")
    for flags in (["--sweep"], [], ["--reward", "incompressibility"], ["--alignment"], ["--twins"],
                  *(["--ablation", one] for one in compare.ABLATIONS)):
        runs = planned(*flags)
        assert len({one.name for one in runs}) == len({one.key for one in runs}) == len(runs)
        queries = {one.config.epochs * one.config.samples_per_epoch for one in runs}
        assert len(queries) == 1 or flags[-1] in ("learn-steps", "sampling-steps")


def test_a_comparison_trains_what_no_study_has_and_goes_on_where_it_was_stopped(
        tiny_model, tmp_path, monkeypatch, capsys):
    tiny = (f"--model {tiny_model} --samples-per-epoch 4 --images-per-prompt 2 --sampling-steps 3 "
            "--eval-prompts 9 --updates-per-epoch 1")
    choices = {"done": tiny, "half": f"{tiny} --baseline none", "bad": f"{tiny} --learning-rate 1e30"}
    monkeypatch.setitem(compare.ABLATIONS, "tiny", (8, choices))
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    done, half, bad = planned("--ablation", "tiny", "--seeds", "1")
    log, shared = tmp_path / "compressibility" / "tiny.jsonl", compare.settings_of(done.config)
    known = {**line("as another study calls it", 0, [0, 4, 8], [-2.0, -1.0, -0.5], [1.0, 1.0, 0.5]),
             "settings": {**shared, "clip_skip": 0}, "model": done.model}
    append_line(log, {**known, "settings": {**shared, "epochs": 9}})  # of other settings: not this one
    append_line(log.with_name("other.jsonl"), known)
    rows = run(*half.words, "--name", half.name)
    shutil.rmtree(half.folder / "model")  # as if stopped before its end

    def in_this_process(command, **options):
        if bad.name not in command:
            run(*command[2:])
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(
        Popen=in_this_process, run=compare.subprocess.run, DEVNULL=None))
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 2
    assert "1 of 3 runs failed" in capsys.readouterr().err
    *_, copied, resumed = read_lines(log)
    assert copied == {**known, "label": "done"} and "begun earlier" in resumed["commit"]
    assert [row["loss"] for row in resumed["rows"]] == [row["loss"] for row in rows]
    del choices["bad"]
    monkeypatch.setattr(compare, "start", lambda run: pytest.fail("nothing is missing"))
    assert compare.main(["--ablation", "tiny", "--seeds", "1"]) == 0
    assert "| done | 1 | 2.00 | 0.50 | 75.0 | 50.0 | 1.50 | 50.0 |" in capsys.readouterr().out
    assert len(read_lines(log)) == 3 and log.with_suffix(".md").exists() and log.with_suffix(".png").exists()


def test_the_scale_is_that_of_the_most_reward_among_those_that_keep_the_watched_reward():
    chosen, nan = guidance.chosen_scale, float("nan")
    assert chosen({0.0: [0.1, 1.0], 1.0: [0.3, 0.95], 3.0: [0.4, 0.91], 9.0: [0.8, 0.5]}) == 3.0
    assert chosen({0.0: [0.1, -2.0], 1.0: [0.3, -2.1], 9.0: [0.8, -3.0]}) == 1.0
    assert chosen({0.0: [0.1], 9.0: [0.8]}) == chosen({0.0: [0.1, nan], 9.0: [0.8, nan]}) == 9.0
