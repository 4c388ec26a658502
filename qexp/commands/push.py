"""Command `qexp push RUN REPO`: an export, uploaded by the hub's own client."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

from qexp.commands.export import chosen, parsed, report
from qexp.common.errors import UserError, first_line
from qexp.models.export import FACTS, FLOAT, GGUF, export
from qexp.runs import resolvers


def main(arguments: Sequence[str]) -> None:
    """Uploads an exported folder or .gguf file, or exports a run first, with the keys of `qexp
    export`. The token is that of the hub's client: HF_TOKEN, or `hf auth login`."""
    parser = argparse.ArgumentParser(
        "qexp push",
        description=main.__doc__,
        usage="qexp push RUN|EXPORT REPO [format=NAME] [--private] [key=value of qexp export]",
    )
    parser.add_argument("source", type=Path, help="folder of a finished run, or an export")
    parser.add_argument("repo", help="USER/NAME on the hub; made where it does not exist")
    parser.add_argument("rest", nargs="*", help="key=value")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    given = parser.parse_args(arguments)
    words, others = parsed(given.rest)
    if others:
        raise UserError(f"{others[0]}: qexp push takes one run or export, and one REPO")
    try:
        validate_repo_id(given.repo)
    except HFValidationError as error:
        raise UserError(f"{given.repo}: is no name of a repository; give USER/NAME") from error
    if is_export(given.source):
        if words:
            raise UserError(
                f"{next(iter(words))}: {given.source} is an export already; give the run for others"
            )
        print(upload(given.source, given.repo, given.private))
        return
    resolvers.register()
    format = words.get("format") or FLOAT
    with tempfile.TemporaryDirectory() as folder:
        name = given.repo.rpartition("/")[2]
        out = Path(folder) / (f"{name}.{GGUF}" if format == GGUF else name)
        facts = export(given.source, out, format, chosen(given.source, words))
        print("\n".join(report(out, facts)))
        print(upload(out, given.repo, given.private))


def is_export(place: Path) -> bool:
    """Whether a place was written by `qexp export`, or is a GGUF file."""
    return (place / FACTS).is_file() or (place.is_file() and place.suffix == f".{GGUF}")


def upload(place: Path, repo: str, private: bool = False) -> str:
    """The address of the commit that holds a folder's files, or the file. UserError where the hub
    cannot be reached or refuses."""
    api, message = HfApi(), "Export of qexp"
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if place.is_file():
            commit = api.upload_file(
                path_or_fileobj=place, path_in_repo=place.name, repo_id=repo, commit_message=message
            )
        else:
            commit = api.upload_folder(repo_id=repo, folder_path=place, commit_message=message)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{repo}: the hub did not take the export ({first_line(error)}); it needs a connection "
            "and a token that may write (HF_TOKEN, or hf auth login)"
        ) from error
    return str(commit.commit_url)
