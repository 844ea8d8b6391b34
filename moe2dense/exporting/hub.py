"""Publish an exported folder on the Hugging Face hub: private unless asked otherwise, and only after a yes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from moe2dense.common.units import show_bytes
from moe2dense.errors import UserError


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    confirm: Callable[[str], bool] | None = None,
    message: str = "Upload a dense student made with moe2dense",
) -> str:
    """Upload an exported folder to the model repository `repo_id`, made where there is none; return its address.

    confirm: called with one sentence on what will be uploaded where; nothing is sent when it says no. An existing
    repository keeps its visibility. Raises UserError for a folder that is no export, a bad id, a refusal, no connection or
    no permission.
    """
    folder = Path(folder)
    files = [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    if not any(p.suffix in (".safetensors", ".gguf") for p in files) or not (folder / "README.md").is_file():
        raise UserError(f"push: {folder} is not an exported checkpoint (weights and README.md); export it first")
    size = sum(p.stat().st_size for p in files)
    if confirm is not None and not confirm(_question(folder, repo_id, private, len(files), size)):
        raise UserError("push: not confirmed, nothing was uploaded")
    failures: Any = (HfHubHTTPError.__bases__[0], OSError)  # the first is the HTTP client's own error
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, repo_type="model")
    except HFValidationError as error:
        raise UserError(f"push: {repo_id!r} is not a valid repository id; write NAMESPACE/NAME") from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            "push: the hub is switched off by HF_HUB_OFFLINE; unset it, or upload the folder later"
        ) from error
    except LocalTokenNotFoundError as error:
        raise UserError("push: no hub token; log in with `hf auth login` or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = "check the token's rights with `hf auth whoami`" if status in (401, 403) else "try again later"
        raise UserError(f"push: the hub refused {repo_id} ({status}); {remedy}") from error
    except failures as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"push: the hub cannot be reached ({reason}); the export in {folder} is complete") from error
    return str(address)


def _question(folder: Path, repo_id: str, private: bool, files: int, size: int) -> str:
    kind = "private" if private else "PUBLIC"
    return f"Upload {folder} ({files} files, {show_bytes(size)}) to the {kind} repository {repo_id}?"
