"""What a run leaves on disk, under runs/NAME/: settings, log, pictures, curve, checkpoint, model. Knows no algorithm.

    config.json                 every setting
    log.jsonl                   one object an epoch; row k holds the evaluation after k epochs and the training of epoch k
    samples/epoch_0000.png      the fixed prompts and noise, drawn by the weights after that many epochs
    progress.png                the first few of them over the epochs, one row an evaluation
    curve.png                   reward against reward queries
    checkpoint/state.pt         everything that --resume needs
    model/                      the trained pipeline, which plain diffusers loads
"""
import json
import os
import shutil
import textwrap

import torch
from PIL import Image, ImageDraw

COLUMNS = 9
LINE_HEIGHT = 13  # pixels, of a label's text


def write_atomically(path, write):
    """Call `write(temporary path)`, then put the file in place: what stood there before survives a kill or a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("new-" + path.name)  # in front, since writers go by the ending
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)  # half a checkpoint would keep a full disk full
        # torch and safetensors tell of a full disk in exceptions of their own.
        raise error if isinstance(error, OSError) or not isinstance(error, Exception) else OSError(
            f"{path} could not be written: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def create_run(parent, name, stem, settings):
    """A new folder runs/NAME, or runs/STEM-1, -2, ... where no name is given. Raises ValueError if NAME exists."""
    if name and (parent / name).exists():
        raise ValueError(f"the run {parent / name} exists: choose another --name, or continue it with "
                         f"--resume {parent / name}")
    number = 1
    while not name and (parent / f"{stem}-{number}").exists():
        number += 1
    folder = parent / (name or f"{stem}-{number}")
    folder.mkdir(parents=True)
    save_settings(folder, settings)
    return folder


def save_settings(folder, settings):
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))


def load_settings(folder):
    """The settings of a run. Raises ValueError if there is no run to resume."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no run: it has no config.json") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error


def save_checkpoint(folder, state):
    """Everything that changes in a run, in one file, with the settings it belongs to. Raises OSError, the old one kept."""
    state = {"settings": load_settings(folder), **state}
    write_atomically(folder / "checkpoint" / "state.pt", lambda path: torch.save(state, path))


def load_checkpoint(folder):
    """The saved state, on the CPU. Raises ValueError if there is none, it is damaged, or it is of other settings."""
    path = folder / "checkpoint" / "state.pt"
    if not path.exists():
        raise ValueError(f"{folder} has no checkpoint yet: start the run again under another name")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = state.pop("settings")
    except Exception as error:  # pickle, zip and key errors of many types
        raise ValueError(f"the checkpoint {path} is damaged and cannot be read; the log and pictures are unharmed, but the "
                         "run has to start again under another name") from error
    now = load_settings(folder)
    changed = [key for key in sorted({*settings, *now} - {"epochs"}) if settings.get(key) != now.get(key)]
    if changed:
        raise ValueError(f"the checkpoint {path} is of another config: config.json differs in {', '.join(changed)}")
    return state


def append_line(path, line):
    """Add one dict to a file of JSON lines, in place of a last line that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_text() if path.exists() else ""
    if not whole.endswith("\n"):
        write_atomically(path, lambda temporary: temporary.write_text(whole[:whole.rfind("\n") + 1]))
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path):
    """The dicts of a file of JSON lines, none if there is no file. A last line that a kill cut short does not count.

    Raises ValueError if another is damaged.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def append_row(folder, row):
    """Add one epoch to the log."""
    append_line(folder / "log.jsonl", row)


def read_rows(folder):
    """The log: a list of one dict an epoch."""
    return read_lines(folder / "log.jsonl")


def forget_after(folder, epoch):
    """Drop the log's rows, the pictures and the model of epochs after `epoch`: a resumed run makes them again."""
    rows = [row for row in read_rows(folder) if row["epoch"] <= epoch]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(folder / "log.jsonl", lambda path: path.write_text(text))
    for path in (folder / "samples").glob("epoch_*.png"):
        if int(path.stem[6:]) > epoch:
            path.unlink()
    _remove(folder / "model")


def save_samples(folder, epoch, pictures, labels):
    """Draw pictures with labels of up to two lines as samples/epoch_NNNN.png, and progress.png anew."""
    write_atomically(folder / "samples" / f"epoch_{epoch:04d}.png", draw_grid(pictures, labels).save)
    draw_progress(folder, min(COLUMNS, len(pictures)))


def tile_size(pictures):
    """Side in pixels at which a picture stands in a grid."""
    return min(max(128, pictures[0].width), 256)


def draw_grid(pictures, labels, columns=COLUMNS):
    """Pictures in rows, each with its label under it."""
    tile, height = tile_size(pictures), LINE_HEIGHT * max(label.count("\n") + 1 for label in labels)
    columns = min(columns, len(pictures))
    grid = Image.new("RGB", (columns * (tile + 4), -(-len(pictures) // columns) * (tile + height + 4)), "white")
    pen = ImageDraw.Draw(grid)
    for k, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = k % columns * (tile + 4), k // columns * (tile + height + 4)
        label = "\n".join(line if len(line) <= tile // 5 else line[:tile // 5 - 1] + "…" for line in label.split("\n"))
        grid.paste(picture.resize((tile, tile), Image.Resampling.BICUBIC), (x, y))
        pen.multiline_text((x + tile / 2, y + tile + 1), label, fill="black", anchor="ma", align="center", spacing=1,
                           font_size=10)
    return grid


def draw_progress(folder, columns):
    """The first row of every grid under samples/ under each other, with the number of epochs on the left."""
    paths = sorted((folder / "samples").glob("epoch_*.png"))
    progress = first_rows([(f"epoch {int(path.stem[6:])}", path) for path in paths], columns)
    write_atomically(folder / "progress.png", progress.save)


def first_rows(labelled, columns=COLUMNS):
    """The first row of each grid of (label, path), without its captions, under each other, the labels on the left."""
    strips = []
    for _, path in labelled:
        with Image.open(path) as grid:
            strips.append(grid.convert("RGB").crop((0, 0, grid.width, grid.width // columns - 4)))  # less the gap
    margin, step = 90, strips[0].height + 4
    rows = Image.new("RGB", (margin + strips[0].width, step * len(strips)), "white")
    pen = ImageDraw.Draw(rows)
    for k, ((label, _), strip) in enumerate(zip(labelled, strips)):
        rows.paste(strip, (margin, k * step))
        words = "\n".join(textwrap.wrap(label, 15))  # as many letters as the margin is wide
        pen.multiline_text((margin / 2, k * step + strip.height / 2), words, fill="black", anchor="mm",
                           align="center", font_size=10)
    return rows


def draw_curve(folder, name, factor, unit):
    """Reward against reward queries: each epoch's samples with their spread, the fixed evaluation, and what the judge finds."""
    from matplotlib.figure import Figure  # its object interface: no window, no global state
    rows = read_rows(folder)
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [row for row in rows if row["reward_mean"] is not None]
    queries = [row["reward_queries"] for row in trained]
    mean = [factor * row["reward_mean"] for row in trained]
    low, high = ([m + sign * row["reward_std"] for m, row in zip(mean, trained)] for sign in (-1, 1))
    axes.fill_between(queries, low, high, alpha=0.2, linewidth=0, label="one standard deviation")
    axes.plot(queries, mean, label="samples of the epoch")
    evaluated = [row for row in rows if row["eval_reward_mean"] is not None]
    axes.plot([row["reward_queries"] for row in evaluated], [factor * row["eval_reward_mean"] for row in evaluated], "o-",
              label="fixed prompts and noise")
    axes.set(xlabel="reward queries", ylabel=f"{name} ({unit})" if unit else name)
    right = axes.twinx()
    right.set(ylabel="as asked for, says the judge (%)", ylim=(0, 105), visible=False)
    for column, marks, what in (("eval_named", "s:", "animal"), ("eval_counted", "^:", "number")):
        points = [(row["reward_queries"], 100 * row[column]) for row in evaluated if row.get(column) is not None]
        if points:  # a reward that rises while these fall is being gamed
            right.plot(*zip(*points), marks, color="gray", markersize=4, label=f"{what} as asked for (right)")
            right.set(visible=True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    write_atomically(folder / "curve.png", lambda path: figure.savefig(path, dpi=120))


def save_model(folder, pipeline):
    """The pipeline as model/, in fp32, so that `StableDiffusionPipeline.from_pretrained` draws what the policy drew."""
    _remove(folder / "model")
    write_atomically(folder / "model", pipeline.save_pretrained)
