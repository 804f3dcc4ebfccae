"""Where else a run is shown: --tracker tensorboard or wandb."""
import os
import uuid
from functools import partial

import numpy as np
from PIL import Image

from support import run_folder
from support.processes import is_first


def load_trackers(name, folder, settings, epoch):
    """Functions that show a row of the log: one, or none. epoch: after which the run goes on, -1 if new."""
    load = {"tensorboard": tensorboard, "wandb": wandb}.get(name) if is_first() else None
    return [partial(show_row, load(folder, settings, epoch), folder)] if load else []


def show_row(show, folder, row):
    """Show what is known of a row of the log: its numbers and, after an evaluation, the fixed prompts."""
    watched = {f"watched/{name}": value for name, value in (row["watched"] or {}).items()}
    figures = {name: value for name, value in {**row, **watched}.items() if isinstance(value, (int, float))}
    evaluated = row["eval_reward_mean"] is not None
    show(figures, Image.open(run_folder.sample_file(folder, row["epoch"])) if evaluated else None)


def tensorboard(folder, settings, epoch):
    """For `tensorboard --logdir runs`: files in runs/NAME/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)  # no epoch is shown twice

    def show(figures, image):
        for name, value in figures.items():
            writer.add_scalar(name, value, figures["epoch"])
        if image:
            writer.add_image("fixed prompts", np.asarray(image), figures["epoch"], dataformats="HWC")
        writer.flush()

    return show


def wandb(folder, settings, epoch):
    """For wandb.ai, project WANDB_PROJECT, or ddpo. WANDB_MODE=offline keeps it in runs/NAME/wandb."""
    import wandb
    number = folder / "wandb_id.txt"
    if not number.exists():
        run_folder.write_text(number, uuid.uuid4().hex)
    project = os.environ.get("WANDB_PROJECT", "ddpo")
    run = wandb.init(project=project, name=folder.name, id=number.read_text(), resume="allow", dir=folder,
                     config=settings)
    run.define_metric("*", step_metric="epoch")  # by its own axis wandb would drop epochs made again
    return lambda figures, image: run.log(figures | ({"fixed prompts": wandb.Image(image)} if image else {}))
