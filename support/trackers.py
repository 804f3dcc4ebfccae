"""Where else a run is shown: --tracker tensorboard or wandb."""
import uuid

import numpy as np
from PIL import Image

from support import run_folder
from support.processes import is_first


def load_trackers(name, folder, settings, epoch):
    """Functions that show a row of the log: one, or none. epoch: after which the run goes on, -1 if new."""
    shown_by = {"tensorboard": tensorboard, "wandb": wandb} if is_first() else {}
    return [shown_by[name](folder, settings, epoch)] if name in shown_by else []


def tensorboard(folder, settings, epoch):
    """For `tensorboard --logdir runs`: files in runs/NAME/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)  # no epoch is shown twice

    def show(row):
        for name, value in figures(row).items():
            writer.add_scalar(name, value, row["epoch"])
        for image in evaluated(folder, row):
            writer.add_image("fixed prompts", np.asarray(Image.open(image)), row["epoch"], dataformats="HWC")
        writer.flush()

    return show


def wandb(folder, settings, epoch):
    """For wandb.ai, project ddpo. WANDB_MODE=offline keeps it in runs/NAME/wandb."""
    import wandb
    number = folder / "wandb_id.txt"
    if not number.exists():
        run_folder.write_text(number, uuid.uuid4().hex)
    run = wandb.init(project="ddpo", name=folder.name, id=number.read_text(), resume="allow", dir=folder,
                     config=settings)
    run.define_metric("*", step_metric="epoch")  # by its own axis wandb would drop epochs made again

    def show(row):
        images = {"fixed prompts": wandb.Image(str(image)) for image in evaluated(folder, row)}
        run.log(figures(row) | images)

    return show


def figures(row):
    """name -> number, of those in a row of the log that are known."""
    watched = {f"watched/{name}": value for name, value in (row["watched"] or {}).items()}
    return {name: value for name, value in {**row, **watched}.items() if isinstance(value, (int, float))}


def evaluated(folder, row):
    """The image of a row's evaluation, in a list, which is empty if there was none."""
    return [] if row["eval_reward_mean"] is None else [run_folder.sample_file(folder, row["epoch"])]
