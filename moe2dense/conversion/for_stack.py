"""Choose the dense host of a run by the program that will serve the student (`export.stack`)."""

from dataclasses import replace

from moe2dense.config.schema import RunConfig
from moe2dense.conversion.teacher_folder import checked_teacher
from moe2dense.errors import UserError
from moe2dense.exporting.stacks import STACKS, check_stack, format_for, refusal
from moe2dense.families.cards import StudentCard, student_cards, student_host
from moe2dense.families.resolve import ResolvedTeacher
from moe2dense.student.target.host_check import check_host


def for_stack(settings: RunConfig) -> tuple[RunConfig, str]:
    """Return the settings with a host and a file layout that `export.stack` serves, and a sentence where the host is not the usual one.

    Raises UserError where no host that it serves computes what the teacher does.
    """
    if not settings.export.stack:
        return settings, ""
    stack = STACKS[settings.export.stack]
    export = replace(settings.export, format=format_for(stack, settings.export.format))
    settings = replace(settings, export=export)
    teacher, _ = checked_teacher(settings.model, settings.teacher.card)
    usual = student_host(settings.build.host or teacher.card.host)
    if not (reason := refusal(usual, stack)):
        return settings, ""
    if settings.build.host:
        check_stack(usual, stack)
    for host in student_cards().values():
        if not host.host and host.loads.get(stack.card) == "seen" and _computes_the_same(teacher, host):
            note = f"{stack.name} does not serve the {usual.title} host ({reason}); the student takes the {host.title} host, which computes the same"
            return replace(settings, build=replace(settings.build, host=host.name)), note
    check_stack(usual, stack)
    raise AssertionError("unreachable: the usual host is refused")


def _computes_the_same(teacher: ResolvedTeacher, host: StudentCard) -> bool:
    """Return whether small models of the teacher's config and of a host agree outside the FFNs."""
    try:
        return not check_host(teacher.config, teacher.card, host)
    except UserError:
        return False
