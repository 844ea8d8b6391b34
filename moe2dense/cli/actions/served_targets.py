"""Store the targets of a teacher that a server runs, as `moe2dense targets --endpoint` asks."""

from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moe2dense.cli.actions.common import print_skipped
from moe2dense.cli.actions.targets import TargetsRequest, print_store
from moe2dense.common.object_store import is_url
from moe2dense.common.processes import launched
from moe2dense.common.progress import progress_for
from moe2dense.common.units import parse_count
from moe2dense.config.serving import EndpointConfig
from moe2dense.conversion.text_options import text_options_for
from moe2dense.data.blocks import Blocks
from moe2dense.data.counts import TextCounts
from moe2dense.data.load import load_blocks
from moe2dense.distillation.targets.served.server import TeacherServer, connect
from moe2dense.distillation.targets.served.write import write_served_targets
from moe2dense.errors import UserError
from moe2dense.exporting.tokenizer import load_tokenizer
from moe2dense.student.locate import is_run, student_folder

_LONGEST_BLOCK = 2048


def run_served_targets(request: TargetsRequest, analyze: bool = False) -> None:
    """Ask the server for every position of the text, write the store, and print what it holds. Raises UserError for bad input."""
    out = _check(request, analyze)
    source = str(student_folder(request.teacher)) if is_run(Path(request.teacher)) else request.teacher
    tokenizer = load_tokenizer(source, remedy="name the folder or hub id of the served model's tokenizer")
    server = server_of(request.settings.endpoint, request.k)
    console = Console()
    console.print(
        f"{server.url}: {server.protocol.name} {server.version} serves {server.model!r}", highlight=False, markup=False
    )
    blocks = _text(request, tokenizer, source, server)
    with progress_for(console) as progress:
        compared = write_served_targets(server, blocks, tokenizer, out, progress)
    console.print(compared, highlight=False, markup=False)
    print_store(out, "topk", console)


def server_of(endpoint: EndpointConfig, k: int) -> TeacherServer:
    """Reach the server that the settings name. Raises UserError as `connect` does."""
    return connect(endpoint.url, k, endpoint.model, endpoint.kind, parallel=endpoint.parallel, per_second=endpoint.rate)


def _check(request: TargetsRequest, analyze: bool) -> Path:
    """Return --out. Raises UserError for what no server gives."""
    if request.out is None:
        raise UserError("--out is missing: the folder of the store")
    if is_url(request.out):
        raise UserError(
            f"--endpoint keeps each answer in --out as it comes, which must be a folder of this machine; found {request.out}"
        )
    if analyze or request.features or request.token_weights:
        flag = "--analyze" if analyze else "--features" if request.features else "--token-weights"
        raise UserError(f"{flag} needs the teacher itself; a server gives the likeliest tokens alone: leave it out")
    if request.format not in ("hidden", "topk"):
        raise UserError(f"--format {request.format} needs the teacher itself; a server gives topk: leave it out")
    if request.temperature != 1:
        raise UserError(
            f"--temperature {request.temperature:g}: a server gives its distribution at temperature 1, and of the likeliest tokens "
            "alone no other can be had; leave it out"
        )
    if launched()[1] > 1:
        raise UserError("--endpoint runs in one process; --endpoint-parallel says how many requests are under way")
    return Path(request.out)


def _text(request: TargetsRequest, tokenizer: PreTrainedTokenizerBase, source: str, server: TeacherServer) -> Blocks:
    """Return the blocks of the text, and print what was skipped."""
    data, counts = request.settings.data, TextCounts()
    longest = min(_LONGEST_BLOCK, server.longest - 1) if server.longest else _LONGEST_BLOCK
    tokens = parse_count(request.tokens, "--tokens")
    blocks = load_blocks(
        request.data, tokenizer, data.block or longest, "train", tokens, request.settings.seed,
        options=text_options_for(source, data), counts=counts,
    )  # fmt: skip
    print_skipped(counts, request.data)
    return blocks
