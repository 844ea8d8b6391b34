"""How much text the teacher writes on top of the training text, and how often training passes both. No torch here."""

from moe2dense.config.schema import RunConfig
from moe2dense.distillation.cost import passes

MOST_EXTRA = 1.5  # of the training text
LITTLE_TEXT = 1_000_000  # tokens: writing more than this text takes is for the user to ask for


def extra_text(config: RunConfig, tokens: int, parameters: int, resident: bool) -> tuple[float, float]:
    """Return what the teacher writes on top of `tokens` of text, as a share of them, and the passes of training over both.

    parameters: of the student. resident: whether the teacher stays in memory, so that a token that it writes reads nothing from disk. By
    rule it writes where little text would be passed several times, in the place of some of these passes: new text shows the student
    more of its teacher than the same text again.
    """
    train = config.train
    same = passes(train, tokens, parameters)
    extra = config.write.extra if config.write.extra >= 0 else _by_rule(config, tokens, same, resident)
    if not extra or train.epochs:
        return extra, same
    return extra, max(1.0, same / (1 + extra))


def _by_rule(config: RunConfig, tokens: int, same: float, resident: bool) -> float:
    """Return the share where none is set. same: passes over the text alone."""
    train = config.train
    other_text = (
        config.write.share or config.stages or train.select or train.targets or train.regime or config.endpoint.url
    )
    if train.epochs or other_text or not resident or tokens > LITTLE_TEXT:
        return 0.0
    return min(MOST_EXTRA, max(0.0, same - 1))
