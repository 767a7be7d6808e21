"""Named data sets and files to TRL's prompt/completion rows, whole ones, and which of them to hold out."""

from .formats import (
    FORMATS,
    as_chat,
    as_conversation,
    check_columns,
    seen_columns,
    to_prompt_completion,
    trained_columns,
    trl_format,
    with_columns,
    with_prompts,
)
from .loading import NoSplitError, hub_errors, load_part, load_rows, load_split
from .mixture import DataPart, LoadedPart, mixed, mixture_counts, names_of_parts
from .overlap import rows_in_common, without_held_out
from .rows import IncompleteRowsError, NoAnswersError, check_dataset, check_rows, complete_rows
from .split import held_out_of_stream, held_out_split, rows_digest
from .tokens import rows_to_mix, tokenize_rows


__all__ = [
    "FORMATS",
    "DataPart",
    "IncompleteRowsError",
    "LoadedPart",
    "NoAnswersError",
    "NoSplitError",
    "as_chat",
    "as_conversation",
    "check_columns",
    "check_dataset",
    "check_rows",
    "complete_rows",
    "held_out_of_stream",
    "held_out_split",
    "hub_errors",
    "load_part",
    "load_rows",
    "load_split",
    "mixed",
    "mixture_counts",
    "names_of_parts",
    "rows_digest",
    "rows_in_common",
    "rows_to_mix",
    "seen_columns",
    "to_prompt_completion",
    "tokenize_rows",
    "trained_columns",
    "trl_format",
    "with_columns",
    "with_prompts",
    "without_held_out",
]
