"""Published networks, by hub name or by folder. What goes wrong is told in one line, not in a library's own."""
import sys
from pathlib import Path

def quiet():
    """Silence the libraries' warnings and loading bars, which would bury our few lines. Before anything is taken from them."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def from_pretrained(loader, name, what, **options):
    """loader.from_pretrained(name). Raises ValueError, which says what was to be loaded, and why it cannot be.

    what: how the user calls it, with the flag that asks for it.
    """
    try:
        return loader.from_pretrained(str(name), **options)
    except Exception as error:  # a dozen types, from the hub's to safetensors' own
        why = "its files cannot be loaded"
        if isinstance(error, OSError) and not Path(name).is_dir():
            why = "it is neither a folder here nor reachable on the hub (no such name, or no network)"
        raise ValueError(f"{what} {str(name)!r}: {why}: {_first_line(error)}") from error


def file(name, filename, what):
    """The path of one file of a folder, or of a hub's repository, fetched if it is not there. Raises ValueError as above."""
    from huggingface_hub import hf_hub_download
    try:
        path = Path(name) / filename
        if Path(name).is_dir() and not path.is_file():
            raise FileNotFoundError(f"there is no {filename} in it")
        return path if path.is_file() else hf_hub_download(str(name), filename)
    except Exception as error:
        raise ValueError(f"{what} {str(name)!r}: {filename} is neither here nor reachable on the hub: "
                         f"{_first_line(error)}") from error


def announce(what, name):
    """Say what is being loaded, and let nothing else be said: it may take minutes, and gigabytes."""
    quiet()
    print(f"loading {what}: {name}", file=sys.stderr, flush=True)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
