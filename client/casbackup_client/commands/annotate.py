"""``casbackup pin`` and ``casbackup label``: what may change about a snapshot."""

from __future__ import annotations

import click

from casbackup.errors import UsageError
from casbackup_client.app import App, KeyUse
from casbackup_client.options import command, pass_app, reference_argument


@command("pin")
@reference_argument()
@click.option("--remove", is_flag=True, help="Remove the pin.")
@pass_app
def pin(app: App, reference: str, remove: bool) -> None:
    """Protect a snapshot: neither `forget` nor a retention policy removes it until the pin is removed."""
    from casbackup_client.documenting import snapshot_document

    with app.peer(KeyUse.IF_AT_HAND) as peer:
        changed = peer.annotate(peer.find(reference, app.namespace), pinned=not remove)
    app.output.result(
        {"snapshot": snapshot_document(changed)},
        lambda: [f"{changed.reference} is {'pinned' if changed.pinned else 'not pinned'}"],
        essential=False,
    )


@command("label")
@reference_argument()
@click.option("--add", metavar="LABEL", multiple=True, help="Add a label. Repeatable.")
@click.option("--remove", metavar="LABEL", multiple=True, help="Remove a label. Repeatable.")
@click.option("--set", "replacement", metavar="LABEL", multiple=True, help="Replace all labels. Repeatable.")
@click.option("--notes", metavar="TEXT", help="Replace the notes.")
@pass_app
def label(
    app: App,
    reference: str,
    add: tuple[str, ...],
    remove: tuple[str, ...],
    replacement: tuple[str, ...],
    notes: str | None,
) -> None:
    """Change a snapshot's labels and notes."""
    from casbackup_client.documenting import snapshot_document

    if not (add or remove or replacement or notes is not None):
        raise UsageError("nothing to change: give --add, --remove, --set or --notes")
    if replacement and (add or remove):
        raise UsageError("--set replaces all labels; it does not go with --add and --remove")
    with app.peer(KeyUse.IF_AT_HAND if notes is None else KeyUse.NEEDED) as peer:
        snapshot = peer.find(reference, app.namespace)
        labels = None
        if add or remove or replacement:
            labels = changed_labels(snapshot.labels, add, remove, replacement)
        changed = peer.annotate(snapshot, labels=labels, notes=_checked_notes(notes))
    app.output.result(
        {"snapshot": snapshot_document(changed)},
        lambda: [f"{changed.reference} has labels: {', '.join(changed.labels) or 'none'}"],
        essential=False,
    )


def changed_labels(
    present: tuple[str, ...], add: tuple[str, ...], remove: tuple[str, ...], replacement: tuple[str, ...]
) -> list[str]:
    """The labels afterwards, in the order in which they were given.

    :raise UsageError: for a bad label, one to remove that is not there, or too many.
    """
    from casbackup.ids import parse_label
    from casbackup.limits import MAX_LABELS

    for name in remove:
        if name not in present:
            raise UsageError(f"the snapshot has no label {name!r}; it has: {', '.join(present) or 'none'}")
    kept = replacement or [name for name in present if name not in remove]
    labels = list(dict.fromkeys(parse_label(name) for name in (*kept, *add)))
    if len(labels) > MAX_LABELS:
        raise UsageError(f"more than {MAX_LABELS} labels")
    return labels


def _checked_notes(notes: str | None) -> str | None:
    from casbackup.limits import MAX_NOTES_BYTES

    if notes is not None and len(notes.encode(errors="surrogateescape")) > MAX_NOTES_BYTES:
        raise UsageError(f"the notes have more than {MAX_NOTES_BYTES} bytes")
    return notes
