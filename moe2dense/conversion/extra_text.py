"""How much text the teacher writes on top of the training text, and how often training passes both. No torch here."""

from dataclasses import replace

from moe2dense.config.schema import RunConfig
from moe2dense.config.training import TrainConfig
from moe2dense.distillation.cost import passes

MOST_EXTRA = 4.0  # of the training text
LONGER = 1.5  # times as many steps where some of the text is new: it is not learnt by heart so soon
LITTLE_TEXT = 1_000_000  # tokens: writing more than this text takes is for the user to ask for


def extra_text(config: RunConfig, tokens: int, parameters: int, resident: bool) -> tuple[float, float]:
    """Return what the teacher writes on top of `tokens` of text, as a share of them, and the passes of training over both.

    parameters: of the student. resident: whether the teacher stays in memory, so that a token that it writes reads nothing from disk. By
    rule it writes where little text would be passed several times, in the place of some of these passes: new text shows the student
    more of its teacher than the same text again, and pays for more steps.
    """
    train = config.train
    same = passes(train, tokens, parameters)
    extra = config.write.extra if config.write.extra >= 0 else _by_rule(config, tokens, same, resident)
    if not extra or train.epochs:
        return extra, same
    return extra, max(1.0, LONGER * same / (1 + extra))


def with_falling_features(train: TrainConfig, extra: float) -> TrainConfig:
    """Return settings whose features, where left to the run, get a weight that falls to 0 if the teacher writes text on top."""
    return replace(train, features="auto-falling") if extra and train.features == "auto" else train


def _by_rule(config: RunConfig, tokens: int, same: float, resident: bool) -> float:
    """Return the share where none is set. same: passes over the text alone."""
    train = config.train
    other_text = (
        config.write.share or config.stages or train.select or train.targets or train.regime or config.endpoint.url
    )
    if train.epochs or other_text or not resident or tokens > LITTLE_TEXT:
        return 0.0
    return min(MOST_EXTRA, max(0.0, same - 1))
