"""--stop-below: a watched reward that falls below its limit ends a run."""
import re
import sys

from rewards import display
from support import run_folder
from support.settings import short_name


def stop_limits(config):
    """name -> (number, whether it is a share of the reward's start), of --stop-below."""
    limits = {}
    for text in config.stop_below:
        match = re.fullmatch(r"(\w+)=(-?[\d.]+)(%?)", text)
        if not match or match[1] not in map(short_name, config.watch):
            raise ValueError(f"--stop-below {text}: must be as animal=0.9 or animal=90%, of a watched reward")
        limits[match[1]] = float(match[2]) / (100 if match[3] else 1), bool(match[3])
    return limits


def floor_of(start, kept):
    """start - (1 - kept) |start|: what a reward that began at start must keep, whatever its sign."""
    return start - (1 - kept) * abs(start)


def fallen_rewards(run):
    """In words, the watched rewards that the last evaluation found below their limit, or could not judge."""
    fallen = []
    for name, (number, is_share) in run.limits.items():
        values = [row["watched"][name] for row in run.rows if row["watched"]]
        last, first = values[-1], next((value for value in values if value is not None), None)
        limit = floor_of(first, number) if is_share and first is not None else number
        if last is None and name in run.failed:
            print(f"\n{name} is not known, so --stop-below lets the run go on", file=sys.stderr)
        elif last is None or last < limit:
            unit = run.units[name]
            fallen.append(f"{name} {display(last, unit)} is below {display(limit, unit)}")
    return fallen


def go_back(run, fallen):
    """Take back the weights of the evaluation before the fall. The log's file keeps the rows given up."""
    text = f"stopped after epoch {run.epoch}: {' and '.join(fallen)}"
    run.load_state_dict(run_folder.load_checkpoint(run.folder))
    run.rows = run.rows[:max(run.epoch, 0) + 1]
    print(f"{text}; the weights are those of epoch {max(run.epoch, 0)}", flush=True)
