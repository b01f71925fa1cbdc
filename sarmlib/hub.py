"""The one door to what may lie on a hub: bounded in time, and clear about what is missing."""

import json
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from sarmlib.errors import ConfigError, DataError, ModelError, OfflineError, SarmlibError


def reachable() -> bool:
    """Whether the hub answers within 3 seconds (its client retries for 30); no under HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:
        return False
    if {"https", "all"} & getproxies().keys():
        return True  # through a proxy only the client can tell
    url, answers = urlsplit(constants.ENDPOINT), []

    def connect():
        with suppress(OSError), socket.create_connection((url.hostname, url.port or 443), 3):
            answers.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # a name look-up obeys no timeout
    thread.start()
    thread.join(3)
    return bool(answers)


def check_access(repo: str, revision: str | None = None, repo_type: str = "model") -> None:
    """Ask the hub for ``repo`` at ``revision``; under HF_HUB_OFFLINE=1 the local cache is trusted.

    Raises ConfigError for a data set without a commit, DataError for a refusal, OfflineError without a hub.
    """
    from huggingface_hub import HfApi, constants
    what = f"{repo_type} {repo!r} at {revision}"
    if repo_type == "dataset" and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ConfigError(f"{what}: pass revision=<40-digit commit>, listed under 'Files and versions' of its page")
    if constants.HF_HUB_OFFLINE:
        return
    try:
        if not reachable():
            raise ConnectionError
        HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=5)
    except Exception as error:  # of httpx or the hub client
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise DataError(f"the hub refuses {what}: status {status}; check the name and the commit, and log in if it "
                            "is gated") from error
        raise OfflineError(f"{what} is needed and the hub cannot be reached; pass a local folder, or set "
                           "HF_HUB_OFFLINE=1 to use the cache") from error


def hub_folder(source: str | os.PathLike) -> str:
    """A folder in the layout of the hub's cache as its one (or main) snapshot; anything else unchanged."""
    main = Path(source).expanduser() / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else "*"
    found = list(main.parents[1].glob(f"snapshots/{commit}"))
    return str(found[0]) if len(found) == 1 else os.fspath(source)


def from_hub(auto_class, path: str | os.PathLike | None, **kwargs):
    """``auto_class.from_pretrained`` of a folder, a ``.gguf`` file or a hub id (None: all is in ``kwargs``).

    Raises ModelError for what is absent or damaged, OfflineError for a hub id that cannot be had.
    """
    name = path if path is None else os.path.expanduser(hub_folder(path))
    if name and name.endswith(".gguf"):
        name, kwargs["gguf_file"] = os.path.split(os.path.abspath(name))
    local = name is None or os.path.isdir(name)
    if not local:
        if isinstance(path, Path) or name.startswith((".", "/")) or name.count("/") > 1:
            raise ModelError(f"model folder {name!r} does not exist")
        kwargs.setdefault("local_files_only", not reachable())
    try:
        for file in Path(name or os.devnull).glob("*config.json"):
            from_json(file.read_text(encoding="utf-8"))
        with quiet():
            return auto_class.from_pretrained(name, **kwargs)
    except SarmlibError:
        raise
    except Exception as error:  # of safetensors, torch, json or the hub client
        if local or not isinstance(error, OSError):
            raise ModelError(f"{name!r} cannot be loaded: {error}") from error
        raise OfflineError(f"model {name!r} is neither a local folder nor to be had from the hub; "
                           f"download it once and pass its folder ({str(error).splitlines()[0]})") from error


def weights_from_hub(auto_class, path, *, kinds=("missing", "mismatched"), **kwargs):
    """(model, loading info) by `from_hub`; ModelError for weights that do not fit (they would be random)."""
    if not str(path).endswith(".gguf"):
        kwargs.setdefault("use_safetensors", True)  # a .bin file is a pickle
    for index in Path(path or "").glob("*.index.json") if path else ():
        try:
            named = set(from_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{str(index)!r} is no index of weights: {error!r}") from error
        if wrong := [name for name in map(str, named) if Path(name).name != name]:
            raise ModelError(f"{str(index)!r} names {wrong[0]!r}, which is no file of its folder")
    kwargs["ignore_mismatched_sizes"] = True  # reported here, with the other kinds
    model, info = from_hub(auto_class, path, output_loading_info=True, **kwargs)
    for kind in kinds:
        if names := sorted(map(str, info.get(f"{kind}_keys") or ())):
            raise ModelError(f"{len(names)} {kind} keys in {str(path)!r}: {', '.join(names[:4])}; "
                             "too deep a layer, or another model than config.json says")
    return model, info


def from_json(text: str):
    """Parse JSON; ValueError for a key that stands twice in an object, where Python would take the last."""
    def unique(pairs: list[tuple]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} stands twice")
        return found
    return json.loads(text, object_pairs_hook=unique)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, no load report: layers above l are left out on purpose, the rest raises."""
    from transformers.utils import logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
