"""Models on the hub of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# All that a checkpoint has. Nothing of it is code.
FILES = ["*.json", "*.safetensors", "*.txt", "*.md", "*.model"]
# Arguments of transformers' `from_pretrained` that say where files come from.
WHERE = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# Options of transformers that say how a model is made, for which there is a call of the model that comes back.
ABOUT_THE_MODEL = (
    *("dtype", "torch_dtype", "device_map", "low_cpu_mem_usage", "attn_implementation", "quantization_config", "variant"),
    *("output_loading_info", "subfolder", "proxies"),
)
# Those that the Auto classes add, and that change nothing here.
IGNORED = ("trust_remote_code", "_commit_hash", "adapter_kwargs", "code_revision", "weights_only", "use_safetensors")


def folder_of(name: str | Path, options: dict[str, Any]) -> Path:
    """Return the folder of a checkpoint: the one that is named, or that of a name on the hub, downloaded.

    Args:
        name: a folder, or "organisation/name" where there is no such folder.
        options: keyword arguments of `from_pretrained`; those that are about the hub are taken out.

    Raises:
        OSError: it cannot be downloaded; huggingface_hub says why.
        TypeError: an option of transformers is given that is not for models around encoders.
    """
    if refused := [key for key in ABOUT_THE_MODEL if options.pop(key, None) not in (None, "auto")]:
        raise TypeError(
            f"from_pretrained has no {', '.join(refused)} here: cast or move what it returns, model.to(...), or load the encoders "
            "yourself and give them"
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
    """Upload a folder to a repository on the hub, which is made if need be -> what huggingface_hub says of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    return api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)


def config_to_build(given: Any, found: Any) -> Any:
    """Return the configuration that `from_pretrained` was given, or None, else the one of the checkpoint. TypeError for others."""
    if given is None:
        return found
    if type(given) is not type(found):
        raise TypeError(f"config must be a {type(found).__name__}, as the checkpoint has, got {type(given).__name__}")
    return given
