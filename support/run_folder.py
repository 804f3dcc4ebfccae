"""What a run leaves on disk, under runs/NAME/. Knows no algorithm. Only the first process writes.

    config.json                 every setting, for people to read
    log.jsonl                   one object an epoch: the evaluation after it, and its training
    samples/epoch_0000.png      the fixed prompts and noise, drawn by the weights after that many epochs
    progress.png, progress.gif  the first of them over the epochs
    curve.png                   reward against reward queries, and the watched rewards
    checkpoint.pt               all that training changes, and the settings: what --resume reads
    model/                      the trained pipeline, or its LoRA weights, which plain diffusers loads
    lock                        held by the process that trains the run
    before_after.png            the images of evaluate.py
    tensorboard/, wandb/, wandb_id.txt   with --tracker
"""
import itertools
import json
import os
import shutil
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw

from support.processes import by_first

COLUMNS = 9
LINE_HEIGHT = 13  # pixels, of a label's text
GIF_EVALUATIONS = 20  # at most: more would make a large file, and cost seconds at each evaluation


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
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name or f"{stem}-{number}")
        try:
            folder.mkdir()  # of two runs that start at the same moment, one succeeds
            return folder
        except FileExistsError:
            if name:
                raise


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


@by_first
def save_config(folder, settings):
    """Write a run's settings for people to read."""
    write_text(folder / "config.json", json.dumps(settings, indent=1) + "\n")


@by_first
def append_row(folder, row):
    """Add one epoch to the log."""
    append_line(folder / "log.jsonl", row)


def read_rows(folder):
    """The log: a list of one dict an epoch."""
    return read_lines(folder / "log.jsonl")


def seconds_of(rows):
    """The seconds that a log tells of."""
    return sum(row[name] or 0 for row in rows for name in row if name.startswith("seconds_"))


@by_first
def save_checkpoint(folder, state):
    """Write the state of a run in one file."""
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
    """Draw Pillow images with their labels as samples/epoch_NNNN.png, and the progress pictures anew."""
    write_atomically(sample_file(folder, epoch), draw_grid(images, labels).save)
    paths = sample_files(folder)
    labels = [f"epoch {int(path.stem[6:])}" for path in paths]
    columns, aspect = min(COLUMNS, len(images)), images[0].height / images[0].width
    strips = [first_row(path, columns, aspect) for path in paths]
    write_atomically(folder / "progress.png", stack_rows(strips, labels).save)
    some = sorted({k * (len(paths) - 1) // (GIF_EVALUATIONS - 1) for k in range(GIF_EVALUATIONS)})
    shown = [strips[k] for k in some], [labels[k] for k in some]
    write_atomically(folder / "progress.gif", lambda path: save_gif(*shown, path))


def sample_file(folder, epoch):
    """Where the images of the evaluation after that epoch are."""
    return folder / "samples" / f"epoch_{epoch:04d}.png"


def sample_files(folder):
    """The images of a run's evaluations, in their order."""
    return sorted((folder / "samples").glob("epoch_*.png"), key=lambda path: int(path.stem[6:]))


def draw_grid(images, labels, columns=COLUMNS):
    """Pillow images in rows, each with its label under it. An image is 128 to 256 pixels wide there."""
    width = min(max(128, images[0].width), 256)
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


def stack_rows(strips, labels):
    """Rows of images under each other, each with its label on the left."""
    margin, step = 90, strips[0].height + 4
    rows = Image.new("RGB", (margin + strips[0].width, step * len(strips)), "white")
    pen = ImageDraw.Draw(rows)
    for k, (strip, label) in enumerate(zip(strips, labels)):
        rows.paste(strip, (margin, k * step))
        words = textwrap.fill(label, 15)  # as many letters as the margin is wide
        pen.multiline_text((margin / 2, k * step + strip.height / 2), words, fill="black", anchor="mm",
                           align="center", font_size=10)
    return rows


def save_gif(strips, labels, path, width=720):
    """A GIF of rows of images, each with its label below. The last stays longest."""
    width = min(width, strips[0].width)
    height, frames = strips[0].height * width // strips[0].width, []
    for strip, label in zip(strips, labels):
        frame = Image.new("RGB", (width, height + LINE_HEIGHT + 4), "white")
        frame.paste(strip.resize((width, height), Image.Resampling.LANCZOS))
        pen = ImageDraw.Draw(frame)
        pen.text((width / 2, height + 2), label, fill="black", anchor="ma", font_size=LINE_HEIGHT)
        frames.append(frame.quantize(method=Image.Quantize.FASTOCTREE))  # much faster than the default
    durations = [600] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


# ---- Curve ----

@by_first
def draw_curve(folder, name, unit, watched):
    """Reward against reward queries: the epochs' samples, the fixed prompts, the watched rewards.

    unit: factor and name of the reward's unit. watched: name -> unit of the watched rewards. These are drawn
    on the right, those of one unit on one axis.
    """
    from matplotlib.figure import Figure  # the object interface: no window, no global state
    rows, factor = read_rows(folder), unit[0]
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [row for row in rows if row["reward_mean"] is not None]
    queries = [row["reward_queries"] for row in trained]
    mean = factor * np.array([row["reward_mean"] for row in trained])
    deviation = factor * np.array([row["reward_std"] for row in trained])
    axes.fill_between(queries, mean - deviation, mean + deviation, alpha=0.2, linewidth=0,
                      label="one standard deviation")
    axes.plot(queries, mean, label="samples of the epoch")
    evaluated = [row for row in rows if row["eval_reward_mean"] is not None]
    queries = [row["reward_queries"] for row in evaluated]
    values = factor * np.array([row["eval_reward_mean"] for row in evaluated])
    axes.plot(queries, values, "o-", label="fixed prompts and noise")
    axes.set(xlabel="reward queries", ylabel=titled(name, unit))
    right = {}  # unit -> axis
    for k, (other, shown_in) in enumerate(watched.items()):
        if shown_in not in right:
            right[shown_in] = axes.twinx()
            right[shown_in].spines["right"].set_position(("outward", 70 * (len(right) - 1)))
            right[shown_in].set(ylabel=titled("watched", shown_in))
            if shown_in[1] == "%":
                right[shown_in].set_ylim(0, 105)
        values = shown_in[0] * np.array([row["watched"][other] for row in evaluated], float)
        style = {"color": f"C{k + 3}", "markersize": 4, "label": f"watched: {other}"}
        right[shown_in].plot(queries, values, "s^dvPX"[k % 6] + ":", **style)
    figure.set_figwidth(6.5 + 0.9 * max(len(right) - 1, 0))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    write_atomically(folder / "curve.png", lambda path: figure.savefig(path, dpi=120))


def titled(name, unit):
    """'JPEG size (kB)': a name with the name of its unit, if it has one. `unit` is a factor and that name."""
    return f"{name} ({unit[1]})".replace("$", r"\$") if unit[1] else name
