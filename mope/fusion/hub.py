"""Download from and upload to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# All files of a checkpoint. None of them is code.
FILES = ["*.json", "*.safetensors", "*.txt", "*.md", "*.model"]
# Arguments of transformers' `from_pretrained` that control where files come from.
WHERE = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# Options of transformers that control how a model is built. Here, methods of the returned model replace them.
ABOUT_THE_MODEL = (
    *("dtype", "torch_dtype", "device_map", "low_cpu_mem_usage", "attn_implementation", "quantization_config", "variant"),
    *("output_loading_info", "subfolder", "proxies"),
)
# Options that the Auto classes add, and that have no effect here.
IGNORED = ("trust_remote_code", "_commit_hash", "adapter_kwargs", "code_revision", "weights_only", "use_safetensors")


def folder_of(name: str | Path, options: dict[str, Any]) -> Path:
    """Return the folder of a checkpoint: a local folder, or one downloaded from the hub.

    Args:
        name: A folder, or "organisation/name" if there is no such folder.
        options: Keyword arguments of `from_pretrained`. Those for the hub are removed from the dictionary.

    Raises:
        OSError: The checkpoint cannot be downloaded; the message of huggingface_hub gives the reason.
        TypeError: An option of transformers does not apply to models built around given encoders.
    """
    if refused := [key for key in ABOUT_THE_MODEL if options.pop(key, None) not in (None, "auto")]:
        raise TypeError(
            f"from_pretrained has no {', '.join(refused)} here: cast or move the returned model, model.to(...), or load the "
            "encoders yourself and pass them"
        )
    where = {key: options.pop(key) for key in WHERE if key in options}
    for key in IGNORED:
        options.pop(key, None)
    folder = Path(name)
    if folder.exists() or not _may_be_on_the_hub(str(name)):
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=FILES, **where))


def _may_be_on_the_hub(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and part not in (".", "..") for part in parts)


def push(folder: Path, repo_id: str, *, private: bool | None, token: str | None, revision: str | None, message: str) -> Any:
    """Upload a folder to a repository on the hub, created if necessary; return huggingface_hub's description of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    return api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)


def config_to_build(given: Any, found: Any) -> Any:
    """Return the configuration passed to `from_pretrained`, or that of the checkpoint if it is None.

    Raises:
        TypeError: The two have different types.
    """
    if given is None:
        return found
    if type(given) is not type(found):
        raise TypeError(f"config must be a {type(found).__name__}, as the checkpoint has, got {type(given).__name__}")
    return given
