"""What was trained, as text that is kept beside its scores and compared with what would be trained now."""

import re

from purejaxppo import Config, Hyperparams
from purejaxppo.experiment.presets import changed_settings


def settings_of(config: Config, hyperparams: Hyperparams) -> dict[str, str]:
    """The settings that differ from the defaults, without the steps, as text that is the same in every process."""
    return {field: re.sub(r" at 0x\w+", "", repr(x)) for field, x in changed_settings(config, hyperparams).items()}
