"""Finding the steps, and refusing those that make no chain."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from casbackup.spec.config import FORMAT, OLDEST_FORMAT
from casbackup_migrations import registry as known
from casbackup_migrations.registry import Registry, discover
from casbackup_migrations.steps.step import Step, StepContext


def nothing(context: StepContext) -> None: ...


def step(from_format: int) -> Step:
    return Step(from_format, f"step {from_format}", nothing)


def package(folder: Path, name: str, modules: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> object:
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    for module, content in modules.items():
        (folder / name / f"{module}.py").write_text(content)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name)


STEP_FILE = """
from casbackup_migrations.steps.step import Step
STEP = Step({from_format}, "test", lambda context: None)
"""


def test_the_steps_of_this_version_lead_from_the_oldest_format_to_the_current_one() -> None:
    assert (known.current().oldest, known.current().format) == (OLDEST_FORMAT, FORMAT)


def test_a_file_is_all_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"from_{n}_to_{n + 1}": STEP_FILE.format(from_format=n) for n in (9, 10, 11)}
    found = discover(package(tmp_path, "three_steps", {**files, "step": ""}, monkeypatch))  # type: ignore[arg-type]
    assert [step.from_format for step in found] == [9, 10, 11]


def test_a_file_that_holds_another_step_than_it_is_named_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"from_1_to_2": STEP_FILE.format(from_format=2)}
    wrong = package(tmp_path, "wrong_step", files, monkeypatch)
    with pytest.raises(ValueError, match="from_1_to_2"):
        discover(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "formats",
    [[1], [3], [1, 3], [1, 2, 3], [2, 1], [1, 1, 2]],
    ids=lambda formats: "-".join(map(str, formats)),
)
def test_steps_that_do_not_lead_to_the_format(formats: list[int]) -> None:
    with pytest.raises(ValueError, match="one by one to format 3"):
        Registry(tuple(map(step, formats)), 3)


def test_what_is_left_to_do_from_each_format() -> None:
    registry = Registry(tuple(map(step, (1, 2, 3))), 4)
    assert registry.oldest == 1
    assert [[s.from_format for s in registry.steps_from(n)] for n in (1, 2, 3, 4)] == [
        [1, 2, 3],
        [2, 3],
        [3],
        [],
    ]
