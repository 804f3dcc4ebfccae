"""Published networks, by hub name or by folder. What goes wrong is told in one line, not in a library's own."""
import sys
from pathlib import Path

HINT = "it is neither a folder here nor reachable on the hub (no such name, or no network)"


def from_pretrained(loader, name, what, **options):
    """loader.from_pretrained(name), quietly. Raises ValueError, which says what was to be loaded, and why it cannot be."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):  # their warnings and loading bars would bury our few lines
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        return loader.from_pretrained(str(name), **options)
    except Exception as error:  # a dozen types, from the hub's to safetensors' own
        where = "its files cannot be loaded" if Path(name).is_dir() else HINT
        raise ValueError(f"{what} {str(name)!r}: {where}: {_first_line(error)}") from error


def download(repository, filename, what):
    """The path of one file of a hub's repository, fetched if it is not there yet. Raises ValueError as above."""
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(repository, filename)
    except Exception as error:
        raise ValueError(f"{what} {repository}/{filename}: it is not reachable on the hub: {_first_line(error)}") from error


def announce(what, name):
    """Say what is being loaded: it may take minutes, and gigabytes."""
    print(f"loading {what}: {name}", file=sys.stderr, flush=True)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
