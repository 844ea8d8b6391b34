"""`moe2dense doctor`: versions, devices, optional backends and why each is off."""

from typing import Annotated

from moe2dense.config.flags import argument


def doctor(*, json: Annotated[bool, argument("Print JSON instead of a table.")] = False) -> None:
    """Show versions, devices, and which optional parts are on or why they are off."""
    from moe2dense.cli.actions.doctor import print_examination

    print_examination(as_json=json)
