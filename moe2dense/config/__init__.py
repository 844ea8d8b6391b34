"""Hold every option of a run: its default, its type and its help, and how TOML files and flags fill it.

TOML files and typed flags come in; one frozen RunConfig goes out. No torch here.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.config.schema import RunConfig as RunConfig
    from moe2dense.config.toml import read_config as read_config
    from moe2dense.config.toml import write_config as write_config

__getattr__, __dir__, __all__ = lazy.attach(
    __name__, submod_attrs={"schema": ["RunConfig"], "toml": ["read_config", "write_config"]}
)
