"""Where else a run is shown: --tracker tensorboard or wandb. Each gets an epoch's figures, and a new image of the fixed prompts."""
import uuid

import numpy as np
from PIL import Image

import runs
from parallel import is_first


def load_tracker(name, folder, settings, epoch):
    """A function that shows a row of the log. settings: of the run. epoch: that after which the run goes on, -1 in a new run.

    Raises ValueError if the package is not installed, or not logged in.
    """
    if name == "none" or not is_first():
        return lambda row: None
    try:
        return {"tensorboard": tensorboard, "wandb": wandb}[name](folder, settings, epoch)
    except ImportError as error:
        raise ValueError(f"--tracker {name} needs a package that is not installed ({error}): pip install {name}") from error


def tensorboard(folder, settings, epoch):
    """For `tensorboard --logdir runs`: files in runs/NAME/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)  # what a resumed run makes again is not shown twice

    def show(row):
        for name, value in figures(row).items():
            writer.add_scalar(name, value, row["epoch"])
        for image in evaluated(folder, row):
            writer.add_image("fixed prompts", np.asarray(Image.open(image)), row["epoch"], dataformats="HWC")
        writer.flush()

    return show


def wandb(folder, settings, epoch):
    """For wandb.ai, project ddpo; a resumed run goes on there, too. WANDB_MODE=offline keeps it in runs/NAME/wandb."""
    import wandb
    number = folder / "wandb_id.txt"
    if not number.exists():
        runs.write_text(number, uuid.uuid4().hex)
    try:
        run = wandb.init(project="ddpo", name=folder.name, id=number.read_text(), resume="allow", dir=folder, config=settings)
    except (wandb.errors.Error, ValueError) as error:  # a ValueError of pydantic's, of several lines
        raise ValueError(f"--tracker wandb: {' '.join(str(error).split())[:200]} (WANDB_MODE=offline needs no login)") from error

    # An axis of our own: wandb would drop the epochs that a resumed run makes again.
    run.define_metric("*", step_metric="epoch")

    def show(row):
        run.log(figures(row) | {"fixed prompts": wandb.Image(str(image)) for image in evaluated(folder, row)})

    return show


def figures(row):
    """name -> number, of those in a row of the log that are known."""
    watched = {f"watched/{name}": value for name, value in (row["watched"] or {}).items()}
    return {name: value for name, value in {**row, **watched}.items() if isinstance(value, (int, float))}


def evaluated(folder, row):
    """The image of a row's evaluation, in a list, which is empty if there was none."""
    return [runs.sample_file(folder, row["epoch"])] if row["eval_reward_mean"] is not None else []
