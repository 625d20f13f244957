"""Structured logs: one JSON object a line to standard error, or for people where that is a terminal."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str = "info", *, human: bool | None = None) -> None:
    """``human`` None: as standard error is a terminal or not."""
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer()
        if (sys.stderr.isatty() if human is None else human)
        else structlog.processors.JSONRenderer()
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
