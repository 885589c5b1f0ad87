"""What a run is, in YAML: the schema, its reading, what is checked, what changed on resume.

Apart from the schema it looks at the tables of losses, solvers and tasks: an option that would be
ignored is an error.
"""

from spo_jax.config.parsing import (
    ConfigError,
    config_from_tree,
    config_to_yaml,
    override,
    read_tree,
)
from spo_jax.config.schema import BUILTIN_TASK, Config, DataConfig, ModelConfig, Named
from spo_jax.config.validation import checked_config, load_config, unused_sections

__all__ = [
    "BUILTIN_TASK",
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "Named",
    "checked_config",
    "config_from_tree",
    "config_to_yaml",
    "load_config",
    "override",
    "read_tree",
    "unused_sections",
]
