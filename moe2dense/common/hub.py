"""Ask once whether the Hugging Face hub can be reached, so that no download waits through its client's retries."""

from functools import cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from moe2dense.errors import first_line

_SECONDS = 5


@cache
def hub_unreachable() -> str:
    """Return why the hub cannot be reached; '' when it can, and in offline mode, where its client refuses at once itself."""
    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # no name service, no route, a proxy that refuses, ...: one remedy for all
        return first_line(error)
    return ""
