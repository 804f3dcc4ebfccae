"""The page of a run."""
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from conftest import ROOT, run, tiny_flags

ODD = ["<b>a cat</b>", '</script><script>alert("x")</script>',
       "it's \"quoted\" & <img src=x onerror=alert(1)>", "a cat 😀", "a very long prompt " * 16,
       "DATA <!--<script>"]


class Tags(HTMLParser):
    """The tags of a page, and the data that it shows."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.data, self.is_data = [], "", False
        self.feed(page)
        assert "<" not in self.data

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))
        self.is_data = tag == "script" and ("id", "data") in attributes

    def handle_data(self, text):
        self.data += text if self.is_data else ""


def page_of(folder):
    page = Tags((folder / "index.html").read_text(encoding="utf-8"))
    return page.tags, json.loads(page.data)


def test_a_page_shows_what_the_log_says_and_no_prompt_becomes_markup(tiny_model):
    Path("odd.txt").write_text("\n".join(ODD), encoding="utf-8")
    Path("own.py").write_text("def own(images, prompts): return images.mean((1, 2, 3)), prompts\n"
                              "def seen(images, prompts): return [float('nan')] * len(images)\n"
                              "seen.unit = '%'")
    flags = tiny_flags(tiny_model, prompts="odd.txt", reward="own.py:own", watch="own.py:seen",
                       **{"eval-prompts": 6, "seed": 7})
    rows = run(*flags)
    tags, data = page_of(Path("runs/r"))
    template = (ROOT / "support" / "run_page.html").read_text(encoding="utf-8")
    assert tags == Tags(template).tags and "innerHTML" not in template and "document.write" not in template
    assert [one["epoch"] for one in data["evaluations"]] == [0, 1, 2]
    for one, row in zip(data["evaluations"], rows):
        assert [text for text, _, _ in one["images"]] == [odd.strip() for odd in ODD]
        assert one["images"] == row["eval_notes"] and one["reward"] == row["eval_reward_mean"]
        assert Path("runs/r", one["grid"]).exists() and one["watched"] == {"seen": None}
    assert data["samples"] == [[row["reward_queries"], row["reward_mean"]] for row in rows[1:]]
    own = data["facts"]["not as preset emoji"]
    assert "seed 7" in own and "epochs 2" in own and "learning_rate" not in own and "device" not in own
    assert data["commands"] == ["python train.py --resume runs/r", "python evaluate.py runs/r"]


def test_a_run_without_a_page_gets_one_by_the_command_and_a_resumed_one_shows_what_is_left(
        tiny_model, own_reward):
    run(*tiny_flags(tiny_model, watch=own_reward("is_cat")))
    made = page_of(Path("runs/r"))
    Path("runs/r/index.html").unlink()
    subprocess.run([sys.executable, "-m", "support.run_page", Path("runs/r").resolve()], cwd=ROOT, check=True)
    assert page_of(Path("runs/r"))[0] == made[0] and page_of(Path("runs/r"))[1] == made[1] | {
        "commands": page_of(Path("runs/r"))[1]["commands"]}
    run("--resume", "runs/r", "--epochs", "3", "--stop-below", "is_cat=200%")  # at once
    assert page_of(Path("runs/r"))[1]["epoch"] == 2
    run("--resume", "runs/r", "--epochs", "3", "--stop-below", "none")
    assert [one["epoch"] for one in page_of(Path("runs/r"))[1]["evaluations"]] == [0, 1, 2, 3]
