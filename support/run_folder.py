"""What a run leaves on disk, under runs/NAME/. Knows no algorithm. Only the first process writes.

    config.json                 every setting, for people to read
    log.jsonl                   one object an epoch: the evaluation after it, and its training
    index.html                  all this as a page: run_page.py
    samples/epoch_0000.png      the fixed prompts and noise, drawn by the weights after that many epochs
    progress.gif                the first of them over the epochs
    curve.png                   reward against reward queries, and the watched rewards
    checkpoint.pt               all that training changes, and the settings: what --resume reads
    model/                      the trained pipeline, or its LoRA weights, which plain diffusers loads
    lock                        held by the process that trains the run
    before_after.png            the images of evaluate.py
    tensorboard/, wandb/, wandb_id.txt   with --tracker
"""
import contextlib
import itertools
import json
import os
import shutil
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw

from support.processes import by_first

COLUMNS = 9
LINE_HEIGHT = 13  # pixels, of a label's text
GIF_EVALUATIONS = 20  # at most


# ---- Files ----

def write_atomically(path, write):
    """Call write(temporary path), then put that file or folder in place: a kill leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("new-" + path.name)  # in front, since Pillow and torch go by the ending
    write(temporary)
    os.replace(temporary, path)


def write_text(path, text):
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@by_first
def append_line(path, line):
    """Add one dict to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path):
    """The dicts of a file of JSON lines; none if there is no file. A line cut short does not count."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ---- The folder, its log, checkpoint and model ----

def create_run(parent, name, stem):
    """A new folder runs/NAME, or runs/STEM-1, -2, ... if no name is given."""
    for number in itertools.count(1):
        folder = parent / (name or f"{stem}-{number}")
        with contextlib.suppress(*[] if name else [FileExistsError]):  # two runs may start at one moment
            folder.mkdir(parents=True)
            return folder


@by_first
def lock_run(folder):
    """Claim a run until the returned file is closed or the process ends. ValueError if it is claimed."""
    file = open(folder / "lock", "a+")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{folder} is being trained by another process: stop it, or wait") from error
    except (ImportError, OSError):  # Windows, and some network file systems, cannot lock so
        pass
    return file


def read_rows(folder):
    """The log: a list of one dict an epoch."""
    return read_lines(folder / "log.jsonl")


def seconds_of(rows):
    """The seconds that a log tells of."""
    return sum(row[name] or 0 for row in rows for name in row if name.startswith("seconds_"))


@by_first
def save_checkpoint(folder, state):
    """Write the state of a run in one file, and its settings for people to read."""
    write_text(folder / "config.json", json.dumps(state["settings"], indent=1) + "\n")
    write_atomically(folder / "checkpoint.pt", lambda path: torch.save(state, path))


def load_checkpoint(folder):
    """The saved state, on the CPU."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{folder} is no run: it has no {path.name}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # of 10 GB, what is needed


@by_first
def forget_after(folder, epoch):
    """Delete the model, and the log's rows and images after `epoch`: a resumed run makes them again."""
    rows = [row for row in read_rows(folder) if row["epoch"] <= epoch]
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for path in sample_files(folder):
        if int(path.stem[6:]) > epoch:
            path.unlink()
    shutil.rmtree(folder / "model", ignore_errors=True)


@by_first
def save_model(folder, save):
    """Write the trained model as model/, by save(path)."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    write_atomically(folder / "model", save)


# ---- Images ----

@by_first
def save_samples(folder, epoch, images, labels):
    """Draw Pillow images with their labels as samples/epoch_NNNN.png."""
    write_atomically(sample_file(folder, epoch), draw_grid(images, labels).save)


@by_first
def draw_progress(folder, unit, shape):
    """Draw progress.gif: the first row of some evaluations, each with the mean reward of all their images.

    unit: see rewards.unit_of. shape: of an evaluation's images: how many, height, width.
    """
    count, height, width = shape
    rows = [row for row in read_rows(folder) if row["eval_reward_mean"] is not None]
    some = sorted({k * (len(rows) - 1) // (GIF_EVALUATIONS - 1) for k in range(GIF_EVALUATIONS)})
    strips = {f"epoch {row['epoch']}: {unit[0] * row['eval_reward_mean']:#.3g} {unit[1]}":
              first_row(sample_file(folder, row["epoch"]), min(COLUMNS, count), height / width)
              for row in (rows[k] for k in some)}
    write_atomically(folder / "progress.gif", partial(save_gif, strips))


def sample_file(folder, epoch):
    """Where the images of the evaluation after that epoch are."""
    return folder / "samples" / f"epoch_{epoch:04d}.png"


def sample_files(folder):
    """The images of a run's evaluations, in their order."""
    return sorted((folder / "samples").glob("epoch_*.png"), key=lambda path: int(path.stem[6:]))


def draw_grid(images, labels, columns=COLUMNS, width=0):
    """Pillow images in rows, each with its label under it. width: of one, in pixels; 0: 128 to 256."""
    width = width or min(max(128, images[0].width), 256)
    height = round(width * images[0].height / images[0].width)
    text_height = LINE_HEIGHT * max(label.count("\n") + 1 for label in labels)
    columns, letters = min(columns, len(images)), width // 5
    size = columns * (width + 4), -(-len(images) // columns) * (height + text_height + 4)
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for k, (image, label) in enumerate(zip(images, labels)):
        x, y = k % columns * (width + 4), k // columns * (height + text_height + 4)
        lines = [line if len(line) <= letters else line[:letters - 1] + "…" for line in label.split("\n")]
        grid.paste(image.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        pen.multiline_text((x + width / 2, y + height + 1), "\n".join(lines), fill="black", anchor="ma",
                           align="center", spacing=1, font_size=10)
    return grid


def first_row(path, columns=COLUMNS, aspect=1.0):
    """The first row of a grid, without its labels. aspect: height / width of its images."""
    with Image.open(path) as grid:
        height = round(aspect * (grid.width // columns - 4))  # less the gap
        return grid.convert("RGB").crop((0, 0, grid.width, height))


def save_gif(strips, path):
    """A GIF of label -> row of images. The last stays longest."""
    frames = [draw_grid([strip], [label], width=min(strip.width, 720)) for label, strip in strips.items()]
    frames = [frame.quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
    durations = [600] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


# ---- Curve ----

def new_figure(width, height):
    """An empty Figure, on no screen. A notebook's MPLBACKEND could keep matplotlib from being imported."""
    with patch.dict(os.environ, MPLBACKEND="agg"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


@by_first
def draw_curve(folder, name, unit, watched):
    """Reward against reward queries. Below it the watched rewards (name -> unit), those of one unit together.

    unit: see rewards.unit_of.
    """
    units = list(dict.fromkeys(watched.values()))
    figure = new_figure(6.5, 4 + 1.8 * len(units))
    heights = {"height_ratios": [2] + [1] * len(units)}
    axes, *below = figure.subplots(1 + len(units), sharex=True, squeeze=False, gridspec_kw=heights)[:, 0]
    rows = read_rows(folder)

    def values(key, rows, factor):
        return factor * np.array([row[key] for row in rows], float)

    trained = [row for row in rows if row["reward_mean"] is not None]
    queries, mean = values("reward_queries", trained, 1), values("reward_mean", trained, unit[0])
    deviation = values("reward_std", trained, unit[0])
    axes.fill_between(queries, mean - deviation, mean + deviation, alpha=0.2, linewidth=0,
                      label="one standard deviation")
    axes.plot(queries, mean, label="samples of the epoch")
    evaluated = [row for row in rows if row["eval_reward_mean"] is not None]
    queries = values("reward_queries", evaluated, 1)
    axes.plot(queries, values("eval_reward_mean", evaluated, unit[0]), "o-", label="fixed prompts and noise")
    axes.set(ylabel=titled(name, unit))
    for k, (other, own) in enumerate(watched.items()):
        panel, seen = below[units.index(own)], [row["watched"] for row in evaluated]
        style = {"color": f"C{k + 3}", "label": f"watched: {other}"}
        panel.plot(queries, values(other, seen, own[0]), "s^dvPX"[k % 6] + ":", **style)
        panel.set(ylabel=titled("watched", own), **{"ylim": (0, 105)} if own[1] == "%" else {})
    [axes, *below][-1].set(xlabel="reward queries")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    write_atomically(folder / "curve.png", lambda path: figure.savefig(path, dpi=120))


def titled(name, unit):
    """'JPEG size (kB)': a name with the name of its unit, if it has one. `unit` is a factor and that name."""
    return f"{name} ({unit[1]})".replace("$", r"\$") if unit[1] else name
