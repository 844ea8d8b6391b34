"""Check that a folder can be used as a teacher, from its config and the headers of its files alone."""

from pathlib import Path

from transformers import PreTrainedConfig

from moe2dense.families.cards import TeacherCard
from moe2dense.modeling.shape import check_config
from moe2dense.teacher.card_check import check_card, is_shipped
from moe2dense.teacher.check import check_coverage, check_quantization
from moe2dense.teacher.layers import Layer
from moe2dense.teacher.skeleton import Skeleton, quantization_of


def check_folder(path: Path, config: PreTrainedConfig, card: TeacherCard | None) -> list[str]:
    """Check a folder as loading it would, and a card that is not shipped; return what of it is not used, in sentences.

    A config that ties tensors which differ is corrected. Raises UserError naming the file and tensor at fault.
    """
    check_quantization(path, quantization_of(config))
    check_config(config, card)
    if card is not None and not is_shipped(card):
        check_card(config, card)
    skeleton = Skeleton(path, config, card, "cpu")
    check_coverage(skeleton, [Layer(skeleton, index) for index in range(len(skeleton.body.layers))])
    return skeleton.remarks
