"""Command-line options that say what a source is, where it is not found out: the same for every job that reads one."""

from __future__ import annotations

import argparse

from vladva.core.cli import location
from vladva.data.source import SourceOptions, format_names


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --format, --images, --split and the columns."""
    group = parser.add_argument_group("what the data is, where it is not found out")
    group.add_argument("--format", default="", help=f"one of {', '.join(format_names())}")
    group.add_argument("--images", type=location, default="", help="folder that relative paths of images start from")
    group.add_argument("--split", default="", help="Karpathy JSON: only these splits, commas between")
    group.add_argument("--image-column", default="", help="column of images or of their paths")
    group.add_argument("--caption-column", action="append", default=[], help="column of captions; may be repeated")
    group.add_argument("--id-column", default="", help="column or field with ids (default: path, or file and row)")


def source_options(arguments: argparse.Namespace) -> SourceOptions:
    """What the user has said."""
    return SourceOptions(
        format=arguments.format,
        images=arguments.images,
        image_column=arguments.image_column,
        caption_columns=tuple(arguments.caption_column),
        id_column=arguments.id_column,
        splits=tuple(arguments.split.split(",")) if arguments.split else (),
    )
