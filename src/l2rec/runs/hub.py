"""Publish a run on the Hugging Face hub, and load one from there.

    save_pretrained(run, out)         a folder that can be published, with its model card
    push_to_hub(run, "org/name")      the same, uploaded
    located("org/name")               the folder of a run: where it lies here, or downloaded

A published folder is a run folder with less in it (`FILES`): what is needed to recommend, and what
says how it was made. The frozen backbone is named by hub id and revision. Whatever tells of single
users (examples, ranks, logs) and of the machine (paths) stays behind. Nothing in it is ever
unpickled, and no code of a repository is run unless the caller asks for that.

What speaks HTTP is imported when the hub is spoken to: a server of a local run has no use for it.
"""

from __future__ import annotations

__all__ = ["FILES", "located", "push_to_hub", "save_pretrained"]

import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from l2rec.config import BackboneConfig, RunConfig, method_class, names_file, recipe_names
from l2rec.disk import replacing_folder, write_json, write_text
from l2rec.errors import CheckpointError, ConfigError
from l2rec.modules.backbone import MINILM_HUB, load_tokenizer
from l2rec.runs.folder import (
    BLEND,
    ITEMS,
    MODEL,
    TOKENIZER,
    find_backbone,
    load_run_config,
    read_catalog,
    read_report,
)

CARD, CONFIG, REPORT = "README.md", "config.yaml", "report.json"
COPIED = ("catalog.parquet", MODEL, BLEND, ITEMS)
FILES = (CARD, CONFIG, REPORT, *COPIED, f"{TOKENIZER}/*.json")
"""All that is published, and all that is downloaded."""
OURS = re.compile(r"l2rec\.methods\.\w+:\w+")
"""Where the methods are that may be loaded without ``trust_remote_code``."""
COMPARED = 64
"""Texts that a saved tokenizer has to read as the backbone's own does."""


def save_pretrained(
    run: Path,
    out: Path,
    *,
    license: str | None = None,
    dataset: str | None = None,
    backbone: str | None = None,
    backbone_revision: str | None = None,
    limits: str = "",
    repo_id: str | None = None,
) -> Path:
    """Write a finished run as a folder that can be published; what is at ``out`` is replaced if it
    is such a folder. Return ``out``.

    Args:
        license: identifier that the hub knows, such as ``apache-2.0``; the card says so if none is
            given. It has to suit the data and the backbone.
        dataset: hub id of the data set, if it has one.
        backbone: hub id of a backbone that was read from a folder or file.
        backbone_revision: revision of the backbone; by default the one that the run was made on.
        limits: what the publisher knows of the model's limits, for the card.
        repo_id: hub id under which it will be found, for the card.

    Raises:
        CheckpointError: the run is not finished, or a folder with other things at ``out``.
        ConfigError: an id or licence that the hub does not allow, or a backbone that others do not
            have.
    """
    from l2rec.runs.card import Publication, model_card

    report = read_report(run)
    config, _ = load_run_config(run)
    for name in (dataset, backbone, repo_id):
        if name is not None:
            check_id(name)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license):
        raise ConfigError(f"license={license!r}: give an identifier, such as apache-2.0")
    if names_file(config.method):
        raise ConfigError(
            f"{run} has its method in a file of this machine, {config.method}; put it into a "
            "package that others can install, and train by its import path"
        )
    if out.exists() and not (out.is_dir() and _is_published(out)):
        raise CheckpointError(f"{out} is there and is no published run; choose another folder")
    identity = _published_identity(run, backbone, backbone_revision)
    used = identity["backbone"]
    report = _without_paths(report)
    if used is not None:
        report["backbone"] |= {"name": used["name"]}
    card = model_card(
        Publication(
            report=report,
            config=config,
            name=repo_id or out.name,
            repo_id=repo_id,
            license=license,
            dataset=dataset,
            backbone=None if used is None else _hub_id(used["name"]),
            backbone_revision=None if used is None else used["revision"],
            started_from=_start_of(run),
            limits=limits,
        )
    )
    with replacing_folder(out, remedy="free some space and try again") as folder:
        for file in COPIED:
            if (run / file).is_file():
                shutil.copyfile(run / file, folder / file)
        _save_tokenizer(run, config, folder / TOKENIZER)
        write_text(folder / CONFIG, yaml.safe_dump(identity, sort_keys=False, allow_unicode=True))
        write_json(folder / REPORT, report)
        write_text(folder / CARD, card)
    return out


def push_to_hub(
    run: Path,
    repo_id: str,
    *,
    license: str,
    private: bool = True,
    revision: str | None = None,
    message: str = "Upload of l2rec",
    **options: Any,
) -> str:
    """Upload a finished run as a model repository, made if there is none, and return its address.

    The token is the one of ``hf auth login`` or ``HF_TOKEN``. Files of an earlier upload that the
    run no longer has are deleted there.

    Args:
        private: of a repository that is made; items' texts are part of what is uploaded.
        revision: branch to upload to.
        options: of `save_pretrained`: dataset, backbone, backbone_revision, limits.

    Raises:
        CheckpointError: the hub cannot be reached or refuses; and whatever `save_pretrained` does.
    """
    from huggingface_hub import HfApi

    check_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="l2rec-") as temporary:
        folder = Path(temporary) / "run"
        save_pretrained(run, folder, license=license, repo_id=repo_id, **options)
        api = HfApi(library_name="l2rec")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            uploaded = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                delete_patterns=list(FILES),
            )
        except (OSError, ValueError, RuntimeError) as error:  # all of huggingface_hub's are
            raise CheckpointError(f"{repo_id} was not uploaded: {_first_line(error)}") from error
    return str(uploaded.repo_url)


def located(
    run: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Return the folder of a run: where it lies here, or, for ``org/name`` on the hub, in the
    hub's cache, downloaded if it has to be.

    A path object, whatever is there, and what begins with a folder that is there, is never looked
    for on the hub.

    Raises:
        CheckpointError: the hub has no such repository or revision, cannot be reached, or it is no
            run. ConfigError: a revision of a folder, or a run that needs ``trust_remote_code``.
    """
    if isinstance(run, Path) or not _may_be_on_hub(run):
        if revision is not None:
            raise ConfigError(f"revision={revision!r}: {run} is not on the hub; leave it out")
        return Path(run)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                run, revision=revision, allow_patterns=list(FILES), library_name="l2rec"
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"there is no folder {run!r}, and the hub: {_first_line(error)}"
        ) from error
    _check_trusted(folder, run, trust_remote_code)
    return folder


def check_id(name: str) -> None:
    """Refuse what the hub does not take as the id of a repository.

    Raises:
        ConfigError: it does not; one that it would take is offered.
    """
    fault = _fault(name)
    if fault is not None:
        raise ConfigError(f"{name!r} is no id for the hub: {fault}; perhaps {_allowed(name)!r}")


def _fault(name: str) -> str | None:
    """Return what is wrong with an id, by the hub's own rules; None if nothing is."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return _first_line(error)
    return None if name.count("/") == 1 else "an id is organisation/name"


def _allowed(name: str) -> str:
    """Turn any text into an id that the hub takes."""
    parts = []
    for part in name.split("/")[-2:]:
        plain = re.sub(r"[^A-Za-z0-9._]+", "-", part.removesuffix(".git"))
        parts.append(re.sub(r"-{2,}|\.{2,}", "-", plain).strip("-.")[:47] or "x")
    return "/".join(parts if len(parts) == 2 else ["your-name", *parts])


def _may_be_on_hub(name: str) -> bool:
    here = Path(name).exists() or Path(name.partition("/")[0] or "/").exists()
    return not here and _fault(name) is None


def _is_published(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    return not names or {CARD, CONFIG, MODEL} <= names <= {*FILES[:-1], TOKENIZER}


def _check_trusted(folder: Path, name: str, trust_remote_code: bool) -> None:
    """Refuse a downloaded run that would bring code to be run: before anything is imported."""
    try:
        identity = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        config = identity["config"]
        method, backbone = str(config["method"]), dict(config.get("backbone") or {})
    except FileNotFoundError:
        raise CheckpointError(f"{name} on the hub is no run of l2rec: no {CONFIG}") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: its {CONFIG} is torn or not of l2rec") from error
    if trust_remote_code:
        return
    needs = []
    if not OURS.fullmatch(method):
        needs.append(f"imports {method!r}")
    if backbone.get("trust_remote_code"):
        needs.append(f"runs code of the repository of {backbone.get('name')!r}")
    if needs:
        raise ConfigError(
            f"{name} {' and '.join(needs)}; read it, and load it with trust_remote_code=True if "
            "you trust it"
        )


def _published_identity(
    run: Path, backbone: str | None, backbone_revision: str | None
) -> dict[str, Any]:
    """Return what config.yaml says, without paths and with the backbone by its hub id."""
    identity: dict[str, Any] = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    identity |= {"init": None, "published": True}
    identity["dataset"] = identity["dataset"] | {"path": identity["dataset"]["name"]}
    places = identity.pop("backbone_folder", None)
    used = identity["backbone"]
    if used is None:
        if backbone is not None:
            raise ConfigError(f"backbone={backbone!r}: {run} was trained without one")
        return identity
    if backbone is None and (places or Path(used["name"]).is_absolute()):
        raise ConfigError(
            f"{run} was trained on the backbone in {(places or [used['name']])[-1]}, which others "
            "do not have; say which one of the hub it is: backbone='org/name'"
        )
    name = backbone or used["name"]
    revision = backbone_revision or (used["revision"] if backbone is None else None)
    identity["backbone"] = used | {"name": name, "revision": revision}
    options = identity["config"].get("backbone") or {}
    identity["config"] |= {"backbone": options | {"name": name, "revision": revision}}
    return identity


def _hub_id(name: str) -> str:
    return MINILM_HUB if name == "minilm" else name


def _start_of(run: Path) -> Mapping[str, Any] | None:
    """Return the data set that a run's start was trained on: name, fingerprint; None without."""
    _, identity = load_run_config(run)
    if identity.get("init") is None:
        return None
    try:
        dataset: Mapping[str, Any] = load_run_config(Path(identity["init"]))[1]["dataset"]
    except CheckpointError:
        return {"name": "unknown", "fingerprint": "unknown"}
    return {key: dataset[key] for key in ("name", "fingerprint")}


def _without_paths(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report whose commands name files and folders, but not where they lay."""
    backbone = dict(report["backbone"])
    names = {*recipe_names(), str(backbone["name"])} - {""}

    def plain(word: str) -> str:
        """Leave of a path, or of an address, the last part; not of names with a slash in them."""
        key, sep, value = word.rpartition("=")
        if value in names and not Path(value).is_absolute():
            return word
        return key + sep + re.split(r"[/\\]", value.rstrip("/\\"))[-1]

    words = shlex.split(str(report.get("command") or ""))
    command = " ".join(word if word == "&&" else shlex.quote(plain(word)) for word in words)
    recipe = plain(str(report.get("recipe") or ""))
    return {**report, "backbone": backbone, "command": command, "recipe": recipe}


def _save_tokenizer(run: Path, config: RunConfig, folder: Path) -> None:
    """Write the tokenizer, if it is one of files that hold no code and reads the same from them."""
    from transformers import PreTrainedTokenizerFast

    if not method_class(config.method).uses_backbone:
        return
    here = find_backbone(run, config, load_run_config(run)[1])
    tokenizer = load_tokenizer(here.backbone)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        if file.suffix != ".json":
            file.unlink()
    texts = [text for text in read_catalog(run).texts if text.strip()]
    some = texts[:: max(1, len(texts) // COMPARED)]
    saved = load_tokenizer(BackboneConfig(name=str(folder)))
    if _ids(saved, some) != _ids(tokenizer, some):
        shutil.rmtree(folder)


def _ids(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer(list(texts))["input_ids"] if texts else []


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
