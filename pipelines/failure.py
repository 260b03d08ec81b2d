"""How a run, or a tenant, says that it failed: in one sentence, without the stack that would bury it."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterUserCodeProcessError
from dagster_shared.error import SerializableErrorInfo


class RunFailure(DagsterUserCodeProcessError, dg.Failure):
    """A Failure that is shown as its description alone. Not retried: the sentence says what a person has to do.

    Dagster shows an error of a user's process as that process described it, so the description is given here without a
    stack. There is no public way; the tests of the command line fail if this one ends.
    """

    def __init__(self, description: str, metadata: Mapping[str, Any] | None = None) -> None:
        shown = SerializableErrorInfo(description, stack=[], cls_name=None)
        # The second and third argument are Failure's own: metadata, and that retries are not allowed.
        super().__init__(description, metadata, False, user_code_process_error_infos=[shown])  # type: ignore[no-untyped-call]


class TenantError(Exception):
    """A tenant that is not computed; its sentence says why, and what to do."""
