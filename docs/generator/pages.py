"""The pages of docs/reference/, as Markdown."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence

from casbackup import limits as limit_values
from casbackup.errors import EXIT_STATUS_MEANING, CasbackupError, ExitStatus, catalogue
from casbackup_client import config_file, failures
from casbackup_client.app import ENVIRONMENT
from generator.commands import Command, Option, Text, Tree


def cli(tree: Tree) -> str:
    parts = ["# Commands", tree.summary, "Every command also takes the [global options](#global-options)."]
    for title, commands in tree.sections.items():
        parts.append(f"## {title}")
        for command in commands:
            parts += _command(command)
    parts += [
        "## Global options",
        "They may stand before or after the command.",
        _options(tree.global_options),
    ]
    return _page(parts)


def errors() -> str:
    """One section for each class that is raised as such, in the order of the catalogue."""
    parts = [
        "# Errors",
        "Every failure has a code that stays the same, and an [exit status](exit-codes.md). `--json` prints "
        "it as described in [JSON](json.md#failuredocument).",
        _table(
            ("code", "exit status", "what it means", "what to do"),
            [(f"`{e.code}`", _status(e), _first_paragraph(e), _advice(e)) for e in public_catalogue()],
        ),
    ]
    return _page(parts)


def public_catalogue() -> list[type[CasbackupError]]:
    """The library's errors and the command's own; a private class only refines how a public one is worded."""
    assert failures.InternalError in catalogue()
    return [error for error in catalogue() if not error.__name__.startswith("_")]


def exit_codes() -> str:
    rows = [(str(int(status)), status.name, EXIT_STATUS_MEANING[status]) for status in ExitStatus]
    return _page(
        [
            "# Exit statuses",
            "A number never changes its meaning; new ones may be added.",
            _table(("status", "name", "meaning"), rows),
            "141 means that the reader of standard output went away, as for programs that SIGPIPE ends.",
        ]
    )


def limits(module: ast.Module) -> str:
    rows = []
    for name, _, doc in _assignments(module.body):
        rows.append((f"`{name}`", f"{getattr(limit_values, name):,}", doc))
    return _page(["# Limits", "Everything has a limit; sizes are bytes.", _table(("limit", "value", "meaning"), rows)])


def json_documents(module: ast.Module) -> str:
    parts = ["# JSON", ast.get_docstring(module, clean=True).split("``docs/")[0].strip()]  # type: ignore[union-attr]
    parts.append(
        "A command that fails prints a [FailureDocument](#failuredocument) to standard error and nothing to "
        "standard output; but `archive`, `check`, `import`, `repair`, `restore` and `snapshots` print what they found "
        "or did, too."
    )
    fields: dict[str, list[tuple[str, str, str]]] = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            inherited = [row for base in node.bases for row in fields.get(ast.unparse(base), [])]
            fields[node.name] = inherited + [
                (f"`{name}`", _type(kind, fields), doc) for name, kind, doc in _assignments(node.body)
            ]
            parts += [f"## {node.name}", ast.get_docstring(node) or ""]
            parts.append(_table(("key", "type", "meaning"), fields[node.name]))
    return _page(parts)


def configuration() -> str:
    text, _, rest = inspect.cleandoc(config_file.__doc__ or "").partition("\n\n    ")
    example, _, where = rest.partition("\n\nIt is ")
    keys = [
        ("`default-profile`", "The profile that is used when nothing else names a repository."),
        (
            "`profiles.NAME.repository`",
            "The repository's path, or its address on a server; a relative path starts at the file's folder.",
        ),
        ("`profiles.NAME.namespace`", "The namespace; default: `default`."),
        ("`profiles.NAME.token`", "The token for a server; the file should then be readable by nobody else."),
        ("`profiles.NAME.token-file`", "A file with the token in its first line."),
        ("`profiles.NAME.token-command`", "A command, split as a shell does, that prints the token."),
        ("`profiles.NAME.cacert`", "A file of certificates (PEM) to trust besides the system's."),
        (
            "`profiles.NAME.key`",
            "The fingerprint of the key that the repository must have; any other, or none, is refused.",
        ),
        ("`profiles.NAME.passphrase-file`", "A file with the passphrase of the key in its first line."),
        ("`profiles.NAME.passphrase-command`", "A command, split as a shell does, that prints it."),
        ("`profiles.NAME.identity`", "A file with an identity of age that opens the key."),
        ("`profiles.NAME.patience`", "How long to wait for a server that does not answer any more, such as `10m`."),
    ]
    assert len(keys) == 1 + len(config_file.PROFILE_KEYS)
    return _page(
        [
            "# Configuration",
            text,
            "```toml\n" + inspect.cleandoc("    " + example) + "\n```",
            "It is " + where,
            _table(("key", "meaning"), keys),
            "What the command line names comes before the environment, and that before the default profile. "
            "Unknown keys are errors.",
            "## Environment",
            _table(("variable", "meaning"), [(f"`{name}`", text) for name, text in ENVIRONMENT.items()]),
        ]
    )


def _command(command: Command) -> Iterator[str]:
    yield f"### {command.name}"
    yield f"```\n{command.usage}\n```"
    yield from (_text(text) for text in command.text)
    if command.options:
        yield _options(command.options)


def _text(text: Text) -> str:
    return "```\n" + "\n".join(text.lines) + "\n```" if text.verbatim else "\n".join(text.lines)


def _options(options: Iterable[Option]) -> str:
    return _table(("option", "meaning"), [(f"`{option.spelling}`", option.help) for option in options])


def _status(error: type[CasbackupError]) -> str:
    return f"{int(error.exit_status)}{', may pass' if error.retryable else ''}"


def _advice(error: type[CasbackupError]) -> str:
    return error.advice or "—"


def _first_paragraph(error: type[CasbackupError]) -> str:
    return " ".join(inspect.cleandoc(error.__doc__ or "").split("\n\n")[0].split())


def _assignments(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str, str]]:
    """(name, annotation or value, the string below it) of each public assignment."""
    for statement, following in zip(body, [*body[1:], None], strict=True):
        target: ast.expr
        if isinstance(statement, ast.AnnAssign):
            target, kind = statement.target, ast.unparse(statement.annotation)
        elif isinstance(statement, ast.Assign):
            target, kind = statement.targets[0], ast.unparse(statement.value)
        else:
            continue
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            yield target.id, kind, _string(following)


def _string(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).replace("``", "`").split())
    return ""


def _type(annotation: str, known: Iterable[str]) -> str:
    """A type as people name those of JSON; other documents as links."""
    optional = annotation.startswith("NotRequired[")
    plain = annotation.removeprefix("NotRequired[").removesuffix("]") if optional else annotation
    is_list = plain.startswith("list[")
    item = plain.removeprefix("list[").removesuffix("]") if is_list else plain
    names = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "None": "null"}
    parts = [f"[{part}](#{part.lower()})" if part in known else names[part] for part in item.split(" | ")]
    return f"{'list of ' if is_list else ''}{' or '.join(parts)}{', may be absent' if optional else ''}"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _page(parts: Iterable[str]) -> str:
    """Paragraphs to a page. Docstrings quote names with two backticks, Markdown with one."""
    return re.sub("(?<!`)``(?!`)", "`", "\n\n".join(parts)) + "\n"
