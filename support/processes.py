"""Several processes as one training, each with a GPU of its own: torchrun --nproc-per-node 8 train.py ...

Every process holds the whole policy and the same generator, so all draw the same prompts, noise and order.
Each draws, judges and learns from its own rows. Chains and gradients are added up over the processes, rewards
are gathered in a row. So their number changes the result in rounding only (but for rewards that are random or
keep a state). If one fails, torchrun ends the others.

A process goes through its rows in parts that fit its memory. Where that runs out, a size is halved and what
was begun is done again, which changes rounding only, too:

    for part in parts(slice(0, n), config, "sample_batch"):
        with part as rows:  # a slice of at most config.sample_batch
            ...             # if memory runs out here, that size is halved, and the part comes again
"""
import functools
import gc
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

HELP = "smaller images, --lora-rank, half precision or a larger card would help"
LAUNCHERS = "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"  # variables of srun, Open MPI, MPICH


def start():
    """Join the processes that torchrun started beside this one. Only the first of them writes."""
    others = [name for name in LAUNCHERS if int(os.environ.get(name) or 1) > 1]
    if others and "WORLD_SIZE" not in os.environ:
        print(f"train.py: {others[0]} is {os.environ[others[0]]}: processes that srun or mpirun starts train "
              "the same run each, alone; as one training start them with torchrun", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from now on
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # a reward may take long
    if not is_first():
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        sys.stdout = sys.stderr = open(os.devnull, "w")


def finish():
    """Wait until every process has done its work, then leave the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this is the process that writes files and speaks to the user."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(n):
    """The slice of n rows that are this process's."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(n * rank // size(), n * (rank + 1) // size())


def parts(rows, sizes, name):
    """Contexts of a slice's rows, of at most sizes.name at a time. sizes: or a number, which stays."""
    first = rows.start
    while first < rows.stop:
        most = sizes if isinstance(sizes, int) else getattr(sizes, name)
        part = Part(sizes, name, rows=slice(first, min(first + most, rows.stop)))
        yield part
        first = part.rows.stop if part.fitted() else first


def attempts(sizes, name, at_one):
    """Contexts of a work that begins anew as a whole. at_one(): does what else helps; its name, or ""."""
    attempt = Part(sizes, name, at_one)
    yield attempt
    while not attempt.fitted():
        yield attempt


def use_checkpointing(config, denoiser):
    """Compute activations twice from now on, to save memory. Its name; "" if not new, or impossible."""
    if config.gradient_checkpointing or not denoiser._supports_gradient_checkpointing:
        return ""
    config.gradient_checkpointing = True
    denoiser.enable_gradient_checkpointing()
    return "gradient checkpointing"


class Part:
    """A context that lets torch.OutOfMemoryError pass by once it has halved a size; at 1 it is raised."""

    def __init__(self, sizes, name, at_one=lambda: "", rows=None):
        self.sizes, self.name, self.at_one, self.rows, self.fits = sizes, name, at_one, rows, False

    def __enter__(self):
        return self.rows

    def __exit__(self, kind, error, traceback):
        self.fits = kind is None
        if self.fits or not issubclass(kind, torch.OutOfMemoryError) or hasattr(error, "__notes__"):
            return False  # with a note: a part inside this one has tried all
        count = self.rows.stop - self.rows.start if self.rows else getattr(self.sizes, self.name)
        helped = self.halved(count) or self.at_one()
        if helped:
            print(f"\nout of memory with {self.name} {count}, on with {helped}", file=sys.stderr)
        else:
            error.add_note(f"{self.name} is {count}; {HELP}")
        return bool(helped)

    def halved(self, count):
        """Make the size half of count. Returns it, or "" if it stays: count is 1, or it is a number."""
        if count == 1 or isinstance(self.sizes, int):
            return ""
        setattr(self.sizes, self.name, min(count // 2, getattr(self.sizes, self.name)))
        return str(getattr(self.sizes, self.name))

    def fitted(self):
        """Whether it is done. If not, the memory is given back, now that the traceback is gone."""
        if not self.fits:
            gc.collect()  # an exception may hang in a cycle
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self.fits


def add_up(tensors):
    """Add up each tensor over the processes, in place: each left zeros in the others' rows."""
    if size() > 1:
        for tensor in tensors:
            total = tensor.contiguous()  # a gradient may be channels-last
            dist.all_reduce(total)
            tensor.copy_(total)


def gathered(values):
    """The values of all processes in a row, in the order of their shares: lists, or tensors (n, ...)."""
    if size() == 1:
        return values
    parts = [None] * size()
    dist.all_gather_object(parts, values.cpu() if isinstance(values, torch.Tensor) else values)
    return torch.cat(parts) if isinstance(values, torch.Tensor) else sum(parts, [])


def by_first(work):
    """The function as it is in the first process; in the others it does nothing and returns None."""
    return functools.wraps(work)(lambda *args, **options: work(*args, **options) if is_first() else None)


def from_first(work):
    """The result of work(), which the first process does for all."""
    results = [work() if is_first() else None]
    if size() > 1:
        dist.broadcast_object_list(results)
    return results[0]
