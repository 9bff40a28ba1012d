"""The commands of ``stillhouse`` that sign: bundles for devices, and the keys and the trust behind them."""

import datetime as dt
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from numpy.typing import NDArray

    from export.bundle.build import Accepted
    from export.bundle.package import Package
    from export.bundle.trust import Trust

app = typer.Typer(no_args_is_help=True)
console = Console()

DEVICES = "Devices"
TRUST = "trust.json"
BAR_FROM = 50 * 2**20
"""Bytes from which on checking a bundle shows its progress."""

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        envvar="STILLHOUSE_KEYS",
        help="Folder of keys and trust.json; default ~/.config/stillhouse/keys. Keep a copy elsewhere.",
        show_default=False,
    ),
]
TrustOption = Annotated[
    Path | None, typer.Option(help="Whose signatures count; default: trust.json of the key folder.", show_default=False)
]
KeyOption = Annotated[
    list[Path] | None,
    typer.Option(help="Private key to sign with, may be repeated; default: the trusted ones of the key folder."),
]


@app.command(
    rich_help_panel=DEVICES,
    epilog="Examples: stillhouse bundle digits; stillhouse bundle runs/digits/20261126T020000Z-1a2b3c4d --out site "
    "--seq 12; stillhouse bundle --again bundles/digits-7.edgepkg",
)
def bundle(
    run: Annotated[
        str | None,
        typer.Argument(help="A run folder, <recipe>/<run-id>, or a recipe for its newest run.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder the bundle goes to.")] = Path("bundles"),
    seq: Annotated[
        int | None,
        typer.Option(min=1, help="Its number; default: one above the highest in the folder.", show_default=False),
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option(help="Issue what an older bundle holds again, so that devices go back to it.", show_default=False),
    ] = None,
    again_trust: Annotated[
        Path | None,
        typer.Option(help="Trust the older bundle was signed under, if its keys are gone by now.", show_default=False),
    ] = None,
    key: KeyOption = None,
    folder: FolderOption = None,
    trust: TrustOption = None,
    margin: Annotated[
        float, typer.Option(min=0, help="Times and memory allowed on a device, as a multiple of here; 0: any.")
    ] = 3.0,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Let devices build engines themselves, from ONNX files in the bundle.")
    ] = False,
    golden: Annotated[
        Path | None,
        typer.Option(help=".npy of 8 or more normalised images [N, C, H, W]; default: of the validation split."),
    ] = None,
    not_after: Annotated[
        str | None, typer.Option(metavar="2027-01-31T00:00:00Z", help="When it stops being installable.")
    ] = None,
    created: Annotated[
        str | None, typer.Option(metavar="2026-01-31T02:11:05Z", help="Date it says; default: now.")
    ] = None,
) -> None:
    """Put an accepted run into one signed file for devices."""
    from export.bundle import BundleError
    from export.bundle.build import Order, accepted_run, build_bundle, next_seq, reissue
    from export.bundle.trust import read_trust
    from flows.comparing import resolve_run

    if (run is None) == (again is None):
        raise BundleError(
            "Bundle has no one source, expected a run, or --again with an older bundle. Give one of them."
        )
    keys, known = signing_keys(key or [], folder, trust)
    order = partial(Order, created=created or now(), keys=keys, not_after=not_after, margin=margin, rebuild=rebuild)
    if again is not None:
        before = read_trust(again_trust or trust or key_folder(folder) / TRUST) if again_trust or not known else known
        old = check_bundle(again, before)
        lowest = max(next_seq(out, old.statement.name), old.statement.seq + 1)
        path, notes = reissue(old, out, order(seq=seq or lowest), before)
    else:
        accepted = accepted_run(resolve_run(str(run)))
        lowest = next_seq(out, accepted.name, accepted.version)
        numbered = order(seq=seq or lowest, flow_run=flow_run_of(accepted.run.path))
        images, sources = golden_images(accepted, golden), engine_sources(accepted)
        path, notes = build_bundle(accepted, out, numbered, images, sources)
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Wrote {path}, {path.stat().st_size / 2**20:.1f} MiB.", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=DEVICES, epilog="Example: stillhouse verify bundles/digits-7.edgepkg --trust trust.json")
def verify(
    file: Annotated[Path, typer.Argument(help="A bundle.", show_default=False)],
    trust: TrustOption = None,
    folder: FolderOption = None,
) -> None:
    """Check every byte of a bundle, and show what it holds and where it comes from."""
    from export.bundle.trust import read_trust

    show_bundle(console, file, read_trust(trust or key_folder(folder) / TRUST))


keys = typer.Typer(no_args_is_help=True, help="Keys that sign bundles, and the trust that devices have in them.")
app.add_typer(keys, name="keys", rich_help_panel=DEVICES)


@keys.command(
    epilog="Examples: stillhouse keys new office; stillhouse keys new office night safe --threshold 2; "
    "STILLHOUSE_KEY_PASSPHRASE=... stillhouse keys new ci --folder /srv/keys"
)
def new(
    names: Annotated[list[str], typer.Argument(help="Names of the keys.", show_default=False)],
    threshold: Annotated[int, typer.Option(min=1, help="Signatures that devices ask for.")] = 1,
    folder: FolderOption = None,
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="Keep the private key in the open: whoever reads it can sign.")
    ] = False,
) -> None:
    """Make keys; with the first ones also trust.json, the file that devices are set up with."""
    new_keys(console, key_folder(folder), names, threshold=threshold, unencrypted=unencrypted)


@keys.command("list", epilog="Example: stillhouse keys list")
def list_(folder: FolderOption = None) -> None:
    """List the keys of the folder and whether they are trusted."""
    show_keys(console, key_folder(folder))


@keys.command(
    epilog="Examples: stillhouse keys rotate --add spare; stillhouse keys rotate --add new --remove office "
    "--threshold 2"
)
def rotate(
    add: Annotated[list[str] | None, typer.Option(help="Name of a key, or a .pub file; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Name or id of a key; may be repeated.")] = None,
    threshold: Annotated[
        int | None,
        typer.Option(min=1, help="Signatures asked for from now on; default: as before.", show_default=False),
    ] = None,
    key: KeyOption = None,
    folder: FolderOption = None,
) -> None:
    """Write the next trust for devices to take over: trust-N.dsse.json, signed by old and new keys."""
    place = key_folder(folder)
    rotate_trust(console, place, add=add or [], remove=remove or [], threshold=threshold, key_files=key or [])


def now() -> str:
    """The time, as a statement writes it."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def key_folder(folder: Path | None) -> Path:
    """Where keys are: outside the project, so that they are in no copy of it."""
    from tasks.settings import settings

    return folder or settings().keys_dir


def passphrase(path: Path, *, confirm: bool = False) -> bytes:
    """The passphrase of a key: from the environment, else asked for without showing it.

    Raises:
        BundleError: there is neither the variable nor a terminal.
    """
    from export.bundle import BundleError
    from export.bundle.keys import VARIABLE

    if found := os.environ.get(VARIABLE):
        return found.encode()
    if not sys.stdin.isatty():
        raise BundleError(f"Key '{path.name}' has no passphrase, expected {VARIABLE} or a terminal to ask at. Set it.")
    return typer.prompt(f"Passphrase of {path.name}", hide_input=True, confirmation_prompt=confirm).encode()


def new_keys(console: Console, folder: Path, names: Sequence[str], *, threshold: int, unencrypted: bool) -> None:
    """Make keys, and a trust in them if there is none.

    Raises:
        BundleError: a name is taken or no name, or the threshold is above the number of keys.
    """
    from export.bundle import BundleError
    from export.bundle.durable import write_durably
    from export.bundle.envelope import key_id
    from export.bundle.keys import PRIVATE, PUBLIC, new_key
    from export.bundle.trust import dump_trust, make_trust

    for name in names:
        if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise BundleError(f"Key '{name}' has other signs than letters, digits, - and _. Choose another name.")
        if any((folder / f"{name}{end}").exists() for end in (PRIVATE, PUBLIC)):
            raise BundleError(f"Key '{name}' has been in '{folder}' before, expected a new name. Choose another.")
    is_first = not (folder / TRUST).exists()
    if is_first and threshold > len(set(names)):
        raise BundleError(
            f"Trust has {len(set(names))} keys, expected {threshold} or more for its threshold. Name more."
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = []
    for name in dict.fromkeys(names):
        path = folder / f"{name}{PRIVATE}"
        secret = None if unencrypted else passphrase(path, confirm=True)
        made.append(new_key(path, secret, unencrypted=unencrypted).public_key())
        console.print(f"Wrote {path} and {name}{PUBLIC}: key {key_id(made[-1])[:12]}.", highlight=False, soft_wrap=True)
    if not is_first:
        added = " ".join(f"--add {name}" for name in names)
        console.print(f"Devices do not trust it yet: stillhouse keys rotate {added}", markup=False, highlight=False)
        return
    write_durably(folder / TRUST, dump_trust(make_trust(made, threshold=threshold)))
    console.print(f"Wrote {folder / TRUST}, version 1: set devices up with it.", highlight=False, soft_wrap=True)


def show_keys(console: Console, folder: Path) -> None:
    """A table of the keys in a folder, and of those that are trusted and are not there."""
    from export.bundle import BundleError
    from export.bundle.envelope import key_id
    from export.bundle.keys import PRIVATE, is_encrypted
    from export.bundle.trust import read_trust

    trust = read_trust(folder / TRUST) if (folder / TRUST).exists() else None
    publics = _publics(folder)
    if trust is None and not publics:
        console.print(f"There are no keys in {folder}. Make one: stillhouse keys new NAME", soft_wrap=True)
        return
    title = "no trust.json" if trust is None else f"trust {trust.version}, {trust.threshold} of {len(trust.keys)} sign"
    table = Table("name", "key", "trusted", "private key", title=title)
    for name, public in publics.items():
        path = folder / f"{name}{PRIVATE}"
        try:
            state = "not here" if not path.exists() else "encrypted" if is_encrypted(path) else "NOT ENCRYPTED"
        except BundleError:
            state = "READABLE BY OTHERS"
        table.add_row(name, key_id(public)[:12], "yes" if trust and key_id(public) in trust.keys else "no", state)
    here = {key_id(public) for public in publics.values()}
    for name in sorted(trust.keys if trust else ()):
        if name not in here:
            table.add_row("", name[:12], "yes", "not here")
    console.print(table)


def rotate_trust(
    console: Console,
    folder: Path,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    threshold: int | None = None,
    key_files: Sequence[Path] = (),
) -> Path:
    """Write the envelope with the next trust, then take it over as the folder's own; returns the envelope.

    Doing the same again after it was interrupted gives the same envelope, and ends what had begun.

    Raises:
        BundleError: a key is not known, or too few of the old or the new keys sign.
    """
    from export.bundle import BundleError
    from export.bundle.durable import write_durably
    from export.bundle.envelope import key_id
    from export.bundle.keys import PUBLIC, load_key, load_public
    from export.bundle.trust import dump_trust, next_trust, read_trust, seal_next_trust

    trust = read_trust(folder / TRUST)
    publics = _publics(folder)
    added = [publics[name] if name in publics else load_public(Path(name)) for name in add]
    removed = []
    for name in remove:
        ids = [key_id(publics[name])] if name in publics else [each for each in trust.keys if each.startswith(name)]
        if len(ids) != 1 or not name:
            raise BundleError(
                f"Key '{name}' has {len(ids)} trusted keys, expected one. Name it, or give more of its id."
            )
        removed += ids
    wanted = trust.keys.keys() | {key_id(public) for public in added}
    paths = key_files or _privates(folder, wanted)
    signing = [load_key(path, passphrase) for path in paths]
    sealed = seal_next_trust(trust, signing, add=added, remove=removed, threshold=threshold)
    new = next_trust(trust, sealed)
    path = folder / f"trust-{new.version}.dsse.json"
    if not (path.exists() and path.read_bytes() == sealed):
        write_durably(path, sealed)
    write_durably(folder / TRUST, dump_trust(new), replace=True)
    console.print(
        f"Wrote {path}: trust {new.version}, {new.threshold} of {len(new.keys)} keys sign. Give it to every device; it"
        f" follows from version {trust.version} alone. Keep {PUBLIC} files and envelopes.",
        highlight=False,
        soft_wrap=True,
    )
    return path


def signing_keys(
    key_files: Sequence[Path], folder: Path | None, trust_file: Path | None
) -> "tuple[list[Ed25519PrivateKey], Trust | None]":
    """The keys to sign with, and the trust they have to satisfy, if there is one.

    Raises:
        BundleError: there are none, too few, or one that is not trusted.
    """
    from export.bundle import BundleError
    from export.bundle.envelope import key_id
    from export.bundle.keys import load_key
    from export.bundle.trust import read_trust

    place = key_folder(folder)
    known = trust_file or place / TRUST
    trust = read_trust(known) if trust_file is not None or known.exists() else None
    paths = key_files or ([] if trust is None else _privates(place, trust.keys.keys()))
    if not paths:
        raise BundleError(
            f"Folder '{place}' has no trusted private key, expected one to sign with. Make one: stillhouse keys new"
            " NAME; or name one with --key."
        )
    found = {key_id(key.public_key()): key for key in (load_key(path, passphrase) for path in paths)}
    if trust is not None and (strangers := sorted(found.keys() - trust.keys.keys())):
        raise BundleError(
            f"Key {strangers[0][:12]} has no trust in '{known}', so devices would refuse the bundle. Add it first:"
            " stillhouse keys rotate --add NAME"
        )
    if trust is not None and len(found) < trust.threshold:
        raise BundleError(f"Bundle has {len(found)} keys to sign it, expected {trust.threshold}. Name more with --key.")
    return list(found.values()), trust


def golden_images(accepted: "Accepted", file: Path | None = None) -> "NDArray[np.float32]":
    """Real images as the model sees them [8, C, H, W]: of a file, else of the run's validation split, class by class.

    Raises:
        BundleError: the file holds none.
        ArtifactError: the data set is no longer in the store.
    """
    import numpy as np

    from compression.augment import normalise
    from compression.data import open_dataset
    from compression.errors import ArtifactError
    from export.bundle import BundleError
    from export.bundle.golden import REAL
    from tasks.artifacts import Artifact, Store
    from tasks.settings import settings

    if file is not None:
        try:
            return np.asarray(np.load(file, allow_pickle=False), dtype=np.float32)
        except (OSError, ValueError) as error:
            raise BundleError(f"File '{file}' has no array that can be read ({error}). Give a .npy file.") from error
    row = next((row for row in accepted.run.lineage if row.get("stage") == "data"), None)
    if row is None:
        raise BundleError(f"Run '{accepted.run.name}' has no data in its lineage. Give images with --golden.")
    artifact = Artifact(kind="dataset", sha256=row["output"], size_bytes=row["size_bytes"])
    try:
        dataset = open_dataset(Store(settings().store_dir).open(artifact))
    except ArtifactError as error:
        error.add_note("Or give 8 normalised images [N, C, H, W] with --golden FILE.npy.")
        raise
    labels = dataset.validation.labels.numpy()
    turns = np.zeros(len(labels), dtype=np.int64)  # how many of its class come before an image
    for label in np.unique(labels):
        turns[labels == label] = np.arange(np.count_nonzero(labels == label))
    chosen = np.argsort(turns, kind="stable")[:REAL]
    return normalise(dataset.validation.images[chosen], dataset.preprocessing).numpy()


def engine_sources(accepted: "Accepted") -> dict[str, Path]:
    """SHA-256 -> ONNX file in the store, of the graphs the run's engines were built from, while they are kept."""
    from compression.errors import ArtifactError
    from tasks.artifacts import Artifact, Store, file_digest
    from tasks.settings import settings

    wanted = {each.source_sha256 for manifest, _ in accepted.targets for each in manifest.files} - {None}
    store, found = Store(settings().store_dir), dict[str, Path]()
    for row in accepted.run.lineage:
        if row.get("stage") != "export" or wanted <= found.keys():
            continue
        try:
            folder = store.open(Artifact(kind="graph", sha256=row["output"], size_bytes=row["size_bytes"]))
        except ArtifactError:
            continue  # the bundle says that it went without
        if (digest := file_digest(folder / "model.onnx")) in wanted:
            found[digest] = folder / "model.onnx"
    return found


def flow_run_of(run: Path) -> str | None:
    """Id of the flow run that wrote a run folder, if MLflow knows it."""
    import json

    from compression.errors import StillhouseError
    from tasks import tracking
    from tasks.settings import settings

    uri, summary = settings().tracking_uri, run / "summary.json"
    database = Path(uri.removeprefix("sqlite:///"))
    if not summary.is_file() or (uri.startswith("sqlite:///") and not database.is_file()):
        return None
    try:
        tags = tracking.client().get_run(json.loads(summary.read_text())["mlflow_run"]).data.tags
    except (StillhouseError, KeyError):
        return None
    except Exception as error:  # a run that this server does not know
        console.print(f"Note: MLflow does not know the run ({type(error).__name__}).", highlight=False)
        return None
    return tags.get(tracking.FLOW_RUNS, "").rpartition(",")[2] or None


def check_bundle(file: Path, trust: "Trust") -> "Package":
    """The bundle in a file, every byte checked; a long one with a bar.

    Raises:
        BundleError: it is not as it must be.
    """
    from export.bundle.package import open_package
    from flows.progress import show, terminal_progress

    if not file.is_file() or file.stat().st_size < BAR_FROM:
        return open_package(file, trust)
    mib = 2**20
    with terminal_progress(console):

        def told(done: int, total: int) -> None:
            show(f"Checking {file.name}, MiB", done // mib, total // mib)

        return open_package(file, trust, on_progress=told)


def show_bundle(console: Console, file: Path, trust: "Trust") -> None:
    """Check a bundle and print its checks, its variants, its files and its origin.

    Raises:
        BundleError: a check failed; what was checked before it is printed.
    """
    from export.bundle import BundleError
    from export.bundle.envelope import read_canonical
    from export.bundle.golden import read_golden
    from export.bundle.provenance import open_provenance
    from export.bundle.statement import GOLDEN, PROVENANCE, SBOM

    package = check_bundle(file, trust)
    statement = package.statement

    def passed(what: str, found: str) -> None:
        console.print(f"[green]ok[/] {what}: ", end="")
        console.print(found, markup=False, highlight=False, soft_wrap=True)

    signed = ", ".join(sorted(name[:12] for name in package.signed_by))
    passed("signatures", f"{len(package.signed_by)} by trusted keys ({signed}), {trust.threshold} needed")
    passed("content", f"{statement.content.length:,} bytes, sha256 {statement.content.sha256[:12]}, nothing else")
    passed("members", f"{len(statement.files)} files, each with its sha256")
    if statement.not_after is not None and now() > statement.not_after:
        raise BundleError(
            f"Bundle '{file.name}' has been valid until {statement.not_after}. Issue it again with --again."
        )
    passed("valid", "without end" if statement.not_after is None else f"until {statement.not_after}")
    golden = read_golden(package.read(GOLDEN), statement)
    passed("golden data", f"{len(golden['inputs'])} inputs, answers of {len(statement.variants)} variants")
    provenance: dict[str, Any] = open_provenance(package.read(PROVENANCE), trust, statement)
    passed("provenance", f"signed, of {len(provenance['subject'])} models")
    listed = read_canonical(package.read(SBOM), "Bill of materials").get("components", [])
    passed("bill of materials", f"{len(listed)} components")
    _print_statement(console, package)


def _print_statement(console: Console, package: "Package") -> None:
    statement = package.statement
    table = Table(title=f"{statement.name} {statement.seq}: what devices try, in this order")
    for title in ("variant", "runtime", "for", "precision", "limits at batch 1", "a device may build it"):
        table.add_column(title, overflow="fold")
    for each in statement.variants:
        needs = (each.compute_capability, each.isa, *each.cpu_features, each.system)
        where = ", ".join(need for need in needs if need) or "any"
        table.add_row(
            each.id,
            f"{each.runtime} {each.runtime_versions}",
            where,
            each.precision,
            "none" if each.limits.p95_ms is None else f"p95 {each.limits.p95_ms:g} ms, {each.limits.memory_mib:g} MiB",
            "yes" if each.rebuild_from else "no",
        )
    console.print(table)
    files = Table("file", "bytes", "sha256")
    for each in statement.files:
        files.add_row(each.path, f"{each.length:,}", each.sha256[:12])
    console.print(files)
    lineage = statement.lineage
    for title, text in (
        ("model", f"{statement.name}, version {statement.version}, created {statement.created}"),
        ("input", f"{statement.input.name} {statement.input.dtype} {list(statement.input.shape)}"),
        ("labels", ", ".join(statement.labels[:12]) + (", ..." if len(statement.labels) > 12 else "")),
        (
            "run",
            f"{lineage.run}, flow run {lineage.flow_run or 'unknown'}, commit {(lineage.commit or 'unknown')[:12]}",
        ),
        ("teachers", ", ".join(f"{name} {digest[:12]}" for name, digest in lineage.teachers.items())),
    ):
        console.print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)


def _publics(folder: Path) -> "dict[str, Ed25519PublicKey]":
    from export.bundle.keys import PUBLIC, load_public

    return {path.stem: load_public(path) for path in sorted(folder.glob(f"*{PUBLIC}"))}


def _privates(folder: Path, ids: Any) -> list[Path]:
    """Private keys of a folder whose ids are among those given."""
    from export.bundle.envelope import key_id
    from export.bundle.keys import PRIVATE

    places = {name: folder / f"{name}{PRIVATE}" for name, key in _publics(folder).items() if key_id(key) in ids}
    return [path for path in places.values() if path.exists()]
