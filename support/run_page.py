"""A run as a page, runs/NAME/index.html, to be opened from disk: images, curves, what it is, how it goes on.

    python -m support.run_page runs/NAME   # of a run that has none

run_page.html is the page. Here it gets the run's data, as JSON, which it shows as text alone.
"""
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from support.processes import by_first
from support.run_folder import COLUMNS, load_checkpoint, read_rows, sample_file, write_text
from support.settings import preset_settings, short_name

TEMPLATE = Path(__file__).with_suffix(".html")


@by_first
def write_page(folder, settings, units, epoch, aspect):
    """Write index.html. settings: saved ones. units: of the reward and the watched ones: rewards.unit_of.

    epoch: of the weights, which --stop-below may have taken back. aspect: height / width of an image.
    """
    rows, name, count = read_rows(folder), short_name(settings["reward"]), settings["eval_prompts"]
    evaluated = [row for row in rows if row["eval_reward_mean"] is not None]
    usual = preset_settings(settings) | {own: settings[own] for own in ("name", "device")}
    seconds = {part: sum(row[f"seconds_{part}"] or 0 for row in rows)
               for part in ("sample", "reward", "learn", "eval")}
    data = {
        "name": folder.name, "reward": name, "unit": units[name], "epoch": max(epoch, 0),
        "units": {other: unit for other, unit in units.items() if other != name},
        "count": count, "columns": min(COLUMNS, count), "aspect": aspect,
        "samples": [[row["reward_queries"], row["reward_mean"]] for row in rows[1:]],
        "evaluations": [{
            "epoch": row["epoch"], "queries": row["reward_queries"], "reward": row["eval_reward_mean"],
            "watched": row["watched"], "images": row.get("eval_notes", []),
            "grid": sample_file(Path(), row["epoch"]).as_posix()} for row in evaluated],
        "facts": {
            **{part: settings[part] for part in ("algorithm", "model", "reward", "prompts")},
            f"not as preset {settings['preset']}": ", ".join(
                f"{key} {value}" for key, value in settings.items() if value != usual.get(key)) or "nothing",
            "queries": str(rows[-1]["reward_queries"]), "written on": machine(settings["device"]),
            "seconds": ", ".join(f"{part} {total:.0f}" for part, total in seconds.items())},
        "commands": [f"python {command} {shlex.quote(str(folder))}"
                     for command in ("train.py --resume", "evaluate.py")]}
    text = json.dumps(data).replace("<", "\\u003c")  # "</script>" would end the data
    write_text(folder / "index.html", TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1))


def machine(device):
    """The name of the card, or the number of cores."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    from rewards import unit_of
    for folder in map(Path, sys.argv[1:]):
        try:
            state = load_checkpoint(folder)
        except ValueError as error:
            print(f"run_page.py: {error}", file=sys.stderr)
            sys.exit(2)
        saved = state["settings"]
        units = {short_name(name): unit_of(name) for name in (saved["reward"], *saved["watch"])}
        aspect = (saved["height"] or saved["width"] or 1) / (saved["width"] or saved["height"] or 1)
        write_page(folder, saved, units, state["epoch"], aspect)
