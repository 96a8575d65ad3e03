"""Trust in checkpoints: their own code runs only if the user allows it, and no pickle is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Weights and adapters: their pickled files, and the files that are loaded instead
PICKLED = {"pytorch_model*.bin*": "model*.safetensors*", "adapter_model.bin": "adapter_model.safetensors"}


def check_safetensors(what: str, path: str, subfolder: str = "") -> None:
    """Raise `ValueError` if a folder has its weights as pickles only. transformers refuses those on the hub."""
    folder = Path(path, subfolder)
    for pickled, safe in PICKLED.items():
        found = sorted(file.name for file in folder.glob(pickled))
        if found and not any(folder.glob(safe)):
            raise ValueError(
                f"{what} {path!r} has {found[0]}, a pickle, which may run any code when it is loaded, and no "
                f"{safe.replace('*', '')}: only safetensors are loaded here. If you trust the file, load it in an "
                "isolated environment, and save it again with `model.save_pretrained(folder)`."
            )


def own_code_error(what: str, cure: str) -> ValueError:
    return ValueError(
        f"{what} brings Python code of its own, which runs with your rights, and only if you allow it. "
        f"Read it first. {cure}"
    )


@contextmanager
def own_code_is_refused(what: str, cure: str) -> Iterator[None]:
    """Turns transformers' refusal to run a checkpoint's own code into an error that says what to set here."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise own_code_error(what, cure) from error


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def check_url(option: str, url: str, cure: str) -> None:
    """Raise `ValueError`, without showing the URL, if it may hold a secret."""
    if any(mark in url for mark in "@?#"):
        raise ValueError(f"{option} must hold no user name, password or query, since URLs are shown. {cure}")
