"""Commands about keys, signatures and trust files: keygen, sign, trust."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vllm_edits.edit_store.canonical import now
from vllm_edits.edit_store.cli.common import (
    PROBLEM,
    JsonOption,
    ReferenceArgument,
    StoreOption,
    app,
    as_script,
    explained,
    opened,
    plain,
    show,
)
from vllm_edits.edit_store.errors import EditsError, SettingsError
from vllm_edits.edit_store.refs import Ref
from vllm_edits.edit_store.signing import PRIVATE_SUFFIX, Role, SigningKey
from vllm_edits.edit_store.storage.store import EditStore
from vllm_edits.edit_store.trust import TrustedKey, TrustPolicy

trust = typer.Typer(
    no_args_is_help=True,
    help="Edit a trust file: the keys whose signatures servers accept, and how many signatures are needed.",
)
app.add_typer(trust, name="trust")


class Accepted(StrEnum):
    """Treatment of privileged versions."""

    ALLOW = "allow"
    REFUSE = "refuse"


FileArgument = Annotated[Path, typer.Argument(help="The trust file.")]


@app.command()
@explained
def keygen(
    path: Annotated[
        Path, typer.Argument(help="File for the private key, e.g. alice.key. The public key becomes alice.pub.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Make an Ed25519 key pair to sign with.

    Only you can read the private key. Give the public key to the operators of
    servers: they add it to their trust file.

    \b
    Example:
      vllm-edits keygen alice.key
    """
    key = SigningKey.generate()
    private = path if path.suffix == PRIVATE_SUFFIX else path.with_name(path.name + PRIVATE_SUFFIX)
    public = key.save(private)
    if as_json:
        as_script({"private": str(private), "public": str(public), "keyid": key.keyid})
    else:
        plain(
            f"private: {private} (keep it secret)\npublic:  {public} (for: vllm-edits trust add)\nkeyid:   {key.keyid}"
        )


@app.command()
@explained
def sign(
    reference: ReferenceArgument,
    *,
    store: StoreOption,
    key: Annotated[Path, typer.Option("--key", envvar="VLLM_EDITS_KEY", help="Private key to sign with.")],
    role: Annotated[
        Role, typer.Option("--as", help="author: sign the version. promoter: sign the present promotion of the tag.")
    ] = Role.AUTHOR,
    days: Annotated[int | None, typer.Option(min=1, help="Days until the signature expires.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a version as an author, or the present promotion of a tag as a
    promoter.

    Use it as second promoter to approve a promotion, if the trust file asks for
    two promoters.

    \b
    Examples:
      vllm-edits sign polite@4f1c9a --store ./store --key alice.key
      vllm-edits sign polite@prod --store ./store --key bob.key --as promoter
    """
    target, signer = opened(store), SigningKey.load(key)
    ref = Ref.parse(reference)
    expires = None if days is None else now() + timedelta(days=days)
    subject, what = _subject(target, ref, role)
    target.attest(subject, signer.sign(role, subject, what, expires_at=expires))
    if as_json:
        as_script({"subject": subject, "what": what, "role": role, "keyid": signer.keyid})
    else:
        plain(f"signed {what} as {role} with key {signer.keyid[:12]}")


def _subject(store: EditStore, ref: Ref, role: Role) -> tuple[str, str]:
    """Digest and description of the object to sign."""
    if role is Role.AUTHOR:
        version = store.resolve(str(ref))
        return version, f"{ref.name}@{version[:12]}"
    head = None if ref.is_version else store.head(ref.name, ref.selector)
    if head is None:
        raise EditsError(
            f"expected a tag with a promotion, e.g. {ref.name}@prod, found {ref}. A promoter signs the present "
            "promotion of a tag"
        )
    return head.digest, f"{ref.name}@{ref.selector} entry {head.sequence}"


@trust.command()
@explained
def add(
    file: FileArgument,
    public: Annotated[Path, typer.Argument(help="The public key, a .pub file.", exists=True)],
    *,
    role: Annotated[
        list[Role], typer.Option("--role", help="What the key may sign. Give the option twice for both roles.")
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the key's holder.", show_default="the file's name")] = "",
    days: Annotated[
        int | None, typer.Option(min=1, help="Days for which the key is trusted. Without it, there is no limit.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add a key to a trust file. The file is created if it does not exist.

    Servers read their trust file when they start.

    \b
    Example:
      vllm-edits trust add trust.json alice.pub --role author --role promoter
    """
    policy = TrustPolicy.load(file, unfinished=True) if file.exists() else TrustPolicy()
    began = now()
    key = TrustedKey(
        name=name or public.stem, public=public.read_text(), roles=tuple(dict.fromkeys(role)), not_before=began,
        not_after=None if days is None else began + timedelta(days=days),
    )  # fmt: skip
    _replace(file, policy.model_copy(update={"keys": (*policy.keys, key)}), as_json)


@trust.command()
@explained
def remove(
    file: FileArgument,
    name: Annotated[str, typer.Argument(help="Name or keyid of the key.")],
    as_json: JsonOption = False,
) -> None:
    """Remove a key from a trust file.

    After its next start, a server refuses versions and promotions that only
    this key signed.

    \b
    Example:
      vllm-edits trust remove trust.json alice
    """
    policy = TrustPolicy.load(file, unfinished=True)
    kept = tuple(key for key in policy.keys if name not in (key.name, key.key.keyid))
    if len(kept) == len(policy.keys):
        raise EditsError(f"no key {name!r} in {file}. Its keys: {', '.join(key.name for key in policy.keys) or 'none'}")
    _replace(file, policy.model_copy(update={"keys": kept}), as_json)


@trust.command()
@explained
def threshold(
    file: FileArgument,
    role: Annotated[Role, typer.Argument(help="author or promoter.")],
    needed: Annotated[int, typer.Argument(min=1, help="Number of signatures of different keys.")],
    as_json: JsonOption = False,
) -> None:
    """Set how many different keys must sign a version (author), or a promotion
    (promoter).

    \b
    Example:
      vllm-edits trust threshold trust.json promoter 2
    """
    policy = TrustPolicy.load(file, unfinished=True)
    field = "authors_needed" if role is Role.AUTHOR else "promoters_needed"
    _replace(file, policy.model_copy(update={field: needed}), as_json)


@trust.command()
@explained
def privileged(
    file: FileArgument,
    accepted: Annotated[Accepted, typer.Argument(help="allow, or refuse.")],
    as_json: JsonOption = False,
) -> None:
    """Allow or refuse privileged versions: those that take safety away.

    Their authors have marked them, as `build` does with such methods. Without
    this command they are refused.

    \b
    Example:
      vllm-edits trust privileged trust.json allow
    """
    policy = TrustPolicy.load(file, unfinished=True)
    _replace(file, policy.model_copy(update={"privileged": accepted is Accepted.ALLOW}), as_json)


@trust.command(name="list")
@explained
def list_keys(file: FileArgument, as_json: JsonOption = False) -> None:
    """List the keys of a trust file, with their roles and dates, and how many
    signatures are needed.

    \b
    Example:
      vllm-edits trust list trust.json
    """
    policy = TrustPolicy.load(file, unfinished=True)
    rows = [
        {
            "name": key.name, "keyid": key.key.keyid, "digits": key.key.keyid[:12], "roles": " ".join(key.roles),
            "from": str(key.not_before or ""), "until": str(key.not_after or ""),
        }
        for key in policy.keys
    ]  # fmt: skip
    show(rows, {"name": "who", "digits": "key", "roles": "roles", "from": "from", "until": "until"}, as_json)
    if not as_json:
        plain(f"needed: {policy.authors_needed} author(s), {policy.promoters_needed} promoter(s)")
        plain(f"privileged versions: {'allowed' if policy.privileged else 'refused'}")


@trust.command()
@explained
def check(
    reference: ReferenceArgument,
    *,
    store: StoreOption,
    file: Annotated[Path, typer.Option("--trust", help="The trust file.")],
    as_json: JsonOption = False,
) -> None:
    """Check whether a server with this trust file would accept a version, and for
    a tag also its promotion.

    The exit code is 1 if the server would refuse it. The reasons are listed.

    \b
    Example:
      vllm-edits trust check polite@prod --store ./store --trust trust.json
    """
    policy, target, ref = TrustPolicy.load(file), opened(store), Ref.parse(reference)
    version = target.resolve(reference)
    reasons = policy.check(Role.AUTHOR, version, f"version {version[:12]}", target.signatures(version))
    reasons += policy.privileges(target.manifest(version), f"version {version[:12]}")
    head = None if ref.is_version else target.head(ref.name, ref.selector)
    if head is not None:
        reasons += policy.check(
            Role.PROMOTER, head.digest, f"{ref} entry {head.sequence}", target.signatures(head.digest)
        )
    if as_json:
        as_script({"trusted": not reasons, "reasons": [str(reason) for reason in reasons]})
    else:
        for reason in reasons:
            plain(f"  - {reason}")
        plain(f"{ref} is {'refused' if reasons else 'accepted'}")
    if reasons:
        raise typer.Exit(PROBLEM)


def _replace(file: Path, new: TrustPolicy, as_json: bool) -> None:
    """Write a changed trust file, unless a key in it is invalid. Print which signatures its keys cannot give."""
    if broken := new.broken():
        raise SettingsError("\n".join([f"{file} was not changed:", *(f"  - {each}" for each in broken)]))
    new.save(file)
    missing = new.unsatisfiable()
    if as_json:
        as_script({"file": str(file), "keys": [key.name for key in new.keys], "missing": missing})
        return
    needed = f"{new.authors_needed} author(s), {new.promoters_needed} promoter(s)"
    plain(f"{file}: {len(new.keys)} key(s), needed: {needed}")
    for each in missing:
        plain(f"servers cannot use this file yet: {each}", err=True)
